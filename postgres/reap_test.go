package postgres_test

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

var reapedKeys = flag.Int("reap.keys", 3000, "finished keys that are reaped")

// finishedKeys puts finished records into the tables.
func finishedKeys(t testing.TB, dsn string, n int) {
	t.Helper()
	s := newTables(t, dsn)
	for from := 0; from < n; from += 500 {
		err := s.Update(t.Context(), func(tx pgx.Tx) error {
			for i := from; i < min(n, from+500); i++ {
				r := claimed(fmt.Sprint(i))
				r.Status, r.Point, r.Ended, r.State = keystate.Answered, keystate.Finished, r.Created, make([]byte, 300)
				r.History = append(r.History, keystate.Passage{Point: keystate.Finished, At: r.Created, Attempts: 1})
				if err := s.Keys(tx).Put(&r); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestEnginesReapSideBySideWithoutWaitingOrFailing(t *testing.T) {
	for _, engines := range []int{1, 3} {
		dsn := pgtest.Database(t)
		finishedKeys(t, dsn, *reapedKeys)
		var reaped, largest atomic.Int64
		done := make(chan struct{})
		began := time.Now()
		var all []*keystate.Engine[pgx.Tx]
		for range engines {
			log := &countingLog{}
			e, err := keystate.New[pgx.Tx](newTables(t, dsn), &keystate.Options{
				Retention: time.Millisecond, Logger: log.logger(),
				Observer: &keystate.Observer{Reaped: func(ev keystate.Event) {
					largest.Store(max(largest.Load(), int64(ev.Size)))
					if reaped.Add(int64(ev.Size)) == int64(*reapedKeys) {
						close(done)
					}
				}},
			})
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, e)
			t.Cleanup(func() {
				if n := log.errors.Load(); n > 0 {
					t.Errorf("%d errors, such as %v", n, log.first.Load())
				}
			})
		}
		select {
		case <-done:
			t.Logf("%d engines: %d keys in %s: %.0f/s", engines, *reapedKeys, time.Since(began), float64(*reapedKeys)/time.Since(began).Seconds())
		case <-time.After(60 * time.Second):
			t.Errorf("%d engines have reaped %d of %d keys", engines, reaped.Load(), *reapedKeys)
		}
		for _, e := range all {
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		}
		if c := contentsOfTables(t, newTables(t, dsn)); len(c.finished) > 0 || reaped.Load() != int64(*reapedKeys) {
			t.Errorf("%d are left, %d were reaped", len(c.finished), reaped.Load())
		}
	}
}

func TestReapingAtFullSpeed(t *testing.T) {
	for _, reapers := range []int{1, 3} {
		dsn := pgtest.Database(t)
		finishedKeys(t, dsn, *reapedKeys)
		var all sync.WaitGroup
		var reaped atomic.Int64
		began := time.Now()
		for range reapers {
			s := newTables(t, dsn)
			all.Go(func() {
				for reaped.Load() < int64(*reapedKeys) {
					n, _, err := s.Reap(t.Context(), 0, 512)
					if reaped.Add(int64(n)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
		t.Logf("%d at a time: %.0f keys/s", reapers, float64(*reapedKeys)/time.Since(began).Seconds())
	}
}

func TestReapingPassesOverWhatAnotherTransactionHolds(t *testing.T) {
	dsn := pgtest.Database(t)
	finishedKeys(t, dsn, 10)
	s := newTables(t, dsn)
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `DELETE FROM keystate.keys WHERE finished = (SELECT min(finished) FROM keystate.keys)`); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if n, next, err := s.Reap(ctx, 0, 100); n != 9 || next != 0 || err != nil {
		t.Errorf("beside another, %d are reaped, the next is due in %s, %v", n, next, err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, next, err := s.Reap(ctx, time.Hour, 100); n != 0 || next != time.Hour || err != nil {
		t.Errorf("then %d are reaped, the next is due in %s, %v", n, next, err)
	}
}

// What an import brings along has the time that it has had.
func TestImportedKeysAreReapedWhenTheirTimeIsOver(t *testing.T) {
	path := fileOf(t, 400)
	s := newTables(t, pgtest.Database(t))
	if err := s.Import(t.Context(), path, nil); err != nil {
		t.Fatal(err)
	}
	before := contentsOfTables(t, s)
	if n, _, err := s.Reap(t.Context(), time.Since(before.finished[0].Ended)+time.Hour, 1000); n != 0 || err != nil {
		t.Errorf("before the time of the first %d are reaped, %v", n, err)
	}
	if n, _, err := s.Reap(t.Context(), time.Hour, 1000); n == 0 || n == len(before.finished) || err != nil {
		t.Errorf("an hour after their end %d of %d are reaped, %v", n, len(before.finished), err)
	}
	for _, r := range contentsOfTables(t, s).finished {
		var ended bool
		for _, b := range before.finished {
			if ended = ended || !b.Ended.Before(time.Now().Add(-time.Hour)); b.Key == r.Key {
				break
			}
		}
		if !ended {
			t.Errorf("%s is kept beyond its time and that of all before it", r.Key)
		}
	}
}

// A countingLog counts errors.
type countingLog struct {
	errors atomic.Int64
	first  atomic.Value
}

func (l *countingLog) logger() *slog.Logger { return slog.New(l) }

func (l *countingLog) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelError
}
func (l *countingLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *countingLog) WithGroup(string) slog.Handler      { return l }
func (l *countingLog) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool { text += " " + a.String(); return true })
	l.errors.Add(1)
	l.first.Store(text)
	return nil
}

var _ keystate.Reaper = (*postgres.Store)(nil)
