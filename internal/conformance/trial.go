package conformance

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/keystate"
)

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
