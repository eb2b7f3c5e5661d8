package keystate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
)

// Group commit: whoever has something to commit stands in line, and the committer carries all who wait in
// one bbolt transaction as soon as the one before is durable. There is no timer: nobody waits for a clock.
//
// A member that fails must leave no trace, and bbolt cannot undo a part of a transaction. So the group's first
// try goes through to its end, which finds everybody who may fail; each of these is then tried alone, which
// tells who does; and the rest are run again together. That costs a group one more run, however many fail.

// maxGroup bounds a transaction, so that those who come later are not kept waiting.
const maxGroup = 1024

// patience is how often the committer yields to others who may be about to join while nobody does. More makes larger groups,
// and leaves the disk idle; it costs some microseconds where nobody comes.
const patience = 30

// maxArena is what the committer keeps of the memory for records from group to group.
const maxArena = 4 << 20

// A member is one call of Update that waits for its commit.
type member struct {
	fn   func(tx *bbolt.Tx) error
	done chan error
	err  error // why it failed in the present try
}

// A group is the members that are being committed together.
type group struct {
	members []*member
	failed  []*member // taken out; they are answered with the others, since what they saw may be the others' writes
	running *member   // whose function is running
	tx      *bbolt.Tx
	keys    *boltKeys
	began   time.Time
}

type committer struct {
	store *boltStore
	wake  chan struct{} // holds a token while the line may have members
	ended chan struct{} // closed when the committer has stopped

	turn   sync.Mutex // held by whoever commits
	lonely bool       // the last group had one member; guarded by turn

	mu      sync.Mutex
	line    []*member
	about   int // how many were in the last group, or in line when it was answered
	closed  bool
	started bool
	present atomic.Pointer[group] // what is being committed
	former  sync.Pool             // *member, of calls that have ended
	broken  atomic.Pointer[error] // fail-stop: why nothing more is committed
	arena   []byte
	told    func(Event)
}

func (c *committer) init(s *boltStore) {
	c.store, c.wake, c.ended = s, make(chan struct{}, 1), make(chan struct{})
	c.told = func(Event) {}
}

func (c *committer) start() {
	c.started = true
	go c.loop(nil)
}

func (c *committer) current() *group       { return c.present.Load() }
func (c *committer) onGroup(f func(Event)) { c.told = f }

// failure is why the store refuses to work, or nil.
func (c *committer) failure() error {
	if err := c.broken.Load(); err != nil {
		return *err
	}
	return nil
}

// fail stops the store for good: the first reason stays.
func (c *committer) fail(err error) error {
	c.broken.CompareAndSwap(nil, &err)
	return err
}

// Update commits fn with whoever else is in line.
func (c *committer) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	m, again := c.former.Get().(*member)
	if !again {
		m = &member{done: make(chan error, 1)}
	}
	m.fn = fn
	err := c.enlist(ctx, m)
	m.fn, m.err = nil, nil
	c.former.Put(m)
	return err
}

// enlist waits for a member's answer. When it has one, or never stood in line, nobody else knows it any more.
func (c *committer) enlist(ctx context.Context, m *member) error {
	if c.commitAlone(m) {
		return <-m.done
	}
	if err := c.join(m); err != nil {
		return err
	}
	select {
	case err := <-m.done:
		return err
	case <-ctx.Done():
		if c.leave(m) {
			return ctx.Err()
		}
		return <-m.done // it is being committed: only the outcome tells what happened
	}
}

// commitAlone commits a member on its own goroutine, which saves two switches, where nobody else is about to commit.
func (c *committer) commitAlone(m *member) bool {
	if !c.turn.TryLock() {
		return false
	}
	defer c.turn.Unlock()
	c.mu.Lock()
	busy := c.closed || len(c.line) > 0
	c.mu.Unlock()
	if busy || !c.lonely || c.failure() != nil {
		return false
	}
	g := &group{members: []*member{m}, began: time.Now()}
	defer c.present.Store(nil) // after a Goexit, too
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	c.commit(g)
	return true
}

func (c *committer) join(m *member) error {
	if err := c.failure(); err != nil {
		return err
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return ErrClosed
	}
	c.line = append(c.line, m)
	c.mu.Unlock()
	c.nudge()
	return nil
}

func (c *committer) nudge() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// leave takes a member out of the line, if it is still there.
func (c *committer) leave(m *member) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.line {
		if c.line[i] == m {
			c.line = append(c.line[:i], c.line[i+1:]...)
			return true
		}
	}
	return false
}

// stop ends the committer after everybody in line is served. It reports whether this call was the first.
func (c *committer) stop() bool {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	c.mu.Unlock()
	if first && c.started {
		c.nudge()
		<-c.ended
		c.turn.Lock() // till a member that commits alone, outside the line, has ended
		defer c.turn.Unlock()
	}
	return first
}

// loop commits group after group. A member that calls runtime.Goexit ends the goroutine it runs on: then the
// rest of its group, g, goes on in another one, which has the turn already.
func (c *committer) loop(g *group) {
	finished := false
	defer func() {
		if finished {
			close(c.ended)
			return
		}
		g := c.present.Load()
		g.forget()
		g.running.err = errGoexit
		g.expel()
		go c.loop(g)
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	if g != nil {
		c.commit(g)
		c.turn.Unlock()
	}
	for range c.wake {
		for c.commitLine() {
		}
		if c.isClosed() {
			break
		}
	}
	finished = true
}

// commitLine commits those who are in line, and reports whether there were any.
func (c *committer) commitLine() bool {
	c.turn.Lock()
	g := c.gather()
	if g != nil {
		c.lonely = len(g.members) == 1
		c.commit(g)
	}
	c.turn.Unlock()
	return g != nil
}

func (c *committer) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed && len(c.line) == 0
}

// gather takes everybody in line, or nil. It first lets those run who are about to join: until as many are in line as
// were about when the last group was answered, or nobody joins any more. Without that, a convoy forms that shares each
// sync among half as many.
func (c *committer) gather() *group {
	for n, still := 0, 0; ; still++ {
		c.mu.Lock()
		if len(c.line) > n {
			n, still = len(c.line), 0
		}
		if n == 0 || n >= min(c.about, maxGroup) || still >= patience {
			break
		}
		c.mu.Unlock()
		runtime.Gosched()
	}
	defer c.mu.Unlock()
	n := min(len(c.line), maxGroup)
	if n == 0 {
		return nil
	}
	g := &group{members: append([]*member(nil), c.line[:n]...), began: time.Now()}
	c.line = append(c.line[:0], c.line[n:]...)
	return g
}

// commit carries a group to its end: everybody in it has an answer afterwards.
func (c *committer) commit(g *group) {
	c.present.Store(g)
	c.settle(g)
	c.present.Store(nil) // not deferred: after a Goexit, it names the group that goes on
}

func (c *committer) settle(g *group) {
	var err error
	for spoiled := true; spoiled && len(g.members) > 0 && err == nil; {
		if spoiled, err = c.together(g); spoiled {
			c.judge(g)
			g.expel()
		}
	}
	size := len(g.members) + len(g.failed)
	if len(g.members) > 0 && err == nil {
		c.told(Event{Size: len(g.members), Took: time.Since(g.began)})
	}
	g.answer(err)
	c.mu.Lock()
	c.about = size + len(c.line)
	c.mu.Unlock()
}

// errSpoiled rolls a transaction back.
var errSpoiled = errors.New("keystate: rolled back")

// together runs every member in one transaction and commits it, unless one failed: then it is spoiled.
func (c *committer) together(g *group) (spoiled bool, err error) {
	err = c.transact(g, func() error {
		for _, m := range g.members {
			if m.err = g.run(m); m.err != nil {
				spoiled = true
			}
		}
		if spoiled {
			return errSpoiled
		}
		if g.keys.changed {
			return g.keys.flush()
		}
		return nil
	})
	if spoiled && errors.Is(err, errSpoiled) {
		err = nil
	}
	return spoiled, err
}

// transact runs fn in a transaction and commits it. After a failure whose outcome is open, the store stops.
func (c *committer) transact(g *group, fn func() error) error {
	if err := c.failure(); err != nil {
		return err
	}
	if info, err := os.Stat(c.store.path); err != nil {
		return c.fail(fmt.Errorf("%w: %w", ErrMoved, err))
	} else if !os.SameFile(info, c.store.info) {
		return c.fail(fmt.Errorf("%w: %s", ErrMoved, c.store.path))
	}
	var id int
	var inside error
	err := c.store.guard(func() error {
		return c.store.update(func(tx *bbolt.Tx) error {
			id = tx.ID()
			inside = g.open(tx, c)
			if inside == nil {
				inside = fn()
			}
			return inside
		})
	})
	switch {
	case err == nil:
		c.keep(g.keys.arena)
		return nil
	case inside != nil && !errors.Is(err, inside): // bbolt panicked as it rolled back, and may never let go of its lock
		return c.fail(err)
	case errors.Is(inside, errSpoiled):
		return inside
	case inside != nil:
		return c.fail(inside)
	}
	failed := commitError(err)
	if errors.Is(failed, ErrStorageFull) {
		if !c.visible(id) {
			return failed
		}
		failed = fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
	}
	return c.fail(failed)
}

// open gives the group's members access to a transaction.
func (g *group) open(tx *bbolt.Tx, c *committer) (err error) {
	if g.keys, err = newBoltKeys(tx, c.store.id); err != nil {
		return err
	}
	g.tx, g.keys.arena = tx, c.arena[:0]
	return nil
}

// keep takes back the memory for records: bbolt has copied what it kept of it.
func (c *committer) keep(arena []byte) {
	if c.arena = arena; cap(arena) > maxArena {
		c.arena = nil
	}
}

// run calls a member's function; a panic in it is its error.
func (g *group) run(m *member) (err error) {
	g.running = m
	defer func() {
		if v := recover(); v != nil {
			if err = damage(v); err == nil {
				err = &panicError{value: v, stack: debug.Stack()}
			}
		}
	}()
	return m.fn(g.tx)
}

// judge tries everybody alone who failed in the spoiled transaction. Whoever fails on a clean slate too, has
// failed; the others may have been harmed by what a failed member wrote.
func (c *committer) judge(g *group) {
	first := true
	for _, m := range g.members {
		if m.err == nil {
			continue
		}
		if first { // nobody had failed before it: its slate was clean
			first = false
			continue
		}
		err := c.transact(g, func() error {
			m.err = g.run(m)
			return errSpoiled
		})
		if !errors.Is(err, errSpoiled) {
			m.err = err
		}
	}
}

// expel takes the members out that failed.
func (g *group) expel() {
	rest := g.members[:0]
	for _, m := range g.members {
		if m.err != nil {
			g.failed = append(g.failed, m)
		} else {
			rest = append(rest, m)
		}
	}
	g.members = rest
}

// forget takes back what a try that was broken off had found.
func (g *group) forget() {
	for _, m := range g.members {
		m.err = nil
	}
}

// answer tells everybody what became of the transaction, and those who failed, that they did.
func (g *group) answer(err error) {
	for _, m := range g.members {
		m.done <- err
	}
	for _, m := range g.failed {
		m.done <- cmp.Or(err, m.err)
	}
	g.members, g.failed = nil, nil
}

// visible says whether readers see the transaction of that id.
func (c *committer) visible(id int) bool {
	seen := true
	_ = c.store.guard(func() error {
		return c.store.db.View(func(tx *bbolt.Tx) error {
			seen = tx.ID() >= id
			return nil
		})
	})
	return seen
}

var errGoexit = errors.New("keystate: the phase called runtime.Goexit")

// A panicError is what a panic in a phase becomes.
type panicError struct {
	value any
	stack []byte
}

func (p *panicError) Error() string { return fmt.Sprintf("panic: %v", p.value) }
