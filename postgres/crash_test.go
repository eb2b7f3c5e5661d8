package postgres_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/keytest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// A mortal store is that of a process that can be killed: all that the server sees of its death is that its connections are gone.
type mortal struct {
	*postgres.Store
	*keytest.Connections
	pool *pgxpool.Pool
}

// The engine is to read through it as it does in production: in one trip.
var _ interface {
	Get(ctx context.Context, key keystate.Key) (keystate.Record, error)
} = mortal{}

// Close is called for the dead, too; what they say by then reaches nobody.
func (m mortal) Close() error {
	defer m.pool.Close()
	return m.Store.Close()
}

// openMortal opens the store that lives in a schema of its own, on a server that goes by the clock of the test's bubble.
func openMortal(t testing.TB, dsn, schema string, o postgres.Options) mortal {
	t.Helper()
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	conns := new(keytest.Connections)
	config.ConnConfig.DialFunc = conns.Dial
	config.ConnConfig.RuntimeParams["search_path"] = schema + ", pg_catalog" // so that the schema's clock comes first
	config.PrepareConn = tellTheTime
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), `CREATE SCHEMA IF NOT EXISTS `+schema+`; CREATE OR REPLACE FUNCTION `+schema+`.clock_timestamp()
		RETURNS timestamptz LANGUAGE sql AS $$ SELECT current_setting('keytest.now')::timestamptz $$`); err != nil {
		t.Fatal(err)
	}
	o.Schema, o.Logger = schema, slog.New(slog.DiscardHandler)
	store, err := postgres.New(t.Context(), pool, &o)
	if err != nil {
		t.Fatal(err)
	}
	return mortal{store, conns, pool}
}

// tellTheTime is called for each connection that is taken from the pool.
func tellTheTime(ctx context.Context, conn *pgx.Conn) (bool, error) {
	_, err := conn.Exec(ctx, `SELECT set_config('keytest.now', $1, false)`, time.Now().Format(time.RFC3339Nano))
	return err == nil, err
}

// An order is the state of the machine in these tests.
type order struct {
	From, To string
	Cents    int64
	Payout   string // filled in by payout_sent
}

type (
	phase    = keystate.Phase[pgx.Tx, order]
	testCase = keytest.Case[pgx.Tx, order]
	engine   = keystate.Engine[pgx.Tx]
)

func openBooks(tx pgx.Tx) error {
	_, err := tx.Exec(context.Background(), `
		CREATE TABLE accounts (name text PRIMARY KEY, cents bigint NOT NULL CHECK (cents >= 0));
		CREATE TABLE payouts (number text PRIMARY KEY, payee text NOT NULL);
		CREATE TABLE fees (cents bigint NOT NULL);
		INSERT INTO accounts VALUES ('ada', 1000), ('bob', 0), ('reserved', 0)`)
	return err
}

func move(ctx context.Context, tx pgx.Tx, from, to string, cents int64) error {
	_, err1 := tx.Exec(ctx, `UPDATE accounts SET cents = cents - $2 WHERE name = $1`, from, cents)
	_, err2 := tx.Exec(ctx, `UPDATE accounts SET cents = cents + $2 WHERE name = $1`, to, cents)
	return cmp.Or(err1, err2)
}

func reserve(ctx context.Context, tx pgx.Tx, o *order) error {
	return move(ctx, tx, o.From, "reserved", o.Cents)
}

func pay(w *keytest.World) func(ctx context.Context, token string, o *order) error {
	return func(ctx context.Context, token string, o *order) (err error) {
		o.Payout, err = w.Do(ctx, token, fmt.Sprintf("pay %s %d", o.To, o.Cents))
		return err
	}
}

func book(ctx context.Context, tx pgx.Tx, o *order) error {
	_, err := tx.Exec(ctx, `INSERT INTO payouts VALUES ($1, $2)`, o.Payout, o.To)
	return cmp.Or(err, move(ctx, tx, "reserved", o.To, o.Cents))
}

func sound(w *keytest.World) []phase {
	return []phase{
		{To: "funds_reserved", Commit: reserve},
		{To: "payout_sent", Effect: pay(w)},
		{To: keystate.Finished, Commit: book},
	}
}

// with changes one of the sound phases.
func with(w *keytest.World, n int, change func(*phase)) []phase {
	phases := sound(w)
	change(&phases[n])
	return phases
}

// tables reads what the program has written.
func tables(tx pgx.Tx) (any, error) {
	all := map[string][]map[string]any{}
	for _, name := range []string{"accounts", "payouts", "fees"} {
		rows, err := tx.Query(context.Background(), `SELECT * FROM `+name+` ORDER BY 1`)
		if err != nil {
			return nil, err
		}
		if all[name], err = pgx.CollectRows(rows, pgx.RowToMap); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func conserved(tx pgx.Tx, _ order, _ error) error {
	var sum, reserved int64
	if err := tx.QueryRow(context.Background(), `SELECT sum(cents)::bigint, COALESCE(sum(cents) FILTER (WHERE name = 'reserved'), 0)::bigint FROM accounts`).Scan(&sum, &reserved); err != nil {
		return err
	}
	if sum != 1000 || reserved != 0 {
		return fmt.Errorf("there are %d cents and %d of them reserved, of 1000", sum, reserved)
	}
	return nil
}

// onServer is a case whose stores live in a database. The phases get the connections of their process. The next process starts while the lease of
// one that was killed still holds.
func onServer(dsn string, phases func(pool *pgxpool.Pool) []phase) testCase {
	var opened *pgxpool.Pool
	return testCase{
		Phases: func(*engine) []phase { return phases(opened) },
		Setup:  openBooks, Check: conserved, Contents: tables, Request: order{From: "ada", To: "bob", Cents: 500},
		Open: func(t testing.TB, dir string) keystate.Store[pgx.Tx] {
			s := openMortal(t, dsn, schemaOf(dir), postgres.Options{Lease: time.Minute})
			opened = s.pool
			return s
		},
	}
}

func TestSoundPhasesSurviveEveryCrash(t *testing.T) {
	dsn := pgtest.Database(t)
	keytest.Crash(t, func(w *keytest.World) testCase {
		return onServer(dsn, func(*pgxpool.Pool) []phase { return sound(w) })
	})
}

func TestWhoIsKilledSaysNoGoodbye(t *testing.T) {
	dsn := pgtest.Database(t)
	synctest.Test(t, func(t *testing.T) {
		boots := func(killed bool) (left int) {
			schema := fmt.Sprintf("killed_%v", killed)
			s, o := openMortal(t, dsn, schema, postgres.Options{}), openMortal(t, dsn, schema, postgres.Options{})
			defer o.Close()
			if _, _, err := s.Boot(t.Context()); err != nil {
				t.Fatal(err)
			}
			if killed {
				s.Kill()
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := o.pool.QueryRow(t.Context(), `SELECT count(*) FROM boots`).Scan(&left); err != nil {
				t.Fatal(err)
			}
			return left
		}
		if closed, killed := boots(false), boots(true); closed != 0 || killed != 1 {
			t.Errorf("%d leases are left by a process that was closed, %d by one that was killed", closed, killed)
		}
	})
}

func TestADeadProcessHoldsItsKeysForALeaseOfTheBubblesTime(t *testing.T) {
	dsn := pgtest.Database(t)
	for _, lease := range []time.Duration{10 * time.Second, 10 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			schema := fmt.Sprintf("lease_%d", lease/time.Second)
			dead, other := openMortal(t, dsn, schema, postgres.Options{Lease: lease}), openMortal(t, dsn, schema, postgres.Options{Lease: lease})
			defer other.Close()
			defer dead.Close()
			_, epoch, err := dead.Boot(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			dead.Kill()
			alive := func() (alive bool) {
				if err := other.View(t.Context(), func(tx pgx.Tx) (err error) {
					alive, err = other.Alive(tx, epoch)
					return err
				}); err != nil {
					t.Fatal(err)
				}
				return alive
			}
			time.Sleep(lease - time.Second)
			before := alive()
			time.Sleep(2 * time.Second)
			if after := alive(); !before || after {
				t.Errorf("with a lease of %v: alive %v a second before its end, and %v a second after", lease, before, after)
			}
		})
	}
}

// broken are phases that keytest must see through, with what it says of them.
var broken = []struct {
	name  string
	build func(w *keytest.World, pool *pgxpool.Pool) []phase
	where string // the scenario
	says  []string
}{
	{"an effect makes a token of its own", func(w *keytest.World, _ *pgxpool.Pool) []phase {
		return with(w, 1, func(p *phase) {
			p.Effect = func(ctx context.Context, _ string, o *order) error { return pay(w)(ctx, keystate.NewID(), o) }
		})
	}, "killed_after_the_effect_of_payout_sent_and_before_its_commit", []string{`has done "pay bob 500" twice`, "does not pass its token on"}},

	{"a commit counts in memory", func(w *keytest.World, _ *pgxpool.Pool) []phase {
		n := 0
		return with(w, 2, func(p *phase) {
			p.Commit = func(ctx context.Context, tx pgx.Tx, o *order) error {
				n++
				o.Payout = fmt.Sprintf("%s, number %d", o.Payout, n)
				return book(ctx, tx, o)
			}
		})
	}, "the_transaction_of_payout_sent_and_finished_is_undone_and_run_again", []string{"the store's payouts.0.number", "a clock, a random number, memory"}},

	{"a commit asks the server's clock", func(w *keytest.World, _ *pgxpool.Pool) []phase {
		return with(w, 2, func(p *phase) {
			p.Commit = func(ctx context.Context, tx pgx.Tx, o *order) error {
				_, err := tx.Exec(ctx, `INSERT INTO payouts VALUES ('at ' || clock_timestamp(), '')`)
				return cmp.Or(err, book(ctx, tx, o))
			}
		})
	}, "the_transaction_of_payout_sent_and_finished_is_undone_and_run_again", []string{"the store's payouts.0.number", "a clock"}},

	{"a commit writes past its transaction", func(w *keytest.World, pool *pgxpool.Pool) []phase {
		return with(w, 0, func(p *phase) {
			p.Commit = func(ctx context.Context, tx pgx.Tx, o *order) error {
				_, err := pool.Exec(ctx, `INSERT INTO fees VALUES (7)`)
				return cmp.Or(err, reserve(ctx, tx, o))
			}
		})
	}, "killed_in_the_transaction_of_funds_reserved", []string{"the store's fees", "past tx"}},

	{"an effect writes to the database by itself", func(w *keytest.World, pool *pgxpool.Pool) []phase {
		return with(w, 1, func(p *phase) {
			p.Effect = func(ctx context.Context, token string, o *order) error {
				_, err := pool.Exec(ctx, `INSERT INTO fees VALUES (7)`)
				return cmp.Or(err, pay(w)(ctx, token, o))
			}
		})
	}, "stands_still_after_the_effect_of_payout_sent_until_another_process_has_taken_over", []string{"the store's fees", "writes to the store by itself"}},
}

// A test that is to fail does so in a process of its own, where brokenDatabase names the database.
const brokenDatabase = "KEYSTATE_TEST_BROKEN_DATABASE"

func TestBrokenPhasesAreFound(t *testing.T) {
	for _, b := range broken {
		t.Run(b.name, func(t *testing.T) {
			failsElsewhere(t, b.where, b.says, func(dsn string) {
				keytest.Crash(t, func(w *keytest.World) testCase {
					return onServer(dsn, func(pool *pgxpool.Pool) []phase { return b.build(w, pool) })
				})
			})
		})
	}
}

// failsElsewhere runs a test, or the one of its subtests that is named, which must fail, and say certain things.
func failsElsewhere(t *testing.T, subtest string, says []string, test func(dsn string)) {
	t.Helper()
	if dsn := os.Getenv(brokenDatabase); dsn != "" {
		test(dsn)
		return
	}
	names := strings.Split(strings.TrimSuffix(t.Name()+"/"+subtest, "/"), "/")
	var path []string // as -test.run wants it
	for _, name := range names {
		path = append(path, "^"+regexp.QuoteMeta(name)+"$")
	}
	child := exec.Command(os.Args[0], "-test.run="+strings.Join(path, "/"), "-test.timeout=100s", "-rapid.nofailfile", "-rapid.shrinktime=200ms")
	child.Env = append(os.Environ(), brokenDatabase+"="+pgtest.Database(t))
	said, err := child.CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(said), "--- FAIL: "+strings.Join(names, "/")) {
		t.Fatalf("nothing is found: %v\n%s", err, said)
	}
	for _, want := range says {
		if !strings.Contains(string(said), want) {
			t.Errorf("it does not say %q", want)
		}
	}
	t.Logf("%s", said)
}
