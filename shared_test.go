package keystate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
)

// A commonFile lets several engines of a test have one bbolt store, with leases by the bubble's clock: the engine's part in sharing,
// without a server.
type commonFile struct {
	Store[*bbolt.Tx]

	mu     sync.Mutex
	id     [16]byte
	epochs uint64 // given out
	leases map[uint64]time.Time
	frozen time.Time // until when leases are neither renewed nor refused
}

const testLease = 10 * time.Second

// A share is one boot of a commonFile.
type share struct {
	*commonFile
	epoch uint64
	gone  bool // it renews no more, and says no goodbye
	deaf  bool // the next commit's answer is lost
	full  bool // there is no room for what is written
	lag   time.Duration
}

// Update loses the answer of a commit, once, or finds no room, where the test wants that.
func (s *share) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	s.mu.Lock()
	deaf, full := s.deaf, s.full
	s.deaf = false
	s.mu.Unlock()
	if full {
		return ErrStorageFull
	}
	err := s.commonFile.Update(ctx, fn)
	if deaf {
		err = ErrOutcomeUnknown
	}
	return err
}

func (s *share) Boot(ctx context.Context) (id [16]byte, epoch uint64, err error) {
	s.mu.Lock()
	s.epochs++
	s.epoch = s.epochs
	s.mu.Unlock()
	_, err = s.Renew(ctx)
	return s.id, s.epoch, err
}

func (s *share) Renew(context.Context) (time.Duration, error) {
	s.mu.Lock()
	thaw := time.Until(s.frozen)
	s.mu.Unlock()
	if thaw > 0 {
		time.Sleep(thaw + s.lag)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return 0, errors.New("no way to the store")
	}
	s.leases[s.epoch] = time.Now().Add(testLease)
	return testLease, nil
}

func (s *share) Alive(_ *bbolt.Tx, epoch uint64) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.leases[epoch]), nil
}

func (s *share) Adopt(ctx context.Context, machines []string, limit int) (adopted []Record, err error) {
	err = s.commonFile.Update(ctx, func(tx *bbolt.Tx) error {
		adopted = nil
		keys := s.Keys(tx)
		all, err := keys.Unfinished(Key{}, 1000)
		if err != nil {
			return err
		}
		for _, r := range all {
			if alive, _ := s.Alive(tx, r.Epoch); alive || r.Status == Parked || len(adopted) == limit {
				continue
			}
			r.Epoch = s.epoch
			if err := keys.Put(&r); err != nil {
				return err
			}
			adopted = append(adopted, r)
		}
		return nil
	})
	return adopted, err
}

func (s *share) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.gone {
		delete(s.leases, s.epoch)
	}
	return nil
}

func newCommonFile(t *testing.T) *commonFile {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(t.TempDir(), "common.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	f := &commonFile{Store: Bolt(db), leases: map[uint64]time.Time{}}
	if f.id, f.epochs, err = f.Store.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(f.Store.Close(), db.Close()); err != nil {
			t.Error(err)
		}
	})
	return f
}

type parcelled struct{ By string }

// join opens an engine on the common file, with a machine whose effect takes so long.
func (f *commonFile) join(t *testing.T, name string, took time.Duration, o Options) (*share, *Engine[*bbolt.Tx], *Machine[parcelled]) {
	t.Helper()
	s := &share{commonFile: f}
	o.Logger = slog.New(slog.DiscardHandler)
	e, err := New[*bbolt.Tx](s, &o)
	if err != nil {
		t.Fatal(err)
	}
	m, err := Register(e, "parcel", []Phase[*bbolt.Tx, parcelled]{
		{To: Finished, Timeout: -1, Effect: func(ctx context.Context, _ string, p *parcelled) error {
			time.Sleep(took)
			p.By = name
			return nil
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, e, m
}

func TestEnginesThatShareAStoreLeaveEachOtherTheirKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		_, one, ones := f.join(t, "one", time.Minute, Options{}) // many leases long
		_, other, others := f.join(t, "other", 0, Options{})
		_, hasty, hastys := f.join(t, "hasty", 0, Options{RefuseInFlight: true})
		defer func() { one.Close(); other.Close(); hasty.Close() }()
		first, err := ones.Start(t.Context(), key, parcelled{})
		if err != nil {
			t.Fatal(err)
		}
		second, err := others.Start(t.Context(), key, parcelled{})
		if err != nil || !second.Joined() {
			t.Fatalf("the other's run is joined: %v, %v", second.Joined(), err)
		}
		if _, err := hastys.Do(t.Context(), key, parcelled{}); !errors.Is(err, ErrInProgress) {
			t.Errorf("who does not want to wait: %v", err)
		}
		for _, r := range []*Run[parcelled]{first, second} {
			if p, err := r.Wait(t.Context()); err != nil || p.By != "one" {
				t.Errorf("the answer is %+v, %v", p, err)
			}
		}
		if s, err := hasty.Stats(t.Context()); err != nil || s.Queued != 0 {
			t.Errorf("%+v, %v", s, err)
		}
	})
}

func TestWhoFindsAKeyThatAnotherEngineHoldsGetsThatEnginesAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		_, one, ones := f.join(t, "one", time.Minute, Options{})
		_, other, others := f.join(t, "other", 0, Options{})
		defer func() { one.Close(); other.Close() }()
		if _, err := others.Find(t.Context(), key, parcelled{}); !errors.Is(err, ErrNotFound) {
			t.Errorf("before there is one: %v", err)
		}
		if _, err := ones.Start(t.Context(), key, parcelled{}); err != nil {
			t.Fatal(err)
		}
		for _, underWay := range []bool{true, false} {
			run, err := others.Find(t.Context(), key, parcelled{})
			if err != nil || run.Joined() != underWay {
				t.Fatalf("under way %v, joined %v: %v", underWay, run.Joined(), err)
			}
			if p, err := run.Wait(t.Context()); err != nil || p.By != "one" {
				t.Errorf("under way %v: the answer is %+v, %v", underWay, p, err)
			}
		}
		if _, err := others.Find(t.Context(), key, parcelled{By: "somebody else"}); !errors.Is(err, ErrMismatch) {
			t.Errorf("for another request: %v", err)
		}
	})
}

func TestAnEngineTakesOverWhatADeadOneHeldWhenItsLeaseIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		_, heir, _ := f.join(t, "heir", 0, Options{}) // the older one: which boot came first says nothing
		dead, deadEngine, deads := f.join(t, "dead", time.Hour, Options{CloseTimeout: 2 * time.Hour})
		defer func() { heir.Close(); deadEngine.Close() }()
		run, err := deads.Start(t.Context(), key, parcelled{})
		if err != nil {
			t.Fatal(err)
		}
		died := time.Now()
		f.mu.Lock()
		dead.gone = true
		f.mu.Unlock()
		time.Sleep(testLease / 2)
		if r, err := heir.Key(t.Context(), key); err != nil || r.Status == Answered {
			t.Fatalf("before its lease is over the key is %s, %v", r.Status, err)
		}
		time.Sleep(testLease)
		if r, err := heir.Key(t.Context(), key); err != nil || r.Status != Answered {
			t.Errorf("%s after the death the key is %s, %v", time.Since(died), r.Status, err)
		}
		if p, err := run.Wait(t.Context()); err != nil || p.By != "heir" { // an hour later the dead engine wakes up
			t.Errorf("whoever asked the dead engine is told %+v, %v", p, err)
		}
	})
}

// Nothing fails: the store is only silent for longer than a lease. Who hears from it first must not take the others for gone.
func TestAfterASilenceNobodyIsTakenForGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		slow, one, ones := f.join(t, "one", time.Minute, Options{})
		_, other, _ := f.join(t, "other", 0, Options{})
		defer func() { one.Close(); other.Close() }()
		run, err := ones.Start(t.Context(), key, parcelled{})
		if err != nil {
			t.Fatal(err)
		}
		f.mu.Lock()
		f.frozen, slow.lag = time.Now().Add(2*testLease), time.Second
		f.mu.Unlock()
		if p, err := run.Wait(t.Context()); err != nil || p.By != "one" {
			t.Errorf("the answer is %+v, %v", p, err)
		}
	})
}

func TestAGoodbyeLetsOthersTakeOverAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		_, leaver, leavers := f.join(t, "leaver", time.Second, Options{})
		if err := leaver.Update(t.Context(), func(tx *bbolt.Tx) error { return Stage(tx, leavers, key, parcelled{}) }); err != nil {
			t.Fatal(err)
		}
		if r, err := leaver.Key(t.Context(), key); err != nil || r.Epoch != leaver.epoch {
			t.Errorf("what it staged belongs to boot %d, %v", r.Epoch, err)
		}
		if err := leaver.Close(); err != nil {
			t.Fatal(err)
		}
		_, heir, heirs := f.join(t, "heir", 0, Options{})
		defer heir.Close()
		if p, err := heirs.Do(t.Context(), key, parcelled{}); err != nil || p.By == "" {
			t.Errorf("%+v, %v", p, err)
		}
	})
}

func TestAReleaseThatDoesNotKnowAPointLeavesTheKeyToTheEngineThatDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newCommonFile(t)
		later := []Phase[*bbolt.Tx, parcelled]{
			{To: "weighed"},
			{To: Finished, Timeout: -1, Effect: func(context.Context, string, *parcelled) error { time.Sleep(time.Minute); return nil }},
		}
		newer, err := New[*bbolt.Tx](&share{commonFile: f}, nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := Register(newer, "parcel", later)
		if err != nil {
			t.Fatal(err)
		}
		run, err := m.Start(t.Context(), Key{ID: "k"}, parcelled{})
		if err != nil {
			t.Fatal(err)
		}
		older, err := New[*bbolt.Tx](&share{commonFile: f}, &Options{ParkUnknown: true})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { older.Close(); newer.Close() }()
		if _, err := Register(older, "parcel", later[1:]); err != nil {
			t.Errorf("the older release does not start: %v", err)
		}
		if _, err := run.Wait(t.Context()); err != nil {
			t.Errorf("the newer one's key: %v", err)
		}
	})
}

func TestAKeyThatWaitsGoesOnWithTheEngineThatIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		_, older, olders := f.join(t, "older", 0, Options{})
		newer, err := New[*bbolt.Tx](&share{commonFile: f}, &Options{Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { newer.Close(); older.Close() }()
		m, err := Register(newer, "parcel", []Phase[*bbolt.Tx, parcelled]{{
			To: Finished, Retry: RetryPolicy{InRun: -1, Initial: time.Hour, Max: time.Hour},
			Effect: func(context.Context, string, *parcelled) error { return errors.New("the post office is closed") },
		}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Do(t.Context(), key, parcelled{}); err == nil {
			t.Fatal("it went through")
		}
		began := time.Now()
		p, err := olders.Do(t.Context(), key, parcelled{})
		if err != nil || p.By != "older" || time.Since(began) > 0 {
			t.Errorf("after %s: %+v, %v", time.Since(began), p, err)
		}
	})
}

func TestACommitWhoseOutcomeIsUnknownIsLookedForAndItsKeyCarriedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		s, e, m := f.join(t, "one", 0, Options{})
		defer e.Close()
		f.mu.Lock()
		s.deaf = true
		f.mu.Unlock()
		if _, err := m.Do(t.Context(), key, parcelled{}); !errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("the caller is told %v", err)
		}
		time.Sleep(2 * storagePause)
		if r, err := e.Key(t.Context(), key); err != nil || r.Status != Answered {
			t.Errorf("the key is %q, %v", r.Status, err)
		}
	})
}

// A look costs a trip to the server. Where keys are new as a rule, none is looked for; one that is there after all is answered as ever.
func TestAfterManyNewKeysNoneIsLookedForUntilOneIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newCommonFile(t)
		var looks, sent atomic.Int32
		f.Store = &countingViews{Store: f.Store, views: &looks}
		_, e, _ := f.join(t, "one", 0, Options{Retention: -1})
		defer e.Close()
		commits := 0
		m := register(t, e,
			transferPhase{To: "kept", Commit: func(_ context.Context, tx *bbolt.Tx, s *transfer) error {
				commits++
				return nil
			}},
			transferPhase{To: Finished, Effect: func(_ context.Context, token string, s *transfer) error {
				sent.Add(1)
				s.Payout = token
				return nil
			}},
		)
		do := func(n int) (transfer, error) { return m.Do(t.Context(), Key{ID: fmt.Sprint(n)}, request) }
		answers, before := map[int]transfer{}, looks.Load()
		for n := range 2 * manyMisses {
			answer, err := do(n)
			if err != nil {
				t.Fatal(err)
			}
			answers[n] = answer
		}
		if looked := looks.Load() - before; looked != manyMisses {
			t.Errorf("%d looks for %d keys", looked, len(answers))
		}
		other := request
		other.Cents++
		if _, err := m.Do(t.Context(), Key{ID: "3"}, other); !errors.Is(err, ErrMismatch) {
			t.Errorf("got %v", err)
		}
		before = looks.Load()
		for n, answer := range answers {
			if again, err := do(n); err != nil || !reflect.DeepEqual(again, answer) {
				t.Errorf("%d: %+v, %v", n, again, err)
			}
		}
		if looked, began := looks.Load()-before, commits-len(answers); looked != int32(len(answers)) || began != 1 {
			t.Errorf("%d looks for %d known keys, of which %d were begun again", looked, len(answers), began)
		}
		if n := int(sent.Load()); n != len(answers) {
			t.Errorf("%d effects for %d keys", n, len(answers))
		}
	})
}

// A caller's run that takes its key for new and fails before it knows better leaves the key to the engine that has it all the same: others
// wait for it.
func TestAKeyInHandIsCarriedOnAlsoAfterACallerWhoTookItForNewFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, key := newCommonFile(t), Key{ID: "k"}
		s, one, ones := f.join(t, "one", time.Second, Options{})
		_, other, others := f.join(t, "other", 0, Options{})
		defer func() { one.Close(); other.Close() }()
		setFull := func(full bool) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.full = full
		}
		if _, err := ones.Start(t.Context(), key, parcelled{}); err != nil {
			t.Fatal(err)
		}
		one.misses.Store(manyMisses)
		setFull(true)
		for range 2 {
			if _, err := ones.Do(t.Context(), key, parcelled{}); !errors.Is(err, ErrStorageFull) {
				t.Fatalf("got %v", err)
			}
		}
		setFull(false)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if p, err := others.Do(ctx, key, parcelled{}); err != nil || p.By != "one" {
			t.Errorf("the answer is %+v, %v", p, err)
		}
	})
}

type countingViews struct {
	Store[*bbolt.Tx]
	views *atomic.Int32
}

func (c *countingViews) View(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	c.views.Add(1)
	return c.Store.View(ctx, fn)
}
