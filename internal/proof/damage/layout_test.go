//go:build linux || darwin

package damage

import (
	"encoding/binary"
	"hash/fnv"
	"slices"
	"strings"
)

// A healthy bbolt file taken apart without bbolt and without keystate: what the judge holds against what the store shows.

const (
	pageHeader = 16
	element    = 16

	branchFlag   = 0x01
	leafFlag     = 0x02
	freelistFlag = 0x10
)

var native = binary.NativeEndian

// A layout tells what each page of a healthy file is for, and which rows lie on which pages.
type layout struct {
	pageSize             int
	txid                 uint64
	root, freelist, high uint64
	owner                []string // by page; overflow pages belong to whom the run belongs
	free                 []uint64
	branches, leaves     []uint64
	rows                 []row
}

// A row is one entry of one bucket. Bucket names are joined by slashes.
type row struct {
	bucket, key string
	value       []byte
	at          int      // where the value lies in the file
	pages       []uint64 // from the root page down, overflow pages too
}

func (l *layout) page(image []byte, id uint64) []byte {
	return image[int(id)*l.pageSize:][:l.pageSize]
}

// newest is the meta page with the higher transaction number.
func newest(image []byte, pageSize int) uint64 {
	if txidOf(image, pageSize, 0) > txidOf(image, pageSize, 1) {
		return 0
	}
	return 1
}

func metaOf(image []byte, pageSize int, id uint64) []byte {
	return image[int(id)*pageSize+pageHeader:][:64]
}

func txidOf(image []byte, pageSize int, id uint64) uint64 {
	return native.Uint64(metaOf(image, pageSize, id)[48:])
}

// reseal makes a meta page's checksum right.
func reseal(meta []byte) {
	hash := fnv.New64a()
	hash.Write(meta[:56])
	native.PutUint64(meta[56:], hash.Sum64())
}

func takeApart(image []byte) *layout {
	l := &layout{pageSize: int(native.Uint32(image[pageHeader+8:]))}
	m := metaOf(image, l.pageSize, newest(image, l.pageSize))
	l.root, l.freelist = native.Uint64(m[16:]), native.Uint64(m[32:])
	l.high, l.txid = native.Uint64(m[40:]), native.Uint64(m[48:])
	l.owner = make([]string, l.high)
	l.owner[0], l.owner[1] = "meta", "meta"
	l.own(image, l.freelist, "freelist")
	p := l.page(image, l.freelist)
	count, at := int(native.Uint16(p[10:])), pageHeader
	if count == 0xFFFF {
		count, at = int(native.Uint64(p[at:])), at+8
	}
	list := image[int(l.freelist)*l.pageSize+at:]
	for i := range count {
		l.free = append(l.free, native.Uint64(list[8*i:]))
		l.owner[l.free[i]] = "free"
	}
	l.tree(image, l.root, nil, nil)
	return l
}

// own notes whose a run of pages is, and returns their numbers.
func (l *layout) own(image []byte, id uint64, owner string) (pages []uint64) {
	for n := range uint64(native.Uint32(l.page(image, id)[12:])) + 1 {
		l.owner[id+n] = owner
		pages = append(pages, id+n)
	}
	return pages
}

func ownerOf(names []string) string {
	switch {
	case len(names) == 0:
		return "root"
	case names[0] == "keystate":
		return names[len(names)-1]
	}
	return "program"
}

func (l *layout) tree(image []byte, id uint64, names []string, way []uint64) {
	if slices.Contains(way, id) {
		panic("a page leads to itself") // of a damaged image; who takes one apart recovers
	}
	way = append(slices.Clip(way), l.own(image, id, ownerOf(names))...)
	start := int(id) * l.pageSize
	run := image[start:]
	if native.Uint16(run[8:]) == leafFlag {
		l.leaves = append(l.leaves, id)
		l.leaf(image, start, names, way)
		return
	}
	l.branches = append(l.branches, id)
	for i := range int(native.Uint16(run[10:])) {
		l.tree(image, native.Uint64(run[pageHeader+i*element+8:]), names, way)
	}
}

// leaf takes apart the leaf that begins at byte start, which an inline bucket's does amid a page.
func (l *layout) leaf(image []byte, start int, names []string, way []uint64) {
	run := image[start:]
	for i := range int(native.Uint16(run[10:])) {
		at := pageHeader + i*element
		e := run[at:]
		key := at + int(native.Uint32(e[4:]))
		value := key + int(native.Uint32(e[8:]))
		end := value + int(native.Uint32(e[12:]))
		name := string(run[key:value])
		if native.Uint32(e) == 0 {
			l.rows = append(l.rows, row{strings.Join(names, "/"), name, run[value:end], start + value, way})
			continue
		}
		inner := append(slices.Clip(names), name)
		if root := native.Uint64(run[value:]); root != 0 {
			l.tree(image, root, inner, way)
		} else {
			l.leaf(image, start+value+16, inner, way)
		}
	}
}

// owned lists the pages of one owner.
func (l *layout) owned(owner string) (pages []uint64) {
	for id, o := range l.owner {
		if o == owner {
			pages = append(pages, uint64(id))
		}
	}
	return pages
}

// owners lists who owns pages, in a fixed order.
func (l *layout) owners() []string {
	names := slices.Clone(l.owner)
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(s string) bool { return s == "" })
}
