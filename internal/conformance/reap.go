package conformance

import (
	"cmp"
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"example.com/keystate"
)

// endedAndDeleted is what becomes of a request that is withdrawn.
func (s *storeTrial[Tx]) endedAndDeleted() error {
	for _, status := range unfinishedStatuses {
		stored, err := s.putAll([]keystate.Record{moved(claimed(orderKey(1), "first"), status), moved(claimed(orderKey(2), "other"), keystate.Answered)})
		if err != nil {
			return err
		}
		err = s.update(func(tx recordTx[Tx]) error {
			ended := moved(stored[0], keystate.Answered)
			return cmp.Or(tx.Put(&ended), tx.Delete(ended))
		})
		if err := cmp.Or(err, s.holdsNot(orderKey(1)), s.holds(stored[1])); err != nil {
			return fmt.Errorf("it was %q: %w", status, err)
		}
		c, err := s.contents()
		if err := cmp.Or(err, sameRecords(c.unfinished, nil), sameRecords(c.finished, stored[1:])); err != nil {
			return fmt.Errorf("it was %q: %w", status, err)
		}
		again, err := s.put(moved(claimed(orderKey(1), "again"), keystate.Answered))
		if err := cmp.Or(err, s.holds(again), s.delete(again), s.delete(stored[1])); err != nil {
			return fmt.Errorf("its key is used again: %w", err)
		}
	}
	return nil
}

// reaps asks nothing of a store that does not.
func (s *storeTrial[Tx]) reaps() error {
	reaper, ok := s.store.(keystate.Reaper)
	if !ok {
		return nil
	}
	const keys, each = 100, 7
	under, err := s.putAll(orders(keys, 3, keystate.Running))
	if err != nil {
		return err
	}
	reap := func(retention time.Duration, limit, want int) (time.Duration, error) {
		n, next, err := reaper.Reap(context.Background(), retention, limit)
		if err == nil && n != want {
			err = fmt.Errorf("reaping %d at most after %s has deleted %d records, want %d", limit, retention, n, want)
		}
		return next, err
	}
	if next, err := reap(time.Hour, each, 0); err != nil || next != time.Hour {
		return fmt.Errorf("where nothing is finished, something is due in %s, %w", next, cmp.Or(err, errNone))
	}
	done, err := s.putAll(orders(0, keys, keystate.Answered))
	if err != nil {
		return err
	}
	if next, err := reap(time.Hour, each, 0); err != nil || next <= 0 || next > time.Hour {
		return fmt.Errorf("of what has just finished, something is due in %s, %w", next, cmp.Or(err, errNone))
	}
	if _, err := reap(0, each, each); err != nil {
		return err
	}
	left := func(want []keystate.Record) error {
		c, err := s.contents()
		return cmp.Or(err, sameRecords(c.finished, want), sameRecords(byKey(c.unfinished), byKey(under)))
	}
	if err := left(done[each:]); err != nil {
		return fmt.Errorf("after the first was reaped: %w", err)
	}
	var all atomic.Int64
	err = atOnce(4, func(int) error {
		for range keys {
			n, _, err := reaper.Reap(context.Background(), 0, each)
			if all.Add(int64(n)); err != nil {
				return fmt.Errorf("several at once: %w", err)
			}
		}
		return nil
	})
	if err == nil && all.Load() != keys-each {
		err = fmt.Errorf("several at once have deleted %d records, there were %d", all.Load(), keys-each)
	}
	return cmp.Or(err, left(nil))
}
