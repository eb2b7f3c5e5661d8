package boltfile

import (
	"bytes"
	"fmt"
	"io"
)

const (
	pageHeaderSize   = 16 // id uint64, flags uint16, count uint16, overflow uint32
	elementSize      = 16 // of a branch's element as of a leaf's
	bucketHeaderSize = 16 // root uint64, sequence uint64

	branchFlag   = 0x01
	leafFlag     = 0x02
	metaFlag     = 0x04
	freelistFlag = 0x10

	bucketFlag = 0x01 // of a leaf's element: its value is a bucket

	maxKeySize = 32 << 10 // documented by bbolt for keys and bucket names

	// maxPath is how many pages there may be on the way from the root bucket's page to any
	// other, through all buckets on that way. It bounds the checker's memory: a page each,
	// at most 32 MiB. A tree in a healthy file has fewer than ten levels.
	maxPath = 512
)

// An Extent is how much of a bucket is checked.
type Extent int

const (
	Nothing    Extent = iota
	Branches          // the pages above its leaves: then walking down to any key comes to an end
	Everything        // all its pages, and the buckets in it as visit says
)

// Check checks the structure below the header: the freelist, the root bucket's tree, and
// of every bucket as much as visit says, given its names from the top. Path is valid
// only during the call. A nil visit means everything; then every page below the high
// water mark must be used or free, or else the error is ErrLeaked.
//
// When the freelist was not written, Check visits everything whatever visit says: opening
// such a file, bbolt walks all of them in a goroutine whose panic nobody can recover.
//
// Its other errors are ErrDamaged, the reader's, and one saying that buckets are nested too
// deep to be checked.
func Check(r io.ReaderAt, size int64, h Header, visit func(path [][]byte) Extent) error {
	if err := h.check(h.TxID%2, size); err != nil {
		return err
	}
	c := checker{r: r, Header: h, visit: visit, claimed: make([]uint64, h.HighWater/64+1)}
	if h.Freelist == noFreelist {
		c.visit = nil
	}
	if err := c.claim(0, 1); err != nil { // the meta pages
		return err
	}
	if _, err := c.tree(h.Root, nil, nil); err != nil {
		return err
	}
	if h.Freelist == noFreelist {
		return nil
	}
	if err := c.freelist(); err != nil {
		return err
	}
	if visit != nil {
		return nil
	}
	return c.unclaimed()
}

type checker struct {
	r io.ReaderAt
	Header
	visit   func(path [][]byte) Extent
	claimed []uint64 // a bit for every page that has been found used or free
	pages   [][]byte // buffers for the pages on the way from the root page, reused
	depth   int      // how many of them are in use
	names   [][]byte // of the buckets on that way
}

// A page is a run of pages with one header.
type page struct {
	id       uint64
	flags    uint16
	count    int
	overflow uint64
	inline   bool   // lies in a bucket's value, which lies on page id
	head     []byte // the first page; it holds all elements but their keys and values, for
	// bbolt splits what outgrows a page unless it has four elements or fewer
}

func parsePage(head []byte) page {
	return page{
		id:       native.Uint64(head),
		flags:    native.Uint16(head[8:]),
		count:    int(native.Uint16(head[10:])),
		overflow: uint64(native.Uint32(head[12:])),
		head:     head,
	}
}

// size is the run's in bytes.
func (p page) size() uint64 { return (p.overflow + 1) * uint64(len(p.head)) }

// An element is a branch's or a leaf's; offsets count from the start of its page.
type element struct {
	flags           uint32
	child           uint64
	key, value, end uint64
}

func (p page) element(i int) element {
	at := pageHeaderSize + i*elementSize
	b := p.head[at : at+elementSize]
	if p.flags == branchFlag {
		key := uint64(at) + uint64(native.Uint32(b))
		end := key + uint64(native.Uint32(b[4:]))
		return element{key: key, value: end, end: end, child: native.Uint64(b[8:])}
	}
	key := uint64(at) + uint64(native.Uint32(b[4:]))
	value := key + uint64(native.Uint32(b[8:]))
	return element{flags: native.Uint32(b), key: key, value: value, end: value + uint64(native.Uint32(b[12:]))}
}

// tree checks page id and all below it, whose keys must begin with first and end before
// limit (nil: any), and returns how many levels they form.
func (c *checker) tree(id uint64, first, limit []byte) (levels int, err error) {
	p, err := c.enter(id)
	if err != nil {
		return 0, err
	}
	defer c.leave()
	switch p.flags {
	case leafFlag:
		return 1, c.leaf(p, first, limit)
	case branchFlag:
		return c.branch(p, first, limit)
	}
	return 0, damaged(id, "flags %#x in a bucket's tree", p.flags)
}

func (c *checker) branch(p page, first, limit []byte) (levels int, err error) {
	if err := c.scan(p, first, limit); err != nil {
		return 0, err
	}
	if p.count == 0 {
		return 0, damaged(p.id, "branch without elements")
	}
	key, err := c.key(p, 0)
	if err != nil {
		return 0, err
	}
	for i := range p.count {
		next := limit
		if i+1 < p.count {
			if next, err = c.key(p, i+1); err != nil {
				return 0, err
			}
		}
		n, err := c.tree(p.element(i).child, key, next)
		switch {
		case err != nil:
			return 0, err
		case i > 0 && n != levels:
			return 0, damaged(p.id, "child %d has %d levels, those before it %d", i, n, levels)
		}
		key, levels = next, n
	}
	return levels + 1, nil
}

// outline checks that the branches of page id and below lead down and nowhere else, and returns how many levels there are. It reads
// one leaf, to know how deep they lie, and claims the others. Keys it leaves to those who read them: a search among keys
// out of order misses some, but it ends.
func (c *checker) outline(id uint64) (levels int, err error) {
	p, err := c.enter(id)
	if err != nil {
		return 0, err
	}
	defer c.leave()
	switch {
	case p.flags == leafFlag:
		return 1, nil
	case p.flags != branchFlag:
		return 0, damaged(id, "flags %#x in a bucket's tree", p.flags)
	case p.count == 0:
		return 0, damaged(id, "branch without elements")
	case pageHeaderSize+p.count*elementSize > len(p.head):
		return 0, damaged(id, "%d elements on a page of %d bytes", p.count, len(p.head))
	}
	for i := range p.count {
		child := p.element(i).child
		if i > 0 && levels == 1 {
			if err := c.claim(child, 0); err != nil {
				return 0, err
			}
			continue
		}
		n, err := c.outline(child)
		switch {
		case err != nil:
			return 0, err
		case i > 0 && n != levels:
			return 0, damaged(id, "child %d has %d levels, those before it %d", i, n, levels)
		}
		levels = n
	}
	return levels + 1, nil
}

func (c *checker) leaf(p page, first, limit []byte) error {
	if err := c.scan(p, first, limit); err != nil {
		return err
	}
	for i := range p.count {
		e := p.element(i)
		switch {
		case e.flags == 0 && len(c.names) > 0: // the root bucket holds nothing but buckets
			continue
		case e.flags != bucketFlag:
			return damaged(p.id, "element %d has flags %#x", i, e.flags)
		case p.inline:
			return damaged(p.id, "element %d is a bucket in an inline bucket", i)
		}
		if err := c.bucket(p, i, e); err != nil {
			return err
		}
	}
	return nil
}

// bucket checks the bucket that is element i of leaf p, if it is to be visited.
func (c *checker) bucket(p page, i int, e element) error {
	// The smallest buckets are kept in their value, up to a quarter of a page.
	if n := e.end - e.value; n < bucketHeaderSize || n > bucketHeaderSize+uint64(c.PageSize)/4 {
		return damaged(p.id, "element %d is a bucket of %d bytes", i, n)
	}
	b, err := c.bytes(p, e.key, e.end)
	if err != nil {
		return err
	}
	name, value := b[:e.value-e.key], b[e.value-e.key:]
	c.names = append(c.names, name)
	defer func() { c.names = c.names[:len(c.names)-1] }()
	extent := Everything
	if c.visit != nil {
		extent = c.visit(c.names)
	}
	root := native.Uint64(value)
	switch {
	case extent == Nothing:
		return nil
	case root != 0 && extent == Branches:
		_, err := c.outline(root)
		return err
	case root != 0:
		_, err := c.tree(root, nil, nil)
		return err
	}
	if len(value) < bucketHeaderSize+pageHeaderSize {
		return damaged(p.id, "element %d is an inline bucket of %d bytes", i, len(value))
	}
	inline := parsePage(value[bucketHeaderSize:])
	if inline.id != 0 || inline.flags != leafFlag || inline.overflow != 0 {
		return damaged(p.id, "element %d is an inline bucket with page %d, flags %#x, overflow %d",
			i, inline.id, inline.flags, inline.overflow)
	}
	inline.id, inline.inline = p.id, true
	return c.leaf(inline, nil, nil)
}

// scan checks where p's elements lie and that their keys ascend from first to below limit.
//
// A page's first key is its parent's key for it, not merely no less. bbolt relies on it:
// it replaces a rewritten page in the parent by looking for its former first key, and where
// that is not found it adds the new page and leaves the old, by then free, in place.
func (c *checker) scan(p page, first, limit []byte) error {
	end := uint64(pageHeaderSize + p.count*elementSize)
	if end > uint64(len(p.head)) {
		return damaged(p.id, "%d elements on a page of %d bytes", p.count, len(p.head))
	}
	if p.count == 0 && first != nil {
		return damaged(p.id, "empty, though a branch names it")
	}
	var last []byte
	for i := range p.count {
		e := p.element(i)
		switch n := e.value - e.key; {
		case e.key != end:
			return damaged(p.id, "element %d lies at byte %d, want %d", i, e.key, end)
		case e.end > p.size():
			return damaged(p.id, "element %d ends at byte %d of %d", i, e.end, p.size())
		case n > maxKeySize:
			return damaged(p.id, "element %d has a key of %d bytes", i, n)
		}
		key, err := c.key(p, i)
		switch {
		case err != nil:
			return err
		case i == 0 && first != nil && !bytes.Equal(key, first):
			return damaged(p.id, "first key is not the one that its branch has")
		case bytes.Compare(last, key) >= 0: // nor may it be empty
			return damaged(p.id, "key %d is not above the one before it", i)
		}
		last, end = key, e.end
	}
	if limit != nil && bytes.Compare(last, limit) >= 0 {
		return damaged(p.id, "last key is not below the next in its branch")
	}
	// The run is as long as it must be; boltdb/bolt took a page more where end fills the last.
	if n := uint64(len(p.head)); p.overflow != (end-1)/n && p.overflow != end/n {
		return damaged(p.id, "%d bytes on 1+%d pages", end, p.overflow)
	}
	return nil
}

// freelist checks the freelist and claims the pages that it names.
func (c *checker) freelist() error {
	p, err := c.enter(c.Freelist)
	if err != nil {
		return err
	}
	defer c.leave()
	if p.flags != freelistFlag {
		return damaged(p.id, "flags %#x, want a freelist", p.flags)
	}
	count, at := uint64(p.count), uint64(pageHeaderSize)
	if count == 0xFFFF { // too many for the header, so the first element tells
		count, at = native.Uint64(p.head[at:]), at+8
	}
	if count < uint64(p.count) || count > c.HighWater || at+8*count > p.size() {
		return damaged(p.id, "%d free pages on 1+%d pages", count, p.overflow)
	}
	// The run was measured when the pages that it takes could still be among the free ones.
	if room := pageHeaderSize + 8 + 8*(count+p.overflow+1); p.overflow > room/uint64(c.PageSize) {
		return damaged(p.id, "only %d free pages on 1+%d pages", count, p.overflow)
	}
	var last uint64
	for end := at + 8*count; at < end; at += 8 {
		offset := at % uint64(c.PageSize)
		if offset == 0 {
			if err := readFull(c.r, p.head, int64(p.id*uint64(c.PageSize)+at)); err != nil {
				return err
			}
		}
		id := native.Uint64(p.head[offset:])
		if id <= last {
			return damaged(p.id, "free page %d comes after %d", id, last)
		}
		if err := c.claim(id, 0); err != nil {
			return err
		}
		last = id
	}
	return nil
}

// enter claims and reads page id, which stays until leave.
func (c *checker) enter(id uint64) (page, error) {
	if c.depth == maxPath {
		return page{}, fmt.Errorf("page %d: more than %d pages below the root bucket's", id, maxPath)
	}
	if err := c.claim(id, 0); err != nil {
		return page{}, err
	}
	if c.depth == len(c.pages) {
		c.pages = append(c.pages, make([]byte, c.PageSize))
	}
	head := c.pages[c.depth]
	if err := readFull(c.r, head, int64(id)*int64(c.PageSize)); err != nil {
		return page{}, err
	}
	p := parsePage(head)
	if p.id != id {
		return page{}, damaged(id, "has the header of page %d", p.id)
	}
	if p.overflow > 0 {
		if err := c.claim(id+1, p.overflow-1); err != nil {
			return page{}, err
		}
	}
	c.depth++
	return p, nil
}

func (c *checker) leave() { c.depth-- }

// bytes returns part of a page, from the buffer if it is there. Beyond the first page there
// are but a few keys, each next to a large value that is not worth reading.
func (c *checker) bytes(p page, from, to uint64) ([]byte, error) {
	if to <= uint64(len(p.head)) {
		return p.head[from:to], nil
	}
	b := make([]byte, to-from)
	return b, readFull(c.r, b, int64(p.id*uint64(c.PageSize)+from))
}

func (c *checker) key(p page, i int) ([]byte, error) {
	e := p.element(i)
	return c.bytes(p, e.key, e.value)
}

// claim notes that a page and the overflow pages after it are used or free.
func (c *checker) claim(id, overflow uint64) error {
	if id >= c.HighWater || overflow >= c.HighWater-id {
		return damaged(id, "with %d more it is beyond the last page, %d", overflow, c.HighWater-1)
	}
	for end := id + overflow; id <= end; id++ {
		if c.claimed[id/64]&(1<<(id%64)) != 0 {
			return damaged(id, "used or free more than once")
		}
		c.claimed[id/64] |= 1 << (id % 64)
	}
	return nil
}

// unclaimed finds the pages that are neither used nor free.
func (c *checker) unclaimed() error {
	var first, count uint64
	for id := range c.HighWater {
		if c.claimed[id/64]&(1<<(id%64)) == 0 {
			if count++; count == 1 {
				first = id
			}
		}
	}
	if count > 0 {
		return fmt.Errorf("%w: page %d and %d more are neither used nor free", ErrLeaked, first, count-1)
	}
	return nil
}
