package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

var quiet = slog.New(slog.DiscardHandler)

// claimed is a new record.
func claimed(id string) keystate.Record {
	at := time.UnixMicro(1).UTC()
	return keystate.Record{
		Key: keystate.Key{Scope: "s", ID: id}, Machine: "m", Status: keystate.Running, Point: keystate.Started, State: []byte{0xc0}, Created: at,
		History: []keystate.Passage{{Point: keystate.Started, At: at}},
	}
}

// increment adds one to a row of the program's.
func increment(tx pgx.Tx, name string) error {
	_, err := tx.Exec(context.Background(), `INSERT INTO program_rows VALUES ($1, '1') ON CONFLICT (name) DO UPDATE SET value = (program_rows.value::int + 1)::text`, name)
	return err
}

func TestAConnectionThatIsLostAnywhereInATransactionIsSettled(t *testing.T) {
	dsn := pgtest.Database(t)
	direct := openStore(t, dsn, &postgres.Options{Logger: quiet})
	defer direct.Close()
	if _, _, err := direct.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"begin", "INSERT INTO program_rows", "INSERT INTO \"keystate\"", "commit"} {
		write := func(k keystate.Keys, r *keystate.Record) error { return k.Put(r) }
		if sql == "commit" {
			write = func(k keystate.Keys, r *keystate.Record) error { return k.(lastPutter).PutLast(r) }
		}
		for _, place := range []pgtest.Place{pgtest.BeforeRequest, pgtest.AfterRequest, pgtest.MidAnswer} {
			t.Run(fmt.Sprintf("%s %s", place, sql), func(t *testing.T) {
				proxy := pgtest.NewProxy(t, dsn)
				s := openStore(t, proxy.DSN(), &postgres.Options{Logger: quiet})
				defer s.Close()
				if _, _, err := s.Boot(t.Context()); err != nil {
					t.Fatal(err)
				}
				cut := proxy.Cut(place, pgtest.Runs(sql))
				r := claimed(t.Name())
				err := s.Update(t.Context(), func(tx pgx.Tx) error {
					put := r
					return errors.Join(increment(tx, t.Name()), write(s.Keys(tx), &put))
				})
				if err != nil {
					t.Error(err)
				}
				if !cut.Happened() {
					t.Error("nothing was cut")
				}
				err = direct.View(t.Context(), func(tx pgx.Tx) error {
					if _, err := direct.Keys(tx).Get(r.Key); err != nil {
						t.Errorf("the record: %v", err)
					}
					if value, _, err := rows.Get(tx, t.Name()); err != nil || value != "1" {
						t.Errorf("the row says %q, %v", value, err)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A commit may still be on its way when its client has given the connection up. The client does not wait for it, and excludes it.
func TestACommitThatArrivesLateTakesNoEffect(t *testing.T) {
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	s := openStore(t, proxy.DSN(), &postgres.Options{Logger: quiet})
	defer s.Close()
	if _, _, err := s.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := claimed("late")
	for version, sql := range []string{`INSERT INTO "keystate"."keys" (`, `INSERT INTO "keystate"."keys" AS k`} { // one that makes the record, and one that changes it
		cut := proxy.Cut(pgtest.InFlight, pgtest.Runs(sql))
		runs := 0
		row := func() string { return fmt.Sprint(version, ", run ", runs) } // of its own, or the late one's locks would be waited for
		var put keystate.Record
		err := s.Update(t.Context(), func(tx pgx.Tx) error {
			runs++
			put = r
			return errors.Join(increment(tx, row()), s.Keys(tx).(lastPutter).PutLast(&put))
		})
		if err != nil || runs != 2 {
			t.Fatalf("after %d runs: %v", runs, err)
		}
		cut.Deliver()
		err = s.View(t.Context(), func(tx pgx.Tx) error {
			for want := range 2 { // the late one, and the one that excluded it
				runs = want + 1
				if value, _, err := rows.Get(tx, row()); err != nil || (value == "1") != (want == 1) {
					t.Errorf("%s: %q, %v", row(), value, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		r = put
	}
}

type lastPutter interface{ PutLast(*keystate.Record) error }

// All keys at work lie on the same few pages of the index. A predicate lock on one of these would set serializable transactions against each
// other that have nothing to do with each other.
func TestTheLastWriteTakesNoPredicateLock(t *testing.T) {
	dsn := pgtest.Database(t)
	s := openStore(t, dsn, &postgres.Options{Isolation: pgx.Serializable})
	defer s.Close()
	if _, _, err := s.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	watch, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close(context.Background())
	overlapping, err := watch.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.Serializable}) // as long as it is open, others' locks outlast them
	if err != nil {
		t.Fatal(err)
	}
	if _, err := overlapping.Exec(t.Context(), `SELECT 1 FROM program_rows`); err != nil {
		t.Fatal(err)
	}
	locks := func() (n int) {
		err := watch.QueryRow(t.Context(), `SELECT count(*) FROM pg_locks WHERE mode = 'SIReadLock' AND pid IS DISTINCT FROM pg_backend_pid()
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	key := claimed("k")
	var after keystate.Record
	for _, what := range []string{"made", "changed"} {
		err := s.Update(t.Context(), func(tx pgx.Tx) error {
			put := key
			err := s.Keys(tx).(lastPutter).PutLast(&put)
			after = put
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		key = after
		if n := locks(); n > 0 {
			t.Errorf("%d predicate locks outlast the transaction in which the key is %s", n, what)
		}
	}
	err = s.Update(t.Context(), func(tx pgx.Tx) error {
		put := key
		_, err := s.Keys(tx).Get(key.Key)
		return errors.Join(err, s.Keys(tx).(lastPutter).PutLast(&put))
	})
	if err != nil || locks() == 0 {
		t.Errorf("a transaction that has read takes %d predicate locks, %v: this test sees none", locks(), err)
	}
}

// What has been locked before COMMIT was sent is waited for.
func TestACommitThatArrivesLateIsWaitedForWhereItsRowIsLocked(t *testing.T) {
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	s := openStore(t, proxy.DSN(), &postgres.Options{Logger: quiet})
	defer s.Close()
	if _, _, err := s.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	cut := proxy.Cut(pgtest.InFlight, pgtest.Runs("commit"))
	r := claimed("late")
	runs := 0
	updated := make(chan error, 1)
	go func() {
		updated <- s.Update(context.Background(), func(tx pgx.Tx) error {
			runs++
			put := r
			return errors.Join(increment(tx, "late"), s.Keys(tx).Put(&put))
		})
	}()
	<-cut.Made()
	select {
	case err := <-updated:
		t.Fatalf("it is settled while the commit is on its way: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	cut.Deliver()
	if err := <-updated; err != nil || runs != 1 {
		t.Errorf("after %d runs: %v", runs, err)
	}
}

func TestWithoutAKeyNobodyCanTellWhatBecameOfACommit(t *testing.T) {
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	s := openStore(t, proxy.DSN(), &postgres.Options{Logger: quiet})
	defer s.Close()
	proxy.Cut(pgtest.AfterRequest, pgtest.Runs("commit"))
	err := s.Update(t.Context(), func(tx pgx.Tx) error { return increment(tx, "row") })
	if !errors.Is(err, keystate.ErrOutcomeUnknown) {
		t.Errorf("the outcome is told: %v", err)
	}
}

func TestACommitThatMayStillArriveIsNotDenied(t *testing.T) {
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	s := openStore(t, proxy.DSN(), &postgres.Options{Logger: quiet})
	defer s.Close()
	cut := proxy.Cut(pgtest.InFlight, pgtest.Runs("INSERT INTO \"keystate\""))
	r, runs := claimed("late"), 0
	refusal := errors.New("on second thoughts, no")
	err := s.Update(t.Context(), func(tx pgx.Tx) error {
		if runs++; runs == 2 {
			return refusal
		}
		put := r
		return s.Keys(tx).(lastPutter).PutLast(&put)
	})
	if !errors.Is(err, keystate.ErrOutcomeUnknown) || !errors.Is(err, refusal) || runs != 2 {
		t.Errorf("after %d runs: %v", runs, err)
	}
	cut.Deliver()
	if _, err := s.Get(t.Context(), r.Key); err != nil {
		t.Errorf("it has not arrived: %v", err)
	}
}
