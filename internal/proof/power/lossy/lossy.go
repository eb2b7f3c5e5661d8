// Package lossy is a file system in memory that loses what was not synced when its power is cut.
//
// Every file and folder is there twice: as programs see it, and as the disk has it. A sync of a file brings its
// content and its size to the disk, and not its name; a sync of a folder brings its names, and not what they name.
// [FS.Cut] takes what the disk has, adds some of what was not synced yet, at random, and makes a new world of it:
//
//   - A write to a file lands, or does not, or some of its sectors of 512 bytes do, whatever became of the writes
//     before and after it. Of two writes to one sector that both land, the later one stays. A file's growth is an
//     operation of its own: data that lands past the end is lost, and an end that lands without its data is followed
//     by zeros.
//   - A change to a folder (a name that is new, linked or gone) lands or does not, whatever became of others. This
//     is harsher than journaling file systems are, and what POSIX allows. A rename is one change: it lands whole or
//     not at all.
//   - How much lands differs from one cut to the next: from nothing to everything.
//
// A sync counts from its end, for what was written before its beginning; a cut in its midst may lose any of it.
//
// Whoever has files open from before a cut goes on in the old world, which nothing leads back from: a write of a
// process that has yet to die cannot reach the new one.
package lossy

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"
)

// An FS is a file system whose power can be cut.
type FS struct {
	mu     sync.Mutex
	rand   *rand.Rand
	slow   time.Duration // most time that a sync takes
	lies   bool
	world  *world
	lastID uint64
	step   uint64 // counts changes of all kinds
	tally  Tally
}

// A world is a file system between two cuts.
type world struct {
	root    *Node
	changes []change // to its folders, not synced yet, in their order
	syncing int
	over    chan struct{} // closed by the cut that ends it
}

// A Tally is what has happened so far.
type Tally struct {
	Cuts, MidSync          int // power cuts, and those of them that came while a sync was under way
	Writes, Syncs          int
	Landed, Lost, Torn     int // unsynced writes and resizings, in cuts
	NamesLanded, NamesLost int // unsynced changes to folders, in cuts
}

// New makes an empty file system. Each of its syncs takes some time, at most slow.
func New(seed uint64, slow time.Duration) *FS {
	fs := &FS{rand: rand.New(rand.NewPCG(seed, 0)), slow: slow, lastID: 1}
	fs.world = &world{over: make(chan struct{})}
	fs.world.root = fs.newFolder(fs.world, 0o755)
	return fs
}

// Lie makes every sync from now on say that it is done, and do nothing.
func (fs *FS) Lie() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.lies = true
}

// Root is the uppermost folder since the last cut.
func (fs *FS) Root() *Node {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.world.root
}

// Tally returns what has happened so far.
func (fs *FS) Tally() Tally {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.tally
}

// Cut cuts the power, and switches it on again.
func (fs *FS) Cut() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	old := fs.world
	fs.tally.Cuts++
	if old.syncing > 0 {
		fs.tally.MidSync++
	}
	likely := 0.0 // that something lands
	if fs.rand.IntN(4) > 0 {
		likely = fs.rand.Float64()
	}
	lands := func() bool { return fs.rand.Float64() < likely }
	for _, c := range old.changes {
		if lands() {
			fs.tally.NamesLanded++
			c.keep()
		} else {
			fs.tally.NamesLost++
		}
	}
	fs.world = &world{over: make(chan struct{})}
	fs.world.root = fs.reborn(old.root, lands, map[*Node]*Node{})
	close(old.over)
}

// reborn is what a cut leaves of a file or folder.
func (fs *FS) reborn(old *Node, lands func() bool, known map[*Node]*Node) *Node {
	if n := known[old]; n != nil {
		return n
	}
	if !old.folder {
		for _, w := range old.writes {
			fs.settle(old.kept, w, lands)
		}
		n := fs.newFile(fs.world, old.mode)
		n.modified = old.modified
		n.kept, n.seen = old.kept, old.kept.clone()
		known[old], old.kept = n, newContent() // nothing leads back
		return n
	}
	n := fs.newFolder(fs.world, old.mode)
	n.modified = old.modified
	known[old] = n
	for _, name := range slices.Sorted(maps.Keys(old.keptNames)) {
		child := fs.reborn(old.keptNames[name], lands, known)
		n.keptNames[name], n.names[name] = child, child
		child.links++
	}
	return n
}

// settle brings an unsynced write to the disk, or loses it, or tears it.
func (fs *FS) settle(disk *content, w write, lands func() bool) {
	if w.resize || fs.rand.IntN(2) == 0 {
		if lands() {
			fs.tally.Landed++
			w.apply(disk)
		} else {
			fs.tally.Lost++
		}
		return
	}
	landed, all := 0, 0
	for b, off := w.data, w.off; len(b) > 0; all++ {
		n := min(int64(len(b)), Sector-off%Sector)
		if lands() {
			landed++
			disk.write(b[:n], off)
		}
		b, off = b[n:], off+n
	}
	switch landed {
	case 0:
		fs.tally.Lost++
	case all:
		fs.tally.Landed++
	default:
		fs.tally.Torn++
	}
}

// A Node is a file or a folder of one world.
type Node struct {
	fs       *FS
	world    *world
	id       uint64
	folder   bool
	mode     uint32
	modified time.Time
	links    int

	seen, kept *content // a file's, as programs see it and as the disk has it
	writes     []write  // what kept lacks, in its order

	names, keptNames map[string]*Node // a folder's
}

// A write is one to a file, or a change of its size.
type write struct {
	step   uint64
	off    int64 // of a resizing: the new size
	data   []byte
	resize bool
	grow   bool // a resizing that never shrinks
}

func (w write) apply(c *content) {
	switch {
	case !w.resize:
		c.write(w.data, w.off)
	case !w.grow || c.size < w.off:
		c.resize(w.off)
	}
}

// A change sets names in folders, all of them or none.
type change struct {
	step    uint64
	entries []entry
}

type entry struct {
	folder *Node
	name   string
	node   *Node // nil: the name is gone
}

func (c change) touches(folder *Node) bool {
	return slices.ContainsFunc(c.entries, func(e entry) bool { return e.folder == folder })
}

func (c change) keep() {
	for _, e := range c.entries {
		set(e.folder.keptNames, e)
	}
}

func set(names map[string]*Node, e entry) {
	if e.node == nil {
		delete(names, e.name)
	} else {
		names[e.name] = e.node
	}
}

// newFile makes a file that nothing names yet. The caller holds the lock.
func (fs *FS) newFile(w *world, mode uint32) *Node {
	fs.lastID++
	return &Node{fs: fs, world: w, id: fs.lastID, mode: mode, modified: time.Now(), seen: newContent(), kept: newContent()}
}

// newFolder makes a folder that nothing names yet. The caller holds the lock.
func (fs *FS) newFolder(w *world, mode uint32) *Node {
	n := fs.newFile(w, mode)
	n.folder, n.names, n.keptNames = true, map[string]*Node{}, map[string]*Node{}
	return n
}

// change carries out a change for programs to see. The caller holds the lock.
func (fs *FS) change(entries ...entry) {
	fs.step++
	for _, e := range entries {
		if old := e.folder.names[e.name]; old != nil {
			old.links--
		}
		if e.node != nil {
			e.node.links++
		}
		set(e.folder.names, e)
		e.folder.modified = time.Now()
	}
	w := entries[0].folder.world
	w.changes = append(w.changes, change{fs.step, entries})
}

// A Stat describes a file or folder.
type Stat struct {
	ID       uint64 // never used again, neither in this world nor in another
	Folder   bool
	Mode     uint32 // permissions
	Size     int64
	Links    int
	Modified time.Time
}

func (n *Node) Stat() Stat {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	s := Stat{ID: n.id, Folder: n.folder, Mode: n.mode, Links: n.links, Modified: n.modified}
	if !n.folder {
		s.Size = n.seen.size
	}
	return s
}

// Chmod changes the permissions; they are never lost.
func (n *Node) Chmod(mode uint32) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	n.mode = mode
}

// Names returns a folder's names in their order.
func (n *Node) Names() []string {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	return slices.Sorted(maps.Keys(n.names))
}

func (n *Node) Lookup(name string) (*Node, error) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if child := n.names[name]; child != nil {
		return child, nil
	}
	return nil, syscall.ENOENT
}

// Create makes an empty file.
func (n *Node) Create(name string, mode uint32) (*Node, error) {
	return n.add(name, mode, n.fs.newFile)
}

// Mkdir makes an empty folder.
func (n *Node) Mkdir(name string, mode uint32) (*Node, error) {
	return n.add(name, mode, n.fs.newFolder)
}

func (n *Node) add(name string, mode uint32, make func(*world, uint32) *Node) (*Node, error) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if n.names[name] != nil {
		return nil, syscall.EEXIST
	}
	child := make(n.world, mode)
	n.fs.change(entry{n, name, child})
	return child, nil
}

// Link gives a file one more name.
func (n *Node) Link(target *Node, name string) error {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	switch {
	case target.world != n.world:
		return syscall.EXDEV
	case target.folder:
		return syscall.EPERM
	case n.names[name] != nil:
		return syscall.EEXIST
	}
	n.fs.change(entry{n, name, target})
	return nil
}

// Unlink takes a file's name away.
func (n *Node) Unlink(name string) error {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	switch child := n.names[name]; {
	case child == nil:
		return syscall.ENOENT
	case child.folder:
		return syscall.EISDIR
	}
	n.fs.change(entry{n, name, nil})
	return nil
}

// Rmdir removes an empty folder.
func (n *Node) Rmdir(name string) error {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	switch child := n.names[name]; {
	case child == nil:
		return syscall.ENOENT
	case !child.folder:
		return syscall.ENOTDIR
	case len(child.names) > 0:
		return syscall.ENOTEMPTY
	}
	n.fs.change(entry{n, name, nil})
	return nil
}

// Rename gives what has a name another one, and takes that from what has had it.
func (n *Node) Rename(name string, to *Node, as string) error {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	moved := n.names[name]
	old := to.names[as]
	switch {
	case moved == nil:
		return syscall.ENOENT
	case to.world != n.world:
		return syscall.EXDEV
	case old == moved:
		return nil
	case old != nil && old.folder && !moved.folder:
		return syscall.EISDIR
	case old != nil && !old.folder && moved.folder:
		return syscall.ENOTDIR
	case old != nil && len(old.names) > 0:
		return syscall.ENOTEMPTY
	}
	n.fs.change(entry{n, name, nil}, entry{to, as, moved})
	return nil
}

// ReadAt fills b from what the file has at off, and returns how much that is.
func (n *Node) ReadAt(b []byte, off int64) int {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	return n.seen.read(b, off)
}

// WriteAt puts b into the file at off; the file grows as needed.
func (n *Node) WriteAt(b []byte, off int64) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	n.fs.tally.Writes++
	if end := off + int64(len(b)); len(b) > 0 && end > n.seen.size {
		n.do(write{off: end, resize: true, grow: true})
	}
	n.do(write{off: off, data: slices.Clone(b)})
}

// Truncate makes the file as long as size.
func (n *Node) Truncate(size int64) {
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	n.do(write{off: size, resize: true})
}

// do carries out a write for programs to see. The caller holds the lock.
func (n *Node) do(w write) {
	n.fs.step++
	w.step = n.fs.step
	w.apply(n.seen)
	n.writes = append(n.writes, w)
	n.modified = time.Now()
}

// Sync brings a file's content and size, or a folder's names, to the disk.
func (n *Node) Sync() {
	fs := n.fs
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.tally.Syncs++
	if fs.lies {
		return
	}
	began := fs.step
	n.world.syncing++
	fs.pause(n.world)
	n.world.syncing--
	if n.world != fs.world {
		return // its disk is gone
	}
	if n.folder {
		n.world.changes = slices.DeleteFunc(n.world.changes, func(c change) bool {
			if c.step > began || !c.touches(n) {
				return false
			}
			c.keep()
			return true
		})
		return
	}
	done := 0
	for ; done < len(n.writes) && n.writes[done].step <= began; done++ {
		n.writes[done].apply(n.kept)
	}
	n.writes = slices.Clone(n.writes[done:])
}

// pause lets the disk take its time over a sync, until the world ends. It lets go of the lock meanwhile.
func (fs *FS) pause(w *world) {
	if fs.slow <= 0 {
		return
	}
	t := time.NewTimer(time.Duration(fs.rand.Int64N(int64(fs.slow))))
	fs.mu.Unlock()
	select {
	case <-t.C:
	case <-w.over:
		t.Stop()
	}
	fs.mu.Lock()
}
