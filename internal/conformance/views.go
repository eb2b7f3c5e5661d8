package conformance

import (
	"cmp"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"

	"example.com/keystate"
)

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
