package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"example.com/keystate/internal/pgtest"
)

// A cell is one contender in one situation, and what was measured of it in several turns. Figures are for one request, except
// for rates and disturbances.
type cell struct {
	contender
	callers int
	place   place
	made    int // requests, in all turns
	group   int // members of a transaction, in the last turn

	rate, p50, p99                 spread // per second; seconds
	commits, flushes, device       spread // transactions; of the disk's cache; bytes on the disk
	written, allocations, cpu      spread // bytes by this process; processor seconds with the server's
	walFlushes, walBytes, disturbs spread
	trips, statements              float64
	latency                        histogram
	failed                         error
}

// place makes where a contender can work.
func (b *bench) newPlace(c contender) (p place, err error) {
	if c.on == onPostgres {
		p.dsn, err = b.server.database()
		return p, err
	}
	p.dir, err = os.MkdirTemp(b.dir, "place")
	return p, err
}

func (p place) remove() error {
	if p.dir == "" {
		return nil
	}
	return os.RemoveAll(p.dir)
}

func (b *bench) newCell(c contender, callers int) *cell {
	p, err := b.newPlace(c)
	p.connections = min(max(16, callers/2), 32)
	return &cell{contender: c, callers: callers, place: p, failed: err}
}

// takeTurn opens the contender, lets it warm up, measures, checks what is there afterwards, and closes it.
func (b *bench) takeTurn(x *cell, d time.Duration, newID func() string, group int, last bool) {
	if x.failed != nil {
		return
	}
	if err := b.try(x, d, newID, group, last); err != nil {
		x.failed = err
		b.fail(fmt.Errorf("%s, %d callers: %w", x.name, x.callers, err))
	}
}

func (b *bench) try(x *cell, d time.Duration, newID func() string, group int, last bool) (err error) {
	var walBefore pgtest.Figures
	if x.on == onPostgres {
		if walBefore, err = b.server.figures(x.place.dsn); err != nil {
			return err
		}
	}
	s, err := x.open(x.place)
	if err != nil {
		return err
	}
	made, err := b.measure(x, s, d, newID, group, last)
	if err := joinClose(err, s); err != nil || x.on != onPostgres {
		return err
	}
	after, err := b.server.figures(x.place.dsn)
	if err != nil {
		return err
	}
	opening, err := b.opening(x)
	if err != nil {
		return err
	}
	wal := after.Since(walBefore).Since(opening)
	x.walFlushes = append(x.walFlushes, float64(wal.WALFlushes)/float64(max(1, made)))
	x.walBytes = append(x.walBytes, float64(wal.WALBytes)/float64(max(1, made)))
	x.commits = append(x.commits, float64(wal.Commits)/float64(max(1, made)))
	return nil
}

// opening is what the server counts for a contender that opens, finds its tables, and closes.
func (b *bench) opening(x *cell) (f pgtest.Figures, err error) {
	if f, known := b.openings[x.name]; known {
		return f, nil
	}
	before, err := b.server.figures(x.place.dsn)
	if err != nil {
		return f, err
	}
	s, err := x.open(x.place)
	if err != nil {
		return f, err
	}
	if err := s.close(); err != nil {
		return f, err
	}
	after, err := b.server.figures(x.place.dsn)
	b.openings[x.name] = after.Since(before)
	return b.openings[x.name], err
}

// measure is the part of a turn in which the station is open. It returns how many requests were made.
func (b *bench) measure(x *cell, s station, d time.Duration, newID func() string, group int, last bool) (made int, err error) {
	work := func(d time.Duration) (pace, error) {
		if w, ok := s.(writer); ok {
			return perform(w, group, d)
		}
		return race(s, x.callers, during(d, newID))
	}
	warm, err := work(d / 5)
	if err != nil {
		return 0, err
	}
	commits := commitsOf(s)
	transactions, members := groupsOf(s)
	before := b.usage()
	p, err := work(d)
	if err != nil {
		return 0, err
	}
	used := b.usage().since(before)
	x.add(p, used, commitsOf(s)-commits)
	if t, m := groupsOf(s); t > transactions {
		x.group = int((m - members) / (t - transactions))
	}
	made = warm.requests + p.requests
	x.made += made
	if x.limit {
		return made, nil
	}
	ctx := context.Background()
	err = check(ctx, s, p.last[:min(20, len(p.last))])
	if last && err == nil {
		err = checkCount(ctx, s, x.made)
	}
	return made, err
}

func commitsOf(s station) int64 {
	if c, ok := s.(committer); ok {
		n, _ := c.commits()
		return n
	}
	return 0
}

func groupsOf(s station) (transactions, members int64) {
	if g, ok := s.(grouper); ok {
		return g.grouped()
	}
	return 0, 0
}

func (x *cell) add(p pace, u usage, commits int64) {
	n := float64(max(1, p.requests))
	put := func(s *spread, v float64) { *s = append(*s, v) }
	put(&x.rate, p.rate())
	put(&x.p50, p.latency.quantile(0.50).Seconds())
	put(&x.p99, p.latency.quantile(0.99).Seconds())
	x.latency.merge(&p.latency)
	if commits > 0 {
		put(&x.commits, float64(commits)/n)
	}
	if u.onDevice {
		put(&x.flushes, float64(u.flushes)/n)
		put(&x.device, float64(u.deviceBytes)/n)
	}
	put(&x.written, float64(u.written)/n)
	put(&x.allocations, float64(u.allocations)/n)
	put(&x.cpu, (u.self+u.servers).Seconds()/n)
	put(&x.disturbs, u.disturbance(p.took))
}

// beside measures contenders beside each other at so many callers, in turns.
func (b *bench) beside(callers int) []step {
	var cells []*cell
	var steps []step
	add := func(name string, cost time.Duration, do func()) {
		steps = append(steps, step{fmt.Sprintf("%d callers, %s", callers, name), cost, do})
	}
	add("places", 200*time.Millisecond, func() {
		for _, c := range b.field {
			cells = append(cells, b.newCell(c, callers))
		}
		b.side = append(b.side, side{callers, cells})
	})
	for i, c := range b.field {
		if c.on == onPostgres && len(b.poolsFor(callers)) > 1 {
			add("connections of "+c.name, time.Duration(len(b.poolsFor(callers)))*(b.slice+b.pause), func() { b.choosePool(cells[i]) })
		}
	}
	for turn := range b.turns {
		// Limits come last: they take over the size of groups.
		for j := range b.field {
			i := (turn + j) % len(b.field)
			c := b.field[i]
			if c.limit {
				continue
			}
			add(fmt.Sprintf("turn %d of %d, %s", turn+1, b.turns, c.name), b.slice*6/5+b.pause, func() {
				b.takeTurn(cells[i], b.slice, b.newID, 0, turn == b.turns-1)
			})
		}
		for i, c := range b.field {
			if c.limit {
				add(fmt.Sprintf("turn %d of %d, %s", turn+1, b.turns, c.name), b.slice*6/5+b.pause, func() {
					b.takeTurn(cells[i], b.slice, b.newID, groupOf(cells), false)
				})
			}
		}
	}
	add("round trips", time.Duration(len(b.field))*100*time.Millisecond, func() {
		for _, x := range cells {
			if x.on == onPostgres && x.failed == nil {
				x.failed = b.countTrips(x)
			}
		}
	})
	add("cleaning up", 200*time.Millisecond, func() {
		for _, x := range cells {
			b.fail(b.remove(x.place))
		}
	})
	return steps
}

// groupOf is how many commits of the engine on bbolt have shared a transaction.
func groupOf(cells []*cell) int {
	for _, x := range cells {
		if x.name == keystateOnBolt {
			return max(1, x.group)
		}
	}
	return 1
}

// poolsFor are the numbers of connections to try: more than the server has processors and disks to serve make all of them slower.
func (b *bench) poolsFor(callers int) (sizes []int) {
	for _, size := range b.pools {
		if len(sizes) == 0 || size <= 2*callers {
			sizes = append(sizes, size)
		}
	}
	return sizes
}

// choosePool tries pools of several sizes and keeps to the one with which the contender is fastest.
func (b *bench) choosePool(x *cell) {
	if x.failed != nil {
		return
	}
	sizes := b.poolsFor(x.callers)
	var rates []float64
	for _, size := range sizes {
		x.place.connections = size
		rate, err := b.tryPool(x)
		if err != nil {
			x.failed = err
			b.fail(fmt.Errorf("%s with %d connections: %w", x.name, size, err))
			return
		}
		rates = append(rates, rate)
	}
	x.place.connections = sizes[slices.Index(rates, slices.Max(rates))]
}

func (b *bench) tryPool(x *cell) (rate float64, err error) {
	s, err := x.open(x.place)
	if err != nil {
		return 0, err
	}
	defer func() { err = joinClose(err, s) }()
	for _, d := range []time.Duration{b.slice / 5, b.slice} {
		p, err := race(s, x.callers, during(d, b.newID))
		if err != nil {
			return 0, err
		}
		x.made += p.requests
		rate = p.rate()
	}
	return rate, nil
}

// countTrips counts what goes over the connections, once statements are prepared on all of them. The proxy that counts would slow turns down.
func (b *bench) countTrips(x *cell) error {
	requests, warm := 600, 20*x.place.connections+x.callers
	if b.short {
		requests, warm = 20, 40
	}
	return b.server.proxied(x.place.dsn, func(proxy *pgtest.Proxy) (err error) {
		p := x.place
		p.dsn = proxy.DSN()
		s, err := x.open(p)
		if err != nil {
			return err
		}
		defer func() { err = joinClose(err, s) }()
		if _, err := race(s, x.callers, each(b.newIDs(warm))); err != nil {
			return err
		}
		before := proxy.Counts()
		made, err := race(s, x.callers, each(b.newIDs(requests)))
		counts := proxy.Counts().Since(before)
		x.trips = float64(counts.RoundTrips) / float64(max(1, made.requests))
		x.statements = float64(counts.Statements) / float64(max(1, made.requests))
		return err
	})
}

func (b *bench) newIDs(n int) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = b.newID()
	}
	return ids
}

func (b *bench) fail(err error) {
	if err != nil {
		b.failed = errors.Join(b.failed, err)
		fmt.Fprintf(os.Stderr, "\nFAILED: %v\n", err)
	}
}
