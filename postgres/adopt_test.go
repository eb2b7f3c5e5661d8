package postgres_test

import (
	"testing"
	"time"

	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

// When the server was away for longer than a lease, nobody's holds; who asks first must not take the others for gone.
func TestWhoseOwnLeaseHasRunOutTakesNothingOver(t *testing.T) {
	dsn := pgtest.Database(t)
	options := &postgres.Options{Logger: quiet, Lease: time.Hour}
	one, other := openStore(t, dsn, options), openStore(t, dsn, options)
	defer one.Close()
	defer other.Close()
	for _, s := range []*postgres.Store{one, other} {
		_, epoch, err := s.Boot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if s == one {
			r := claimed("key")
			r.Epoch = epoch
			if err := one.Update(t.Context(), func(tx pgx.Tx) error { return one.Keys(tx).Put(&r) }); err != nil {
				t.Fatal(err)
			}
		}
	}
	execOn(t, dsn, `UPDATE keystate.boots SET alive_until = now() - interval '1 second'`)
	if adopted, err := other.Adopt(t.Context(), []string{"m"}, 9); err != nil || len(adopted) > 0 {
		t.Errorf("it takes over %d keys, %v", len(adopted), err)
	}
	if _, err := other.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if adopted, err := other.Adopt(t.Context(), []string{"m"}, 9); err != nil || len(adopted) != 1 {
		t.Errorf("with a lease, it takes over %d keys, %v", len(adopted), err)
	}
}
