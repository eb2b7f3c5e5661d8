package postgres_test

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"strconv"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/keytest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"
)

// An errand is a request that says of what phases its machine is, and the state of it.
type errand struct {
	Steps     []step
	Isolation pgx.TxIsoLevel
	Lease     time.Duration
	Receipts  []string // filled in by effects
}

// A step is a phase.
type step struct {
	Moves  int64  // cents from ada to bob, in its commit; 0: it has none
	Asks   string // of the world, in its effect; empty: it has none
	Once   bool   // the effect must not run twice
	Stages bool   // the commit leaves another errand behind
}

var steps = rapid.Custom(func(t *rapid.T) step {
	return step{
		Moves:  rapid.SampledFrom([]int64{0, 1, 300, 600}).Draw(t, "moves"),
		Asks:   rapid.SampledFrom([]string{"", "pay", "tell"}).Draw(t, "asks"),
		Once:   rapid.IntRange(0, 3).Draw(t, "once") == 3,
		Stages: rapid.IntRange(0, 3).Draw(t, "stages") == 3,
	}
})

var errands = rapid.Custom(func(t *rapid.T) errand {
	return errand{
		Steps:     rapid.SliceOfN(steps, 1, 4).Draw(t, "steps"),
		Isolation: rapid.SampledFrom([]pgx.TxIsoLevel{pgx.Serializable, pgx.RepeatableRead, pgx.ReadCommitted}).Draw(t, "isolation"),
		Lease:     rapid.SampledFrom([]time.Duration{time.Minute, 5 * time.Second}).Draw(t, "lease"), // over when the next process starts, and not
	}
})

// phasesOf makes an errand's phases.
func phasesOf(w *keytest.World, e *engine, request errand) (phases []keystate.Phase[pgx.Tx, errand]) {
	told, err := keystate.Register(e, "tell", []keystate.Phase[pgx.Tx, string]{{To: keystate.Finished, Effect: func(ctx context.Context, token string, whom *string) error {
		_, err := w.Do(ctx, token, "tell "+*whom)
		return err
	}}})
	if err != nil {
		panic(err)
	}
	for n, s := range request.Steps {
		p := keystate.Phase[pgx.Tx, errand]{To: keystate.RecoveryPoint(fmt.Sprintf("step_%d", n)), Commit: s.commit(n, told)}
		if s.Asks != "" {
			p.Effect, p.AtMostOnce = s.effect(w, n), s.Once
		}
		phases = append(phases, p)
	}
	phases[len(phases)-1].To = keystate.Finished
	return phases
}

func (s step) effect(w *keytest.World, n int) func(context.Context, string, *errand) error {
	return func(ctx context.Context, token string, e *errand) error {
		receipt, err := w.Do(ctx, token, fmt.Sprintf("%s, in step %d", s.Asks, n))
		e.Receipts = append(e.Receipts, receipt)
		return err
	}
}

// commit moves money, and lets a row that is not to be there twice bear witness. Who has too little is refused.
func (s step) commit(n int, told *keystate.Machine[string]) func(context.Context, pgx.Tx, *errand) error {
	return func(ctx context.Context, tx pgx.Tx, e *errand) error {
		var left int64
		if err := tx.QueryRow(ctx, `SELECT cents FROM accounts WHERE name = 'ada'`).Scan(&left); err != nil {
			return err
		}
		if left < s.Moves {
			return keystate.Final(fmt.Errorf("%d cents are left", left))
		}
		_, err := tx.Exec(ctx, `INSERT INTO payouts VALUES ($1, $2)`, fmt.Sprint("step ", n), fmt.Sprint(e.Receipts))
		if s.Stages {
			err = cmp.Or(err, keystate.Stage(tx, told, keystate.Key{Scope: "tell", ID: fmt.Sprint(n)}, fmt.Sprint("bob of step ", n)))
		}
		return cmp.Or(err, move(ctx, tx, "ada", "bob", s.Moves))
	}
}

func errandOn(dsn string, w *keytest.World, request errand) keytest.Case[pgx.Tx, errand] {
	return keytest.Case[pgx.Tx, errand]{
		Phases: func(e *engine) []keystate.Phase[pgx.Tx, errand] { return phasesOf(w, e, request) },
		Setup:  openBooks, Contents: tables,
		Check: func(tx pgx.Tx, _ errand, err error) error { return conserved(tx, order{}, err) },
		Open: func(t testing.TB, dir string) keystate.Store[pgx.Tx] {
			return openMortal(t, dsn, schemaOf(dir), postgres.Options{Isolation: request.Isolation, Lease: request.Lease})
		},
	}
}

// fewer makes rapid draw so many requests, unless a flag says how many.
func fewer(t *testing.T, checks int) {
	t.Helper()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "rapid.checks" })
	if given {
		return
	}
	before := flag.Lookup("rapid.checks").Value.String()
	set := func(value string) {
		if err := flag.Lookup("rapid.checks").Value.Set(value); err != nil { // not flag.Set, after which it would be given
			t.Fatal(err)
		}
	}
	set(strconv.Itoa(checks))
	t.Cleanup(func() { set(before) })
}

func TestAnyMachineSurvivesWhateverIsAskedOfIt(t *testing.T) {
	fewer(t, 30)
	dsn := pgtest.Database(t)
	keytest.Property(t, errands, func(w *keytest.World, request errand) keytest.Case[pgx.Tx, errand] {
		return errandOn(dsn, w, request)
	})
}

func TestAMachineThatIsBrokenForSomeRequestsIsFound(t *testing.T) {
	failsElsewhere(t, "", []string{"draw request: postgres_test.errand", "twice; without a fault, once", "does not pass its token on"}, func(dsn string) {
		keytest.Property(t, errands, func(w *keytest.World, request errand) keytest.Case[pgx.Tx, errand] {
			c := errandOn(dsn, w, request)
			c.Phases = func(e *engine) []keystate.Phase[pgx.Tx, errand] {
				phases := phasesOf(w, e, request)
				if last := &phases[len(phases)-1]; len(phases) > 1 && last.Effect != nil {
					effect := last.Effect
					last.Effect = func(ctx context.Context, _ string, s *errand) error { return effect(ctx, keystate.NewID(), s) }
				}
				return phases
			}
			return c
		})
	})
}
