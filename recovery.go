package keystate

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// What happens without a caller: interrupted keys resume, failed ones are retried when they are due, finished
// ones are reaped; an operator retries or abandons parked ones.

const storagePause = time.Second // until a key is tried again for which there was no room

// lasting says whether an error broke a run off for good, as far as this engine goes.
func lasting(err error) bool {
	for _, sentinel := range []error{ErrFenced, ErrClosed, ErrMoved, ErrOutcomeUnknown, ErrCorrupt, ErrNotFound, ErrMismatch, errElsewhere, errIllegal} {
		if errors.Is(err, sentinel) {
			return true
		}
	}
	return false
}

// A dueQueue holds the keys that the engine takes up by itself, the earliest first.
type dueQueue struct {
	items []*dueKey
	byKey map[Key]*dueKey
}

type dueKey struct {
	key     Key
	machine string
	print   [16]byte
	at      time.Time
	index   int // in the heap
}

func newDueQueue() dueQueue { return dueQueue{byKey: map[Key]*dueKey{}} }

func (q *dueQueue) len() int { return len(q.items) }

func (q *dueQueue) add(r Record) {
	q.remove(r.Key)
	d := &dueKey{key: r.Key, machine: r.Machine, print: r.Fingerprint, at: r.Due}
	q.byKey[r.Key] = d
	heap.Push((*dueHeap)(q), d)
}

// remove takes a key out, and says whether it was there.
func (q *dueQueue) remove(key Key) bool {
	d := q.byKey[key]
	if d == nil {
		return false
	}
	heap.Remove((*dueHeap)(q), d.index)
	delete(q.byKey, key)
	return true
}

// pop takes out the earliest key if it is due, and otherwise says how long it is till then.
func (q *dueQueue) pop(now time.Time) (d *dueKey, in time.Duration) {
	if len(q.items) == 0 {
		return nil, time.Hour
	}
	if in := q.items[0].at.Sub(now); in > 0 {
		return nil, in
	}
	d = q.items[0]
	q.remove(d.key)
	return d, 0
}

// ready counts the keys that are due.
func (q *dueQueue) ready(now time.Time) (n int) {
	for _, d := range q.items {
		if !d.at.After(now) {
			n++
		}
	}
	return n
}

type dueHeap dueQueue

func (h *dueHeap) Len() int           { return len(h.items) }
func (h *dueHeap) Less(i, j int) bool { return h.items[i].at.Before(h.items[j].at) }
func (h *dueHeap) Swap(i, j int) {
	h.items[i], h.items[j] = h.items[j], h.items[i]
	h.items[i].index, h.items[j].index = i, j
}
func (h *dueHeap) Push(d any) {
	h.items = append(h.items, d.(*dueKey))
	h.items[len(h.items)-1].index = len(h.items) - 1
}
func (h *dueHeap) Pop() any {
	d := h.items[len(h.items)-1]
	h.items[len(h.items)-1] = nil
	h.items = h.items[:len(h.items)-1]
	return d
}

// adopt takes a machine in: it finds the machine's unfinished keys, checks that each can go on, and queues them.
func (e *Engine[Tx]) adopt(m *machine[Tx]) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return ErrClosed
	}
	if e.machines[m.name] != nil {
		e.mu.Unlock()
		return fmt.Errorf("keystate: machine %q is registered already", m.name)
	}
	e.machines[m.name] = m
	e.mu.Unlock()
	unfinished, stranded, err := e.survey(m)
	if err == nil {
		unfinished, stranded, err = e.ours(unfinished, stranded)
	}
	if err == nil && len(stranded) > 0 && !e.opts.ParkUnknown {
		err = m.strandedError(stranded)
	}
	if err == nil {
		err = m.parkStranded(stranded)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		delete(e.machines, m.name)
		return err
	}
	for _, r := range unfinished {
		if e.runs[r.Key] == nil {
			e.due.add(r)
		}
	}
	e.nudge()
	return nil
}

// survey lists a machine's keys that the engine has to take up, and those that rest on a point which the machine does not name.
func (e *Engine[Tx]) survey(m *machine[Tx]) (unfinished, stranded []Record, err error) {
	e.pages(e.ctx, unfinishedPage, func(r Record, fault error) bool {
		_, _, gone := m.next(r)
		if r.State = nil; gone == nil {
			r.History = nil // there may be many
		}
		switch {
		case fault != nil:
			err = fault
		case r.Machine != m.name || r.Status == Parked:
		case gone == nil:
			unfinished = append(unfinished, r)
		default:
			stranded = append(stranded, r)
		}
		return err == nil
	})
	return unfinished, stranded, err
}

// ours are the surveyed keys that no other engine holds. Those of engines that are gone are taken over one by one, not here.
func (e *Engine[Tx]) ours(unfinished, stranded []Record) (_, _ []Record, err error) {
	if e.shared == nil {
		return unfinished, stranded, nil
	}
	held, err := e.heldElsewhere(e.ctx, stranded)
	stranded = slices.DeleteFunc(stranded, func(r Record) bool { return held[r.Epoch] })
	return nil, stranded, err
}

// strandedError lists why stored keys cannot go on, and how many.
func (m *machine[Tx]) strandedError(stranded []Record) error {
	why := map[string][]Record{}
	for _, r := range stranded {
		_, _, err := m.next(r)
		why[err.Error()] = append(why[err.Error()], r)
	}
	var faults []error
	for _, text := range slices.Sorted(maps.Keys(why)) {
		faults = append(faults, fmt.Errorf("keystate: %s: %d unfinished keys rest there, such as %s", text, len(why[text]), why[text][0].Key))
	}
	return errors.Join(faults...)
}

func (m *machine[Tx]) parkStranded(stranded []Record) error {
	e := m.engine
	for _, r := range stranded {
		_, _, cause := m.next(r)
		err := e.change(e.ctx, r.Key, func(Record) ([]event, error) {
			return []event{{kind: park, at: e.now(), reason: UnknownPoint, err: cause.Error()}}, nil
		})
		if err != nil {
			return err
		}
		e.log.Warn("keystate: key parked", "key", r.Key, "machine", r.Machine, "reason", UnknownPoint, "error", cause)
		e.observe(e.observer.Parked, Event{Key: r.Key, Machine: r.Machine, Point: r.Point, Attempt: r.Attempts, Err: cause})
	}
	return nil
}

// change applies to a stored key the events that decide derives from it.
func (e *Engine[Tx]) change(ctx context.Context, key Key, decide func(Record) ([]event, error)) error {
	return e.store.Update(ctx, func(tx Tx) error {
		keys := e.store.Keys(tx)
		r, err := keys.Get(key)
		if err != nil {
			return fmt.Errorf("%w: %s", err, key)
		}
		events, err := decide(r)
		if err != nil {
			return err
		}
		if r, err = e.rules.next(r, events...); err != nil {
			return err
		}
		return keys.Put(&r)
	})
}

// recover takes up keys as they come due, so many at a time, until the engine closes.
func (e *Engine[Tx]) recover() {
	for e.ctx.Err() == nil {
		t := time.NewTimer(e.resumeDue())
		select {
		case <-t.C:
		case <-e.dueNow:
		case <-e.ctx.Done():
		}
		t.Stop()
	}
}

// resumeDue starts the runs of keys that are due, and says when to look again.
func (e *Engine[Tx]) resumeDue() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.resuming < e.opts.Parallelism && !e.closed {
		d, in := e.due.pop(e.now())
		if d == nil {
			return in
		}
		if r := e.runs[d.key]; r != nil {
			r.known.Store(true) // its caller has taken it up; when that run ends, the key is queued anew if it must be
			continue
		}
		r := newRun(d.key, d.machine, d.print)
		r.known.Store(true)
		e.runs[d.key] = r
		e.resuming++
		m := e.machines[d.machine]
		e.spawn(func() { m.travel(r, nil) })
	}
	return time.Hour
}

// Resume waits until no key of a registered machine is left that the engine can carry on: each is finished or
// parked. It waits for retries that are due later, too. It is for tests and scripts; a server need not call it.
func (e *Engine[Tx]) Resume(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(e.ctx, func() { cancel(ErrClosed) })()
	err := e.await(ctx, func() bool { return len(e.runs) == 0 && e.due.len() == 0 })
	if err != nil {
		return context.Cause(ctx)
	}
	return nil
}

// Retry lets a parked key go on, with its attempts counted anew. For a key that is parked as [Indeterminate] or
// [TokenExpired] it is the operator's word that the effect may be sent again; a phase with Reconcile asks first all the same.
func (e *Engine[Tx]) Retry(ctx context.Context, key Key) error {
	var revived Record
	err := e.change(ctx, key, func(r Record) ([]event, error) {
		if r.Status != Parked {
			return nil, fmt.Errorf("keystate: %s is %s, not parked", key, r.Status)
		}
		revived = r
		return []event{{kind: retry, at: e.now(), epoch: e.epoch, asks: e.asks(r)}}, nil
	})
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.runs[key] == nil {
		revived.Due = e.now()
		e.queueLocked(revived)
	}
	return nil
}

// asks says whether the phase that a key rests before can ask what became of its effect.
func (e *Engine[Tx]) asks(r Record) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	m := e.machines[r.Machine]
	if m == nil {
		return true // who knows: rather ask once too often
	}
	i, _, err := m.next(r)
	return err != nil || m.phases[i].reconcile != nil
}

// Abandon ends a parked key with a reason, which becomes its answer: a [FinalError].
func (e *Engine[Tx]) Abandon(ctx context.Context, key Key, reason string) error {
	var ended Record
	err := e.change(ctx, key, func(r Record) ([]event, error) {
		if r.Status != Parked {
			return nil, fmt.Errorf("keystate: %s is %s, not parked", key, r.Status)
		}
		ended = r
		return []event{{kind: abandon, at: e.now(), point: e.before(r), err: "abandoned: " + reason}}, nil
	})
	if err == nil {
		e.log.Warn("keystate: key abandoned", "key", key, "machine", ended.Machine, "reason", reason)
		e.observe(e.observer.Finished, Event{Key: key, Machine: ended.Machine, Point: Finished, Err: errors.New("abandoned: " + reason)})
	}
	return err
}

// before is the point that a stored key would reach next.
func (e *Engine[Tx]) before(r Record) RecoveryPoint {
	e.mu.Lock()
	defer e.mu.Unlock()
	if m := e.machines[r.Machine]; m != nil {
		return m.before(r)
	}
	return r.Point
}

// Reaping deletes in small slices, at the pace of arrival: deleting in bulk would leave bbolt a freelist that it
// writes with every commit.
const (
	reapSlice = 64
	reapLimit = 512
	reapPause = 20 * time.Millisecond // between two slices
	reapLook  = time.Minute           // at the latest, when nothing is to be reaped
)

// reapForEver deletes finished keys past their retention until the engine closes.
func (e *Engine[Tx]) reapForEver() {
	if e.opts.Retention < 0 {
		return
	}
	for open := true; open; {
		pause, err := e.reapSome()
		if err != nil && e.ctx.Err() == nil {
			e.log.Error("keystate: reaping failed", "error", err)
			pause = reapLook
		}
		open = e.sleep(pause)
	}
}

// reapSome deletes one slice and says when to come back.
func (e *Engine[Tx]) reapSome() (pause time.Duration, err error) {
	size := min(max(reapSlice, 2*int(e.finished.Swap(0))), reapLimit)
	if r, ok := e.store.(Reaper); ok {
		return e.letReap(r, size)
	}
	var oldest []Record
	err = e.look(e.ctx, func(k Keys) (err error) {
		oldest, err = k.Finished(0, size)
		return err
	})
	if err != nil {
		return 0, err
	}
	at := e.now()
	ripe := 0
	for ripe < len(oldest) && e.rules.expired(oldest[ripe], at, e.opts.Retention) {
		ripe++
	}
	if ripe == 0 {
		if len(oldest) == 0 {
			return reapLook, nil
		}
		return min(max(oldest[0].Ended.Add(e.opts.Retention).Sub(at), reapPause), reapLook), nil
	}
	if err := e.reap(oldest[:ripe]); err != nil {
		return 0, err
	}
	e.observe(e.observer.Reaped, Event{Size: ripe})
	return reapPause, nil
}

// letReap has the store delete one slice.
func (e *Engine[Tx]) letReap(r Reaper, size int) (pause time.Duration, err error) {
	reaped, next, err := r.Reap(e.ctx, e.opts.Retention, size)
	if err != nil {
		return 0, err
	}
	if reaped > 0 {
		e.observe(e.observer.Reaped, Event{Size: reaped})
	}
	return min(max(next, reapPause), reapLook), nil
}

func (e *Engine[Tx]) reap(records []Record) error {
	return e.store.Update(e.ctx, func(tx Tx) error {
		keys := e.store.Keys(tx)
		for _, r := range records {
			if _, err := e.rules.next(r, event{kind: reap}); err != nil {
				return err
			}
			if err := keys.Delete(r); err != nil {
				return err
			}
		}
		return nil
	})
}

// watch warns of what an operator should know and nobody may have noticed, until the engine closes.
func (e *Engine[Tx]) watch() {
	const look, settled = 10 * time.Second, 3 // looks until every machine should have been registered
	t := time.NewTicker(look)
	defer t.Stop()
	for n := 1; ; n++ {
		select {
		case <-t.C:
		case <-e.ctx.Done():
			return
		}
		e.warnOfReaders(look)
		if n == settled {
			e.warnOfOrphans()
		}
	}
}

// warnOfReaders names Views that stay open: the file cannot reuse pages under them.
func (e *Engine[Tx]) warnOfReaders(long time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for r := range e.readers {
		if open := time.Since(r.since); open >= long && !r.warned {
			r.warned = true
			e.log.Warn("keystate: a View stays open and keeps the file from reusing pages", "caller", r.caller, "open", open)
		}
	}
}

// warnOfOrphans names machines with unfinished keys that nobody has registered.
func (e *Engine[Tx]) warnOfOrphans() {
	orphans := map[string]int{}
	e.pages(e.ctx, unfinishedPage, func(r Record, err error) bool {
		if err == nil {
			orphans[r.Machine]++
		}
		return err == nil
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	for machine, keys := range orphans {
		if e.machines[machine] == nil {
			e.log.Warn("keystate: unfinished keys belong to a machine that is not registered", "machine", machine, "keys", keys)
		}
	}
}
