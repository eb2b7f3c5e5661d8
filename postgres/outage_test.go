package postgres_test

import (
	"context"
	"errors"
	"flag"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What becomes of callers while the server is away, or says nothing.

var outage = flag.Duration("outage", 8*time.Second, "how long the server is away")

// besieged are offices at work behind a relay.
func besieged(t *testing.T, dsn string, o postgres.Options) (*relay, *ledger, *bank) {
	t.Helper()
	b, r := &bank{}, newRelay(t, dsn)
	l := besiege(openOffices(t, pgtest.With(r.dsn, "connect_timeout", "5"), 2, b, o), 8)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l)
		}
	})
	l.awaitAnswers(t, 20)
	return r, l, b
}

func TestAnOutageIsNoCallersConcern(t *testing.T) {
	t.Parallel()
	dsn := commonDatabase(t)
	r, l, b := besieged(t, dsn, postgres.Options{})
	r.lead("")
	time.Sleep(*outage)
	r.lead(dsn)
	l.awaitAnswers(t, 20)
	l.settle(t, dsn, b)
	if len(l.refusals) > 0 {
		t.Error("callers were told of it")
	}
	t.Log(l)
}

func TestAnOutageThatLastsIsToldAndAllGoesOnAfterIt(t *testing.T) {
	t.Parallel()
	dsn := commonDatabase(t)
	r, l, b := besieged(t, dsn, postgres.Options{RetryTimeout: 200 * time.Millisecond})
	r.lead("")
	eventually(t, "callers are told of it", func() bool { return l.refusedAtAll() > 20 })
	r.lead(dsn)
	l.awaitAnswers(t, 20)
	l.settle(t, dsn, b)
	t.Log(l)
}

func (l *ledger) refusedAtAll() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, times := range l.refusals {
		n += times
	}
	return n
}

// impatient are options with which whoever is not answered hears of it soon.
var impatient = postgres.Options{TransactionTimeout: 300 * time.Millisecond, RetryTimeout: 300 * time.Millisecond, Lease: 2 * time.Second}

func TestAFrozenServerIsGivenUpAndAllGoesOnWhenItThaws(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.FsyncOff)
	dsn, b := pgtest.With(withProgramTable(t, s.Database(t)), "connect_timeout", "1"), &bank{}
	l := besiege(openOffices(t, dsn, 2, b, impatient), 8)
	l.awaitAnswers(t, 20)
	if err := s.Freeze(); err != nil {
		t.Fatal(err)
	}
	defer s.Thaw() // what is frozen cannot be stopped
	eventually(t, "every caller is told of it", func() bool { return l.refusedAtAll() > 20 })
	if err := s.Thaw(); err != nil {
		t.Fatal(err)
	}
	l.awaitAnswers(t, 20)
	l.settle(t, dsn, b)
	t.Logf("%s; %d effects were sent again under their token", l, b.repeated())
}

func TestAFrozenPrimaryIsGivenUpForTheOneThatTakesItsPlace(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t, pgtest.FsyncOff)
	dsn, b := pgtest.With(withProgramTable(t, pair.Database(t)), "connect_timeout", "1"), &bank{}
	l := besiege(openOffices(t, dsn, 2, b, postgres.Options{TransactionTimeout: 3 * time.Second}), 8)
	l.awaitAnswers(t, 20)
	if err := pair.Primary.Freeze(); err != nil {
		t.Fatal(err)
	}
	defer pair.Primary.Thaw()
	time.Sleep(500 * time.Millisecond) // every connection is in the midst of something
	if err := pair.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.awaitAnswers(t, 50)
	l.settle(t, dsn, b)
	if len(l.refusals) > 0 {
		t.Error("callers were told of it")
	}
	t.Logf("%s; %d effects were sent again under their token", l, b.repeated())
}

func TestConnectionsThatSwallowEverythingAreGivenUp(t *testing.T) {
	t.Parallel()
	dsn := commonDatabase(t)
	r, l, b := besieged(t, dsn, postgres.Options{TransactionTimeout: time.Second})
	r.swallow(clients | servers)
	time.Sleep(500 * time.Millisecond)
	r.carry()
	l.awaitAnswers(t, 50)
	l.settle(t, dsn, b)
	if len(l.refusals) > 0 {
		t.Error("callers were told of it")
	}
	t.Logf("%s; %d effects were sent again under their token", l, b.repeated())
}

// Whether it is the commit that is swallowed, or only its answer, shows when the connection is given up.
func TestACommitThatIsSwallowedIsSettled(t *testing.T) {
	for _, c := range []struct {
		what  string
		sides side
		runs  int
	}{{"the commit", clients, 2}, {"its answer", servers, 1}} {
		t.Run(c.what, func(t *testing.T) {
			r := newRelay(t, pgtest.Database(t))
			s := openStore(t, r.dsn, &postgres.Options{Logger: quiet, TransactionTimeout: 500 * time.Millisecond})
			defer s.Close()
			if _, _, err := s.Boot(t.Context()); err != nil {
				t.Fatal(err)
			}
			runs := 0
			update := func(key string, before func()) error {
				return s.Update(t.Context(), func(tx pgx.Tx) error {
					put := claimed(key)
					err := increment(tx, "row")
					if runs++; runs == 1 {
						before()
					}
					return errors.Join(err, s.Keys(tx).(lastPutter).PutLast(&put))
				})
			}
			if err := update("earlier", func() {}); err != nil { // which prepares the statements
				t.Fatal(err)
			}
			runs = 0
			err := update("key", func() {
				r.swallow(c.sides)
				time.AfterFunc(300*time.Millisecond, r.carry)
			})
			if err != nil || runs != c.runs {
				t.Errorf("after %d runs: %v", runs, err)
			}
		})
	}
}

// Who settles a commit needs a connection, and must not hold the one on which the commit was lost.
func TestACommitIsSettledThoughThePoolHasOneConnection(t *testing.T) {
	proxy := pgtest.NewProxy(t, pgtest.Database(t))
	pool, err := pgxpool.New(t.Context(), pgtest.With(proxy.DSN(), "pool_max_conns", "1"))
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	s, err := postgres.New(t.Context(), pool, &postgres.Options{Logger: quiet, TransactionTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, _, err := s.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	cut := proxy.Cut(pgtest.AfterRequest, pgtest.Runs("commit"))
	updated := make(chan error, 1)
	go func() {
		updated <- s.Update(context.Background(), func(tx pgx.Tx) error {
			put := claimed("key")
			return s.Keys(tx).Put(&put)
		})
	}()
	select {
	case err := <-updated:
		if err != nil || !cut.Happened() {
			t.Errorf("cut: %v, %v", cut.Happened(), err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it waits for itself")
	}
}

func TestAPhaseThatTakesTooLongIsToldSo(t *testing.T) {
	dsn := pgtest.Database(t)
	s := openStore(t, dsn, &postgres.Options{Logger: quiet, TransactionTimeout: 100 * time.Millisecond, RetryTimeout: -1})
	defer s.Close()
	began := time.Now()
	err := s.Update(t.Context(), func(tx pgx.Tx) error {
		_, err := tx.Exec(context.Background(), "SELECT pg_sleep(60)")
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "took too long") || time.Since(began) > 20*time.Second {
		t.Errorf("after %s: %v", time.Since(began), err)
	}
}

// A caller who is gone is not waited with.
func TestTheCallersEndAndTheStoresEndTheWaiting(t *testing.T) {
	dsn := pgtest.Database(t)
	r := newRelay(t, dsn)
	s := openStore(t, r.dsn, &postgres.Options{Logger: quiet, RetryTimeout: time.Hour})
	r.lead("")
	update := func(ctx context.Context) error {
		return s.Update(ctx, func(tx pgx.Tx) error { return increment(tx, "row") })
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := update(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the caller's end: %v", err)
	}
	updated := make(chan error, 1)
	go func() { updated <- update(context.Background()) }()
	time.AfterFunc(100*time.Millisecond, func() { s.Close() })
	if err := <-updated; !errors.Is(err, keystate.ErrClosed) {
		t.Errorf("the store's end: %v", err)
	}
}

func TestCloseComesBackWhileTheServerIsFrozen(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.FsyncOff)
	dsn, b := withProgramTable(t, s.Database(t)), &bank{}
	store, err := postgres.Open(t.Context(), dsn, &postgres.Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	e, err := keystate.New[pgx.Tx](store, &keystate.Options{Logger: quiet, CloseTimeout: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	m, err := keystate.Register(e, "payment", []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, Commit: func(ctx context.Context, tx pgx.Tx, p *payment) error {
		p.Payout = b.pay("token")
		return addOne(ctx, tx, p.Name)
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Do(t.Context(), keyOf(0), paymentOf(0)); err != nil {
		t.Fatal(err)
	}
	if err := s.Freeze(); err != nil {
		t.Fatal(err)
	}
	defer s.Thaw()
	run, err := make(chan error, 1), error(nil)
	go func() {
		_, err := m.Do(context.Background(), keyOf(1), paymentOf(1))
		run <- err
	}()
	time.Sleep(100 * time.Millisecond)
	closed := make(chan error, 1)
	go func() { closed <- e.Close() }()
	select {
	case err := <-closed:
		t.Logf("Close says: %v", err)
	case <-time.After(15 * time.Second):
		t.Fatal("Close does not come back")
	}
	if err = s.Thaw(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the caller gets: %v", <-run)
}

// An engine that waits for the server holds nothing by that: another takes its keys over, and what it writes then is refused.
func TestWhoWaitsForTheServerLosesItsKeysAndWritesNothing(t *testing.T) {
	t.Parallel()
	dsn, b := commonDatabase(t), &bank{}
	r := newRelay(t, dsn)
	lease := postgres.Options{Lease: 500 * time.Millisecond}
	lost := openOffice(t, r.dsn, "lost", b, lease, true)
	answer := make(chan payment, 1)
	go func() {
		p, err := lost.payments.Do(context.Background(), keyOf(1), payment{Name: "p"})
		if err != nil {
			t.Error(err)
		}
		answer <- p
	}()
	<-lost.inside
	r.lead("")
	close(lost.goOn) // and now it is to commit
	heir := openOffice(t, dsn, "heir", b, lease, false)
	taken, err := heir.payments.Do(t.Context(), keyOf(1), payment{Name: "p"})
	if err != nil {
		t.Fatal(err)
	}
	r.lead(dsn)
	if p := <-answer; p != taken || b.tokens() != 1 {
		t.Errorf("one caller got %+v, the other %+v; the bank has %d payments", p, taken, b.tokens())
	}
	eachOnce(t, dsn, 1)
}

// The address leads to a standby before that is promoted.
func TestAStandbyBehindTheAddressIsLeftUntilItIsPromoted(t *testing.T) {
	t.Parallel()
	pair := pgtest.StartPair(t, pgtest.FsyncOff, pgtest.RemoteApply) // or it may not know the database yet
	dsn := withProgramTable(t, pair.Database(t))
	database := nameOf(t, dsn)
	r, l, b := besieged(t, pair.Primary.DSN(database), postgres.Options{})
	if err := pair.Primary.Kill(); err != nil {
		t.Fatal(err)
	}
	r.lead(pair.Standby.DSN(database))
	time.Sleep(time.Second)
	if err := pair.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.awaitAnswers(t, 50)
	l.settle(t, dsn, b)
	if len(l.refusals) > 0 {
		t.Error("callers were told of it")
	}
	t.Log(l)
}

func nameOf(t *testing.T, dsn string) string {
	t.Helper()
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return config.Database
}

// So says a demoted server by way of a pooler, which does not tell what it leads to.
func TestAServerThatTakesNoWritesForAWhileIsNoCallersConcern(t *testing.T) {
	dsn := commonDatabase(t)
	r, l, b := besieged(t, dsn, postgres.Options{})
	database := pgx.Identifier{nameOf(t, dsn)}.Sanitize()
	execOn(t, dsn, `ALTER DATABASE `+database+` SET default_transaction_read_only = on`)
	r.lead(dsn) // by new connections
	time.Sleep(time.Second)
	execOn(t, pgtest.With(dsn, "default_transaction_read_only", "off"), `ALTER DATABASE `+database+` RESET default_transaction_read_only`)
	l.awaitAnswers(t, 50)
	l.settle(t, dsn, b)
	if len(l.refusals) > 0 {
		t.Error("callers were told of it")
	}
	t.Log(l)
}

func TestAServerWithoutRoomForAnotherConnectionIsAskedAgain(t *testing.T) {
	t.Parallel()
	const room = 4
	dsn := pgtest.Start(t, pgtest.FsyncOff, pgtest.Set("max_connections", strconv.Itoa(room)), pgtest.Set("superuser_reserved_connections", "0")).Database(t)
	r := newRelay(t, dsn)
	s := openStore(t, r.dsn, &postgres.Options{Logger: quiet})
	defer s.Close()
	r.lead("")
	var crowd []*pgx.Conn
	for range room {
		conn, err := pgx.Connect(t.Context(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		crowd = append(crowd, conn)
	}
	r.lead(dsn)
	time.AfterFunc(300*time.Millisecond, func() {
		for _, conn := range crowd {
			conn.Close(context.Background())
		}
	})
	if err := s.Update(t.Context(), func(tx pgx.Tx) error { return increment(tx, "row") }); err != nil {
		t.Error(err)
	}
}
