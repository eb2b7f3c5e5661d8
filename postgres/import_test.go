package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

// A sample is a record in some state of its life.
func sample() *rapid.Generator[keystate.Record] {
	text := rapid.StringN(0, 20, 60)
	when := rapid.Custom(func(t *rapid.T) time.Time {
		return time.UnixMicro(rapid.Int64Range(1, time.Now().UnixMicro()).Draw(t, "at")).UTC()
	})
	return rapid.Custom(func(t *rapid.T) keystate.Record {
		r := keystate.Record{
			Machine: rapid.StringN(1, 10, 30).Draw(t, "machine"), Created: when.Draw(t, "created"), Point: "somewhere",
			Status:   rapid.SampledFrom([]keystate.Status{keystate.Running, keystate.Waiting, keystate.Parked, keystate.Answered, keystate.Answered}).Draw(t, "status"),
			State:    rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "state"),
			Epoch:    1,
			Attempts: rapid.IntRange(0, 9).Draw(t, "attempts"), Begun: "elsewhere", FirstTried: when.Draw(t, "tried"),
			Acted: rapid.Bool().Draw(t, "acted"), Resend: rapid.Bool().Draw(t, "resend"), LastError: text.Draw(t, "error"),
		}
		for i := range 32 {
			[]([]byte){r.Incarnation[:], r.Fingerprint[:]}[i/16][i%16] = rapid.Byte().Draw(t, "b")
		}
		switch r.Status {
		case keystate.Waiting:
			r.Due = when.Draw(t, "due")
		case keystate.Parked:
			r.ParkReason = keystate.Indeterminate
		case keystate.Answered:
			r.Point, r.Ended = keystate.Finished, when.Draw(t, "ended") // in no order: clocks are set back, or were ahead
			if rapid.IntRange(0, 9).Draw(t, "ahead") == 0 {
				r.Ended = time.Now().Add(1000 * time.Hour).Truncate(time.Microsecond).UTC()
			}
			if rapid.Bool().Draw(t, "refused") {
				r.Refusal = &keystate.Refusal{Before: "elsewhere", Reason: text.Draw(t, "reason")}
			}
		}
		r.History = []keystate.Passage{{Point: keystate.Started, At: r.Created}, {Point: r.Point, At: r.Created, Attempts: 1, Ignored: text.Draw(t, "ignored")}}
		return r
	})
}

// fileOf makes a store's file with so many records, some of them written more than once, and a few large.
func fileOf(t testing.TB, records int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.db")
	onFile(t, path, func(s keystate.Store[*bbolt.Tx]) error {
		const each, kinds = 500, 300
		generator := sample()
		var kind []keystate.Record
		for n := range min(records, kinds) {
			kind = append(kind, generator.Example(n))
		}
		for from := 0; from < records; from += each {
			err := s.Update(t.Context(), func(tx *bbolt.Tx) error {
				for n := from; n < min(from+each, records); n++ {
					if err := putSample(s.Keys(tx), kind[n%len(kind)], n); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return path
}

func putSample(keys keystate.Keys, r keystate.Record, n int) error {
	r.Key = keystate.Key{Scope: []string{"", "a\x00", "\xff"}[n%3], ID: fmt.Sprintf("%d", n)}
	r.Incarnation[0], r.Incarnation[1], r.Incarnation[2] = byte(n), byte(n>>8), byte(n>>16)
	if n < 10_000 && n%1000 == 7 {
		r.State = bytes.Repeat([]byte{byte(n)}, 3<<20)
	}
	if n%4 == 0 {
		before := r
		before.Status, before.Point, before.Ended, before.Due, before.ParkReason, before.Refusal = keystate.Running, keystate.Started, time.Time{}, time.Time{}, "", nil
		before.History = before.History[:1]
		if err := keys.Put(&before); err != nil {
			return err
		}
		r.Version = before.Version
	}
	return keys.Put(&r)
}

// onFile works on a file as an engine would, with a boot of its own.
func onFile(t testing.TB, path string, work func(keystate.Store[*bbolt.Tx]) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	s := keystate.Bolt(db)
	if _, _, err = s.Boot(t.Context()); err == nil {
		err = work(s)
	}
	if err := errors.Join(err, s.Close(), db.Close()); err != nil {
		t.Fatal(err)
	}
}

// contents are all records: the unfinished by their keys, the finished in their order.
type contents struct {
	unfinished map[keystate.Key]keystate.Record
	finished   []keystate.Record
}

func contentsOf(t testing.TB, view func(func(keystate.Keys) error) error) contents {
	t.Helper()
	c := contents{unfinished: map[keystate.Key]keystate.Record{}}
	err := view(func(k keystate.Keys) error {
		for last := (keystate.Record{}); ; {
			page, err := k.Unfinished(last.Key, 100)
			if err != nil {
				return err
			}
			for _, r := range page {
				c.unfinished[r.Key], last = r, r
			}
			if len(page) == 0 {
				break
			}
		}
		for after := uint64(0); ; {
			page, err := k.Finished(after, 100)
			if err != nil || len(page) == 0 {
				return err
			}
			for _, r := range page {
				after, r.Sequence = r.Sequence, 0
				c.finished = append(c.finished, r)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func contentsOfFile(t testing.TB, path string) contents {
	t.Helper()
	f, err := keystate.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return contentsOf(t, f.View)
}

func contentsOfTables(t testing.TB, s *postgres.Store) contents {
	t.Helper()
	return contentsOf(t, func(fn func(keystate.Keys) error) error {
		return s.View(t.Context(), func(tx pgx.Tx) error { return fn(s.Keys(tx)) })
	})
}

func newTables(t testing.TB, dsn string) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(t.Context(), dsn, &postgres.Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func onTables(t testing.TB, dsn, sql string, args ...any) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if tag, err := conn.Exec(t.Context(), sql, args...); err != nil || tag.RowsAffected() == 0 {
		t.Fatalf("%s: %v, %v", sql, tag, err)
	}
}

var importedKeys = flag.Int("import.keys", 10_000, "keys of the file that is imported")

func TestEveryKeyIsThereAfterTheImportAsItWas(t *testing.T) {
	path := fileOf(t, *importedKeys)
	want := contentsOfFile(t, path)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := newTables(t, pgtest.Database(t))
	var last postgres.Progress
	began := time.Now()
	err = s.Import(t.Context(), path, &postgres.ImportOptions{Progress: func(p postgres.Progress) {
		if p.Copied < last.Copied || p.Verified < last.Verified || p.Total != uint64(*importedKeys) {
			t.Errorf("after %+v comes %+v", last, p)
		}
		if p.Verified == 0 && p.Copied == p.Total {
			t.Logf("copied %d in %s", p.Copied, time.Since(began))
		}
		last = p
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d keys in %s: %.0f/s", *importedKeys, time.Since(began), float64(*importedKeys)/time.Since(began).Seconds())
	if all := uint64(*importedKeys); last != (postgres.Progress{Copied: all, Verified: all, Total: all}) {
		t.Errorf("at the end it says %+v", last)
	}
	if got := contentsOfTables(t, s); !reflect.DeepEqual(got, want) {
		t.Error("the tables hold something else than the file")
	}
	if after, err := os.ReadFile(path + ".imported"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the file has changed: %v", err)
	}
	f, err := keystate.OpenFile(path + ".imported")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if id, epoch, err := s.Boot(t.Context()); err != nil || id != f.ID() || epoch <= f.Epoch() {
		t.Errorf("the tables are %x at epoch %d, %v; the file is %x at %d", id, epoch, err, f.ID(), f.Epoch())
	}
	r := claimed("later")
	r.Status, r.Point, r.Ended = keystate.Answered, keystate.Finished, r.Created
	r.History = append(r.History, keystate.Passage{Point: keystate.Finished, At: r.Created, Attempts: 1})
	if err := s.Update(t.Context(), func(tx pgx.Tx) error { put := r; return s.Keys(tx).Put(&put) }); err != nil {
		t.Fatal(err)
	}
	if c := contentsOfTables(t, s); c.finished[len(c.finished)-1].Key != r.Key {
		t.Error("what finishes now is not the last that finished")
	}
}

func TestAnImportThatIsBrokenOffAnywhereGoesOn(t *testing.T) {
	path := fileOf(t, 5000)
	want := contentsOfFile(t, path)
	dsn := pgtest.Database(t)
	whole := newTables(t, dsn)
	random := rand.New(rand.NewPCG(1, 2))
	var done uint64
	for n := range 8 {
		ctx, cancel := context.WithCancel(t.Context())
		steps := 1 + random.IntN(6) + 4*n // later and later
		err := newTables(t, dsn).Import(ctx, path, &postgres.ImportOptions{Progress: func(p postgres.Progress) {
			if steps--; steps == 0 {
				done = p.Copied
				cancel()
			}
		}})
		cancel()
		if err == nil {
			break // it was through before
		}
		if _, _, err := newTables(t, dsn).Boot(t.Context()); err == nil {
			t.Fatal("an engine boots while keys move")
		}
	}
	if err := whole.Import(t.Context(), path, nil); err != nil {
		t.Fatal(err)
	}
	if got := contentsOfTables(t, whole); !reflect.DeepEqual(got, want) || done == 0 {
		t.Error("the tables hold something else than the file")
	}
	if _, _, err := whole.Boot(t.Context()); err != nil {
		t.Error(err)
	}
}

const importedFile, importsInto = "KEYSTATE_TEST_IMPORTED_FILE", "KEYSTATE_TEST_IMPORTS_INTO"

// What is on its way to the server when the process is killed arrives all the same, and after that the keys are moved again.
func TestAnImportWhoseProcessIsKilledAnywhereGoesOn(t *testing.T) {
	if path := os.Getenv(importedFile); path != "" {
		t.Fatalf("the import ends with %v", newTables(t, os.Getenv(importsInto)).Import(t.Context(), path, nil)) // it should not have lived to that
	}
	for _, c := range []struct {
		sql string
		nth int
	}{{"begin", 1}, {"SELECT id, epoch", 1}, {"UPDATE", 1}, {"commit", 1}, {"INSERT", 1}, {"INSERT", 2}, {"commit", 3}, {"SELECT id, scope, machine", 1}, {"SELECT count", 1}, {"UPDATE", 2}} {
		t.Run(fmt.Sprintf("at %s %d", c.sql, c.nth), func(t *testing.T) {
			path := fileOf(t, 600)
			want := contentsOfFile(t, path)
			dsn := pgtest.Database(t)
			s := newTables(t, dsn)
			proxy := pgtest.NewProxy(t, dsn)
			child := exec.Command(os.Args[0], "-test.run=^"+strings.Split(t.Name(), "/")[0]+"$", "-test.timeout=100s")
			child.Env = append(os.Environ(), importedFile+"="+path, importsInto+"="+proxy.DSN())
			var said bytes.Buffer
			child.Stdout, child.Stderr = &said, &said
			cut := proxy.Cut(pgtest.InFlight, pgtest.Nth(c.nth, pgtest.Runs(c.sql)))
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				child.Wait()
				close(ended)
			}()
			select {
			case <-cut.Made():
			case <-ended:
				t.Fatalf("the process ended by itself:\n%s", &said)
			}
			child.Process.Kill()
			<-ended
			cut.Deliver()
			if _, err := os.Stat(path); err != nil {
				t.Fatalf("the file is where it was until all is done: %v", err)
			}
			if err := s.Import(t.Context(), path, nil); err != nil {
				t.Fatal(err)
			}
			if got := contentsOfTables(t, s); !reflect.DeepEqual(got, want) {
				t.Error("the tables hold something else than the file")
			}
			if _, _, err := s.Boot(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAConnectionThatIsLostInAnImportCostsNothing(t *testing.T) {
	path := fileOf(t, 600)
	want := contentsOfFile(t, path)
	for _, place := range []pgtest.Place{pgtest.BeforeRequest, pgtest.AfterRequest, pgtest.MidAnswer} {
		for sql, nth := range map[string]int{
			"begin": 3, "SELECT id, epoch": 1, "UPDATE": 1, "SELECT id, scope, finished": 1, "SELECT id FROM": 2,
			"INSERT": 2, "commit": 2, "SELECT id, scope, machine": 2, "SELECT count": 1,
		} {
			t.Run(fmt.Sprintf("%s %s %d", place, sql, nth), func(t *testing.T) {
				dsn := pgtest.Database(t)
				newTables(t, dsn)
				proxy := pgtest.NewProxy(t, dsn)
				s := newTables(t, proxy.DSN())
				cut := proxy.Cut(place, pgtest.Nth(nth, pgtest.Runs(sql)))
				if err := s.Import(t.Context(), path, &postgres.ImportOptions{Keep: true}); err != nil {
					t.Fatal(err)
				}
				if !cut.Happened() {
					t.Error("nothing was cut")
				}
				if got := contentsOfTables(t, s); !reflect.DeepEqual(got, want) {
					t.Error("the tables hold something else than the file")
				}
			})
		}
	}
}

func TestTheLastAnswerOfAnImportIsLost(t *testing.T) {
	path, dsn := fileOf(t, 10), pgtest.Database(t)
	newTables(t, dsn)
	proxy := pgtest.NewProxy(t, dsn)
	s := newTables(t, proxy.DSN())
	var cut *pgtest.Cut
	err := s.Import(t.Context(), path, &postgres.ImportOptions{Progress: func(p postgres.Progress) {
		if p.Verified == p.Total {
			cut = proxy.Cut(pgtest.AfterRequest, pgtest.Runs("commit"))
		}
	}})
	if err != nil || !cut.Happened() {
		t.Errorf("cut: %v; it says %v", cut.Happened(), err)
	}
	if _, _, err := s.Boot(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestWhatIsUnderWayInTheFileGoesOnHereUnderTheSameToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "crashed.db")
	tokens := map[string]string{} // by payment
	begun := make(chan struct{})
	goOn := make(chan struct{})
	there, err := keystate.Open(filepath.Join(t.TempDir(), "live.db"), &keystate.Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	payments, err := keystate.Register(there, "payment", []keystate.Phase[*bbolt.Tx, payment]{
		{To: "noted"},
		{To: "paid", Effect: func(_ context.Context, token string, p *payment) error {
			tokens[p.Name] = token
			close(begun)
			<-goOn
			return nil
		}},
		{To: keystate.Finished},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := payments.Start(t.Context(), keyOf(1), payment{Name: "p", Cents: 5}); err != nil {
		t.Fatal(err)
	}
	<-begun
	crashed, err := os.Create(path) // what a crash would leave at this moment
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keystate.Backup(t.Context(), there, crashed); err != nil {
		t.Fatal(err)
	}
	if err := crashed.Close(); err != nil {
		t.Fatal(err)
	}
	close(goOn)
	if err := there.Close(); err != nil {
		t.Fatal(err)
	}
	dsn, b := commonDatabase(t), &bank{}
	mover := newTables(t, dsn)
	if err := mover.Import(t.Context(), path, nil); err != nil {
		t.Fatal(err)
	}
	if err := mover.Close(); err != nil {
		t.Fatal(err)
	}
	here := openOffice(t, dsn, "here", b, postgres.Options{}, false)
	p, err := here.payments.Do(t.Context(), keyOf(1), payment{Name: "p", Cents: 5})
	if err != nil || p.Payout != "payout of "+tokens["p"] || b.tokens() != 1 {
		t.Errorf("it was sent as %q; here it is %+v, %v", tokens["p"], p, err)
	}
	if r, err := here.engine.Key(t.Context(), keyOf(1)); err != nil || len(r.History) != 4 {
		t.Errorf("the key's history is %+v, %v", r.History, err)
	}
}

func TestNobodyAsksForAnImportedKeyAndItGoesOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	r := claimed("orphan")
	r.Machine, r.Point = "payment", keystate.Started
	r.State = []byte{0x81, 0xa4, 'N', 'a', 'm', 'e', 0xa1, 'p'}
	onFile(t, path, func(s keystate.Store[*bbolt.Tx]) error {
		return s.Update(t.Context(), func(tx *bbolt.Tx) error { return s.Keys(tx).Put(&r) })
	})
	dsn, b := commonDatabase(t), &bank{}
	if err := newTables(t, dsn).Import(t.Context(), path, nil); err != nil {
		t.Fatal(err)
	}
	here := openOffice(t, dsn, "here", b, postgres.Options{Lease: 300 * time.Millisecond}, false)
	for n := 0; ; n++ {
		stored, err := here.engine.Key(t.Context(), r.Key)
		if err != nil || n > 1000 {
			t.Fatalf("the key is %s, %v", stored.Status, err)
		}
		if stored.Status == keystate.Answered {
			break
		}
		time.Sleep(10 * time.Millisecond) // the server's clock runs
	}
}

func TestAnEngineAtWorkOnTheFileInBetweenMakesTheImportStartAfresh(t *testing.T) {
	path, dsn := fileOf(t, 3000), pgtest.Database(t)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s := newTables(t, dsn)
	err = s.Import(ctx, path, &postgres.ImportOptions{Progress: func(p postgres.Progress) {
		if p.Copied > 2500 {
			cancel()
		}
	}})
	if err == nil {
		t.Fatal("it was not broken off")
	}
	onFile(t, path, func(s keystate.Store[*bbolt.Tx]) error {
		return s.Update(t.Context(), func(tx *bbolt.Tx) error {
			keys := s.Keys(tx)
			done, err := keys.Finished(0, 1)
			if err != nil {
				return err
			}
			under, err := keys.Unfinished(keystate.Key{}, 1)
			if err != nil {
				return err
			}
			again := claimed("x")
			again.Key = done[0].Key
			under[0].LastError = "it was at work"
			return errors.Join(keys.Delete(done[0]), keys.Put(&again), keys.Put(&under[0]))
		})
	})
	want := contentsOfFile(t, path)
	if err := s.Import(t.Context(), path, &postgres.ImportOptions{Keep: true}); err != nil {
		t.Fatal(err)
	}
	if got := contentsOfTables(t, s); !reflect.DeepEqual(got, want) {
		t.Error("the tables hold something else than the file")
	}
	t.Run("a backup of before is not taken for it", func(t *testing.T) {
		later, old := newTables(t, pgtest.Database(t)), filepath.Join(t.TempDir(), "backup.db")
		if err := os.WriteFile(old, before, 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if err := later.Import(ctx, path, &postgres.ImportOptions{Keep: true, Progress: func(postgres.Progress) { cancel() }}); err == nil {
			t.Fatal("it was not broken off")
		}
		if err := later.Import(t.Context(), old, nil); err == nil || !strings.Contains(err.Error(), "backup") {
			t.Errorf("a backup: %v", err)
		}
	})
}

func TestTheVerificationFindsWhatIsNotAsItWas(t *testing.T) {
	path := fileOf(t, 600)
	for name, spoil := range map[string]string{
		"a key is gone":        `DELETE FROM keystate.keys WHERE id = '17'`,
		"a key too many":       `INSERT INTO keystate.keys SELECT 'more', scope, machine, status, incarnation, version, epoch, finished, nonce, record FROM keystate.keys WHERE id = '17'`,
		"another incarnation":  `UPDATE keystate.keys SET record = (SELECT record FROM keystate.keys WHERE id = '18') WHERE id = '17'`,
		"a column says other":  `UPDATE keystate.keys SET incarnation = '\x00' WHERE id = '17'`,
		"a version":            `UPDATE keystate.keys SET version = version + 1 WHERE id = '17'`,
		"an epoch":             `UPDATE keystate.keys SET epoch = epoch + 1 WHERE id = '17'`,
		"a machine":            `UPDATE keystate.keys SET machine = 'other' WHERE id = '17'`,
		"a status":             `UPDATE keystate.keys SET status = 'unheard of' WHERE id = '17'`,
		"the order":            `UPDATE keystate.keys SET finished = 1 WHERE finished = (SELECT max(finished) FROM keystate.keys)`,
		"finished, and is not": `UPDATE keystate.keys SET finished = 1 WHERE id = (SELECT id FROM keystate.keys WHERE finished IS NULL LIMIT 1)`,
	} {
		t.Run(name, func(t *testing.T) {
			dsn := pgtest.Database(t)
			s := newTables(t, dsn)
			spoilt := false
			err := s.Import(t.Context(), path, &postgres.ImportOptions{Progress: func(p postgres.Progress) {
				if p.Copied == p.Total && !spoilt {
					spoilt = true
					onTables(t, dsn, spoil)
				}
			}})
			if !errors.Is(err, postgres.ErrDiffers) {
				t.Errorf("it says %v", err)
			}
			if _, _, err := s.Boot(t.Context()); err == nil {
				t.Error("an engine boots")
			}
			if e, err := keystate.OpenFile(path); err != nil {
				t.Errorf("the file is not where it was: %v", err)
			} else {
				e.Close()
			}
			t.Log(err)
		})
	}
}

func TestAKeyThatIsAnotherHereIsNamedAndLeftAlone(t *testing.T) {
	path, dsn := fileOf(t, 600), pgtest.Database(t)
	s := newTables(t, dsn)
	ctx, cancel := context.WithCancel(t.Context())
	if err := s.Import(ctx, path, &postgres.ImportOptions{Progress: func(postgres.Progress) { cancel() }}); err == nil {
		t.Fatal("it was not broken off")
	}
	onTables(t, dsn, `UPDATE keystate.keys SET record = (SELECT record FROM keystate.keys WHERE finished IS NULL ORDER BY id LIMIT 1), nonce = 'mine' WHERE id = (SELECT id FROM keystate.keys WHERE finished IS NULL ORDER BY id DESC LIMIT 1)`)
	if err := s.Import(t.Context(), path, nil); !errors.Is(err, postgres.ErrDiffers) || !strings.Contains(err.Error(), "incarnation") {
		t.Errorf("it says %v", err)
	}
	onTables(t, dsn, `UPDATE keystate.keys SET nonce = 'seen' WHERE nonce = 'mine'`)
}

func TestTablesInUseAreRefused(t *testing.T) {
	path := fileOf(t, 100)
	for name, use := range map[string]func(t *testing.T, s *postgres.Store, dsn string){
		"booted": func(t *testing.T, s *postgres.Store, _ string) {
			if _, _, err := s.Boot(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		"booted by another": func(t *testing.T, _ *postgres.Store, dsn string) {
			other := newTables(t, dsn)
			if _, _, err := other.Boot(t.Context()); err != nil {
				t.Fatal(err)
			}
			other.Close()
		},
		"of another file, half": func(t *testing.T, s *postgres.Store, _ string) {
			ctx, cancel := context.WithCancel(t.Context())
			if err := s.Import(ctx, fileOf(t, 1000), &postgres.ImportOptions{Progress: func(postgres.Progress) { cancel() }}); err == nil {
				t.Fatal("it was not broken off")
			}
		},
		"of another file": func(t *testing.T, s *postgres.Store, _ string) {
			if err := s.Import(t.Context(), fileOf(t, 10), nil); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dsn := pgtest.Database(t)
			s := newTables(t, dsn)
			use(t, s, dsn)
			before := contentsOfTables(t, s)
			if err := s.Import(t.Context(), path, nil); err == nil {
				t.Error("the tables are taken")
			}
			if after := contentsOfTables(t, s); !reflect.DeepEqual(after, before) {
				t.Error("the tables have changed")
			}
		})
	}
}

func TestNoEngineOpensAFileWhoseKeysHaveMoved(t *testing.T) {
	path := fileOf(t, 100)
	dsn := pgtest.Database(t)
	s := newTables(t, dsn)
	if err := os.Link(path, path+".imported"); err != nil { // as a kill in the middle leaves it
		t.Fatal(err)
	}
	locked := false
	err := s.Import(t.Context(), path, &postgres.ImportOptions{Progress: func(postgres.Progress) {
		_, err := keystate.Open(path, &keystate.Options{LockTimeout: time.Millisecond})
		locked = errors.Is(err, keystate.ErrLocked)
	}})
	if err != nil || !locked {
		t.Fatalf("%v; an engine opens the file meanwhile: %v", err, !locked)
	}
	if e, err := keystate.Open(path, nil); !errors.Is(err, keystate.ErrNotAStore) {
		e.Close()
		t.Errorf("an engine opens it: %v", err)
	}
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), `"keys.db.imported"`) {
		t.Errorf("there is %q, %v", text, err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	if err := s.Import(t.Context(), path, nil); err != nil {
		t.Errorf("once more: %v", err)
	}
}

func TestAnImportThatWasDoneOverwritesNothing(t *testing.T) {
	path, dsn := fileOf(t, 700), pgtest.Database(t)
	s := newTables(t, dsn)
	if err := s.Import(t.Context(), path, &postgres.ImportOptions{Keep: true}); err != nil {
		t.Fatal(err)
	}
	worker := newTables(t, dsn)
	if _, _, err := worker.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := worker.Update(t.Context(), func(tx pgx.Tx) error {
		keys := worker.Keys(tx)
		done, err := keys.Finished(0, 2)
		if err != nil {
			return err
		}
		under, err := keys.Unfinished(keystate.Key{}, 1)
		if err != nil {
			return err
		}
		again := claimed("x")
		again.Key, again.Created = done[0].Key, time.Now()
		under[0].LastError = "it was at work"
		return errors.Join(keys.Delete(done[0]), keys.Delete(done[1]), keys.Put(&again), keys.Put(&under[0]))
	})
	if err != nil {
		t.Fatal(err)
	}
	before := contentsOfTables(t, s)
	if err := s.Import(t.Context(), path, &postgres.ImportOptions{Keep: true}); err != nil {
		t.Errorf("once more: %v", err)
	}
	if after := contentsOfTables(t, s); !reflect.DeepEqual(after, before) {
		t.Error("the tables have changed")
	}
	onFile(t, path, func(s keystate.Store[*bbolt.Tx]) error {
		return s.Update(t.Context(), func(tx *bbolt.Tx) error {
			under, err := s.Keys(tx).Unfinished(keystate.Key{}, 100)
			if err != nil {
				return err
			}
			return s.Keys(tx).Put(&under[99])
		})
	})
	if err := s.Import(t.Context(), path, nil); !errors.Is(err, postgres.ErrDiffers) {
		t.Errorf("an engine was at work on the file all the same: %v", err)
	}
}
