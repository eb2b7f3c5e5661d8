package history

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmihailenco/msgpack/v5"
	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// The engine under test: a store that dies, a machine whose every commit leaves a row, and the world that its effects act on.

// An order is a request, and what its phases fill in.
type order struct {
	Key, Item int
	Use       int64 // which of the key's lives this is: counted by the first commit
	Payout    int64 // the effect's result
	Receipt   int64 // drawn by the last commit, so that no two executions of it are alike
}

const (
	taken = keystate.RecoveryPoint("taken")
	paid  = keystate.RecoveryPoint("paid")

	retention = 20 * time.Second // of the bubble's clock
)

var (
	bucketRows = []byte("rows")
	rowSerial  = []byte("serial")
)

// stateOf decodes a stored state without the engine's help.
func stateOf(r keystate.Record) (s order, err error) {
	err = msgpack.Unmarshal(r.State, &s)
	return s, err
}

// rowOf names a row that a phase writes once in a life.
func rowOf(point keystate.RecoveryPoint, key int, use int64) string {
	return fmt.Sprintf("%s %d %d", point, key, use)
}

func idOf(key int) keystate.Key { return keystate.Key{Scope: "history", ID: fmt.Sprint(key)} }

type phase = keystate.Phase[*bbolt.Tx, order]

var (
	errObstacle = errors.New("an obstacle")
	errRefused  = errors.New("refused")

	// errDead is what an engine hears after its death, where a real one would hear nothing.
	errDead = fmt.Errorf("the process is dead: %w", keystate.ErrOutcomeUnknown)
)

// An owedError is an obstacle to a commit whose effect is done.
type owedError struct{ use use }

func (e *owedError) Error() string { return fmt.Sprintf("the commit of %+v is owed", e.use) }
func (e *owedError) Unwrap() error { return errObstacle }

func (w *world) phases() []phase {
	insistent := keystate.RetryPolicy{Attempts: 4, InRun: 2, Initial: time.Second, Max: time.Second}
	return []phase{
		{To: taken, Commit: func(_ context.Context, tx *bbolt.Tx, s *order) (err error) {
			if s.Use, err = count(tx, fmt.Sprintf("uses %d", s.Key)); err != nil {
				return err
			}
			_, err = count(tx, rowOf(taken, s.Key, s.Use))
			return err
		}},
		{To: paid, Retry: insistent, Effect: w.pay, Commit: func(_ context.Context, tx *bbolt.Tx, s *order) error {
			_, err := count(tx, rowOf(paid, s.Key, s.Use))
			return errors.Join(err, oneIn(8, &owedError{use{s.Key, s.Use}}), oneIn(32, keystate.Final(errRefused)))
		}},
		{To: keystate.Finished, Retry: insistent, Commit: func(_ context.Context, tx *bbolt.Tx, s *order) (err error) {
			if s.Receipt, err = count(tx, string(rowSerial)); err != nil {
				return err
			}
			_, err = count(tx, rowOf(keystate.Finished, s.Key, s.Use))
			return errors.Join(err, oneIn(24, errObstacle))
		}},
	}
}

// oneIn is err, now and then.
func oneIn(n int, err error) error {
	if rand.IntN(n) == 0 {
		return err
	}
	return nil
}

// count adds one to a row, and returns what it is then.
func count(tx *bbolt.Tx, row string) (int64, error) {
	b := tx.Bucket(bucketRows)
	n := number(b.Get([]byte(row))) + 1
	return n, b.Put([]byte(row), binary.BigEndian.AppendUint64(nil, uint64(n)))
}

func number(b []byte) int64 {
	if b == nil {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b))
}

// A generation is an engine, from its boot to its end.
type generation struct {
	w       *world
	db      *bbolt.DB
	store   *mortal
	engine  *keystate.Engine[*bbolt.Tx]
	machine *keystate.Machine[order]
	ending  chan struct{} // closed when it is to be closed, dead or not
	ended   atomic.Int64  // when it was closed
}

// boot starts an engine that has not died before it served anybody.
func (w *world) boot() (*generation, error) {
	for {
		g, err := w.tryBoot()
		if err == nil || g == nil {
			return g, err
		}
		if err2 := g.finish(); !errors.Is(err, errDead) || err2 != nil {
			return nil, errors.Join(err, err2)
		}
	}
}

func (w *world) tryBoot() (*generation, error) {
	db, err := bbolt.Open(w.path, 0o600, &bbolt.Options{NoSync: true, NoFreelistSync: true})
	if err != nil {
		return nil, err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucketRows)
		return err
	})
	if err != nil {
		return nil, err
	}
	g := &generation{w: w, db: db, ending: make(chan struct{})}
	g.store = &mortal{Store: keystate.Bolt(db), g: g}
	var store keystate.Store[*bbolt.Tx] = g.store
	if w.bug != nil {
		store = &faulty{mortal: g.store, bug: w.bug}
	}
	o := &keystate.Options{
		Retention: retention,
		Logger:    slog.New(slog.NewTextHandler(io.Discard, nil)),
		Observer:  &keystate.Observer{Retried: w.keep, Parked: w.keep},
	}
	if g.engine, err = keystate.New(store, o); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	g.machine, err = keystate.Register(g.engine, "order", w.phases())
	return g, err
}

// finish closes the engine and the file under it.
func (g *generation) finish() error {
	err := errors.Join(g.engine.Close(), g.db.Close())
	g.ended.Store(g.w.moment())
	return err
}

// A mortal store is a store until it dies: from then on every call fails, and nothing is written.
type mortal struct {
	keystate.Store[*bbolt.Tx]
	g     *generation
	alive sync.Mutex // held to die, and to say that one should
	dead  atomic.Bool
	done  bool

	deleted *[]keystate.Record // by the function that is running in the transaction
}

// end lets the engine be closed.
func (m *mortal) end() {
	m.alive.Lock()
	defer m.alive.Unlock()
	if !m.done {
		m.done = true
		close(m.g.ending)
	}
}

func (m *mortal) die(how string) error {
	if !m.dead.Swap(true) {
		m.g.w.sight(how)
	}
	m.end()
	return errDead
}

// A fate is what becomes of the engine at a commit.
type fate int

const (
	lives fate = iota
	diesBefore
	diesWithin
	diesAfter
	closes
)

func drawFate() fate {
	if n := rand.IntN(160); n < 4 {
		return fate(1 + n)
	}
	return lives
}

func (m *mortal) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	f := drawFate()
	switch {
	case m.dead.Load():
		return errDead
	case f == diesBefore:
		return m.die("died before a commit")
	case f == closes:
		m.end()
	}
	var deleted []keystate.Record
	began := m.g.w.moment()
	err := m.Store.Update(ctx, func(tx *bbolt.Tx) error {
		if m.dead.Load() {
			return errDead
		}
		deleted = nil
		m.deleted = &deleted
		if err := fn(tx); err != nil {
			return err
		}
		if f == diesWithin {
			return m.die("died within a commit")
		}
		return nil
	})
	if err == nil {
		m.g.w.forget(deleted, began)
	}
	if m.dead.Load() {
		return errDead
	}
	if err == nil && f == diesAfter {
		return m.die("died after a commit")
	}
	return err
}

func (m *mortal) View(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if m.dead.Load() {
		return errDead
	}
	return m.Store.View(ctx, fn)
}

func (m *mortal) Keys(tx *bbolt.Tx) keystate.Keys {
	if tx.Writable() {
		return witness{m.Store.Keys(tx), m.deleted}
	}
	return m.Store.Keys(tx)
}

// A witness sees which records are reaped.
type witness struct {
	keystate.Keys
	deleted *[]keystate.Record
}

func (k witness) Delete(r keystate.Record) error {
	err := k.Keys.Delete(r)
	if err == nil {
		*k.deleted = append(*k.deleted, r)
	}
	return err
}
