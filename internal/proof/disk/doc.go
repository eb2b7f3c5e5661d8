// Package disk proves the bbolt store against a disk that fails. It holds tests only.
//
// A program that keeps orders with keystate runs as a process of its own under ptrace, so that every system call it makes
// about the store's directory passes by the test, in order, without root and without a line in the store that knows of it.
// Each call in turn is refused with EIO or ENOSPC, cut short, carried out and then reported as failed, or never reached
// because the process is killed before it. Then the power fails: from the record of what was written, synced, linked and
// removed, the tests build states in which the disk may be found, and open them. What was synced is there; of what was not,
// any part may be, down to sectors and single names; what a failed sync was to cover stays doubtful until it is written
// again. A successor also goes on with what is in the page cache, and then the power fails. Whatever happens, no process
// hangs, dies or leaves a file open, every error has a name that fits, every answer that was given is there byte for byte, a
// phase's rows and its recovery point agree, no commit took effect twice, no effect is sent again after its result was
// durable, and none under another token. During the creation and the compaction of a store there is a whole file or none,
// whoever else creates it meanwhile. And the judges find what is wrong when it is: a disk that lies about a sync, a store
// that leaves one out or answers too early.
//
//	go test ./internal/proof/disk -run Failing -disk-rounds=20 -timeout=0
//	go test ./internal/proof/disk -run PowerCut -disk-states=1000000 -timeout=0
//
// From the second round on, the successor's calls fail, too. -disk-seed draws other states. Where processes cannot be
// traced the tests skip; with KEYSTATE_MUST_TRACE=1 in the environment they fail instead.
package disk
