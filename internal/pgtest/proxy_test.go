package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

var withTable = NewTemplate(func(ctx context.Context, dsn string) error {
	return onConn(ctx, dsn, func(conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "CREATE TABLE t (n int)")
		return err
	})
})

// A way to insert one row, in a transaction or as one.
type way struct {
	name   string
	insert func(context.Context, *pgx.Conn) error
	sent   string // the types of the messages that it takes
	trips  int
	done   byte // the row is there as soon as the server gets the last message of this type
}

var ways = []way{
	{
		name: "a transaction by the simple protocol", sent: "QQQ", trips: 3, done: query,
		insert: func(ctx context.Context, conn *pgx.Conn) error {
			return inOrder(ctx, conn, "BEGIN", "INSERT INTO t VALUES (1)", "COMMIT")
		},
	},
	{
		name: "a transaction by the extended protocol", sent: "PBDESPBDESPBDES", trips: 3, done: execute,
		insert: func(ctx context.Context, conn *pgx.Conn) error {
			for _, sql := range []string{"BEGIN", "INSERT INTO t VALUES (1)", "COMMIT"} {
				if err := conn.PgConn().ExecParams(ctx, sql, nil, nil, nil, nil).Read().Err; err != nil {
					return err
				}
			}
			return nil
		},
	},
	{
		name: "a transaction in one batch", sent: "PBDEPBDEPBDES", trips: 1, done: execute,
		insert: func(ctx context.Context, conn *pgx.Conn) error {
			return conn.PgConn().ExecBatch(ctx, batch("BEGIN", "INSERT INTO t VALUES (1)", "COMMIT")).Close()
		},
	},
	{
		name: "a batch that is a transaction", sent: "PBDEPBDES", trips: 1, done: sync_,
		insert: func(ctx context.Context, conn *pgx.Conn) error {
			return conn.PgConn().ExecBatch(ctx, batch("SELECT 1", "INSERT INTO t VALUES (1)")).Close()
		},
	},
	{
		name: "a statement that is a transaction", sent: "Q", trips: 1, done: query,
		insert: func(ctx context.Context, conn *pgx.Conn) error { return inOrder(ctx, conn, "INSERT INTO t VALUES (1)") },
	},
}

func inOrder(ctx context.Context, conn *pgx.Conn, steps ...string) error {
	for _, sql := range steps {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

func batch(statements ...string) *pgconn.Batch {
	b := &pgconn.Batch{}
	for _, sql := range statements {
		b.ExecParams(sql, nil, nil, nil, nil)
	}
	return b
}

func through(t *testing.T, p *Proxy) *pgx.Conn {
	t.Helper()
	return connect(t, p.DSN())
}

// rawThrough is a connection through a proxy that the test speaks on itself.
func rawThrough(t *testing.T, p *Proxy) *pgconn.HijackedConn {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), p.DSN())
	if err != nil {
		t.Fatal(err)
	}
	raw, err := conn.Hijack()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Conn.Close() })
	return raw
}

// ready reads up to the end of an answer.
func ready(t *testing.T, raw *pgconn.HijackedConn) {
	t.Helper()
	for {
		m, err := raw.Frontend.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := m.(*pgproto3.ReadyForQuery); ok {
			return
		}
	}
}

func TestMessagesAndRoundTripsAreCounted(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			p := NewProxy(t, withTable.Database(t))
			conn := through(t, p)
			var sent strings.Builder
			p.Cut(BeforeRequest, func(m Message) bool {
				sent.WriteByte(m.Type)
				return false
			})
			before := p.Counts()
			if err := w.insert(t.Context(), conn); err != nil {
				t.Fatal(err)
			}
			got := p.Counts().Since(before)
			ran := strings.Count(w.sent, "Q") + strings.Count(w.sent, "E")
			if sent.String() != w.sent || got != (Counts{Messages: len(w.sent), RoundTrips: w.trips, Statements: ran}) {
				t.Errorf("%s: %+v", &sent, got)
			}
			if before != (Counts{Connections: 1}) {
				t.Errorf("to connect: %+v", before)
			}
		})
	}
}

func TestPipelinedSyncsAreOneRoundTripAndWhatIsPreparedIsNotPreparedAgain(t *testing.T) {
	p := NewProxy(t, withTable.Database(t))
	conn := through(t, p)
	for _, want := range []int{2, 1} { // the first time, its statements are prepared in one trip
		before := p.Counts()
		b := &pgx.Batch{}
		for n := range 3 {
			b.Queue("INSERT INTO t VALUES ($1)", n)
			b.Queue("SELECT count(*) FROM t WHERE n = $1", n)
		}
		if err := conn.SendBatch(t.Context(), b).Close(); err != nil {
			t.Fatal(err)
		}
		if got := p.Counts().Since(before).RoundTrips; got != want {
			t.Errorf("a batch took %d round trips, not %d", got, want)
		}
	}
	raw := rawThrough(t, p)
	before := p.Counts()
	for range 3 {
		raw.Frontend.SendParse(&pgproto3.Parse{Query: "INSERT INTO t VALUES (1)"})
		raw.Frontend.SendBind(&pgproto3.Bind{})
		raw.Frontend.SendExecute(&pgproto3.Execute{})
		raw.Frontend.SendSync(&pgproto3.Sync{})
	}
	if err := raw.Frontend.Flush(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		ready(t, raw)
	}
	if got, want := p.Counts().Since(before), (Counts{Messages: 12, Statements: 3, RoundTrips: 1}); got != want {
		t.Errorf("three Syncs in one go: %+v", got)
	}
}

// sweep cuts a way of inserting at each of its messages in turn, and calls check with what the client saw and had sent.
func sweep(t *testing.T, w way, place Place, check func(t *testing.T, direct *pgx.Conn, cut *Cut, n int)) {
	dsn := withTable.Database(t)
	p, direct := NewProxy(t, dsn), connect(t, dsn)
	for n := 1; n <= len(w.sent)+1; n++ {
		exec1(t, direct, "TRUNCATE t")
		conn := through(t, p)
		cut := p.Cut(place, Nth(n, Any))
		err := w.insert(t.Context(), conn)
		if n > len(w.sent) {
			if err != nil || cut.Happened() {
				t.Errorf("there is no message %d, and yet: %v, cut: %t", n, err, cut.Happened())
			}
			return
		}
		if err == nil || !cut.Happened() || codeOf(err) != "" {
			t.Fatalf("message %d: the client sees %v, cut: %t", n, err, cut.Happened())
		}
		if place != InFlight {
			exec1(t, direct, "BEGIN; LOCK TABLE t NOWAIT; COMMIT") // the server has let go of all by now
		}
		check(t, direct, cut, n)
		conn.Close(t.Context())
	}
}

func rows(t *testing.T, direct *pgx.Conn) int { return count(t, direct, "SELECT count(*) FROM t") }

// decides is the number of the message at which the row is there.
func (w way) decides() int { return strings.LastIndexByte(w.sent, w.done) + 1 }

// lastWith is the number of the last message that goes with the n-th: the one that asks for the answer.
func (w way) lastWith(n int) int {
	return n + slices.IndexFunc([]byte(w.sent[n-1:]), asks)
}

func rowIf(done bool) int {
	if done {
		return 1
	}
	return 0
}

func TestCutBeforeARequestLeavesOutThatAndAllAfterIt(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			sweep(t, w, BeforeRequest, func(t *testing.T, direct *pgx.Conn, _ *Cut, n int) {
				if got, want := rows(t, direct), rowIf(w.decides() < n); got != want {
					t.Errorf("before message %d: %d rows, not %d", n, got, want)
				}
			})
		})
	}
}

func TestCutOfAnAnswerComesAfterTheServerHasDoneIt(t *testing.T) {
	for _, place := range []Place{AfterRequest, MidAnswer} {
		for _, w := range ways {
			t.Run(fmt.Sprint(w.name, " ", place), func(t *testing.T) {
				sweep(t, w, place, func(t *testing.T, direct *pgx.Conn, _ *Cut, n int) {
					if got, want := rows(t, direct), rowIf(w.decides() <= w.lastWith(n)); got != want {
						t.Errorf("message %d: %d rows, not %d", n, got, want)
					}
				})
			})
		}
	}
}

func TestRequestInFlightIsDoneWhenItIsDeliveredAfterTheClientHasLooked(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			sweep(t, w, InFlight, func(t *testing.T, direct *pgx.Conn, cut *Cut, n int) {
				if w.decides() >= n {
					if got := count(t, direct, "SELECT count(*) FROM t"); got != 0 {
						t.Errorf("message %d in flight: %d rows", n, got)
					}
				}
				cut.Deliver()
				if got, want := rows(t, direct), rowIf(w.decides() <= w.lastWith(n)); got != want {
					t.Errorf("message %d delivered: %d rows, not %d", n, got, want)
				}
			})
		})
	}
}

func TestCutByTheSQLFindsPreparedStatementsByTheirText(t *testing.T) {
	dsn := withTable.Database(t)
	p, direct := NewProxy(t, dsn), connect(t, dsn)
	for _, prepared := range []bool{false, true} {
		exec1(t, direct, "TRUNCATE t")
		conn := through(t, p)
		if prepared {
			exec1(t, conn, "INSERT INTO t VALUES ($1)", 0)
			exec1(t, direct, "TRUNCATE t")
		}
		exec1(t, conn, "SELECT $1::int", 0)
		cut := p.Cut(AfterRequest, Runs("insert into T "))
		exec1(t, conn, "SELECT $1::int", 0)
		if cut.Happened() {
			t.Fatal("cut at a SELECT")
		}
		_, err := conn.Exec(t.Context(), "INSERT INTO t VALUES ($1)", 1)
		if err == nil || !cut.Happened() || rows(t, direct) != 1 {
			t.Errorf("prepared before %t: %v, cut: %t, %d rows", prepared, err, cut.Happened(), rows(t, direct))
		}
	}
}

func TestHalfOfTheAnswerArrivesWhereItIsCutInTheMiddle(t *testing.T) {
	const ofCommit = 12 + 6 // CommandComplete and ReadyForQuery
	for place, want := range map[Place]int{AfterRequest: 0, MidAnswer: ofCommit / 2, BeforeRequest: 0, InFlight: 0} {
		p := NewProxy(t, withTable.Database(t))
		raw := rawThrough(t, p)
		p.Cut(place, Runs("COMMIT"))
		raw.Frontend.SendQuery(&pgproto3.Query{String: "BEGIN"})
		if err := raw.Frontend.Flush(); err != nil {
			t.Fatal(err)
		}
		ready(t, raw)
		raw.Frontend.SendQuery(&pgproto3.Query{String: "COMMIT"})
		if err := raw.Frontend.Flush(); err != nil {
			t.Fatal(err)
		}
		if got, _ := io.ReadAll(raw.Conn); len(got) != want {
			t.Errorf("%v: %d bytes of the answer, not %d", place, len(got), want)
		}
	}
}

func TestCutAtAnAnswerThatAFlushAsksForNeedsNoSync(t *testing.T) {
	p := NewProxy(t, withTable.Database(t))
	raw := rawThrough(t, p)
	cut := p.Cut(MidAnswer, OfType(execute))
	raw.Frontend.SendParse(&pgproto3.Parse{Query: "INSERT INTO t VALUES (1)"})
	raw.Frontend.SendBind(&pgproto3.Bind{})
	raw.Frontend.SendExecute(&pgproto3.Execute{})
	raw.Frontend.Send(&pgproto3.Flush{})
	if err := raw.Frontend.Flush(); err != nil {
		t.Fatal(err)
	}
	const before, answer = 5 + 5, 16 // ParseComplete and BindComplete; CommandComplete
	if got, _ := io.ReadAll(raw.Conn); len(got) != before+answer/2 || !cut.Happened() {
		t.Errorf("%d bytes, cut: %t", len(got), cut.Happened())
	}
}

func TestFailureInABatchIsTheAnswerToWhatTheServerSkips(t *testing.T) {
	dsn := withTable.Database(t)
	for _, place := range []Place{AfterRequest, MidAnswer} {
		p, direct := NewProxy(t, dsn), connect(t, dsn)
		conn := through(t, p)
		cut := p.Cut(place, Runs("INSERT"))
		err := conn.PgConn().ExecBatch(t.Context(), batch("SELECT 1/0", "INSERT INTO t VALUES (1)")).Close()
		if err == nil || !cut.Happened() || rows(t, direct) != 0 {
			t.Errorf("%v: %v, cut: %t, %d rows", place, err, cut.Happened(), rows(t, direct))
		}
	}
	p := NewProxy(t, dsn)
	conn := through(t, p)
	for range 2 { // the proxy keeps up with what is skipped: the connection stays good
		err := conn.PgConn().ExecBatch(t.Context(), batch("SELECT 1/0", "INSERT INTO t VALUES (1)")).Close()
		if codeOf(err) != "22012" {
			t.Errorf("a failure comes through as %v", err)
		}
	}
	exec1(t, conn, "INSERT INTO t VALUES (1)")
}

func TestServersEndComesThrough(t *testing.T) {
	dsn := Database(t)
	p := NewProxy(t, With(dsn, "application_name", "victim"))
	conn := through(t, p)
	slept := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "SELECT pg_sleep(600)")
		slept <- err
	}()
	direct := connect(t, dsn)
	eventually(t, "the victim sleeps", func() bool {
		return count(t, direct, `SELECT count(*) FROM pg_stat_activity
			WHERE wait_event = 'PgSleep' AND datname = current_database()`) == 1
	})
	if _, err := Terminate(t.Context(), dsn, "victim"); err != nil {
		t.Fatal(err)
	}
	if err := <-slept; codeOf(err) != "57P01" {
		t.Errorf("the victim sees %v", err)
	}
}

func TestClientsCancellationReachesTheServer(t *testing.T) {
	p := NewProxy(t, Database(t))
	conn := through(t, p).PgConn()
	slept := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "SELECT pg_sleep(600)").ReadAll()
		slept <- err
	}()
	for {
		if err := conn.CancelRequest(t.Context()); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		select {
		case err := <-slept:
			if codeOf(err) != "57014" {
				t.Errorf("it sees %v", err)
			}
			return
		case <-time.After(5 * time.Millisecond): // it came before the query
		}
	}
}

func TestCutOfAllEndsEveryConnectionAndNewOnesAreGood(t *testing.T) {
	p := NewProxy(t, Database(t))
	for range 2 {
		one, two := through(t, p), through(t, p)
		p.CutAll()
		for _, conn := range []*pgx.Conn{one, two} {
			if _, err := conn.Exec(t.Context(), "SELECT 1"); err == nil {
				t.Error("a connection lives on")
			}
		}
	}
	exec1(t, through(t, p), "SELECT 1")
}

func TestConnectionCanBeCutAsItOpens(t *testing.T) {
	for _, place := range []Place{BeforeRequest, AfterRequest, MidAnswer} {
		p := NewProxy(t, Database(t))
		cut := p.Cut(place, OfType(startup))
		if conn, err := pgx.Connect(t.Context(), p.DSN()); err == nil || !cut.Happened() {
			t.Errorf("%v: %v, %v, cut: %t", place, conn, err, cut.Happened())
		}
		exec1(t, through(t, p), "SELECT 1")
	}
}

func TestDelayIsThatOfEachDirection(t *testing.T) {
	p := NewProxy(t, Database(t))
	conn := through(t, p)
	const each = 30 * time.Millisecond
	p.Delay(each)
	began := time.Now()
	exec1(t, conn, "SELECT 1")
	if took := time.Since(began); took < 2*each {
		t.Errorf("a round trip took %v", took)
	}
}

func TestCutConnectionTakesItsCancellationsWithIt(t *testing.T) {
	dsn := withTable.Database(t)
	p, direct := NewProxy(t, dsn), connect(t, dsn)
	conn := through(t, p).PgConn()
	cut := p.Cut(InFlight, Runs("INSERT"))
	_, err := conn.Exec(t.Context(), "INSERT INTO t SELECT 1 FROM pg_sleep(0.05)").ReadAll()
	if err == nil || !cut.Happened() {
		t.Fatalf("%v, cut: %t", err, cut.Happened())
	}
	delivered := make(chan struct{})
	go func() { cut.Deliver(); close(delivered) }()
	for over := false; !over; {
		conn.CancelRequest(t.Context()) // pgx does so too, in the background
		select {
		case <-delivered:
			over = true
		default:
		}
	}
	if n := rows(t, direct); n != 1 {
		t.Errorf("%d rows", n)
	}
}

func TestProxyEndsThoughARequestIsInFlight(t *testing.T) {
	dsn := withTable.Database(t)
	t.Run("test", func(t *testing.T) {
		p := NewProxy(t, dsn)
		conn := through(t, p)
		p.Cut(InFlight, Runs("INSERT"))
		if _, err := conn.Exec(t.Context(), "INSERT INTO t VALUES (1)"); err == nil {
			t.Error("it came through")
		}
	})
	if n := rows(t, connect(t, dsn)); n != 0 {
		t.Errorf("%d rows of what was never delivered", n)
	}
}
