package conformance

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"example.com/keystate"
)

// A parter stores a record in one go with its transaction's commit.
type parter interface {
	PutLast(r *keystate.Record) error
}

// putsLast says whether the store is one that can.
func (s *storeTrial[Tx]) putsLast() (can bool, err error) {
	err = s.update(func(tx recordTx[Tx]) error {
		_, can = tx.Keys.(parter)
		return nil
	})
	return can, err
}

// putLast ends a transaction with a record, after what is done in it before, and returns what was stored. Its Sequence is read: the
// store does not tell it.
func (s *storeTrial[Tx]) putLast(r keystate.Record, before func(recordTx[Tx]) error) (stored keystate.Record, err error) {
	err = s.update(func(tx recordTx[Tx]) error {
		stored = r
		if err := before(tx); err != nil {
			return err
		}
		return tx.Keys.(parter).PutLast(&stored)
	})
	if err != nil {
		return r, fmt.Errorf("putting %q last, version %d: %w", r.Key, r.Version, err)
	}
	if stored.Version != r.Version+1 {
		return r, fmt.Errorf("putting %q last, version %d: the version is %d then", r.Key, r.Version, stored.Version)
	}
	if stored.Status == keystate.Answered {
		read, err := s.get(r.Key)
		if err != nil {
			return r, fmt.Errorf("what was put last as finished: %w", err)
		}
		stored.Sequence = read.Sequence
	}
	return stored, s.holds(stored)
}

func beforehand[Tx any](recordTx[Tx]) error { return nil }

// lastIsStored asks nothing of a store that cannot put a record last, as the other promises about it.
func (s *storeTrial[Tx]) lastIsStored() error {
	if can, err := s.putsLast(); !can {
		return err
	}
	all := map[keystate.Key]keystate.Record{}
	sequence := uint64(0)
	for n, status := range everyStatus { // new as everything, and moved from everything to everything
		for i, next := range everyStatus {
			r, err := s.putLast(moved(claimed(orderKey(10*n+i), "first"), status), beforehand)
			if err == nil && r.Status != keystate.Answered {
				r.State = []byte("second")
				r, err = s.putLast(moved(r, next), beforehand)
			}
			if err != nil {
				return fmt.Errorf("%q after %q: %w", next, status, err)
			}
			if r.Status == keystate.Answered {
				if r.Sequence <= sequence {
					return fmt.Errorf("sequence %d comes after %d", r.Sequence, sequence)
				}
				sequence = r.Sequence
			}
			all[r.Key] = r
		}
	}
	stored := func() error {
		for _, r := range all {
			if err := s.holds(r); err != nil {
				return err
			}
		}
		c, err := s.contents()
		return cmp.Or(err, countedAs(c, len(all)))
	}
	next, err := s.put(finished(orderKey(100), "first"))
	if err == nil && next.Sequence <= sequence {
		err = fmt.Errorf("sequence %d of a Put comes after %d", next.Sequence, sequence)
	}
	all[next.Key] = next
	return cmp.Or(err, stored(), s.reopen(), stored())
}

func countedAs(c contents, n int) error {
	if got := len(c.unfinished) + len(c.finished); got != n {
		return fmt.Errorf("%d records are listed, want %d", got, n)
	}
	return nil
}

// lastGoesWithTheRest is a record that is put last together with other records and the program's rows.
func (s *storeTrial[Tx]) lastGoesWithTheRest() error {
	if can, err := s.putsLast(); !can {
		return err
	}
	r, staged := claimed(orderKey(1), "first"), keystate.Record{}
	for n := range 3 {
		stored, err := s.putLast(r, func(tx recordTx[Tx]) error {
			staged = finished(orderKey(10+n), "staged")
			_, err := tx.add("n")
			return cmp.Or(err, tx.Put(&staged))
		})
		if err := cmp.Or(err, s.holds(staged), s.rowIs("n", fmt.Sprint(n+1))); err != nil {
			return err
		}
		r = moved(stored, unfinishedStatuses[n%3])
	}
	refusal := errors.New("on second thoughts, no")
	before, err := s.contents()
	if err != nil {
		return err
	}
	last := r
	err = s.update(func(tx recordTx[Tx]) error {
		last = r
		return cmp.Or(tx.setRow("n", "none"), tx.Keys.(parter).PutLast(&last), refusal)
	})
	if !errors.Is(err, refusal) {
		return fmt.Errorf("the function's error came back as: %w", cmp.Or(err, errNone))
	}
	return cmp.Or(s.unchanged(before), s.rowIs("n", "3"), s.reopen(), s.unchanged(before), s.rowIs("n", "3"))
}

// lastFences lets Update refuse what Put would: PutLast itself may, too.
func (s *storeTrial[Tx]) lastFences() error {
	if can, err := s.putsLast(); !can {
		return err
	}
	held, err := s.put(claimed(orderKey(1), "first"))
	if err != nil {
		return err
	}
	if held, err = s.put(moved(held, keystate.Waiting)); err != nil {
		return err
	}
	change := func(r keystate.Record, spoil func(*keystate.Record)) keystate.Record {
		spoil(&r)
		return r
	}
	gone := claimed(orderKey(2), "first")
	gone.Version = 1
	stale := map[string]keystate.Record{
		"a new record of a key that is there": claimed(held.Key, "other"),
		"an earlier version":                  change(held, func(r *keystate.Record) { r.Version-- }),
		"a later version":                     change(held, func(r *keystate.Record) { r.Version++ }),
		"another incarnation":                 change(held, func(r *keystate.Record) { r.Incarnation[3]++ }),
		"a record that is not there":          gone,
	}
	before, err := s.contents()
	if err != nil {
		return err
	}
	for what, r := range stale {
		for _, r := range []keystate.Record{r, moved(r, keystate.Answered)} {
			for _, beside := range []string{"", "row"} { // alone in its transaction, and not
				err := s.update(func(tx recordTx[Tx]) error {
					last, staged := r, claimed(orderKey(3), "staged")
					if beside != "" {
						if err := cmp.Or(tx.setRow(beside, "written"), tx.Put(&staged)); err != nil {
							return err
						}
					}
					return tx.Keys.(parter).PutLast(&last)
				})
				if !errors.Is(err, keystate.ErrFenced) {
					return fmt.Errorf("putting last %s, %q: %w, want ErrFenced", what, r.Status, cmp.Or(err, errNone))
				}
				if err := cmp.Or(s.unchanged(before), s.rowIs("row", "")); err != nil {
					return fmt.Errorf("putting last %s, %q, left a trace: %w", what, r.Status, err)
				}
			}
		}
	}
	_, err = s.putLast(moved(held, keystate.Parked), beforehand)
	return cmp.Or(err, s.reopen(), s.rowIs("row", ""), s.holdsNot(orderKey(3)))
}

// oneOfManyIsLast is a race of records that are put last.
func (s *storeTrial[Tx]) oneOfManyIsLast() error {
	if can, err := s.putsLast(); !can {
		return err
	}
	last := func(r keystate.Record) (stored keystate.Record, err error) {
		err = s.update(func(tx recordTx[Tx]) error {
			stored = r
			if _, err := tx.add("n"); err != nil {
				return err
			}
			return tx.Keys.(parter).PutLast(&stored)
		})
		return stored, err
	}
	for round := range 5 {
		key := orderKey(round)
		err := s.oneWinsBy(last, func(who int) keystate.Record { return claimed(key, fmt.Sprint(who)) })
		if err != nil {
			return fmt.Errorf("claiming %q: %w", key, err)
		}
		stored, err := s.get(key)
		if err != nil {
			return err
		}
		err = s.oneWinsBy(last, func(who int) keystate.Record {
			r := moved(stored, unfinishedStatuses[who%3])
			r.State = fmt.Append(nil, who)
			return r
		})
		if err := cmp.Or(err, s.rowIs("n", fmt.Sprint(2*round+2))); err != nil {
			return fmt.Errorf("moving %q on: %w", key, err)
		}
	}
	return nil
}

func (s *storeTrial[Tx]) lastInViewIsRefused() error {
	if can, err := s.putsLast(); !can {
		return err
	}
	stored, err := s.put(claimed(orderKey(1), "first"))
	if err != nil {
		return err
	}
	before, err := s.contents()
	if err != nil {
		return err
	}
	for _, r := range []keystate.Record{moved(stored, keystate.Answered), claimed(orderKey(2), "first")} {
		err := ending(func() error {
			return s.store.View(context.Background(), func(tx Tx) error {
				last, can := s.store.Keys(tx).(parter)
				if !can {
					return errors.New("these keys have no PutLast")
				}
				r := r
				return last.PutLast(&r)
			})
		})
		if err == nil || errors.Is(err, errPanicked) || errors.Is(err, errExited) {
			return fmt.Errorf("putting last in a View: %w", cmp.Or(err, errNone))
		}
		if err := s.unchanged(before); err != nil {
			return fmt.Errorf("putting last in a View took effect: %w", err)
		}
	}
	return nil
}
