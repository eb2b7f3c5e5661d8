package keytest

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"

	"example.com/keystate"
)

// Store checks that a store keeps what [keystate.Store] promises, with a subtest for each promise. open opens the
// store that lives in dir, and makes it when there is none; it does not boot it. It is called again for a dir whose
// store is closed, and once for one whose store is open: a store that several engines may share is then checked as
// such, any other refuses, by an error of Boot or by t.Fatal. How many random histories there are, -rapid.checks says.
func Store[Tx any](t *testing.T, open func(t testing.TB, dir string) keystate.Store[Tx], rows Rows[Tx]) {
	for _, c := range storeChecks[Tx]() {
		t.Run(c.says, func(t *testing.T) {
			if err := c.against(t, open, rows); err != nil {
				t.Error(err)
			}
		})
	}
}

// Rows are the program's own writes beside the records, in the same transaction.
type Rows[Tx any] struct {
	Put func(tx Tx, name, value string) error
	Get func(tx Tx, name string) (value string, found bool, err error)
}

// OpenBolt opens the bbolt file in dir and the store in it. Closing the store closes the file. It does not sync: what
// it holds outlives the process, and not a power cut.
func OpenBolt(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
	t.Helper()
	options := &bbolt.Options{Timeout: 100 * time.Millisecond, NoSync: true, NoGrowSync: true}
	db, err := bbolt.Open(filepath.Join(dir, "store.db"), 0o600, options)
	if err != nil {
		t.Fatalf("opening the store in %s: %v", dir, err)
	}
	return &ownedBolt{keystate.Bolt(db), db}
}

// An ownedBolt closes the database with the store.
type ownedBolt struct {
	keystate.Store[*bbolt.Tx]
	db *bbolt.DB
}

func (s *ownedBolt) Close() error { return errors.Join(s.Store.Close(), s.db.Close()) }

var boltRows = []byte("keytest rows")

// BoltRows are rows in a bucket of their own.
func BoltRows() Rows[*bbolt.Tx] {
	return Rows[*bbolt.Tx]{
		Put: func(tx *bbolt.Tx, name, value string) error {
			b, err := tx.CreateBucketIfNotExists(boltRows)
			if err != nil {
				return err
			}
			return b.Put([]byte(name), []byte(value))
		},
		Get: func(tx *bbolt.Tx, name string) (string, bool, error) {
			b := tx.Bucket(boltRows)
			if b == nil {
				return "", false, nil
			}
			value := b.Get([]byte(name))
			return string(value), value != nil, nil
		},
	}
}

// A storeCheck is one promise.
type storeCheck[Tx any] struct {
	says string
	run  func(*storeTrial[Tx]) error
}

func storeChecks[Tx any]() []storeCheck[Tx] {
	type trial = *storeTrial[Tx]
	return []storeCheck[Tx]{
		{"Boot keeps the identity and raises the epoch", trial.bootKeepsIdentity},
		{"two openings share the store, or the second is refused", trial.twoOpenings},

		{"a key that was never put is not found", trial.absentIsNotFound},
		{"every field of a record comes back", trial.fieldsComeBack},
		{"the largest record comes back", trial.largestRecord},
		{"keys that look alike when joined are different", trial.keysLookAlike},
		{"a record that was put or read is the caller's own", trial.recordsAreCopies},

		{"Put counts versions", trial.putCountsVersions},
		{"Put fences whoever does not hold the record", trial.putFences},
		{"Delete takes a finished record from its holder only", trial.deleteFences},
		{"finished records are numbered in order, and no number is used twice", trial.sequencesGrow},
		{"Counts equal a recount", trial.countsEqualRecount},
		{"Unfinished lists every key once, in pages of any size", trial.unfinishedPages},
		{"Unfinished misses no key while others change between pages", trial.unfinishedBetweenChanges},
		{"Finished lists in the order of finishing", trial.finishedOrder},
		{"thousands of keys are listed in pages", trial.thousands},
		{"a transaction sees its own writes", trial.ownWrites},

		{"an error in Update comes back and leaves no trace", trial.errorRollsBack},
		{"a panic in Update becomes an error and leaves no trace", trial.panicRollsBack},
		{"runtime.Goexit in Update leaves no trace", trial.goexitRollsBack},
		{"who fails harms nobody who commits at the same time", trial.failuresHarmNobody},
		{"a function that is run again takes effect once", trial.rerunsTakeEffectOnce},
		{"one of many claims a new key", trial.oneClaims},
		{"one of many moves a key on", trial.oneMovesOn},
		{"no increment is lost", trial.noLostIncrement},
		{"an Update whose context ends takes effect wholly or not at all", trial.contextEnds},

		{"View sees what was committed before it", trial.viewSeesCommitted},
		{"View sees one consistent state while updates go on", trial.viewIsConsistent},
		{"View cannot write", trial.viewCannotWrite},
		{"a View that fails harms nobody", trial.viewFails},

		{"what Update acknowledged outlives Close", trial.acknowledgedOutlivesClose},
		{"after Close everything fails, and Close is harmless", trial.closedFails},
		{"any history leaves what the model says", trial.modelAgrees},
	}
}

// against runs the check on a new store.
func (c storeCheck[Tx]) against(tb testing.TB, open func(testing.TB, string) keystate.Store[Tx], rows Rows[Tx]) error {
	base := &storeTrial[Tx]{tb: tb, open: open, rows: rows, root: tb.TempDir(), stores: new(int)}
	return base.afresh(c.run)
}

// A storeTrial is one check's store, and the shorthands to work on it.
type storeTrial[Tx any] struct {
	tb     testing.TB
	open   func(testing.TB, string) keystate.Store[Tx]
	rows   Rows[Tx]
	root   string
	stores *int // made so far in root
	dir    string

	store keystate.Store[Tx] // nil: closed
	id    [16]byte
	epoch uint64
}

// afresh runs a check on a store that holds nothing.
func (s *storeTrial[Tx]) afresh(check func(*storeTrial[Tx]) error) (err error) {
	*s.stores++
	next := &storeTrial[Tx]{tb: s.tb, open: s.open, rows: s.rows, root: s.root, stores: s.stores}
	next.dir = filepath.Join(s.root, strconv.Itoa(*s.stores))
	if err := os.Mkdir(next.dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, next.close()) }()
	if err := next.boot(); err != nil {
		return err
	}
	return check(next)
}

func (s *storeTrial[Tx]) boot() (err error) {
	s.store = s.open(s.tb, s.dir)
	if s.id, s.epoch, err = s.store.Boot(context.Background()); err != nil {
		return errors.Join(fmt.Errorf("at Boot: %w", err), s.close())
	}
	return nil
}

func (s *storeTrial[Tx]) close() error {
	if s.store == nil {
		return nil
	}
	closing := s.store
	s.store = nil
	if err := closing.Close(); err != nil {
		return fmt.Errorf("at Close: %w", err)
	}
	return nil
}

func (s *storeTrial[Tx]) reopen() error {
	if err := s.close(); err != nil {
		return err
	}
	return s.boot()
}

// A recordTx is a transaction with the records in it.
type recordTx[Tx any] struct {
	keystate.Keys
	tx   Tx
	rows Rows[Tx]
}

// errNotOpen is what calls get after a reopening that failed.
var errNotOpen = errors.New("the store is not open")

func (t recordTx[Tx]) setRow(name, value string) error { return t.rows.Put(t.tx, name, value) }

// row returns "" for a row that is not there.
func (t recordTx[Tx]) row(name string) (string, error) {
	value, found, err := t.rows.Get(t.tx, name)
	if !found {
		value = ""
	}
	return value, err
}

// add increments a row, and returns what it was.
func (t recordTx[Tx]) add(name string) (int, error) {
	text, err := t.row(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(cmp.Or(text, "0"))
	if err != nil {
		return 0, err
	}
	return n, t.setRow(name, strconv.Itoa(n+1))
}

func (s *storeTrial[Tx]) update(fn func(recordTx[Tx]) error) error {
	return s.updateWithin(context.Background(), fn)
}

func (s *storeTrial[Tx]) updateWithin(ctx context.Context, fn func(recordTx[Tx]) error) error {
	store := s.store
	if store == nil {
		return errNotOpen
	}
	return store.Update(ctx, func(tx Tx) error { return fn(recordTx[Tx]{store.Keys(tx), tx, s.rows}) })
}

func (s *storeTrial[Tx]) view(fn func(recordTx[Tx]) error) error {
	store := s.store
	if store == nil {
		return errNotOpen
	}
	return store.View(context.Background(), func(tx Tx) error { return fn(recordTx[Tx]{store.Keys(tx), tx, s.rows}) })
}

// put stores a record in a transaction of its own, and returns what was stored.
func (s *storeTrial[Tx]) put(r keystate.Record) (stored keystate.Record, err error) {
	err = s.update(func(tx recordTx[Tx]) error {
		stored = r
		return tx.Put(&stored)
	})
	if err != nil {
		return r, fmt.Errorf("putting %q, version %d: %w", r.Key, r.Version, err)
	}
	return stored, nil
}

// putAll stores new records, a hundred in a transaction.
func (s *storeTrial[Tx]) putAll(records []keystate.Record) ([]keystate.Record, error) {
	var all []keystate.Record
	for batch := range slices.Chunk(records, 100) {
		var stored []keystate.Record
		err := s.update(func(tx recordTx[Tx]) error {
			stored = slices.Clone(batch)
			for i := range stored {
				if err := tx.Put(&stored[i]); err != nil {
					return fmt.Errorf("putting %q: %w", stored[i].Key, err)
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		all = append(all, stored...)
	}
	return all, nil
}

func (s *storeTrial[Tx]) delete(r keystate.Record) error {
	return s.update(func(tx recordTx[Tx]) error { return tx.Delete(r) })
}

func (s *storeTrial[Tx]) get(key keystate.Key) (r keystate.Record, err error) {
	err = s.view(func(tx recordTx[Tx]) error {
		r, err = tx.Get(key)
		return err
	})
	return r, err
}

func (s *storeTrial[Tx]) row(name string) (value string, err error) {
	err = s.view(func(tx recordTx[Tx]) error {
		value, err = tx.row(name)
		return err
	})
	return value, err
}

// holds demands that a record is stored just so.
func (s *storeTrial[Tx]) holds(want keystate.Record) error {
	got, err := s.get(want.Key)
	if err != nil {
		return fmt.Errorf("getting %q: %w", want.Key, err)
	}
	return sameRecord(got, want)
}

func (s *storeTrial[Tx]) holdsNot(key keystate.Key) error {
	if r, err := s.get(key); !errors.Is(err, keystate.ErrNotFound) {
		return fmt.Errorf("getting %q, which is not there: version %d, %v, want ErrNotFound", key, r.Version, err)
	}
	return nil
}

func (s *storeTrial[Tx]) rowIs(name, want string) error {
	if got, err := s.row(name); err != nil || got != want {
		return fmt.Errorf("row %q is %q, %v, want %q", name, got, err, want)
	}
	return nil
}

// contents is all that a transaction sees of the records.
type contents struct {
	unfinished, finished []keystate.Record
	counts               keystate.Counts
}

func (s *storeTrial[Tx]) contents() (c contents, err error) {
	err = s.view(func(tx recordTx[Tx]) error {
		c, err = contentsIn(tx)
		return err
	})
	return c, err
}

// contentsIn lists everything, and checks that the counts agree with it.
func contentsIn(keys keystate.Keys) (c contents, err error) {
	if c.unfinished, err = listUnfinished(keys, 16); err != nil {
		return c, err
	}
	if c.finished, err = listFinished(keys, 16); err != nil {
		return c, err
	}
	if c.counts, err = keys.Counts(); err != nil {
		return c, fmt.Errorf("counting: %w", err)
	}
	var recount keystate.Counts
	for _, r := range slices.Concat(c.unfinished, c.finished) {
		*countOf(&recount, r.Status)++
	}
	if recount != c.counts {
		return c, fmt.Errorf("%w: the Counts are %+v, there are %+v", errMiscounted, c.counts, recount)
	}
	return c, nil
}

var errMiscounted = errors.New("it does not add up")

func countOf(c *keystate.Counts, s keystate.Status) *uint64 {
	switch s {
	case keystate.Running:
		return &c.Running
	case keystate.Waiting:
		return &c.Waiting
	case keystate.Parked:
		return &c.Parked
	}
	return &c.Finished
}

// unchanged demands that the records are what they were.
func (s *storeTrial[Tx]) unchanged(before contents) error {
	after, err := s.contents()
	if err == nil {
		err = cmp.Or(sameRecords(after.unfinished, before.unfinished), sameRecords(after.finished, before.finished))
	}
	return err
}

func listUnfinished(keys keystate.Keys, limit int) ([]keystate.Record, error) {
	return listPages(limit, func(last keystate.Record) ([]keystate.Record, error) {
		page, err := keys.Unfinished(last.Key, limit)
		for _, r := range page {
			if r.Status == keystate.Answered {
				return nil, fmt.Errorf("listed as unfinished is %q, which is finished", r.Key)
			}
		}
		return page, err
	})
}

func listFinished(keys keystate.Keys, limit int) ([]keystate.Record, error) {
	return listPages(limit, func(last keystate.Record) ([]keystate.Record, error) {
		page, err := keys.Finished(last.Sequence, limit)
		for _, r := range page {
			if r.Status != keystate.Answered || r.Sequence <= last.Sequence {
				return nil, fmt.Errorf("listed as finished is %q, %q with sequence %d after %d",
					r.Key, r.Status, r.Sequence, last.Sequence)
			}
			last = r
		}
		return page, err
	})
}

// listPages reads page after page. A page that is not full is the last: that is how the engine knows the end.
func listPages(limit int, next func(last keystate.Record) ([]keystate.Record, error)) (all []keystate.Record, err error) {
	var last keystate.Record
	seen := map[keystate.Key]bool{}
	for short := false; ; {
		page, err := next(last)
		switch {
		case err != nil:
			return nil, err
		case len(page) > limit:
			return nil, fmt.Errorf("a page of %d records, the limit is %d", len(page), limit)
		case short && len(page) > 0:
			return nil, fmt.Errorf("%q comes after a page that was not full", page[0].Key)
		case len(page) == 0:
			return all, nil
		}
		for _, r := range page {
			if seen[r.Key] {
				return nil, fmt.Errorf("%q is listed twice in pages of %d", r.Key, limit)
			}
			seen[r.Key] = true
		}
		all, last, short = append(all, page...), page[len(page)-1], len(page) < limit
	}
}

// sameRecord tells which fields differ. Nil and empty are the same.
func sameRecord(got, want keystate.Record) error {
	for _, r := range []*keystate.Record{&got, &want} {
		if len(r.State) == 0 {
			r.State = nil
		}
		if len(r.History) == 0 {
			r.History = nil
		}
	}
	var differ []string
	g, w := reflect.ValueOf(got), reflect.ValueOf(want)
	for i := range g.NumField() {
		if a, b := g.Field(i).Interface(), w.Field(i).Interface(); !reflect.DeepEqual(a, b) {
			differ = append(differ, fmt.Sprintf("%s is %.80s, want %.80s", g.Type().Field(i).Name, shown(a), shown(b)))
		}
	}
	if differ != nil {
		return fmt.Errorf("record %.80q: %s", want.Key, strings.Join(differ, "; "))
	}
	return nil
}

func shown(v any) string {
	if r, ok := v.(*keystate.Refusal); ok && r != nil {
		v = *r
	}
	return fmt.Sprintf("%+v", v)
}

func sameRecords(got, want []keystate.Record) error {
	for i := range min(len(got), len(want)) {
		if err := sameRecord(got[i], want[i]); err != nil {
			return err
		}
	}
	if len(got) != len(want) {
		return fmt.Errorf("%d records, want %d", len(got), len(want))
	}
	return nil
}

// longAgo is when things happen in these records.
var longAgo = time.Date(2026, time.March, 1, 12, 30, 45, 123_456_000, time.UTC)

func orderKey(n int) keystate.Key {
	return keystate.Key{Scope: "shop", ID: fmt.Sprintf("order-%04d", n)}
}

// claimed is a new record; who tells its incarnation from others of the key.
func claimed(key keystate.Key, who string) keystate.Record {
	sum := sha256.Sum256([]byte(key.Scope + "\x00" + key.ID + "\x00" + who))
	return keystate.Record{
		Key: key, Machine: "order", Status: keystate.Running, Point: keystate.Started, State: []byte(who), Epoch: 1,
		Incarnation: [16]byte(sum[:16]), Fingerprint: [16]byte(sum[16:]), Created: longAgo,
		History: []keystate.Passage{{Point: keystate.Started, At: longAgo}},
	}
}

// moved is the record as it is in another status.
func moved(r keystate.Record, to keystate.Status) keystate.Record {
	r.Status, r.ParkReason, r.Due = to, "", time.Time{}
	switch to {
	case keystate.Waiting:
		r.Due = longAgo.Add(time.Minute)
	case keystate.Parked:
		r.ParkReason = keystate.Indeterminate
	case keystate.Answered:
		r.Point, r.Ended = keystate.Finished, longAgo.Add(time.Hour)
		r.History = append(slices.Clone(r.History), keystate.Passage{Point: keystate.Finished, At: r.Ended, Attempts: 1})
	}
	return r
}

func finished(key keystate.Key, who string) keystate.Record {
	return moved(claimed(key, who), keystate.Answered)
}

var (
	unfinishedStatuses = []keystate.Status{keystate.Running, keystate.Waiting, keystate.Parked}
	everyStatus        = []keystate.Status{keystate.Running, keystate.Waiting, keystate.Parked, keystate.Answered}
)

// orders are new records of n keys, from a number on, in a status.
func orders(from, n int, status keystate.Status) []keystate.Record {
	records := make([]keystate.Record, n)
	for i := range records {
		records[i] = moved(claimed(orderKey(from+i), "first"), status)
	}
	return records
}

// How a function that did not return an error of its own ended.
var (
	errPanicked = errors.New("it panicked")
	errExited   = errors.New("it ended its goroutine")
)

// ending runs fn on a goroutine of its own and tells what became of it.
func ending(fn func() error) error {
	ended := make(chan error, 1)
	go func() {
		returned := false
		var err error
		defer func() {
			if v := recover(); v != nil {
				err = fmt.Errorf("%w: %v", errPanicked, v)
			} else if !returned {
				err = errExited
			}
			ended <- err
		}()
		err = fn()
		returned = true
	}()
	return <-ended
}

// atOnce runs fn n times at the same time.
func atOnce(n int, fn func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		all.Go(func() {
			<-start
			errs[i] = fn(i)
		})
	}
	close(start)
	all.Wait()
	return errors.Join(errs...)
}

// linger gives others the chance to be done; a store may well make them wait.
func linger(done <-chan struct{}) {
	const courtesy = 20 * time.Millisecond
	select {
	case <-done:
	case <-time.After(courtesy):
	}
}

func (s *storeTrial[Tx]) bootKeepsIdentity() error {
	id, epoch := s.id, s.epoch
	if id == [16]byte{} {
		return errors.New("the identity is zero")
	}
	for range 3 {
		if err := s.reopen(); err != nil {
			return err
		}
		if s.id != id {
			return fmt.Errorf("the identity was %x, and is %x after reopening", id, s.id)
		}
		if s.epoch <= epoch {
			return fmt.Errorf("the epoch was %d, and is %d after reopening", epoch, s.epoch)
		}
		epoch = s.epoch
	}
	return s.afresh(func(other *storeTrial[Tx]) error {
		if other.id == id {
			return fmt.Errorf("two stores have the identity %x", id)
		}
		return nil
	})
}

// An openingTB is the test that open is given where it may fail.
type openingTB struct {
	testing.TB
	refusal string
}

func (o *openingTB) Error(args ...any)                 { o.refusal += fmt.Sprintln(args...) }
func (o *openingTB) Errorf(format string, args ...any) { o.Error(fmt.Sprintf(format, args...)) }
func (o *openingTB) Fail()                             { o.Error("it fails") }
func (o *openingTB) FailNow()                          { o.Fail(); runtime.Goexit() }
func (o *openingTB) Fatal(args ...any)                 { o.Error(args...); runtime.Goexit() }
func (o *openingTB) Fatalf(format string, args ...any) { o.Fatal(fmt.Sprintf(format, args...)) }
func (o *openingTB) Skip(args ...any)                  { o.Fatal(args...) }
func (o *openingTB) Skipf(format string, args ...any)  { o.Fatalf(format, args...) }
func (o *openingTB) SkipNow()                          { o.FailNow() }
func (o *openingTB) Failed() bool                      { return o.refusal != "" }

// another opens the trial's store once more, or tells why it cannot be.
func (s *storeTrial[Tx]) another() (second *storeTrial[Tx], refusal error) {
	second = &storeTrial[Tx]{rows: s.rows}
	opening := &openingTB{TB: s.tb}
	err := ending(func() error {
		second.store = s.open(opening, s.dir)
		return nil
	})
	if opening.Failed() {
		return nil, errors.New(opening.refusal)
	}
	if err != nil {
		return nil, err
	}
	if second.id, second.epoch, err = second.store.Boot(context.Background()); err != nil {
		return nil, errors.Join(err, second.close())
	}
	return second, nil
}

func (s *storeTrial[Tx]) twoOpenings() error {
	r, err := s.put(claimed(orderKey(1), "first"))
	if err != nil {
		return err
	}
	second, refusal := s.another()
	if refusal != nil {
		s.tb.Logf("the second opening is refused: %v", refusal)
		_, err := s.put(moved(r, keystate.Waiting))
		return err
	}
	defer second.close()
	if second.id != s.id || second.epoch <= s.epoch {
		return fmt.Errorf("opened twice, it has the identities %x and %x, the epochs %d and %d",
			s.id, second.id, s.epoch, second.epoch)
	}
	if err := cmp.Or(s.holds(r), second.holds(r)); err != nil {
		return fmt.Errorf("what the first opening wrote: %w", err)
	}
	taken, err := second.put(moved(r, keystate.Waiting))
	if err := cmp.Or(err, s.holds(taken), second.holds(taken)); err != nil {
		return fmt.Errorf("what the second opening wrote: %w", err)
	}
	if _, err := s.put(moved(r, keystate.Parked)); !errors.Is(err, keystate.ErrFenced) {
		return fmt.Errorf("what the second opening took over, the first wrote: %v, want ErrFenced", err)
	}
	const each = 50
	err = atOnce(4, func(i int) error {
		for range each {
			err := []*storeTrial[Tx]{s, second}[i%2].update(func(tx recordTx[Tx]) error {
				_, err := tx.add("n")
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return cmp.Or(err, second.close(), s.holds(taken), s.rowIs("n", strconv.Itoa(4*each)))
}

func (s *storeTrial[Tx]) absentIsNotFound() error {
	present := keystate.Key{Scope: "a", ID: "b"}
	absent := []keystate.Key{
		{ID: "b"}, {Scope: "a", ID: "B"}, {Scope: "A", ID: "b"}, {Scope: "a", ID: "b\x00"}, {Scope: "a", ID: "b "},
		{Scope: "a\x00", ID: "b"}, {Scope: "a", ID: "bb"}, {Scope: "b", ID: "a"}, {ID: "ab"}, {ID: "a/b"},
	}
	notFound := func() error {
		for _, key := range absent {
			if err := s.holdsNot(key); err != nil {
				return err
			}
			err := s.update(func(tx recordTx[Tx]) error {
				_, err := tx.Get(key)
				return err
			})
			if !errors.Is(err, keystate.ErrNotFound) {
				return fmt.Errorf("in an Update, getting %q: %v, want ErrNotFound", key, err)
			}
		}
		return nil
	}
	if err := cmp.Or(s.holdsNot(present), notFound()); err != nil {
		return err
	}
	if _, err := s.put(claimed(present, "first")); err != nil {
		return err
	}
	return notFound()
}

func (s *storeTrial[Tx]) fieldsComeBack() error {
	return s.random(func(t *rapid.T, s *storeTrial[Tx]) error {
		key := func(r keystate.Record) keystate.Key { return r.Key }
		drawn := rapid.SliceOfNDistinct(drawnRecord(), 1, 4, key).Draw(t, "records")
		var stored []keystate.Record
		err := s.update(func(tx recordTx[Tx]) error {
			stored = slices.Clone(drawn)
			for i := range stored {
				if err := tx.Put(&stored[i]); err != nil {
					return err
				}
				got, err := tx.Get(stored[i].Key)
				if err := cmp.Or(err, sameRecord(got, stored[i])); err != nil {
					return fmt.Errorf("in its own transaction: %w", err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for i, r := range stored {
			drawn[i].Version, drawn[i].Sequence = 1, r.Sequence
			if err := cmp.Or(sameRecord(r, drawn[i]), s.holds(r)); err != nil {
				return err
			}
		}
		if err := s.lists(stored); err != nil {
			return err
		}
		if err := s.reopen(); err != nil {
			return err
		}
		for _, r := range stored {
			if err := s.holds(r); err != nil {
				return fmt.Errorf("after reopening: %w", err)
			}
		}
		return s.lists(stored)
	})
}

// lists demands that the listings hold these records and no others.
func (s *storeTrial[Tx]) lists(want []keystate.Record) error {
	c, err := s.contents()
	if err != nil {
		return err
	}
	return sameRecords(byKey(slices.Concat(c.unfinished, c.finished)), byKey(want))
}

func byKey(records []keystate.Record) []keystate.Record {
	return slices.SortedFunc(slices.Values(records), func(a, b keystate.Record) int {
		return cmp.Or(cmp.Compare(a.Key.Scope, b.Key.Scope), cmp.Compare(a.Key.ID, b.Key.ID))
	})
}

// random runs a property of new stores for drawn values; what falsifies it is the error.
func (s *storeTrial[Tx]) random(property func(*rapid.T, *storeTrial[Tx]) error) error {
	hearing := &hearingTB{TB: s.tb}
	rapid.Check(hearing, func(t *rapid.T) {
		if err := s.afresh(func(s *storeTrial[Tx]) error { return property(t, s) }); err != nil {
			t.Fatal(err)
		}
	})
	return errors.Join(hearing.errs...)
}

// A hearingTB keeps the errors that it is told.
type hearingTB struct {
	testing.TB
	errs []error
}

func (h *hearingTB) Error(args ...any) { h.errs = append(h.errs, errors.New(fmt.Sprint(args...))) }
func (h *hearingTB) Errorf(format string, args ...any) {
	h.errs = append(h.errs, fmt.Errorf(format, args...))
}
func (h *hearingTB) Fatal(args ...any)                 { h.Error(args...) }
func (h *hearingTB) Fatalf(format string, args ...any) { h.Errorf(format, args...) }
func (h *hearingTB) Fail()                             { h.Error("it fails") }
func (h *hearingTB) FailNow()                          {} // rapid's last word: it has told an error before
func (h *hearingTB) Failed() bool                      { return len(h.errs) > 0 }

// drawnKey draws any key, with those that are easily got wrong in front.
func drawnKey() *rapid.Generator[keystate.Key] {
	part := func(least int) *rapid.Generator[string] {
		nasty := []string{
			strings.Repeat("\xff", 255), strings.Repeat("\x00", 255), "\xff", "\x00", "/", "a/b", "a\x00b", "'", "%", "é", "\xc3",
		}
		if least == 0 {
			nasty = append(nasty, "", "", "")
		}
		return rapid.OneOf(
			rapid.SampledFrom(nasty),
			rapid.Map(rapid.SliceOfN(rapid.Byte(), least, 255), func(b []byte) string { return string(b) }),
			rapid.StringMatching(`[a-z0-9-]{1,40}`),
		)
	}
	return rapid.Custom(func(t *rapid.T) keystate.Key {
		return keystate.Key{Scope: part(0).Draw(t, "scope"), ID: part(1).Draw(t, "ID")}
	})
}

// drawnRecord draws any new record that makes sense: what a record must not be, a store may refuse.
func drawnRecord() *rapid.Generator[keystate.Record] {
	const farFuture = 1 << 52 // microseconds: the year 2112
	instant := rapid.Map(rapid.Int64Range(1, farFuture), func(micros int64) time.Time { return time.UnixMicro(micros).UTC() })
	maybe := rapid.OneOf(rapid.Just(time.Time{}), instant)
	point := rapid.Map(rapid.StringN(1, 30, 100), func(s string) keystate.RecoveryPoint { return keystate.RecoveryPoint(s) })
	text := rapid.OneOf(rapid.Just(""), rapid.StringN(0, 300, 1024))
	attempts := rapid.OneOf(rapid.IntRange(0, 5), rapid.Just(1<<31-1))
	id := rapid.Map(rapid.SliceOfN(rapid.Byte(), 16, 16), func(b []byte) [16]byte { return [16]byte(b) })
	passage := rapid.Custom(func(t *rapid.T) keystate.Passage {
		return keystate.Passage{
			Point: point.Draw(t, "point"), At: instant.Draw(t, "at"),
			Attempts: attempts.Draw(t, "attempts"), Ignored: text.Draw(t, "ignored"),
		}
	})
	return rapid.Custom(func(t *rapid.T) keystate.Record {
		r := keystate.Record{
			Key: drawnKey().Draw(t, "key"), Machine: rapid.StringN(1, 20, 80).Draw(t, "machine"),
			Status: rapid.SampledFrom(everyStatus).Draw(t, "status"),
			State:  rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "state"), Epoch: rapid.Uint64Range(0, 1<<60).Draw(t, "epoch"),
			Incarnation: id.Draw(t, "incarnation"), Fingerprint: id.Draw(t, "fingerprint"),
			Created: instant.Draw(t, "created"), Due: maybe.Draw(t, "due"), Attempts: attempts.Draw(t, "attempts"),
			Resend: rapid.Bool().Draw(t, "resend"), LastError: text.Draw(t, "last error"),
			History: rapid.OneOf(rapid.SliceOfN(passage, 1, 4), rapid.SliceOfN(passage, 50, 60)).Draw(t, "history"),
		}
		last := &r.History[len(r.History)-1]
		switch r.Status {
		case keystate.Answered:
			last.Point, r.Ended = keystate.Finished, instant.Draw(t, "ended")
			if rapid.Bool().Draw(t, "refused") {
				r.Refusal = &keystate.Refusal{Before: point.Draw(t, "before"), Reason: text.Draw(t, "reason")}
			}
		case keystate.Parked:
			r.ParkReason = rapid.SampledFrom([]keystate.ParkReason{
				keystate.AttemptsUsedUp, keystate.Indeterminate, keystate.TokenExpired, keystate.Undecodable, keystate.UnknownPoint,
			}).Draw(t, "park reason")
		}
		if r.Point = last.Point; r.Point == keystate.Finished && r.Status != keystate.Answered {
			t.Skip("only a finished key rests on the last point")
		}
		if rapid.Bool().Draw(t, "has begun") {
			r.Begun, r.FirstTried, r.Acted = point.Draw(t, "begun"), maybe.Draw(t, "first tried"), rapid.Bool().Draw(t, "acted")
		}
		return r
	})
}

func (s *storeTrial[Tx]) largestRecord() error {
	long := func(c string, n int) string { return strings.Repeat(c, n) }
	r := finished(keystate.Key{Scope: long("\xff", 255), ID: long("\x00", 255)}, "first")
	r.State = bytes.Repeat([]byte("state\x00\xff\x80"), 1<<17)
	r.LastError, r.Refusal = long("e", 1024), &keystate.Refusal{Before: "paid", Reason: long("é", 512)}
	r.History = nil
	for i := range 99 {
		point := keystate.RecoveryPoint(fmt.Sprintf("point %d", i))
		r.History = append(r.History, keystate.Passage{Point: point, At: longAgo, Attempts: i, Ignored: long("i", 1024)})
	}
	r.History = append(r.History, keystate.Passage{Point: keystate.Finished, At: longAgo})
	running := r
	running.Key.ID, running.Status, running.Ended, running.Refusal = long("\xff", 255), keystate.Running, time.Time{}, nil
	running.History = slices.Clone(r.History)
	running.History[99].Point, running.Point = "shipped", "shipped"

	stored, err := s.putAll([]keystate.Record{r, running})
	if err != nil {
		return err
	}
	if stored[1], err = s.put(stored[1]); err != nil {
		return err
	}
	if err := s.lists(stored); err != nil {
		return err
	}
	return cmp.Or(s.reopen(), s.holds(stored[0]), s.holds(stored[1]))
}

func (s *storeTrial[Tx]) keysLookAlike() error {
	keys := []keystate.Key{
		{Scope: "a", ID: "bc"}, {Scope: "ab", ID: "c"}, {ID: "abc"},
		{Scope: "a", ID: "b/c"}, {Scope: "a/b", ID: "c"}, {ID: "a/b/c"}, {Scope: "a/", ID: "b/c"}, {Scope: "a", ID: "/b/c"},
		{Scope: "a", ID: "b\x00c"}, {Scope: "a\x00b", ID: "c"}, {ID: "a\x00b\x00c"}, {Scope: "a\x00", ID: "b\x00c"},
		{Scope: "a", ID: "b\xffc"}, {Scope: "a\xffb", ID: "c"}, {ID: "a\xffb\xffc"},
		{Scope: "a", ID: "b"}, {Scope: "a", ID: "b\x00"}, {Scope: "a", ID: "b\x00\x00"}, {Scope: "a", ID: "B"},
		{ID: "\x01a"}, {Scope: "\x01", ID: "a"}, {ID: "a"}, {ID: "\x00"}, {Scope: "\x00", ID: "\x00"}, {ID: "\x00\x00"},
		{ID: "é"}, {ID: "e\u0301"}, {ID: "\xff"}, {ID: "\ufffd"}, {ID: " a"}, {ID: "a "},
	}
	var stored []keystate.Record
	for i, key := range keys {
		r, err := s.put(moved(claimed(key, strconv.Itoa(i)), everyStatus[i%4]))
		if err != nil {
			return fmt.Errorf("a key that is new: %w", err)
		}
		stored = append(stored, r)
	}
	for _, r := range stored {
		if err := s.holds(r); err != nil {
			return err
		}
	}
	return s.lists(stored)
}

func (s *storeTrial[Tx]) recordsAreCopies() error {
	want := claimed(orderKey(1), "first")
	spoil := func(r keystate.Record) {
		r.State[0] ^= 0xff
		r.History[0].Ignored = "spoilt"
	}
	err := s.update(func(tx recordTx[Tx]) error {
		r := claimed(orderKey(1), "first")
		if err := tx.Put(&r); err != nil {
			return err
		}
		spoil(r)
		got, err := tx.Get(r.Key)
		if err == nil {
			spoil(got)
		}
		return err
	})
	if err != nil {
		return err
	}
	want.Version = 1
	if err := s.holds(want); err != nil {
		return err
	}
	got, err := s.get(want.Key)
	if err != nil {
		return err
	}
	spoil(got)
	if err := s.holds(want); err != nil {
		return err
	}
	kept, err := s.contents()
	if err != nil {
		return err
	}
	for i := range 50 { // what was read outlives the transaction and the pages that it was read from
		if _, err := s.put(claimed(orderKey(100+i), "later")); err != nil {
			return err
		}
	}
	return sameRecord(kept.unfinished[0], want)
}

func (s *storeTrial[Tx]) putCountsVersions() error {
	r := claimed(orderKey(1), "first")
	for want := uint64(1); want <= 5; want++ {
		var err error
		if r, err = s.put(moved(r, unfinishedStatuses[want%3])); err != nil {
			return err
		}
		if r.Version != want {
			return fmt.Errorf("after write %d, Put has set the version to %d", want, r.Version)
		}
		if err := s.holds(r); err != nil {
			return err
		}
	}
	thrice := r
	err := s.update(func(tx recordTx[Tx]) error {
		thrice = r
		return cmp.Or(tx.Put(&thrice), tx.Put(&thrice), tx.Put(&thrice))
	})
	if err != nil {
		return err
	}
	if r, err = s.put(moved(thrice, keystate.Answered)); err != nil {
		return err
	}
	if r.Version != 9 {
		return fmt.Errorf("after 9 writes the version is %d", r.Version)
	}
	return s.holds(r)
}

func (s *storeTrial[Tx]) putFences() error {
	held := map[keystate.Status]keystate.Record{}
	for i, status := range everyStatus {
		r := claimed(orderKey(i), "first")
		var err error
		for range 2 {
			if r, err = s.put(r); err != nil {
				return err
			}
		}
		if held[status], err = s.put(moved(r, status)); err != nil {
			return err
		}
	}
	for status, r := range held {
		stale, future, stranger, fresh := r, r, r, claimed(r.Key, "second")
		stale.Version--
		future.Version++
		stranger.Incarnation[15]++
		cases := map[string]keystate.Record{
			"a version ago": stale, "a version ahead": future, "another incarnation": stranger, "a new key's": fresh,
		}
		for what, wrong := range cases {
			if err := s.fenced(wrong); err != nil {
				return fmt.Errorf("%s, on a key that is %q: %w", what, status, err)
			}
		}
	}
	ghost := claimed(orderKey(9), "first")
	ghost.Version = 1
	if err := s.fenced(ghost); err != nil {
		return fmt.Errorf("version 1 of a key that is not there: %w", err)
	}
	return s.holdsNot(ghost.Key)
}

// fenced demands that Put refuses a record and writes nothing, even where the transaction commits.
func (s *storeTrial[Tx]) fenced(wrong keystate.Record) error {
	before, err := s.contents()
	if err != nil {
		return err
	}
	for _, status := range everyStatus {
		var refused error
		after := moved(wrong, status)
		want := after
		err := s.update(func(tx recordTx[Tx]) error {
			after = moved(wrong, status)
			want = after
			refused = tx.Put(&after)
			return nil
		})
		if err != nil {
			return err
		}
		if !errors.Is(refused, keystate.ErrFenced) {
			return fmt.Errorf("putting %q, to be %q, returned %v, want ErrFenced", wrong.Key, status, refused)
		}
		if err := sameRecord(after, want); err != nil {
			return fmt.Errorf("a Put that is refused has changed what it was given: %w", err)
		}
		if _, err := s.put(after); !errors.Is(err, keystate.ErrFenced) {
			return fmt.Errorf("an Update that puts %q returned %v, want ErrFenced", wrong.Key, err)
		}
	}
	return s.unchanged(before)
}

func (s *storeTrial[Tx]) deleteFences() error {
	for i, status := range unfinishedStatuses {
		r, err := s.put(moved(claimed(orderKey(i), "first"), status))
		if err != nil {
			return err
		}
		if err := s.notDeleted(r, nil); err != nil {
			return fmt.Errorf("a record that is %q: %w", status, err)
		}
	}
	r, err := s.put(finished(orderKey(5), "first"))
	if err != nil {
		return err
	}
	stale, future, stranger, ghost := r, r, r, r
	stale.Version--
	future.Version++
	stranger.Incarnation[0]++
	ghost.Key = orderKey(6)
	for what, wrong := range map[string]keystate.Record{
		"a version ago": stale, "a version ahead": future, "another incarnation": stranger, "a key that is not there": ghost,
	} {
		if err := s.notDeleted(wrong, keystate.ErrFenced); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	if err := s.delete(r); err != nil {
		return fmt.Errorf("deleting a finished record: %w", err)
	}
	if err := s.holdsNot(r.Key); err != nil {
		return err
	}
	if c, err := s.contents(); err != nil || len(c.finished) != 0 || c.counts.Finished != 0 {
		return fmt.Errorf("after the only finished record was deleted, there are %d, %+v, %v", len(c.finished), c.counts, err)
	}
	second, err := s.put(finished(r.Key, "second"))
	if err != nil {
		return fmt.Errorf("a deleted key is used again: %w", err)
	}
	if err := s.notDeleted(r, keystate.ErrFenced); err != nil {
		return fmt.Errorf("the key's former life: %w", err)
	}
	return cmp.Or(s.reopen(), s.holds(second))
}

// notDeleted demands that Delete refuses, with the wanted error if there is one, and changes nothing, even where the
// transaction commits.
func (s *storeTrial[Tx]) notDeleted(r keystate.Record, want error) error {
	before, err := s.contents()
	if err != nil {
		return err
	}
	var refused error
	err = s.update(func(tx recordTx[Tx]) error {
		refused = tx.Delete(r)
		return nil
	})
	if err != nil {
		return err
	}
	if refused == nil || want != nil && !errors.Is(refused, want) {
		return fmt.Errorf("deleting %q returned %v, want %v", r.Key, refused, cmp.Or(want, errors.New("an error")))
	}
	return s.unchanged(before)
}

func (s *storeTrial[Tx]) sequencesGrow() error {
	var last uint64
	var stored []keystate.Record
	finish := func(keys ...int) error {
		var batch []keystate.Record
		err := s.update(func(tx recordTx[Tx]) error {
			batch = nil
			for _, n := range keys {
				r, err := tx.Get(orderKey(n))
				if errors.Is(err, keystate.ErrNotFound) {
					r, err = claimed(orderKey(n), "first"), nil
				}
				if r = moved(r, keystate.Answered); err == nil {
					err = tx.Put(&r)
				}
				if err != nil {
					return err
				}
				batch = append(batch, r)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, r := range batch {
			if r.Sequence <= last {
				return fmt.Errorf("%q finished after sequence %d with %d", r.Key, last, r.Sequence)
			}
			last = r.Sequence
			if err := s.holds(r); err != nil {
				return err
			}
		}
		stored = append(stored, batch...)
		return nil
	}
	running, err := s.putAll(orders(0, 4, keystate.Running))
	if err != nil {
		return err
	}
	for _, r := range running {
		if r.Sequence != 0 {
			return fmt.Errorf("%q is running and has the sequence %d", r.Key, r.Sequence)
		}
	}
	deleteLast := func() error { return s.delete(stored[len(stored)-1]) }
	deleteAll := func() error {
		for _, r := range stored {
			if err := s.delete(r); err != nil && !errors.Is(err, keystate.ErrFenced) {
				return err
			}
		}
		return nil
	}
	steps := []func() error{
		func() error { return finish(3, 11) },
		func() error { return finish(1, 12, 0) },
		s.reopen,
		func() error { return finish(13, 2) },
		deleteLast,
		func() error { return finish(14) },
		deleteLast,
		s.reopen,
		func() error { return finish(15, 16) },
		deleteAll,
		func() error { return finish(17) },
		deleteLast,
		s.reopen,
		func() error { return finish(18) },
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

func (s *storeTrial[Tx]) countsEqualRecount() error {
	recount := func(tx recordTx[Tx]) error {
		_, err := contentsIn(tx)
		return err
	}
	n := 0
	for _, from := range everyStatus {
		for _, to := range everyStatus {
			n++
			r, err := s.put(moved(claimed(orderKey(n), "first"), from))
			if err != nil {
				return err
			}
			if err := s.view(recount); err != nil {
				return fmt.Errorf("a key becomes %q: %w", from, err)
			}
			if from == keystate.Answered {
				continue
			}
			err = s.update(func(tx recordTx[Tx]) error {
				next := moved(r, to)
				if err := tx.Put(&next); err != nil {
					return err
				}
				return recount(tx)
			})
			if err := cmp.Or(err, s.view(recount)); err != nil {
				return fmt.Errorf("from %q to %q: %w", from, to, err)
			}
		}
	}
	c, err := s.contents()
	if err != nil {
		return err
	}
	for i, r := range c.finished {
		given := errors.New("given up")
		err := s.update(func(tx recordTx[Tx]) error {
			if err := cmp.Or(tx.Delete(r), recount(tx)); err != nil {
				return err
			}
			if i%2 == 0 {
				return given
			}
			return nil
		})
		if err != nil && !errors.Is(err, given) {
			return err
		}
		if err := s.view(recount); err != nil {
			return fmt.Errorf("a record is deleted, or the deletion rolled back: %w", err)
		}
	}
	return cmp.Or(s.reopen(), s.view(recount))
}

func (s *storeTrial[Tx]) unfinishedPages() error {
	var records []keystate.Record
	for i := range 50 {
		key := orderKey(i * 7919 % 50)
		switch i % 5 {
		case 1:
			key.Scope = ""
		case 2:
			key.Scope, key.ID = strings.Repeat("\xff", 1+i), key.ID+"\xff"
		case 3:
			key = keystate.Key{Scope: "\x00", ID: strings.Repeat("\x00", 1+i)}
		case 4:
			key.ID = strings.Repeat("é", i)
		}
		records = append(records, moved(claimed(key, "first"), unfinishedStatuses[i%3]))
	}
	stored, err := s.putAll(records)
	if err != nil {
		return err
	}
	if _, err := s.putAll(orders(100, 9, keystate.Answered)); err != nil {
		return err
	}
	var order []keystate.Record
	list := func(limit int) func(recordTx[Tx]) error {
		return func(tx recordTx[Tx]) error {
			got, err := listUnfinished(tx, limit)
			if err != nil {
				return err
			}
			if err := sameRecords(byKey(got), byKey(stored)); err != nil {
				return fmt.Errorf("in pages of %d: %w", limit, err)
			}
			if order == nil {
				order = got
			}
			if err := sameRecords(got, order); err != nil {
				return fmt.Errorf("in pages of %d, the order is another: %w", limit, err)
			}
			return nil
		}
	}
	for _, limit := range []int{1, 2, 3, 7, 49, 50, 51, 1000} {
		if err := cmp.Or(s.view(list(limit)), s.update(list(limit))); err != nil {
			return err
		}
	}
	return cmp.Or(s.reopen(), s.view(list(4)))
}

func (s *storeTrial[Tx]) unfinishedBetweenChanges() error {
	const keys = 60
	stored, err := s.putAll(orders(0, keys, keystate.Running))
	if err != nil {
		return err
	}
	order, err := s.contents()
	if err != nil {
		return err
	}
	now := map[keystate.Key]keystate.Record{}
	for _, r := range stored {
		now[r.Key] = r
	}
	seen := map[keystate.Key]bool{}
	var listed []keystate.Record // of those that were there all the time
	var last keystate.Key
	for round := 0; ; round++ {
		var page []keystate.Record
		err := s.view(func(tx recordTx[Tx]) (err error) {
			page, err = tx.Unfinished(last, 4)
			return err
		})
		if err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		for _, r := range page {
			if seen[r.Key] {
				return fmt.Errorf("%q is listed twice", r.Key)
			}
			seen[r.Key] = true
			if string(r.State) == "first" {
				listed = append(listed, r)
			}
		}
		// The key on which the next page depends ends, one before it changes or ends, and others come.
		last = page[len(page)-1].Key
		changes := []keystate.Record{moved(now[last], keystate.Answered)}
		if len(page) > 1 {
			changes = append(changes, moved(now[page[0].Key], everyStatus[round%4]))
		}
		if string(now[last].State) == "first" {
			next := keystate.Key{Scope: last.Scope, ID: last.ID + "\x00"}
			changes = append(changes, claimed(next, "newcomer"), claimed(orderKey(1000+len(seen)), "newcomer"))
		}
		for _, r := range changes {
			if now[r.Key], err = s.put(r); err != nil {
				return err
			}
		}
	}
	if err := sameRecords(listed, order.unfinished); err != nil {
		return fmt.Errorf("of the keys that were there all the time: %w", err)
	}
	return nil
}

func (s *storeTrial[Tx]) finishedOrder() error {
	const keys = 30
	stored, err := s.putAll(orders(0, keys, keystate.Waiting))
	if err != nil {
		return err
	}
	var want []keystate.Record
	for i := range keys {
		r, err := s.put(moved(stored[i*17%keys], keystate.Answered))
		if err != nil {
			return err
		}
		want = append(want, r)
	}
	list := func() error {
		for _, limit := range []int{1, 2, 7, keys, 1000} {
			var got []keystate.Record
			err := s.view(func(tx recordTx[Tx]) (err error) {
				got, err = listFinished(tx, limit)
				return err
			})
			if err := cmp.Or(err, sameRecords(got, want)); err != nil {
				return fmt.Errorf("in pages of %d: %w", limit, err)
			}
		}
		return nil
	}
	if err := list(); err != nil {
		return err
	}
	gone := want[10].Sequence
	for _, i := range []int{29, 11, 10, 0} {
		if err := s.delete(want[i]); err != nil {
			return err
		}
		want = slices.Delete(want, i, i+1)
	}
	err = s.view(func(tx recordTx[Tx]) error {
		page, err := tx.Finished(gone, 3)
		if err := cmp.Or(err, sameRecords(page, want[9:12])); err != nil {
			return fmt.Errorf("after a record that was deleted: %w", err)
		}
		for _, last := range []uint64{want[len(want)-1].Sequence, math.MaxInt64, math.MaxUint64} {
			if page, err = tx.Finished(last, 3); err != nil || len(page) > 0 {
				return fmt.Errorf("after sequence %d, the last or later, there are %d more, %v", last, len(page), err)
			}
		}
		return nil
	})
	return cmp.Or(err, list(), s.reopen(), list())
}

func (s *storeTrial[Tx]) thousands() error {
	const running, done = 2000, 1000
	live, err := s.putAll(orders(0, running, keystate.Running))
	if err != nil {
		return err
	}
	ended, err := s.putAll(orders(running, done, keystate.Answered))
	if err != nil {
		return err
	}
	return s.view(func(tx recordTx[Tx]) error {
		gotLive, err := listUnfinished(tx, 256)
		if err := cmp.Or(err, sameRecords(byKey(gotLive), byKey(live))); err != nil {
			return err
		}
		gotEnded, err := listFinished(tx, 256)
		if err := cmp.Or(err, sameRecords(gotEnded, ended)); err != nil {
			return err
		}
		if c, err := tx.Counts(); err != nil || c != (keystate.Counts{Running: running, Finished: done}) {
			return fmt.Errorf("the Counts are %+v, %v", c, err)
		}
		return nil
	})
}

func (s *storeTrial[Tx]) ownWrites() error {
	old, err := s.putAll(append(orders(0, 2, keystate.Running), orders(2, 1, keystate.Answered)...))
	if err != nil {
		return err
	}
	return s.update(func(tx recordTx[Tx]) error {
		sees := func(want ...keystate.Record) error {
			for _, r := range want {
				got, err := tx.Get(r.Key)
				if err := cmp.Or(err, sameRecord(got, r)); err != nil {
					return fmt.Errorf("getting it: %w", err)
				}
			}
			c, err := contentsIn(tx)
			if err := cmp.Or(err, sameRecords(byKey(slices.Concat(c.unfinished, c.finished)), byKey(want))); err != nil {
				return fmt.Errorf("listed: %w", err)
			}
			return nil
		}
		if err := sees(old...); err != nil {
			return err
		}
		added, changed := claimed(orderKey(9), "first"), moved(old[0], keystate.Parked)
		if err := cmp.Or(tx.Put(&added), tx.Put(&changed)); err != nil {
			return err
		}
		if err := sees(added, changed, old[1], old[2]); err != nil {
			return fmt.Errorf("after Put: %w", err)
		}
		ended := moved(old[1], keystate.Answered)
		added = moved(added, keystate.Answered)
		if err := cmp.Or(tx.Put(&ended), tx.Put(&added)); err != nil {
			return err
		}
		if err := sees(added, changed, ended, old[2]); err != nil {
			return fmt.Errorf("after finishing: %w", err)
		}
		if err := cmp.Or(tx.Delete(old[2]), tx.Delete(added), sees(changed, ended)); err != nil {
			return fmt.Errorf("after Delete: %w", err)
		}
		if _, err := tx.Get(added.Key); !errors.Is(err, keystate.ErrNotFound) {
			return fmt.Errorf("getting it after Delete: %v, want ErrNotFound", err)
		}
		again := claimed(added.Key, "second")
		if err := cmp.Or(tx.Put(&again), tx.setRow("row", "own")); err != nil {
			return err
		}
		if err := sees(changed, ended, again); err != nil {
			return fmt.Errorf("after Put of a deleted key: %w", err)
		}
		if value, err := tx.row("row"); err != nil || value != "own" {
			return fmt.Errorf("the row is %q, %v", value, err)
		}
		return nil
	})
}

// A customError tells whether an error comes back as what it is.
type customError struct{ code int }

func (e *customError) Error() string { return fmt.Sprintf("code %d", e.code) }

func (s *storeTrial[Tx]) errorRollsBack() error {
	sentinel := errors.New("no stock")
	err := s.rollsBack(func() error { return fmt.Errorf("%w: %w", sentinel, &customError{42}) })
	var custom *customError
	if errors.Is(err, errTrace) || !errors.Is(err, sentinel) || !errors.As(err, &custom) || custom.code != 42 {
		return fmt.Errorf("the function's error came back as: %w", cmp.Or(err, errNone))
	}
	return nil
}

func (s *storeTrial[Tx]) panicRollsBack() error {
	err := s.rollsBack(func() error { panic("out of stock") })
	if err == nil || errors.Is(err, errPanicked) || errors.Is(err, errTrace) {
		return fmt.Errorf("an Update with a function that panics: %w", cmp.Or(err, errNone))
	}
	return nil
}

// goexitRollsBack allows both for an error, and for the end of the goroutine that called Update.
func (s *storeTrial[Tx]) goexitRollsBack() error {
	err := s.rollsBack(func() error { runtime.Goexit(); return nil })
	if err == nil || errors.Is(err, errPanicked) || errors.Is(err, errTrace) {
		return fmt.Errorf("an Update with a function that calls runtime.Goexit: %w", cmp.Or(err, errNone))
	}
	return nil
}

var (
	errNone  = errors.New("there was no error")
	errTrace = errors.New("it left a trace")
)

// rollsBack returns the error of an Update that writes all there is to write and then fails. A trace of it is errTrace.
func (s *storeTrial[Tx]) rollsBack(fail func() error) error {
	stored, err := s.putAll(append(orders(0, 2, keystate.Running), orders(2, 2, keystate.Answered)...))
	if err != nil {
		return fmt.Errorf("%w: %w", errTrace, err)
	}
	if err := s.update(func(tx recordTx[Tx]) error { return tx.setRow("old", "before") }); err != nil {
		return fmt.Errorf("%w: %w", errTrace, err)
	}
	before, err := s.contents()
	if err != nil {
		return fmt.Errorf("%w: %w", errTrace, err)
	}
	var failed error
	for range 3 {
		failed = ending(func() error {
			return s.update(func(tx recordTx[Tx]) error {
				added := finished(orderKey(9), "first")
				ended, parked := moved(stored[0], keystate.Answered), moved(stored[1], keystate.Parked)
				err := cmp.Or(tx.Put(&added), tx.Put(&ended), tx.Put(&parked), tx.Delete(stored[2]),
					tx.setRow("old", "after"), tx.setRow("new", "after"))
				if err != nil {
					return err
				}
				return fail()
			})
		})
		if failed == nil {
			return nil
		}
		for _, opened := range []func() error{func() error { return nil }, s.reopen} {
			err := cmp.Or(opened(), s.unchanged(before), s.rowIs("old", "before"), s.rowIs("new", ""))
			if err != nil {
				return fmt.Errorf("%w: %w, after: %w", errTrace, err, failed)
			}
		}
	}
	next, err := s.put(moved(stored[0], keystate.Answered))
	if err == nil && next.Sequence <= stored[3].Sequence {
		err = fmt.Errorf("sequence %d comes after %d", next.Sequence, stored[3].Sequence)
	}
	if err != nil {
		return fmt.Errorf("%w: the next commit: %w, after: %w", errTrace, err, failed)
	}
	return failed
}

// failures are the ways in which a function can fail.
var failures = []func() error{
	func() error { return errors.New("failed on purpose") },
	func() error { panic("panicked on purpose") },
	func() error { runtime.Goexit(); return nil },
}

func (s *storeTrial[Tx]) failuresHarmNobody() error {
	const members, rounds = 24, 5
	good := 0
	for round := range rounds {
		err := atOnce(members, func(i int) error {
			key := orderKey(round*members + i)
			fail := func() error { return nil }
			if i%4 != 0 {
				fail = failures[i%4-1]
			}
			err := ending(func() error {
				return s.update(func(tx recordTx[Tx]) error {
					r := claimed(key, "first")
					if err := cmp.Or(tx.Put(&r), tx.setRow(key.ID, "written")); err != nil {
						return err
					}
					if _, err := tx.add("n"); err != nil {
						return err
					}
					return fail()
				})
			})
			if i%4 == 0 && err != nil {
				return fmt.Errorf("a member that does not fail: %w", err)
			} else if i%4 != 0 && (err == nil || errors.Is(err, errPanicked)) {
				return fmt.Errorf("a member that fails: %w", cmp.Or(err, errNone))
			}
			return nil
		})
		if err != nil {
			return err
		}
		for i := range members {
			key := orderKey(round*members + i)
			err := cmp.Or(s.holdsNot(key), s.rowIs(key.ID, ""))
			if i%4 == 0 {
				want := claimed(key, "first")
				want.Version = 1
				err = cmp.Or(s.holds(want), s.rowIs(key.ID, "written"))
				good++
			}
			if err != nil {
				return err
			}
		}
	}
	_, err := s.contents()
	return cmp.Or(err, s.rowIs("n", strconv.Itoa(good)))
}

func (s *storeTrial[Tx]) rerunsTakeEffectOnce() error {
	const members, rounds = 24, 8
	var total atomic.Int64
	for round := range rounds {
		err := atOnce(members, func(i int) error {
			key := orderKey(round*members + i)
			var runs, running atomic.Int64
			last := ""
			err := ending(func() error {
				return s.update(func(tx recordTx[Tx]) error {
					total.Add(1)
					if running.Add(1) > 1 {
						return errors.New("two runs of the function at the same time")
					}
					defer running.Add(-1)
					last = strconv.FormatInt(runs.Add(1), 10)
					if _, err := tx.Get(key); !errors.Is(err, keystate.ErrNotFound) {
						return fmt.Errorf("run %s found a record of its own: %v", last, err)
					}
					if value, err := tx.row(key.ID); err != nil || value != "" {
						return fmt.Errorf("run %s found a row of its own: %q, %v", last, value, err)
					}
					r := finished(key, "run "+last)
					if err := cmp.Or(tx.Put(&r), tx.setRow(key.ID, last)); err != nil {
						return err
					}
					if _, err := tx.add("n"); err != nil || i%3 > 0 {
						return err
					}
					return failures[i/3%3]()
				})
			})
			if i%3 == 0 { // it fails, so that the others are run again
				if err == nil {
					return fmt.Errorf("a function that fails: %w", errNone)
				}
				return cmp.Or(s.holdsNot(key), s.rowIs(key.ID, ""))
			}
			if err != nil {
				return err
			}
			r, err := s.get(key)
			if err == nil && (r.Version != 1 || string(r.State) != "run "+last) {
				err = fmt.Errorf("the record of %q is of %q, version %d, the last run was %s", key, r.State, r.Version, last)
			}
			return cmp.Or(err, s.rowIs(key.ID, last))
		})
		if err != nil {
			return err
		}
	}
	s.tb.Logf("%d functions ran %d times", members*rounds, total.Load())
	_, err := s.contents()
	return cmp.Or(err, s.rowIs("n", strconv.Itoa(rounds*members*2/3)))
}

func (s *storeTrial[Tx]) oneClaims() error {
	for round := range 10 {
		key := orderKey(round)
		claim := func(who int) keystate.Record { return claimed(key, strconv.Itoa(who)) }
		if err := s.oneWins(claim); err != nil {
			return fmt.Errorf("claiming %q: %w", key, err)
		}
	}
	return nil
}

func (s *storeTrial[Tx]) oneMovesOn() error {
	stored, err := s.put(claimed(orderKey(1), "first"))
	for round := 0; round < 10 && err == nil; round++ {
		err = s.oneWins(func(who int) keystate.Record {
			r := moved(stored, unfinishedStatuses[who%3])
			r.State = []byte(strconv.Itoa(who))
			return r
		})
		if err != nil {
			return fmt.Errorf("moving on from version %d: %w", stored.Version, err)
		}
		stored, err = s.get(stored.Key)
	}
	return err
}

// oneWins demands that of many who put at once one succeeds, and all others are fenced.
func (s *storeTrial[Tx]) oneWins(put func(who int) keystate.Record) error {
	const many = 16
	won := make([]*keystate.Record, many)
	err := atOnce(many, func(who int) error {
		stored, err := s.put(put(who))
		if err == nil {
			won[who] = &stored
		} else if !errors.Is(err, keystate.ErrFenced) {
			return fmt.Errorf("who loses gets %w, want ErrFenced", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	won = slices.DeleteFunc(won, func(r *keystate.Record) bool { return r == nil })
	if len(won) != 1 {
		return fmt.Errorf("%d of %d won", len(won), many)
	}
	return s.holds(*won[0])
}

func (s *storeTrial[Tx]) noLostIncrement() error {
	const callers, each = 8, 25
	key := orderKey(1)
	if _, err := s.put(claimed(key, "0")); err != nil {
		return err
	}
	err := atOnce(callers, func(int) error {
		for range each {
			err := s.update(func(tx recordTx[Tx]) error {
				n, err := tx.add("n")
				if err != nil {
					return err
				}
				runtime.Gosched()
				r, err := tx.Get(key)
				if err != nil {
					return err
				}
				if string(r.State) != strconv.Itoa(n) {
					return fmt.Errorf("the row says %d, the record %s", n, r.State)
				}
				r.State = []byte(strconv.Itoa(n + 1))
				return tx.Put(&r)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	r, err := s.get(key)
	if err == nil && r.Version != 1+callers*each {
		err = fmt.Errorf("after %d increments the version is %d", callers*each, r.Version)
	}
	return cmp.Or(err, s.rowIs("n", strconv.Itoa(callers*each)))
}

// A boundUpdate is an Update whose context may end.
type boundUpdate struct {
	key      keystate.Key
	err      error
	returned atomic.Bool
	late     atomic.Bool // its function ran when Update had returned
}

// updateUntil writes a record and a row, and calls inside between the two.
func (s *storeTrial[Tx]) updateUntil(ctx context.Context, n int, inside func()) *boundUpdate {
	u := &boundUpdate{key: orderKey(n)}
	u.err = s.updateWithin(ctx, func(tx recordTx[Tx]) error {
		defer func() { u.late.CompareAndSwap(false, u.returned.Load()) }()
		r := claimed(u.key, "first")
		if err := tx.Put(&r); err != nil {
			return err
		}
		inside()
		return tx.setRow(u.key.ID, "written")
	})
	u.returned.Store(true)
	return u
}

func (s *storeTrial[Tx]) contextEnds() error {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	var updates []*boundUpdate
	for n := range 3 {
		updates = append(updates, s.updateUntil(ended, n, nothing))
	}
	within, cancel := context.WithCancel(context.Background())
	updates = append(updates, s.updateUntil(within, 3, cancel))

	// One waits while another keeps the store busy; then its context ends.
	waiting, cancel := context.WithCancel(context.Background())
	defer cancel()
	var busy, waiter *boundUpdate
	var entered sync.Once
	inside, release, waited := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var both sync.WaitGroup
	both.Go(func() {
		busy = s.updateUntil(context.Background(), 4, func() {
			entered.Do(func() { close(inside) })
			<-release
		})
	})
	<-inside
	both.Go(func() {
		defer close(waited)
		waiter = s.updateUntil(waiting, 5, nothing)
	})
	linger(waited)
	cancel()
	linger(waited)
	close(release)
	both.Wait()
	if busy.err != nil {
		return fmt.Errorf("whose context has not ended: %w", busy.err)
	}
	updates = append(updates, busy, waiter)
	settled := func() error {
		for _, u := range updates {
			if err := s.wholly(u.key, u.err); err != nil {
				return err
			}
			if u.late.Load() {
				return fmt.Errorf("the function of %q ran when Update had returned", u.key)
			}
		}
		return nil
	}
	return cmp.Or(settled(), s.reopen(), settled())
}

// wholly demands that an Update which returned err wrote both the record and the row of a key, or neither.
func (s *storeTrial[Tx]) wholly(key keystate.Key, err error) error {
	_, missing := s.get(key)
	if missing != nil && !errors.Is(missing, keystate.ErrNotFound) {
		return missing
	}
	row, rowErr := s.row(key.ID)
	switch record := missing == nil; {
	case rowErr != nil:
		return rowErr
	case record != (row == "written"):
		return fmt.Errorf("half of an Update is there: of %q the record is there: %v, the row is %q", key, record, row)
	case err == nil && !record:
		return fmt.Errorf("an Update of %q returned nil, and nothing is there", key)
	}
	return nil
}

func (s *storeTrial[Tx]) viewSeesCommitted() error {
	stored := claimed(orderKey(1), "first")
	for n := range 30 {
		next := stored
		err := s.update(func(tx recordTx[Tx]) error {
			next = moved(stored, unfinishedStatuses[n%3])
			return cmp.Or(tx.Put(&next), tx.setRow("n", strconv.Itoa(n)))
		})
		if err := cmp.Or(err, s.holds(next), s.rowIs("n", strconv.Itoa(n))); err != nil {
			return fmt.Errorf("after Update %d: %w", n, err)
		}
		stored = next
	}
	runs := 0
	if err := s.view(func(recordTx[Tx]) error { runs++; return nil }); err != nil || runs != 1 {
		return fmt.Errorf("the View ran its function %d times: %v", runs, err)
	}
	return nil
}

// A triple is two rows and a record that every Update keeps equal.
type triple struct{ left, right, state string }

func (s *storeTrial[Tx]) triple(midway func()) (seen triple, err error) {
	err = s.view(func(tx recordTx[Tx]) error {
		if seen.left, err = tx.row("left"); err != nil {
			return err
		}
		midway()
		if seen.right, err = tx.row("right"); err != nil {
			return err
		}
		r, err := tx.Get(orderKey(1))
		seen.state = string(r.State)
		return err
	})
	if err == nil && (seen.left != seen.right || seen.left != seen.state) {
		err = fmt.Errorf("a View sees the rows %q and %q and a record with %q", seen.left, seen.right, seen.state)
	}
	return seen, err
}

// setTriple calls midway after each of its writes.
func (s *storeTrial[Tx]) setTriple(value string, midway func()) error {
	return s.update(func(tx recordTx[Tx]) error {
		if err := tx.setRow("left", value); err != nil {
			return err
		}
		midway()
		r, err := tx.Get(orderKey(1))
		if errors.Is(err, keystate.ErrNotFound) {
			r, err = claimed(orderKey(1), ""), nil
		}
		if err != nil {
			return err
		}
		r.State = []byte(value)
		if err := tx.Put(&r); err != nil {
			return err
		}
		midway()
		return tx.setRow("right", value)
	})
}

// nothing is what happens midway when nothing does.
func nothing() {}

func (s *storeTrial[Tx]) viewIsConsistent() error {
	if err := s.setTriple("0", nothing); err != nil {
		return err
	}
	for n := 1; n <= 4; n++ {
		if err := s.viewsDuringUpdate(n); err != nil {
			return err
		}
	}
	if err := s.updateDuringView(); err != nil {
		return err
	}
	var writing atomic.Int64
	const writers, each = 2, 40
	writing.Store(writers)
	return atOnce(2*writers, func(i int) error {
		if i < writers {
			defer writing.Add(-1)
			for n := range each {
				if err := s.setTriple(fmt.Sprintf("%d of %d", n, i), runtime.Gosched); err != nil {
					return err
				}
			}
			return nil
		}
		for writing.Load() > 0 {
			if _, err := s.triple(runtime.Gosched); err != nil {
				return err
			}
		}
		return nil
	})
}

// viewsDuringUpdate reads between the writes of an Update that sets n: who is done before it, has seen n-1.
func (s *storeTrial[Tx]) viewsDuringUpdate(n int) error {
	var views sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	err := s.setTriple(strconv.Itoa(n), func() {
		done := make(chan struct{})
		var inside atomic.Bool
		inside.Store(true)
		views.Go(func() {
			defer close(done)
			seen, err := s.triple(nothing)
			if err == nil && inside.Load() && seen.left != strconv.Itoa(n-1) {
				err = fmt.Errorf("while an Update sets %d, View sees %s", n, seen.left)
			}
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
		linger(done)
		inside.Store(false)
	})
	views.Wait()
	return cmp.Or(err, errors.Join(errs...))
}

// updateDuringView lets an Update commit while a View is between its reads.
func (s *storeTrial[Tx]) updateDuringView() error {
	for n := range 4 {
		var updated error
		var updating sync.WaitGroup
		_, err := s.triple(func() {
			done := make(chan struct{})
			updating.Go(func() {
				defer close(done)
				updated = s.setTriple(fmt.Sprintf("during %d", n), nothing)
			})
			linger(done)
		})
		updating.Wait()
		if err := cmp.Or(err, updated); err != nil {
			return err
		}
	}
	return nil
}

func (s *storeTrial[Tx]) viewCannotWrite() error {
	stored, err := s.putAll(append(orders(0, 1, keystate.Running), orders(1, 1, keystate.Answered)...))
	if err != nil {
		return err
	}
	before, err := s.contents()
	if err != nil {
		return err
	}
	writes := map[string]func(keystate.Keys) error{
		"Put of a new key":      func(k keystate.Keys) error { r := claimed(orderKey(2), "first"); return k.Put(&r) },
		"Put of a new answer":   func(k keystate.Keys) error { r := finished(orderKey(3), "first"); return k.Put(&r) },
		"Put of a key":          func(k keystate.Keys) error { r := moved(stored[0], keystate.Parked); return k.Put(&r) },
		"Put of a key's answer": func(k keystate.Keys) error { r := moved(stored[0], keystate.Answered); return k.Put(&r) },
		"Delete":                func(k keystate.Keys) error { return k.Delete(stored[1]) },
	}
	for what, write := range writes {
		var refused error
		err := s.view(func(tx recordTx[Tx]) error {
			refused = write(tx)
			_, err := contentsIn(tx)
			return err
		})
		if err == nil && refused == nil {
			return fmt.Errorf("%s in a View: %w", what, errNone)
		}
		if errors.Is(err, errMiscounted) {
			return fmt.Errorf("%s in a View: %w", what, err)
		}
		if err := s.unchanged(before); err != nil {
			return fmt.Errorf("%s in a View took effect: %w", what, err)
		}
	}
	err = s.view(func(tx recordTx[Tx]) error {
		return tx.setRow("row", "written")
	})
	if err == nil {
		return fmt.Errorf("a row is written in a View: %w", errNone)
	}
	if _, err := s.put(moved(stored[0], keystate.Waiting)); err != nil {
		return err
	}
	return cmp.Or(s.rowIs("row", ""), s.reopen(), s.holdsNot(orderKey(2)), s.holdsNot(orderKey(3)), s.holds(stored[1]))
}

func (s *storeTrial[Tx]) viewFails() error {
	stored, err := s.put(claimed(orderKey(1), "first"))
	if err != nil {
		return err
	}
	for i, fail := range failures {
		err := ending(func() error {
			return s.view(func(tx recordTx[Tx]) error {
				if _, err := tx.Get(stored.Key); err != nil {
					return err
				}
				return fail()
			})
		})
		if err == nil {
			return fmt.Errorf("a View with a function that fails: %w", errNone)
		}
		if stored, err = s.put(moved(stored, unfinishedStatuses[i%3])); err != nil {
			return fmt.Errorf("after a View that failed: %w", err)
		}
	}
	custom := &customError{7}
	if err := s.view(func(recordTx[Tx]) error { return fmt.Errorf("wrapped: %w", custom) }); !errors.Is(err, custom) {
		return fmt.Errorf("the function's error came back as %v", err)
	}
	return cmp.Or(s.reopen(), s.holds(stored))
}

func (s *storeTrial[Tx]) acknowledgedOutlivesClose() error {
	r := claimed(orderKey(0), "first")
	for n := range 4 {
		next := r
		err := s.update(func(tx recordTx[Tx]) error {
			next = r
			return cmp.Or(tx.Put(&next), tx.setRow("n", strconv.Itoa(n)))
		})
		if err := cmp.Or(err, s.reopen(), s.holds(next), s.rowIs("n", strconv.Itoa(n))); err != nil {
			return fmt.Errorf("after Close: %w", err)
		}
		r = next
	}
	const callers, most = 8, 40
	var acknowledged sync.Map // key → the error of its Update
	some := make(chan struct{}, callers*most)
	var all sync.WaitGroup
	for caller := range callers {
		all.Go(func() {
			for n := range most {
				key := orderKey(1 + caller*most + n)
				err := s.update(func(tx recordTx[Tx]) error {
					r := finished(key, "first")
					return cmp.Or(tx.Put(&r), tx.setRow(key.ID, "written"))
				})
				acknowledged.Store(key, err)
				some <- struct{}{}
				if err != nil {
					return
				}
			}
		})
	}
	for range callers {
		<-some
	}
	err := s.store.Close()
	all.Wait()
	if s.store = nil; err != nil {
		return fmt.Errorf("at Close: %w", err)
	}
	if err := s.boot(); err != nil {
		return err
	}
	good := 0
	for key, err := range acknowledged.Range {
		failed, _ := err.(error)
		if err := s.wholly(key.(keystate.Key), failed); err != nil {
			return fmt.Errorf("closed during Updates: %w", err)
		}
		if failed == nil {
			good++
		}
	}
	if good == 0 {
		return errors.New("no Update before Close succeeded")
	}
	_, err = s.contents()
	return err
}

func (s *storeTrial[Tx]) closedFails() error {
	r, err := s.put(claimed(orderKey(1), "first"))
	if err != nil {
		return err
	}
	closed := s.store
	if err := s.close(); err != nil {
		return err
	}
	ctx, ran := context.Background(), false
	calls := map[string]func() error{
		"Update": func() error { return closed.Update(ctx, func(Tx) error { ran = true; return nil }) },
		"View":   func() error { return closed.View(ctx, func(Tx) error { ran = true; return nil }) },
		"Boot":   func() error { _, _, err := closed.Boot(ctx); return err },
	}
	for range 2 {
		for name, call := range calls {
			if err := ending(call); err == nil || errors.Is(err, errPanicked) || errors.Is(err, errExited) || ran {
				return fmt.Errorf("%s after Close: ran %v, %w", name, ran, cmp.Or(err, errNone))
			}
		}
		if err := ending(closed.Close); errors.Is(err, errPanicked) || errors.Is(err, errExited) {
			return fmt.Errorf("at Close after Close: %w", err)
		}
	}
	if err := s.boot(); err != nil {
		return err
	}
	if err := ending(closed.Close); errors.Is(err, errPanicked) || errors.Is(err, errExited) {
		return fmt.Errorf("at Close after Close: %w", err)
	}
	return s.holds(r)
}

// A storeModel is what a store should hold.
type storeModel struct {
	records  map[keystate.Key]keystate.Record
	rows     map[string]string
	sequence uint64 // of the last that finished
}

func (m storeModel) clone() storeModel {
	m.records, m.rows = maps.Clone(m.records), maps.Clone(m.rows)
	return m
}

// A storeOp is one act in a transaction.
type storeOp struct {
	kind   string
	key    keystate.Key
	status keystate.Status
	who    string
}

// opKinds, with those more often that lead somewhere.
var opKinds = []string{
	"finish", "delete", "claim", "move", "row", "finish", "delete", "claim", "move", "finish", "stale", "stranger",
}

func drawnOp() *rapid.Generator[storeOp] {
	keys := []keystate.Key{{ID: "a"}, {Scope: "a", ID: "\x00"}, {Scope: "a\x00", ID: "\xff"}, {Scope: "\xff", ID: "a/a"}}
	return rapid.Custom(func(t *rapid.T) storeOp {
		return storeOp{
			kind:   rapid.SampledFrom(opKinds).Draw(t, "act"),
			key:    rapid.SampledFrom(keys).Draw(t, "key"),
			status: rapid.SampledFrom(unfinishedStatuses).Draw(t, "status"),
			who:    rapid.SampledFrom([]string{"ada", "bob", "eve"}).Draw(t, "who"),
		}
	})
}

// act does to the store and to the model what op says, and compares the answers.
func act[Tx any](tx recordTx[Tx], m *storeModel, op storeOp) error {
	held, exists := m.records[op.key]
	mismatch := func(err error) error {
		return fmt.Errorf("%+v on version %d, %q: %w", op, held.Version, held.Status, err)
	}
	next := held
	if !exists {
		next = claimed(op.key, op.who)
	}
	if next.Status != keystate.Answered {
		next = moved(next, op.status)
		next.State = []byte(op.who)
	}
	want := keystate.ErrFenced // of Put; nil: it succeeds
	switch op.kind {
	case "row":
		m.rows[op.who] = string(op.status)
		return tx.setRow(op.who, string(op.status))
	case "delete":
		return actDelete(tx, m, op)
	case "claim":
		next = claimed(op.key, op.who)
		if !exists {
			want = nil
		}
	case "move", "finish":
		if held.Status == keystate.Answered {
			return nil // what becomes of such a Put is not promised
		}
		if exists {
			want = nil
		} else {
			next.Version = 1
		}
		if op.kind == "finish" {
			next = moved(next, keystate.Answered)
		}
	case "stale":
		next.Version += 2
	case "stranger":
		if !exists {
			next.Version = 1
		}
		next.Incarnation[3]++
	}
	given := next.Version
	err := tx.Put(&next)
	if want != nil {
		if !errors.Is(err, want) {
			return mismatch(fmt.Errorf("putting it returned %w, want %w", cmp.Or(err, errNone), want))
		}
		return nil
	}
	if err != nil || next.Version != given+1 {
		return mismatch(fmt.Errorf("putting it returned %w and version %d", cmp.Or(err, errNone), next.Version))
	}
	if next.Status == keystate.Answered {
		if next.Sequence <= m.sequence {
			return mismatch(fmt.Errorf("sequence %d comes after %d", next.Sequence, m.sequence))
		}
		m.sequence = next.Sequence
	}
	m.records[op.key] = next
	return nil
}

func actDelete[Tx any](tx recordTx[Tx], m *storeModel, op storeOp) error {
	held, exists := m.records[op.key]
	if !exists {
		held = claimed(op.key, op.who)
		held.Version = 1
	}
	err := tx.Delete(held)
	switch {
	case !exists && !errors.Is(err, keystate.ErrFenced):
		return fmt.Errorf("deleting %q, which is not there, returned %w", op.key, cmp.Or(err, errNone))
	case exists && (held.Status == keystate.Answered) != (err == nil):
		return fmt.Errorf("deleting %q, which is %q, returned %w", op.key, held.Status, cmp.Or(err, errNone))
	case err == nil:
		delete(m.records, op.key)
	}
	return nil
}

// agrees demands that a transaction sees what the model holds.
func agrees[Tx any](tx recordTx[Tx], m storeModel) error {
	c, err := contentsIn(tx)
	if err != nil {
		return err
	}
	all := slices.Concat(c.unfinished, c.finished)
	if err := sameRecords(byKey(all), byKey(slices.Collect(maps.Values(m.records)))); err != nil {
		return fmt.Errorf("listed: %w", err)
	}
	for key, want := range m.records {
		got, err := tx.Get(key)
		if err := cmp.Or(err, sameRecord(got, want)); err != nil {
			return fmt.Errorf("getting %q: %w", key, err)
		}
	}
	for name, want := range m.rows {
		if got, err := tx.row(name); err != nil || got != want {
			return fmt.Errorf("row %q is %q, %w, want %q", name, got, cmp.Or(err, errNone), want)
		}
	}
	return nil
}

func (s *storeTrial[Tx]) modelAgrees() error {
	return s.random(func(t *rapid.T, s *storeTrial[Tx]) error {
		m := storeModel{records: map[keystate.Key]keystate.Record{}, rows: map[string]string{}}
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		transact := func(t *rapid.T, end func() error) error {
			ops := rapid.SliceOfN(drawnOp(), 1, 6).Draw(t, "acts")
			var after storeModel
			var judged error
			err := ending(func() error {
				return s.update(func(tx recordTx[Tx]) error {
					after, judged = m.clone(), nil
					for _, op := range ops {
						if judged = act(tx, &after, op); judged != nil {
							return judged
						}
					}
					if judged = agrees(tx, after); judged != nil {
						return judged
					}
					return end()
				})
			})
			if must(judged); err == nil {
				m = after
			}
			return err
		}
		broken := errors.New("broken off")
		t.Repeat(map[string]func(*rapid.T){
			"commit": func(t *rapid.T) { must(transact(t, func() error { return nil })) },
			"error": func(t *rapid.T) {
				if err := transact(t, func() error { return broken }); !errors.Is(err, broken) {
					t.Fatalf("the function's error came back as %v", err)
				}
			},
			"panic": func(t *rapid.T) {
				if err := transact(t, func() error { panic(broken) }); err == nil || errors.Is(err, errPanicked) {
					t.Fatalf("a panic came back as %v", err)
				}
			},
			"reopen": func(*rapid.T) { must(s.reopen()) },
			"":       func(*rapid.T) { must(s.view(func(tx recordTx[Tx]) error { return agrees(tx, m) })) },
		})
		return nil
	})
}
