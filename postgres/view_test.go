package postgres_test

import (
	"errors"
	"testing"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

func TestAReadWhoseConnectionIsLostIsRunAgain(t *testing.T) {
	for _, place := range []pgtest.Place{pgtest.BeforeRequest, pgtest.AfterRequest, pgtest.MidAnswer} {
		for _, sql := range []string{"begin", "SELECT value"} {
			t.Run(place.String()+" "+sql, func(t *testing.T) {
				proxy := pgtest.NewProxy(t, pgtest.Database(t))
				s := openStore(t, proxy.DSN(), &postgres.Options{Logger: quiet})
				defer s.Close()
				cut := proxy.Cut(place, pgtest.Runs(sql))
				if err := s.View(t.Context(), func(tx pgx.Tx) error {
					_, _, err := rows.Get(tx, "row")
					return err
				}); err != nil || !cut.Happened() {
					t.Errorf("cut: %v, %v", cut.Happened(), err)
				}
			})
		}
	}
}

func TestALookAtTheKeysOutlivesItsConnection(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	proxy := pgtest.NewProxy(t, dsn)
	f := openOffice(t, proxy.DSN(), "office", b, postgres.Options{}, false)
	const payments = 5
	for n := range payments {
		if _, err := f.payments.Do(t.Context(), keyOf(n), paymentOf(n)); err != nil {
			t.Fatal(err)
		}
	}
	cut := proxy.Cut(pgtest.MidAnswer, pgtest.Runs("SELECT record, version, epoch, COALESCE(finished, 0) FROM \"keystate\".\"keys\" WHERE finished >"))
	seen := map[keystate.Key]bool{}
	for r, err := range f.engine.Keys(t.Context(), keystate.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		seen[r.Key] = true
	}
	if len(seen) != payments || !cut.Happened() {
		t.Errorf("of %d keys %d are seen, cut: %v", payments, len(seen), cut.Happened())
	}
}

// What fn says is final, whatever it sounds like.
func TestAViewThatWritesIsRunOnce(t *testing.T) {
	s := openStore(t, pgtest.Database(t), &postgres.Options{Logger: quiet})
	defer s.Close()
	runs, own := 0, errors.New("my own")
	err := s.View(t.Context(), func(tx pgx.Tx) error {
		runs++
		return errors.Join(own, increment(tx, "row"))
	})
	if codeOf(err) != "25006" || !errors.Is(err, own) || runs != 1 {
		t.Errorf("after %d runs: %v", runs, err)
	}
}
