package keystate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"
)

// What engines do that have one store between them: each says that it is at work, leaves to the others what they hold, waits for
// their answers, and takes over the keys of those that are gone.

// errElsewhere says that another engine is at work on the key.
var errElsewhere = errors.New("keystate: another engine is at work on the key")

// vacant returns errElsewhere for a key that another engine holds.
func (e *Engine[Tx]) vacant(tx Tx, r Record) error {
	if e.shared == nil || r.Status != Running || r.Epoch == e.epoch {
		return nil
	}
	alive, err := e.shared.Alive(tx, r.Epoch)
	if err == nil && alive {
		err = errElsewhere
	}
	return err
}

// manyMisses is after how many looks in a row that found nothing the next look is not worth its trip to the store.
const manyMisses = 64

// recallUnlessNew is recall, but takes the key of a request for new without a look when the last many were. That it is not shows when it is
// put: then the transaction is undone, the key is taken up as any other, and the next many keys are looked for again.
func (e *Engine[Tx]) recallUnlessNew(ctx context.Context, c *call) error {
	if e.shared == nil {
		return e.recall(ctx, c)
	}
	if c.request != nil && e.misses.Load() >= manyMisses {
		return cmp.Or(e.audited(ctx), ErrNotFound)
	}
	err := e.recall(ctx, c)
	switch {
	case err == nil:
		e.misses.Store(0)
	case errors.Is(err, ErrNotFound):
		e.misses.Add(1)
	}
	return err
}

// outrun says whether a run ended because another engine has the key, and its callers are to have that engine's answer.
func (j *journey[Tx]) outrun(err error) bool {
	return j.engine.shared != nil && (errors.Is(err, errElsewhere) || errors.Is(err, ErrFenced)) && j.engine.awaited(j.shared)
}

// awaited says whether callers wait for a run. One for which nobody does can be joined no more.
func (e *Engine[Tx]) awaited(r *run) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r.slot || r.joined {
		return true
	}
	delete(e.runs, r.key)
	return false
}

// Of a caller's run that waits for another engine.
const (
	firstGlance = 5 * time.Millisecond
	lastGlance  = time.Second
)

// attend waits until the engine that has the key has ended with it, one way or another, and goes on from there: with its answer, or with the
// key. A run that waits holds its slot, so that no more callers wait than may run.
func (j *journey[Tx]) attend() error {
	if j.engine.opts.RefuseInFlight {
		j.record = Record{} // there is nothing here that is ours to carry on
		return fmt.Errorf("%w: %s", ErrInProgress, j.shared.key)
	}
	j.shared.elsewhere.Store(true)
	j.shared.announce()
	for pause := firstGlance; ; pause = min(2*pause, lastGlance) {
		if !j.engine.sleep(jittered(pause)) {
			return ErrClosed
		}
		if err := j.takeUp(); !j.outrun(err) {
			return err
		}
	}
}

// jittered is a length of 50 % to 150 %.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// share keeps the engine's lease and takes over what others have left, until the engine closes. When the lease could not be renewed, the store
// was perhaps away for all of them: for as long as a lease, the others then have time to renew theirs, and nobody is taken for gone.
func (e *Engine[Tx]) share() {
	var lease time.Duration
	var away bool
	renewed := time.Now()
	var spare time.Time // until when nobody is taken for gone
	for open := true; open; {
		pause := min(cmp.Or(lease/3, renewAgain), renewAgain)
		if held, err := e.renew(); err != nil {
			away = true
		} else {
			away = away || time.Since(renewed) > held // it has run out, though nothing has failed: the store was slow, or we were
			lease, pause, renewed = held, held/3, time.Now()
			if away {
				away, spare = false, time.Now().Add(lease)
			}
			if !time.Now().Before(spare) {
				e.takeOver()
			}
		}
		open = e.sleep(jittered(pause) * 2 / 3) // of a third of the lease, never more than it
	}
}

const renewAgain = time.Second // when a lease could not be renewed, at the latest

// renew renews the lease, and reads the store's clock.
func (e *Engine[Tx]) renew() (lease time.Duration, err error) {
	lease, err = e.shared.Renew(e.ctx)
	if err == nil {
		err = e.readClock()
	}
	if err != nil && e.ctx.Err() == nil {
		e.log.Error("keystate: the lease is not renewed; other engines may take over this one's keys", "error", err)
	}
	return lease, err
}

// A reading is the store's time, and the engine's own when it was read; from there on a monotonic clock counts.
type reading struct{ at, read time.Time }

// readClock sets the engine's clock by the store's, if that has one.
func (e *Engine[Tx]) readClock() error {
	t, ok := e.store.(timekeeper)
	if !ok {
		return nil
	}
	asked := time.Now()
	at, err := t.Now(e.ctx)
	if err == nil {
		e.storeClock.Store(&reading{at: at, read: asked.Add(time.Since(asked) / 2)})
	}
	return err
}

// takeOver makes keys of engines that are gone its own, no more than it can carry on at a time: others want some, too.
func (e *Engine[Tx]) takeOver() {
	for {
		machines, room := e.capacity()
		if room <= 0 || len(machines) == 0 || e.ctx.Err() != nil {
			return
		}
		adopted, err := e.shared.Adopt(e.ctx, machines, room)
		if err != nil {
			if e.ctx.Err() == nil {
				e.log.Error("keystate: keys of engines that are gone are not taken over", "error", err)
			}
			return
		}
		e.mu.Lock()
		for _, r := range adopted {
			e.queueLocked(r)
		}
		e.mu.Unlock()
		if len(adopted) < room {
			return
		}
	}
}

// capacity is for which machines the engine can take keys up, and how many.
func (e *Engine[Tx]) capacity() (machines []string, room int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	room = e.opts.Parallelism - e.resuming - e.due.ready(e.now())
	return slices.Sorted(maps.Keys(e.machines)), room
}

// heldElsewhere lists the epochs of other boots at work, of those that the records bear.
func (e *Engine[Tx]) heldElsewhere(ctx context.Context, records []Record) (map[uint64]bool, error) {
	var held map[uint64]bool
	err := e.store.View(ctx, func(tx Tx) error {
		held = map[uint64]bool{}
		for _, r := range records {
			if _, known := held[r.Epoch]; known || r.Epoch == e.epoch {
				continue
			}
			alive, err := e.shared.Alive(tx, r.Epoch)
			if err != nil {
				return err
			}
			held[r.Epoch] = alive
		}
		return nil
	})
	return held, err
}
