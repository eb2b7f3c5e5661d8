package postgres_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What the server, the pool and the clocks can do to engines at work, and what their callers see of it.

func TestTerminatedBackendsLoseNothingAndRunNothingTwice(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	l := besiege(openOffices(t, pgtest.With(dsn, "application_name", "office"), 2, b, postgres.Options{}), 16)
	ended := 0
	for range 8 {
		l.awaitAnswers(t, 10)
		n, err := pgtest.Terminate(t.Context(), dsn, "office")
		if err != nil {
			t.Fatal(err)
		}
		ended += n
	}
	l.settle(t, dsn, b)
	if ended == 0 {
		t.Error("no connection was terminated")
	}
	t.Logf("%d connections terminated: %s; %d effects were sent again under their token", ended, l, b.repeated())
}

// A commit that waits for the standby is on the primary's disk. Whoever settles it, because its connection was lost, must wait for the standby, too.
func TestACommitWhoseConnectionIsLostIsNotAcknowledgedBeforeTheStandbyHasIt(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t, pgtest.FsyncOff)
	dsn := pair.Database(t)
	s := openStore(t, pgtest.With(dsn, "application_name", "victim"), &postgres.Options{Logger: quiet})
	defer s.Close()
	if _, _, err := s.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := pair.Standby.Kill(); err != nil {
		t.Fatal(err)
	}
	updated := make(chan error, 1)
	go func() {
		updated <- s.Update(context.Background(), func(tx pgx.Tx) error {
			put := claimed("key")
			return s.Keys(tx).Put(&put)
		})
	}()
	awaitStandbyAwaited(t, dsn)
	if n, err := pair.Primary.Terminate(t.Context(), "victim"); err != nil || n == 0 {
		t.Fatalf("%d connections terminated, %v", n, err)
	}
	select {
	case err := <-updated:
		t.Fatalf("the update has ended, and the standby has nothing of it: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	if err := pair.Standby.Restart(); err != nil {
		t.Fatal(err)
	}
	if err := <-updated; err != nil {
		t.Error(err)
	}
}

// awaitStandbyAwaited waits until a commit waits for the standby.
func awaitStandbyAwaited(t *testing.T, dsn string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	eventually(t, "a commit waits for the standby", func() bool {
		var n int
		err := conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`).Scan(&n)
		return err == nil && n > 0
	})
}

// All leases run out while nobody can renew his. Whoever is first when the server is back must not take the others for dead.
func TestAfterAnOutageLongerThanTheLeaseNobodyRobsTheLiving(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.FsyncOff)
	dsn, b := withProgramTable(t, s.Database(t)), &bank{}
	lease := postgres.Options{Lease: 2 * time.Second}
	busy := openOffice(t, dsn, "busy", b, lease, true)
	others := openOffices(t, dsn, 4, b, lease)
	const payments = 10
	for n := range payments {
		if _, err := busy.payments.Start(t.Context(), keyOf(n), paymentOf(n)); err != nil {
			t.Fatal(err)
		}
	}
	for range payments {
		<-busy.inside
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(lease.Lease + time.Second)
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(lease.Lease)
	close(busy.goOn)
	for n := range payments {
		if _, err := others[0].payments.Do(t.Context(), keyOf(n), paymentOf(n)); err != nil {
			t.Error(err)
		}
	}
	if n := b.repeated(); n > 0 {
		t.Errorf("%d effects were begun by others while the engine that ran them was alive", n)
	}
	eachOnce(t, dsn, payments)
}

// The program's tables have no room. That is no failure of a phase's: no attempt counts, nothing parks or is refused.
func TestFullDiskParksNothingAndAllGoesOnWhenThereIsRoom(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.FsyncOff, pgtest.SmallWAL, pgtest.Set("autovacuum", "off"))
	dsn, b := withProgramTable(t, s.Database(t)), &bank{}
	execOn(t, dsn, `ALTER TABLE program_counts ADD COLUMN ballast text`)
	execOn(t, dsn, `INSERT INTO program_counts SELECT g, 0, repeat('x', 1000) FROM generate_series(1, 889) AS g`)
	l := besiege(openOffices(t, dsn, 2, b, postgres.Options{}), 8)
	l.awaitAnswers(t, 20)
	limitFiles(t, s, 1<<20)
	defer func() { t.Log(l) }()
	eventually(t, "the disk is full", func() bool { return l.refusedFor(keystate.ErrStorageFull) > 0 })
	time.Sleep(3 * time.Second) // an engine tries a key again every second
	if err := s.UnlimitFiles(); err != nil {
		t.Fatal(err)
	}
	l.awaitAnswers(t, 20)
	execOn(t, dsn, `DELETE FROM program_counts WHERE n = 0`)
	l.settle(t, dsn, b)
	for refusal := range l.refusals {
		if refusal[:len(keystate.ErrStorageFull.Error())] != keystate.ErrStorageFull.Error() {
			t.Errorf("a caller was told: %s", refusal)
		}
	}
	t.Log(l)
}

func limitFiles(t *testing.T, s *pgtest.Server, size uint64) {
	t.Helper()
	if err := s.LimitFiles(size); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
}

// refusedFor counts what callers were refused because of an error.
func (l *ledger) refusedFor(why error) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for refusal, times := range l.refusals {
		if len(refusal) >= len(why.Error()) && refusal[:len(why.Error())] == why.Error() {
			n += times
		}
	}
	return n
}

// Without room for its log the server panics, and does not come up until there is.
func TestServerThatPanicsOverItsFullLogLosesNothing(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.FsyncOff, pgtest.SmallWAL)
	dsn, b := withProgramTable(t, s.Database(t)), &bank{}
	l := besiege(openOffices(t, dsn, 2, b, postgres.Options{}), 8)
	l.awaitAnswers(t, 20)
	limitFiles(t, s, 512<<10)
	eventually(t, "the server is gone", func() bool {
		conn, err := pgx.Connect(t.Context(), dsn)
		if err != nil {
			return true
		}
		conn.Close(context.Background())
		return false
	})
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	l.awaitAnswers(t, 20)
	l.settle(t, dsn, b)
	t.Log(l)
}

// What is too slow for the server's patience is told by its name, nothing of it is kept, and the key goes on afterwards.
func TestTimeoutsOfTheServerAreToldAndTheKeyGoesOn(t *testing.T) {
	for _, c := range []struct{ setting, table, code string }{
		{"statement_timeout", "program_counts", "57014"},
		{"statement_timeout", "keystate.keys", "57014"},
		{"lock_timeout", "program_counts", "55P03"},
		{"lock_timeout", "keystate.keys", "55P03"},
	} {
		t.Run(c.setting+" at "+c.table, func(t *testing.T) {
			dsn, b := commonDatabase(t), &bank{}
			f := openOffice(t, pgtest.With(dsn, c.setting, "50"), "office", b, postgres.Options{}, false)
			conn, err := pgx.Connect(t.Context(), dsn)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(context.Background())
			tx, err := conn.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.Exec(t.Context(), "LOCK TABLE "+c.table+" IN EXCLUSIVE MODE"); err != nil {
				t.Fatal(err)
			}
			p, err := f.payments.Do(t.Context(), keyOf(1), paymentOf(1))
			if codeOf(err) != c.code {
				t.Errorf("the caller gets %+v, %v", p, err)
			}
			t.Logf("the caller gets: %v", err)
			if err := tx.Rollback(t.Context()); err != nil {
				t.Fatal(err)
			}
			if p, err = f.payments.Do(t.Context(), keyOf(1), paymentOf(1)); err != nil {
				t.Errorf("afterwards: %+v, %v", p, err)
			}
			eachOnce(t, dsn, 1)
		})
	}
}

func TestCommitThatIdlesLongerThanTheServerAllowsIsRunAgain(t *testing.T) {
	dsn := pgtest.With(commonDatabase(t), "idle_in_transaction_session_timeout", "50")
	e, _ := openEngine(t, dsn)
	var runs atomic.Int32
	m, err := keystate.Register(e, "idle", []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, OnError: keystate.Fail, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error {
		err := addOne(ctx, tx, p.Name) // with which the transaction begins
		if runs.Add(1) == 1 {
			time.Sleep(200 * time.Millisecond)
		}
		return err
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if p, err := m.Do(t.Context(), keyOf(1), paymentOf(1)); err != nil || runs.Load() < 2 {
		t.Errorf("%+v after %d runs, %v", p, runs.Load(), err)
	}
}

func openEngine(t *testing.T, dsn string) (*keystate.Engine[pgx.Tx], *pgxpool.Pool) {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	store, err := postgres.New(t.Context(), pool, &postgres.Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	e, err := keystate.New[pgx.Tx](store, &keystate.Options{Logger: quiet, CloseTimeout: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Close()
		pool.Close()
	})
	return e, pool
}

func TestManyCallersFinishWithOneConnection(t *testing.T) {
	for _, connections := range []string{"1", "2"} {
		t.Run(connections, func(t *testing.T) {
			dsn, b := commonDatabase(t), &bank{}
			l := besiege(openOffices(t, pgtest.With(dsn, "pool_max_conns", connections), 2, b, postgres.Options{}), 64)
			l.awaitAnswers(t, 200)
			l.settle(t, dsn, b)
			if len(l.refusals) > 0 {
				t.Error(l)
			}
		})
	}
}

// An effect may use the pool that the store has: it holds nothing of it while it runs.
func TestEffectsMayUseTheStoresOnlyConnection(t *testing.T) {
	e, pool := openEngine(t, pgtest.With(commonDatabase(t), "pool_max_conns", "1"))
	m, err := keystate.Register(e, "effects", []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, Effect: func(ctx context.Context, token string, p *payment) error {
		_, err := pool.Exec(ctx, "SELECT pg_sleep(0.001)")
		return err
	}}})
	if err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	for n := range 64 {
		callers.Go(func() {
			if _, err := m.Do(t.Context(), keyOf(n), paymentOf(n)); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
}

// A commit that asks the exhausted pool for another connection waits for itself. Its own deadline ends that, and without one the caller's does for the caller.
func TestACommitThatAsksTheExhaustedPoolWaitsNoLongerThanItsDeadline(t *testing.T) {
	e, pool := openEngine(t, pgtest.With(commonDatabase(t), "pool_max_conns", "1"))
	m, err := keystate.Register(e, "greedy", []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, OnError: keystate.Fail, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error {
		ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		_, err := pool.Exec(ctx, "SELECT 1")
		return err
	}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.Do(t.Context(), keyOf(1), paymentOf(1))
	if final := (*keystate.FinalError)(nil); !errors.As(err, &final) {
		t.Errorf("the caller gets %v", err)
	}
}

func TestCloseComesBackThoughACommitHoldsTheLastConnectionForEver(t *testing.T) {
	dsn := pgtest.With(commonDatabase(t), "pool_max_conns", "1")
	store, err := postgres.Open(t.Context(), dsn, &postgres.Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	e, err := keystate.New[pgx.Tx](store, &keystate.Options{Logger: quiet, CloseTimeout: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	stuck, inside := make(chan struct{}), make(chan struct{})
	defer close(stuck)
	m, err := keystate.Register(e, "stuck", []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, Commit: func(context.Context, pgx.Tx, *payment) error {
		close(inside)
		<-stuck
		return errors.New("let go")
	}}})
	if err != nil {
		t.Fatal(err)
	}
	go m.Do(context.Background(), keyOf(1), paymentOf(1))
	<-inside
	closed := make(chan error, 1)
	go func() { closed <- e.Close() }()
	select {
	case err := <-closed:
		if err == nil {
			t.Error("nobody is told that a run has not ended")
		}
	case <-time.After(15 * time.Second):
		t.Error("Close does not come back")
	}
}

// inAnotherTime runs fn as a process whose clock is wrong by so much, and goes no faster than ours.
func inAnotherTime(t *testing.T, wrong time.Duration, fn func(t *testing.T)) {
	t.Helper()
	there := time.Now().Add(wrong)
	beat, over := make(chan struct{}), make(chan struct{})
	go func() { // outside the bubble: whoever waits for it in the bubble keeps the bubble's clock from running ahead
		for {
			time.Sleep(time.Millisecond)
			select {
			case beat <- struct{}{}:
			case <-over:
				close(beat)
				return
			}
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(there))
		var pace sync.WaitGroup
		pace.Go(func() {
			for range beat {
				time.Sleep(time.Millisecond)
			}
		})
		t.Cleanup(func() {
			close(over)
			pace.Wait()
		})
		fn(t)
	})
}

// wrongClocks are of processes whose hours are wrong.
var wrongClocks = []time.Duration{-5 * time.Hour, 5 * time.Hour}

func TestAWrongClockStealsNoLiveKey(t *testing.T) {
	for _, wrong := range wrongClocks {
		t.Run(wrong.String(), func(t *testing.T) {
			dsn, b := commonDatabase(t), &bank{}
			busy := openOffice(t, dsn, "busy", b, postgres.Options{}, true)
			if _, err := busy.payments.Start(t.Context(), keyOf(1), paymentOf(1)); err != nil {
				t.Fatal(err)
			}
			<-busy.inside
			inAnotherTime(t, wrong, func(t *testing.T) {
				other := openOffice(t, dsn, "other", b, postgres.Options{Lease: 300 * time.Millisecond}, false)
				ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
				defer cancel()
				if p, err := other.payments.Do(ctx, keyOf(1), paymentOf(1)); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%+v, %v", p, err)
				}
				other.engine.Close()
				other.pool.Close()
			})
			close(busy.goOn)
			if _, err := busy.payments.Do(t.Context(), keyOf(1), paymentOf(1)); err != nil || b.repeated() > 0 {
				t.Errorf("%v; %d effects were sent again", err, b.repeated())
			}
			eachOnce(t, dsn, 1)
		})
	}
}

// Of a commit that nobody could settle there is a key that is to be carried on, though its caller never comes back.
func TestAKeyWhoseCommitCouldNotBeSettledIsCarriedOn(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.FsyncOff)
	dsn, b := withProgramTable(t, s.Database(t)), &bank{}
	proxy := pgtest.NewProxy(t, dsn)
	f := openOffice(t, proxy.DSN(), "office", b, postgres.Options{RetryTimeout: 200 * time.Millisecond, Lease: time.Second}, true)
	run, err := f.payments.Start(t.Context(), keyOf(1), paymentOf(1))
	if err != nil {
		t.Fatal(err)
	}
	<-f.inside
	holder, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close(context.Background())
	if _, err := holder.Exec(t.Context(), `BEGIN; SELECT FROM keystate.keys FOR UPDATE`); err != nil { // so that settling waits until the server is gone
		t.Fatal(err)
	}
	cut := proxy.Cut(pgtest.InFlight, pgtest.Runs("commit"))
	close(f.goOn)
	<-cut.Made()
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := run.Wait(t.Context()); !errors.Is(err, keystate.ErrOutcomeUnknown) {
		t.Errorf("the caller is told %v", err)
	}
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the key is answered", func() bool {
		r, err := f.engine.Key(context.Background(), keyOf(1))
		return err == nil && r.Status == keystate.Answered
	})
	eachOnce(t, dsn, 1)
}
