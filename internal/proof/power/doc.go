// Power runs a command on a disk whose power it can cut. Linux only; it needs root, /dev/fuse and, for -ext4,
// /dev/loop-control and mkfs.ext4.
//
//	power [flags] -- command args…
//
// In the arguments, {mount} stands for the folder that the disk is mounted at, and {cut} for a shell command that
// cuts its power and switches it on again. Whoever cuts first kills, with SIGKILL, whatever has files open there:
// programs do not survive a power cut. The tool ends as its command does, after it has unmounted and removed
// everything; after ^C too, and a server whose tool was killed takes down what there is by itself. When the command
// fails, a copy of what it left is kept, and the tool says where.
//
// # keystate on it
//
// The kill test of internal/proof/kill, with a power cut after most of its kills; from this folder:
//
//	go test -C ../../.. -c -o /tmp/kill.test ./internal/proof/kill
//	go run . -- /tmp/kill.test -test.run 'KillNine|KeepsItsName' -cycles 100000 -dir {mount} '-after-kill={cut}' -test.timeout 0
//	go run . -ext4 -- /tmp/kill.test -test.run 'KillNine|KeepsItsName' -cycles 100000 -dir {mount} '-after-kill={cut}' -test.timeout 0
//
// The first takes a store's syncs and names literally, as POSIX does. The second cuts the power of the whole stack:
// the journal of a real file system is torn, too, and replayed. On two cores, that is 9 cuts a second, or 5. A store
// is made anew every 250 kills; with -per-file 5, more cuts hit the making of one. -test.v shows how far it has
// come.
//
// That such a run can fail at all:
//
//	go run . -- /tmp/kill.test -test.v -test.run NeverSyncs -dir {mount} '-after-kill={cut}'
//	go run . -lie -- /tmp/kill.test -test.v -test.run KillNine -dir {mount} '-after-kill={cut}'
//
// The first passes, for it finds a store that never syncs; the second fails, for the disk lies about syncs. Both
// take a few cuts, with -ext4 as well. kill -9 without power cuts finds neither.
//
// # What is lost
//
// A FUSE file system in memory (package lossy) keeps apart what programs see and what the disk has. A sync of a file
// brings its content and size to the disk, a sync of a folder its names. A cut takes what the disk has, and of all
// else something at random: each write lands or not, or is torn at sectors of 512 bytes; each new, linked or removed
// name lands or not; none of them cares for what became of another, but a rename lands whole or not. In one cut of
// four, nothing lands. A sync takes some time, up to -slow, and a cut in its midst may lose what it was about. A
// share of the kills, -spare, is followed by no cut: the next process finds what the last one has written and never
// synced, and a later cut may still take it.
//
// With -ext4, the file that loses writes is a disk image, with ext4 on a loop device on it. Its barriers arrive as
// syncs of the image; between them sectors are lost and torn in any order, those of ext4's journal and metadata
// included. To cut the power is to leave the old image to the old mount, which may write to it whatever it likes,
// and to mount what the disk had at that moment: the journal is replayed. (ext4's superblock is written in two
// sectors now and then, outside the journal. A tear between them would make the image unmountable, which is a fault
// of no store; it has not been seen.)
//
// What is never lost: permissions, and data that was synced. No sync fails, no bit flips, and nothing is written to
// the wrong place.
//
// # Again
//
// The tool prints the seed of what is lost; -seed repeats it. When the processes are killed, the scheduler decides,
// so a run does not repeat itself to the byte: look at the evidence that a failed one has kept.
//
// # What is where
//
// The tool's process starts the server in another one, so that a mount that hangs does not hang the tool: killing
// the server frees everything that waits for it. After a cut, every file has a new inode, which the kernel has
// nothing of in its caches; processes from before it go on with the old ones, in a world that nothing leads back
// from.
//
// This is a module of its own, so that keystate does not depend on what it needs. Its tests skip what needs root
// without it.
package main
