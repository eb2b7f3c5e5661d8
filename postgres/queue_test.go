package postgres_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

const insertCount = `INSERT INTO program_counts VALUES ($1, $2)`

func queueOne(ctx context.Context, tx pgx.Tx, name string) error {
	return postgres.Queue(ctx, tx, insertCount, name, 1)
}

func TestAQueuedStatementGoesWithWhateverIsSentNext(t *testing.T) {
	dsn := commonDatabase(t)
	store := openStore(t, dsn, nil)
	ctx := t.Context()
	sees := func(tx pgx.Tx, want int) {
		t.Helper()
		var n int
		if err := tx.QueryRow(ctx, `SELECT count(*) FROM program_counts WHERE n >= $1`, 0).Scan(&n); err != nil || n != want {
			t.Errorf("there are %d rows, %v, want %d", n, err, want)
		}
	}
	err := store.Update(ctx, func(tx pgx.Tx) error {
		queueOne(ctx, tx, "with the first statement")
		sees(tx, 1)
		queueOne(ctx, tx, "with an Exec")
		if tag, err := tx.Exec(ctx, insertCount, "an Exec", 1); err != nil || tag.RowsAffected() != 1 {
			t.Errorf("%v, %v", tag, err)
		}
		queueOne(ctx, tx, "before a statement without arguments")
		if _, err := tx.Exec(ctx, `UPDATE program_counts SET n = n + 1`); err != nil {
			t.Error(err)
		}
		queueOne(ctx, tx, "with a batch")
		var b pgx.Batch
		b.Queue(insertCount, "a batch", 1)
		if err := tx.SendBatch(ctx, &b).Close(); err != nil {
			t.Error(err)
		}
		queueOne(ctx, tx, "before a part")
		part, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		sees(tx, 7)
		if err := part.Commit(ctx); err != nil {
			return err
		}
		queueOne(ctx, tx, "with the commit")
		return queueOne(ctx, tx, "with the commit, too")
	})
	if err != nil {
		t.Fatal(err)
	}
	store.View(ctx, func(tx pgx.Tx) error { sees(tx, 9); return nil })
}

func TestAFailedTransactionLeavesNothingOfWhatItQueued(t *testing.T) {
	dsn := commonDatabase(t)
	store := openStore(t, dsn, nil)
	no := errors.New("no")
	err := store.Update(t.Context(), func(tx pgx.Tx) error {
		queueOne(t.Context(), tx, "queued")
		return no
	})
	if !errors.Is(err, no) || namesIn(t, dsn) != "" {
		t.Errorf("%v, and there is %q", err, namesIn(t, dsn))
	}
}

func TestQueueRunsAtOnceInATransactionOfAnotherOrigin(t *testing.T) {
	dsn := commonDatabase(t)
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	err = pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error { return queueOne(t.Context(), tx, "at once") })
	if err != nil || namesIn(t, dsn) != "at once" {
		t.Errorf("%v, and there is %q", err, namesIn(t, dsn))
	}
}

// What is found out only at the end of a transaction is the failure of the phase that wrote it, also when others share the transaction.
func TestWhatACommitIsRejectedForIsTheFailureOfThePhaseThatWroteIt(t *testing.T) {
	for _, c := range []struct {
		name, says string
		reject     func(ctx context.Context, tx pgx.Tx) error
	}{
		{"a queued statement that breaks a constraint", "program_counts_pkey", func(ctx context.Context, tx pgx.Tx) error {
			return errors.Join(queueOne(ctx, tx, "twice"), queueOne(ctx, tx, "twice"))
		}},
		{"a queued statement that cannot be sent", "unable to encode", func(ctx context.Context, tx pgx.Tx) error {
			return postgres.Queue(ctx, tx, insertCount, "a number", struct{}{})
		}},
		{"a queued statement with a value that the server cannot read", "invalid input syntax", func(ctx context.Context, tx pgx.Tx) error {
			return postgres.Queue(ctx, tx, insertCount, "a number", "a word")
		}},
		{"a queued statement that is none", "syntax error", func(ctx context.Context, tx pgx.Tx) error { return postgres.Queue(ctx, tx, "INSERT", 1) }},
		{"a constraint that is checked at the end", "program_notes_of_fkey", func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `INSERT INTO program_notes VALUES ($1)`, "nothing")
			return err
		}},
	} {
		for _, second := range []bool{false, true} {
			t.Run(c.name+map[bool]string{false: ", in the first phase", true: ", in the second"}[second], func(t *testing.T) {
				dsn := commonDatabase(t)
				e, pool := openEngine(t, dsn)
				if _, err := pool.Exec(t.Context(), `CREATE TABLE program_notes (of text REFERENCES program_counts DEFERRABLE INITIALLY DEFERRED)`); err != nil {
					t.Fatal(err)
				}
				sound := func(name string) keystate.Phase[pgx.Tx, payment] {
					return keystate.Phase[pgx.Tx, payment]{To: keystate.RecoveryPoint(name), OnError: keystate.Fail, Commit: func(ctx context.Context, tx pgx.Tx, _ *payment) error { return queueOne(ctx, tx, name) }}
				}
				phases := []keystate.Phase[pgx.Tx, payment]{
					{To: "rejected", OnError: keystate.Fail, Commit: func(ctx context.Context, tx pgx.Tx, _ *payment) error { return c.reject(ctx, tx) }},
					sound("after"),
					sound(string(keystate.Finished)),
				}
				left := ""
				if second {
					phases, left = append([]keystate.Phase[pgx.Tx, payment]{sound("before")}, phases...), "before"
				}
				m, err := keystate.Register(e, "rejected", phases)
				if err != nil {
					t.Fatal(err)
				}
				_, err = m.Do(t.Context(), keyOf(1), paymentOf(1))
				if final := (*keystate.FinalError)(nil); !errors.As(err, &final) || final.Before != "rejected" || !strings.Contains(err.Error(), c.says) {
					t.Errorf("the caller gets %v", err)
				}
				if got := namesIn(t, dsn); got != left {
					t.Errorf("there is what %q has written, want %q", got, left)
				}
			})
		}
	}
}

func TestAPhaseThatQueuesItsWritesSparesTheirTrips(t *testing.T) {
	dsn := commonDatabase(t)
	proxy := pgtest.NewProxy(t, dsn)
	e, _ := openEngine(t, proxy.DSN())
	m, err := keystate.Register(e, "queueing", []keystate.Phase[pgx.Tx, payment]{
		{To: "reserved", Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error { return queueOne(ctx, tx, "reserved "+p.Name) }},
		{To: "sent", Effect: func(context.Context, string, *payment) error { return nil }},
		{To: keystate.Finished, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error { return queueOne(ctx, tx, "settled "+p.Name) }},
	})
	if err != nil {
		t.Fatal(err)
	}
	least := int64(1000)
	for n := range 30 { // statements are prepared at first, and the lease is renewed now and then
		before := proxy.Counts()
		if _, err := m.Do(t.Context(), keyOf(n), paymentOf(n)); err != nil {
			t.Fatal(err)
		}
		least = min(least, int64(proxy.Counts().Since(before).RoundTrips))
	}
	if least != 3 {
		t.Errorf("a request takes %d trips, want one to look and one for each transaction", least)
	}
	eachOnce(t, dsn, 30)
}
