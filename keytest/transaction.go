package keytest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"example.com/keystate"
)

// A passage is what a process sees of one of its engine's transactions: the records that pass between them. It reads nothing by itself, so that
// the store is asked for what the engine asks, and no more.
type passage struct {
	key     keystate.Key
	runs    int
	before  keystate.Record   // the key's
	puts    []keystate.Record // of all keys, as the store has made them
	deletes bool              // the key's
	ending  func() error      // called before a record that is put last; may be nil
}

// put takes down a record that the store has taken, and the version that it was given.
func (t *passage) put(r keystate.Record, given uint64) {
	if r.Key == t.key && given == 0 {
		t.before = keystate.Record{} // whatever had been there is gone
	}
	t.puts = append(t.puts, r)
}

// after is what the transaction makes of the key, if it makes anything of it.
func (t *passage) after() (r keystate.Record, changed bool) {
	for _, put := range t.puts {
		if put.Key == t.key {
			r, changed = put, true
		}
	}
	if t.deletes {
		return keystate.Record{}, true
	}
	return r, changed
}

// movement says what the transaction does to the key.
func (t *passage) movement() string {
	after, changed := t.after()
	var reached []string
	for _, step := range after.History[min(len(t.before.History), len(after.History)):] {
		if step.Point != keystate.Started {
			reached = append(reached, string(step.Point))
		}
	}
	switch {
	case !changed:
		return "another key"
	case len(reached) > 0:
		return strings.Join(reached, " and ")
	case after.Version == 0:
		return "the withdrawal"
	case t.before.Version == 0:
		return "the claim"
	case after.Status == keystate.Waiting:
		return "the key's wait"
	case after.Status == keystate.Parked:
		return "the key's parking"
	}
	return "the next attempt"
}

// Update runs a transaction of the engine, or what a fault makes of it. For a store that sends the last record with the commit, there is nothing between
// the two: who is killed in the transaction has sent neither, and who is killed when it is durable has sent both.
func (p *process[Tx, S]) Update(ctx context.Context, fn func(tx Tx) error) error {
	if p.gone() {
		return errKilled
	}
	n, strikes := p.reach(place{kind: atWrite})
	if strikes == stillBeforeWrite {
		p.standStill()
	}
	t := &passage{key: p.play.subject.key()}
	run := func(tx Tx) error { return p.pass(tx, t, fn) }
	var err error
	switch strikes {
	case killedBeforeWrite:
		err = p.turns.together(func() error { return p.interrupted(ctx, run) })
	case writtenTwice:
		err = p.twice(ctx, t, run)
	default:
		err = p.turns.together(func() error { return p.Store.Update(ctx, run) })
	}
	if err != nil { // of the store's, too: it may refuse a record as late as in the commit
		p.play.undo()
		return err
	}
	p.passed(n, t)
	if t.deletes {
		p.play.forgets()
	}
	if strikes == killedAfterWrite || p.isToDie() {
		return p.die()
	}
	return nil
}

// A turnstile lets transactions through together, or one at a time alone.
type turnstile chan struct{}

func newTurnstile() turnstile { return make(turnstile, 64) }

func (t turnstile) together(transact func() error) error {
	t <- struct{}{}
	defer func() { <-t }()
	return transact()
}

// alone waits until nothing is under way, and keeps everything else out. Only one goroutine may call it.
func (t turnstile) alone(transact func() error) error {
	for range cap(t) {
		t <- struct{}{}
	}
	defer func() {
		for range cap(t) {
			<-t
		}
	}()
	return transact()
}

// pass runs a transaction and sees what passes; each run starts afresh.
func (p *process[Tx, S]) pass(tx Tx, t *passage, fn func(tx Tx) error) error {
	if t.runs++; t.runs > 1 {
		p.play.undo()
	}
	t.puts, t.deletes = nil, false
	p.mu.Lock()
	t.before = p.known
	p.passing[tx] = t
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.passing, tx)
	}()
	return fn(tx)
}

// passed says what a durable transaction has done to the key.
func (p *process[Tx, S]) passed(n int, t *passage) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.places[n].name = t.movement()
	if after, changed := t.after(); changed {
		p.known = after
	}
}

func (p *process[Tx, S]) isToDie() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.killLater
}

// interrupted runs a transaction, and dies before its end.
func (p *process[Tx, S]) interrupted(ctx context.Context, run func(tx Tx) error) error {
	return p.Store.Update(ctx, func(tx Tx) error {
		if err := run(tx); err != nil {
			return err
		}
		return p.die()
	})
}

// undone runs a transaction and rolls it back.
func (p *process[Tx, S]) undone(ctx context.Context, run func(tx Tx) error) error {
	err := p.Store.Update(ctx, func(tx Tx) error {
		if err := run(tx); err != nil {
			return err
		}
		return errUndone
	})
	if errors.Is(err, errUndone) {
		return nil
	}
	return err
}

// twice runs a transaction, rolls it back, and runs it again an hour later: both runs must come to the same. Each is alone: where transactions see what
// others commit meanwhile, that would seem to be the run's.
func (p *process[Tx, S]) twice(ctx context.Context, t *passage, run func(tx Tx) error) error {
	var first, second map[string]string
	look := func(into *map[string]string) func(tx Tx) error {
		return func(tx Tx) (err error) {
			*into, err = p.written(tx, t, run)
			return err
		}
	}
	if err := p.turns.alone(func() error { return p.undone(ctx, look(&first)) }); err != nil {
		return err
	}
	time.Sleep(time.Hour)
	if err := p.turns.alone(func() error { return p.Store.Update(ctx, look(&second)) }); err != nil {
		return err
	}
	for _, d := range differences(first, second, p.play.subject.varies) {
		p.play.find(fmt.Sprintf("%s is %s in the first run and %s in the second", d.path, shown(d.want), shown(d.got)),
			"the commit uses something besides tx, s and ctx: a clock, a random number, memory")
	}
	return nil
}

// written runs a transaction and says what has come of it: what the program has written, and the states of the keys. What others do
// in the hour between two runs is no part of it. Nothing is read behind a record that is put last.
func (p *process[Tx, S]) written(tx Tx, t *passage, run func(tx Tx) error) (map[string]string, error) {
	before, err := p.play.contents(tx)
	if err != nil {
		return nil, err
	}
	var after map[string]string
	seen := false
	t.ending = func() (err error) {
		seen = true
		after, err = p.play.contents(tx)
		return err
	}
	defer func() { t.ending = nil }()
	if err := run(tx); err != nil {
		return nil, err
	}
	if !seen {
		if err := t.ending(); err != nil {
			return nil, err
		}
	}
	all := map[string]string{}
	for _, d := range differences(before, after, nothing) {
		all[d.path] = cmp.Or(d.got, "gone")
	}
	for _, r := range t.puts {
		if s, err := p.machine.DecodeState(r); err == nil {
			maps.Copy(all, under("the state", leaves(s)))
		} else {
			all["the state of "+r.Key.String()] = fmt.Sprintf("%q", r.State)
		}
	}
	return all, nil
}

// Keys are the store's. What passes in a transaction of the engine is seen.
func (p *process[Tx, S]) Keys(tx Tx) keystate.Keys {
	keys := p.Store.Keys(tx)
	p.mu.Lock()
	t := p.passing[tx]
	p.mu.Unlock()
	if t == nil {
		return keys
	}
	seen := seenKeys{keys, t}
	if last, ok := keys.(parter); ok {
		return lastKeys{seen, last}
	}
	return seen
}

// seenKeys are those of a transaction that is seen.
type seenKeys struct {
	keystate.Keys
	passage *passage
}

func (k seenKeys) Get(key keystate.Key) (keystate.Record, error) {
	r, err := k.Keys.Get(key)
	if _, changed := k.passage.after(); err == nil && key == k.passage.key && !changed {
		k.passage.before = r
	}
	return r, err
}

func (k seenKeys) Put(r *keystate.Record) error { return k.put(r, k.Keys.Put) }

func (k seenKeys) put(r *keystate.Record, put func(*keystate.Record) error) error {
	given := r.Version
	err := put(r)
	if err == nil {
		k.passage.put(*r, given)
	}
	return err
}

func (k seenKeys) Delete(r keystate.Record) error {
	err := k.Keys.Delete(r)
	if err == nil && r.Key == k.passage.key {
		k.passage.deletes = true
	}
	return err
}

// Check says what the store knows against its transaction.
func (k seenKeys) Check() error {
	if c, ok := k.Keys.(interface{ Check() error }); ok {
		return c.Check()
	}
	return nil
}

// lastKeys can put a record as the last thing of a transaction.
type lastKeys struct {
	seenKeys
	last parter
}

// A parter stores a record in one go with its transaction's commit.
type parter interface {
	PutLast(r *keystate.Record) error
}

func (k lastKeys) PutLast(r *keystate.Record) error {
	if k.passage.ending != nil {
		if err := k.passage.ending(); err != nil {
			return err
		}
	}
	return k.put(r, k.last.PutLast)
}
