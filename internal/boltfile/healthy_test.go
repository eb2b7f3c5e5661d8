package boltfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"pgregory.net/rapid"
)

func TestHealthyFilesAreAccepted(t *testing.T) {
	t.Parallel()
	put := func(n, keySize, valueSize int) func(*bbolt.Bucket) error {
		return func(b *bbolt.Bucket) error {
			for i := range n {
				if err := b.Put(numbered(i, keySize), make([]byte, valueSize)); err != nil {
					return err
				}
			}
			return nil
		}
	}
	shapes := map[string]func(*bbolt.Bucket) error{
		"an empty bucket":            func(b *bbolt.Bucket) error { return nil },
		"a few keys, inline":         put(3, 4, 4),
		"one page":                   put(10, 4, 60),
		"many keys":                  put(5000, 8, 20),
		"long keys, overflow branch": put(300, 3000, 0),
		"longest keys":               put(20, 32768, 0),
		"empty values":               put(500, 20, 0),
		"values of a page":           put(20, 4, 4096),
		"values of many pages":       put(6, 4, 200_000),
		"nested and inline buckets": func(b *bbolt.Bucket) error {
			for i := range 200 {
				child, err := b.CreateBucket(numbered(i, 6))
				if err != nil {
					return err
				}
				if err := put(i, 8, i)(child); err != nil {
					return err
				}
			}
			return nil
		},
		"300 buckets inside each other": func(b *bbolt.Bucket) (err error) {
			for range 300 {
				if b, err = b.CreateBucket([]byte("in")); err != nil {
					return err
				}
			}
			return nil
		},
	}
	for name, fill := range shapes {
		for _, options := range []bbolt.Options{
			{PageSize: 1024}, {PageSize: 4096}, {PageSize: 65536},
			{PageSize: 1024, NoFreelistSync: true},
		} {
			t.Run(fmt.Sprintf("%s/%d/%t", name, options.PageSize, options.NoFreelistSync), func(t *testing.T) {
				image := build(t, options,
					func(tx *bbolt.Tx) error { return fill(create(tx, "shape")) },
					func(tx *bbolt.Tx) error { return create(tx, "other").Put([]byte("k"), []byte("v")) },
				)
				if err := check(image); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

func TestAFreshlyInitializedFileIsAccepted(t *testing.T) {
	image := build(t, bbolt.Options{PageSize: 1024})
	h, err := ReadHeader(bytes.NewReader(image), int64(len(image)))
	if want := (Header{PageSize: 1024, TxID: 1, Root: 3, Freelist: 2, HighWater: 4}); err != nil || h != want {
		t.Fatalf("header %+v, %v, want %+v", h, err, want)
	}
	if err := check(image); err != nil {
		t.Fatal(err)
	}
}

// A freelist too long for the count in its header, after a value whose pages must not be
// read: the test would otherwise read 70 MB.
func TestALargeValueIsNotReadAndALongFreelistIsAccepted(t *testing.T) {
	t.Parallel()
	store := openStore(t, filepath.Join(t.TempDir(), "large"), bbolt.Options{PageSize: 1024})
	store.update(func(tx *bbolt.Tx) error { return create(tx, "b").Put([]byte("k"), make([]byte, 70_000*1024)) })
	if n, err := checkPath(store.path); err != nil || n > 10*1024 {
		t.Fatalf("read %d bytes: %v", n, err)
	}
	store.update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("b")).Delete([]byte("k")) })
	if _, err := checkPath(store.path); err != nil {
		t.Fatal(err)
	}
	header := readHeader(t, store.path)
	image, err := os.ReadFile(store.path)
	if err != nil {
		t.Fatal(err)
	}
	if p := parsePage(pageOf(image, header.Freelist)); p.count != 0xFFFF {
		t.Fatalf("the freelist has %d elements: too short for this test", p.count)
	}
	for name, first := range map[string]uint64{"zero": 0, "huge": 1 << 62, "fewer": 65_540} {
		damagedImage := slices.Clone(image)
		binary.NativeEndian.PutUint64(pageOf(damagedImage, header.Freelist)[pageHeaderSize:], first)
		if err := check(damagedImage); !errors.Is(err, ErrDamaged) {
			t.Errorf("a count of %s: %v", name, err)
		}
	}
}

// Tx.WriteTo writes metas that no commit writes, and a commit to its copy such as no commit
// to another file does. Whatever the parity of the copied transaction: all are accepted.
func TestABackupIsAcceptedAndStaysSoWhenWrittenOn(t *testing.T) {
	for txid := range 4 {
		store := openStore(t, filepath.Join(t.TempDir(), "original"), bbolt.Options{PageSize: 1024})
		for i := range txid + 1 {
			store.update(func(tx *bbolt.Tx) error { return create(tx, "b").Put(numbered(i, 4), nil) })
		}
		store = store.backup(filepath.Join(t.TempDir(), "copy"))
		seen := []uint64{readHeader(t, store.path).TxID}
		for i := range 4 {
			if _, err := checkPath(store.path); err != nil {
				t.Fatalf("copy at transaction %d, after %d commits: %v", seen[0], i, err)
			}
			store.update(func(tx *bbolt.Tx) error { return create(tx, "b").Put(numbered(i, 8), nil) })
			seen = append(seen, readHeader(t, store.path).TxID)
		}
		for i, id := range seen {
			if id != seen[0]+uint64(i) {
				t.Fatalf("transactions %d", seen)
			}
		}
	}
}

func TestOnlyWantedBucketsAreVisited(t *testing.T) {
	fill := func(tx *bbolt.Tx) error {
		for _, name := range []string{"mine", "yours"} {
			nested, err := create(tx, name).CreateBucket([]byte("nested"))
			if err != nil {
				return err
			}
			for i := range 100 {
				if err := nested.Put(numbered(i, 8), make([]byte, 50)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for _, noFreelist := range []bool{false, true} {
		image := build(t, bbolt.Options{PageSize: 1024, NoFreelistSync: noFreelist}, fill)
		h, err := ReadHeader(bytes.NewReader(image), int64(len(image)))
		if err != nil {
			t.Fatal(err)
		}
		var asked []string
		visit := func(path [][]byte) Extent {
			asked = append(asked, string(bytes.Join(path, []byte("/"))))
			if string(path[0]) == "mine" {
				return Everything
			}
			return Nothing
		}
		if err := Check(bytes.NewReader(image), int64(len(image)), h, visit); err != nil {
			t.Fatal(err)
		}
		want := []string{"mine", "mine/nested", "yours"}
		if noFreelist { // bbolt would walk all of it unasked
			want = nil
		}
		if !slices.Equal(asked, want) {
			t.Errorf("asked for %q, want %q", asked, want)
		}
	}
}

func TestBucketsNestedTooDeepAreNeitherDamagedNorForeign(t *testing.T) {
	image := build(t, bbolt.Options{PageSize: 1024}, func(tx *bbolt.Tx) (err error) {
		b := create(tx, "b")
		for range 600 {
			if b, err = b.CreateBucket([]byte("in")); err != nil {
				return err
			}
		}
		return nil
	})
	err := check(image)
	if err == nil || errors.Is(err, ErrDamaged) || errors.Is(err, ErrForeign) {
		t.Fatal(err)
	}
}

func TestAReaderThatFailsIsNotDamage(t *testing.T) {
	image, _ := sample(t)
	failed := 0
	for at := 0; at < len(image); at += 8 {
		r := failingReader{bytes.NewReader(image), int64(at)}
		switch err := checkReader(r, int64(len(image))); {
		case errors.Is(err, errIO) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrForeign):
			failed++
		case err != nil:
			t.Fatalf("unreadable byte %d: %v", at, err)
		}
	}
	if failed == 0 {
		t.Fatal("no read failed")
	}
	if err := checkReader(bytes.NewReader(image[:len(image)/2]), int64(len(image))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("cut while being read: %v", err)
	}
}

var errIO = errors.New("input/output error")

// A failingReader cannot read one byte.
type failingReader struct {
	r   io.ReaderAt
	bad int64
}

func (f failingReader) ReadAt(b []byte, offset int64) (int, error) {
	if n := f.bad - offset; n >= 0 && n < int64(len(b)) {
		n, _ := f.r.ReadAt(b[:n], offset)
		return n, errIO
	}
	return f.r.ReadAt(b, offset)
}

// boltdb/bolt gave a page that is just full another one.
func TestARunIsAsLongAsItsContent(t *testing.T) {
	for overflow, want := range []error{nil, nil, ErrDamaged} {
		p := page{flags: leafFlag, count: 1, overflow: uint64(overflow), head: make([]byte, 1024)}
		put32(p.head[pageHeaderSize:], 4, elementSize)
		put32(p.head[pageHeaderSize:], 8, 1)
		put32(p.head[pageHeaderSize:], 12, 1024-pageHeaderSize-elementSize-1)
		if err := new(checker).scan(p, nil, nil); !errors.Is(err, want) {
			t.Errorf("full page with %d more: %v", overflow, err)
		}
	}
}

// If this fails with a newer bbolt, good: then ErrLeaked's comment needs a word.
func TestPagesThatBoltLeaksAreNotDamage(t *testing.T) {
	image := build(t, bbolt.Options{PageSize: 1024},
		func(tx *bbolt.Tx) (err error) {
			for i := range 4 {
				nested, failed := create(tx, "b").CreateBucket(numbered(i, 4))
				err = errors.Join(err, failed, nested.Put([]byte("k"), make([]byte, 600)))
			}
			return err
		},
		func(tx *bbolt.Tx) error {
			return errors.Join(tx.Bucket([]byte("b")).Put([]byte("k"), nil), tx.DeleteBucket([]byte("b")))
		},
	)
	if err := check(image); !errors.Is(err, ErrLeaked) || errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
}

// bbolt forgets to limit the length of a bucket's name.
func TestABucketNameBeyondTheDocumentedLimitIsRefused(t *testing.T) {
	for size, want := range map[int]error{maxKeySize: nil, maxKeySize + 1: ErrDamaged} {
		image := build(t, bbolt.Options{}, func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket(make([]byte, size))
			return err
		})
		if err := check(image); !errors.Is(err, want) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestSyncMetasChangesNothing(t *testing.T) {
	image := build(t, bbolt.Options{PageSize: 1024}, randomTx(rand.New(rand.NewPCG(2, 2)).IntN, 40))
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := SyncMetas(f, readHeader(t, path)); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, image) {
		t.Fatal("the file changed", err)
	}
}

// Whatever is done to a store, bbolt leaves files that are accepted, after every commit.
func TestEveryCommitLeavesAFileThatIsAccepted(t *testing.T) {
	t.Parallel()
	dir, files := t.TempDir(), 0
	path := func() string {
		files++
		return filepath.Join(dir, fmt.Sprint(files))
	}
	rapid.Check(t, func(t *rapid.T) {
		choose := func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "choice") }
		options := bbolt.Options{PageSize: rapid.SampledFrom([]int{1024, 1024, 1024, 4096, 16384}).Draw(t, "page size")}
		s := openStore(t, path(), options)
		remove := func() {
			s.close()
			os.Remove(s.path)
		}
		defer func() { remove() }()
		replace := func(next *store) {
			remove()
			s = next
		}
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				if _, err := checkPath(s.path); err != nil {
					t.Fatal(err)
				}
			},
			"commit one":  func(t *rapid.T) { s.update(randomTx(choose, 1)) },
			"commit many": func(t *rapid.T) { s.update(randomTx(choose, 12)) },
			"roll back": func(t *rapid.T) {
				s.db.Update(func(tx *bbolt.Tx) error { return errors.Join(randomTx(choose, 3)(tx), io.EOF) })
			},
			"reopen": func(t *rapid.T) {
				options.NoFreelistSync = rapid.Bool().Draw(t, "no freelist sync")
				options.FreelistType = rapid.SampledFrom([]bbolt.FreelistType{"array", "hashmap"}).Draw(t, "freelist")
				s.close()
				s = openStore(t, s.path, options)
			},
			"begin reading": func(t *rapid.T) { s.beginReading() },
			"end reading":   func(t *rapid.T) { s.endReading() },
			"back up":       func(t *rapid.T) { replace(s.backup(path())) },
			"compact": func(t *rapid.T) {
				compacted := openStore(t, path(), options)
				if err := bbolt.Compact(compacted.db, s.db, 20_000); err != nil {
					t.Fatal(err)
				}
				replace(compacted)
			},
		})
	})
}

// A file of 400 MB with a million records.
func BenchmarkCheckOfAMillionRecords(b *testing.B) {
	store := openStore(b, filepath.Join(b.TempDir(), "million"), bbolt.Options{})
	rng := rand.New(rand.NewPCG(1, 1))
	for range 100 {
		store.update(func(tx *bbolt.Tx) error {
			records := create(tx, "records")
			for range 10_000 {
				key := fmt.Appendf(nil, "%016x%016x", rng.Uint64(), rng.Uint64())
				if err := records.Put(key, make([]byte, 180)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	info, err := os.Stat(store.path)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(info.Size())
	for b.Loop() {
		if _, err := checkPath(store.path); err != nil {
			b.Fatal(err)
		}
	}
}

// A store is a bbolt file under test, open.
type store struct {
	t       tb
	path    string
	options bbolt.Options
	db      *bbolt.DB
	reader  *bbolt.Tx
}

type tb interface {
	Helper()
	Fatal(args ...any)
}

func openStore(t tb, path string, options bbolt.Options) *store {
	t.Helper()
	// Nothing here survives a power cut, but nothing must. The map is large so that it
	// need not grow while a reader is open, which would wait for the reader.
	options.NoSync, options.NoGrowSync, options.InitialMmapSize, options.Timeout = true, true, 64<<20, time.Second
	db, err := bbolt.Open(path, 0o600, &options)
	if err != nil {
		t.Fatal(err)
	}
	return &store{t: t, path: path, options: options, db: db}
}

func (s *store) close() {
	s.t.Helper()
	s.endReading()
	if err := s.db.Close(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *store) update(write func(*bbolt.Tx) error) {
	s.t.Helper()
	if err := s.db.Update(write); err != nil {
		s.t.Fatal(err)
	}
}

func (s *store) beginReading() {
	s.t.Helper()
	s.endReading()
	reader, err := s.db.Begin(false)
	if err != nil {
		s.t.Fatal(err)
	}
	s.reader = reader
}

func (s *store) endReading() {
	if s.reader != nil {
		s.reader.Rollback()
		s.reader = nil
	}
}

func (s *store) backup(path string) *store {
	s.t.Helper()
	if err := s.db.View(func(tx *bbolt.Tx) error { return tx.CopyFile(path, 0o600) }); err != nil {
		s.t.Fatal(err)
	}
	if _, err := checkPath(path); err != nil {
		s.t.Fatal(err)
	}
	return openStore(s.t, path, s.options)
}

// build returns the file that these transactions leave, cut at the high water mark.
func build(t testing.TB, options bbolt.Options, txs ...func(*bbolt.Tx) error) []byte {
	t.Helper()
	s := openStore(t, filepath.Join(t.TempDir(), "built"), options)
	for _, tx := range txs {
		s.update(tx)
	}
	s.close()
	image, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	h := readHeader(t, s.path)
	return image[:h.HighWater*uint64(h.PageSize)]
}

// randomTx does things such as a program does to its buckets. It deletes and moves a bucket
// only before it writes: bbolt 1.5.0 would leak pages nested in the one deleted, and free
// pages still used by the one moved.
func randomTx(choose func(n int) int, actions int) func(*bbolt.Tx) error {
	oneOf := func(sizes ...int) int { return sizes[choose(len(sizes))] }
	return func(tx *bbolt.Tx) error {
		for i := range actions {
			b := create(tx, []string{"a", "b", "c"}[choose(3)])
			for choose(3) == 0 {
				nested, err := b.CreateBucketIfNotExists(numbered(choose(500), 3))
				if err != nil {
					return err
				}
				b = nested
			}
			b.FillPercent = []float64{0.1, 0.5, 0.95, 1}[choose(4)]
			keySize, valueSize := oneOf(4, 8, 8, 40, 40, 40, 300, 1500), oneOf(0, 8, 40, 100, 600, 3000)
			first, n := choose(400), oneOf(1, 1, 5, 20, 60)
			var err error
			kinds := 7
			if i == 0 {
				kinds = 9
			}
			switch choose(kinds) {
			case 0, 1, 2:
				for i := range n {
					err = errors.Join(err, b.Put(numbered(first+i, keySize), make([]byte, valueSize)))
				}
			case 3, 4:
				for i := range n {
					err = errors.Join(err, b.Delete(numbered(first+i, keySize)))
				}
			case 5:
				c := b.Cursor()
				for k, v := c.Seek(numbered(first, 4)); k != nil && n > 0; k, v = c.Next() {
					if n--; v != nil {
						err = errors.Join(err, c.Delete())
					}
				}
			case 6:
				_, err = b.NextSequence()
			case 7:
				if err = b.DeleteBucket(numbered(first, 3)); errors.Is(err, berrors.ErrBucketNotFound) {
					err = nil
				}
			case 8:
				to := create(tx, []string{"a", "b", "c"}[choose(3)])
				err = tx.MoveBucket(numbered(first, 3), b, to)
				if errors.Is(err, berrors.ErrBucketNotFound) || errors.Is(err, berrors.ErrBucketExists) ||
					err != nil && strings.Contains(err.Error(), "same bucket") {
					err = nil
				}
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
}

func create(tx *bbolt.Tx, name string) *bbolt.Bucket {
	b, err := tx.CreateBucketIfNotExists([]byte(name))
	if err != nil {
		panic(err)
	}
	return b
}

func numbered(i, size int) []byte {
	return append(fmt.Appendf(nil, "%0*d", min(size, 8), i), make([]byte, max(0, size-8))...)
}

func readHeader(t tb, path string) Header {
	t.Helper()
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := ReadHeader(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func pageOf(image []byte, id uint64) []byte {
	pageSize := uint64(native.Uint32(image[pageHeaderSize+8:]))
	return image[id*pageSize : (id+1)*pageSize]
}

func check(image []byte) error {
	return checkReader(bytes.NewReader(image), int64(len(image)))
}

func checkReader(r io.ReaderAt, size int64) error {
	h, err := ReadHeader(r, size)
	if err != nil {
		return err
	}
	return Check(r, size, h, nil)
}

// checkPath checks a file and tells how much of it was read.
func checkPath(path string) (read int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	r := countingReader{r: f}
	err = checkReader(&r, info.Size())
	return r.n, err
}

type countingReader struct {
	r io.ReaderAt
	n int64
}

func (c *countingReader) ReadAt(b []byte, offset int64) (int, error) {
	n, err := c.r.ReadAt(b, offset)
	c.n += int64(n)
	return n, err
}
