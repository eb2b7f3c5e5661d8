package pgbench

import (
	"context"
	"log/slog"
	"testing"

	"example.com/keystate"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// engine is what all this is about.
type engine struct {
	pool   *pgxpool.Pool
	engine *keystate.Engine[pgx.Tx]
	orders *keystate.Machine[order]
}

var quiet = slog.New(slog.DiscardHandler)

var threePhases = []keystate.Phase[pgx.Tx, order]{
	{To: "funds_reserved", Commit: func(ctx context.Context, tx pgx.Tx, s *order) error {
		return write(ctx, tx, s.Account+"/reserved")
	}},
	{To: "payout_sent", Effect: func(_ context.Context, token string, s *order) error {
		s.Payout = payOut(token)
		return nil
	}},
	{To: keystate.Finished, Commit: func(ctx context.Context, tx pgx.Tx, s *order) error {
		s.Receipt = receipt
		return write(ctx, tx, s.Account+"/settled")
	}},
}

// queuedWrites are the same phases, whose writes go with the commits.
var queuedWrites = []keystate.Phase[pgx.Tx, order]{
	{To: "funds_reserved", Commit: func(ctx context.Context, tx pgx.Tx, s *order) error {
		return postgres.Queue(ctx, tx, insertOrder, s.Account+"/reserved", businessRow)
	}},
	threePhases[1],
	{To: keystate.Finished, Commit: func(ctx context.Context, tx pgx.Tx, s *order) error {
		s.Receipt = receipt
		return postgres.Queue(ctx, tx, insertOrder, s.Account+"/settled", businessRow)
	}},
}

func openEngine(isolation pgx.TxIsoLevel, phases []keystate.Phase[pgx.Tx, order]) func(testing.TB, string, int) station {
	return func(tb testing.TB, dsn string, connections int) station {
		tb.Helper()
		return newEngine(tb, dsn, connections, isolation, phases, keystate.Options{})
	}
}

func newEngine(tb testing.TB, dsn string, connections int, isolation pgx.TxIsoLevel, phases []keystate.Phase[pgx.Tx, order], o keystate.Options) *engine {
	tb.Helper()
	e := &engine{pool: openPool(tb, dsn, connections)}
	store, err := postgres.New(tb.Context(), e.pool, &postgres.Options{Isolation: isolation, Logger: quiet})
	if err != nil {
		tb.Fatal(err)
	}
	o.Logger = quiet
	if e.engine, err = keystate.New[pgx.Tx](store, &o); err != nil {
		tb.Fatal(err)
	}
	if e.orders, err = keystate.Register(e.engine, "order", phases); err != nil {
		tb.Fatal(err)
	}
	return e
}

func (e *engine) request(ctx context.Context, id string) (order, error) {
	return e.orders.Do(ctx, keystate.Key{Scope: "bench", ID: id}, order{Account: id, Cents: 500})
}

func (e *engine) close() {
	e.engine.Close()
	e.pool.Close()
}
