package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"github.com/google/uuid"
)

func TestMain(m *testing.M) {
	if os.Getenv(crashVariable) != "" {
		os.Exit(crash(os.Args[2:]))
	}
	pgtest.Main(m)
}

func placeFor(t *testing.T, c contender) place {
	p := place{dir: t.TempDir(), connections: 16}
	if c.on == onPostgres {
		p.dsn = pgtest.Database(t)
	}
	return p
}

func eachContender(t *testing.T, test func(t *testing.T, c contender)) {
	for _, c := range contenders {
		if !c.limit {
			t.Run(c.name, func(t *testing.T) { test(t, c) })
		}
	}
}

func opened(t *testing.T, c contender, p place) station {
	t.Helper()
	s, err := c.open(p)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What is measured must be the whole request: both business writes once, and the same answer when the key comes again.
func TestEveryContenderWritesOnceAndAnswersAgain(t *testing.T) {
	eachContender(t, func(t *testing.T, c contender) {
		p := placeFor(t, c)
		s := opened(t, c, p)
		ids := []string{keystate.NewID(), uuid.NewString(), keystate.NewID()}
		if _, err := race(s, len(ids), each(ids)); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(check(t.Context(), s, ids), checkCount(t.Context(), s, len(ids)), s.close()); err != nil {
			t.Fatal(err)
		}
		s = opened(t, c, p)
		if err := errors.Join(check(t.Context(), s, ids), checkCount(t.Context(), s, len(ids)), s.close()); err != nil {
			t.Errorf("opened again: %v", err)
		}
	})
}

func TestRequestsOfAKilledProcessAreTakenUp(t *testing.T) {
	eachContender(t, func(t *testing.T, c contender) {
		if c.hold > 0 {
			t.Skipf("its keys stay locked for %v", c.hold)
		}
		p := placeFor(t, c)
		ids := []string{keystate.NewID(), keystate.NewID(), keystate.NewID()}
		if err := leaveHanging(c, p, ids); err != nil {
			t.Fatal(err)
		}
		s := opened(t, c, p)
		if rows, err := s.rows(t.Context()); err != nil || rows < len(ids) {
			t.Errorf("%d business rows after the crash, %v", rows, err)
		}
		_, err := race(s, len(ids), each(ids))
		if err := errors.Join(err, check(t.Context(), s, ids), checkCount(t.Context(), s, len(ids)), s.close()); err != nil {
			t.Error(err)
		}
	})
}

// A faulty station does what a contender must not.
type faulty struct {
	station
	answer order
	row    []byte
	extra  int
}

func (f faulty) request(context.Context, string) (order, error)   { return f.answer, nil }
func (f faulty) business(context.Context, string) ([]byte, error) { return f.row, nil }
func (f faulty) rows(context.Context) (int, error)                { return 2 + f.extra, nil }

func TestACheckNoticesWhatIsMissing(t *testing.T) {
	good := faulty{answer: order{"id", 500, "12345678", receipt}, row: businessRow}
	of := func(change func(f *faulty)) faulty {
		f := good
		change(&f)
		return f
	}
	for _, test := range []struct {
		name string
		faulty
		sound bool
	}{
		{"nothing", good, true},
		{"another's answer", of(func(f *faulty) { f.answer.Account = "other" }), false},
		{"no payout", of(func(f *faulty) { f.answer.Payout = "" }), false},
		{"no receipt", of(func(f *faulty) { f.answer.Receipt = nil }), false},
		{"a short row", of(func(f *faulty) { f.row = f.row[1:] }), false},
		{"a row too many", of(func(f *faulty) { f.extra = 1 }), false},
		{"a row too few", of(func(f *faulty) { f.extra = -1 }), false},
	} {
		err := errors.Join(check(t.Context(), test, []string{"id"}), checkCount(t.Context(), test, 1))
		if (err == nil) != test.sound {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func TestSQLiteWaitsForTheDisk(t *testing.T) {
	for _, test := range []struct{ what, driver, parameters string }{
		{"by hand", sqliteDriver, sqliteParameters},
		{"DBOS", pureDriver, pureParameters},
		{"go-workflows", pureDriver, ""},
	} {
		db, err := sql.Open(test.driver, "file:"+filepath.Join(t.TempDir(), "a.sqlite")+test.parameters)
		if err != nil {
			t.Fatal(err)
		}
		const full = 2
		var level int
		if err := db.QueryRow("PRAGMA synchronous").Scan(&level); err != nil || level < full {
			t.Errorf("%s: synchronous=%d, %v", test.what, level, err)
		}
		db.Close()
	}
}

func TestAGroupOfStepsInSQLiteSparesThoseWhoseNeighbourFails(t *testing.T) {
	w, err := openSQLite(place{dir: t.TempDir()}, together)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	refuse := errors.New("refused")
	results := make(chan error, 20)
	w.mu.Lock() // so that they come together
	for i := range 20 {
		go func() {
			results <- together(w, func() error {
				if i == 7 {
					return refuse
				}
				_, err := w.exec(sqliteOrder, uuid.NewString(), businessRow)
				return err
			})
		}()
	}
	w.mu.Unlock()
	refused := 0
	for range 20 {
		if err := <-results; errors.Is(err, refuse) {
			refused++
		} else if err != nil {
			t.Error(err)
		}
	}
	if rows, err := w.rows(t.Context()); err != nil || refused != 1 || rows != 19 {
		t.Errorf("%d rows, %d refused, %v", rows, refused, err)
	}
}

func TestAFilledStoreIsAsGoodAsOneThatWasWorkedOn(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			const keys = 700
			p := place{dir: t.TempDir()}
			filled := 0
			if err := fillOnBolt(p, keys, k.past, func(n int) { filled += n }); err != nil || filled != keys {
				t.Fatal(filled, err)
			}
			if err := keystate.Verify(boltPath(p)); err != nil {
				t.Error(err)
			}
			e, err := openBoltEngine(p, forEver)
			if err != nil {
				t.Fatal(err)
			}
			defer e.close()
			if stats, err := e.Stats(t.Context()); err != nil || stats.Finished != keys {
				t.Errorf("%+v, %v", stats, err)
			}
			for r, err := range e.Keys(t.Context(), keystate.Filter{}) {
				if err != nil || r.Status != keystate.Answered || !bytes.Contains(r.State, []byte(r.Key.ID)) || time.Since(r.Ended) < pastEnd {
					t.Fatalf("%+v, %v", r, err)
				}
			}
		})
	}
}

func TestStoresByHandAreFilledWithWhatARequestLeaves(t *testing.T) {
	for _, c := range contenders {
		if c.fill == nil || c.on == onPostgres || c.name == keystateOnBolt {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			p := placeFor(t, c)
			var ids []string
			past := func(at time.Time) string {
				ids = append(ids, mintedID(at))
				return ids[len(ids)-1]
			}
			if err := c.fill(p, 300, past, func(int) {}); err != nil {
				t.Fatal(err)
			}
			s := opened(t, c, p)
			defer s.close()
			answer, err := s.request(t.Context(), ids[rand.IntN(len(ids))])
			if err != nil || answer.Cents != 500 || len(answer.Receipt) != len(receipt) {
				t.Errorf("%+v, %v", answer, err)
			}
			if rows, err := s.rows(t.Context()); err != nil || rows != 0 {
				t.Errorf("the request has run again: %d business rows, %v", rows, err)
			}
		})
	}
}

func TestADatabaseIsFilledWithWhatTheEngineReads(t *testing.T) {
	c, _ := named(contenders, keystateOnPostgres)
	p := placeFor(t, c)
	if err := c.fill(p, 500, randomID, func(int) {}); err != nil { // it checks itself
		t.Fatal(err)
	}
}

func TestALimitFinishesHalfOfItsMembers(t *testing.T) {
	for _, c := range limits {
		for _, group := range []int{1, 2, 7} {
			s := opened(t, c, place{dir: t.TempDir()})
			finished, commits := 0, 20
			for range commits {
				n, err := s.(writer).commit(group)
				if err != nil {
					t.Fatal(err)
				}
				finished += n
			}
			if want := commits * group / 2; finished < want-group || finished > want+group {
				t.Errorf("%s: %d finished in %d groups of %d", c.name, finished, commits, group)
			}
			if err := s.close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestIDsOfThePastLieInTheOrderOfTheirTimesIfMinted(t *testing.T) {
	var ids []string
	for batch := range batches(perBatch+10, mintedID) {
		ids = append(ids, batch...)
	}
	if len(ids) != perBatch+10 {
		t.Errorf("%d IDs", len(ids))
	}
	coarse := func(a, b string) int { return strings.Compare(a[:13], b[:13]) } // milliseconds
	if !slices.IsSortedFunc(ids, coarse) {
		t.Error("out of order")
	}
	if id, err := uuid.Parse(ids[0]); err != nil || id.Version() != 7 {
		t.Errorf("%s: %v", ids[0], err)
	}
}
