package conformance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"example.com/keystate"
)

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
