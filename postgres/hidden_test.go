package postgres_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"github.com/jackc/pgx/v5"
)

// A phase that says nothing of what keeps its transaction from being committed has failed. Nothing of it is kept, and its policy decides.
func TestWhatAPhaseHidesIsItsFailure(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		name, says string
		hide       func(tx pgx.Tx)
	}{
		{"an SQL error", "division by zero", func(tx pgx.Tx) { tx.Exec(ctx, "SELECT 1 / $1::int", 0) }},
		{"an SQL error of a query", "division by zero", func(tx pgx.Tx) { tx.QueryRow(ctx, "SELECT 1 / $1::int", 0).Scan(new(int)) }},
		{"the first of several SQL errors", "division by zero", func(tx pgx.Tx) {
			tx.Exec(ctx, "SELECT 1 / $1::int", 0)
			tx.Exec(ctx, "SELECT 1")
		}},
		{"an SQL error in a batch", "a batch", func(tx pgx.Tx) {
			var b pgx.Batch
			b.Queue("SELECT 1 / $1::int", 0)
			tx.SendBatch(ctx, &b).Close()
		}},
		{"rows that it has left open", "rows open", func(tx pgx.Tx) { tx.Query(ctx, "SELECT generate_series(1, $1::int)", 9) }},
		{"its own rollback", "rolled its transaction back", func(tx pgx.Tx) { tx.Rollback(ctx) }},
		{"its own ROLLBACK", "ended its transaction by SQL", func(tx pgx.Tx) { tx.Exec(ctx, "ROLLBACK") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dsn := commonDatabase(t)
			e, _ := openEngine(t, dsn)
			m, err := keystate.Register(e, "hiding", []keystate.Phase[pgx.Tx, payment]{
				{To: "noted", Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error { return addOne(ctx, tx, "noted") }},
				{To: "hidden", OnError: keystate.Fail, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error {
					err := addOne(ctx, tx, "hidden")
					c.hide(tx)
					return err
				}},
				{To: keystate.Finished, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error { return addOne(ctx, tx, "finished") }},
			})
			if err != nil {
				t.Fatal(err)
			}
			_, err = m.Do(t.Context(), keyOf(1), paymentOf(1))
			if final := (*keystate.FinalError)(nil); !errors.As(err, &final) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("the caller gets %v", err)
			}
			r, err := e.Key(t.Context(), keyOf(1))
			if err != nil || r.Status != keystate.Answered || r.Point != "noted" && r.Point != keystate.Finished {
				t.Errorf("the key is %s at %s, %v", r.Status, r.Point, err)
			}
			if got := namesIn(t, dsn); got != "noted" {
				t.Errorf("there is what %q has written", got)
			}
		})
	}
}

// namesIn lists the rows of the program's table.
func namesIn(t *testing.T, dsn string) (names string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(t.Context(), `SELECT COALESCE(string_agg(name, ' ' ORDER BY name), '') FROM program_counts`).Scan(&names); err != nil {
		t.Fatal(err)
	}
	return names
}

// A part of the transaction may fail, and the phase go on without it.
func TestAPartThatFailsIsNoFailureOfThePhase(t *testing.T) {
	dsn := commonDatabase(t)
	e, _ := openEngine(t, dsn)
	m, err := keystate.Register(e, "parts", []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error {
		if err := pgx.BeginFunc(ctx, tx, func(part pgx.Tx) error { return errors.Join(addOne(ctx, part, "part"), errors.New("no")) }); err == nil {
			t.Error("the part has not failed")
		}
		_ = pgx.BeginFunc(ctx, tx, func(part pgx.Tx) error {
			_, err := part.Exec(ctx, "SELECT 1 / $1::int", 0)
			return err
		})
		return addOne(ctx, tx, "whole")
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Do(t.Context(), keyOf(1), paymentOf(1)); err != nil || namesIn(t, dsn) != "whole" {
		t.Errorf("there is %q, %v", namesIn(t, dsn), err)
	}
}

// What a part of the transaction, or a batch, hears of others and of the connection is no failure of the phase's, either.
func TestAConnectionThatIsLostInAPartOrABatchIsNoFailureOfThePhase(t *testing.T) {
	ctx := context.Background()
	const sql = "INSERT INTO program_counts"
	for _, c := range []struct {
		name string
		add  func(tx pgx.Tx) error
	}{
		{"a part", func(tx pgx.Tx) error {
			return pgx.BeginFunc(ctx, tx, func(part pgx.Tx) error { return addOne(ctx, part, "row") })
		}},
		{"a batch", func(tx pgx.Tx) error {
			var b pgx.Batch
			b.Queue(sql+" VALUES ($1, 1)", "row")
			return tx.SendBatch(ctx, &b).Close()
		}},
		{"a part that is hidden", func(tx pgx.Tx) error {
			_ = pgx.BeginFunc(ctx, tx, func(part pgx.Tx) error { return addOne(ctx, part, "row") })
			return nil
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dsn := commonDatabase(t)
			proxy := pgtest.NewProxy(t, dsn)
			e, _ := openEngine(t, proxy.DSN())
			m, err := keystate.Register(e, "lost", []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, OnError: keystate.Fail,
				Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error { return c.add(tx) }}})
			if err != nil {
				t.Fatal(err)
			}
			cut := proxy.Cut(pgtest.MidAnswer, pgtest.Runs(sql))
			if _, err := m.Do(t.Context(), keyOf(1), paymentOf(1)); err != nil || !cut.Happened() || namesIn(t, dsn) != "row" {
				t.Errorf("cut: %v; there is %q, %v", cut.Happened(), namesIn(t, dsn), err)
			}
		})
	}
}
