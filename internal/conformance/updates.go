package conformance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"example.com/keystate"
)

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
	return s.oneWinsBy(s.put, put)
}

func (s *storeTrial[Tx]) oneWinsBy(store func(keystate.Record) (keystate.Record, error), put func(who int) keystate.Record) error {
	const many = 16
	won := make([]*keystate.Record, many)
	err := atOnce(many, func(who int) error {
		stored, err := store(put(who))
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
