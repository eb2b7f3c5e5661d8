package keystate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type transfer struct {
	From, To string
	Cents    int64
	Payout   string
	Tags     map[string]int
}

type transferPhase = Phase[*bbolt.Tx, transfer]

var quiet = slog.New(slog.DiscardHandler)

// open opens a store and closes it with the test.
func open(t testing.TB, path string, opts *Options) *Engine[*bbolt.Tx] {
	t.Helper()
	if opts == nil {
		opts = new(Options)
	}
	if opts.Logger == nil {
		opts.Logger = quiet
	}
	e, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func storePath(t testing.TB) string { return filepath.Join(t.TempDir(), "keys.db") }

func register(t testing.TB, e *Engine[*bbolt.Tx], phases ...transferPhase) *Machine[transfer] {
	t.Helper()
	m, err := Register(e, "transfer", phases)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// crashed is a copy of the store as a process leaves it that is killed now, while no commit is under way.
func crashed(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "crashed.db")
	if err := os.WriteFile(copied, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return copied
}

var (
	ctx       = context.Background()
	ada       = Key{Scope: "ada", ID: "8e03"}
	request   = transfer{From: "ada", To: "bob", Cents: 500}
	errDown   = errors.New("processor is down")
	landmark1 = transferPhase{To: "noted"}
)

// note writes a row that counts how often its commit took effect.
func note(name string) func(context.Context, *bbolt.Tx, *transfer) error {
	return func(_ context.Context, tx *bbolt.Tx, s *transfer) error {
		b, err := tx.CreateBucketIfNotExists([]byte("notes"))
		if err != nil {
			return err
		}
		row := []byte(s.From + "/" + name)
		return b.Put(row, append(bytes.Clone(b.Get(row)), '|'))
	}
}

// notes reads how often a commit took effect for ada.
func notes(t testing.TB, e *Engine[*bbolt.Tx], name string) (n int) {
	t.Helper()
	err := e.View(ctx, func(tx *bbolt.Tx) error {
		if b := tx.Bucket([]byte("notes")); b != nil {
			n = len(b.Get([]byte("ada/" + name)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func record(t testing.TB, e *Engine[*bbolt.Tx], key Key) Record {
	t.Helper()
	r, err := e.Key(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// three are the phases of a transfer whose effect is given.
func three(effect func(ctx context.Context, token string, s *transfer) error) []transferPhase {
	return []transferPhase{
		{To: "funds_reserved", Commit: note("reserved")},
		{To: "payout_sent", Effect: effect, Commit: note("sent")},
		{To: Finished, Commit: note("settled")},
	}
}

// processor counts the payouts under each token.
type processor struct {
	mu      sync.Mutex
	payouts map[string]int
}

func (p *processor) pay(_ context.Context, token string, s *transfer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.payouts == nil {
		p.payouts = map[string]int{}
	}
	p.payouts[token]++
	s.Payout = "po_" + token[:8]
	return nil
}

func (p *processor) tokens() (all []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for token := range p.payouts {
		all = append(all, token)
	}
	return all
}

func TestRetryAfterLostAnswerChargesOnce(t *testing.T) {
	path := storePath(t)
	var p processor
	e := open(t, path, nil)
	first, err := register(t, e, three(p.pay)...).Do(ctx, ada, request)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	e = open(t, path, nil)
	m := register(t, e, three(p.pay)...)
	run, err := m.Start(ctx, ada, request)
	if err != nil || !run.Replayed() {
		t.Fatalf("replayed: %v", err)
	}
	again, err := run.Wait(ctx)
	if err != nil || !reflect.DeepEqual(first, again) {
		t.Errorf("first %+v, then %+v, %v", first, again, err)
	}
	if len(p.tokens()) != 1 || p.payouts[p.tokens()[0]] != 1 {
		t.Errorf("payouts: %v", p.payouts)
	}
	for _, name := range []string{"reserved", "sent", "settled"} {
		if n := notes(t, e, name); n != 1 {
			t.Errorf("%s %d times", name, n)
		}
	}
}

func TestAnotherRequestUnderTheSameKeyIsRefusedWhileInFlightAndAfterwards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		proceed := make(chan struct{})
		m := register(t, e, three(func(context.Context, string, *transfer) error { <-proceed; return nil })...)
		other, err := Register(e, "refund", three(nil))
		if err != nil {
			t.Fatal(err)
		}
		run, err := m.Start(ctx, ada, request)
		if err != nil {
			t.Fatal(err)
		}
		check := func() {
			t.Helper()
			before := record(t, e, ada)
			dearer := request
			dearer.Cents++
			if _, err := m.Do(ctx, ada, dearer); !errors.Is(err, ErrMismatch) {
				t.Errorf("other amount: %v", err)
			}
			if _, err := other.Do(ctx, ada, request); !errors.Is(err, ErrMismatch) {
				t.Errorf("other machine: %v", err)
			}
			if !reflect.DeepEqual(before, record(t, e, ada)) {
				t.Error("the owner's record was touched")
			}
		}
		check()
		close(proceed)
		if _, err := run.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		check()
	})
}

func TestCallersWithTheSameKeyShareOneRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		var sent atomic.Int32
		m := register(t, e, three(func(_ context.Context, _ string, s *transfer) error {
			sent.Add(1)
			time.Sleep(time.Second)
			s.Tags = map[string]int{"a": 1}
			return nil
		})...)
		var wg sync.WaitGroup
		answers := make([]transfer, 20)
		for i := range answers {
			wg.Go(func() {
				var err error
				if answers[i], err = m.Do(ctx, ada, request); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		answers[0].Tags["a"] = 2
		if sent.Load() != 1 || answers[1].Tags["a"] != 1 {
			t.Errorf("%d effects; each caller has a copy of its own: %v", sent.Load(), answers[1].Tags)
		}
	})
}

func TestACallerMayPreferNotToWaitForAnothersRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), &Options{RefuseInFlight: true})
		m := register(t, e, three(func(context.Context, string, *transfer) error { time.Sleep(time.Second); return nil })...)
		run, err := m.Start(ctx, ada, request)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrInProgress) {
			t.Error(err)
		}
		if _, err := run.Wait(ctx); err != nil {
			t.Error(err)
		}
		if _, err := m.Do(ctx, ada, request); err != nil {
			t.Error(err)
		}
	})
}

func TestTheRunGoesOnWhenItsCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		m := register(t, e, three(func(context.Context, string, *transfer) error { time.Sleep(time.Minute / 4); return nil })...)
		impatient, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := m.Do(impatient, ada, request); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if r := record(t, e, ada); r.Status != Answered {
			t.Errorf("%+v", r)
		}
	})
}

func TestAShutdownIsNotAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := storePath(t)
		e := open(t, path, nil)
		hang := func(ctx context.Context, _ string, _ *transfer) error { <-ctx.Done(); return ctx.Err() }
		m := register(t, e, three(hang)...)
		run, err := m.Start(ctx, ada, request)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := run.Wait(ctx); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		e = open(t, path, nil)
		if r := record(t, e, ada); r.Status != Waiting || r.Point != "funds_reserved" || r.Attempts != 0 {
			t.Errorf("%+v", r)
		}
		var p processor
		register(t, e, three(p.pay)...)
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if r := record(t, e, ada); r.Status != Answered || notes(t, e, "reserved") != 1 || notes(t, e, "settled") != 1 {
			t.Errorf("%+v", r)
		}
	})
}

func TestCloseNamesTheEffectThatDoesNotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), &Options{CloseTimeout: time.Second})
		proceed := make(chan struct{})
		m := register(t, e, three(func(context.Context, string, *transfer) error { <-proceed; return nil })...)
		run, err := m.Start(ctx, ada, request)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err == nil || !strings.Contains(err.Error(), "ada/8e03") {
			t.Errorf("got %v", err)
		}
		close(proceed)
		if _, err := run.Wait(ctx); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
}

// interrupted makes a store in which ada's effect was under way when the process was killed, and returns its
// path, with the token that the effect was given.
func interrupted(t *testing.T, adapt func(p *transferPhase)) (path, token string) {
	t.Helper()
	original := storePath(t)
	e := open(t, original, nil)
	inside, proceed := make(chan string), make(chan struct{})
	phases := three(func(_ context.Context, token string, _ *transfer) error {
		inside <- token
		<-proceed
		return nil
	})
	adapt(&phases[1])
	run, err := register(t, e, phases...).Start(ctx, ada, request)
	if err != nil {
		t.Fatal(err)
	}
	token = <-inside
	path = crashed(t, original)
	close(proceed)
	if _, err := run.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return path, token
}

func asIs(*transferPhase) {}

func TestAfterACrashTheEffectRunsAgainWithTheSameToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, token := interrupted(t, asIs)
		e := open(t, path, nil)
		var p processor
		register(t, e, three(p.pay)...)
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if got := p.tokens(); len(got) != 1 || got[0] != token {
			t.Errorf("sent under %v, before the crash under %s", got, token)
		}
		if r := record(t, e, ada); r.Status != Answered || notes(t, e, "reserved") != 1 || r.History[2].Attempts != 2 {
			t.Errorf("%+v", r)
		}
	})
}

func TestAnEffectThatMustNotRunTwiceParksAfterACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		once := func(p *transferPhase) { p.AtMostOnce = true }
		path, _ := interrupted(t, once)
		e := open(t, path, nil)
		var p processor
		phases := three(p.pay)
		once(&phases[1])
		m := register(t, e, phases...)
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		r := record(t, e, ada)
		if r.Status != Parked || r.ParkReason != Indeterminate || len(p.tokens()) != 0 {
			t.Fatalf("%+v, %v", r, p.payouts)
		}
		_, err := m.Do(ctx, ada, request)
		var stopped *PhaseError
		if !errors.Is(err, ErrParked) || !errors.As(err, &stopped) || stopped.Before != "payout_sent" || stopped.Reason != Indeterminate {
			t.Errorf("got %v", err)
		}
		if err := e.Retry(ctx, ada); err != nil {
			t.Fatal(err)
		}
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if answer, err := m.Do(ctx, ada, request); err != nil || answer.Payout == "" || len(p.tokens()) != 1 {
			t.Errorf("after the operator's word: %+v, %v", answer, err)
		}
	})
}

func TestReconcileDecidesWhatBecameOfAnEffect(t *testing.T) {
	for name, test := range map[string]struct {
		outcome Outcome
		sent    int
		status  Status
		payout  string
	}{
		"done":     {Done, 0, Answered, "po_found"},
		"not done": {NotDone, 1, Answered, "po_sent"},
		"unknown":  {Unknown, 0, Parked, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path, token := interrupted(t, func(p *transferPhase) { p.AtMostOnce = true })
				e := open(t, path, nil)
				sent := 0
				phases := three(func(_ context.Context, _ string, s *transfer) error {
					sent++
					s.Payout = "po_sent"
					return nil
				})
				phases[1].AtMostOnce = true
				phases[1].Reconcile = func(_ context.Context, asked string, s *transfer) (Outcome, error) {
					if asked != token {
						t.Errorf("asked for %s, sent was %s", asked, token)
					}
					s.Payout = "po_found"
					return test.outcome, nil
				}
				m := register(t, e, phases...)
				if err := e.Resume(ctx); err != nil {
					t.Fatal(err)
				}
				r := record(t, e, ada)
				s, err := m.DecodeState(r)
				if err != nil || sent != test.sent || r.Status != test.status || s.Payout != test.payout {
					t.Errorf("sent %d times, %s, payout %q, %v", sent, r.Status, s.Payout, err)
				}
			})
		})
	}
}

func TestATokenThatMayBeForgottenIsNotSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, _ := interrupted(t, asIs)
		time.Sleep(25 * time.Hour)
		e := open(t, path, nil)
		var p processor
		phases := three(p.pay)
		phases[1].TokenLife = 24 * time.Hour
		register(t, e, phases...)
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if r := record(t, e, ada); r.ParkReason != TokenExpired || len(p.tokens()) != 0 {
			t.Errorf("%+v, %v", r, p.payouts)
		}
	})
}

func TestAnErrorIsRetriedInTheRunThenByTheEngineThenParked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var retried, parked atomic.Int32
		e := open(t, storePath(t), &Options{Observer: &Observer{
			Retried: func(Event) { retried.Add(1) },
			Parked:  func(Event) { parked.Add(1) },
		}})
		tries := 0
		phases := three(func(context.Context, string, *transfer) error { tries++; return errDown })
		phases[1].Retry = RetryPolicy{Attempts: 5, InRun: 2, Initial: time.Second, Max: time.Hour}
		m := register(t, e, phases...)
		_, err := m.Do(ctx, ada, request)
		var stopped *PhaseError
		if !errors.Is(err, errDown) || !errors.As(err, &stopped) || stopped.Attempt != 2 || errors.Is(err, ErrParked) {
			t.Fatalf("got %v", err)
		}
		if want := `keystate: ada/8e03 stopped before "payout_sent": processor is down`; err.Error() != want {
			t.Errorf("got %s", err)
		}
		if r := record(t, e, ada); tries != 2 || r.Status != Waiting || r.LastError != errDown.Error() || !r.Due.After(time.Now()) {
			t.Errorf("after the run: %d tries, %+v", tries, r)
		}
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		r := record(t, e, ada)
		if tries != 5 || r.Status != Parked || r.ParkReason != AttemptsUsedUp || r.Attempts != 5 {
			t.Errorf("in the end: %d tries, %+v", tries, r)
		}
		if retried.Load() != 4 || parked.Load() != 1 {
			t.Errorf("observed %d retries, %d parkings", retried.Load(), parked.Load())
		}
	})
}

func TestAClientsRetryTakesUpAWaitingKeyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		down := true
		phases := three(func(_ context.Context, _ string, s *transfer) error {
			if down {
				return errDown
			}
			return nil
		})
		phases[1].Retry = RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour}
		m := register(t, e, phases...)
		if _, err := m.Do(ctx, ada, request); !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		down = false
		start := time.Now()
		if _, err := m.Do(ctx, ada, request); err != nil || time.Since(start) > time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestACommitThatFailsKeepsWhatItsEffectFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := storePath(t)
		e := open(t, path, nil)
		var p processor
		phases := three(p.pay)
		phases[1].AtMostOnce = true
		phases[1].Retry = RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour}
		phases[1].Commit = func(context.Context, *bbolt.Tx, *transfer) error { return errDown }
		if _, err := register(t, e, phases...).Do(ctx, ada, request); !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		path = crashed(t, path)
		e = open(t, path, nil)
		phases[1].Commit = note("sent")
		m := register(t, e, phases...)
		answer, err := m.Do(ctx, ada, request)
		if err != nil || answer.Payout == "" || len(p.tokens()) != 1 || p.payouts[p.tokens()[0]] != 1 {
			t.Errorf("%+v, %v, %v", answer, err, p.payouts)
		}
	})
}

func TestAFinalErrorIsAnAnswerLikeAnyOther(t *testing.T) {
	declined := errors.New("card declined")
	for name, phases := range map[string][]transferPhase{
		"by an effect": three(func(_ context.Context, _ string, s *transfer) error {
			s.Payout = "none"
			return fmt.Errorf("processor: %w", Final(declined))
		}),
		"by a commit": {landmark1, {To: Finished, Commit: func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
			s.Payout = "none"
			return errors.Join(note("settled")(ctx, tx, s), Final(declined))
		}}},
		"by policy": {landmark1, {To: Finished, OnError: Fail, Effect: func(_ context.Context, _ string, s *transfer) error {
			s.Payout = "none"
			return declined
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			e := open(t, storePath(t), nil)
			m := register(t, e, phases...)
			first, err1 := m.Do(ctx, ada, request)
			again, err2 := m.Do(ctx, ada, request)
			var final *FinalError
			if !errors.As(err1, &final) || !strings.Contains(final.Reason, "card declined") || first.Payout != "none" {
				t.Fatalf("%+v, %v", first, err1)
			}
			if !reflect.DeepEqual(first, again) || !reflect.DeepEqual(err1, err2) {
				t.Errorf("first %+v, %v; then %+v, %v", first, err1, again, err2)
			}
			if notes(t, e, "settled") != 0 {
				t.Error("the refusing commit left a trace")
			}
		})
	}
}

var errLimited = errors.New("rate limited")

// withdrawing are machines whose first phase withdraws ada's request, each in another way.
func withdrawing(why error) map[string][]transferPhase {
	sent := func(context.Context, string, *transfer) error { return nil }
	lost := func(context.Context, string, *transfer) error { return errDown }
	withdraws := func(context.Context, string, *transfer) error { return why }
	inCommit := func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		return errors.Join(note("sent")(ctx, tx, s), why)
	}
	asked := func(context.Context, string, *transfer) (Outcome, error) { return Done, why }
	return map[string][]transferPhase{
		"a commit":                    {{To: "payout_sent", Commit: inCommit}, {To: Finished}},
		"the only commit":             {{To: Finished, Commit: inCommit}},
		"an effect":                   {{To: "payout_sent", Effect: withdraws}, {To: Finished}},
		"a commit after an effect":    {{To: "payout_sent", Effect: sent, Commit: inCommit}, {To: Finished}},
		"Reconcile":                   {{To: "payout_sent", Effect: lost, Reconcile: asked}, {To: Finished}},
		"whatever else Fail says":     {{To: "payout_sent", Effect: withdraws, OnError: Fail}, {To: Finished}},
		"whatever else Ignore says":   {{To: "payout_sent", Effect: withdraws, OnError: Ignore}, {To: Finished}},
		"whatever else Attempts says": {{To: "payout_sent", Effect: withdraws, Retry: RetryPolicy{Attempts: 1}}, {To: Finished}},
		"an effect at most once":      {{To: "payout_sent", Effect: withdraws, AtMostOnce: true}, {To: Finished}},
		"a commit that Fail is for":   {{To: "payout_sent", OnError: Fail, Commit: inCommit}, {To: Finished}},
		"a commit that Ignore is for": {{To: "payout_sent", OnError: Ignore, Commit: inCommit}, {To: Finished}},
	}
}

func TestAWithdrawnRequestIsForgotten(t *testing.T) {
	for mark, why := range map[string]error{
		"alone":          Withdraw(errLimited),
		"in another":     fmt.Errorf("processor: %w", Withdraw(errLimited)),
		"with Final":     Final(Withdraw(errLimited)),
		"outside Final":  Withdraw(Final(errLimited)),
		"beside another": errors.Join(errDown, Withdraw(errLimited)),
	} {
		for by, phases := range withdrawing(why) {
			t.Run(mark+" by "+by, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := open(t, storePath(t), nil)
					m := register(t, e, phases...)
					answer, err := m.Do(ctx, ada, request)
					if !errors.Is(err, ErrWithdrawn) || !errors.Is(err, errLimited) || !reflect.DeepEqual(answer, transfer{}) {
						t.Fatalf("%+v, %v", answer, err)
					}
					var stopped *PhaseError
					if errors.As(err, &stopped) || errors.Is(err, ErrParked) {
						t.Errorf("it is told as a key that goes on: %v", err)
					}
					if _, err := e.Key(ctx, ada); !errors.Is(err, ErrNotFound) {
						t.Errorf("there is a record: %v", err)
					}
					if s, err := e.Stats(ctx); err != nil || s.Counts != (Counts{}) || s.Queued != 0 || s.UnderWay != 0 {
						t.Errorf("%+v, %v", s, err)
					}
					if notes(t, e, "sent") != 0 {
						t.Error("the commit left a trace")
					}
					if _, err := m.Find(ctx, ada, request); !errors.Is(err, ErrNotFound) {
						t.Errorf("it is found: %v", err)
					}
					checkStore(t, e)
				})
			})
		}
	}
}

func TestAWithdrawalSaysWhatItIs(t *testing.T) {
	e := open(t, storePath(t), nil)
	_, err := register(t, e, withdrawing(Withdraw(errLimited))["an effect"]...).Do(ctx, ada, request)
	if want := `keystate: ada/8e03 withdrawn before "payout_sent": rate limited`; err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
	if Withdraw(nil) != nil {
		t.Error("Withdraw(nil) is not nil")
	}
	if err := Withdraw(errLimited); err.Error() != "rate limited" || errors.Is(err, ErrWithdrawn) {
		t.Errorf("the mark itself: %v", err)
	}
}

func TestAWithdrawnKeyMayBeUsedForAnotherRequestUnderAnotherToken(t *testing.T) {
	e := open(t, storePath(t), nil)
	var tokens []string
	m := register(t, e, transferPhase{To: Finished, Effect: func(_ context.Context, token string, s *transfer) error {
		if tokens = append(tokens, token); len(tokens) < 3 {
			return Withdraw(errLimited)
		}
		return nil
	}})
	dearer := request
	dearer.Cents++
	for i, asked := range []transfer{request, request, dearer} {
		answer, err := m.Do(ctx, ada, asked)
		if (i < 2) != errors.Is(err, ErrWithdrawn) || i == 2 && (err != nil || answer.Cents != dearer.Cents) {
			t.Errorf("request %d: %+v, %v", i, answer, err)
		}
	}
	if slices.Sort(tokens); len(slices.Compact(tokens)) != 3 {
		t.Errorf("tokens: %v", tokens)
	}
	if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrMismatch) {
		t.Errorf("the key belongs to the request that was carried out: %v", err)
	}
}

func TestARequestThatItsFirstCommitWithdrawsIsNotWritten(t *testing.T) {
	var written atomic.Int32
	e := open(t, storePath(t), &Options{Observer: &Observer{Grouped: func(Event) { written.Add(1) }}})
	m := register(t, e, withdrawing(Withdraw(errLimited))["a commit"]...)
	if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrWithdrawn) || written.Load() != 0 {
		t.Errorf("%d transactions, %v", written.Load(), err)
	}
}

func TestAWithdrawalIsObservedAsNothingElse(t *testing.T) {
	for by, want := range map[string][]string{
		"a commit":  {"withdrawn started 1 rate limited"},
		"an effect": {"claimed started 0 <nil>", "withdrawn started 1 rate limited"},
		"Reconcile": {"claimed started 0 <nil>", "retried started 2 processor is down", "withdrawn started 2 rate limited"},
	} {
		t.Run(by, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var seen []string
				tell := func(what string) func(Event) {
					return func(ev Event) { seen = append(seen, fmt.Sprint(what, " ", ev.Point, " ", ev.Attempt, " ", ev.Err)) }
				}
				e := open(t, storePath(t), &Options{Observer: &Observer{
					Claimed: tell("claimed"), Committed: tell("committed"), Retried: tell("retried"), Parked: tell("parked"), Finished: tell("finished"),
					Replayed: tell("replayed"), Withdrawn: tell("withdrawn"), Reaped: tell("reaped"),
				}})
				if _, err := register(t, e, withdrawing(Withdraw(errLimited))[by]...).Do(ctx, ada, request); !errors.Is(err, ErrWithdrawn) {
					t.Fatal(err)
				}
				if !slices.Equal(seen, want) {
					t.Errorf("got  %q\nwant %q", seen, want)
				}
			})
		})
	}
}

func TestAWithdrawalByALaterPhaseIsAnErrorLikeAnyOther(t *testing.T) {
	for where, phase := range map[string]transferPhase{
		"effect":       {To: "payout_sent", Effect: func(context.Context, string, *transfer) error { return Withdraw(errLimited) }},
		"fused commit": {To: "payout_sent", Commit: func(context.Context, *bbolt.Tx, *transfer) error { return Withdraw(errLimited) }},
	} {
		for policy, says := range map[ErrorPolicy]string{
			Retry:  `keystate: ada/8e03 stopped before "payout_sent": rate limited`,
			Fail:   `keystate: ada/8e03 ended before "payout_sent": rate limited`,
			Ignore: "<nil>",
		} {
			t.Run(fmt.Sprint(where, " ", policy), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := open(t, storePath(t), nil)
					phase.OnError, phase.Retry = policy, RetryPolicy{InRun: -1}
					_, err := register(t, e, transferPhase{To: "funds_reserved", Commit: note("reserved")}, phase, transferPhase{To: Finished}).Do(ctx, ada, request)
					if fmt.Sprint(err) != says || errors.Is(err, ErrWithdrawn) {
						t.Errorf("got %v", err)
					}
					if r := record(t, e, ada); len(r.History) < 2 || notes(t, e, "reserved") != 1 {
						t.Errorf("%+v", r)
					}
				})
			})
		}
	}
}

func TestAPhaseThatADeployHasPutBehindAnotherWithdrawsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := storePath(t)
		e := open(t, path, nil)
		hang := func(ctx context.Context, _ string, _ *transfer) error { <-ctx.Done(); return ctx.Err() }
		if _, err := register(t, e, transferPhase{To: "payout_sent", Effect: hang}, transferPhase{To: Finished}).Start(ctx, ada, request); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		e = open(t, path, nil)
		withdraws := func(context.Context, string, *transfer) error { return Withdraw(errLimited) }
		m := register(t, e, landmark1, transferPhase{To: "payout_sent", Effect: withdraws, Retry: RetryPolicy{InRun: -1}}, transferPhase{To: Finished})
		_, err := m.Do(ctx, ada, request)
		var stopped *PhaseError
		if !errors.As(err, &stopped) || stopped.Before != "payout_sent" || errors.Is(err, ErrWithdrawn) {
			t.Errorf("got %v", err)
		}
		record(t, e, ada)
	})
}

func TestAWithdrawalCountsDuringAShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := storePath(t)
		e := open(t, path, nil)
		m := register(t, e, transferPhase{To: Finished, Effect: func(ctx context.Context, _ string, _ *transfer) error {
			<-ctx.Done()
			return Withdraw(errLimited)
		}})
		run, err := m.Start(ctx, ada, request)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := run.Wait(ctx); !errors.Is(err, ErrWithdrawn) {
			t.Error(err)
		}
		e = open(t, path, nil)
		if _, err := e.Key(ctx, ada); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	})
}

func TestEverybodyWhoWaitsForAWithdrawnRequestIsTold(t *testing.T) {
	for by, start := range map[string]bool{"an effect": true, "a commit": false} { // whether the claim is durable before
		t.Run(by, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := openGated(t, &gated{before: func() { time.Sleep(time.Second) }})
				m := register(t, e, withdrawing(Withdraw(errLimited))[by]...)
				var callers sync.WaitGroup
				for range 5 {
					callers.Go(func() {
						if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrWithdrawn) || !errors.Is(err, errLimited) {
							t.Errorf("Do: %v", err)
						}
					})
					callers.Go(func() {
						run, err := m.Start(ctx, ada, request)
						if start != (err == nil) {
							t.Errorf("Start: %v", err)
						}
						if err == nil {
							_, err = run.Wait(ctx)
						}
						if !errors.Is(err, ErrWithdrawn) || !errors.Is(err, errLimited) {
							t.Errorf("Start and Wait: %v", err)
						}
					})
				}
				callers.Wait()
				if s, err := e.Stats(ctx); err != nil || s.Counts != (Counts{}) {
					t.Errorf("%+v, %v", s, err)
				}
			})
		})
	}
}

func TestStartReturnsTheRunOfAClaimThatWasDurableAlsoWhenItIsWithdrawnMeanwhile(t *testing.T) {
	for name, durable := range map[string]bool{"durable": true, "not durable": false} {
		r := newRun(ada, "transfer", [16]byte{})
		r.err = &withdrawal{key: ada, before: Finished, err: errLimited}
		if durable {
			r.announce()
		}
		close(r.done)
		for range 100 { // whichever of the two channels is looked at
			run, err := (&Run[transfer]{run: r}).claimed(ctx)
			if durable != (err == nil) || !durable && !errors.Is(err, ErrWithdrawn) {
				t.Fatalf("%s: %v", name, err)
			}
			if durable {
				_, err = run.Wait(ctx)
			}
			if !errors.Is(err, ErrWithdrawn) {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
}

// A gated store calls before ahead of every Update, and gives out its records through around. Either may be nil.
type gated struct {
	*boltStore
	before func()
	around func(Keys) Keys
}

func (g *gated) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if g.before != nil {
		g.before()
	}
	return g.boltStore.Update(ctx, fn)
}

func (g *gated) Keys(tx *bbolt.Tx) Keys {
	k := g.boltStore.Keys(tx)
	if g.around != nil {
		k = g.around(k)
	}
	return k
}

// openGated opens an engine on a gated store, which it fills in.
func openGated(t *testing.T, g *gated) *Engine[*bbolt.Tx] {
	t.Helper()
	o := (&Options{Logger: quiet}).orDefault()
	var err error
	if g.boltStore, err = openBolt(storePath(t), o); err != nil {
		t.Fatal(err)
	}
	e, err := New[*bbolt.Tx](g, &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func TestAWithdrawalThatCannotBeWrittenLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sent := 0
		full := true
		e := openGated(t, &gated{around: func(k Keys) Keys {
			return &faultyKeys{Keys: k, remove: func(r Record) error {
				if full {
					return ErrStorageFull
				}
				return k.Delete(r)
			}}
		}})
		m := register(t, e, transferPhase{To: Finished, Effect: func(context.Context, string, *transfer) error { sent++; return Withdraw(errLimited) }})
		_, err := m.Do(ctx, ada, request)
		var stopped *PhaseError
		if !errors.Is(err, ErrStorageFull) || !errors.As(err, &stopped) || errors.Is(err, ErrWithdrawn) {
			t.Errorf("got %v", err)
		}
		if r := record(t, e, ada); r.Status != Running || r.Refusal != nil || sent != 1 {
			t.Errorf("%+v, sent %d times", r, sent)
		}
		full = false
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := e.Key(ctx, ada); !errors.Is(err, ErrNotFound) || sent != 2 {
			t.Errorf("%v, sent %d times", err, sent)
		}
	})
}

func TestAHolderThatIsFencedOutWithdrawsNothing(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := register(t, e, transferPhase{To: Finished, Effect: func(context.Context, string, *transfer) error {
		taken := func(r Record) ([]event, error) { return []event{{kind: claim, epoch: r.Epoch + 1}}, nil }
		return errors.Join(e.change(ctx, ada, taken), Withdraw(errLimited))
	}})
	if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrFenced) || errors.Is(err, ErrWithdrawn) {
		t.Errorf("got %v", err)
	}
	if r := record(t, e, ada); r.Status != Running || r.Epoch != e.epoch+1 {
		t.Errorf("%+v", r)
	}
}

func TestAPhaseThatPassesOnAnotherKeysErrorHasMarkedNothingItself(t *testing.T) {
	other := Key{"ada", "other"}
	for name, test := range map[string]struct {
		first, second error // of the other machine's phases
	}{
		"a withdrawal":                         {first: Withdraw(errLimited)},
		"a withdrawal with Final in it":        {first: Withdraw(Final(errLimited))},
		"a later phase's that was not heeded":  {second: Withdraw(errLimited)},
		"the same, wrapped in what is its own": {second: fmt.Errorf("processor: %w", Withdraw(errLimited))},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := open(t, storePath(t), nil)
				inner, err := Register(e, "inner", []transferPhase{
					{To: "noted", Effect: func(context.Context, string, *transfer) error { return test.first }, Retry: RetryPolicy{InRun: -1}},
					{To: Finished, Effect: func(context.Context, string, *transfer) error { return test.second }, Retry: RetryPolicy{InRun: -1}},
				})
				if err != nil {
					t.Fatal(err)
				}
				m := register(t, e, transferPhase{To: Finished, Retry: RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour},
					Effect: func(ctx context.Context, _ string, s *transfer) error {
						_, err := inner.Do(ctx, other, *s)
						return fmt.Errorf("inner: %w", err)
					}})
				_, err = m.Do(ctx, ada, request)
				var stopped *PhaseError
				if !errors.As(err, &stopped) || stopped.Key != ada || !errors.Is(err, errLimited) || IsFinal(err) {
					t.Errorf("got %v", err)
				}
				if r := record(t, e, ada); r.Status != Waiting {
					t.Errorf("%+v", r)
				}
			})
		})
	}
}

func TestAStagedKeyMayBeWithdrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told atomic.Int32
		e := open(t, storePath(t), &Options{Observer: &Observer{Withdrawn: func(Event) { told.Add(1) }}})
		receipts, err := Register(e, "receipt", withdrawing(Withdraw(errLimited))["a commit"])
		if err != nil {
			t.Fatal(err)
		}
		m := register(t, e, transferPhase{To: Finished, Commit: func(_ context.Context, tx *bbolt.Tx, s *transfer) error {
			return Stage(tx, receipts, Key{"receipt", s.From}, *s)
		}})
		if _, err := m.Do(ctx, ada, request); err != nil {
			t.Fatal(err)
		}
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if s, err := e.Stats(ctx); err != nil || s.Counts != (Counts{Finished: 1}) || told.Load() != 1 {
			t.Errorf("%+v, %v, told %d times", s, err, told.Load())
		}
		checkStore(t, e)
	})
}

func TestAMemberThatWithdrawsHarmsNobodyInItsGroup(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := register(t, e, transferPhase{To: Finished, Commit: func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		if s.Cents%3 == 0 {
			return errors.Join(note("counted")(ctx, tx, s), Withdraw(errLimited))
		}
		return note("counted")(ctx, tx, s)
	}})
	var wg sync.WaitGroup
	for i := range int64(300) {
		wg.Go(func() {
			_, err := m.Do(ctx, Key{Scope: "ada", ID: fmt.Sprint(i)}, transfer{From: "ada", Cents: i})
			if withdrawn := i%3 == 0; withdrawn != errors.Is(err, ErrWithdrawn) || !withdrawn && err != nil {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if s, err := e.Stats(ctx); err != nil || s.Counts != (Counts{Finished: 200}) || notes(t, e, "counted") != 200 {
		t.Errorf("%+v, %v, %d rows", s, err, notes(t, e, "counted"))
	}
	checkStore(t, e)
}

func TestAnIgnoredErrorLeavesNothingOfThePhaseButItsPoint(t *testing.T) {
	for name, ignored := range map[string]transferPhase{
		"of an effect": {To: "receipt_sent", OnError: Ignore, Commit: note("receipt"), Effect: func(_ context.Context, _ string, s *transfer) error {
			s.Payout = "half"
			return errDown
		}},
		"of a commit": {To: "receipt_sent", OnError: Ignore, Commit: func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
			s.Payout = "half"
			return errors.Join(note("receipt")(ctx, tx, s), errDown)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			e := open(t, storePath(t), nil)
			m := register(t, e, transferPhase{To: "funds_reserved", Commit: note("reserved")}, ignored, transferPhase{To: Finished, Commit: note("settled")})
			answer, err := m.Do(ctx, ada, request)
			if err != nil || answer.Payout != "" || notes(t, e, "receipt") != 0 || notes(t, e, "reserved") != 1 || notes(t, e, "settled") != 1 {
				t.Errorf("%+v, %v", answer, err)
			}
			if r := record(t, e, ada); r.History[2].Ignored != errDown.Error() {
				t.Errorf("%+v", r.History)
			}
		})
	}
}

func TestPanicAndGoexitAreAttemptsLikeAnyOther(t *testing.T) {
	panics := func() { panic("oops") }
	for name, misbehave := range map[string]func(){"panic": panics, "Goexit": runtime.Goexit} {
		for _, where := range []string{"effect", "commit", "first commit"} {
			t.Run(name+" in "+where, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := open(t, storePath(t), nil)
					tries := 0
					once := func() {
						if tries++; tries == 1 {
							misbehave()
						}
					}
					phases := three(func(context.Context, string, *transfer) error { return nil })
					commit := func(next func(context.Context, *bbolt.Tx, *transfer) error) func(context.Context, *bbolt.Tx, *transfer) error {
						return func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
							if err := next(ctx, tx, s); err != nil {
								return err
							}
							once()
							return nil
						}
					}
					switch where {
					case "effect":
						phases[1].Effect = func(context.Context, string, *transfer) error { once(); return nil }
					case "commit":
						phases[1].Commit = commit(note("sent"))
					case "first commit":
						phases[0].Commit = commit(note("reserved"))
					}
					m := register(t, e, phases...)
					if _, err := m.Do(ctx, ada, request); err != nil {
						t.Fatal(err)
					}
					r := record(t, e, ada)
					if tries < 2 || r.LastError == "" {
						t.Errorf("%d tries, %+v", tries, r)
					}
					for _, name := range []string{"reserved", "sent", "settled"} {
						if n := notes(t, e, name); n != 1 {
							t.Errorf("%s %d times", name, n)
						}
					}
				})
			})
		}
	}
}

func TestAFailingMemberHarmsNobodyInItsGroup(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := register(t, e, transferPhase{To: Finished, OnError: Fail, Commit: func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		if err := note("counted")(ctx, tx, s); err != nil {
			return err
		}
		switch s.Cents % 5 {
		case 1:
			return errDown
		case 2:
			panic("oops")
		case 3:
			runtime.Goexit()
		}
		return nil
	}})
	var wg sync.WaitGroup
	for i := range int64(300) {
		wg.Go(func() {
			_, err := m.Do(ctx, Key{Scope: "ada", ID: fmt.Sprint(i)}, transfer{From: "ada", Cents: i})
			var final *FinalError
			if bad := i%5 >= 1 && i%5 <= 3; bad != errors.As(err, &final) || !bad && err != nil {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := notes(t, e, "counted"); n != 120 {
		t.Errorf("%d commits took effect, want 120", n)
	}
	checkStore(t, e)
}

// checkStore verifies the whole of a store that is open.
func checkStore(t testing.TB, e *Engine[*bbolt.Tx]) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "verified.db")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Backup(ctx, e, f); err != nil {
		t.Fatal(err)
	}
	if err := Verify(path); err != nil {
		t.Error(err)
	}
}

func TestACrashLoopEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		few := func(p *transferPhase) { p.Retry = RetryPolicy{Attempts: 3} }
		path, _ := interrupted(t, few)
		for range 2 {
			e := open(t, path, nil)
			inside, proceed := make(chan bool), make(chan struct{})
			phases := three(func(context.Context, string, *transfer) error { inside <- true; <-proceed; return errDown })
			few(&phases[1])
			phases[1].Retry.InRun = -1
			register(t, e, phases...)
			<-inside
			path = crashed(t, path)
			close(proceed)
		}
		e := open(t, path, nil)
		phases := three(func(context.Context, string, *transfer) error { t.Error("a fourth attempt"); return nil })
		few(&phases[1])
		register(t, e, phases...)
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if r := record(t, e, ada); r.ParkReason != AttemptsUsedUp || r.Attempts != 3 {
			t.Errorf("%+v", r)
		}
	})
}

func TestADeployThatWouldStrandAKeyFailsAtRegister(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, _ := interrupted(t, asIs)
		var p processor
		renamed := three(p.pay)
		renamed[0].To = "money_held"

		e := open(t, crashed(t, path), nil)
		_, err := Register(e, "transfer", renamed)
		if err == nil || !strings.Contains(err.Error(), `"funds_reserved"`) || !strings.Contains(err.Error(), "ada/8e03") {
			t.Errorf("got %v", err)
		}

		e = open(t, crashed(t, path), &Options{ParkUnknown: true})
		if _, err := Register(e, "transfer", renamed); err != nil {
			t.Fatal(err)
		}
		if r := record(t, e, ada); r.ParkReason != UnknownPoint {
			t.Errorf("%+v", r)
		}

		e = open(t, crashed(t, path), nil)
		renamed[0].Formerly = []RecoveryPoint{"funds_reserved"}
		register(t, e, renamed...)
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		r := record(t, e, ada)
		if r.Status != Answered || r.History[1].Point != "money_held" || notes(t, e, "reserved") != 1 {
			t.Errorf("%+v", r)
		}
	})
}

func TestADeployDoesNotChangeTheTokenOfAnEffectThatIsUnderWay(t *testing.T) {
	renamed := func(phases []transferPhase) []transferPhase {
		phases[1].To, phases[1].Formerly = "money_sent", []RecoveryPoint{"payout_sent"}
		return phases
	}
	inserted := func(phases []transferPhase) []transferPhase {
		return slices.Insert(phases, 1, transferPhase{To: "limits_checked", Commit: note("checked")})
	}
	for name, deploy := range map[string]func([]transferPhase) []transferPhase{"renamed": renamed, "inserted": inserted} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path, token := interrupted(t, asIs)
				e := open(t, path, nil)
				var p processor
				m := register(t, e, deploy(three(p.pay))...)
				if err := e.Resume(ctx); err != nil {
					t.Fatal(err)
				}
				if got := p.tokens(); len(got) != 1 || got[0] != token || notes(t, e, "settled") != 1 || notes(t, e, "checked") != 0 {
					t.Errorf("sent under %v, before the deploy under %s", got, token)
				}
				if _, err := m.Do(ctx, Key{"ada", "new"}, request); err != nil || name == "inserted" && notes(t, e, "checked") != 1 {
					t.Errorf("a new key: %v", err)
				}
			})
		})
	}
}

func TestADeployThatDropsAPhaseWhoseEffectIsUnderWayIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, _ := interrupted(t, asIs)
		e := open(t, path, nil)
		if _, err := Register(e, "transfer", slices.Delete(three(nil), 1, 2)); err == nil || !strings.Contains(err.Error(), `"payout_sent"`) {
			t.Errorf("got %v", err)
		}
	})
}

func TestAStateThatDoesNotDecodeParksItsKeyAndNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := storePath(t)
		e := open(t, path, nil)
		phases := three(func(ctx context.Context, _ string, _ *transfer) error { <-ctx.Done(); return ctx.Err() })
		m := register(t, e, phases...)
		eve := Key{Scope: "eve", ID: "1"}
		for _, key := range []Key{ada, eve} {
			if _, err := m.Start(ctx, key, transfer{From: key.Scope}); err != nil {
				t.Fatal(err)
			}
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		e = open(t, path, nil)
		err := e.change(ctx, ada, func(r Record) ([]event, error) {
			fromIsANumber := []byte("\x81\xa4From\x05")
			return []event{{kind: claim, epoch: r.Epoch}, {kind: act, state: fromIsANumber}, {kind: wait, due: recorded(time.Now())}}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		var p processor
		register(t, e, three(p.pay)...)
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if r := record(t, e, ada); r.ParkReason != Undecodable {
			t.Errorf("ada: %+v", r)
		}
		if r := record(t, e, eve); r.Status != Answered {
			t.Errorf("eve: %+v", r)
		}
	})
}

func TestWhatIsWrongWithACallIsSaidBeforeAnythingIsWritten(t *testing.T) {
	e := open(t, storePath(t), &Options{MaxState: 1000})
	m := register(t, e, three(nil)...)
	long := strings.Repeat("x", 256)
	for name, test := range map[string]struct {
		key  Key
		want error
		s    transfer
	}{
		"empty ID":        {Key{"ada", ""}, ErrInvalidKey, request},
		"long ID":         {Key{"ada", long}, ErrInvalidKey, request},
		"long scope":      {Key{long, "1"}, ErrInvalidKey, request},
		"state too large": {ada, ErrTooLarge, transfer{Payout: strings.Repeat("x", 1000)}},
	} {
		if _, err := m.Do(ctx, test.key, test.s); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	longest := Key{long[:255], long[:255]}
	if _, err := m.Do(ctx, longest, request); err != nil {
		t.Error(err)
	}
	if stats, err := e.Stats(ctx); err != nil || stats.Counts != (Counts{Finished: 1}) {
		t.Errorf("%+v, %v", stats, err)
	}
}

func TestAStateThatGrowsTooLargeStopsThePhaseThatGrewIt(t *testing.T) {
	e := open(t, storePath(t), &Options{MaxState: 1000})
	phases := three(nil)
	phases[2].OnError = Fail
	phases[2].Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		s.Payout = strings.Repeat("x", 1000)
		return note("settled")(ctx, tx, s)
	}
	_, err := register(t, e, phases...).Do(ctx, ada, request)
	var final *FinalError
	if !errors.As(err, &final) || !strings.Contains(final.Reason, "too large") || notes(t, e, "settled") != 0 || notes(t, e, "sent") != 1 {
		t.Errorf("got %v", err)
	}
}

func TestAllFaultsOfARegistrationAreToldAtOnce(t *testing.T) {
	e := open(t, storePath(t), nil)
	_, err := Register(e, "", []transferPhase{
		{To: Started},
		{To: Finished},
		{To: "a", AtMostOnce: true},
		{To: "a", OnError: 7},
		{To: "", TokenLife: -1},
	})
	if err == nil {
		t.Fatal("it was registered")
	}
	for _, want := range []string{"name must have", "where every key begins", "only the last", "named twice", "there is none", "none of Retry", "1 to 100 bytes", "negative"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not among the faults:\n%v", want, err)
		}
	}
	if _, err := Register(e, "endless", []transferPhase{{To: "a"}}); err == nil || !strings.Contains(err.Error(), "last phase must reach") {
		t.Errorf("got %v", err)
	}
	register(t, e, three(nil)...)
	if _, err := Register(e, "transfer", three(nil)); err == nil {
		t.Error("the same name twice")
	}
}

func TestCallersBeyondTheLimitWaitInLineAndClaimNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), &Options{MaxRuns: 2})
		m := register(t, e, three(func(context.Context, string, *transfer) error { time.Sleep(10 * time.Second); return nil })...)
		for i := range 2 {
			if _, err := m.Start(ctx, Key{ID: fmt.Sprint(i)}, request); err != nil {
				t.Fatal(err)
			}
		}
		impatient, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := m.Do(impatient, ada, request); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if _, err := e.Key(ctx, ada); !errors.Is(err, ErrNotFound) {
			t.Errorf("it was claimed: %v", err)
		}
		if _, err := m.Do(ctx, ada, request); err != nil {
			t.Error(err)
		}
	})
}

func TestAStagedKeyExistsExactlyIfItsCommitDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		var receipts atomic.Int32
		outbox, err := Register(e, "receipt", []transferPhase{{To: Finished, Effect: func(context.Context, string, *transfer) error {
			receipts.Add(1)
			return nil
		}}})
		if err != nil {
			t.Fatal(err)
		}
		phases := three(nil)
		tries := 0
		phases[2].Commit = func(_ context.Context, tx *bbolt.Tx, s *transfer) error {
			if err := Stage(tx, outbox, Key{"receipt", s.From}, *s); err != nil {
				return err
			}
			if err := Stage(tx, outbox, Key{"receipt", s.From}, *s); err != nil { // again: nothing happens
				return err
			}
			if tries++; tries < 3 {
				return errDown
			}
			return nil
		}
		m := register(t, e, phases...)
		if _, err := m.Do(ctx, ada, request); err != nil {
			t.Fatal(err)
		}
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if r := record(t, e, Key{"receipt", "ada"}); r.Status != Answered || receipts.Load() != 1 {
			t.Errorf("%d receipts, %+v", receipts.Load(), r)
		}
		err = e.Update(ctx, func(tx *bbolt.Tx) error { return Stage(tx, outbox, Key{"receipt", "ada"}, transfer{From: "eve"}) })
		if !errors.Is(err, ErrMismatch) {
			t.Errorf("staged for another request: %v", err)
		}
		if err := e.Update(ctx, func(tx *bbolt.Tx) error { return Stage(tx, outbox, Key{"receipt", "eve"}, request) }); err != nil {
			t.Fatal(err)
		}
		if err := e.Resume(ctx); err != nil || receipts.Load() != 2 {
			t.Errorf("%d receipts, %v", receipts.Load(), err)
		}
		err = e.View(ctx, func(tx *bbolt.Tx) error { return Stage(tx, outbox, Key{"receipt", "bob"}, request) })
		if err == nil {
			t.Error("staged in a transaction that is none of the engine's")
		}
	})
}

func TestACallFromInsideACommitIsRefusedInsteadOfHanging(t *testing.T) {
	e := open(t, storePath(t), nil)
	var m *Machine[transfer]
	var inside []error
	phases := three(nil)
	phases[0].Commit = func(ctx context.Context, tx *bbolt.Tx, _ *transfer) error {
		_, err := m.Do(ctx, Key{ID: "other"}, request)
		inside = []error{err, e.Update(ctx, func(*bbolt.Tx) error { return nil }), e.View(ctx, func(*bbolt.Tx) error { return nil })}
		return nil
	}
	m = register(t, e, phases...)
	if _, err := m.Do(ctx, ada, request); err != nil {
		t.Fatal(err)
	}
	for _, err := range inside {
		if !errors.Is(err, ErrInCommit) {
			t.Errorf("got %v", err)
		}
	}
}

func TestAFinishedKeyIsReapedAfterItsRetentionAndThenANewRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reaped atomic.Int32
		e := open(t, storePath(t), &Options{Retention: time.Hour, Observer: &Observer{Reaped: func(ev Event) { reaped.Add(int32(ev.Size)) }}})
		var p processor
		m := register(t, e, three(p.pay)...)
		for i := range 500 {
			if _, err := m.Do(ctx, Key{Scope: "ada", ID: fmt.Sprint(i)}, request); err != nil {
				t.Fatal(err)
			}
		}
		slow := three(nil)
		slow[1].Retry = RetryPolicy{Attempts: -1, InRun: -1, Initial: 24 * time.Hour, Max: 24 * time.Hour}
		slow[1].Effect = func(context.Context, string, *transfer) error { return errDown }
		other, err := Register(e, "slow", slow)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := other.Do(ctx, Key{ID: "unfinished"}, request); !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Minute)
		if stats, _ := e.Stats(ctx); stats.Finished != 500 {
			t.Errorf("before its time: %+v", stats)
		}
		time.Sleep(3 * time.Minute)
		if stats, _ := e.Stats(ctx); stats.Finished != 0 || stats.Waiting != 1 || reaped.Load() != 500 {
			t.Errorf("after its time: %+v, %d reaped", stats, reaped.Load())
		}
		if _, err := m.Do(ctx, Key{Scope: "ada", ID: "7"}, request); err != nil {
			t.Fatal(err)
		}
		if n := len(p.tokens()); n != 501 {
			t.Errorf("%d tokens, want a new one for the new request", n)
		}
		checkStore(t, e)
	})
}

func TestKeysOfAMachineThatNobodyRegistersAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, _ := interrupted(t, asIs)
		var log bytes.Buffer
		e := open(t, path, &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		time.Sleep(time.Minute)
		if err := e.Close(); err != nil || !strings.Contains(log.String(), "machine=transfer keys=1") {
			t.Errorf("%v, logged %q", err, log.String())
		}
	})
}

func TestAPhaseCannotEndItsTransactionByItself(t *testing.T) {
	e := open(t, storePath(t), nil)
	phases := three(nil)
	phases[0].OnError = Fail
	phases[0].Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		return errors.Join(note("reserved")(ctx, tx, s), tx.Commit())
	}
	_, err := register(t, e, phases...).Do(ctx, ada, request)
	var final *FinalError
	if !errors.As(err, &final) || notes(t, e, "reserved") != 0 {
		t.Errorf("got %v", err)
	}
	checkStore(t, e)
}

func TestAKeyCannotStageItself(t *testing.T) {
	e := open(t, storePath(t), nil)
	var m *Machine[transfer]
	m = register(t, e, transferPhase{To: Finished, OnError: Fail, Commit: func(_ context.Context, tx *bbolt.Tx, s *transfer) error {
		return Stage(tx, m, ada, *s)
	}})
	if _, err := m.Do(ctx, ada, request); err == nil || !strings.Contains(err.Error(), "would stage itself") {
		t.Errorf("got %v", err)
	}
}

func TestAnErrorOfReconcileIsNeitherIgnoredNorAnAnswer(t *testing.T) {
	for _, policy := range []ErrorPolicy{Fail, Ignore} {
		synctest.Test(t, func(t *testing.T) {
			path, _ := interrupted(t, asIs)
			e := open(t, path, nil)
			asked := 0
			var p processor
			phases := three(p.pay)
			phases[1].OnError = policy
			phases[1].Reconcile = func(context.Context, string, *transfer) (Outcome, error) {
				if asked++; asked < 3 {
					return Unknown, errDown
				}
				return Done, nil
			}
			register(t, e, phases...)
			if err := e.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			if r := record(t, e, ada); asked != 3 || len(p.tokens()) != 0 || r.Refusal != nil || r.History[2].Ignored != "" {
				t.Errorf("asked %d times, %+v", asked, r)
			}
		})
	}
}

func TestAParkedKeyMayBeAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		phases := three(func(context.Context, string, *transfer) error { return errDown })
		phases[1].Retry.Attempts = 1
		m := register(t, e, phases...)
		if err := e.Abandon(ctx, ada, "why not"); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrParked) || !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		if err := e.Abandon(ctx, ada, "refunded by hand"); err != nil {
			t.Fatal(err)
		}
		_, err := m.Do(ctx, ada, request)
		var final *FinalError
		if !errors.As(err, &final) || final.Reason != "abandoned: refunded by hand" || final.Before != "payout_sent" {
			t.Errorf("got %v", err)
		}
		for _, act := range []error{e.Abandon(ctx, ada, "again"), e.Retry(ctx, ada)} {
			if act == nil {
				t.Error("a finished key was touched")
			}
		}
	})
}

func TestKeysAreListedPageByPage(t *testing.T) {
	e := open(t, storePath(t), nil)
	phases := three(func(_ context.Context, _ string, s *transfer) error {
		if s.From == "eve" {
			return errDown
		}
		return nil
	})
	phases[1].Retry.Attempts = 1
	m := register(t, e, phases...)
	var wg sync.WaitGroup
	for i := range 700 {
		wg.Go(func() {
			from := []string{"ada", "eve"}[i%2]
			_, _ = m.Do(ctx, Key{from, fmt.Sprint(i)}, transfer{From: from})
		})
	}
	wg.Wait()
	for _, test := range []struct {
		f    Filter
		want int
	}{
		{Filter{}, 700}, {Filter{Status: Parked}, 350}, {Filter{Status: Answered}, 350}, {Filter{Point: "funds_reserved"}, 350},
		{Filter{Point: Finished}, 350}, {Filter{Machine: "transfer"}, 700}, {Filter{Machine: "other"}, 0},
		{Filter{Status: Parked, Point: Finished}, 0}, {Filter{Status: Waiting}, 0},
	} {
		seen := map[Key]bool{}
		for r, err := range e.Keys(ctx, test.f) {
			if err != nil {
				t.Fatal(err)
			}
			seen[r.Key] = true
		}
		if len(seen) != test.want {
			t.Errorf("%+v: %d keys, want %d", test.f, len(seen), test.want)
		}
	}
	for range e.Keys(ctx, Filter{}) {
		break
	}
}

func TestWhatHappensIsObserved(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	tell := func(what string) func(Event) {
		return func(ev Event) {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, strings.TrimSpace(fmt.Sprint(what, " ", ev.Point)))
			if what == "committed" && ev.Took <= 0 || what == "grouped" && ev.Size != 1 {
				t.Errorf("%s: %+v", what, ev)
			}
		}
	}
	e := open(t, storePath(t), &Options{Observer: &Observer{
		Claimed: tell("claimed"), Committed: tell("committed"), Finished: tell("finished"), Replayed: tell("replayed"), Grouped: tell("grouped"),
	}})
	var p processor
	m := register(t, e, three(p.pay)...)
	for range 2 {
		if _, err := m.Do(ctx, ada, request); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"grouped", "claimed started", "committed funds_reserved", "grouped", "committed payout_sent", "committed finished", "finished finished", "replayed finished"}
	if !slices.Equal(seen, want) {
		t.Errorf("got  %q\nwant %q", seen, want)
	}
}

func TestAFieldAddedInAReleaseMakesNoStrangerOfAnHonestRetry(t *testing.T) {
	e := open(t, storePath(t), nil)
	type before struct {
		To, From string
		Limits   map[string]int
	}
	type after struct {
		Comment  string    `json:"comment,omitempty"`
		Due      time.Time `msgpack:"due"`
		Urgent   bool
		Weight   float64
		Parent   *before
		List     []string
		Limits   map[string]int
		From, To string
	}
	old, err := Register(e, "old", []Phase[*bbolt.Tx, before]{{To: Finished}})
	if err != nil {
		t.Fatal(err)
	}
	new, err := Register(e, "new", []Phase[*bbolt.Tx, after]{{To: Finished}})
	if err != nil {
		t.Fatal(err)
	}
	prints := map[[16]byte]bool{}
	for range 20 { // maps are encoded in any order
		limits := map[string]int{"day": 1, "week": 2, "month": 3, "year": 4}
		b1, _, err1 := old.encode(before{From: "ada", To: "bob", Limits: limits})
		b2, _, err2 := new.encode(after{From: "ada", To: "bob", Limits: limits})
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		for _, b := range [][]byte{b1, b2} {
			print, err := fingerprint("transfer", b)
			if err != nil {
				t.Fatal(err)
			}
			prints[print] = true
		}
	}
	if len(prints) != 1 {
		t.Errorf("%d fingerprints of one request", len(prints))
	}
	_, one, _ := new.encode(after{List: []string{"a"}})
	_, two, _ := new.encode(after{List: []string{"a", ""}})
	if one == two {
		t.Error("two requests with one fingerprint")
	}
}

func TestFindGivesWhatIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		proceed := make(chan error)
		phases := three(func(context.Context, string, *transfer) error { return <-proceed })
		phases[1].Retry = RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour}
		m := register(t, e, phases...)
		first, err := m.Start(ctx, ada, request)
		if err != nil || first.Joined() || first.Replayed() {
			t.Fatalf("the first: %v", err)
		}

		second, err := m.Find(ctx, ada, request)
		third, err3 := m.Start(ctx, ada, request)
		if err != nil || err3 != nil || !second.Joined() || second.Replayed() || !third.Joined() {
			t.Fatalf("under way: %v, %v", err, err3)
		}
		proceed <- errDown
		for _, run := range []*Run[transfer]{first, second, third} {
			if _, err := run.Wait(ctx); !errors.Is(err, errDown) {
				t.Errorf("under way: %v", err)
			}
		}

		asked := time.Now()
		fourth, err := m.Find(ctx, ada, request)
		if err != nil || fourth.Joined() || fourth.Replayed() {
			t.Fatalf("waiting: %v", err)
		}
		proceed <- nil
		answer, err := fourth.Wait(ctx)
		if err != nil || answer.Cents != request.Cents || time.Since(asked) > time.Minute || notes(t, e, "settled") != 1 {
			t.Errorf("waiting: %+v, %v", answer, err)
		}

		before := record(t, e, ada)
		fifth, err := m.Find(ctx, ada, request)
		if err != nil || fifth.Joined() || !fifth.Replayed() {
			t.Fatalf("finished: %v", err)
		}
		if again, err := fifth.Wait(ctx); err != nil || !reflect.DeepEqual(again, answer) || !reflect.DeepEqual(record(t, e, ada), before) {
			t.Errorf("finished: %+v, %v", again, err)
		}
	})
}

func TestFindCarriesOnWhatAProcessLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, token := interrupted(t, asIs)
		e := open(t, path, nil)
		var p processor
		run, err := register(t, e, three(p.pay)...).Find(ctx, ada, request)
		if err != nil {
			t.Fatal(err)
		}
		if answer, err := run.Wait(ctx); err != nil || answer.Payout == "" || !slices.Equal(p.tokens(), []string{token}) {
			t.Errorf("%+v, %v, sent under %v and before the crash under %s", answer, err, p.tokens(), token)
		}
	})
}

func TestFindBeginsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var events atomic.Int32
		count := func(Event) { events.Add(1) }
		e := open(t, storePath(t), &Options{Observer: &Observer{Claimed: count, Grouped: count, Replayed: count}})
		m := register(t, e, transferPhase{To: Finished, Effect: func(context.Context, string, *transfer) error { t.Error("it has begun"); return nil }})
		if _, err := m.Find(ctx, ada, request); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if _, err := m.Find(ctx, Key{}, request); !errors.Is(err, ErrInvalidKey) {
			t.Errorf("an empty key: %v", err)
		}
		ended, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := m.Find(ended, ada, request); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that has gone: %v", err)
		}
		if s, err := e.Stats(ctx); err != nil || s.Counts != (Counts{}) || events.Load() != 0 {
			t.Errorf("%+v, %v, %d events", s, err, events.Load())
		}
	})
}

func TestFindRefusesWhatBelongsToAnotherRequestOrIsParked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		m := register(t, e, transferPhase{To: Finished, Retry: RetryPolicy{Attempts: 2, Initial: time.Second}, Effect: func(context.Context, string, *transfer) error {
			time.Sleep(time.Second)
			return errDown
		}})
		other, err := Register(e, "refund", three(nil))
		if err != nil {
			t.Fatal(err)
		}
		run, err := m.Start(ctx, ada, request)
		if err != nil {
			t.Fatal(err)
		}
		mismatch := func() {
			t.Helper()
			if _, err := m.Find(ctx, ada, transfer{From: "eve"}); !errors.Is(err, ErrMismatch) {
				t.Errorf("another request: %v", err)
			}
			if _, err := other.Find(ctx, ada, request); !errors.Is(err, ErrMismatch) {
				t.Errorf("another machine: %v", err)
			}
		}
		mismatch()
		if _, err := run.Wait(ctx); !errors.Is(err, ErrParked) {
			t.Fatal(err)
		}
		mismatch()
		if _, err := m.Find(ctx, ada, request); !errors.Is(err, ErrParked) {
			t.Errorf("parked: %v", err)
		}
	})
}

// vanish deletes ada's record behind the engine's back.
func vanish(t *testing.T, s *boltStore) {
	t.Helper()
	err := s.Update(ctx, func(tx *bbolt.Tx) error {
		k := s.Keys(tx)
		r, err := k.Get(ada)
		if err != nil {
			return err
		}
		if r, err = r.next(event{kind: claim, epoch: r.Epoch}, event{kind: refuse, at: recorded(time.Now())}); err != nil {
			return err
		}
		return errors.Join(k.Put(&r), k.Delete(r))
	})
	if err != nil {
		t.Error(err)
	}
}

func TestAKeyThatIsGoneBeforeItsClaimIsNotBegunByFindAndIsByDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var armed atomic.Bool
		reached, proceed := make(chan bool), make(chan bool)
		g := &gated{before: func() {
			if armed.CompareAndSwap(true, false) {
				reached <- true
				<-proceed
			}
		}}
		e := openGated(t, g)
		down := true
		var tokens []string
		m := register(t, e, transferPhase{To: Finished, Retry: RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour}, Effect: func(_ context.Context, token string, _ *transfer) error {
			tokens = append(tokens, token)
			if down {
				return errDown
			}
			return nil
		}})
		if _, err := m.Do(ctx, ada, request); !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		down = false
		armed.Store(true)
		var callers sync.WaitGroup
		callers.Go(func() {
			if _, err := m.Find(ctx, ada, request); !errors.Is(err, ErrNotFound) {
				t.Errorf("Find: %v", err)
			}
		})
		<-reached // the key was there when Find looked
		callers.Go(func() {
			if _, err := m.Do(ctx, ada, request); err != nil {
				t.Errorf("Do: %v", err)
			}
		})
		callers.Go(func() {
			run, err := m.Start(ctx, ada, request)
			if err != nil {
				t.Errorf("Start: %v", err)
				return
			}
			if _, err := run.Wait(ctx); err != nil {
				t.Errorf("Start: %v", err)
			}
		})
		callers.Go(func() {
			if _, err := m.Find(ctx, ada, request); !errors.Is(err, ErrNotFound) {
				t.Errorf("Find, joining: %v", err)
			}
		})
		synctest.Wait()
		vanish(t, g.boltStore)
		close(proceed)
		callers.Wait()
		if len(tokens) != 2 || tokens[0] == tokens[1] {
			t.Errorf("tokens: %v", tokens)
		}
	})
}

func TestFindAloneDoesNotMakeAKeyThatIsGoneBeforeItsClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var armed atomic.Bool
		g := new(gated)
		g.before = func() {
			if armed.CompareAndSwap(true, false) {
				vanish(t, g.boltStore)
			}
		}
		e := openGated(t, g)
		m := register(t, e, transferPhase{To: Finished, Retry: RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour}, Effect: func(context.Context, string, *transfer) error { return errDown }})
		if _, err := m.Do(ctx, ada, request); !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		armed.Store(true)
		if _, err := m.Find(ctx, ada, request); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if s, err := e.Stats(ctx); err != nil || s.Counts != (Counts{}) || s.Queued != 0 {
			t.Errorf("%+v, %v", s, err)
		}
	})
}

func TestAPhaseKnowsItsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		var mu sync.Mutex
		seen := map[string][]Key{}
		see := func(ctx context.Context, where string) {
			mu.Lock()
			defer mu.Unlock()
			if key := KeyOf(ctx); !slices.Contains(seen[where], key) {
				seen[where] = append(seen[where], key)
			}
		}
		lost := map[string]bool{}
		m := register(t, e,
			transferPhase{To: "noted", Commit: func(ctx context.Context, _ *bbolt.Tx, _ *transfer) error { see(ctx, "first commit"); return nil }},
			transferPhase{To: Finished, Timeout: -1,
				Effect: func(ctx context.Context, token string, _ *transfer) error {
					see(ctx, "effect")
					mu.Lock()
					defer mu.Unlock()
					if !lost[token] {
						lost[token] = true
						return errDown
					}
					return nil
				},
				Reconcile: func(ctx context.Context, _ string, _ *transfer) (Outcome, error) {
					see(ctx, "Reconcile")
					return NotDone, nil
				},
				Commit: func(ctx context.Context, _ *bbolt.Tx, _ *transfer) error { see(ctx, "commit"); return nil },
			})
		keys := []Key{ada, {ID: "no scope"}}
		for _, key := range keys {
			if _, err := m.Do(ctx, key, request); err != nil {
				t.Fatal(err)
			}
		}
		for _, where := range []string{"first commit", "effect", "Reconcile", "commit"} {
			if !slices.Equal(seen[where], keys) {
				t.Errorf("%s: %v", where, seen[where])
			}
		}
		if key := KeyOf(ctx); key != (Key{}) {
			t.Errorf("elsewhere: %v", key)
		}
	})
}

// What a client sent, and what the server made of it.
type (
	byValue struct {
		Body   string
		Minted string
	}
	byPointer byValue
)

func (b byValue) Fingerprint() []byte    { return []byte(b.Body) }
func (b *byPointer) Fingerprint() []byte { return []byte(b.Body) }

func TestAFingerprinterSaysItselfWhatTellsItsRequestFromAnother(t *testing.T) {
	e := open(t, storePath(t), nil)
	compareBySent(t, e, "by value", func(body, minted string) byValue { return byValue{body, minted} })
	compareBySent(t, e, "by pointer", func(body, minted string) byPointer { return byPointer{body, minted} })
	compareBySent(t, e, "a pointer", func(body, minted string) *byPointer { return &byPointer{body, minted} })
}

func compareBySent[S any](t *testing.T, e *Engine[*bbolt.Tx], name string, sent func(body, minted string) S) {
	t.Run(name, func(t *testing.T) {
		m, err := Register(e, name, []Phase[*bbolt.Tx, S]{{To: Finished}})
		if err != nil {
			t.Fatal(err)
		}
		key := Key{name, "1"}
		first, err := m.Do(ctx, key, sent("pay bob", "7"))
		if err != nil {
			t.Fatal(err)
		}
		if again, err := m.Do(ctx, key, sent("pay bob", "8")); err != nil || !reflect.DeepEqual(again, first) {
			t.Errorf("the same request: %+v, %v", again, err)
		}
		if run, err := m.Find(ctx, key, sent("pay bob", "")); err != nil || !run.Replayed() {
			t.Errorf("the same request is found: %v", err)
		}
		if _, err := m.Do(ctx, key, sent("pay eve", "7")); !errors.Is(err, ErrMismatch) {
			t.Errorf("another request: %v", err)
		}
		if _, err := m.Find(ctx, key, sent("pay eve", "7")); !errors.Is(err, ErrMismatch) {
			t.Errorf("another request is found: %v", err)
		}
		key.ID = "nothing of its own"
		if _, err := m.Do(ctx, key, sent("", "7")); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Do(ctx, key, sent("", "7")); err != nil {
			t.Errorf("the same state: %v", err)
		}
		if _, err := m.Do(ctx, key, sent("", "8")); !errors.Is(err, ErrMismatch) {
			t.Errorf("another state: %v", err)
		}
		key.ID = "staged"
		stage := func(s S) error {
			return e.Update(ctx, func(tx *bbolt.Tx) error { return Stage(tx, m, key, s) })
		}
		if err := errors.Join(stage(sent("pay bob", "7")), stage(sent("pay bob", "8"))); err != nil {
			t.Errorf("staged again: %v", err)
		}
		if err := stage(sent("pay eve", "7")); !errors.Is(err, ErrMismatch) {
			t.Errorf("another staged: %v", err)
		}
		if answer, err := m.Do(ctx, key, sent("pay bob", "9")); err != nil || !reflect.DeepEqual(answer, first) {
			t.Errorf("what was staged: %+v, %v", answer, err)
		}
	})
}

// A release that changed a fingerprint would make a stranger of every honest retry.
func TestFingerprintsStayAsTheyAre(t *testing.T) {
	e := open(t, storePath(t), nil)
	own, err := Register(e, "payment", []Phase[*bbolt.Tx, byValue]{{To: Finished}})
	if err != nil {
		t.Fatal(err)
	}
	whole, err := Register(e, "transfer", []transferPhase{{To: Finished}})
	if err != nil {
		t.Fatal(err)
	}
	_, a, err := own.encode(byValue{Body: "pay bob"})
	_, b, err2 := own.encode(byValue{Minted: "7"})
	_, c, err3 := whole.encode(request)
	if err := errors.Join(err, err2, err3); err != nil {
		t.Fatal(err)
	}
	for what, test := range map[string]struct {
		got  [16]byte
		want string
	}{
		"its own":            {a, "b2c5cb4f6c3fb90192d21d0f0411ed86"},
		"nothing of its own": {b, "949747879c454d2c7c26c79cbc7645ed"},
		"of the whole state": {c, "bd71f2f9f78c0dfb26034fe2fe22839f"},
	} {
		if got := fmt.Sprintf("%x", test.got); got != test.want {
			t.Errorf("%s: %s, was %s", what, got, test.want)
		}
	}
}

func TestOnlyAMarkedErrorIsFinal(t *testing.T) {
	mark := Final(errDown)
	for name, test := range map[string]struct {
		err  error
		want bool
	}{
		"none":                         {nil, false},
		"unmarked":                     {errDown, false},
		"marked":                       {mark, true},
		"marked within":                {fmt.Errorf("processor: %w", mark), true},
		"one of two":                   {errors.Join(errDown, mark), true},
		"marked to be withdrawn":       {Withdraw(errDown), false},
		"another key's answer":         {&FinalError{Key: ada, Reason: "declined"}, false},
		"what another key stopped at":  {&PhaseError{Key: ada, Err: mark}, false},
		"another key's withdrawal":     {fmt.Errorf("inner: %w", &withdrawal{key: ada, err: mark}), false},
		"beside another key's trouble": {errors.Join(&PhaseError{Key: ada, Err: errDown}, mark), true},
	} {
		if got := IsFinal(test.err); got != test.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	if Final(nil) != nil {
		t.Error("Final(nil) is not nil")
	}
}

// TestTheRootImportsNothingOfItsSubPackages keeps the arrows pointing at the root.
func TestTheRootImportsNothingOfItsSubPackages(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	allowed := []string{
		"example.com/keystate", "example.com/keystate/internal/", "go.etcd.io/bbolt", "github.com/vmihailenco/", "github.com/google/uuid",
		"github.com/cenkalti/backoff/v5", "golang.org/x/sys/",
	}
	for _, path := range strings.Fields(string(out)) {
		if !slices.ContainsFunc(allowed, func(a string) bool {
			return path == a || a != "example.com/keystate" && strings.HasPrefix(path, a)
		}) {
			t.Errorf("the root depends on %s", path)
		}
	}
}

// brokenDisk lets a database's writes fail as a disk would fail them. bbolt writes through a function of its own, for its tests.
func brokenDisk(e *Engine[*bbolt.Tx], writeAt func(write func([]byte, int64) (int, error), b []byte, off int64) (int, error)) {
	db := e.store.(*boltStore).db
	field := reflect.ValueOf(db).Elem().FieldByName("ops").FieldByName("writeAt")
	p := (*func([]byte, int64) (int, error))(unsafe.Pointer(field.UnsafeAddr()))
	original := *p
	*p = func(b []byte, off int64) (int, error) { return writeAt(original, b, off) }
}

func TestAFullDiskLosesNothingAndWorksAgainWhenThereIsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), nil)
		full, room := false, false
		brokenDisk(e, func(write func([]byte, int64) (int, error), b []byte, off int64) (int, error) {
			if full {
				return 0, &fs.PathError{Op: "write", Path: "keys.db", Err: fullDisk}
			}
			return write(b, off)
		})
		var p processor
		m := register(t, e, three(func(ctx context.Context, token string, s *transfer) error {
			full = !room
			return p.pay(ctx, token, s)
		})...)
		if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrStorageFull) {
			t.Fatalf("got %v", err)
		}
		if _, err := m.Do(ctx, Key{ID: "new"}, request); !errors.Is(err, ErrStorageFull) {
			t.Errorf("got %v", err)
		}
		if r := record(t, e, ada); r.Point != "funds_reserved" {
			t.Errorf("%+v", r)
		}
		full, room = false, true
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		answer, err := m.Do(ctx, ada, request)
		if err != nil || len(p.tokens()) != 1 || answer.Payout != "po_"+p.tokens()[0][:8] || notes(t, e, "reserved") != 1 {
			t.Errorf("%+v, %v", answer, err)
		}
		checkStore(t, e)
	})
}

// A key can be claimed, there is room for that, but what its phase did cannot be written: as often as you like, that parks nothing.
func TestAnAttemptThatTheStoreBreaksOffGoesOnAndIsCountedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := true
		e := openGated(t, &gated{around: func(k Keys) Keys {
			return &faultyKeys{Keys: k, put: func(r *Record) error {
				if full && r.Point == Finished {
					return ErrStorageFull
				}
				return k.Put(r)
			}}
		}})
		var p processor
		phases := three(p.pay)
		phases[1].Retry.Attempts = 2
		m := register(t, e, phases...)
		for range 5 {
			if _, err := m.Do(ctx, ada, request); !errors.Is(err, ErrStorageFull) {
				t.Fatalf("got %v", err)
			}
		}
		if r := record(t, e, ada); r.Status != Running || r.Attempts != 1 {
			t.Errorf("%+v", r)
		}
		full = false
		if _, err := m.Do(ctx, ada, request); err != nil || len(p.tokens()) != 1 {
			t.Errorf("%v, %d tokens", err, len(p.tokens()))
		}
		for _, passage := range record(t, e, ada).History[1:] {
			if passage.Attempts != 1 {
				t.Errorf("%+v", passage)
			}
		}
	})
}

func TestAFailedSyncLeavesTheOutcomeUnknownAndStopsTheEngine(t *testing.T) {
	for _, page := range []string{"data", "meta"} {
		t.Run(page, func(t *testing.T) {
			path := storePath(t)
			e := open(t, path, nil)
			m := register(t, e, three(nil)...)
			if _, err := m.Do(ctx, ada, request); err != nil {
				t.Fatal(err)
			}
			store := e.store.(*boltStore)
			brokenDisk(e, func(write func([]byte, int64) (int, error), b []byte, off int64) (int, error) {
				if isMeta := off < 2*int64(os.Getpagesize()); isMeta == (page == "meta") {
					unsyncable(t, store.file)
				}
				return len(b), nil
			})
			if _, err := m.Do(ctx, Key{ID: "2"}, request); !errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("got %v", err)
			}
			for _, key := range []Key{ada, {ID: "3"}} {
				if _, err := m.Do(ctx, key, request); !errors.Is(err, ErrOutcomeUnknown) {
					t.Errorf("%s: got %v", key, err)
				}
			}
		})
	}
}

func TestASoftLimitRefusesNewKeysAndLetsOldOnesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := open(t, storePath(t), &Options{MaxBytes: 60 << 10})
		down := true
		phases := three(func(context.Context, string, *transfer) error {
			if down {
				return errDown
			}
			return nil
		})
		phases[1].Retry = RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour}
		m := register(t, e, phases...)
		var err error
		n := 0
		for ; n < 1000; n++ {
			if _, err = m.Do(ctx, Key{ID: fmt.Sprint(n)}, request); !errors.Is(err, errDown) {
				break
			}
			time.Sleep(2 * time.Second)
		}
		if !errors.Is(err, ErrStorageFull) || n < 10 {
			t.Fatalf("after %d keys: %v", n, err)
		}
		down = false
		if err := e.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if stats, _ := e.Stats(ctx); stats.Finished != uint64(n) {
			t.Errorf("%+v of %d", stats, n)
		}
	})
}

func TestAStoreIsOpenOnce(t *testing.T) {
	path := storePath(t)
	open(t, path, nil)
	start := time.Now()
	if _, err := Open(path, &Options{LockTimeout: time.Millisecond}); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v after %v", err, time.Since(start))
	}
	if err := Verify(path); !errors.Is(err, ErrLocked) {
		t.Errorf("verify: %v", err)
	}
	db, err := bbolt.Open(storePath(t), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for range 2 {
		e, err := New(Bolt(db), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(Bolt(db), nil); !errors.Is(err, ErrLocked) {
			t.Errorf("two engines on one database: %v", err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatIsNoStoreIsRefusedAndLeftAsItIs(t *testing.T) {
	dir := t.TempDir()
	foreign := filepath.Join(dir, "foreign.db")
	db, err := bbolt.Open(foreign, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	for name, content := range map[string][]byte{
		"empty.db": {}, "text.db": []byte("dear diary"), "zeros.db": make([]byte, 1<<16), "long.db": bytes.Repeat([]byte("money "), 1<<14),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "dir.db"), 0o700); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		before, _ := os.ReadFile(path)
		for what, err := range map[string]error{"open": openAndClose(path), "verify": Verify(path)} {
			if !errors.Is(err, ErrNotAStore) {
				t.Errorf("%s %s: got %v", what, entry.Name(), err)
			}
		}
		if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
			t.Errorf("%s was touched", entry.Name())
		}
	}
	if err := openAndClose(filepath.Join(dir, "nowhere", "keys.db")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that does not exist: %v", err)
	}
	if err := Verify(filepath.Join(dir, "nothing.db")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("verify nothing: %v", err)
	}
}

func openAndClose(path string) error {
	e, err := Open(path, &Options{Logger: quiet})
	if err != nil {
		return err
	}
	return e.Close()
}

// downForEve are phases whose effect fails for eve, who then waits for an hour.
func downForEve() []transferPhase {
	phases := three(func(_ context.Context, _ string, s *transfer) error {
		if s.From == "eve" {
			return errDown
		}
		return nil
	})
	phases[1].Retry = RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour}
	return phases
}

// filled makes a store with a hundred finished keys and one interrupted one.
func filled(t testing.TB) string {
	t.Helper()
	path := storePath(t)
	e := open(t, path, nil)
	m := register(t, e, downForEve()...)
	for i := range 100 {
		if _, err := m.Do(ctx, Key{"ada", fmt.Sprint(i)}, request); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Do(ctx, Key{"eve", "1"}, transfer{From: "eve"}); !errors.Is(err, errDown) {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// intact checks that a store which was opened without complaint has all that filled has put into it.
func intact(t *testing.T, what string, e *Engine[*bbolt.Tx]) {
	t.Helper()
	for i := range 100 {
		r, err := e.Key(ctx, Key{"ada", fmt.Sprint(i)})
		if err != nil || r.Status != Answered {
			t.Errorf("%s: ada/%d: %v, %s", what, i, err, r.Status)
			return
		}
	}
	if r, err := e.Key(ctx, Key{"eve", "1"}); err != nil || r.Status != Waiting {
		t.Errorf("%s: eve: %v, %s", what, err, r.Status)
	}
}

func TestWhatACrashLeavesOfACreationIsSweptUp(t *testing.T) {
	path := storePath(t)
	old, young, other := filepath.Join(filepath.Dir(path), ".keys.db.creating-1"), filepath.Join(filepath.Dir(path), ".keys.db.creating-2"), filepath.Join(filepath.Dir(path), ".keys.creating-3")
	for _, draft := range []string{old, young, other} {
		if err := os.WriteFile(draft, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, draft := range []string{old, other} {
		if err := os.Chtimes(draft, time.Time{}, time.Now().Add(-2*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	open(t, path, nil)
	for draft, kept := range map[string]bool{old: false, young: true, other: true} {
		if _, err := os.Stat(draft); kept != (err == nil) {
			t.Errorf("%s: kept %v", draft, err == nil)
		}
	}
}

func TestTheWorkingDirectoryMayChange(t *testing.T) {
	t.Chdir(t.TempDir())
	e := open(t, "keys.db", nil)
	m := register(t, e, three(nil)...)
	t.Chdir(t.TempDir())
	if _, err := m.Do(ctx, ada, request); err != nil {
		t.Error(err)
	}
}

func TestNothingIsReadAfterClose(t *testing.T) {
	e := open(t, storePath(t), nil)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	_, err1 := e.Key(ctx, ada)
	_, err2 := e.Stats(ctx)
	err3 := e.View(ctx, func(*bbolt.Tx) error { return nil })
	err4 := e.Update(ctx, func(*bbolt.Tx) error { return nil })
	for i, err := range []error{err1, err2, err3, err4} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%d: got %v", i+1, err)
		}
	}
}

func TestCloseDoesNotWaitForALockThatBoltLeftBehindWhenItPanicked(t *testing.T) {
	path := storePath(t)
	e := open(t, path, nil)
	store := e.store.(*boltStore)
	store.fail(ErrCorrupt)
	held, err := store.db.Begin(true)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	open(t, path, nil)                      // the file is free
	if err := held.Rollback(); err != nil { // or the test would leave a goroutine behind
		t.Error(err)
	}
}

func TestAReadThatCloseOvertakesSaysThatTheEngineIsClosed(t *testing.T) {
	e := open(t, storePath(t), nil)
	if err := e.store.(*boltStore).db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Key(ctx, ada); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestWhatAFailedCommitMeansIsReadFromItsError(t *testing.T) {
	pathError := func(op string) error { return &fs.PathError{Op: op, Path: "keys.db", Err: fullDisk} }
	for name, test := range map[string]struct{ err, want error }{
		"a write without room":          {pathError("write"), ErrStorageFull},
		"a sync without room":           {pathError("sync"), ErrOutcomeUnknown},
		"a bare error number of a sync": {fullDisk, ErrOutcomeUnknown},
		"a truncate without room":       {fmt.Errorf("file resize error: %s", pathError("truncate")), ErrStorageFull},
		"a truncate that fails":         {errors.New("file resize error: input/output error"), ErrOutcomeUnknown},
		"a sync after a truncate":       {fmt.Errorf("file sync error: %s", fullDisk), ErrOutcomeUnknown},
		"bbolt's limit":                 {berrors.ErrMaxSizeReached, ErrStorageFull},
		"a write that fails":            {&fs.PathError{Op: "write", Path: "keys.db", Err: errors.New("input/output error")}, ErrOutcomeUnknown},
		"a closed database":             {berrors.ErrDatabaseNotOpen, ErrClosed},
	} {
		if got := commitError(test.err); !errors.Is(got, test.want) || !errors.Is(got, test.err) {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

func TestAFullDatabaseOfTheProgramsLosesNothing(t *testing.T) {
	db, err := bbolt.Open(storePath(t), 0o600, &bbolt.Options{MaxSize: 256 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	e, err := New(Bolt(db), &Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	m := register(t, e, transferPhase{To: Finished, Commit: note("settled")})
	done := 0
	for ; done < 10_000; done++ {
		if _, err = m.Do(ctx, Key{"ada", fmt.Sprint(done)}, transfer{From: "ada", Payout: strings.Repeat("x", 300)}); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrStorageFull) || done == 0 {
		t.Fatalf("after %d: %v", done, err)
	}
	stats, err := e.Stats(ctx)
	if err != nil || stats.Finished != uint64(done) || notes(t, e, "settled") != done {
		t.Errorf("%+v, %v, want %d", stats, err, done)
	}
	if err := db.View(func(tx *bbolt.Tx) error { return checkRecords(tx, e.id, true) }); err != nil {
		t.Error(err)
	}
}

func TestCloseNamesAViewThatStaysOpenAndDoesNotWaitForItForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		e := open(t, storePath(t), &Options{CloseTimeout: time.Second, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		inside, proceed, ended := make(chan bool), make(chan bool), make(chan error)
		go func() {
			ended <- e.View(ctx, func(*bbolt.Tx) error {
				close(inside)
				<-proceed
				return nil
			})
		}()
		<-inside
		time.Sleep(time.Minute)
		if err := e.Close(); err == nil || !strings.Contains(err.Error(), "the View at ") || !strings.Contains(err.Error(), "engine_test.go:") {
			t.Errorf("got %v", err)
		}
		if n := strings.Count(log.String(), "stays open"); n != 1 {
			t.Errorf("warned %d times: %s", n, log.String())
		}
		close(proceed)
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestAFileThatIsMovedAwayStopsTheEngine(t *testing.T) {
	path := storePath(t)
	e := open(t, path, nil)
	m := register(t, e, three(nil)...)
	if _, err := m.Do(ctx, ada, request); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Do(ctx, Key{ID: "2"}, request); !errors.Is(err, ErrMoved) {
		t.Errorf("got %v", err)
	}
}

func TestABackupIsAStoreAndSoIsACompactedOne(t *testing.T) {
	path := filled(t)
	backup := filepath.Join(t.TempDir(), "backup.db")
	f, err := os.Create(backup)
	if err != nil {
		t.Fatal(err)
	}
	e := open(t, path, nil)
	if n, err := Backup(ctx, e, f); err != nil || n == 0 {
		t.Fatal(n, err)
	}
	if err := errors.Join(f.Close(), e.Close()); err != nil {
		t.Fatal(err)
	}
	compacted := filepath.Join(t.TempDir(), "compacted.db")
	if err := Compact(path, compacted); err != nil {
		t.Fatal(err)
	}
	if err := Compact(path, compacted); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file was replaced: %v", err)
	}
	for _, p := range []string{path, backup, compacted} {
		if err := Verify(p); err != nil {
			t.Errorf("%s: %v", p, err)
		}
		intact(t, p, open(t, p, nil))
	}
	was, _ := os.Stat(path)
	is, _ := os.Stat(compacted)
	if is.Size() > was.Size() {
		t.Errorf("compacted from %d to %d bytes", was.Size(), is.Size())
	}
}

// The fixture was written by the release whose format it bears, and stays as it is for ever.
const fixture = "testdata/format-1.db"

func TestEveryFormatEverWrittenIsRead(t *testing.T) {
	if *update {
		if _, err := os.Stat(fixture); errors.Is(err, fs.ErrNotExist) {
			if err := Compact(filled(t), fixture); err != nil {
				t.Fatal(err)
			}
		}
	}
	b, err := os.ReadFile(fixture)
	if err != nil {
		t.Fatal(err)
	}
	path := storePath(t)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Verify(path); err != nil {
		t.Fatal(err)
	}
	e := open(t, path, nil)
	intact(t, fixture, e)
	m := register(t, e, three(nil)...)
	if answer, err := m.Do(ctx, Key{"ada", "7"}, request); err != nil || answer.Cents != 500 {
		t.Errorf("replay: %+v, %v", answer, err)
	}
	if _, err := m.Do(ctx, Key{"eve", "1"}, transfer{From: "eve"}); err != nil {
		t.Errorf("resume: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	sound, err := os.ReadFile(fixture)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(0), []byte{}, uint32(len(sound)))
	f.Add(uint32(80), []byte{1}, uint32(len(sound)))
	f.Add(uint32(4096*3), bytes.Repeat([]byte{0}, 16), uint32(len(sound)))
	f.Add(uint32(0), []byte{}, uint32(len(sound)/2))
	f.Fuzz(func(t *testing.T, at uint32, patch []byte, size uint32) {
		damaged := bytes.Clone(sound)
		copy(damaged[int(at)%len(damaged):], patch)
		damaged = damaged[:min(int(size), len(damaged))]
		path := storePath(t)
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		err := openAndClose(path)
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotAStore) {
			t.Fatal(err)
		}
	})
}
