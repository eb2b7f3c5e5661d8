package keystate

import (
	"errors"
	"sync"

	"go.etcd.io/bbolt"
)

// A window is a read transaction with all that it takes to look keys up in it. Making one costs bbolt a good twenty allocations, so one that
// has been looked through is kept for the next look, as long as it shows what is committed.
type window struct {
	tx   *bbolt.Tx
	keys *boltKeys
	view uint64 // which of the file's states it may show
}

// spareWindows are those through which nobody is looking. An open window keeps the pages of its state from being used again, and bbolt from
// mapping a larger file: so all are shut before a commit begins, and none is kept until it has ended.
type spareWindows struct {
	mu   sync.Mutex
	idle []*window
	kept bool   // whether those that are given back are kept
	view uint64 // counts the commits that have begun
}

// maxIdle bounds what a burst of readers leaves behind.
const maxIdle = 16

// take returns a window that is open already, or nil and what a new one is to bear as its view.
func (v *spareWindows) take() (w *window, view uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if last := len(v.idle) - 1; last >= 0 {
		w, v.idle[last] = v.idle[last], nil
		v.idle = v.idle[:last]
	}
	return w, v.view
}

// give takes back a window, and reports whether it is kept.
func (v *spareWindows) give(w *window) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.kept || w.view != v.view || len(v.idle) >= maxIdle {
		return false
	}
	v.idle = append(v.idle, w)
	return true
}

// shut shuts all windows and keeps none from now on.
func (v *spareWindows) shut() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.kept = false
	v.view++
	for _, w := range v.idle {
		_ = w.tx.Rollback() // which fails only where the transaction has ended
	}
	clear(v.idle)
	v.idle = v.idle[:0]
}

// keep keeps windows from now on.
func (v *spareWindows) keep() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.kept = true
}

// recall reads over r what a call needs of a key's record, or returns ErrNotFound.
func (s *boltStore) recall(key Key, r *Record) error {
	if err := s.failure(); err != nil {
		return err
	}
	return readError(s.guard(func() error { return s.lookUp(key, r) }))
}

func (s *boltStore) lookUp(key Key, r *Record) error {
	w, err := s.window()
	if err != nil {
		return err
	}
	sound := false // a panic over damage leaves open what became of the window
	defer func() {
		if !sound || !s.windows.give(w) {
			_ = w.tx.Rollback()
		}
	}()
	err = w.keys.recall(key, r)
	sound = true
	return err
}

// window returns an open window that shows everything that is committed.
func (s *boltStore) window() (*window, error) {
	w, view := s.windows.take()
	if w != nil {
		return w, nil
	}
	tx, err := s.db.Begin(false)
	if err != nil {
		return nil, err
	}
	keys, err := newBoltReader(tx, s.id)
	if err != nil {
		return nil, errors.Join(err, tx.Rollback())
	}
	return &window{tx: tx, keys: keys, view: view}, nil
}

// update runs fn in a write transaction, before which every window is shut.
func (s *boltStore) update(fn func(tx *bbolt.Tx) error) error {
	s.windows.shut()
	if s.file != nil { // else the program writes, too, and nobody would shut them for it
		defer s.windows.keep()
	}
	return s.db.Update(fn)
}
