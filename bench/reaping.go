package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"example.com/keystate"
)

// reaping is how fast keystate on bbolt answers while it deletes keys whose retention has passed, beside the same without.
type reaping struct {
	keys          int
	without, with *cell
	share         float64       // of the rate without that was kept while all keys were reaped
	took          time.Duration // until they were
	failed        error
}

const reapingCallers = 64

// reapAll ends what would take for ever.
const reapAll = 15 * time.Minute

// shortRetention has passed for the keys that a store is filled with, and for no key that is made while it is measured.
var shortRetention = keystate.Options{Retention: pastEnd / 2}

func (b *bench) whileReaping() (steps []step) {
	c, ok := named(b.field, keystateOnBolt)
	if !ok {
		return nil
	}
	r := &reaping{keys: b.reaped, without: &cell{contender: c, callers: reapingCallers}, with: &cell{contender: c, callers: reapingCallers}}
	r.with.contender.open = func(p place) (station, error) { return openBoltEngine(p, shortRetention) }
	add := func(name string, cost time.Duration, do func() error) {
		steps = append(steps, step{"reaping, " + name, cost, func() {
			if r.failed != nil {
				return
			}
			if r.failed = do(); r.failed != nil {
				b.fail(fmt.Errorf("reaping, %s: %w", name, r.failed))
			}
		}})
	}
	var filled place
	add("filling", time.Duration(float64(b.reaped)/fillRate*float64(time.Second)), func() (err error) {
		b.reapings = r
		if filled, err = b.newPlace(c); err != nil {
			return err
		}
		return fillOnBolt(filled, r.keys, mintedID, func(int) {})
	})
	for turn := range b.turns {
		add(fmt.Sprintf("turn %d of %d", turn+1, b.turns), 2*(b.slice*6/5+b.pause), func() error {
			for _, x := range []*cell{r.without, r.with} {
				if err := b.onCopy(c, filled, func(p place) error {
					x.place = p
					return b.try(x, b.slice, b.newID, 0, false)
				}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	add("to the end", time.Duration(r.keys)*200*time.Microsecond, func() error {
		return b.onCopy(c, filled, func(p place) error { return r.toTheEnd(b, p) })
	})
	add("cleaning up", time.Second, func() error { return b.remove(filled) })
	return steps
}

// onCopy works on a copy of a filled store.
func (b *bench) onCopy(c contender, filled place, fn func(p place) error) error {
	p, err := b.newPlace(c)
	if err != nil {
		return err
	}
	return errors.Join(copyFile(boltPath(p), boltPath(filled)), fn(p), b.remove(p))
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}

// toTheEnd makes requests until all keys of the past are reaped.
func (r *reaping) toTheEnd(b *bench, p place) (err error) {
	e, err := openBoltEngine(p, shortRetention)
	if err != nil {
		return err
	}
	defer func() { err = joinClose(err, e) }()
	start := time.Now()
	made, err := race(e, reapingCallers, func() (string, bool) {
		return b.newID(), e.reaped.Load() < int64(r.keys) && time.Since(start) < reapAll
	})
	if err != nil {
		return err
	}
	r.took = made.took
	r.share = made.rate() / r.without.rate.median()
	if n := e.reaped.Load(); n < int64(r.keys) {
		return fmt.Errorf("%d of %d keys were reaped in %v", n, r.keys, made.took)
	}
	_, err = e.Stats(context.Background())
	return err
}

func (t *text) reaping() {
	r := t.b.reapings
	if r == nil || r.failed != nil {
		return
	}
	t.f("\n## Reaping while requests run\n\nkeystate on bbolt, %d callers, %s finished keys whose retention has passed, in turns with the same store that keeps them.", reapingCallers, number(float64(r.keys)))
	t.table("", "requests/s", "share", "p99 ms", "KB on disk")
	for _, x := range []struct {
		name string
		*cell
	}{{"nothing is reaped", r.without}, {"while keys are reaped", r.with}} {
		t.row(x.name, x.rateText(), percent(x.rate.over(r.without.rate).median()), number(x.p99.median()*1e3), number(x.device.median()/1e3))
	}
	t.f("\nUntil all were reaped: %s s, %s keys/s, and %s of the rate without.", number(r.took.Seconds()), number(float64(r.keys)/r.took.Seconds()), percent(r.share))
}
