package history

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var operations = flag.Int("operations", 50_000, "calls to record and judge")

const (
	perHistory = 5000 // calls that are judged together, on a file of their own
	clients    = 32
	keys       = 40
)

// sights are what must have happened, or the test has proved less than it says.
var sights = []string{
	"died before a commit", "died within a commit", "died after a commit", "an effect sent again", "a commit owed", "a key reaped",
	"do: answered", "do: mismatch", "do: stopped", "do: parked", "do: nobody knows", "retry: done", "abandon: done",
}

// A found fault, by whom.
type found struct {
	counted, ordered, played error
}

// The judges.
const (
	byCount     = "the count"
	byPorcupine = "porcupine"
	byEither    = "either"
)

// finders names who found something.
func (f found) finders() string {
	switch {
	case f.counted != nil && f.ordered != nil:
		return byCount + " and " + byPorcupine
	case f.counted != nil:
		return byCount
	case f.ordered != nil:
		return byPorcupine
	}
	return "nobody"
}

// by says whether a judge is among the finders.
func (f found) by(judge string) bool {
	return f.counted != nil && judge != byPorcupine || f.ordered != nil && judge != byCount
}

func (f found) any() error { return errors.Join(f.counted, f.ordered, f.played) }

// record plays one history and judges it.
func record(t *testing.T, b *bug, calls int, seen map[string]int) (f found) {
	path := filepath.Join(t.TempDir(), "history.db")
	defer os.Remove(path) // a soak has many
	w := newWorld(path, b, calls)
	synctest.Test(t, func(t *testing.T) { f.played = w.play(clients, keys) })
	if f.played == nil {
		f.counted, f.ordered = w.verdict()
	}
	for what, n := range w.seen {
		seen[what] += n
	}
	seen["calls judged"] += len(w.history)
	return f
}

func TestHistoryHasAnOrderAndEveryCommitIsCountedOnce(t *testing.T) {
	seen, began, spoke := map[string]int{}, time.Now(), time.Now()
	for done := 0; done < *operations; done += perHistory {
		if f := record(t, nil, min(perHistory, *operations-done), seen); f.any() != nil {
			t.Fatalf("after %d calls: %v", done, f.any())
		}
		if time.Since(spoke) > 10*time.Second {
			spoke = time.Now()
			fmt.Printf("%d calls, %.0f a second\n", seen["calls judged"], float64(seen["calls judged"])/time.Since(began).Seconds())
		}
	}
	var list strings.Builder
	for _, what := range slices.Sorted(maps.Keys(seen)) {
		fmt.Fprintf(&list, "%8d  %s\n", seen[what], what)
	}
	t.Logf("in %v:\n%s", time.Since(began).Round(time.Millisecond), list.String())
	for _, what := range sights {
		if seen[what] == 0 && *operations >= 50_000 {
			t.Errorf("never seen: %s", what)
		}
	}
}

// A judge who has never found anything proves nothing. Each bug is found by whom it says, within as many calls as are judged
// without it.
func TestTheJudgesOfHistoriesFindSeededBugs(t *testing.T) {
	for _, b := range bugs {
		t.Run(b.name, func(t *testing.T) {
			for done := 0; done < *operations; done += perHistory {
				f := record(t, b, perHistory, map[string]int{})
				if f.by(b.finder) {
					t.Logf("found by %s within %d calls: %.600v", f.finders(), done+perHistory, f.any())
					return
				}
				if f.any() != nil {
					t.Logf("found by %s: %.600v", f.finders(), f.any())
				}
			}
			t.Errorf("%s did not find it in %d calls", b.finder, *operations)
		})
	}
}
