package conformance

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"example.com/keystate"
)

func TestTheBoltStoreKeepsItsPromises(t *testing.T) {
	defer goleak.VerifyNone(t)
	Store(t, OpenBolt, BoltRows())
}

func TestAStoreThatSeveralEnginesShareMayPass(t *testing.T) {
	defer goleak.VerifyNone(t)
	setFlags(t, map[string]string{"rapid.checks": "20"})
	house := sharedHouse{stores: map[string]*sharedBolt{}}
	Store(t, house.open, BoltRows())
	if house.most < 2 {
		t.Error("the suite has not opened any store twice")
	}
}

func TestAStoreThatRunsEveryFunctionTwiceMayPass(t *testing.T) {
	defer goleak.VerifyNone(t)
	twice := fault{arm: func(s *faultyBolt) {
		s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
			err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
				if err := fn(tx); err != nil {
					return err
				}
				return errUndone
			})
			if !errors.Is(err, errUndone) {
				return err
			}
			return s.Store.Update(ctx, fn)
		}
	}}
	setFlags(t, map[string]string{"rapid.checks": "20"})
	Store(t, twice.open, BoltRows())
}

func TestAStoreThatReapsByItselfMayPass(t *testing.T) {
	defer goleak.VerifyNone(t)
	setFlags(t, map[string]string{"rapid.checks": "20"})
	Store(t, func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
		return &reapingBolt{Store: OpenBolt(t, dir)}
	}, BoltRows())
}

// A reapingBolt reaps by the time that it was given a record, as a server would; where it is faulty, in another way.
type reapingBolt struct {
	keystate.Store[*bbolt.Tx]
	is string // empty: sound
}

// brokenReapers are ways to reap that are wrong.
var brokenReapers = []string{"reaps before the time", "reaps more than it was asked for", "reaps the last first", "counts what others reap", "says nothing is ever due"}

func (s *reapingBolt) Reap(ctx context.Context, retention time.Duration, limit int) (reaped int, next time.Duration, err error) {
	due := retention == 0 || s.is == "reaps before the time"
	err = s.Update(ctx, func(tx *bbolt.Tx) error {
		keys := s.Keys(tx)
		reaped = 0
		page, err := keys.Finished(0, 1000)
		if next = retention; len(page) > 0 {
			next = retention / 2
		}
		if s.is == "reaps the last first" {
			slices.Reverse(page)
		}
		if s.is == "reaps more than it was asked for" {
			limit++
		}
		for _, r := range page[:min(limit, len(page))] {
			if !due {
				break
			}
			if err := keys.Delete(r); err != nil {
				return err
			}
			reaped++
		}
		return err
	})
	switch s.is {
	case "counts what others reap":
		if retention == 0 {
			reaped = limit
		}
	case "says nothing is ever due":
		next = 0
	}
	return reaped, next, err
}

// A sharedHouse lets a bbolt store be opened any number of times at once, as a database server would.
type sharedHouse struct {
	sync.Mutex
	stores map[string]*sharedBolt
	most   int // openings of one store at the same time
}

// A sharedBolt is the one store behind several openings.
type sharedBolt struct {
	keystate.Store[*bbolt.Tx]
	id     [16]byte
	epoch  uint64
	booted bool
	open   int
}

// A tenant is one opening.
type tenant struct {
	*sharedBolt
	house  *sharedHouse
	dir    string
	closed atomic.Bool
}

func (h *sharedHouse) open(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
	h.Lock()
	defer h.Unlock()
	if h.stores[dir] == nil {
		h.stores[dir] = &sharedBolt{Store: OpenBolt(t, dir)}
	}
	h.stores[dir].open++
	h.most = max(h.most, h.stores[dir].open)
	return &tenant{sharedBolt: h.stores[dir], house: h, dir: dir}
}

func (s *tenant) Boot(ctx context.Context) (id [16]byte, epoch uint64, err error) {
	s.house.Lock()
	defer s.house.Unlock()
	if s.closed.Load() {
		return id, 0, keystate.ErrClosed
	}
	if !s.booted {
		if s.id, s.epoch, err = s.Store.Boot(ctx); err != nil {
			return id, 0, err
		}
		s.epoch <<= 16 // each Boot of the store below leaves room for many of these
		s.booted = true
	}
	s.epoch++
	return s.id, s.epoch, nil
}

func (s *tenant) Update(ctx context.Context, fn func(*bbolt.Tx) error) error {
	if s.closed.Load() {
		return keystate.ErrClosed
	}
	return s.Store.Update(ctx, fn)
}

func (s *tenant) View(ctx context.Context, fn func(*bbolt.Tx) error) error {
	if s.closed.Load() {
		return keystate.ErrClosed
	}
	return s.Store.View(ctx, fn)
}

func (s *tenant) Close() error {
	s.house.Lock()
	defer s.house.Unlock()
	if s.closed.Swap(true) {
		return nil
	}
	if s.open--; s.open > 0 {
		return nil
	}
	delete(s.house.stores, s.dir)
	return s.Store.Close()
}

func TestEveryBrokenStoreIsFound(t *testing.T) {
	defer goleak.VerifyNone(t)
	setFlags(t, map[string]string{"rapid.checks": "500", "rapid.shrinktime": "0s", "rapid.nofailfile": "true"})
	idle := map[string]bool{}
	checks := map[string]storeCheck[*bbolt.Tx]{}
	for _, c := range storeChecks[*bbolt.Tx]() {
		checks[c.says], idle[c.says] = c, true
	}
	finds := func(broken, foundBy string, open func(testing.TB, string) keystate.Store[*bbolt.Tx]) {
		delete(idle, foundBy)
		t.Run(broken, func(t *testing.T) {
			c, known := checks[foundBy]
			if !known {
				t.Fatalf("there is no check %q", foundBy)
			}
			err := c.against(t, open, BoltRows())
			if err == nil {
				t.Fatalf("the check %q has not found it", foundBy)
			}
			t.Logf("%q: %.300v", foundBy, err)
		})
	}
	for _, f := range faults() {
		finds(f.is, f.foundBy, f.open)
	}
	for _, is := range brokenReapers {
		finds(is, "a store that reaps by itself takes what is due, once", func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
			return &reapingBolt{Store: OpenBolt(t, dir), is: is}
		})
	}
	for _, b := range brokenPartings {
		finds(b.is, b.foundBy, func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
			return &partingBolt{Store: OpenBolt(t, dir), is: b.is, parted: new(atomic.Int64)}
		})
	}
	for name, open := range brokenShares() {
		finds(name, "two openings share the store, or the second is refused", open)
	}
	for says := range idle {
		t.Errorf("no broken store shows that the check %q can fail", says)
	}
}

// brokenShares are stores that can be opened twice, and should rather not be.
func brokenShares() map[string]func(testing.TB, string) keystate.Store[*bbolt.Tx] {
	house := sharedHouse{stores: map[string]*sharedBolt{}}
	var openings atomic.Int64
	return map[string]func(testing.TB, string) keystate.Store[*bbolt.Tx]{
		"two openings have one epoch": func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
			return &faultyBolt{
				Store: house.open(t, dir),
				boot:  func(id [16]byte, epoch uint64) ([16]byte, uint64) { return id, epoch >> 16 },
			}
		},
		"the second opening is a store of its own": func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
			own := filepath.Join(dir, fmt.Sprint(openings.Add(1)))
			if err := os.Mkdir(own, 0o700); err != nil {
				t.Fatal(err)
			}
			return OpenBolt(t, own)
		},
		"what one opening holds, another may write": func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
			s := &faultyBolt{Store: house.open(t, dir)}
			s.keys = func(_ *bbolt.Tx, k *faultyKeys) {
				k.put = func(r *keystate.Record) error {
					if held, err := k.Keys.Get(r.Key); err == nil {
						r.Version = held.Version
					}
					return k.Keys.Put(r)
				}
			}
			return s
		},
		"an opening keeps what it read at first": func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
			s := &faultyBolt{Store: house.open(t, dir)}
			var cached sync.Map
			s.keys = func(_ *bbolt.Tx, k *faultyKeys) {
				k.get = func(key keystate.Key) (keystate.Record, error) {
					if r, ok := cached.Load(key); ok {
						return r.(keystate.Record), nil
					}
					r, err := k.Keys.Get(key)
					if err == nil {
						cached.Store(key, r)
					}
					return r, err
				}
			}
			return s
		},
	}
}

// setFlags sets flags for the length of a test.
func setFlags(t *testing.T, values map[string]string) {
	for name, value := range values {
		setting := flag.Lookup(name)
		before := setting.Value.String()
		t.Cleanup(func() { setting.Value.Set(before) })
		if err := setting.Value.Set(value); err != nil {
			t.Fatal(err)
		}
	}
}

// A fault is something wrong with a store, and the check that must find it.
type fault struct {
	is, foundBy string
	arm         func(*faultyBolt) // called at each opening
}

// open opens a bbolt store with the fault in it.
func (f fault) open(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
	path := filepath.Join(dir, "store.db")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: 100 * time.Millisecond, NoSync: true, NoGrowSync: true,
		InitialMmapSize: 1 << 24, // faults nest transactions, which must not wait for the file to grow
	})
	if err != nil {
		t.Fatal(err)
	}
	sound := keystate.Bolt(db)
	s := &faultyBolt{Store: sound, db: db, path: path, closing: func() error { return errors.Join(sound.Close(), db.Close()) }}
	t.Cleanup(func() { sound.Close(); db.Close() })
	f.arm(s)
	return s
}

// A faultyBolt is the sound store where its hooks are nil.
type faultyBolt struct {
	keystate.Store[*bbolt.Tx]
	db      *bbolt.DB
	path    string
	boot    func(id [16]byte, epoch uint64) ([16]byte, uint64)
	update  func(ctx context.Context, fn func(*bbolt.Tx) error) error
	view    func(ctx context.Context, fn func(*bbolt.Tx) error) error
	keys    func(tx *bbolt.Tx, k *faultyKeys)
	closing func() error
}

func (s *faultyBolt) Boot(ctx context.Context) (id [16]byte, epoch uint64, err error) {
	id, epoch, err = s.Store.Boot(ctx)
	if s.boot != nil && err == nil {
		id, epoch = s.boot(id, epoch)
	}
	return id, epoch, err
}

func (s *faultyBolt) Update(ctx context.Context, fn func(*bbolt.Tx) error) error {
	if s.update != nil {
		return s.update(ctx, fn)
	}
	return s.Store.Update(ctx, fn)
}

func (s *faultyBolt) View(ctx context.Context, fn func(*bbolt.Tx) error) error {
	if s.view != nil {
		return s.view(ctx, fn)
	}
	return s.Store.View(ctx, fn)
}

func (s *faultyBolt) Keys(tx *bbolt.Tx) keystate.Keys {
	k := &faultyKeys{Keys: s.Store.Keys(tx)}
	if s.keys != nil {
		s.keys(tx, k)
	}
	return k
}

func (s *faultyBolt) Close() error {
	if s.closing != nil {
		return s.closing()
	}
	return s.Store.Close()
}

// faultyKeys are the sound records where the hooks are nil.
type faultyKeys struct {
	keystate.Keys
	get        func(keystate.Key) (keystate.Record, error)
	put        func(*keystate.Record) error
	delete     func(keystate.Record) error
	unfinished func(after keystate.Key, limit int) ([]keystate.Record, error)
	finished   func(after uint64, limit int) ([]keystate.Record, error)
	counts     func() (keystate.Counts, error)
}

func (k *faultyKeys) Get(key keystate.Key) (keystate.Record, error) {
	if k.get != nil {
		return k.get(key)
	}
	return k.Keys.Get(key)
}

func (k *faultyKeys) Put(r *keystate.Record) error {
	if k.put != nil {
		return k.put(r)
	}
	return k.Keys.Put(r)
}

func (k *faultyKeys) Delete(r keystate.Record) error {
	if k.delete != nil {
		return k.delete(r)
	}
	return k.Keys.Delete(r)
}

func (k *faultyKeys) Unfinished(after keystate.Key, limit int) ([]keystate.Record, error) {
	if k.unfinished != nil {
		return k.unfinished(after, limit)
	}
	return k.Keys.Unfinished(after, limit)
}

func (k *faultyKeys) Finished(after uint64, limit int) ([]keystate.Record, error) {
	if k.finished != nil {
		return k.finished(after, limit)
	}
	return k.Keys.Finished(after, limit)
}

func (k *faultyKeys) Counts() (keystate.Counts, error) {
	if k.counts != nil {
		return k.counts()
	}
	return k.Keys.Counts()
}

// inKeys arms a fault of the records.
func inKeys(arm func(k *faultyKeys)) func(*faultyBolt) {
	return func(s *faultyBolt) { s.keys = func(_ *bbolt.Tx, k *faultyKeys) { arm(k) } }
}

// inReading spoils each record that is read.
func inReading(spoil func(r *keystate.Record)) func(*faultyBolt) {
	return inKeys(func(k *faultyKeys) {
		spoilAll := func(records []keystate.Record, err error) ([]keystate.Record, error) {
			for i := range records {
				spoil(&records[i])
			}
			return records, err
		}
		k.get = func(key keystate.Key) (keystate.Record, error) {
			r, err := k.Keys.Get(key)
			if err == nil {
				spoil(&r)
			}
			return r, err
		}
		k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
			return spoilAll(k.Keys.Unfinished(after, limit))
		}
		k.finished = func(after uint64, limit int) ([]keystate.Record, error) {
			return spoilAll(k.Keys.Finished(after, limit))
		}
	})
}

// inKeyNames confuses keys: what each becomes is where its record lies.
func inKeyNames(confuse func(keystate.Key) keystate.Key) func(*faultyBolt) {
	honest := map[keystate.Key]keystate.Key{}
	return inKeys(func(k *faultyKeys) {
		back := func(r keystate.Record) keystate.Record {
			if key, ok := honest[r.Key]; ok {
				r.Key = key
			}
			return r
		}
		k.get = func(key keystate.Key) (keystate.Record, error) {
			r, err := k.Keys.Get(confuse(key))
			return back(r), err
		}
		k.put = func(r *keystate.Record) error {
			confused := *r
			confused.Key = confuse(r.Key)
			if err := k.Keys.Put(&confused); err != nil {
				return err
			}
			honest[confused.Key] = r.Key
			r.Version, r.Sequence = confused.Version, confused.Sequence
			return nil
		}
		k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
			page, err := k.Keys.Unfinished(confuse(after), limit)
			for i := range page {
				page[i] = back(page[i])
			}
			return page, err
		}
	})
}

var errUndone = errors.New("undone")

// rowsIn copies the rows that a transaction sees, and setRows writes them back.
func rowsIn(tx *bbolt.Tx) map[string]string {
	rows := map[string]string{}
	if b := tx.Bucket(boltRows); b != nil {
		_ = b.ForEach(func(name, value []byte) error {
			rows[string(name)] = string(value)
			return nil
		})
	}
	return rows
}

func setRows(tx *bbolt.Tx, rows map[string]string) error {
	for name, value := range rows {
		if err := BoltRows().Put(tx, name, value); err != nil {
			return err
		}
	}
	return nil
}

// noting arms s to remember what is put in each transaction.
func noting(s *faultyBolt) *sync.Map {
	notes := new(sync.Map) // *bbolt.Tx → []keystate.Record
	s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
		k.put = func(r *keystate.Record) error {
			given := *r
			err := k.Keys.Put(r)
			if err == nil {
				before, _ := notes.Load(tx)
				records, _ := before.([]keystate.Record)
				notes.Store(tx, append(slices.Clone(records), given))
			}
			return err
		}
	}
	return notes
}

func noted(notes *sync.Map, tx *bbolt.Tx) []keystate.Record {
	found, _ := notes.LoadAndDelete(tx)
	records, _ := found.([]keystate.Record)
	return records
}

// force puts a record whoever holds the key.
func force(keys keystate.Keys, r keystate.Record) error {
	if held, err := keys.Get(r.Key); err == nil {
		r.Version, r.Incarnation = held.Version, held.Incarnation
	} else {
		r.Version = 0
	}
	return keys.Put(&r)
}

func faults() []fault {
	const (
		boot        = "Boot keeps the identity and raises the epoch"
		absent      = "a key that was never put is not found"
		fields      = "every field of a record comes back"
		largest     = "the largest record comes back"
		lookAlike   = "keys that look alike when joined are different"
		copies      = "a record that was put or read is the caller's own"
		versions    = "Put counts versions"
		fences      = "Put fences whoever does not hold the record"
		deletes     = "Delete takes a finished record from its holder only"
		withdrawn   = "a record that ends and is deleted in one transaction leaves nothing"
		sequences   = "finished records are numbered in order, and no number is used twice"
		counts      = "Counts equal a recount"
		pages       = "Unfinished lists every key once, in pages of any size"
		changing    = "Unfinished misses no key while others change between pages"
		order       = "Finished lists in the order of finishing"
		thousands   = "thousands of keys are listed in pages"
		own         = "a transaction sees its own writes"
		rollback    = "an error in Update comes back and leaves no trace"
		panics      = "a panic in Update becomes an error and leaves no trace"
		goexit      = "runtime.Goexit in Update leaves no trace"
		harm        = "who fails harms nobody who commits at the same time"
		rerun       = "a function that is run again takes effect once"
		oneClaims   = "one of many claims a new key"
		oneMoves    = "one of many moves a key on"
		increments  = "no increment is lost"
		contextEnds = "an Update whose context ends takes effect wholly or not at all"
		committed   = "View sees what was committed before it"
		consistent  = "View sees one consistent state while updates go on"
		readOnly    = "View cannot write"
		viewFails   = "a View that fails harms nobody"
		outlives    = "what Update acknowledged outlives Close"
		closed      = "after Close everything fails, and Close is harmless"
		model       = "any history leaves what the model says"
	)
	all := []fault{
		{"the epoch does not grow", boot, func(s *faultyBolt) {
			s.boot = func(id [16]byte, _ uint64) ([16]byte, uint64) { return id, 7 }
		}},
		{"the identity changes with every opening", boot, func(s *faultyBolt) {
			s.boot = func(id [16]byte, epoch uint64) ([16]byte, uint64) { id[0] += byte(epoch); return id, epoch }
		}},
		{"all stores have one identity", boot, func(s *faultyBolt) {
			s.boot = func(_ [16]byte, epoch uint64) ([16]byte, uint64) { return [16]byte{1}, epoch }
		}},

		{"Get of nothing is a zero record", absent, inKeys(func(k *faultyKeys) {
			k.get = func(key keystate.Key) (keystate.Record, error) {
				r, err := k.Keys.Get(key)
				if errors.Is(err, keystate.ErrNotFound) {
					err = nil
				}
				return r, err
			}
		})},
		{"Get of nothing is an error that nobody knows", absent, inKeys(func(k *faultyKeys) {
			k.get = func(key keystate.Key) (keystate.Record, error) {
				r, err := k.Keys.Get(key)
				if err != nil {
					err = errors.New("no rows")
				}
				return r, err
			}
		})},
		{"keys are compared without case", absent, inKeyNames(func(k keystate.Key) keystate.Key {
			return keystate.Key{Scope: strings.ToLower(k.Scope), ID: strings.ToLower(k.ID)}
		})},
		{"scope and ID are joined", lookAlike, inKeyNames(func(k keystate.Key) keystate.Key {
			return keystate.Key{ID: k.Scope + k.ID}
		})},
		{"scope and ID are joined by a slash", lookAlike, inKeyNames(func(k keystate.Key) keystate.Key {
			return keystate.Key{ID: k.Scope + "/" + k.ID}
		})},
		{"scope and ID are joined by a zero byte", lookAlike, inKeyNames(func(k keystate.Key) keystate.Key {
			return keystate.Key{ID: k.Scope + "\x00" + k.ID}
		})},
		{"keys are padded with zero bytes", lookAlike, inKeyNames(func(k keystate.Key) keystate.Key {
			return keystate.Key{Scope: k.Scope, ID: "." + strings.TrimRight(k.ID, "\x00")}
		})},
		{"keys are made valid UTF-8", lookAlike, inKeyNames(func(k keystate.Key) keystate.Key {
			return keystate.Key{Scope: k.Scope, ID: strings.ToValidUTF8(k.ID, "\ufffd")}
		})},
		{"keys are cut at 200 bytes", largest, inKeyNames(func(k keystate.Key) keystate.Key {
			return keystate.Key{Scope: k.Scope[:min(len(k.Scope), 200)], ID: k.ID}
		})},
		{"a large state is cut", largest, inReading(func(r *keystate.Record) { r.State = r.State[:min(len(r.State), 1<<16)] })},
		{"a long history is cut", largest, inReading(func(r *keystate.Record) { r.History = r.History[max(0, len(r.History)-64):] })},
		{"Put keeps the caller's slices", copies, func() func(*faultyBolt) {
			kept := map[keystate.Key]keystate.Record{}
			return inKeys(func(k *faultyKeys) {
				k.put = func(r *keystate.Record) error {
					err := k.Keys.Put(r)
					kept[r.Key] = *r
					return err
				}
				k.get = func(key keystate.Key) (keystate.Record, error) { return kept[key], nil }
			})
		}()},

		{"Put does not count the version that it returns", versions, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error { given := *r; return k.Keys.Put(&given) }
		})},
		{"Put does not count the version that it stores", versions, inReading(func(r *keystate.Record) { r.Version-- })},
		{"Put does not fence on the version", fences, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				if held, err := k.Keys.Get(r.Key); err == nil && held.Incarnation == r.Incarnation && held.Status != keystate.Answered {
					r.Version = held.Version
				}
				return k.Keys.Put(r)
			}
		})},
		{"Put does not fence a version ahead", fences, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				held, err := k.Keys.Get(r.Key)
				if err == nil && held.Incarnation == r.Incarnation && held.Status != keystate.Answered && r.Version > held.Version {
					r.Version = held.Version
				}
				return k.Keys.Put(r)
			}
		})},
		{"Put does not fence on the incarnation", fences, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				if held, err := k.Keys.Get(r.Key); err == nil && r.Version > 0 {
					r.Incarnation = held.Incarnation
				}
				return k.Keys.Put(r)
			}
		})},
		{"Put of a new key overwrites", fences, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				if held, err := k.Keys.Get(r.Key); err == nil && r.Version == 0 && held.Status != keystate.Answered {
					return force(k.Keys, *r)
				}
				return k.Keys.Put(r)
			}
		})},
		{"Put inserts where there is nothing to change", fences, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				if _, err := k.Keys.Get(r.Key); err != nil {
					r.Version = 0
				}
				return k.Keys.Put(r)
			}
		})},
		{"Put refuses, and counts the version", fences, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				version := r.Version
				err := k.Keys.Put(r)
				r.Version = version + 1
				return err
			}
		})},
		{"Put refuses with an error that nobody knows", fences, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				if err := k.Keys.Put(r); err != nil {
					return errors.New("0 rows affected")
				}
				return nil
			}
		})},
		{"Put refuses silently", oneMoves, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				if err := k.Keys.Put(r); !errors.Is(err, keystate.ErrFenced) {
					return err
				}
				r.Version++
				return nil
			}
		})},
		{"a claim that comes late seems to win", oneClaims, inKeys(func(k *faultyKeys) {
			k.put = func(r *keystate.Record) error {
				if err := k.Keys.Put(r); r.Version > 0 || !errors.Is(err, keystate.ErrFenced) {
					return err
				}
				r.Version = 1
				return nil
			}
		})},

		{"Delete passes over what the transaction itself has ended", withdrawn, inKeys(func(k *faultyKeys) {
			ended := map[keystate.Key]bool{}
			k.put = func(r *keystate.Record) error {
				ended[r.Key] = r.Status == keystate.Answered && r.Version > 0
				return k.Keys.Put(r)
			}
			k.delete = func(r keystate.Record) error {
				if ended[r.Key] {
					return nil
				}
				return k.Keys.Delete(r)
			}
		})},
		{"Delete takes unfinished records", deletes, inKeys(func(k *faultyKeys) {
			k.delete = func(r keystate.Record) error {
				if r.Status != keystate.Answered {
					r = moved(r, keystate.Answered)
					if err := k.Keys.Put(&r); err != nil {
						return err
					}
				}
				return k.Keys.Delete(r)
			}
		})},
		{"Delete does not fence on the version", deletes, inKeys(func(k *faultyKeys) {
			k.delete = func(r keystate.Record) error {
				if held, err := k.Keys.Get(r.Key); err == nil && held.Incarnation == r.Incarnation {
					r = held
				}
				return k.Keys.Delete(r)
			}
		})},
		{"Delete does not fence on the incarnation", deletes, inKeys(func(k *faultyKeys) {
			k.delete = func(r keystate.Record) error {
				if held, err := k.Keys.Get(r.Key); err == nil {
					r.Incarnation = held.Incarnation
				}
				return k.Keys.Delete(r)
			}
		})},
		{"Delete of nothing succeeds", deletes, inKeys(func(k *faultyKeys) {
			k.delete = func(r keystate.Record) error {
				if _, err := k.Keys.Get(r.Key); errors.Is(err, keystate.ErrNotFound) {
					return nil
				}
				return k.Keys.Delete(r)
			}
		})},
		{"Delete does nothing", deletes, inKeys(func(k *faultyKeys) {
			k.delete = func(r keystate.Record) error { return nil }
		})},
		{"every fifth Delete does nothing", model, func() func(*faultyBolt) {
			var n atomic.Int64
			return inKeys(func(k *faultyKeys) {
				k.delete = func(r keystate.Record) error {
					if r.Status == keystate.Answered && n.Add(1)%5 == 0 {
						return nil
					}
					return k.Keys.Delete(r)
				}
			})
		}()},

		{"a deleted record's sequence is used again", sequences, func() func(*faultyBolt) {
			var deleted uint64
			return inSequences(&deleted, func(k *faultyKeys) {
				k.delete = func(r keystate.Record) error {
					err := k.Keys.Delete(r)
					if err == nil {
						deleted++
					}
					return err
				}
			})
		}()},
		{"sequences begin anew with every opening", sequences, func() func(*faultyBolt) {
			var before uint64
			arm := inSequences(&before, func(*faultyKeys) {})
			return func(s *faultyBolt) {
				arm(s)
				s.boot = func(id [16]byte, epoch uint64) ([16]byte, uint64) {
					_ = s.Store.View(context.Background(), func(tx *bbolt.Tx) error {
						all, err := listFinished(s.Store.Keys(tx), 100)
						if len(all) > 0 {
							before = all[len(all)-1].Sequence
						}
						return err
					})
					return id, epoch
				}
			}
		}()},
		{"those who finish together have one sequence", sequences, inReading(func(r *keystate.Record) {
			r.Sequence = (r.Sequence + 1) / 2
		})},

		{"Counts are those of the last commit", counts, func(s *faultyBolt) {
			var before keystate.Counts
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				return s.Store.Update(ctx, func(tx *bbolt.Tx) (err error) {
					if before, err = s.Store.Keys(tx).Counts(); err != nil {
						return err
					}
					return fn(tx)
				})
			}
			s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
				if tx.Writable() {
					k.counts = func() (keystate.Counts, error) { return before, nil }
				}
			}
		}},
		{"Counts take parked keys for waiting ones", counts, inKeys(func(k *faultyKeys) {
			k.counts = func() (keystate.Counts, error) {
				c, err := k.Keys.Counts()
				c.Waiting, c.Parked = c.Waiting+c.Parked, 0
				return c, err
			}
		})},
		{"Counts do not fall with Delete", counts, func() func(*faultyBolt) {
			var deleted uint64
			return inKeys(func(k *faultyKeys) {
				k.delete = func(r keystate.Record) error { deleted++; return k.Keys.Delete(r) }
				k.counts = func() (keystate.Counts, error) {
					c, err := k.Keys.Counts()
					c.Finished += deleted
					return c, err
				}
			})
		}()},

		{"Unfinished skips a key between pages", pages, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				page, err := k.Keys.Unfinished(after, limit+1)
				if after != (keystate.Key{}) && len(page) > 0 {
					page = page[1:]
				}
				return page[:min(len(page), limit)], err
			}
		})},
		{"Unfinished repeats the last key of a page", pages, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				page, err := k.Keys.Unfinished(after, limit)
				if r, missing := k.Keys.Get(after); missing == nil && limit > 1 {
					page = append([]keystate.Record{r}, page[:min(len(page), limit-1)]...)
				}
				return page, err
			}
		})},
		{"Unfinished returns pages that are not full", pages, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				return k.Keys.Unfinished(after, max(1, limit-1))
			}
		})},
		{"Unfinished returns more than it is asked for", pages, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				return k.Keys.Unfinished(after, limit+1)
			}
		})},
		{"Unfinished lists finished keys", pages, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				page, err := k.Keys.Unfinished(after, limit)
				if err == nil && len(page) < limit {
					return k.Keys.Finished(0, 1)
				}
				return page, err
			}
		})},
		{"Unfinished leaves out parked keys", pages, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				page, err := k.Keys.Unfinished(after, limit)
				return slices.DeleteFunc(page, func(r keystate.Record) bool { return r.Status == keystate.Parked }), err
			}
		})},
		{"Unfinished ends where its key is gone", changing, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				if r, err := k.Keys.Get(after); after != (keystate.Key{}) && (err != nil || r.Status == keystate.Answered) {
					return nil, nil
				}
				return k.Keys.Unfinished(after, limit)
			}
		})},
		{"Unfinished counts how far it is", changing, func() func(*faultyBolt) {
			listed := 0
			return inKeys(func(k *faultyKeys) {
				k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
					if after == (keystate.Key{}) {
						listed = 0
					}
					all, err := k.Keys.Unfinished(keystate.Key{}, 1000)
					page := all[min(len(all), listed):min(len(all), listed+limit)]
					listed += len(page)
					return page, err
				}
			})
		}()},
		{"Unfinished stops after a thousand", thousands, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				if after.ID >= "order-1000" {
					return nil, nil
				}
				return k.Keys.Unfinished(after, limit)
			}
		})},
		{"a listing lacks the history", fields, inKeys(func(k *faultyKeys) {
			k.unfinished = func(after keystate.Key, limit int) ([]keystate.Record, error) {
				page, err := k.Keys.Unfinished(after, limit)
				for i := range page {
					page[i].History = nil
				}
				return page, err
			}
		})},

		{"Finished lists backwards", order, inKeys(func(k *faultyKeys) {
			k.finished = func(after uint64, limit int) ([]keystate.Record, error) {
				page, err := k.Keys.Finished(after, limit)
				slices.Reverse(page)
				return page, err
			}
		})},
		{"Finished lists in the order of keys", order, inKeys(func(k *faultyKeys) {
			k.finished = func(after uint64, limit int) ([]keystate.Record, error) {
				page, err := k.Keys.Finished(after, limit)
				return byKey(page), err
			}
		})},
		{"Finished begins with the given sequence", order, inKeys(func(k *faultyKeys) {
			k.finished = func(after uint64, limit int) ([]keystate.Record, error) {
				return k.Keys.Finished(max(after, 1)-1, limit)
			}
		})},
		{"Finished does not look at the limit", order, inKeys(func(k *faultyKeys) {
			k.finished = func(after uint64, limit int) ([]keystate.Record, error) { return k.Keys.Finished(after, 1000) }
		})},

		{"a transaction does not see what it put", own, func(s *faultyBolt) {
			s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
				k.get = func(key keystate.Key) (r keystate.Record, err error) {
					err = s.Store.View(context.Background(), func(tx *bbolt.Tx) error {
						r, err = s.Store.Keys(tx).Get(key)
						return err
					})
					return r, err
				}
			}
		}},
		{"a listing does not see what its transaction put", own, func(s *faultyBolt) {
			s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
				k.unfinished = func(after keystate.Key, limit int) (page []keystate.Record, err error) {
					err = s.Store.View(context.Background(), func(tx *bbolt.Tx) error {
						page, err = s.Store.Keys(tx).Unfinished(after, limit)
						return err
					})
					return page, err
				}
			}
		}},

		{"a failed function's rows stay", rollback, keepRows},
		{"a failed function's records stay", rollback, keepRecords},
		{"an error commits", rollback, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) (failed error) {
				err := s.Store.Update(ctx, func(tx *bbolt.Tx) error { failed = fn(tx); return nil })
				return errors.Join(err, failed)
			}
		}},
		{"an error comes back as text", rollback, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				if err := s.Store.Update(ctx, fn); err != nil {
					return errors.New(err.Error())
				}
				return nil
			}
		}},
		{"an error comes back as nil", rollback, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error { _ = s.Store.Update(ctx, fn); return nil }
		}},
		{"a panic commits", panics, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				return s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					defer func() { _ = recover() }()
					return fn(tx)
				})
			}
		}},
		{"a panic commits, and comes back as an error", panics, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) (failed error) {
				err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					defer func() {
						if v := recover(); v != nil {
							failed = fmt.Errorf("panic: %v", v)
						}
					}()
					return fn(tx)
				})
				return errors.Join(err, failed)
			}
		}},
		{"a panic goes through", panics, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				var through any
				err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					defer func() {
						if through = recover(); through != nil {
							panic(through)
						}
					}()
					return fn(tx)
				})
				if through != nil {
					panic(through)
				}
				return err
			}
		}},
		{"runtime.Goexit commits", goexit, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				return s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					if err := ending(func() error { return fn(tx) }); !errors.Is(err, errExited) {
						return err
					}
					return nil
				})
			}
		}},
		{"runtime.Goexit commits, and comes back as an error", goexit, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) (exited error) {
				err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					err := ending(func() error { return fn(tx) })
					if errors.Is(err, errExited) {
						exited, err = err, nil
					}
					return err
				})
				return errors.Join(err, exited)
			}
		}},
		{"who comes after a failure fails, too", harm, func(s *faultyBolt) {
			var aborted atomic.Bool
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				return s.Store.Update(ctx, func(tx *bbolt.Tx) (err error) {
					if aborted.Load() {
						return errors.New("current transaction is aborted")
					}
					aborted.Store(true)
					if err = fn(tx); err == nil {
						aborted.Store(false)
					}
					return err
				})
			}
		}},
		{"who fails takes along what others wrote", harm, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				err := s.Store.Update(ctx, fn)
				if err != nil {
					_ = s.Store.Update(ctx, func(tx *bbolt.Tx) error { return BoltRows().Put(tx, "n", "0") })
				}
				return err
			}
		}},
		{"the function runs twice, and both take effect", increments, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				return s.Store.Update(ctx, func(tx *bbolt.Tx) error { return errors.Join(fn(tx), fn(tx)) })
			}
		}},
		{"a second run finds the rows of the first", rerun, func(s *faultyBolt) {
			s.update = serially(func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				var rows map[string]string
				err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					if err := fn(tx); err != nil {
						return err
					}
					rows = rowsIn(tx)
					return errUndone
				})
				if !errors.Is(err, errUndone) {
					return err
				}
				return s.Store.Update(ctx, func(tx *bbolt.Tx) error { return errors.Join(setRows(tx, rows), fn(tx)) })
			})
		}},
		{"a second run finds the records of the first", rerun, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				return s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					rows := rowsIn(tx)
					if err := fn(tx); err != nil {
						return err
					}
					if b := tx.Bucket(boltRows); b != nil {
						for name := range rowsIn(tx) {
							if err := b.Delete([]byte(name)); err != nil {
								return err
							}
						}
					}
					return errors.Join(setRows(tx, rows), fn(tx))
				})
			}
		}},
		{"an increment is lost", increments, func(s *faultyBolt) {
			notes := noting(s)
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				var rows map[string]string
				var records []keystate.Record
				err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					if err := fn(tx); err != nil {
						return err
					}
					rows, records = rowsIn(tx), noted(notes, tx)
					return errUndone
				})
				if !errors.Is(err, errUndone) {
					return err
				}
				runtime.Gosched()
				return s.Store.Update(ctx, func(tx *bbolt.Tx) error {
					errs := []error{setRows(tx, rows)}
					for _, r := range records {
						errs = append(errs, force(s.Store.Keys(tx), r))
					}
					return errors.Join(errs...)
				})
			}
		}},
		{"Update returns when its context ends, and goes on", contextEnds, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				done := make(chan error, 1)
				go func() { done <- s.Store.Update(context.Background(), fn) }()
				select {
				case err := <-done:
					return err
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}},
		{"half of an Update whose context has ended is there", contextEnds, func(s *faultyBolt) {
			notes := noting(s)
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				var records []keystate.Record
				err := s.Store.Update(context.Background(), func(tx *bbolt.Tx) error {
					err := fn(tx)
					records = noted(notes, tx)
					return errors.Join(err, ctx.Err())
				})
				if ctx.Err() != nil {
					_ = s.Store.Update(context.Background(), func(tx *bbolt.Tx) error { return force(s.Store.Keys(tx), records[0]) })
				}
				return err
			}
		}},
		{"an Update whose context has ended does nothing and returns nil", contextEnds, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				if ctx.Err() != nil {
					return nil
				}
				return s.Store.Update(ctx, fn)
			}
		}},

		{"View sees what was committed before the last Update", committed, func(s *faultyBolt) {
			var old *bbolt.Tx
			release := func() {
				if old != nil {
					_ = old.Rollback()
				}
			}
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) (err error) {
				release()
				if old, err = s.db.Begin(false); err != nil {
					return err
				}
				return s.Store.Update(ctx, fn)
			}
			s.view = func(_ context.Context, fn func(*bbolt.Tx) error) error { return fn(old) }
			sound := s.closing
			s.closing = func() error { release(); return sound() }
		}},
		{"View runs its function twice", committed, func(s *faultyBolt) {
			s.view = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				return errors.Join(s.Store.View(ctx, fn), s.Store.View(ctx, fn))
			}
		}},
		{"View sees what is not committed", consistent, func(s *faultyBolt) {
			var dirty sync.Map // keystate.Key → keystate.Record
			s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
				if tx.Writable() {
					k.put = func(r *keystate.Record) error {
						err := k.Keys.Put(r)
						dirty.Store(r.Key, *r)
						return err
					}
					return
				}
				k.get = func(key keystate.Key) (keystate.Record, error) {
					if r, ok := dirty.Load(key); ok {
						return r.(keystate.Record), nil
					}
					return k.Keys.Get(key)
				}
			}
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				defer dirty.Clear()
				return s.Store.Update(ctx, fn)
			}
		}},
		{"each read of a View sees the newest", consistent, func(s *faultyBolt) {
			s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
				if !tx.Writable() {
					k.get = func(key keystate.Key) (r keystate.Record, err error) {
						err = s.Store.View(context.Background(), func(newest *bbolt.Tx) error {
							r, err = s.Store.Keys(newest).Get(key)
							return err
						})
						return r, err
					}
				}
			}
		}},
		{"writes in a View are passed over", readOnly, func(s *faultyBolt) {
			s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
				if !tx.Writable() {
					k.put = func(r *keystate.Record) error { return nil }
				}
			}
		}},
		{"Delete in a View is passed over", readOnly, func(s *faultyBolt) {
			s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
				if !tx.Writable() {
					k.delete = func(r keystate.Record) error { return nil }
				}
			}
		}},
		{"writes in a View take effect", readOnly, func(s *faultyBolt) {
			s.view = func(ctx context.Context, fn func(*bbolt.Tx) error) error { return s.Store.Update(ctx, fn) }
		}},
		{"a panic in a View leaves it open", viewFails, func(s *faultyBolt) {
			var stuck atomic.Bool
			s.view = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				stuck.Store(true)
				err := s.Store.View(ctx, fn)
				stuck.Store(false)
				return err
			}
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				if stuck.Load() {
					return errors.New("too many connections")
				}
				return s.Store.Update(ctx, fn)
			}
		}},
		{"an error in a View comes back as text", viewFails, func(s *faultyBolt) {
			s.view = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				if err := s.Store.View(ctx, fn); err != nil {
					return errors.New(err.Error())
				}
				return nil
			}
		}},

		{"Close loses the last commit", outlives, func(s *faultyBolt) {
			var mu sync.Mutex
			var before bytes.Buffer
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				mu.Lock()
				defer mu.Unlock()
				before.Reset()
				err := s.db.View(func(tx *bbolt.Tx) error { _, err := tx.WriteTo(&before); return err })
				return errors.Join(err, s.Store.Update(ctx, fn))
			}
			sound := s.closing
			s.closing = func() error {
				mu.Lock()
				defer mu.Unlock()
				if err := sound(); err != nil || before.Len() == 0 {
					return err
				}
				return os.WriteFile(s.path, before.Bytes(), 0o600)
			}
		}},
		{"Close loses who is waiting, and tells them nothing", outlives, func(s *faultyBolt) {
			s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
				if err := s.Store.Update(ctx, fn); !errors.Is(err, keystate.ErrClosed) {
					return err
				}
				return nil
			}
		}},
		{"a closed store goes on", closed, func(s *faultyBolt) { s.closing = func() error { return nil } }},
		{"a closed store panics", closed, func(s *faultyBolt) {
			sound := s.closing
			s.closing = func() error {
				s.view = func(context.Context, func(*bbolt.Tx) error) error { panic("nil pointer") }
				return sound()
			}
		}},
		{"Close panics the second time", closed, func(s *faultyBolt) {
			sound, done := s.closing, make(chan struct{})
			s.closing = func() error { close(done); return sound() }
		}},
		{"a key's second life goes on with the versions of its first", model, func() func(*faultyBolt) {
			lives := map[keystate.Key]bool{}
			return inKeys(func(k *faultyKeys) {
				k.delete = func(r keystate.Record) error {
					lives[r.Key] = true
					return k.Keys.Delete(r)
				}
				k.put = func(r *keystate.Record) error {
					second := r.Version == 0 && lives[r.Key]
					if err := k.Keys.Put(r); err != nil || !second || r.Status == keystate.Answered {
						return err
					}
					return k.Keys.Put(r)
				}
			})
		}()},
		{"every third commit leaves rows as they were", model, func() func(*faultyBolt) {
			n := 0
			return func(s *faultyBolt) {
				s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
					return s.Store.Update(ctx, func(tx *bbolt.Tx) error {
						rows := rowsIn(tx)
						if err := fn(tx); err != nil {
							return err
						}
						if n++; n%3 == 0 {
							return setRows(tx, rows)
						}
						return nil
					})
				}
			}
		}()},
	}
	spoils := fieldFaults()
	for _, name := range slices.Sorted(maps.Keys(spoils)) {
		all = append(all, fault{name, fields, inReading(spoils[name])})
	}
	return all
}

// fieldFaults lose one field each.
func fieldFaults() map[string]func(*keystate.Record) {
	return map[string]func(*keystate.Record){
		"the scope is lost":              func(r *keystate.Record) { r.Key.Scope = "" },
		"the machine is lost":            func(r *keystate.Record) { r.Machine = "machine" },
		"the status is lost":             func(r *keystate.Record) { r.Status = keystate.Running },
		"the point is lost":              func(r *keystate.Record) { r.Point = keystate.Started },
		"the state is lost":              func(r *keystate.Record) { r.State = nil },
		"the epoch is lost":              func(r *keystate.Record) { r.Epoch = 1 },
		"the epoch is cut to 32 bits":    func(r *keystate.Record) { r.Epoch &= 1<<32 - 1 },
		"the incarnation is lost":        func(r *keystate.Record) { r.Incarnation = [16]byte{} },
		"the fingerprint is lost":        func(r *keystate.Record) { r.Fingerprint = [16]byte{} },
		"the sequence is lost":           func(r *keystate.Record) { r.Sequence = 0 },
		"the creation's time is lost":    func(r *keystate.Record) { r.Created = time.Time{} },
		"times are cut to milliseconds":  func(r *keystate.Record) { r.Created = r.Created.Truncate(time.Millisecond) },
		"times are in a zone":            func(r *keystate.Record) { r.Created = r.Created.In(time.FixedZone("east", 3600)) },
		"the ending's time is lost":      func(r *keystate.Record) { r.Ended = time.Time{} },
		"what has begun is lost":         func(r *keystate.Record) { r.Begun = "" },
		"attempts are lost":              func(r *keystate.Record) { r.Attempts = 0 },
		"attempts are cut to 16 bits":    func(r *keystate.Record) { r.Attempts &= 1<<16 - 1 },
		"the first try is lost":          func(r *keystate.Record) { r.FirstTried = time.Time{} },
		"the operator's word is lost":    func(r *keystate.Record) { r.Resend = false },
		"that it acted is lost":          func(r *keystate.Record) { r.Acted = false },
		"when it is due is lost":         func(r *keystate.Record) { r.Due = time.Time{} },
		"the reason for parking is lost": func(r *keystate.Record) { r.ParkReason = "" },
		"the last error is lost":         func(r *keystate.Record) { r.LastError = "" },
		"the refusal is lost":            func(r *keystate.Record) { r.Refusal = nil },
		"the refusal's reason is lost": func(r *keystate.Record) {
			if r.Refusal != nil {
				r.Refusal = &keystate.Refusal{Before: r.Refusal.Before}
			}
		},
		"the history is lost":           func(r *keystate.Record) { r.History = nil },
		"the history begins later":      func(r *keystate.Record) { r.History = r.History[len(r.History)-1:] },
		"the history's times are lost":  func(r *keystate.Record) { r.History[0].At = time.Time{} },
		"the history's tries are lost":  func(r *keystate.Record) { r.History[0].Attempts = 0 },
		"the history's errors are lost": func(r *keystate.Record) { r.History[0].Ignored = "" },
	}
}

// inSequences takes an amount off each sequence that is shown.
func inSequences(less *uint64, arm func(*faultyKeys)) func(*faultyBolt) {
	reading := inReading(func(r *keystate.Record) { r.Sequence -= min(r.Sequence, *less) })
	return func(s *faultyBolt) {
		reading(s)
		spoil := s.keys
		s.keys = func(tx *bbolt.Tx, k *faultyKeys) {
			spoil(tx, k)
			k.put = func(r *keystate.Record) error {
				err := k.Keys.Put(r)
				r.Sequence -= min(r.Sequence, *less)
				return err
			}
			arm(k)
		}
	}
}

// serially runs one Update after the other.
func serially(update func(context.Context, func(*bbolt.Tx) error) error) func(context.Context, func(*bbolt.Tx) error) error {
	var mu sync.Mutex
	return func(ctx context.Context, fn func(*bbolt.Tx) error) error {
		mu.Lock()
		defer mu.Unlock()
		return update(ctx, fn)
	}
}

func keepRows(s *faultyBolt) {
	s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
		var rows map[string]string
		err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
			defer func() { rows = rowsIn(tx) }()
			return fn(tx)
		})
		if err != nil {
			_ = s.Store.Update(ctx, func(tx *bbolt.Tx) error { return setRows(tx, rows) })
		}
		return err
	}
}

func keepRecords(s *faultyBolt) {
	notes := noting(s)
	s.update = func(ctx context.Context, fn func(*bbolt.Tx) error) error {
		var records []keystate.Record
		err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
			defer func() { records = noted(notes, tx) }()
			return fn(tx)
		})
		if err != nil {
			_ = s.Store.Update(ctx, func(tx *bbolt.Tx) error {
				for _, r := range records {
					_ = force(s.Store.Keys(tx), r)
				}
				return nil
			})
		}
		return err
	}
}
