//go:build unix

package kill

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var (
	cycles    = flag.Int("cycles", 100, "how often a child is killed")
	perFile   = flag.Int("per-file", 250, "how many kills go by until all is carried to its end and another file is begun")
	folder    = flag.String("dir", "", "the `folder` in which the stores live; default: one that the test makes")
	afterKill = flag.String("after-kill", "", "a shell `command` to run after each kill, before the next child starts")
)

const (
	clients     = 24
	lookEvery   = 5                // kills, of which the file is looked into after one
	openWithin  = time.Second      // however the last child ended
	memoryLimit = 256 << 20        // bytes of a child's memory
	hang        = 30 * time.Second // after which something will never happen
)

func TestMain(m *testing.M) {
	if path := os.Getenv(pathVariable); path != "" {
		runChild(path, bug(os.Getenv(bugVariable)))
		return
	}
	os.Exit(m.Run())
}

// sights are what must have happened, or the test has proved less than it says.
var sights = []string{
	"killed while opening the file", "killed at work", "killed while closing",
	"a file looked into", "an effect sent again", "a commit owed", "a replay", "a refusal", "a key reaped", "a key used again after it was reaped",
}

func TestKillNineLosesNothingThatWasAcknowledged(t *testing.T) {
	seen, began, spoke := map[string]int{}, time.Now(), time.Now()
	var heaviest int64
	for done := 0; done < *cycles; {
		w := newWorld()
		n := min(*perFile, *cycles-done)
		path := place(t, done)
		lived, err := w.play(path, n, "")
		done += lived
		for what, times := range w.seen {
			seen[what] += times
		}
		seen["a transfer"] += len(w.ids)
		heaviest = max(heaviest, w.heaviest)
		if err != nil {
			keep(t, path)
			t.Fatalf("cycle %d: %v", done, err)
		}
		os.Remove(path) // a soak has many
		if time.Since(spoke) > 10*time.Second {
			spoke = time.Now()
			fmt.Printf("%d cycles, %.1f a second, %d transfers\n", done, float64(done)/time.Since(began).Seconds(), seen["a transfer"])
		}
	}
	t.Logf("%d cycles in %v, at most %d MiB\n%s", *cycles, time.Since(began).Round(time.Millisecond), heaviest>>20, list(seen))
	for _, what := range sights {
		if seen[what] == 0 && min(*cycles, *perFile) >= 100 {
			t.Errorf("never seen: %s", what)
		}
	}
}

// keep puts a file aside that a promise was broken on.
func keep(t *testing.T, path string) {
	b, err := os.ReadFile(path)
	if err != nil {
		return
	}
	f, err := os.CreateTemp("", "keystate-kill-*.db")
	if err != nil {
		return
	}
	defer f.Close()
	if _, err := f.Write(b); err == nil {
		t.Logf("the file as it was in the end: %s", f.Name())
	}
}

// place is where a store lives. What a test that failed has left in the folder of the flag stays there.
func place(t *testing.T, number int) string {
	if *folder == "" {
		return filepath.Join(t.TempDir(), "store.db")
	}
	path := filepath.Join(*folder, fmt.Sprintf("%s-%d-%d.db", strings.ReplaceAll(t.Name(), "/", "-"), os.Getpid(), number))
	t.Cleanup(func() {
		if !t.Failed() {
			drafts, _ := filepath.Glob(filepath.Join(*folder, "."+filepath.Base(path)+"*"))
			for _, file := range append(drafts, path) {
				_ = os.Remove(file)
			}
		}
	})
	return path
}

func list(seen map[string]int) string {
	var b strings.Builder
	for _, what := range slices.Sorted(maps.Keys(seen)) {
		fmt.Fprintf(&b, "%8d  %s\n", seen[what], what)
	}
	return b.String()
}

// play kills one child after another on one file while clients ask, and carries all to its end. It returns how
// many were killed by the time that a promise was broken.
func (w *world) play(path string, cycles int, b bug) (lived int, err error) {
	s, enough := &street{changed: make(chan struct{})}, make(chan struct{})
	ended := s.crowd(w, clients, enough)
	for ; lived < cycles && w.failed() == nil; lived++ {
		p, err := startProcess(w, path, b)
		if err != nil {
			w.blame(err)
			break
		}
		s.put(p)
		p.live(moments[rand.IntN(len(moments))])
		if lived%lookEvery == 0 {
			w.look(path)
		}
	}
	close(enough)
	if err := w.end(s, path, b, ended); err != nil {
		w.blame(err)
	}
	<-ended
	return lived, w.failed()
}

// end lets a last child carry everything to its end, and judges what there is then.
func (w *world) end(s *street, path string, b bug, ended <-chan struct{}) error {
	if w.failed() != nil {
		return nil
	}
	p, err := startProcess(w, path, b)
	if err != nil {
		return err
	}
	defer p.kill()
	s.put(p)
	p.await(ended)
	p.out.send(command{Finish: true})
	select {
	case n := <-p.counts:
		p.out.send(command{Close: true})
		p.await(p.gone)
		p.kill()
		if w.failed() == nil {
			w.settle(path, &n)
		}
	case <-p.gone:
		return cmp.Or(w.failed(), errors.New("the last child died by itself"))
	case <-w.broken:
	case <-time.After(2 * hang):
		return errors.New("some keys do not end")
	}
	return nil
}

// A judge who has never found anything proves nothing.
func TestTheJudgeOfKillsFindsSeededBugs(t *testing.T) {
	for i, b := range []bug{answersEarly, inventsTokens, twoTransactions, countsInMemory, givesUp, opensSlowly, hoards} {
		t.Run(string(b), func(t *testing.T) {
			if _, err := os.Stat("/proc/self/status"); err != nil && b == hoards {
				t.Skip("this system does not tell how much memory a process has used")
			}
			seek(t, place(t, i), b)
		})
	}
}

func TestPowerCutsFindAStoreThatNeverSyncs(t *testing.T) {
	if *afterKill == "" {
		t.Skip("kill -9 alone loses no writes: this takes -after-kill with a command that cuts the power")
	}
	seek(t, place(t, 0), neverSyncs)
}

// A maker that is killed between linking the file and syncing its folder leaves a name that a power cut can take.
func TestAStoreKeepsItsNameThoughItsMakerWasKilled(t *testing.T) {
	if *afterKill == "" || *folder == "" {
		t.Skip("kill -9 alone loses no names: this takes -dir and -after-kill with a command that cuts that disk's power")
	}
	for i := range min(*cycles, 20) {
		made, path := place(t, 2*i), place(t, 2*i+1)
		if err := live(newWorld(), made); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(made, path); err != nil {
			t.Fatal(err)
		}
		w := newWorld()
		if _, err := w.play(path, 0, ""); err != nil {
			t.Fatalf("after %d cuts: %v", i, err)
		}
	}
}

// live lets one child make a store, and nothing else.
func live(w *world, path string) error {
	p, err := startProcess(w, path, "")
	if err != nil {
		return err
	}
	p.await(p.ready)
	p.kill()
	return w.failed()
}

// seek fails the test when a bug is not found.
func seek(t *testing.T, path string, b bug) {
	w := newWorld()
	lived, err := w.play(path, *cycles, b)
	if err == nil {
		t.Fatalf("not found in %d cycles", lived)
	}
	t.Logf("found in cycle %d: %.400v", lived, err)
}
