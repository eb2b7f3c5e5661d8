//go:build linux && amd64

package disk

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
)

// A platter is what a disk holds for certain, and what it may hold beside that when the power fails.
//
// What has been written and not synced may be there or not, each write for itself and torn at sectors. So may what a sync
// was to cover that failed, and it stays so after later syncs that succeed, until it is written again: Linux takes a
// page for clean that it could not write. What becomes of names, and of a file's size, is different where a sync failed: a file
// system whose journal fails does not go on, so a later sync that succeeds covers these. A name is durable when its directory has been
// synced, not before.
type platter struct {
	files   map[int]*content
	names   map[string]int
	renamed []change
}

const pageSize = 4096

// content is a file's. Pages are never written to: they are replaced.
type content struct {
	pages map[int64][]byte
	size  int64
	loose []loose
}

// loose is a write, or a change of size, that may be lost.
type loose struct {
	at     int64
	b      []byte
	resize bool
	limbo  bool // a sync that was to cover it failed
}

// change is of the directory: a name and what it stands for, 0 if for nothing.
type change struct {
	name  string
	inode int
}

func newPlatter() *platter { return &platter{files: map[int]*content{}, names: map[string]int{}} }

func (d *platter) file(inode int) *content {
	if d.files[inode] == nil {
		d.files[inode] = &content{pages: map[int64][]byte{}}
	}
	return d.files[inode]
}

// apply lets an event happen.
func (d *platter) apply(e event) {
	f := d.file(e.inode)
	switch e.kind {
	case written:
		f.loose = append(f.loose, loose{at: e.at, b: e.b})
	case resized:
		f.loose = append(f.loose, loose{at: e.at, resize: true})
	case entered:
		d.renamed = append(d.renamed, change{e.name, e.inode})
	case removed:
		d.renamed = append(d.renamed, change{name: e.name})
	case syncFailed:
		for i := range f.loose {
			f.loose[i].limbo = true
		}
	case synced:
		f.settle()
		if e.inode == 0 {
			for _, c := range d.renamed {
				rename(d.names, c)
			}
			d.renamed = nil
		}
	}
}

func rename(names map[string]int, c change) {
	if delete(names, c.name); c.inode != 0 {
		names[c.name] = c.inode
	}
}

// settle makes durable what a sync covers.
func (f *content) settle() {
	var limbo []loose
	for _, l := range f.loose {
		switch {
		case l.limbo && !l.resize:
			limbo = append(limbo, l)
		default:
			if !l.resize {
				limbo = l.writtenOver(limbo)
			}
			f.land(l)
		}
	}
	f.loose = limbo
}

// writtenOver returns what is left loose of earlier writes.
func (l loose) writtenOver(earlier []loose) (left []loose) {
	end := l.at + int64(len(l.b))
	for _, e := range earlier {
		if n := min(l.at-e.at, int64(len(e.b))); n > 0 {
			left = append(left, loose{at: e.at, b: e.b[:n], limbo: true})
		}
		if n := e.at + int64(len(e.b)) - end; n > 0 {
			n = min(n, int64(len(e.b)))
			left = append(left, loose{at: e.at + int64(len(e.b)) - n, b: e.b[int64(len(e.b))-n:], limbo: true})
		}
	}
	return left
}

// land puts a change into the content.
func (f *content) land(l loose) {
	if l.resize {
		for at := range f.pages {
			if at >= l.at {
				delete(f.pages, at)
			}
		}
		f.size = l.at
		return
	}
	f.size = max(f.size, l.at+int64(len(l.b)))
	for b, at := l.b, l.at; len(b) > 0; {
		start := at / pageSize * pageSize
		n := min(start+pageSize-at, int64(len(b)))
		page := b[:n]
		if n < pageSize {
			page = make([]byte, pageSize)
			copy(page, f.pages[start])
			copy(page[at-start:], b[:n])
		}
		f.pages[start] = page
		b, at = b[n:], at+n
	}
}

// A fate says of each loose thing, in order, what becomes of it.
type fate interface {
	name(change) bool
	write(l loose) []loose // what lands of it
}

// lost, kept: nothing that is loose lands, or all of it.
type (
	lost struct{}
	kept struct{}
)

func (lost) name(change) bool    { return false }
func (lost) write(loose) []loose { return nil }
func (kept) name(change) bool    { return true }
func (kept) write(l loose) []loose {
	return []loose{l}
}

// chance lets anything land, whole or torn.
type chance struct{ *rand.Rand }

func (c chance) name(change) bool { return c.IntN(2) == 0 }

func (c chance) write(l loose) (landed []loose) {
	const lost, whole, torn = 4, 5, 1 // of ten
	switch fate := c.IntN(lost + whole + torn); {
	case fate < lost:
		return nil
	case fate < lost+whole || l.resize:
		return []loose{l}
	}
	for from := 0; from < len(l.b); from += sector {
		if c.IntN(2) == 0 {
			landed = append(landed, loose{at: l.at + int64(from), b: l.b[from:min(from+sector, len(l.b))]})
		}
	}
	return landed
}

// named has the names of a bit set's bits land, and what is written according to another fate.
type named struct {
	fate
	bits, next int
}

func (n *named) name(change) bool {
	n.next++
	return n.bits>>(n.next-1)&1 == 1
}

// found is a directory as it is found after the power cut.
type directory map[string]*content

// cut lets the power fail.
func (d *platter) cut(f fate) directory {
	names := maps.Clone(d.names)
	for _, c := range d.renamed {
		if f.name(c) {
			rename(names, c)
		}
	}
	left := directory{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		left[name] = d.file(names[name]).cut(f)
	}
	return left
}

func (f *content) cut(fate fate) *content {
	left := &content{pages: maps.Clone(f.pages), size: f.size}
	for _, l := range f.loose {
		for _, part := range fate.write(l) {
			left.land(part)
		}
	}
	return left
}

// write makes real what a power cut left.
func (left directory) write(dir string) error {
	for name, f := range left {
		if err := f.write(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

func (f *content) write(path string) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	for at, page := range f.pages {
		if _, err := file.WriteAt(page, at); err != nil {
			return err
		}
	}
	return file.Truncate(f.size)
}

// is says how a real file differs from what it should hold.
func (f *content) is(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if int64(len(b)) != f.size {
		return fmt.Errorf("%s has %d bytes, not %d", path, len(b), f.size)
	}
	zero := make([]byte, pageSize)
	for at := int64(0); at < f.size; at += pageSize {
		want := f.pages[at]
		if want == nil {
			want = zero
		}
		if end := min(at+pageSize, f.size); !bytes.Equal(b[at:end], want[:end-at]) {
			return fmt.Errorf("%s differs at byte %d", path, at)
		}
	}
	return nil
}

// equal compares two contents.
func (f *content) equal(g *content) bool {
	return f.size == g.size && maps.EqualFunc(f.pages, g.pages, bytes.Equal)
}
