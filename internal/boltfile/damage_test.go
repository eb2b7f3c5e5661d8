package boltfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

func TestForeignFilesAreForeign(t *testing.T) {
	image, _ := sample(t)
	withoutMetas := slices.Clone(image)
	clear(withoutMetas[:2*1024])
	for name, file := range map[string][]byte{
		"empty":              nil,
		"one byte":           {0xED},
		"text":               []byte("dear diary"),
		"a long text":        bytes.Repeat([]byte("dear diary\n"), 10_000),
		"zeros":              make([]byte, 100_000),
		"both metas zeroed":  withoutMetas,
		"cut in first magic": image[:pageHeaderSize+3],
	} {
		if err := check(file); !errors.Is(err, ErrForeign) || errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestATruncatedFileIsDamaged(t *testing.T) {
	image, _ := sample(t)
	for n := pageHeaderSize + 4; n < len(image); n += 61 {
		if err := check(image[:n]); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut at byte %d of %d: %v", n, len(image), err)
		}
	}
	if err := check(image[:len(image)-1]); !errors.Is(err, ErrDamaged) {
		t.Errorf("last byte cut: %v", err)
	}
}

func TestEveryBitOfBothMetasCounts(t *testing.T) {
	t.Parallel()
	for _, pageSize := range []int{1024, 4096, 65536} {
		image := build(t, bbolt.Options{PageSize: pageSize}, randomTx(rand.New(rand.NewPCG(1, 1)).IntN, 5))
		for id := range 2 {
			for bit := range (pageHeaderSize + metaSize) * 8 {
				if bit/8 >= 10 && bit/8 < pageHeaderSize { // count and overflow: of no use to a meta page
					continue
				}
				damaged := flip(image, id*pageSize*8+bit)
				if err := check(damaged); !errors.Is(err, ErrDamaged) {
					t.Errorf("bit %d of meta page %d of %d bytes: %v", bit, id, pageSize, err)
				}
			}
		}
	}
}

func TestMetasThatContradictEachOtherAreDamaged(t *testing.T) {
	image, l := sample(t)
	newer := int(l.TxID % 2)
	older := 1 - newer
	for name, change := range map[string]func(metas [2][]byte){
		"txid far ahead":        func(m [2][]byte) { put64(m[newer], 48, l.TxID+2) },
		"txid far behind":       func(m [2][]byte) { put64(m[older], 48, l.TxID-3) },
		"equal txids":           func(m [2][]byte) { put64(m[older], 48, l.TxID) },
		"slots exchanged":       func(m [2][]byte) { put64(m[newer], 48, l.TxID-1); put64(m[older], 48, l.TxID) },
		"other page size":       func(m [2][]byte) { put32(m[1], 8, 2048) },
		"page size not a power": func(m [2][]byte) { put32(m[0], 8, 1025) },
		"page size too small":   func(m [2][]byte) { put32(m[0], 8, 512) },
		"page size too large":   func(m [2][]byte) { put32(m[0], 8, 1<<17) },
		"page size zero":        func(m [2][]byte) { put32(m[0], 8, 0) },
		"no magic":              func(m [2][]byte) { put32(m[1], 0, 0) },
		"other version":         func(m [2][]byte) { put32(m[1], 4, 3) },
		"root is a meta page":   func(m [2][]byte) { put64(m[newer], 16, 1) },
		"root beyond the end":   func(m [2][]byte) { put64(m[newer], 16, l.HighWater) },
		"freelist is page 0":    func(m [2][]byte) { put64(m[newer], 32, 0) },
		"freelist far beyond":   func(m [2][]byte) { put64(m[newer], 32, noFreelist-1) },
		"high water too high":   func(m [2][]byte) { put64(m[newer], 40, l.HighWater+1) },
		"high water huge":       func(m [2][]byte) { put64(m[newer], 40, 1<<63) },
		"high water zero":       func(m [2][]byte) { put64(m[newer], 40, 0) },
	} {
		damaged := slices.Clone(image)
		change([2][]byte{damaged[pageHeaderSize:], damaged[1024+pageHeaderSize:]})
		reseal(damaged, 1024)
		size := len(image)
		if name == "other page size" { // which alone is wrong with it
			size *= 2
			damaged = append(damaged, make([]byte, size/2)...)
		}
		if _, err := ReadHeader(bytes.NewReader(damaged), int64(size)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDamagedPagesAreDamaged(t *testing.T) {
	image, l := sample(t)
	// at finds an element's header on a page.
	at := func(page []byte, i int) []byte { return page[pageHeaderSize+i*elementSize:][:elementSize] }
	last := func(page []byte) []byte { return at(page, int(native.Uint16(page[10:]))-1) }
	key := func(page []byte, i int) []byte {
		e := parsePage(page).element(i)
		return page[e.key:e.value]
	}
	value := func(page []byte, i int) []byte {
		e := parsePage(page).element(i)
		return page[e.value:e.end]
	}
	type page = []byte
	onTreePages := map[string]func(p page){
		"other id":              func(p page) { p[0] ^= 1 },
		"no flags":              func(p page) { p[8] = 0 },
		"both flags":            func(p page) { p[8] = branchFlag | leafFlag },
		"meta flag":             func(p page) { p[8] = metaFlag },
		"freelist flag":         func(p page) { p[8] = freelistFlag },
		"unknown flag":          func(p page) { p[9] |= 0x80 },
		"other kind":            func(p page) { p[8] ^= branchFlag | leafFlag },
		"no elements":           func(p page) { put16(p, 10, 0) },
		"one element more":      func(p page) { put16(p, 10, native.Uint16(p[10:])+1) },
		"one element fewer":     func(p page) { put16(p, 10, native.Uint16(p[10:])-1) },
		"very many elements":    func(p page) { put16(p, 10, 0xFFFF) },
		"overflow too long":     func(p page) { put32(p, 12, native.Uint32(p[12:])+1) },
		"overflow huge":         func(p page) { put32(p, 12, 1<<32-1) },
		"keys out of order":     func(p page) { swap(key(p, 0), key(p, 1)) },
		"equal keys":            func(p page) { copy(key(p, 1), key(p, 0)) },
		"first key too low":     func(p page) { key(p, 0)[0]-- },
		"first key a bit off":   func(p page) { k := key(p, 0); k[len(k)-1]++ },
		"last key too high":     func(p page) { key(p, int(native.Uint16(p[10:]))-1)[0] = 0xFF },
		"all zero":              func(p page) { clear(p) },
		"headers only":          func(p page) { clear(p[parsePage(p).element(0).key:]) },
		"second half only":      func(p page) { clear(p[:512]) },
		"all keys the greatest": func(p page) { fill(p[parsePage(p).element(0).key:], 0xFF) },
	}
	table := map[string]func(img []byte){}
	for name, id := range map[string]uint64{"leaf": l.leaves[1], "branch": l.branches[1], "large leaf": l.large[1]} {
		for damage, do := range onTreePages {
			table[name+": "+damage] = func(img []byte) { do(pageOf(img, id)) }
		}
	}
	onLeaves := map[string]func(p page){
		"first element elsewhere": func(p page) { put32(at(p, 0), 4, native.Uint32(at(p, 0)[4:])+1) },
		"last element elsewhere":  func(p page) { put32(last(p), 4, native.Uint32(last(p)[4:])-1) },
		"element far away":        func(p page) { put32(at(p, 1), 4, 1<<32-1) },
		"key of no bytes":         func(p page) { put32(last(p), 8, 0) },
		"key too long":            func(p page) { put32(last(p), 8, 1<<20) },
		"key much too long":       func(p page) { put32(last(p), 8, 1<<32-1) },
		"value too long":          func(p page) { put32(last(p), 12, 1<<20) },
		"value much too long":     func(p page) { put32(last(p), 12, 1<<32-1) },
		"unknown element flags":   func(p page) { put32(at(p, 2), 0, 2) },
		"a value made a bucket":   func(p page) { put32(at(p, 2), 0, bucketFlag) },
	}
	for damage, do := range onLeaves {
		table["leaf: "+damage] = func(img []byte) { do(pageOf(img, l.leaves[1])) }
	}
	child := func(id uint64) func(img []byte) {
		return func(img []byte) { put64(at(pageOf(img, l.branches[1]), 1), 8, id) }
	}
	for name, do := range map[string]func(img []byte){
		"branch: first element elsewhere":     func(img []byte) { at(pageOf(img, l.branches[1]), 0)[0]++ },
		"branch: key of no bytes":             func(img []byte) { put32(last(pageOf(img, l.branches[1])), 4, 0) },
		"branch: key too long":                func(img []byte) { put32(last(pageOf(img, l.branches[1])), 4, 1<<31) },
		"branch: child is itself":             child(l.branches[1]),
		"branch: child is its parent":         child(l.branches[0]),
		"branch: child is a meta page":        child(0),
		"branch: child is the freelist":       child(l.Freelist),
		"branch: child is the root":           child(l.Root),
		"branch: child is free":               child(l.free[0]),
		"branch: child is beyond the end":     child(l.HighWater),
		"branch: child is far beyond the end": child(1 << 63),
		"branch: child is of another bucket":  child(l.leaves[len(l.leaves)-1]),
		"branch: child twice": func(img []byte) {
			p := pageOf(img, l.branches[1])
			copy(at(p, 1)[8:], at(p, 0)[8:])
		},
		"branch: children exchanged": func(img []byte) {
			p := pageOf(img, l.branches[1])
			swap(at(p, 1)[8:], at(p, 0)[8:])
		},
		"branch: a level skipped": func(img []byte) {
			top, below := pageOf(img, l.branches[0]), parsePage(pageOf(img, l.branches[2]))
			put64(at(top, 1), 8, below.element(0).child)
		},
		"large leaf: overflow too short": func(img []byte) { put32(pageOf(img, l.large[1]), 12, 0) },
		"root: a bucket made a value":    func(img []byte) { put32(at(pageOf(img, l.Root), 1), 0, 0) },
		"root: a bucket's pages in another": func(img []byte) {
			p := pageOf(img, l.Root)
			copy(value(p, 1), value(p, 3))
		},
		"root: a bucket without pages":   func(img []byte) { put64(value(pageOf(img, l.Root), 2), 0, 0) },
		"inline bucket: pages":           func(img []byte) { put64(value(pageOf(img, l.Root), 0), 0, l.leaves[0]) },
		"inline bucket: page id":         func(img []byte) { value(pageOf(img, l.Root), 0)[16] = 1 },
		"inline bucket: branch":          func(img []byte) { value(pageOf(img, l.Root), 0)[24] = branchFlag },
		"inline bucket: too many":        func(img []byte) { value(pageOf(img, l.Root), 0)[26]++ },
		"inline bucket: very many":       func(img []byte) { value(pageOf(img, l.Root), 0)[27] = 0xFF },
		"inline bucket: overflow":        func(img []byte) { value(pageOf(img, l.Root), 0)[28] = 1 },
		"inline bucket: keys exchanged":  func(img []byte) { p := value(pageOf(img, l.Root), 0)[16:]; swap(key(p, 0), key(p, 1)) },
		"inline bucket: bucket inside":   func(img []byte) { at(value(pageOf(img, l.Root), 0)[16:], 0)[0] = bucketFlag },
		"inline bucket: element outside": func(img []byte) { at(value(pageOf(img, l.Root), 0)[16:], 1)[12] = 0xFF },

		"meta: the freelist is the root": func(img []byte) {
			put64(pageOf(img, l.TxID%2)[pageHeaderSize:], 32, l.Root)
			reseal(img, 1024)
		},
		"meta: high water too low": func(img []byte) {
			put64(pageOf(img, l.TxID%2)[pageHeaderSize:], 40, l.HighWater-1)
			reseal(img, 1024)
		},
		"branch: root of the tree without elements": func(img []byte) { put16(pageOf(img, l.branches[0]), 10, 0) },
		"leaf: a bucket of four bytes": func(img []byte) {
			e := last(pageOf(img, l.leaves[1]))
			put32(e, 0, bucketFlag)
			put32(e, 12, 4)
		},
		"large leaf: a bucket much too large to be inline": func(img []byte) {
			put32(last(pageOf(img, l.large[1])), 0, bucketFlag)
		},
		"large leaf: elements beyond the first page": func(img []byte) {
			const count = 100
			p := pageOf(img, l.large[1])
			first, data := slices.Clone(key(p, 0)), pageHeaderSize+count*elementSize
			put16(p, 10, count)
			for i := range uint32(1024/elementSize - 1) { // as many as fit
				k := append(first, byte(i))
				start := img[int(l.large[1])*1024:][data:]
				if i == 0 {
					k = first
				}
				copy(start, k)
				put32(at(p, int(i)), 0, 0)
				put32(at(p, int(i)), 4, uint32(data)-pageHeaderSize-i*elementSize)
				put32(at(p, int(i)), 8, uint32(len(k)))
				put32(at(p, int(i)), 12, 0)
				data += len(k)
			}
		},

		"freelist: out of order":      func(img []byte) { p := pageOf(img, l.Freelist)[pageHeaderSize:]; swap(p[:8], p[8:16]) },
		"freelist: not one":           func(img []byte) { pageOf(img, l.Freelist)[8] = leafFlag },
		"freelist: other id":          func(img []byte) { pageOf(img, l.Freelist)[0]++ },
		"freelist: a page too many":   func(img []byte) { pageOf(img, l.Freelist)[10]++ },
		"freelist: overflow too long": func(img []byte) { pageOf(img, l.Freelist)[12]++ },
		"freelist: overflow huge":     func(img []byte) { put32(pageOf(img, l.Freelist), 12, 1<<32-1) },
		"freelist: count huge":        func(img []byte) { put16(pageOf(img, l.Freelist), 10, 0xFFFE) },
		"freelist: count elsewhere":   func(img []byte) { put16(pageOf(img, l.Freelist), 10, 0xFFFF) },
	} {
		table[name] = do
	}
	for name, id := range map[string]uint64{
		"in use": l.leaves[0], "itself": l.Freelist, "a meta page": 1, "page 0": 0, "the root": l.Root,
		"another's neighbour": l.free[1], "beyond the end": l.HighWater, "far beyond": 1 << 63,
		"an overflow page": l.large[1] + 1,
	} {
		table["freelist: "+name] = func(img []byte) { put64(pageOf(img, l.Freelist), pageHeaderSize, id) }
	}

	for name, do := range table {
		damaged := slices.Clone(image)
		do(damaged)
		err := check(damaged)
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		} else if !strings.Contains(err.Error(), "page ") {
			t.Errorf("%s: the error names no page: %v", name, err)
		}
	}
}

func TestAPageForgottenByTheFreelistIsLeaked(t *testing.T) {
	image, l := sample(t)
	pageOf(image, l.Freelist)[10] -= 2
	err := check(image)
	if !errors.Is(err, ErrLeaked) || errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("page %d and 1 more", l.free[len(l.free)-2]); !strings.Contains(err.Error(), want) {
		t.Fatalf("%v, want %s", err, want)
	}
}

// A run that claims too much is noticed even where nobody else claims the pages after it:
// bbolt would free them with it, whoever uses them.
func TestARunThatIsTooLongIsDamaged(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	onlyRoot := func([][]byte) Extent { return Nothing }
	for _, options := range []bbolt.Options{{PageSize: 1024}, {PageSize: 1024, NoFreelistSync: true}} {
		var txs []func(*bbolt.Tx) error
		for range 20 {
			txs = append(txs, randomTx(rng.IntN, 3))
			image := build(t, options, txs...)
			h, err := ReadHeader(bytes.NewReader(image), int64(len(image)))
			if err != nil {
				t.Fatal(err)
			}
			runs := []uint64{h.Root}
			if !options.NoFreelistSync {
				runs = append(runs, h.Freelist)
			}
			for _, id := range runs {
				damaged := slices.Clone(image)
				damaged[id*1024+12]++
				if err := Check(bytes.NewReader(damaged), int64(len(damaged)), h, onlyRoot); !errors.Is(err, ErrDamaged) {
					t.Errorf("page %d of %+v: %v", id, h, err)
				}
			}
		}
	}
}

// A walk down a bucket of which only the branches are checked comes to an end, wherever it is damaged.
func TestOfABucketsBranchesEveryCycleIsDamaged(t *testing.T) {
	image := build(t, bbolt.Options{PageSize: 1024}, func(tx *bbolt.Tx) error {
		b := create(tx, "b")
		for i := range 3000 {
			if err := b.Put(numbered(i, 8), make([]byte, 20)); err != nil {
				return err
			}
		}
		return nil
	})
	h, err := ReadHeader(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	outline := func(image []byte) error {
		return Check(bytes.NewReader(image), int64(len(image)), h, func([][]byte) Extent { return Branches })
	}
	if err := outline(image); err != nil {
		t.Fatal(err)
	}
	var branches []uint64
	for id := uint64(2); id < h.HighWater; id++ {
		if p := pageOf(image, id); parsePage(p).flags == branchFlag {
			branches = append(branches, id)
		}
	}
	if len(branches) < 3 {
		t.Fatalf("only %d branches", len(branches))
	}
	for _, from := range branches {
		for _, to := range branches {
			damaged := slices.Clone(image)
			p := pageOf(damaged, from)
			last := pageHeaderSize + (parsePage(p).count-1)*elementSize
			if native.Uint64(p[last+8:]) == to {
				continue
			}
			native.PutUint64(p[last+8:], to)
			if err := outline(damaged); !errors.Is(err, ErrDamaged) {
				t.Errorf("page %d names page %d: %v", from, to, err)
			}
		}
	}
}

// Even where bbolt itself sees nothing wrong: a branch's key may be less than its child's
// first, so its Tx.Check says, but the first write to the child then ruins the tree.
func TestAFirstKeyUnlikeItsBranchIsDamagedBeforeAWriteRuinsTheFile(t *testing.T) {
	image, l := sample(t)
	p := pageOf(image, l.leaves[5])
	first, second := parsePage(p).element(0), parsePage(p).element(1)
	p[first.value-1]++
	if err := check(image); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	faults := func(s *store) (n int) {
		s.beginReading()
		defer s.endReading()
		for range s.reader.Check() {
			n++
		}
		return n
	}
	s := openStore(t, path, bbolt.Options{})
	defer s.close()
	if n := faults(s); n > 0 {
		t.Fatalf("bbolt sees %d faults before the write", n)
	}
	s.update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("tall")).Put(p[second.key:second.value], nil)
	})
	if faults(s) == 0 {
		t.Fatal("bbolt sees no fault after the write")
	}
}

// A page as it was some transactions ago is sound in itself. It is noticed when it begins
// with another key or ends beyond its neighbour; else only the values' owner can notice.
func TestAStalePageIsDamagedUnlessItFits(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	s := openStore(t, filepath.Join(t.TempDir(), "stale"), bbolt.Options{PageSize: 1024})
	var images [][]byte
	for range 12 {
		s.update(randomTx(rng.IntN, 6))
		image, err := os.ReadFile(s.path)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, image)
	}
	s.close()
	image := images[len(images)-1]
	h, err := ReadHeader(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "stale")
	stale, refused := 0, 0
	for _, old := range images[:len(images)-1] {
		for id := uint64(2); id < min(h.HighWater, uint64(len(old)/1024)); id++ {
			if bytes.Equal(pageOf(old, id), pageOf(image, id)) {
				continue
			}
			mixed := slices.Clone(image)
			copy(pageOf(mixed, id), pageOf(old, id))
			stale++
			switch err := check(mixed); {
			case errors.Is(err, ErrDamaged):
				refused++
			case err != nil && !errors.Is(err, ErrLeaked):
				t.Errorf("page %d: %v", id, err)
			case stale%50 == 0:
				if err := useWithBolt(t, file, mixed); err != nil {
					t.Errorf("page %d: accepted, but then %v", id, err)
				}
			}
		}
	}
	t.Logf("refused %d of %d stale pages, free ones among them", refused, stale)
	if refused == 0 || refused == stale {
		t.Errorf("refused %d of %d", refused, stale)
	}
}

// One bit anywhere: Check never fails to return, and bbolt can read and write what it accepts.
func TestWhateverIsAcceptedBoltCanUse(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(4, 4))
	file := filepath.Join(t.TempDir(), "flipped")
	flips, accepted := 0, 0
	for n := range 20 {
		options := bbolt.Options{PageSize: 1024, NoFreelistSync: n%5 == 0}
		var txs []func(*bbolt.Tx) error
		for range 1 + rng.IntN(3) {
			txs = append(txs, randomTx(rng.IntN, 1+rng.IntN(6)))
		}
		image := build(t, options, txs...)
		for range 200 {
			at := rng.IntN(len(image))
			if rng.IntN(2) == 0 { // more often where the structure is
				at = at&^1023 | rng.IntN(64)
			}
			bit := at*8 + rng.IntN(8)
			damaged := flip(image, bit)
			flips++
			r := countingReader{r: bytes.NewReader(damaged)}
			err := checkReader(&r, int64(len(damaged)))
			if r.n > 4*int64(len(damaged)) {
				t.Errorf("read %d bytes of a file of %d", r.n, len(damaged))
			}
			if errors.Is(err, ErrDamaged) {
				continue
			}
			if err != nil && !errors.Is(err, ErrLeaked) {
				t.Errorf("file %d, bit %d: %v", n, bit, err)
				continue
			}
			accepted++
			if err := useWithBolt(t, file, damaged); err != nil {
				t.Errorf("file %d, bit %d (page %d): accepted, but then %v", n, bit, bit/8/1024, err)
			}
		}
	}
	t.Logf("accepted %d of %d flipped bits: in values, free pages, unused space", accepted, flips)
}

func FuzzCheck(f *testing.F) {
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, seed))
		f.Add(build(f, bbolt.Options{PageSize: 1024, NoFreelistSync: seed == 3},
			randomTx(rng.IntN, int(seed)), randomTx(rng.IntN, int(seed))))
	}
	f.Add([]byte("dear diary"))
	f.Fuzz(func(t *testing.T, image []byte) {
		check(image)
		if len(image) < 2048 {
			return
		}
		reseal(image, 1024) // or else the checksums keep the fuzzer out
		if err := check(image); err != nil && !errors.Is(err, ErrLeaked) {
			return
		}
		if err := useWithBolt(t, filepath.Join(t.TempDir(), "fuzzed"), image); err != nil {
			t.Errorf("accepted, but then %v", err)
		}
	})
}

// useWithBolt has bbolt read and write all of a file, and checks what is then in it.
func useWithBolt(t *testing.T, path string, image []byte) (err error) {
	t.Helper()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
		if err != nil {
			kept := filepath.Join(t.ArtifactDir(), "accepted")
			err = errors.Join(err, os.WriteFile(kept, image, 0o600), fmt.Errorf("the file is kept in %s (with -artifacts)", kept))
		}
	}()
	os.Remove(path) // writing over it would wait for the disk
	if err := os.WriteFile(path, image, 0o600); err != nil {
		return err
	}
	s := openStore(t, path, bbolt.Options{})
	err = s.db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error { return readAll(b) })
	})
	if err != nil {
		return err
	}
	err = s.db.Update(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error { return rewrite(b) })
	})
	if err != nil {
		return err
	}
	s.close()
	if _, err = checkPath(path); errors.Is(err, ErrLeaked) {
		return nil
	}
	return err
}

// readAll reads a bucket forwards and backwards and looks up every key.
func readAll(b *bbolt.Bucket) error {
	forwards, backwards := 0, 0
	c := b.Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		forwards++
		switch nested := b.Bucket(k); {
		case v != nil && !bytes.Equal(b.Get(k), v):
			return fmt.Errorf("key %x is not found", k)
		case v == nil && nested == nil:
			return fmt.Errorf("bucket %x is not found", k)
		case v == nil:
			if err := readAll(nested); err != nil {
				return err
			}
		}
	}
	for k, _ := c.Last(); k != nil; k, _ = c.Prev() {
		backwards++
	}
	if forwards != backwards {
		return fmt.Errorf("%d keys forwards, %d backwards", forwards, backwards)
	}
	return nil
}

// rewrite rewrites every third key of a bucket, deletes every third, and adds some.
func rewrite(b *bbolt.Bucket) error {
	var names, keys [][]byte
	err := b.ForEach(func(k, v []byte) error {
		if v == nil {
			names = append(names, bytes.Clone(k))
		} else {
			keys = append(keys, bytes.Clone(k))
		}
		return nil
	})
	for i, k := range keys {
		switch i % 3 {
		case 0:
			err = errors.Join(err, b.Put(k, []byte("rewritten")))
		case 1:
			err = errors.Join(err, b.Delete(k))
		}
	}
	for _, name := range names {
		err = errors.Join(err, rewrite(b.Bucket(name)))
	}
	return errors.Join(err, b.Put([]byte{0}, nil), b.Put([]byte{0xFF}, nil))
}

// A layout tells where things are in a file, by bbolt's own account.
type layout struct {
	Header
	branches, leaves []uint64 // of "tall", from its root on
	large            []uint64 // leaves of "zlarge"
	free             []uint64
}

// sample builds a file that has everything: a tree of three levels, "tall"; values of
// many pages, in "zlarge"; a nested bucket, in "nested"; an inline one, "inline", which is the
// root's first; free pages.
func sample(t *testing.T) ([]byte, layout) {
	t.Helper()
	image := build(t, bbolt.Options{PageSize: 1024},
		func(tx *bbolt.Tx) error { return create(tx, "deleted").Put([]byte("k"), make([]byte, 9000)) },
		func(tx *bbolt.Tx) (err error) {
			for i := range 400 {
				err = errors.Join(err, create(tx, "tall").Put(numbered(i, 40), numbered(i, 60)))
			}
			inline, large := create(tx, "inline"), create(tx, "zlarge")
			value := make([]byte, 5000)
			value[bucketHeaderSize+8] = leafFlag // could be an empty inline bucket
			for i := range 9 {
				err = errors.Join(err, large.Put(numbered(i, 8), value))
			}
			for i := range 3 {
				err = errors.Join(err, inline.Put(numbered(i, 8), value[:bucketHeaderSize+pageHeaderSize]))
			}
			nested, failed := create(tx, "nested").CreateBucket([]byte("inner"))
			return errors.Join(err, failed, nested.Put([]byte("k"), make([]byte, 600)))
		},
		func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte("deleted")) },
		func(tx *bbolt.Tx) error { return create(tx, "inline").Put([]byte("last"), nil) },
	)
	path := filepath.Join(t.TempDir(), "sample")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	l := layout{Header: readHeader(t, path)}
	s := openStore(t, path, bbolt.Options{})
	defer s.close()
	s.beginReading()
	var collect func(id uint64) (branches, leaves []uint64)
	collect = func(id uint64) (branches, leaves []uint64) {
		p := parsePage(pageOf(image, id))
		if p.flags == leafFlag {
			return nil, []uint64{id}
		}
		branches = []uint64{id}
		for i := range p.count {
			b, l := collect(p.element(i).child)
			branches, leaves = append(branches, b...), append(leaves, l...)
		}
		return branches, leaves
	}
	l.branches, l.leaves = collect(uint64(s.reader.Bucket([]byte("tall")).Root()))
	_, l.large = collect(uint64(s.reader.Bucket([]byte("zlarge")).Root()))
	for id := uint64(2); id < l.HighWater; id++ {
		if info, err := s.reader.Page(int(id)); err == nil && info.Type == "free" {
			l.free = append(l.free, id)
		}
	}
	if len(l.branches) < 4 || len(l.leaves) < 20 || len(l.free) < 8 {
		t.Fatalf("too small a sample: %+v", l)
	}
	if err := check(image); err != nil {
		t.Fatal(err)
	}
	return image, l
}

// reseal makes both metas' checksums right.
func reseal(image []byte, pageSize int) {
	for id := range 2 {
		b := image[id*pageSize+pageHeaderSize:][:metaSize]
		hash := fnv.New64a()
		hash.Write(b[:metaSize-8])
		put64(b, metaSize-8, hash.Sum64())
	}
}

func flip(image []byte, bit int) []byte {
	flipped := slices.Clone(image)
	flipped[bit/8] ^= 1 << (bit % 8)
	return flipped
}

func put16(b []byte, at int, v uint16) { binary.NativeEndian.PutUint16(b[at:], v) }
func put32(b []byte, at int, v uint32) { binary.NativeEndian.PutUint32(b[at:], v) }
func put64(b []byte, at int, v uint64) { binary.NativeEndian.PutUint64(b[at:], v) }

func swap(a, b []byte) {
	former := slices.Clone(a)
	copy(a, b)
	copy(b, former)
}

func fill(b []byte, with byte) {
	for i := range b {
		b[i] = with
	}
}
