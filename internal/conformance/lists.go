package conformance

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"example.com/keystate"
)

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
