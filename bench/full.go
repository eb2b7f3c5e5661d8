package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"example.com/keystate"
	"example.com/keystate/bench/plot"
	"github.com/google/uuid"
)

// A kind is how clients make keys.
type kind struct {
	name  string
	newID func() string
	past  idAt
}

var kinds = []kind{
	{"minted", keystate.NewID, mintedID},
	{"random", uuid.NewString, randomID},
}

// A fullness is a contender on a store with finished keys, beside the same on an empty one.
type fullness struct {
	kind        kind
	stored      int
	empty, full *cell
	heap        float64       // bytes for a finished key
	size        float64       // bytes for a finished key in the store
	first       time.Duration // from opening until a new key is answered
}

const fillRate = 100_000 // keys a second, thought

// onFullStores measures contenders on stores with finished keys beside empty ones, in turns.
func (b *bench) onFullStores() (steps []step) {
	for _, size := range b.stored {
		for _, k := range kinds {
			for _, c := range b.field {
				if c.fill != nil {
					steps = append(steps, b.onFullStore(c, k, size)...)
				}
			}
		}
	}
	return steps
}

func (b *bench) onFullStore(c contender, k kind, size int) (steps []step) {
	f := &fullness{kind: k, stored: size}
	what := fmt.Sprintf("%s with %s %s keys", c.name, plot.Number(float64(size)), k.name)
	add := func(name string, cost time.Duration, do func() error) {
		steps = append(steps, step{what + ", " + name, cost, func() {
			if f.full != nil && f.full.failed != nil {
				return
			}
			if err := do(); err != nil {
				f.full.failed = err
				b.fail(fmt.Errorf("%s, %s: %w", what, name, err))
			}
		}})
	}
	fill := time.Duration(float64(size) / fillRate * float64(time.Second))
	if b.isCached(c, k, size) {
		fill = time.Second
	}
	add("filling", fill, func() error {
		b.full = append(b.full, f)
		f.empty = &cell{contender: c, callers: b.storedCallers}
		f.full = &cell{contender: c, callers: b.storedCallers}
		return b.fillPlace(f)
	})
	add("memory", b.pause+time.Duration(size/2)*time.Microsecond, func() error { return b.weigh(f) })
	for turn := range b.turns {
		add(fmt.Sprintf("turn %d of %d", turn+1, b.turns), 2*(b.slice*6/5+b.pause), func() error {
			if err := b.emptyTurn(f); err != nil {
				return err
			}
			return b.try(f.full, b.slice, k.newID, 0, false)
		})
	}
	add("cleaning up", time.Second, func() error { return b.dropFull(f) })
	return steps
}

// emptyTurn is a turn on a store of its own.
func (b *bench) emptyTurn(f *fullness) error {
	p, err := b.newPlace(f.empty.contender)
	if err != nil {
		return err
	}
	f.empty.made, f.empty.place = 0, p
	f.empty.place.connections = f.full.place.connections
	return errors.Join(b.try(f.empty, b.slice, f.kind.newID, 0, true), b.remove(p))
}

func (b *bench) remove(p place) error {
	if p.dsn != "" {
		return b.server.drop(p.dsn)
	}
	return p.remove()
}

func (b *bench) cachedDir(c contender, k kind, size int) string {
	name := strings.NewReplacer(" ", "-", ",", "").Replace(c.name)
	return filepath.Join(b.cache, fmt.Sprintf("%s-%d-%s", name, size, k.name))
}

// A folder with this file in it was filled to the end.
const filledMark = "filled"

func (b *bench) isCached(c contender, k kind, size int) bool {
	_, err := os.Stat(filepath.Join(b.cachedDir(c, k, size), filledMark))
	return err == nil
}

// fillPlace makes the full store, or takes the one that an earlier run has left. Measuring adds to it what it asks for.
func (b *bench) fillPlace(f *fullness) (err error) {
	c := f.full.contender
	f.full.place = place{dir: b.cachedDir(c, f.kind, f.stored), connections: min(max(16, b.storedCallers/2), 32)}
	if c.on == onPostgres {
		f.full.place.dir = ""
		if f.full.place.dsn, err = b.server.database(); err != nil {
			return err
		}
	} else {
		if b.isCached(c, f.kind, f.stored) {
			return nil
		}
		if err := errors.Join(os.RemoveAll(f.full.place.dir), os.MkdirAll(f.full.place.dir, 0o755)); err != nil {
			return err
		}
	}
	started, filled, told := time.Now(), 0, time.Now()
	err = c.fill(f.full.place, f.stored, f.kind.past, func(n int) {
		filled += n
		if time.Since(told) > 10*time.Second {
			told = time.Now()
			rate := float64(filled) / time.Since(started).Seconds()
			fmt.Fprintf(os.Stderr, "      %s of %s keys, %s a second, %s left\n", plot.Number(float64(filled)), plot.Number(float64(f.stored)),
				number(rate), clock(time.Duration(float64(f.stored-filled)/rate*float64(time.Second))))
		}
	})
	if err != nil || f.full.place.dir == "" {
		return err
	}
	return os.WriteFile(filepath.Join(f.full.place.dir, filledMark), nil, 0o644)
}

func (b *bench) dropFull(f *fullness) error {
	if f.full.place.dir != "" && b.cache != b.dir {
		return nil
	}
	return b.remove(f.full.place)
}

// weigh finds out what the process holds in memory for a finished key, when a new key has been answered; and how large the store is.
func (b *bench) weigh(f *fullness) error {
	p, err := b.newPlace(f.empty.contender)
	if err != nil {
		return err
	}
	p.connections = f.full.place.connections
	none, _, err1 := heapOf(f.full.contender, p, f.kind)
	all, first, err2 := heapOf(f.full.contender, f.full.place, f.kind)
	f.first = first
	f.heap = max(0, float64(all)-float64(none)) / float64(f.stored)
	size, err3 := b.sizeOf(f.full.place)
	f.size = float64(size) / float64(f.stored)
	return errors.Join(err1, err2, err3, b.remove(p))
}

func heapOf(c contender, p place, k kind) (bytes uint64, first time.Duration, err error) {
	start := time.Now()
	s, err := c.open(p)
	if err != nil {
		return 0, 0, err
	}
	if _, err := s.request(context.Background(), k.newID()); err != nil {
		return 0, 0, joinClose(err, s)
	}
	first = time.Since(start)
	runtime.GC()
	runtime.GC() // which empties the pools, too
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc, first, s.close()
}

// sizeOf is what the disk holds of a place.
func (b *bench) sizeOf(p place) (total int64, err error) {
	if p.dsn != "" {
		return b.server.size(p.dsn)
	}
	err = filepath.WalkDir(p.dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	return total, err
}

func (t *text) stored() {
	if len(t.b.full) == 0 {
		return
	}
	t.f("\n## With finished keys in the store\n")
	t.f("%d callers, in turns with a store that was empty at the turn's beginning. *First answer*: from opening the store until a new key was answered.", t.b.storedCallers)
	for i, k := range kinds {
		t.figure("stored-"+k.name+".svg", t.b.overStored(kinds[i]))
	}
	t.table("", "finished keys", "keys", "requests/s, empty", "requests/s, full", "full ÷ empty", "p99 ms, full", "KB on disk, empty", "KB on disk, full", "bytes a key on disk", "heap bytes a key", "first answer ms")
	for _, f := range t.b.full {
		if f.full.failed != nil {
			t.row(f.full.name, plot.Number(float64(f.stored)), f.kind.name, "failed")
			continue
		}
		t.row(f.full.name, plot.Number(float64(f.stored)), f.kind.name, f.empty.rateText(), f.full.rateText(), percent(f.full.rate.over(f.empty.rate).median()),
			number(f.full.p99.median()*1e3), number(f.empty.device.median()/1e3), number(f.full.device.median()/1e3),
			number(f.size), number(f.heap), number(f.first.Seconds()*1e3))
	}
}

// overStored is the plot of rates over stored keys.
func (b *bench) overStored(k kind) plot.Chart {
	c := plot.Chart{Title: fmt.Sprintf("Requests a second over finished keys in the store, %s keys", k.name),
		Note: fmt.Sprintf("%d callers; median of the turns, with the least and the most", b.storedCallers),
		X:    plot.Axis{Label: "finished keys in the store", Log: true},
		Y:    plot.Axis{Label: "requests per second", Log: true}}
	if len(b.stored) == 0 {
		return c
	}
	nothing := float64(b.stored[0]) / 10
	c.X.Ticks = []plot.Tick{{At: nothing, Text: "none"}}
	for _, size := range b.stored {
		c.X.Ticks = append(c.X.Ticks, plot.Tick{At: float64(size), Text: plot.Number(float64(size))})
	}
	point := func(x float64, s spread) plot.Point {
		return plot.Point{X: x, Y: s.median(), Low: s.min(), High: s.max()}
	}
	for _, of := range b.field {
		line := plot.Line{Label: of.label, Style: styleOf(of)}
		for _, f := range b.full {
			if f.kind.name != k.name || f.full.name != of.name || f.full.failed != nil {
				continue
			}
			if len(line.Points) == 0 {
				line.Points = append(line.Points, point(nothing, f.empty.rate))
			}
			line.Points = append(line.Points, point(float64(f.stored), f.full.rate))
		}
		if len(line.Points) > 0 {
			c.Lines = append(c.Lines, line)
		}
	}
	return strongestLast(c)
}
