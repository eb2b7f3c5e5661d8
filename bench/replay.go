package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"example.com/keystate"
	"go.etcd.io/bbolt"
)

// bareRead stands for the least that a replay on bbolt takes: a View, and a Get of the same record.
var bareRead = contender{name: "limit: View and Get of the same bytes", label: "raw bbolt", on: onBolt, limit: true}

// fillTime is how long a contender may take to make the keys that it then replays.
const fillTime = 5 * time.Second

// replaying measures requests whose keys are finished: one caller, then several.
func (b *bench) replaying() (steps []step) {
	add := func(name string, cost time.Duration, do func()) {
		steps = append(steps, step{"replay, " + name, cost, do})
	}
	ids := map[string][]string{}
	var sequences [][]byte
	for _, c := range b.field {
		if c.limit {
			continue
		}
		x := &cell{contender: c, callers: 1}
		add("keys of "+c.name, min(fillTime, b.slice), func() {
			x = b.newCell(c, 1)
			b.replays = append(b.replays, x)
			if x.failed == nil {
				ids[c.name], x.failed = b.finishSome(x)
			}
			b.fail(x.failed)
			if c.name == keystateOnBolt && x.failed == nil {
				b.bare = &cell{contender: bareRead, callers: 1, place: x.place}
				sequences, b.bare.failed = sequencesOf(x.place, ids[c.name])
			}
		})
		for turn := range b.turns {
			add(fmt.Sprintf("turn %d of %d, %s", turn+1, b.turns, c.name), b.slice+b.pause, func() {
				if x.failed == nil {
					x.failed = b.replayTurn(x, ids[c.name])
					b.fail(x.failed)
				}
				if c.name == keystateOnBolt && b.bare != nil && b.bare.failed == nil {
					b.bare.failed = b.bareTurn(sequences)
					b.fail(b.bare.failed)
				}
			})
		}
		add("cleaning up", 100*time.Millisecond, func() { b.fail(b.remove(x.place)) })
	}
	return steps
}

// finishSome makes the keys, or as many as there is time for.
func (b *bench) finishSome(x *cell) ([]string, error) {
	s, err := x.open(x.place)
	if err != nil {
		return nil, err
	}
	var made []string
	next := each(b.newIDs(b.replayed))
	for deadline := time.Now().Add(max(b.slice, min(fillTime, 10*b.slice))); time.Now().Before(deadline) && err == nil; {
		var some []string
		for range 64 {
			if id, more := next(); more {
				some = append(some, id)
			}
		}
		if len(some) == 0 {
			break
		}
		_, err = race(s, 64, each(some))
		made = append(made, some...)
	}
	return made, joinClose(err, s)
}

func (b *bench) replayTurn(x *cell, ids []string) error {
	s, err := x.open(x.place)
	if err != nil {
		return err
	}
	_, err = race(s, 1, again(b.slice/5, ids))
	commits := commitsOf(s)
	before := b.usage()
	if err == nil {
		var p pace
		p, err = race(s, 1, again(b.slice, ids))
		x.add(p, b.usage().since(before), 0)
	}
	if n := commitsOf(s) - commits; err == nil && n > 0 && x.name == keystateOnBolt {
		err = fmt.Errorf("replays have written %d times", n)
	}
	return joinClose(err, s)
}

// sequencesOf are where the records of keys are (docs/format.md).
func sequencesOf(p place, ids []string) ([][]byte, error) {
	e, err := openBoltEngine(p, forEver)
	if err != nil {
		return nil, err
	}
	var sequences [][]byte
	for _, id := range ids {
		var r keystate.Record
		if r, err = e.Key(context.Background(), key(id)); err != nil {
			break
		}
		sequences = append(sequences, binary.BigEndian.AppendUint64(nil, r.Sequence))
	}
	return sequences, joinClose(err, e)
}

func (b *bench) bareTurn(sequences [][]byte) error {
	db, err := bbolt.Open(boltPath(b.bare.place), 0o600, &bbolt.Options{InitialMmapSize: keystateMap})
	if err != nil {
		return err
	}
	p := pace{}
	before := b.usage()
	start := time.Now()
	for i := 0; time.Since(start) < b.slice && err == nil; i++ {
		began := time.Now()
		err = db.View(func(tx *bbolt.Tx) error {
			if v := tx.Bucket([]byte("keystate")).Bucket(doneBucket).Get(sequences[(i*7919)%len(sequences)]); len(v) == 0 {
				return errors.New("the record is not where docs/format.md says")
			}
			return nil
		})
		p.latency.add(time.Since(began))
		p.requests++
	}
	p.took = time.Since(start)
	b.bare.add(p, b.usage().since(before), 0)
	return errors.Join(err, db.Close())
}

func (t *text) replay() {
	if len(t.b.replays) == 0 {
		return
	}
	t.f("\n## Replay\n\nOne caller asks for keys that are finished, up to %d of them.", t.b.replayed)
	t.table("", "replays/s", "p50 µs", "p99 µs", "allocations", "CPU µs", "× a bare read")
	bare := t.b.bare
	for _, x := range append([]*cell{bare}, t.b.replays...) {
		if x == nil || x.failed != nil {
			continue
		}
		times := ""
		if bare != nil && x.on == onBolt {
			times = number(bare.rate.over(x.rate).median())
		}
		t.row(x.name, x.rateText(), number(x.p50.median()*1e6), number(x.p99.median()*1e6), number(x.allocations.median()), number(x.cpu.median()*1e6), times)
	}
}
