//go:build !race

package keystate

import (
	"path/filepath"
	"testing"
)

// The race detector allocates, too.

func TestAReplayAllocatesForItsAnswerOnly(t *testing.T) {
	const bound = 4 // the state, which is the request and becomes the answer; in it two strings and a byte string
	e := newEngineContender(t, filepath.Join(t.TempDir(), "keys.db"), Options{})
	ids := fill(t, e, 100)
	n := 0
	got := testing.AllocsPerRun(1000, func() {
		n++
		if err := e.request(ids[n%len(ids)]); err != nil {
			t.Fatal(err)
		}
	})
	if got > bound {
		t.Errorf("%v allocations, want at most %d", got, bound)
	}
	if err := e.close(); err != nil {
		t.Error(err)
	}
}
