package pgbench

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/keystate"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The request that all contenders make, with a new key each time: a business write of 200 bytes (funds are reserved); an effect that does
// nothing (a payout is sent); a business write of 200 bytes (it is booked) and an answer of 300 bytes. It is the root package's
// benchmark request, with rows in the place of bbolt's pairs.

type order struct {
	Account string
	Cents   int64
	Payout  string
	Receipt []byte
}

var (
	businessRow = make([]byte, 200)
	receipt     = make([]byte, 260) // with the other fields, an answer of 300 bytes
)

const ordersTable = `CREATE TABLE IF NOT EXISTS orders (name text PRIMARY KEY, payload bytea NOT NULL)`

const insertOrder = `INSERT INTO orders (name, payload) VALUES ($1, $2)`

func write(ctx context.Context, tx pgx.Tx, name string) error {
	_, err := tx.Exec(ctx, insertOrder, name, businessRow)
	return err
}

// payOut is the effect.
func payOut(token string) string { return token[:8] }

// A contender makes the request in its own way.
type contender struct {
	name string
	open func(tb testing.TB, dsn string, connections int) station
}

// A station is a contender at work on a database.
type station interface {
	request(ctx context.Context, id string) (order, error)
	close()
}

var contenders = []contender{
	{"keystate", openEngine(pgx.Serializable, queuedWrites)},
	{"keystate, READ COMMITTED", openEngine(pgx.ReadCommitted, queuedWrites)},
	{"keystate, writes not queued", openEngine(pgx.Serializable, threePhases)},
	{"by hand, SERIALIZABLE", openByHand(inTransactions{isolation: pgx.Serializable})},
	{byHand, openByHand(inTransactions{isolation: pgx.ReadCommitted, lock: true})},
	{"by hand, READ COMMITTED, no SELECT FOR UPDATE", openByHand(inTransactions{isolation: pgx.ReadCommitted})},
	{"by hand, one statement per step", openByHand(inStatements{})},
	{"DBOS", openDBOS},
}

const byHand = "by hand, READ COMMITTED" // what the others are held against

var (
	flagCallers  = list{1, 16, 64, 256}
	flagPools    = list{16, 32, 64}
	flagTurns    = flag.Int("turns", 5, "how often each contender is measured")
	flagSlice    = flag.Duration("slice", 1500*time.Millisecond, "how long a contender is measured at a time")
	flagOnly     = flag.String("only", "", "measure the contenders whose names contain one of these texts, separated by |, and \""+byHand+"\"")
	flagKeys     = flag.String("keys", "ordered", "how keys are drawn: ordered (UUIDv7, as keystate.NewID does), or random (UUIDv4)")
	flagFinished = flag.Int("finished", 10_000_000, "finished keys in the full database")
)

func init() {
	flag.Var(&flagCallers, "callers", "numbers of callers at once")
	flag.Var(&flagPools, "pools", "numbers of connections to try: each contender gets the number that is best for it")
}

type list []int

func (l *list) String() string { return strings.Trim(fmt.Sprint(*l), "[]") }

func (l *list) Set(text string) error {
	*l = nil
	for _, word := range strings.Split(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		*l = append(*l, n)
	}
	return nil
}

// keyKind is what draws the keys, where a benchmark does not say it.
func keyKind() func() string {
	if *flagKeys == "random" {
		return uuid.NewString
	}
	return keystate.NewID
}

// A pace is how a station did for a while.
type pace struct {
	requests int
	took     time.Duration
}

func (p pace) rate() float64 { return float64(p.requests) / p.took.Seconds() }

// run lets so many callers make requests for a while.
func run(tb testing.TB, s station, callers int, d time.Duration, newID func() string) pace {
	tb.Helper()
	start := time.Now()
	return race(tb, s, callers, newID, func() bool { return time.Since(start) < d })
}

// runSome lets so many callers make so many requests between them.
func runSome(tb testing.TB, s station, callers, requests int) pace {
	tb.Helper()
	var begun atomic.Int64
	return race(tb, s, callers, keyKind(), func() bool { return begun.Add(1) <= int64(requests) })
}

func race(tb testing.TB, s station, callers int, newID func() string, more func() bool) pace {
	tb.Helper()
	var done atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range callers {
		wg.Go(func() {
			for more() {
				if _, err := s.request(context.Background(), newID()); err != nil {
					tb.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	if tb.Failed() {
		tb.FailNow()
	}
	return pace{int(done.Load()), time.Since(start)}
}

// openPool connects with so many connections at most, all else as pgx has it, and makes tables.
func openPool(tb testing.TB, dsn string, connections int, tables ...string) *pgxpool.Pool {
	tb.Helper()
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		tb.Fatal(err)
	}
	config.MaxConns = int32(connections)
	pool, err := pgxpool.NewWithConfig(tb.Context(), config)
	if err != nil {
		tb.Fatal(err)
	}
	for _, sql := range append(tables, ordersTable) {
		if _, err := pool.Exec(tb.Context(), sql); err != nil {
			tb.Fatalf("%s: %v", sql, err)
		}
	}
	return pool
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
