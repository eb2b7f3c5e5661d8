package lossy

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const seeds = 300 // how many cuts a test looks at

func create(t *testing.T, folder *Node, name string) *Node {
	t.Helper()
	n, err := folder.Create(name, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// find returns what a folder has under a name, or nil.
func find(folder *Node, name string) *Node {
	n, _ := folder.Lookup(name)
	return n
}

func read(n *Node) []byte {
	b := make([]byte, n.Stat().Size)
	return b[:n.ReadAt(b, 0)]
}

// durable makes an FS that has a file named store, with everything synced.
func durable(t *testing.T, seed uint64, text []byte) (*FS, *Node) {
	fs := New(seed, 0)
	n := create(t, fs.Root(), "store")
	n.WriteAt(text, 0)
	n.Sync()
	fs.Root().Sync()
	return fs, n
}

func TestWhatWasSyncedSurvivesEveryCut(t *testing.T) {
	want := bytes.Repeat([]byte("kept"), 3*Sector)
	for seed := range uint64(seeds) {
		fs, n := durable(t, seed, want)
		n.WriteAt(make([]byte, 5*Sector), int64(len(want)))
		create(t, fs.Root(), "other").WriteAt([]byte("unsynced"), 0)
		fs.Cut()
		got := find(fs.Root(), "store")
		if got == nil {
			t.Fatalf("seed %d: the file is gone", seed)
		}
		if !bytes.HasPrefix(read(got), want) {
			t.Fatalf("seed %d: the content is damaged", seed)
		}
	}
}

func TestAnUnsyncedWriteLandsOrNotOrIsTornAtSectors(t *testing.T) {
	const sectors = 8
	lost, landed, torn := 0, 0, 0
	for seed := range uint64(seeds) {
		fs, n := durable(t, seed, bytes.Repeat([]byte{'a'}, sectors*Sector))
		n.WriteAt(bytes.Repeat([]byte{'b'}, sectors*Sector-100), 100) // not at the boundary of a sector
		fs.Cut()
		text := read(find(fs.Root(), "store"))
		fresh := 0
		for i := range sectors {
			s := text[i*Sector : (i+1)*Sector]
			if i == 0 {
				s = s[100:]
			}
			switch bytes.Count(s, []byte{'b'}) {
			case 0:
			case len(s):
				fresh++
			default:
				t.Fatalf("seed %d: sector %d is half written", seed, i)
			}
		}
		switch fresh {
		case 0:
			lost++
		case sectors:
			landed++
		default:
			torn++
		}
		if bytes.Count(text[:100], []byte{'a'}) != 100 {
			t.Fatalf("seed %d: what was not written to has changed", seed)
		}
	}
	if lost == 0 || landed == 0 || torn == 0 {
		t.Errorf("%d lost, %d landed, %d torn: each should be seen", lost, landed, torn)
	}
}

func TestUnsyncedWritesDoNotLandInTheirOrder(t *testing.T) {
	seen := map[string]bool{}
	for seed := range uint64(seeds) {
		fs, n := durable(t, seed, make([]byte, 2*Sector))
		n.WriteAt([]byte("1"), 0)
		n.WriteAt([]byte("2"), Sector)
		fs.Cut()
		text := read(find(fs.Root(), "store"))
		seen[string([]byte{'0' | text[0], '0' | text[Sector]})] = true
	}
	for _, state := range []string{"00", "10", "02", "12"} {
		if !seen[state] {
			t.Errorf("never seen: %s", state)
		}
	}
}

func TestASizeAndItsDataLandApart(t *testing.T) {
	var short, zeros, whole bool
	for seed := range uint64(seeds) {
		fs, n := durable(t, seed, nil)
		n.WriteAt([]byte("data"), 0)
		fs.Cut()
		switch text := string(read(find(fs.Root(), "store"))); text {
		case "":
			short = true
		case "\x00\x00\x00\x00":
			zeros = true
		case "data":
			whole = true
		default:
			t.Fatalf("seed %d: %q", seed, text)
		}
	}
	if !short || !zeros || !whole {
		t.Errorf("empty %v, zeros %v, whole %v: each should be seen", short, zeros, whole)
	}
}

func TestASyncCoversWhatIsItsOwnAndNothingElse(t *testing.T) {
	var nameless, empty bool
	for seed := range uint64(seeds) {
		fs := New(seed, 0)
		n := create(t, fs.Root(), "synced file")
		n.WriteAt([]byte("text"), 0)
		n.Sync()
		fs.Cut()
		nameless = nameless || find(fs.Root(), "synced file") == nil

		n = create(t, fs.Root(), "synced name")
		n.WriteAt([]byte("text"), 0)
		fs.Root().Sync()
		fs.Cut()
		n = find(fs.Root(), "synced name")
		if n == nil {
			t.Fatalf("seed %d: a synced name is gone", seed)
		}
		empty = empty || len(read(n)) == 0
	}
	if !nameless || !empty {
		t.Errorf("a synced file without its name %v, a synced name without content %v: each should be seen", nameless, empty)
	}
}

func TestARenameLandsWholeOrNotAtAll(t *testing.T) {
	seen := map[string]bool{}
	for seed := range uint64(seeds) {
		fs, _ := durable(t, seed, []byte("old"))
		n := create(t, fs.Root(), "draft")
		n.WriteAt([]byte("new"), 0)
		n.Sync()
		fs.Root().Sync()
		if err := fs.Root().Rename("draft", fs.Root(), "store"); err != nil {
			t.Fatal(err)
		}
		fs.Cut()
		text := string(read(find(fs.Root(), "store")))
		if draft := find(fs.Root(), "draft") != nil; draft != (text == "old") {
			t.Fatalf("seed %d: the store is %q, the draft is there: %v", seed, text, draft)
		}
		seen[text] = true
	}
	if !seen["old"] || !seen["new"] {
		t.Errorf("only seen: %v", seen)
	}
}

func TestUnsyncedNamesLandWhateverBecomesOfOthers(t *testing.T) {
	seen := map[[2]bool]bool{}
	for seed := range uint64(seeds) {
		fs, n := durable(t, seed, []byte("text"))
		if err := errors.Join(fs.Root().Link(n, "linked"), fs.Root().Unlink("store")); err != nil {
			t.Fatal(err)
		}
		fs.Cut()
		seen[[2]bool{find(fs.Root(), "store") != nil, find(fs.Root(), "linked") != nil}] = true
	}
	if len(seen) != 4 {
		t.Errorf("only seen: %v", seen)
	}
}

func TestBothNamesOfAFileLeadToOneFileAfterACut(t *testing.T) {
	fs, n := durable(t, 1, []byte("text"))
	if err := fs.Root().Link(n, "linked"); err != nil {
		t.Fatal(err)
	}
	fs.Root().Sync()
	fs.Cut()
	a, b := find(fs.Root(), "store"), find(fs.Root(), "linked")
	if a == nil || a != b || a.Stat().Links != 2 {
		t.Errorf("%v and %v", a, b)
	}
}

func TestNoOneFromBeforeACutReachesTheNewWorld(t *testing.T) {
	fs, n := durable(t, 1, []byte("text"))
	root := fs.Root()
	fs.Cut()
	n.WriteAt([]byte("late"), 0)
	n.Sync()
	create(t, root, "ghost")
	root.Sync()
	if err := fs.Root().Link(n, "smuggled"); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("a link from the old world to the new one: %v", err)
	}
	for range 2 {
		if text := string(read(find(fs.Root(), "store"))); text != "text" || len(fs.Root().Names()) != 1 {
			t.Fatalf("the new world has %q and %v", text, fs.Root().Names())
		}
		fs.Cut()
	}
	if text := string(read(n)); text != "late" {
		t.Errorf("the old world has %q", text)
	}
}

func TestACutDuringASyncMayLoseWhatIsBeingSynced(t *testing.T) {
	lost, landed := 0, 0
	for seed := range uint64(seeds) {
		synctest.Test(t, func(t *testing.T) {
			fs := New(seed, time.Hour)
			n := create(t, fs.Root(), "store")
			fs.Root().Sync()
			n.Truncate(1)
			began := time.Now()
			go n.Sync()
			synctest.Wait()
			fs.Cut()
			synctest.Wait() // the test fails when Sync is not over by its end
			if time.Since(began) > 0 || fs.Tally().MidSync != 1 {
				t.Fatalf("the cut waited for the sync: %v, %+v", time.Since(began), fs.Tally())
			}
			if find(fs.Root(), "store").Stat().Size == 0 {
				lost++
			} else {
				landed++
			}
		})
	}
	if lost == 0 || landed == 0 {
		t.Errorf("%d lost, %d landed: each should be seen", lost, landed)
	}
}

func TestASyncDoesNotCoverWhatIsWrittenDuringIt(t *testing.T) {
	lost := false
	for seed := range uint64(seeds) {
		synctest.Test(t, func(t *testing.T) {
			fs := New(seed, time.Hour)
			n := create(t, fs.Root(), "store")
			fs.Root().Sync()
			n.Truncate(1)
			go n.Sync()
			synctest.Wait()
			n.Truncate(2)
			time.Sleep(time.Hour)
			fs.Cut()
			switch size := find(fs.Root(), "store").Stat().Size; size {
			case 0:
				t.Fatal("what was written before the sync is lost")
			case 1:
				lost = true
			}
		})
	}
	if !lost {
		t.Error("what was written during a sync was never lost")
	}
}

func TestALyingDiskLosesWhatItSaidWasSynced(t *testing.T) {
	for seed := range uint64(seeds) {
		fs := New(seed, 0)
		fs.Lie()
		create(t, fs.Root(), "store").Sync()
		fs.Root().Sync()
		if fs.Cut(); find(fs.Root(), "store") == nil {
			return
		}
	}
	t.Error("nothing was lost")
}

func TestProgramsSeeAnOrdinaryFile(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 7))
		fs, n := durable(t, seed, nil)
		var want []byte
		grow := func(size int) {
			if size > len(want) {
				want = append(want, make([]byte, size-len(want))...)
			}
		}
		for range 300 {
			switch off := r.IntN(5 * chunk); r.IntN(8) {
			case 0:
				n.Truncate(int64(off))
				grow(off)
				want = want[:off:off]
			case 1:
				n.Sync()
			case 2:
				n.Sync()
				fs.Cut()
				n = find(fs.Root(), "store")
			default:
				b := make([]byte, r.IntN(2*chunk))
				for i := range b {
					b[i] = byte(r.Uint32())
				}
				n.WriteAt(b, int64(off))
				if len(b) > 0 {
					grow(off + len(b))
					copy(want[off:], b)
				}
			}
			if got := read(n); !bytes.Equal(got, want) {
				t.Fatalf("seed %d: %d bytes differ from the %d that were written", seed, len(got), len(want))
			}
			part, off := make([]byte, 700), int64(r.IntN(6*chunk))
			if got := part[:n.ReadAt(part, off)]; !bytes.Equal(got, want[min(off, int64(len(want))):min(off+700, int64(len(want)))]) {
				t.Fatalf("seed %d: a part reads wrong", seed)
			}
		}
	}
}

func TestNamesAreRefusedAsAFileSystemDoes(t *testing.T) {
	fs, file := durable(t, 1, nil)
	root := fs.Root()
	folder, err := root.Mkdir("folder", 0o755)
	if err != nil {
		t.Fatal(err)
	}
	create(t, folder, "inside")
	_, again := root.Create("store", 0o600)
	_, nothing := root.Lookup("nothing")
	for _, c := range []struct {
		what      string
		got, want error
	}{
		{"create what is there", again, syscall.EEXIST},
		{"look up what is not there", nothing, syscall.ENOENT},
		{"link over a file", root.Link(file, "folder"), syscall.EEXIST},
		{"link a folder", root.Link(folder, "more"), syscall.EPERM},
		{"unlink nothing", root.Unlink("nothing"), syscall.ENOENT},
		{"unlink a folder", root.Unlink("folder"), syscall.EISDIR},
		{"remove nothing", root.Rmdir("nothing"), syscall.ENOENT},
		{"remove a file as a folder", root.Rmdir("store"), syscall.ENOTDIR},
		{"remove a full folder", root.Rmdir("folder"), syscall.ENOTEMPTY},
		{"rename nothing", root.Rename("nothing", root, "x"), syscall.ENOENT},
		{"rename a file over a folder", root.Rename("store", root, "folder"), syscall.EISDIR},
		{"rename a folder over a file", root.Rename("folder", root, "store"), syscall.ENOTDIR},
		{"rename to itself", root.Rename("store", root, "store"), nil},
		{"move", root.Rename("store", folder, "moved"), nil},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, not %v", c.what, c.got, c.want)
		}
	}
}
