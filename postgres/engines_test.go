package postgres_test

import (
	"context"
	"errors"
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
	"github.com/jackc/pgx/v5/pgxpool"
)

// A payment is the state of the machine in these tests.
type payment struct {
	Name   string
	Cents  int
	Payout string // filled in by paid
}

// A bank is what effects act on: it does each thing once per token, and counts what it was asked.
type bank struct {
	mu    sync.Mutex
	calls map[string]int // by token
}

func (b *bank) pay(token string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.calls == nil {
		b.calls = map[string]int{}
	}
	b.calls[token]++
	return "payout of " + token
}

func (b *bank) tokens() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.calls)
}

// An office is one process: an engine with its machine on the common database.
type office struct {
	pool     *pgxpool.Pool
	engine   *keystate.Engine[pgx.Tx]
	payments *keystate.Machine[payment]
	inside   chan string   // gets the office's name when its effect has begun, if it is not nil
	goOn     chan struct{} // lets effects go on when it is closed
	name     string
}

func openOffice(t *testing.T, dsn, name string, b *bank, o postgres.Options, held bool) *office {
	t.Helper()
	f := &office{name: name, goOn: make(chan struct{})}
	if held {
		f.inside = make(chan string, 100)
	} else {
		close(f.goOn)
	}
	var err error
	if f.pool, err = pgxpool.New(t.Context(), dsn); err != nil {
		t.Fatal(err)
	}
	o.Logger = slog.New(slog.DiscardHandler)
	store, err := postgres.New(t.Context(), f.pool, &o)
	if err != nil {
		t.Fatal(err)
	}
	if f.engine, err = keystate.New[pgx.Tx](store, &keystate.Options{Logger: o.Logger}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.engine.Close()
		f.pool.Close()
	})
	f.payments, err = keystate.Register(f.engine, "payment", []keystate.Phase[pgx.Tx, payment]{
		{To: "noted", Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error { return addOne(ctx, tx, "noted "+p.Name) }},
		{To: "paid", Effect: func(ctx context.Context, token string, p *payment) error {
			p.Payout = b.pay(token)
			if f.inside != nil {
				f.inside <- f.name
			}
			select {
			case <-f.goOn:
			case <-ctx.Done():
				return ctx.Err()
			}
			return nil
		}, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error { return addOne(ctx, tx, "paid "+p.Name) }},
		{To: keystate.Finished},
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// addOne counts what a commit does: a row that says 2 is a commit that took effect twice.
func addOne(ctx context.Context, tx pgx.Tx, name string) error {
	_, err := tx.Exec(ctx, `INSERT INTO program_counts VALUES ($1, 1) ON CONFLICT (name) DO UPDATE SET n = program_counts.n + 1`, name)
	return err
}

// commonDatabase is a database with the program's table.
func commonDatabase(t *testing.T) string {
	t.Helper()
	dsn := pgtest.Database(t)
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `CREATE TABLE program_counts (name text PRIMARY KEY, n integer NOT NULL)`); err != nil {
		t.Fatal(err)
	}
	return dsn
}

// eachOnce checks that every commit took effect once, of so many payments.
func eachOnce(t *testing.T, dsn string, payments int) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var rows, sum int
	if err := conn.QueryRow(context.Background(), `SELECT count(*), COALESCE(sum(n), 0) FROM program_counts`).Scan(&rows, &sum); err != nil {
		t.Fatal(err)
	}
	if rows != 2*payments || sum != 2*payments {
		t.Errorf("%d rows that count %d commits, want %d of both", rows, sum, 2*payments)
	}
}

func keyOf(n int) keystate.Key { return keystate.Key{Scope: "ada", ID: fmt.Sprintf("payment-%04d", n)} }

func TestAnEngineWaitsForTheAnswerThatAnotherMakes(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	one, other := openOffice(t, dsn, "one", b, postgres.Options{}, true), openOffice(t, dsn, "other", b, postgres.Options{}, false)
	request := payment{Name: "p", Cents: 100}
	first := make(chan payment, 1)
	go func() {
		p, _ := one.payments.Do(context.Background(), keyOf(1), request)
		first <- p
	}()
	<-one.inside
	run, err := other.payments.Start(t.Context(), keyOf(1), request)
	if err != nil {
		t.Fatal(err)
	}
	if !run.Joined() || run.Replayed() {
		t.Errorf("the run is joined: %v, replayed: %v", run.Joined(), run.Replayed())
	}
	if _, err := other.payments.Do(t.Context(), keyOf(1), payment{Name: "p", Cents: 200}); !errors.Is(err, keystate.ErrMismatch) {
		t.Errorf("another request with the key: %v", err)
	}
	close(one.goOn)
	second, err := run.Wait(t.Context())
	if err != nil || second != <-first {
		t.Errorf("the other engine's answer is %+v, %v", second, err)
	}
	again, err := other.payments.Do(t.Context(), keyOf(1), request)
	if err != nil || again != second || b.tokens() != 1 {
		t.Errorf("later it is %+v, %v; the bank has %d payments", again, err, b.tokens())
	}
	eachOnce(t, dsn, 1)
}

func TestWhatADeadEngineHeldIsTakenOverUnderTheSameToken(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	lease := postgres.Options{Lease: 300 * time.Millisecond}
	dead, heir := openOffice(t, dsn, "dead", b, lease, true), openOffice(t, dsn, "heir", b, lease, true)
	const payments = 40 // more than the heir carries on at a time
	for n := range payments {
		if _, err := dead.payments.Start(t.Context(), keyOf(n), payment{Name: fmt.Sprint(n)}); err != nil {
			t.Fatal(err)
		}
	}
	for range payments {
		<-dead.inside
	}
	dead.pool.Close() // it never hears of the database again, nor says goodbye
	close(heir.goOn)
	for n := range payments {
		p, err := heir.payments.Do(t.Context(), keyOf(n), payment{Name: fmt.Sprint(n)})
		if err != nil || p.Payout == "" {
			t.Fatalf("payment %d: %+v, %v", n, p, err)
		}
	}
	if b.tokens() != payments {
		t.Errorf("the bank has %d payments", b.tokens())
	}
	close(dead.goOn)
	eachOnce(t, dsn, payments)
}

func TestNobodyAsksAndTheOthersCarryItOn(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	lease := postgres.Options{Lease: 300 * time.Millisecond}
	leaver, heir := openOffice(t, dsn, "leaver", b, postgres.Options{Lease: time.Hour}, true), openOffice(t, dsn, "heir", b, lease, true)
	if _, err := leaver.payments.Start(t.Context(), keyOf(1), payment{Name: "p"}); err != nil {
		t.Fatal(err)
	}
	<-leaver.inside
	if err := leaver.engine.Close(); err != nil { // and says goodbye: its lease of an hour does not matter
		t.Fatal(err)
	}
	if who := <-heir.inside; who != "heir" {
		t.Fatalf("%s carries it on", who)
	}
	close(heir.goOn)
	if err := heir.engine.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, err := heir.engine.Key(t.Context(), keyOf(1))
	if err != nil || r.Status != keystate.Answered {
		t.Errorf("the key is %s, %v", r.Status, err)
	}
	eachOnce(t, dsn, 1)
}

// An engine that was stopped for longer than its lease does not know that it has lost its keys: the versions tell it.
func TestAnEngineThatOversleptWritesNothingAndGivesItsCallersTheAnswer(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	sleeper := openOffice(t, dsn, "sleeper", b, postgres.Options{Lease: time.Hour}, true)
	answer := make(chan payment, 1)
	go func() {
		p, err := sleeper.payments.Do(context.Background(), keyOf(1), payment{Name: "p"})
		if err != nil {
			t.Error(err)
		}
		answer <- p
	}()
	<-sleeper.inside
	expireLeases(t, dsn)
	heir := openOffice(t, dsn, "heir", b, postgres.Options{}, false)
	taken, err := heir.payments.Do(t.Context(), keyOf(1), payment{Name: "p"})
	if err != nil {
		t.Fatal(err)
	}
	close(sleeper.goOn)
	if p := <-answer; p != taken || b.tokens() != 1 {
		t.Errorf("the sleeper's caller got %+v, the heir's %+v; the bank has %d payments", p, taken, b.tokens())
	}
	eachOnce(t, dsn, 1)
}

func TestManyEnginesDoEachPaymentOnceWhoeverIsAsked(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	var offices []*office
	for n := range 4 {
		offices = append(offices, openOffice(t, dsn, fmt.Sprint(n), b, postgres.Options{}, false))
	}
	const payments = 60
	var asked sync.WaitGroup
	var wrong atomic.Int32
	answers := make([]sync.Map, payments)
	for n := range payments {
		for _, f := range offices {
			asked.Go(func() {
				p, err := f.payments.Do(context.Background(), keyOf(n), payment{Name: fmt.Sprint(n)})
				if err != nil {
					wrong.Add(1)
					t.Errorf("payment %d at office %s: %v", n, f.name, err)
					return
				}
				answers[n].Store(p, true)
			})
		}
	}
	asked.Wait()
	for n := range answers {
		different := 0
		answers[n].Range(func(any, any) bool { different++; return true })
		if different != 1 {
			t.Errorf("payment %d has %d answers", n, different)
		}
	}
	if b.tokens() != payments {
		t.Errorf("the bank has %d payments", b.tokens())
	}
	eachOnce(t, dsn, payments)
}

// Who joins a run that the engine has taken up by itself is a caller like any other.
func TestWhoJoinedARunThatAnEngineResumedGetsTheHeirsAnswer(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	lease := postgres.Options{Lease: time.Hour}
	dead := openOffice(t, dsn, "dead", b, lease, true)
	if _, err := dead.payments.Start(t.Context(), keyOf(1), payment{Name: "p"}); err != nil {
		t.Fatal(err)
	}
	<-dead.inside
	if err := dead.engine.Close(); err != nil {
		t.Fatal(err)
	}
	resumer := openOffice(t, dsn, "resumer", b, lease, true)
	<-resumer.inside
	run, err := resumer.payments.Start(t.Context(), keyOf(1), payment{Name: "p"})
	if err != nil || !run.Joined() {
		t.Fatalf("joined: %v, %v", run.Joined(), err)
	}
	expireLeases(t, dsn)
	heir := openOffice(t, dsn, "heir", b, postgres.Options{}, false)
	taken, err := heir.payments.Do(t.Context(), keyOf(1), payment{Name: "p"})
	if err != nil {
		t.Fatal(err)
	}
	close(resumer.goOn)
	if p, err := run.Wait(t.Context()); err != nil || p != taken {
		t.Errorf("who joined got %+v, %v", p, err)
	}
}

// expireLeases ends the leases of all boots so far. One may be just renewing its lease for the first time: no row can be made for it any more that counts.
func expireLeases(t *testing.T, dsn string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), `UPDATE keystate.boots SET alive_until = now() - interval '1 second';
		DO $$ BEGIN EXECUTE format('ALTER TABLE keystate.boots ADD CHECK (epoch > %s OR alive_until < now())', (SELECT epoch FROM keystate.store)); END $$`)
	if err != nil {
		t.Fatal(err)
	}
}
