//go:build linux || darwin

package damage

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
)

// The kinds of damage.

// A victim is a store's last file, about to be damaged.
type victim struct {
	*rand.Rand
	*layout
	store  *store
	image  []byte
	others []*store
}

// pick takes one of several things, all alike.
func pick[T any](v *victim, from []T) T { return from[v.IntN(len(from))] }

// somePage picks an owner, and then one of its pages: rare ones are hit as often as common ones.
func (v *victim) somePage() uint64 { return pick(v, v.owned(pick(v, v.owners()))) }

// usedPage is one that is read.
func (v *victim) usedPage() uint64 {
	for {
		if id := v.somePage(); v.owner[id] != "free" && v.owner[id] != "" {
			return id
		}
	}
}

func (v *victim) at(id uint64) []byte { return v.page(v.image, id) }

func (v *victim) random(b []byte) {
	for i := range b {
		b[i] = byte(v.Uint32())
	}
}

// name says which page it is, for whoever reads of a failure.
func (v *victim) name(id uint64) string { return fmt.Sprintf("page %d (%s)", id, v.owner[id]) }

const (
	sealedMetas  = "metas: sealed lies"
	sealedRecord = "record: sealed lies"
)

// A kind damages a victim and says what it did.
type kind struct {
	name string
	do   func(v *victim) string
}

var kinds = []kind{
	{"one bit", func(v *victim) string { return v.flip(v.somePage()) }},
	{"one bit of structure", func(v *victim) string {
		id := v.usedPage()
		at := v.IntN(pageHeader + element*max(1, min(int(native.Uint16(v.at(id)[10:])), v.pageSize/element-1)))
		v.at(id)[at] ^= 1 << v.IntN(8)
		return fmt.Sprintf("a bit of byte %d of %s", at, v.name(id))
	}},
	{"several bits", func(v *victim) string {
		var what []string
		for range 2 + v.IntN(31) {
			what = append(what, v.flip(v.somePage()))
		}
		return strings.Join(what, ", ")
	}},
	{"burst of bits", func(v *victim) string {
		id := v.usedPage()
		at := v.IntN(v.pageSize)
		v.random(v.at(id)[at:min(at+1+v.IntN(64), v.pageSize)])
		return fmt.Sprintf("some bytes from %d of %s", at, v.name(id))
	}},
	{"zeroed page", func(v *victim) string {
		id := v.somePage()
		clear(v.at(id))
		return v.name(id)
	}},
	{"zeroed run", func(v *victim) string {
		from := v.Uint64N(v.high)
		to := min(from+1+v.Uint64N(8), v.high)
		clear(v.image[from*uint64(v.pageSize) : to*uint64(v.pageSize)])
		return fmt.Sprintf("pages %d to %d", from, to-1)
	}},
	{"random page", func(v *victim) string {
		id := v.somePage()
		v.random(v.at(id))
		return v.name(id)
	}},
	{"random body", func(v *victim) string {
		id := v.usedPage()
		v.random(v.at(id)[pageHeader:])
		return v.name(id)
	}},
	{"stale page", func(v *victim) string { return v.stale(1) }},
	{"stale pages", func(v *victim) string { return v.stale(2 + v.IntN(20)) }},
	{"stale bucket", (*victim).staleBucket},
	{"lost commit", (*victim).lostCommit},
	{"older generation", func(v *victim) string {
		g := v.IntN(v.store.last())
		v.image = bytes.Clone(v.store.images[g])
		return fmt.Sprint("generation ", g)
	}},
	{"older generation, longer file", func(v *victim) string {
		g := v.IntN(v.store.last())
		copy(v.image, v.store.images[g])
		return fmt.Sprint("generation ", g)
	}},
	{"swapped pages", func(v *victim) string { return v.swap(false) }},
	{"swapped contents", func(v *victim) string { return v.swap(true) }},
	{"torn page", (*victim).tear},
	{"shifted pages", func(v *victim) string {
		id := 2 + v.Uint64N(v.high-2)
		from := v.image[id*uint64(v.pageSize):]
		if v.IntN(2) == 0 {
			copy(from, from[v.pageSize:])
		} else {
			copy(from[v.pageSize:], bytes.Clone(from))
		}
		return fmt.Sprint("from page ", id)
	}},
	{"another store's page", (*victim).foreignPage},
	{"header: wrong id", func(v *victim) string {
		id := v.usedPage()
		native.PutUint64(v.at(id), pick(v, []uint64{id + 1, id - 1, 0, v.high, math.MaxUint64, v.somePage()}))
		return v.name(id)
	}},
	{"header: wrong flags", func(v *victim) string {
		id := v.usedPage()
		native.PutUint16(v.at(id)[8:], pick(v, []uint16{0, 1, 2, 3, 4, 0x10, 0x12, 0xFFFF}))
		return v.name(id)
	}},
	{"header: wrong count", func(v *victim) string {
		id := v.usedPage()
		n := native.Uint16(v.at(id)[10:])
		native.PutUint16(v.at(id)[10:], pick(v, []uint16{0, 1, n + 1, n - 1, n / 2, 2 * n, 0x7FFF, 0xFFFE, 0xFFFF}))
		return v.name(id)
	}},
	{"header: wrong overflow", func(v *victim) string {
		id := v.usedPage()
		n := native.Uint32(v.at(id)[12:])
		far := uint32(v.high - id)
		native.PutUint32(v.at(id)[12:], pick(v, []uint32{n + 1, n - 1, 0, far, far - 1, far + 7, math.MaxUint32, math.MaxInt32}))
		return v.name(id)
	}},
	{"branch: wrong child", (*victim).rewire},
	{"element: wrong", (*victim).craftElement},
	{"bucket: wrong root", (*victim).rehang},
	{"freelist: wrong", (*victim).craftFreelist},
	{"metas: one stale", func(v *victim) string {
		g, id := v.IntN(v.store.last()), v.Uint64N(2)
		copy(v.at(id), v.page(v.store.images[g], id))
		return fmt.Sprintf("meta %d of generation %d", id, g)
	}},
	{"metas: both stale", func(v *victim) string {
		g := v.IntN(v.store.last())
		copy(v.image[:2*v.pageSize], v.store.images[g][:2*v.pageSize])
		return fmt.Sprint("of generation ", g)
	}},
	{"metas: swapped", func(v *victim) string {
		first := bytes.Clone(v.at(0))
		copy(v.at(0), v.at(1))
		copy(v.at(1), first)
		if v.IntN(2) == 0 {
			native.PutUint64(v.at(0), 0)
			native.PutUint64(v.at(1), 1)
			return "with right headers"
		}
		return "headers and all"
	}},
	{"metas: wrong checksum", func(v *victim) string {
		what := ""
		for id := range uint64(2) {
			if v.IntN(2) == 0 || id == 1 && what == "" {
				metaOf(v.image, v.pageSize, id)[v.IntN(64)] ^= 1 << v.IntN(8)
				what += fmt.Sprint(" ", id)
			}
		}
		return what
	}},
	{sealedMetas, (*victim).craftMeta},
	{"truncated anywhere", func(v *victim) string {
		v.image = v.image[:v.IntN(len(v.image))]
		return fmt.Sprintf("to %d bytes", len(v.image))
	}},
	{"truncated at a page", func(v *victim) string {
		v.image = v.image[:v.pageSize*v.IntN(len(v.image)/v.pageSize)]
		return fmt.Sprintf("to %d bytes", len(v.image))
	}},
	{"extended", func(v *victim) string {
		junk := make([]byte, 1+v.IntN(3*v.pageSize))
		v.random(junk)
		v.image = append(v.image, junk...)
		return fmt.Sprintf("by %d bytes", len(junk))
	}},
	{sealedRecord, (*victim).craftRecord},
	{"ledger: sealed lies", (*victim).craftLedger},
	{"later format", (*victim).laterFormat},
	{"foreign file", (*victim).foreignFile},
}

func (v *victim) flip(id uint64) string {
	at := v.IntN(v.pageSize)
	v.at(id)[at] ^= 1 << v.IntN(8)
	return fmt.Sprintf("a bit of byte %d of %s", at, v.name(id))
}

// differing lists the pages that were otherwise in an older generation.
func (v *victim) differing(g int) (pages []uint64) {
	old := v.store.images[g]
	for id := uint64(2); id < v.high && int(id+1)*v.pageSize <= len(old); id++ {
		if !bytes.Equal(v.page(old, id), v.at(id)) {
			pages = append(pages, id)
		}
	}
	return pages
}

// stale puts pages back as they were at an older generation, read ones mostly.
func (v *victim) stale(n int) string {
	g := v.IntN(v.store.last())
	pages := v.differing(g)
	used := slices.DeleteFunc(slices.Clone(pages), func(id uint64) bool { return v.owner[id] == "free" })
	if len(used) > 0 && v.IntN(8) > 0 {
		pages = used
	}
	what := []string{fmt.Sprint("of generation ", g)}
	for range min(n, len(pages)) {
		id := pick(v, pages)
		copy(v.at(id), v.page(v.store.images[g], id))
		what = append(what, v.name(id))
	}
	return strings.Join(what, ", ")
}

// staleBucket puts all pages of one owner back.
func (v *victim) staleBucket() string {
	g, owner := v.IntN(v.store.last()), pick(v, v.owners()[0:])
	for _, id := range v.differing(g) {
		if v.owner[id] == owner {
			copy(v.at(id), v.page(v.store.images[g], id))
		}
	}
	return fmt.Sprintf("%s of generation %d", owner, g)
}

// lostCommit takes a part of the latest commits' pages back, the metas perhaps among them: as a disk does that lost writes.
func (v *victim) lostCommit() string {
	g := v.store.last() - 1 - v.IntN(min(latest-1, v.store.last()))
	n := 0
	for id := range v.high {
		old := v.store.images[g]
		if int(id+1)*v.pageSize <= len(old) && v.IntN(2) == 0 && !bytes.Equal(v.page(old, id), v.at(id)) {
			copy(v.at(id), v.page(old, id))
			n++
		}
	}
	return fmt.Sprintf("%d pages of generation %d", n, g)
}

func (v *victim) swap(mendHeaders bool) string {
	a, b := v.usedPage(), v.somePage()
	first := bytes.Clone(v.at(a))
	copy(v.at(a), v.at(b))
	copy(v.at(b), first)
	if mendHeaders {
		native.PutUint64(v.at(a), a)
		native.PutUint64(v.at(b), b)
	}
	return v.name(a) + " and " + v.name(b)
}

// tear leaves of a page some sectors of an older generation.
func (v *victim) tear() string {
	const sector = 512
	g := v.IntN(v.store.last())
	pages := v.differing(g)
	if len(pages) == 0 {
		return "nothing"
	}
	id := pick(v, pages)
	old := v.page(v.store.images[g], id)
	cut := sector * (1 + v.IntN(v.pageSize/sector-1))
	if v.IntN(2) == 0 {
		copy(v.at(id)[:cut], old)
	} else {
		copy(v.at(id)[cut:], old[cut:])
	}
	return fmt.Sprintf("%s at byte %d, generation %d", v.name(id), cut, g)
}

func (v *victim) foreignPage() string {
	other := pick(v, v.others)
	l := other.layout(other.last())
	id, from := v.somePage(), pick(v, l.owned(pick(v, l.owners())))
	if l.pageSize != v.pageSize { // a stretch of it, then
		copy(v.at(id), other.images[other.last()][int(from)*l.pageSize:])
		return v.name(id)
	}
	copy(v.at(id), l.page(other.images[other.last()], from))
	if v.IntN(2) == 0 {
		native.PutUint64(v.at(id), id)
	}
	return fmt.Sprintf("%s of %q on %s", l.owner[from], other.name, v.name(id))
}

// strangeID is a page that something else should not lead to: itself, its root, one far away.
func (v *victim) strangeID(id uint64) uint64 {
	return pick(v, []uint64{id, v.root, v.freelist, 0, 1, v.high, v.high - 1, math.MaxUint64, 1 << 40, v.somePage(), pick(v, v.branchesOr(id))})
}

func (v *victim) branchesOr(id uint64) []uint64 {
	if len(v.branches) == 0 {
		return []uint64{id}
	}
	return v.branches
}

// rewire makes a branch lead elsewhere: into a cycle, perhaps.
func (v *victim) rewire() string {
	if len(v.branches) == 0 {
		return v.flip(v.usedPage())
	}
	id := pick(v, v.branches)
	p := v.at(id)
	child := p[pageHeader+element*v.IntN(int(native.Uint16(p[10:])))+8:]
	before, after := native.Uint64(child), v.strangeID(id)
	if v.IntN(3) == 0 {
		after = before ^ 1<<v.IntN(8)
	}
	native.PutUint64(child, after)
	return fmt.Sprintf("%s leads to %d, not %d", v.name(id), after, before)
}

func (v *victim) craftElement() string {
	id := pick(v, append(slices.Clone(v.leaves), v.branches...))
	p := v.at(id)
	n := int(native.Uint16(p[10:]))
	if n == 0 {
		return "an empty page"
	}
	i := v.IntN(n)
	field := p[pageHeader+element*i+4*v.IntN(4):]
	was := native.Uint32(field)
	native.PutUint32(field, pick(v, []uint32{0, was + 1, was - 1, was ^ 1, was * 2, was + 0x1000, math.MaxUint32, math.MaxInt32, uint32(v.pageSize)}))
	return fmt.Sprintf("element %d of %s", i, v.name(id))
}

// rehang makes a bucket begin at another page.
func (v *victim) rehang() string {
	for range 100 {
		id := pick(v, v.leaves)
		p := v.at(id)
		n := int(native.Uint16(p[10:]))
		for i := range n {
			at := pageHeader + element*((i+int(id))%n)
			e := p[at:]
			if native.Uint32(e) != 1 || v.IntN(3) == 0 {
				continue
			}
			start := at + int(native.Uint32(e[4:])) + int(native.Uint32(e[8:]))
			before, after := native.Uint64(p[start:]), v.strangeID(id)
			native.PutUint64(p[start:], after)
			return fmt.Sprintf("a bucket on %s begins at %d, not %d", v.name(id), after, before)
		}
	}
	return "nothing"
}

func (v *victim) craftFreelist() string {
	p := v.at(v.freelist)
	n := native.Uint16(p[10:])
	entry := func() []byte { return p[pageHeader+8*v.IntN(max(1, min(int(n), (v.pageSize-pageHeader)/8))):] }
	switch v.IntN(8) {
	case 0:
		native.PutUint16(p[10:], pick(v, []uint16{n + 1, 0xFFFF, 0xFFFE}))
		return "count too large"
	case 1:
		native.PutUint16(p[10:], n-uint16(min(uint64(n), 1+v.Uint64N(3)))) // pages leak
		return "count too small"
	case 2:
		native.PutUint64(entry(), v.usedPage())
		return "a used page is free"
	case 3:
		native.PutUint64(entry(), pick(v, []uint64{0, 1, v.high, math.MaxUint64, v.freelist}))
		return "an impossible page is free"
	case 4:
		copy(entry(), bytes.Clone(entry()[:8]))
		return "a page is free twice"
	case 5:
		native.PutUint16(p[10:], 0xFFFF)
		native.PutUint64(p[pageHeader:], pick(v, []uint64{0, 0xFFFF, 1 << 20, math.MaxUint64, math.MaxInt64, math.MaxUint64 / 8}))
		return "a huge count"
	case 6:
		// A used leaf's page instead of a free one, in its place in the order.
		ids := slices.Clone(v.free)
		if len(ids) > 0 {
			ids[v.IntN(len(ids))] = v.usedPage()
			slices.Sort(ids)
			for i, id := range slices.Compact(ids) {
				if at := pageHeader + 8*i; at+8 <= v.pageSize {
					native.PutUint64(p[at:], id)
				}
			}
		}
		return "a used page is free, in order"
	}
	native.PutUint32(p[12:], pick(v, []uint32{1, 2, uint32(v.high), math.MaxUint32}))
	return "overflow"
}

// craftMeta changes one or both metas, and seals them with right checksums.
func (v *victim) craftMeta() string {
	var what []string
	for id := range uint64(2) {
		if v.IntN(3) == 0 && len(what) > 0 {
			break
		}
		m := metaOf(v.image, v.pageSize, id)
		was := func(at int) uint64 { return native.Uint64(m[at:]) }
		stale := metaOf(v.store.images[v.IntN(len(v.store.images))], v.pageSize, v.Uint64N(2))
		switch v.IntN(8) {
		case 0:
			native.PutUint64(m[16:], v.strangeID(was(16)))
			what = append(what, "root")
		case 1:
			native.PutUint64(m[16:], native.Uint64(stale[16:]))
			what = append(what, "stale root")
		case 2:
			native.PutUint64(m[32:], v.strangeID(was(32)))
			what = append(what, "freelist")
		case 3:
			native.PutUint64(m[32:], native.Uint64(stale[32:]))
			what = append(what, "stale freelist")
		case 4:
			native.PutUint64(m[40:], pick(v, []uint64{was(40) - 1, was(40) + 1, 2, 3, 0, uint64(len(v.image) / v.pageSize), math.MaxUint64, 1 << 31}))
			what = append(what, "high water mark")
		case 5:
			native.PutUint64(m[48:], pick(v, []uint64{was(48) - 1, was(48) + 1, was(48) + 2, 0, math.MaxUint64}))
			what = append(what, "transaction")
		case 6:
			native.PutUint32(m[8:], pick(v, []uint32{0, 512, 1024, 4096, 8192, 65536, 131072, math.MaxUint32, 3000}))
			what = append(what, "page size")
		case 7:
			native.PutUint32(m[4*v.IntN(2):], v.Uint32N(5))
			what = append(what, "magic or version")
		}
		reseal(m)
		what[len(what)-1] += fmt.Sprint(" of meta ", id)
		if v.IntN(2) == 0 {
			break
		}
	}
	return strings.Join(what, ", ")
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// inImage is a row's value in the victim's file.
func (v *victim) inImage(r row) []byte { return v.image[r.at:][:len(r.value)] }

func (v *victim) records() (records []row) {
	for _, r := range v.rows {
		if r.bucket == "keystate/live" || r.bucket == "keystate/done" {
			records = append(records, r)
		}
	}
	return records
}

// seal makes a frame's checksum right.
func seal(frame []byte) {
	sum := crc32.Update(crc32.Checksum(frame[:5], castagnoli), castagnoli, frame[9:])
	binary.LittleEndian.PutUint32(frame[5:], sum)
}

// craftRecord changes a record and seals it: only the ledger can tell. Or it exchanges two of the same length.
func (v *victim) craftRecord() string {
	frame := v.inImage(pick(v, v.records()))
	if v.IntN(3) == 0 {
		for range 50 {
			other := v.inImage(pick(v, v.records()))
			if len(other) == len(frame) && &other[0] != &frame[0] {
				first := bytes.Clone(frame)
				copy(frame, other)
				copy(other, first)
				return "two records exchanged"
			}
		}
	}
	at := 9 + v.IntN(len(frame)-9)
	frame[at] ^= 1 << v.IntN(8)
	seal(frame)
	return fmt.Sprintf("byte %d of a record", at)
}

// craftLedger changes one number of the ledger, the epoch apart, and seals it.
func (v *victim) craftLedger() string {
	for _, r := range v.rows {
		if r.bucket == "keystate" && r.key == "ledger" {
			b := v.inImage(r)
			field := 2 + v.IntN(7)
			binary.LittleEndian.PutUint64(b[1+8*field:], pick(v, []uint64{0, 1, math.MaxUint64, v.Uint64()}))
			binary.LittleEndian.PutUint32(b[73:], crc32.Checksum(b[:73], castagnoli))
			return fmt.Sprint("number ", field)
		}
	}
	return "nothing"
}

// laterFormat makes the store one of a release to come.
func (v *victim) laterFormat() string {
	what := pick(v, []string{"identity", "ledger", "record"})
	if what == "record" {
		frame := v.inImage(pick(v, v.records()))
		frame[0] = 2 + byte(v.IntN(200))
		seal(frame)
		return what
	}
	for _, r := range v.rows {
		if r.bucket == "keystate" && r.key == what {
			b := v.inImage(r)
			b[0] = 2 + byte(v.IntN(200))
			binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
		}
	}
	return what
}

// foreignFile is something else altogether.
func (v *victim) foreignFile() string {
	n := v.IntN(1 << 16)
	switch v.IntN(9) {
	case 0:
		v.image = nil
		return "empty"
	case 1:
		v.image = bytes.Repeat([]byte("dear diary\n"), 1+n/11)
		return "text"
	case 2:
		v.image = append([]byte("SQLite format 3\x00\x10\x00\x01\x01"), make([]byte, n)...)
		return "SQLite"
	case 3:
		v.image = make([]byte, n)
		return "zeros"
	case 4:
		v.image = make([]byte, n)
		v.random(v.image)
		return "noise"
	case 5:
		v.image = bytes.Clone(foreignBolt["no bucket"])
		return "bbolt without the bucket"
	case 6:
		v.image = bytes.Clone(foreignBolt["other bucket"])
		return "bbolt with a bucket keystate of another's"
	case 7:
		v.image = bytes.Clone(foreignBolt["half a store"])
		return "bbolt with half a store"
	}
	v.image = bytes.Clone(foreignBolt["empty"])
	return "bbolt, empty"
}
