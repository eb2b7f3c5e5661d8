package keytest

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"example.com/keystate"
)

// transfers draws what clients may ask for.
var transfers = rapid.Custom(func(t *rapid.T) transfer {
	return transfer{From: "ada", To: "bob", Cents: rapid.Int64Range(1, 1000).Draw(t, "cents")}
})

func TestSoundPhasesSurviveWhateverIsAskedOfThem(t *testing.T) {
	Property(t, transfers, func(w *World, _ transfer) testCase {
		return caseOf(func(*engine) []phase { return sound(w) })
	})
}

// A recorder takes down what rapid says of a property that fails.
type recorder struct {
	*testing.T
	failed bool
	said   strings.Builder
}

func (r *recorder) Errorf(format string, args ...any) {
	r.failed = true
	fmt.Fprintf(&r.said, format+"\n", args...)
}
func (r *recorder) Fatalf(format string, args ...any) { r.Errorf(format, args...) }
func (r *recorder) Fatal(args ...any)                 { r.Errorf("%s", fmt.Sprint(args...)) }
func (r *recorder) Error(args ...any)                 { r.Errorf("%s", fmt.Sprint(args...)) }
func (r *recorder) Logf(format string, args ...any)   { fmt.Fprintf(&r.said, format+"\n", args...) }
func (r *recorder) Log(args ...any)                   { r.Logf("%s", fmt.Sprint(args...)) }
func (r *recorder) FailNow()                          { r.failed = true }
func (r *recorder) Fail()                             { r.failed = true }
func (r *recorder) Failed() bool                      { return r.failed }

// setFlag sets one of rapid's flags for a test.
func setFlag(t *testing.T, name, value string) {
	f := flag.Lookup(name)
	before := f.Value.String()
	if err := f.Value.Set(value); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Value.Set(before); err != nil {
			t.Error(err)
		}
	})
}

func TestAFaultThatOnlySomeRequestsMeetIsFound(t *testing.T) {
	const large = 300 // from here on, the effect makes a token of its own
	setFlag(t, "rapid.nofailfile", "true")
	setFlag(t, "rapid.checks", "1000")
	setFlag(t, "rapid.shrinktime", "2s")
	r := &recorder{T: t}
	rapid.Check(r, func(rt *rapid.T) {
		property(t, rt, transfers, func(w *World, request transfer) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, token string, s *transfer) error {
						if s.Cents >= large {
							token = keystate.NewID()
						}
						return pay(w)(ctx, token, s)
					}
				})
			})
		})
	})
	said := r.said.String()
	for _, want := range []string{"draw request: keytest.transfer", `has done "pay bob `, "twice; without a fault, once", "does not pass its token on"} {
		if !strings.Contains(said, want) {
			t.Errorf("rapid does not say %q", want)
		}
	}
	t.Log(said)
}
