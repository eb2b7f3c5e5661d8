package keytest

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/keystate"
)

func TestAWorldDoesOnceWhatItIsAskedUnderOneToken(t *testing.T) {
	w, ctx := new(World), t.Context()
	first, err1 := w.Do(ctx, "t1", "pay")
	again, err2 := w.Do(ctx, "t1", "pay")
	other, err3 := w.Do(ctx, "t2", "pay")
	if err := errors.Join(err1, err2, err3); err != nil || first != again || first == other {
		t.Errorf("%q, %q, %q, %v", first, again, other, err)
	}
	if d := w.Deeds(); len(d) != 2 || d[0].Asked != 2 || d[1].Asked != 1 || d[1].Token != "t2" || d[0].Request != "pay" || d[0].Receipt != first {
		t.Errorf("%+v", d)
	}
	if receipt, done := w.Find("t1"); !done || receipt != first {
		t.Errorf("%q, %v", receipt, done)
	}
	if _, done := w.Find("t3"); done {
		t.Error("what was not asked for is done")
	}
}

func TestAWorldRefusesATokenThatComesWithAnotherRequest(t *testing.T) {
	w := new(World)
	if _, err := w.Do(t.Context(), "t", "pay"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Do(t.Context(), "t", "pay more"); err == nil || len(w.Deeds()) != 1 {
		t.Errorf("%v, %+v", err, w.Deeds())
	}
}

func TestAWorldForgetsTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &World{TokenLife: time.Hour}
		for range 3 {
			if _, err := w.Do(t.Context(), "t", "pay"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(31 * time.Minute)
		}
		if n := len(w.Deeds()); n != 2 {
			t.Errorf("%d deeds", n)
		}
	})
}

func TestAWorldFailsAndLosesAnswersWhenItIsTo(t *testing.T) {
	w := new(World)
	w.FailNext(1)
	w.LoseNext(1)
	if _, err := w.Do(t.Context(), "t", "pay"); !errors.Is(err, ErrFailed) || len(w.Deeds()) != 0 {
		t.Errorf("%v, %+v", err, w.Deeds())
	}
	if _, err := w.Do(t.Context(), "t", "pay"); !errors.Is(err, ErrLost) || len(w.Deeds()) != 1 {
		t.Errorf("%v, %+v", err, w.Deeds())
	}
	if receipt, err := w.Do(t.Context(), "t", "pay"); err != nil || receipt != "pay #1" {
		t.Errorf("%q, %v", receipt, err)
	}
}

func TestASlowWorldHasDoneWhatItsCallerDidNotWaitFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for wait, deeds := range map[time.Duration]int{4 * time.Second: 0, 6 * time.Second: 1} {
			w := &World{Delay: 10 * time.Second}
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			defer cancel()
			if _, err := w.Do(ctx, "t", "pay"); !errors.Is(err, context.DeadlineExceeded) || len(w.Deeds()) != deeds {
				t.Errorf("after %v: %v, %+v", wait, err, w.Deeds())
			}
		}
	})
}

func TestIdleWaitsForRetriesThatAreDueLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := new(World)
		w.FailNext(5) // three in the run, two later
		e, err := keystate.New(OpenBolt(t, t.TempDir()), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		m, err := keystate.Register(e, "transfer", sound(w))
		if err != nil {
			t.Fatal(err)
		}
		key := keystate.Key{ID: "1"}
		if _, err := m.Do(t.Context(), key, transfer{From: "ada", To: "bob"}); err == nil || len(w.Deeds()) > 0 {
			t.Fatalf("%v, %+v", err, w.Deeds())
		}
		Idle(t, e)
		if r, err := e.Key(t.Context(), key); err != nil || r.Status != keystate.Answered || len(w.Deeds()) != 1 {
			t.Errorf("%+v, %v, %+v", r, err, w.Deeds())
		}
	})
}

// A failure is what a test is told, that is to fail.
type failure struct {
	testing.TB
	said string
}

func (f *failure) Helper() {}
func (f *failure) Fatalf(format string, args ...any) {
	f.said = format
	for _, a := range args {
		f.said += " " + strings.TrimSpace(strings.ReplaceAll(errorText(a), "\n", " "))
	}
}

func errorText(v any) string {
	if err, ok := v.(error); ok {
		return err.Error()
	}
	return ""
}

func TestIdleSaysWhatIsLeftWhenItHasWaitedLongEnough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := new(World)
		w.FailNext(1000)
		e, err := keystate.New(OpenBolt(t, t.TempDir()), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		phases := sound(w)
		phases[1].Retry = keystate.RetryPolicy{Attempts: -1, Initial: time.Second}
		m, err := keystate.Register(e, "transfer", phases)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Do(t.Context(), keystate.Key{ID: "1"}, transfer{From: "ada", To: "bob"}); err == nil {
			t.Fatal("it was done")
		}
		f := &failure{TB: t}
		Idle(f, e)
		if !strings.Contains(f.said, "the engine is not idle") || !strings.Contains(f.said, "deadline") {
			t.Errorf("%q", f.said)
		}
	})
}
