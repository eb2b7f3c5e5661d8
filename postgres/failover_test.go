package postgres_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var (
	failovers = flag.Int("failovers", 2, "how often the primary is killed")
	unmanned  = flag.Duration("unmanned", 0, "how long nobody promotes the standby after that")
)

// A ledger is what the callers of many payments were told. A caller who gets an error asks again with the same key, as a client does.
type ledger struct {
	offices []*office
	count   atomic.Int64 // payments that were begun
	stopped atomic.Bool
	callers sync.WaitGroup

	mu       sync.Mutex
	answers  map[int]payment
	refusals map[string]int // by what they say
	lastGood time.Time
}

// besiege lets callers ask for one new payment after the other, at any of the offices, until settle.
func besiege(offices []*office, callers int) *ledger {
	l := &ledger{offices: offices, answers: map[int]payment{}, refusals: map[string]int{}}
	for range callers {
		l.callers.Go(func() {
			for !l.stopped.Load() {
				l.payOne()
			}
		})
	}
	return l
}

// payOne asks for a new payment until it has an answer.
func (l *ledger) payOne() {
	n := int(l.count.Add(1) - 1)
	for {
		f := l.offices[rand.IntN(len(l.offices))]
		p, err := f.payments.Do(context.Background(), keyOf(n), paymentOf(n))
		if err == nil {
			l.note(n, p)
			return
		}
		l.refused(err)
		time.Sleep(time.Duration(5+rand.IntN(10)) * time.Millisecond)
	}
}

func paymentOf(n int) payment { return payment{Name: fmt.Sprint(n), Cents: n} }

func (l *ledger) note(n int, p payment) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[n], l.lastGood = p, time.Now()
}

func (l *ledger) refused(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refusals[kindOf(err)]++
}

func (l *ledger) answered() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.answers)
}

// kindOf is an error without what differs from one to the next.
func kindOf(err error) string {
	var said *pgconn.PgError
	var refused *pgconn.ConnectError
	var kinds []string
	for _, known := range []error{keystate.ErrStorageFull, keystate.ErrOutcomeUnknown, keystate.ErrClosed, keystate.ErrFenced, keystate.ErrParked, context.DeadlineExceeded} {
		if errors.Is(err, known) {
			kinds = append(kinds, known.Error())
		}
	}
	isRefused, isSaid := errors.As(err, &refused), errors.As(err, &said)
	if isRefused {
		kinds = append(kinds, "no connection")
	}
	if isSaid {
		kinds = append(kinds, said.Code+" "+said.Message)
	}
	if !isRefused && !isSaid {
		kinds = append(kinds, err.Error()[max(0, len(err.Error())-40):])
	}
	return strings.Join(kinds, ", ")
}

// awaitAnswers waits until so many more payments have their answers.
func (l *ledger) awaitAnswers(t *testing.T, more int) {
	t.Helper()
	target := l.answered() + more
	eventually(t, fmt.Sprintf("%d payments are answered", target), func() bool { return l.answered() >= target })
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came that %s", what)
		}
	}
}

// settle lets the callers finish, and checks what they were told against what every office says and what the database holds: the same answers,
// each commit once, and each effect under one token.
func (l *ledger) settle(t *testing.T, dsn string, b *bank) {
	t.Helper()
	l.stopped.Store(true)
	l.callers.Wait()
	l.check(t, dsn, b)
}

func (l *ledger) check(t *testing.T, dsn string, b *bank) {
	t.Helper()
	begun := int(l.count.Load())
	if len(l.answers) != begun {
		t.Errorf("%d payments were begun, %d answered", begun, len(l.answers))
	}
	turns := make(chan int)
	var askers sync.WaitGroup
	for range 8 {
		askers.Go(func() {
			for n := range turns {
				l.replays(t, n)
			}
		})
	}
	for n := range l.answers {
		turns <- n
	}
	close(turns)
	askers.Wait()
	if b.tokens() != begun {
		t.Errorf("of %d payments, the bank has %d", begun, b.tokens())
	}
	eachOnce(t, dsn, begun)
}

// replays checks that an office gives an answer again.
func (l *ledger) replays(t *testing.T, n int) {
	told := l.answers[n]
	run, err := l.offices[n%len(l.offices)].payments.Start(t.Context(), keyOf(n), paymentOf(n))
	if err != nil {
		t.Errorf("payment %d was answered, and now: %v", n, err)
		return
	}
	if again, err := run.Wait(t.Context()); err != nil || again != told || !run.Replayed() {
		t.Errorf("payment %d was %+v, and now is %+v (replayed: %v), %v", n, told, again, run.Replayed(), err)
	}
}

// repeated is how often effects were called beyond once per token.
func (b *bank) repeated() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, calls := range b.calls {
		n += calls - 1
	}
	return n
}

func (l *ledger) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprintf("%d payments answered; refusals: %v", len(l.answers), l.refusals)
}

// withProgramTable makes the program's table in a database of a server of the test's own.
func withProgramTable(t *testing.T, dsn string) string {
	t.Helper()
	execOn(t, dsn, `CREATE TABLE program_counts (name text PRIMARY KEY, n integer NOT NULL)`)
	return dsn
}

func execOn(t *testing.T, dsn, sql string) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// openOffices opens so many engines on a database.
func openOffices(t *testing.T, dsn string, n int, b *bank, o postgres.Options) (offices []*office) {
	t.Helper()
	for i := range n {
		offices = append(offices, openOffice(t, dsn, fmt.Sprint(i), b, o, false))
	}
	return offices
}

// A failover is how long things took from the death of the primary.
type failover struct {
	promoted time.Duration // until the standby took writes
	first    time.Duration // until a request was answered that was begun after it
	anybody  time.Duration // until any of the waiting ones was
}

// TestFailoverLosesNoAnswerAndRunsNothingTwice kills the primary at random moments, promotes the standby, and lets the old primary come back as
// the new one's standby, while three engines are at work:
//
//	go test -run FailoverLosesNoAnswer -failovers 100 -timeout 0 -v
//	go test -run FailoverLosesNoAnswer -failovers 5 -unmanned 20s -timeout 0 -v
func TestFailoverLosesNoAnswerAndRunsNothingTwice(t *testing.T) {
	pair := pgtest.StartPair(t)
	dsn := withProgramTable(t, pair.Database(t))
	b := &bank{}
	l := besiege(openOffices(t, dsn, 3, b, postgres.Options{}), 16)
	var took []failover
	said := time.Now()
	for n := range *failovers {
		l.awaitAnswers(t, 50)
		time.Sleep(rand.N(100 * time.Millisecond)) // the moment is to be a random one
		took = append(took, failOver(t, pair, l))
		if err := pair.Rejoin(t.Context()); err != nil {
			t.Fatal(err)
		}
		if time.Since(said) > 10*time.Second {
			said = time.Now()
			t.Logf("%d failovers; %s", n+1, l)
		}
	}
	l.awaitAnswers(t, 50)
	l.settle(t, dsn, b)
	t.Logf("%s; %d effects were sent again under their token", l, b.repeated())
	report(t, took)
}

// failOver kills the primary and promotes the standby under a caller who asks as soon as the primary is dead.
func failOver(t *testing.T, pair *pgtest.Pair, l *ledger) (f failover) {
	t.Helper()
	if err := pair.Primary.Kill(); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	first := make(chan time.Duration, 1)
	go func() {
		l.payOne()
		first <- time.Since(killed)
	}()
	time.Sleep(*unmanned)
	if err := pair.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	promoted := time.Now()
	f.promoted = promoted.Sub(killed)
	eventually(t, "a payment is answered", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		f.anybody = l.lastGood.Sub(killed)
		return l.lastGood.After(promoted)
	})
	f.first = <-first
	return f
}

func report(t *testing.T, took []failover) {
	t.Helper()
	for _, c := range []struct {
		what string
		of   func(failover) time.Duration
	}{
		{"from the kill until the standby took writes", func(f failover) time.Duration { return f.promoted }},
		{"until the first answer to anybody", func(f failover) time.Duration { return f.anybody }},
		{"until the answer to a request that came after the kill", func(f failover) time.Duration { return f.first }},
		{"of which after the promotion", func(f failover) time.Duration { return f.first - f.promoted }},
	} {
		var all []time.Duration
		for _, f := range took {
			all = append(all, c.of(f).Round(time.Millisecond))
		}
		slices.Sort(all)
		if len(all) > 0 {
			t.Logf("%s: median %s, longest %s of %d", c.what, all[len(all)/2], all[len(all)-1], len(all))
		}
	}
}

func codeOf(err error) string {
	var said *pgconn.PgError
	if errors.As(err, &said) {
		return said.Code
	}
	return ""
}
