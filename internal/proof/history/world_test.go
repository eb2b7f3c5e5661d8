package history

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// A world is one history: who calls, what is recorded of it, and the count beside it.
type world struct {
	path  string
	bug   *bug
	clock atomic.Int64 // counts moments: no two are the same
	left  atomic.Int64 // operations that are still to begin

	mu      sync.Mutex
	present *generation
	changed chan struct{}
	history []porcupine.Operation
	missing []missing // calls whose answers were lost
	lives   map[use]*life
	payouts int64
	fault   error // the first that the count has found
	seen    map[string]int
}

// A use names one life of a key.
type use struct {
	key int
	n   int64
}

// A life is what the count knows of it.
type life struct {
	token    string
	payout   int64
	called   time.Time // when its effect was called last
	kept     bool      // the effect's result is durable, and its commit is owed
	answered bool
	reaped   *ending
}

// An ending is how a key has ended.
type ending struct {
	state  order
	before keystate.RecoveryPoint // where it was refused; empty: it was not
}

// missing is a call that has returned nothing, or too late.
type missing struct {
	op porcupine.Operation
	g  *generation
}

func newWorld(path string, b *bug, operations int) *world {
	w := &world{path: path, bug: b, changed: make(chan struct{}), lives: map[use]*life{}, seen: map[string]int{}}
	w.left.Store(int64(operations))
	return w
}

// moment is now, by a clock that never stands still.
func (w *world) moment() int64 { return w.clock.Add(1) }

func (w *world) sight(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[what]++
}

// wrong notes what the count has found. The caller holds the lock.
func (w *world) wrong(format string, args ...any) {
	if w.fault == nil {
		w.fault = fmt.Errorf("count: "+format, args...)
	}
}

func (w *world) life(key int, n int64) *life {
	l := w.lives[use{key, n}]
	if l == nil {
		l = new(life)
		w.lives[use{key, n}] = l
	}
	return l
}

// pay is the effect: slow at times, failing at times, and counted always.
func (w *world) pay(ctx context.Context, token string, s *order) error {
	w.call(token, s)
	switch rand.IntN(8) {
	case 0:
		t := time.NewTimer(time.Duration(rand.IntN(3000)) * time.Millisecond)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	case 1, 2, 3:
		return errObstacle
	case 4:
		return oneIn(2, keystate.Final(errRefused))
	}
	return nil
}

// call counts an effect's call, and does what it asks for once.
func (w *world) call(token string, s *order) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.life(s.Key, s.Use)
	switch {
	case l.token != "" && l.token != token:
		w.wrong("the effect of use %d of key %d has the tokens %s and %s", s.Use, s.Key, l.token, token)
	case l.kept:
		w.wrong("the effect of use %d of key %d was called again, when only its commit was owed", s.Use, s.Key)
	case l.answered:
		w.wrong("the effect of use %d of key %d was called after the answer", s.Use, s.Key)
	case l.reaped != nil:
		w.wrong("the effect of use %d of key %d was called after it was reaped", s.Use, s.Key)
	case l.token == "":
		w.payouts++
		l.token, l.payout = token, w.payouts
	default:
		w.seen["an effect sent again"]++
	}
	l.called, s.Payout = time.Now(), l.payout
}

// keep is told of an attempt that has failed, when that is durable.
func (w *world) keep(e keystate.Event) {
	var owed *owedError
	if !errors.As(e.Err, &owed) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.life(owed.use.key, owed.use.n).kept = true
	w.seen["a commit owed"]++
}

// forget records what was reaped between two moments.
func (w *world) forget(deleted []keystate.Record, began int64) {
	if len(deleted) == 0 {
		return
	}
	until := w.moment()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range deleted {
		e, err := endingOf(r)
		if err != nil {
			w.wrong("%s was reaped: %w", r.Key, err)
			continue
		}
		l := w.life(e.state.Key, e.state.Use)
		if l.reaped != nil {
			w.wrong("use %d of key %d was reaped twice", e.state.Use, e.state.Key)
		}
		if after := time.Since(l.called); after < retention-time.Microsecond { // records keep the time in microseconds
			w.wrong("use %d of key %d was reaped %s after its effect", e.state.Use, e.state.Key, after)
		}
		l.reaped = &e
		w.seen["a key reaped"]++
		w.history = append(w.history, porcupine.Operation{
			Input: deed{verb: reap, key: e.state.Key}, Output: outcome{answered, e.answer(reasonOf(r))},
			Call: began, Return: until,
		})
	}
}

func reasonOf(r keystate.Record) string {
	if r.Refusal == nil {
		return ""
	}
	return r.Refusal.Reason
}

func endingOf(r keystate.Record) (e ending, err error) {
	e.state, err = stateOf(r)
	if r.Status != keystate.Answered {
		err = errors.Join(err, fmt.Errorf("it is %s", r.Status))
	}
	if r.Refusal != nil {
		e.before = r.Refusal.Before
	}
	return e, err
}

func (e ending) answer(reason string) answer {
	return answer{item: e.state.Item, text: fmt.Sprintf("%+v", e.state), reason: reason}
}

// A client makes calls as long as there are calls to make, each second some of them at the same instant.
func (w *world) client(keys int) {
	g := w.next(nil)
	for g != nil && w.left.Add(-1) >= 0 {
		time.Sleep(time.Duration(rand.IntN(3)) * time.Second)
		g = w.carryOut(g, w.drawDeed(keys))
	}
}

// drawDeed draws a request: often for the key that everybody asks for at the moment, and sometimes another one than the others'.
func (w *world) drawDeed(keys int) deed {
	d := deed{verb: do, key: rand.IntN(keys)}
	if rand.IntN(2) == 0 {
		d.key = int(time.Now().Unix()) % keys
	}
	if rand.IntN(5) == 0 {
		d.item = 1
	}
	return d
}

// carryOut does a deed, again if what came of it was lost, and returns the engine that there is then.
func (w *world) carryOut(g *generation, d deed) *generation {
	for {
		o := w.record(g, d)
		switch {
		case o.result == parked && rand.IntN(2) == 0:
			w.record(g, deed{verb: []verb{retry, abandon}[rand.IntN(2)], key: d.key})
			return g
		case o.result != lost:
			return g
		}
		if g.store.dying() {
			g = w.next(g)
		}
		if g == nil || w.left.Add(-1) < 0 {
			return g
		}
	}
}

func (m *mortal) dying() bool {
	m.alive.Lock()
	defer m.alive.Unlock()
	return m.done
}

// record makes a call and records it.
func (w *world) record(g *generation, d deed) outcome {
	op := porcupine.Operation{Input: d, Call: w.moment()}
	o := g.call(d)
	op.Output, op.Return = o, w.moment()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[string(d.verb)+": "+string(o.result)]++
	if o.result == lost { // it may have happened at any time until its engine was closed
		w.missing = append(w.missing, missing{op, g})
	} else {
		w.history = append(w.history, op)
	}
	return o
}

func (g *generation) call(d deed) outcome {
	ctx := context.Background()
	switch d.verb {
	case retry:
		return operated(g.engine.Retry(ctx, idOf(d.key)))
	case abandon:
		return operated(g.engine.Abandon(ctx, idOf(d.key), strings.TrimPrefix(abandoned, "abandoned: ")))
	}
	if rand.IntN(40) == 0 { // somebody who does not wait
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(1500))*time.Millisecond)
		defer cancel()
	}
	s, err := g.machine.Do(context.WithValue(ctx, asked{}, d), idOf(d.key), order{Key: d.key, Item: d.item})
	o := g.w.outcomeOf(s, err)
	if o.result == answered {
		g.w.mu.Lock()
		defer g.w.mu.Unlock()
		g.w.life(d.key, s.Use).answered = true
	}
	return o
}

// asked is the deed that a call's context bears, for seeded bugs to see.
type asked struct{}

func operated(err error) outcome {
	switch {
	case err == nil:
		return outcome{result: carriedOut}
	case errors.Is(err, keystate.ErrNotFound):
		return outcome{result: unknownKey}
	case errors.Is(err, keystate.ErrOutcomeUnknown), errors.Is(err, keystate.ErrClosed), errors.Is(err, keystate.ErrFenced):
		return outcome{result: lost}
	}
	return outcome{result: notParked}
}

// outcomeOf sorts what Do returned.
func (w *world) outcomeOf(s order, err error) outcome {
	var refused *keystate.FinalError
	var phase *keystate.PhaseError
	switch {
	case err == nil:
		return outcome{answered, ending{state: s}.answer("")}
	case errors.As(err, &refused):
		return outcome{answered, ending{state: s}.answer(refused.Reason)}
	case errors.Is(err, keystate.ErrMismatch):
		return outcome{result: mismatched}
	case errors.Is(err, keystate.ErrOutcomeUnknown), errors.Is(err, keystate.ErrClosed),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return outcome{result: lost}
	case errors.Is(err, keystate.ErrParked):
		return outcome{result: parked}
	case errors.As(err, &phase) && errors.Is(err, errObstacle):
		return outcome{result: stopped}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrong("Do returned %w", err)
	return outcome{result: lost}
}

// next waits for an engine other than the last; nil: there is none any more.
func (w *world) next(last *generation) *generation {
	for {
		w.mu.Lock()
		g, changed := w.present, w.changed
		w.mu.Unlock()
		if g != last {
			return g
		}
		<-changed
	}
}

func (w *world) put(g *generation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.present = g
	close(w.changed)
	w.changed = make(chan struct{})
}

// play lets clients call until all calls are made, with one engine after another.
func (w *world) play(clients, keys int) error {
	var all sync.WaitGroup
	for range clients {
		all.Go(func() { w.client(keys) })
	}
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	defer w.put(nil) // for clients that wait, if no engine can be had any more
	for {
		g, err := w.boot()
		if err != nil {
			return err
		}
		w.put(g)
		select {
		case <-g.ending:
		case <-done:
			return w.settle(g)
		}
		if err := g.finish(); err != nil {
			return err
		}
	}
}

// settle carries every key to its end, and counts.
func (w *world) settle(g *generation) error {
	for {
		err := w.conclude(g)
		if err == nil {
			err = w.tally(g)
		}
		if err := g.finish(); err != nil {
			return err
		}
		if !errors.Is(err, errDead) && !errors.Is(err, keystate.ErrClosed) {
			return err
		}
		if g, err = w.boot(); err != nil {
			return err
		}
	}
}

// conclude lets the engine go on until it has nothing to do, and abandons what is parked.
func (w *world) conclude(g *generation) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour) // of the bubble's clock
	defer cancel()
	if err := g.engine.Resume(ctx); err != nil {
		return g.orDead(err)
	}
	var stuck []int
	for r, err := range g.engine.Keys(ctx, keystate.Filter{Status: keystate.Parked}) {
		if err != nil {
			return g.orDead(err)
		}
		s, err := stateOf(r)
		if err != nil {
			return err
		}
		stuck = append(stuck, s.Key)
	}
	for _, key := range stuck {
		w.record(g, deed{verb: abandon, key: key})
	}
	return g.orDead(nil)
}

func (g *generation) orDead(err error) error {
	if g.store.dead.Load() {
		return errDead
	}
	return err
}

// tally counts rows: of every life, each phase's commit took effect once.
func (w *world) tally(g *generation) error {
	stored, rows := map[use]ending{}, map[string]int64{}
	for r, err := range g.engine.Keys(context.Background(), keystate.Filter{}) {
		if err != nil {
			return g.orDead(err)
		}
		e, err := endingOf(r)
		if err != nil {
			return fmt.Errorf("count: in the end, %s: %w", r.Key, err)
		}
		stored[use{e.state.Key, e.state.Use}] = e
	}
	err := g.engine.View(context.Background(), func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketRows).ForEach(func(k, v []byte) error { rows[string(k)] = number(v); return nil })
	})
	if err != nil {
		return g.orDead(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for u, l := range w.lives {
		if l.reaped != nil {
			stored[u] = *l.reaped
		}
	}
	uses := map[int]int64{}
	for u, e := range stored {
		uses[u.key]++
		if l := w.lives[u]; l == nil || e.before == "" && e.state.Payout != l.payout {
			w.wrong("use %d of key %d ended with %+v; its effect: %+v", u.n, u.key, e.state, l)
		}
		for _, point := range []keystate.RecoveryPoint{taken, paid, keystate.Finished} {
			want, row := int64(1), rowOf(point, u.key, u.n)
			if e.before == point || e.before == paid && point == keystate.Finished {
				want = 0
			}
			if rows[row] != want {
				w.wrong("the row %q was written %d times, not %d: %+v", row, rows[row], want, e)
			}
			delete(rows, row)
		}
	}
	for key, n := range uses {
		row := fmt.Sprintf("uses %d", key)
		if rows[row] != n {
			w.wrong("key %d was used %d times, and counts %d", key, n, rows[row])
		}
		delete(rows, row)
	}
	if delete(rows, string(rowSerial)); len(rows) > 0 {
		w.wrong("rows of no life: %v", rows)
	}
	return nil
}

// verdict judges a history that is over, by the count and by porcupine.
func (w *world) verdict() (counted, ordered error) {
	for _, m := range w.missing {
		ended := m.g.ended.Load()
		if ended == 0 {
			return errors.New("an engine was not closed"), nil
		}
		m.op.Return = max(m.op.Return, ended)
		w.history = append(w.history, m.op)
	}
	return w.fault, linearize(w.history)
}
