package keystate

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// finished is a machine with so many finished keys, "0", "1", and so on.
func finished(t *testing.T, e *Engine[*bbolt.Tx], keys int) *Machine[transfer] {
	t.Helper()
	m := register(t, e, three(nil)...)
	for i := range keys {
		if _, err := m.Do(ctx, numbered(i), request); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func numbered(i int) Key { return Key{ID: fmt.Sprint(i)} }

func replay(t *testing.T, m *Machine[transfer], key Key) {
	t.Helper()
	if run, err := m.Find(ctx, key, request); err != nil || !run.Replayed() {
		t.Fatalf("%s: %v", key, err)
	}
}

// openTransactions counts those that read, until there are so many or it is clear that there will not be: the engine looks for what is to be reaped now and then.
func openTransactions(e *Engine[*bbolt.Tx], want int) (n int) {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); runtime.Gosched() {
		stats := e.store.(*boltStore).db.Stats()
		if n = stats.OpenTxN; n == want {
			break
		}
	}
	return n
}

func TestReplaysShareAWindow(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := finished(t, e, 3)
	store := e.store.(*boltStore)
	replay(t, m, numbered(0))
	before := store.db.Stats()
	for i := range 3 {
		replay(t, m, numbered(i))
	}
	after := store.db.Stats()
	if began := after.TxN - before.TxN; began != 0 || after.OpenTxN != 1 {
		t.Errorf("%d transactions were begun, %d are open", began, after.OpenTxN)
	}
}

func TestALookSeesEveryCommitThatHasEnded(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := finished(t, e, 1)
	for i := range 50 {
		replay(t, m, numbered(i)) // and leave a window behind
		if _, err := m.Do(ctx, numbered(i+1), request); err != nil {
			t.Fatal(err)
		}
	}
	replay(t, m, numbered(50))
}

func TestNoWindowOutlivesTheBeginningOfACommit(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := finished(t, e, 2)
	replay(t, m, numbered(0))
	err := e.Update(ctx, func(*bbolt.Tx) error {
		if n := openTransactions(e, 0); n != 0 {
			t.Errorf("%d windows are open when a commit begins", n)
		}
		var looking sync.WaitGroup // elsewhere: nothing here may call the engine
		looking.Go(func() {
			if run, err := m.Find(ctx, numbered(1), request); err != nil || !run.Replayed() {
				t.Error(err)
			}
		})
		looking.Wait()
		if n := openTransactions(e, 0); n != 0 {
			t.Errorf("%d windows are kept while a commit is under way: bbolt could not map a larger file", n)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAWindowThatWasOpenWhenACommitBeganIsNotKept(t *testing.T) {
	e := open(t, storePath(t), nil)
	finished(t, e, 1)
	store := e.store.(*boltStore)
	w, err := store.window()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Update(ctx, func(*bbolt.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if store.windows.give(w) {
		t.Fatal("it shows what was before the commit")
	}
	if err := w.tx.Rollback(); err != nil {
		t.Error(err)
	}
}

func TestNoWindowIsKeptInADatabaseThatTheProgramWritesToo(t *testing.T) {
	db, err := bbolt.Open(filepath.Join(t.TempDir(), "own.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	e, err := New(Bolt(db), &Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	m := finished(t, e, 1)
	replay(t, m, numbered(0))
	if n := openTransactions(e, 0); n != 0 {
		t.Errorf("%d are open", n)
	}
	if err := errors.Join(e.Close(), db.Close()); err != nil {
		t.Error(err)
	}
}

func TestABurstOfReadersLeavesFewWindowsBehind(t *testing.T) {
	e := open(t, storePath(t), nil)
	finished(t, e, 1)
	store := e.store.(*boltStore)
	var burst []*window
	for range 3 * maxIdle {
		w, err := store.window()
		if err != nil {
			t.Fatal(err)
		}
		burst = append(burst, w)
	}
	for _, w := range burst {
		if !store.windows.give(w) {
			_ = w.tx.Rollback()
		}
	}
	if n := openTransactions(e, maxIdle); n != maxIdle {
		t.Errorf("%d are open", n)
	}
}

func TestAWindowThatBreaksIsNotUsedAgain(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := finished(t, e, 1)
	store := e.store.(*boltStore)
	w, err := store.window()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.tx.Rollback(); err != nil { // bbolt panics over it from now on, as over a damaged page
		t.Fatal(err)
	}
	store.windows.give(w)
	if _, err := m.Find(ctx, numbered(0), request); !errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	replay(t, m, numbered(0))
}

func TestAReplayBelievesNoRecordWhoseChecksumDoesNotMatch(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := finished(t, e, 1)
	store := e.store.(*boltStore)
	err := store.update(func(tx *bbolt.Tx) error {
		done := tx.Bucket(bucketRoot).Bucket(bucketDone)
		name, frame := done.Cursor().First()
		frame = bytes.Clone(frame)
		frame[frameSize+10] ^= 1 // in the state
		return done.Put(name, frame)
	})
	if err != nil {
		t.Fatal(err)
	}
	if answer, err := m.Do(ctx, numbered(0), request); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%+v, %v", answer, err)
	}
}

func TestARunThatIsKeptKeepsItsAnswer(t *testing.T) {
	e := open(t, storePath(t), nil)
	m := register(t, e, three(nil)...)
	asked := func(i int) transfer {
		return transfer{From: "ada", To: "bob", Cents: int64(i) + 1, Tags: map[string]int{"n": i}}
	}
	const keys = 20
	for i := range keys {
		if _, err := m.Do(ctx, numbered(i), asked(i)); err != nil {
			t.Fatal(err)
		}
	}
	var runs []*Run[transfer]
	for i := range keys {
		run, err := m.Start(ctx, numbered(i), asked(i))
		if err != nil || !run.Replayed() {
			t.Fatal(err)
		}
		runs = append(runs, run)
		if run, err = m.Find(ctx, numbered(i), asked(i)); err != nil {
			t.Fatal(err)
		}
		runs = append(runs, run)
	}
	for i, run := range runs {
		for range 2 {
			answer, err := run.Wait(ctx)
			if err != nil || answer.Cents != int64(i/2)+1 || answer.Tags["n"] != i/2 {
				t.Errorf("run %d: %+v, %v", i, answer, err)
			}
			answer.Tags["n"] = -1 // it is the caller's own
		}
	}
}
