package keystate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// A run is one key under way in this engine; everybody who asks for the key shares it.
type run struct {
	key       Key
	machine   string
	print     [16]byte
	replayed  bool
	slot      bool          // it holds one of Options.MaxRuns: a caller began it
	joined    bool          // a caller has joined it; guarded by the engine's mu
	known     atomic.Bool   // that the key is stored
	elsewhere atomic.Bool   // another engine has been at work on the key, and the run waited for it
	claimed   chan struct{} // closed when the claim is durable
	done      chan struct{} // closed when the run has ended; then record and err stay as they are
	record    Record        // as last committed
	err       error         // why the run ended short of an answer
	broken    error         // what broke it off, if it came to no rest: the store, the engine's end, or a phase that withdrew the request
}

func newRun(key Key, machine string, print [16]byte) *run {
	return &run{key: key, machine: machine, print: print, claimed: make(chan struct{}), done: make(chan struct{})}
}

var closedChan = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// missed says whether the run has found that there is no key any more.
func (r *run) missed() bool {
	select {
	case <-r.done:
		return errors.Is(r.broken, ErrNotFound)
	default:
		return false
	}
}

// A call is what a caller asks about a key. It lends the memory for a finished key's record, and is used again when the caller has
// its answer: nobody keeps it, or what it holds.
type call struct {
	key     Key
	print   [16]byte
	request []byte // encoded; nil: the call begins nothing
	replay  run    // of a finished key
}

var idleCalls = sync.Pool{New: func() any { return new(call) }}

func newCall(key Key) *call {
	c := idleCalls.Get().(*call)
	c.key = key
	return c
}

// end gives the call back.
func (c *call) end() {
	const giant = 1 << 20
	if c.request = nil; cap(c.replay.record.State) > giant {
		c.replay.record.State = nil
	}
	idleCalls.Put(c)
}

// replayed is the run of a finished key, whose record has been read.
func (c *call) replayed() *run {
	r := &c.replay
	r.key, r.machine, r.replayed, r.claimed, r.done = c.key, r.record.Machine, true, closedChan, closedChan
	return r
}

// kept is the run with an answer of its own, for callers that keep it.
func (c *call) kept(r *run) *run {
	if r != &c.replay {
		return r
	}
	record := r.record
	record.State = bytes.Clone(record.State)
	return &run{key: r.key, machine: r.machine, replayed: true, claimed: closedChan, done: closedChan, record: record}
}

// start finds the answer of a key, joins its run, or begins one; without a request it begins none for a new key.
func (m *machine[Tx]) start(ctx context.Context, c *call) (r *run, joined bool, err error) {
	for {
		r, joined, err = m.tryStart(ctx, c)
		contested := errors.Is(err, errContested)
		mayMiss := err == nil && joined && c.request != nil // its run may have been begun without a request, for a key that is gone
		if !contested && !mayMiss {
			return r, joined, err
		}
		select {
		case <-r.claimed:
		case <-r.done:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
		if mayMiss && !r.missed() {
			return r, joined, nil
		}
	}
}

func (m *machine[Tx]) tryStart(ctx context.Context, c *call) (r *run, joined bool, err error) {
	e := m.engine
	if ctx.Value(inCommit{}) != nil {
		return nil, false, fmt.Errorf("%w: %s", ErrInCommit, c.key)
	}
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	if r, err := e.join(m, c.key, c.print); r != nil || err != nil {
		return r, true, err
	}
	err = e.recallUnlessNew(ctx, c)
	known := err == nil
	switch {
	case errors.Is(err, ErrNotFound) && c.request == nil:
		return nil, false, err
	case errors.Is(err, ErrNotFound):
		if err := e.admit(); err != nil {
			return nil, false, err
		}
	case err != nil:
		return nil, false, err
	default:
		// A run that is still under way has perhaps just written what was read, and does not know yet that it is on disk.
		if r, err := e.join(m, c.key, c.print); r != nil || err != nil {
			return r, true, err
		}
		if r, err := m.settled(c); r != nil || err != nil {
			return r, false, err
		}
	}
	return m.setOff(ctx, c, known)
}

// setOff begins a run, or joins the one that has been begun meanwhile.
func (m *machine[Tx]) setOff(ctx context.Context, c *call, known bool) (*run, bool, error) {
	e := m.engine
	if err := e.takeSlot(ctx); err != nil {
		return nil, false, err
	}
	r, mine, err := e.enroll(m, c.key, c.print, known)
	if err != nil || !mine {
		e.freeSlot()
		return r, true, err
	}
	request := bytes.Clone(c.request)
	e.spawn(func() { m.travel(r, request) })
	return r, false, nil
}

// settled answers for a key that needs no run: one used for another request, a finished one, a parked one.
func (m *machine[Tx]) settled(c *call) (*run, error) {
	stored := &c.replay.record
	switch {
	case !m.owns(stored, c.print):
		return nil, fmt.Errorf("%w: %s", ErrMismatch, stored.Key)
	case stored.Status == Answered:
		m.engine.observe(m.engine.observer.Replayed, Event{Key: stored.Key, Machine: m.name, Point: Finished})
		return c.replayed(), nil
	case stored.Status == Parked:
		return nil, m.stopped(*stored, errors.New(stored.LastError))
	}
	return nil, nil
}

// stopped is what callers are told of a key that rests short of its end.
func (m *machine[Tx]) stopped(r Record, err error) *PhaseError {
	if err.Error() == "" {
		err = errors.New(string(r.ParkReason))
	}
	return &PhaseError{
		Key: r.Key, Machine: m.name, Before: m.before(r), Attempt: r.Attempts, Reason: r.ParkReason, Err: err,
	}
}

// A journey is what a run knows while it carries its key along.
type journey[Tx any] struct {
	*machine[Tx]
	shared *run
	record Record       // as stored
	onExit func() error // how to go on when the goroutine ends under us
	sent   time.Time    // when the next phase's effect may have been sent first, before the present attempt
	resend bool         // it may be sent again all the same
	inRun  int          // attempts at the next phase in this run
	pause  time.Duration
	err    error // of the last attempt, for the caller

	commitCtx context.Context
	trip      trip[Tx] // the last leg's
}

// travel carries a key as far as it goes. One that is known is taken up; a request makes it if it is not there.
func (m *machine[Tx]) travel(r *run, request []byte) {
	j, again := m.engine.journeys.Get().(*journey[Tx])
	if !again {
		j = new(journey[Tx])
	}
	j.machine, j.shared = m, r
	j.walk(func() error { return j.setOut(request) })
}

// part lets another run have the journey's memory.
func (j *journey[Tx]) part() {
	e, t := j.engine, &j.trip
	clear(t.events[:cap(t.events)])
	*j = journey[Tx]{trip: trip[Tx]{events: t.events, took: t.took}}
	e.journeys.Put(j)
}

// walk makes one step after another, of which the first is given. A phase that calls runtime.Goexit ends the goroutine
// it runs on: then the journey goes on in another one, with what that means for the phase.
func (j *journey[Tx]) walk(step func() error) {
	arrived := false
	defer func() {
		if !arrived {
			go j.walk(j.onExit)
		}
	}()
	err := step()
	for err == nil && j.record.Status == Running {
		j.shared.announce()
		if err = j.advance(); j.outrun(err) {
			err = j.attend()
		}
	}
	arrived = true
	j.end(err)
}

// end tells everybody who waits what became of the run.
func (j *journey[Tx]) end(err error) {
	r := j.shared
	r.record, r.broken = j.record, err
	switch {
	case err != nil && j.record.Version > 0 && j.record.Status != Answered:
		r.err = j.stopped(j.record, err)
	case err != nil:
		r.err = err
	case j.record.Status != Answered:
		if j.err == nil {
			j.err = ErrClosed
		}
		r.err = j.stopped(j.record, j.err)
	}
	j.engine.dismiss(r)
	j.part()
}

func (r *run) announce() {
	if !r.announced() {
		close(r.claimed)
	}
}

// announced says whether the claim has been made known as durable.
func (r *run) announced() bool {
	select {
	case <-r.claimed:
		return true
	default:
		return false
	}
}

// setOut claims the key: one that rests somewhere, or a new one together with its first phases.
func (j *journey[Tx]) setOut(request []byte) error {
	err := ErrNotFound
	if j.shared.known.Load() {
		err = j.takeUp()
	}
	if errors.Is(err, ErrNotFound) && request != nil {
		err = j.commit(leg{request: request, state: request, stop: len(j.phases)})
	}
	if j.outrun(err) {
		return j.attend()
	}
	return err
}

// takeUp claims a key that rests somewhere, and counts the attempt that is to come before it begins.
func (j *journey[Tx]) takeUp() error {
	var parked error
	err := j.engine.store.Update(context.Background(), func(tx Tx) error {
		keys := j.engine.store.Keys(tx)
		stored, err := keys.Get(j.shared.key)
		if err != nil {
			return err
		}
		if !j.owns(&stored, j.shared.print) {
			return fmt.Errorf("%w: %s", ErrMismatch, stored.Key)
		}
		j.record, parked = stored, nil
		if stored.Status == Answered || stored.Status == Parked {
			return errSettled
		}
		if err := j.engine.vacant(tx, stored); err != nil {
			return err
		}
		var events []event
		events, parked = j.resumption(stored)
		if stored, err = j.engine.rules.next(stored, events...); err != nil {
			return err
		}
		if err := putLast(keys, &stored); err != nil {
			return err
		}
		j.sent, j.resend, j.record = j.record.FirstTried, j.record.Resend, stored
		return nil
	})
	if errors.Is(err, errSettled) {
		if j.shared.replayed = j.record.Status == Answered; j.shared.replayed {
			j.observe(j.engine.observer.Replayed, nil)
		}
		j.err = errors.New(j.record.LastError)
		return nil
	}
	if err != nil {
		return err
	}
	j.inRun, j.err = 1, parked
	if j.record.Status == Parked {
		j.tell(parked)
		return nil
	}
	j.observe(j.engine.observer.Claimed, nil)
	return nil
}

// errSettled breaks off the claim of a key that needs none.
var errSettled = errors.New("keystate: nothing to resume")

// resumption is what happens to a key that is taken up: it is claimed, or parked for a reason.
func (j *journey[Tx]) resumption(r Record) ([]event, error) {
	at := j.engine.now()
	events := []event{{kind: claim, at: at, epoch: j.engine.epoch, vacant: j.engine.shared != nil}} // first: a fenced holder must not park a key either
	parked := func(reason ParkReason, err error) ([]event, error) {
		return append(events, event{kind: park, at: at, reason: reason, err: err.Error()}), err
	}
	next, stale, err := j.next(r)
	if err != nil {
		return parked(UnknownPoint, err)
	}
	if err := decodeState(r.State, j.fresh()); err != nil {
		return parked(Undecodable, err)
	}
	cutOff := !stale && r.Status == Running && r.Epoch == j.engine.epoch && r.Attempts > 0 // this very engine was at it, and the store failed
	if !stale && !cutOff && j.phases[next].retry.usedUp(r.Attempts) {
		err := errors.New(r.LastError)
		if r.LastError == "" {
			err = errors.New("the process ended during every attempt")
		}
		return parked(AttemptsUsedUp, err)
	}
	if present := j.point(r.Point); present != r.Point {
		events = append(events, event{kind: rename, at: at, point: present})
	}
	if stale {
		events = append(events, event{kind: forget, at: at})
	}
	if cutOff { // the attempt goes on: another one that counts would park the key, in the end, because there was no room
		return events, nil
	}
	return append(events, j.phases[next].try(at)), nil
}

// advance makes one attempt at the next phase, with what follows from it.
func (j *journey[Tx]) advance() error {
	if !j.rest() {
		return j.rewrite(event{kind: release, at: j.engine.now(), first: j.sent, resend: j.resend})
	}
	i, _, err := j.next(j.record)
	if err != nil {
		return err
	}
	p := &j.phases[i]
	if p.effect == nil || j.record.Acted {
		return j.commit(leg{from: i, state: j.record.State, stop: len(j.phases)})
	}
	sent := j.sent
	if j.resend {
		sent = time.Time{}
	}
	switch j.engine.rules.plan(p, sent, j.engine.now()) {
	case dontKnow:
		return j.stall(Indeterminate, errors.New("the effect may have happened, and must not happen twice"))
	case forgotten:
		return j.stall(TokenExpired, fmt.Errorf("the effect may have happened, and its token is honoured for %s only", p.tokenLife))
	case ask:
		return j.reconcile(i)
	}
	return j.act(i)
}

// rest waits until the next attempt may begin, and reports whether the engine is still open then.
func (j *journey[Tx]) rest() bool {
	pause := j.pause
	j.pause = 0
	return pause == 0 && j.engine.ctx.Err() == nil || pause > 0 && j.engine.sleep(pause)
}

// act runs the effect of phase i and commits what it found.
func (j *journey[Tx]) act(i int) error {
	began := time.Now()
	state, err := j.outside(i, j.phases[i].effect, j.effectFailed)
	if err != nil {
		return j.effectFailed(i, state, err)
	}
	return j.commit(leg{from: i, state: state, acted: true, stop: len(j.phases), effect: time.Since(began)})
}

// reconcile asks what became of the effect of phase i.
func (j *journey[Tx]) reconcile(i int) error {
	var outcome Outcome
	ask := func(ctx context.Context, token string, s any) (err error) {
		outcome, err = j.phases[i].reconcile(ctx, token, s)
		return err
	}
	state, err := j.outside(i, ask, j.askingFailed)
	switch {
	case err != nil:
		return j.askingFailed(i, state, err)
	case outcome == Done:
		return j.commit(leg{from: i, state: state, acted: true, stop: len(j.phases)})
	case outcome == NotDone:
		return j.act(i)
	}
	return j.stall(Indeterminate, errors.New("the other side cannot tell what became of the effect"))
}

// outside calls a phase's function outside every transaction, with a copy of the state of its own, and returns
// the state as the function left it. When the function ends the goroutine, failed says how to go on.
func (j *journey[Tx]) outside(i int, fn func(ctx context.Context, token string, s any) error, failed func(int, []byte, error) error) ([]byte, error) {
	s := j.fresh()
	if err := decodeEncoded(j.record.State, s); err != nil {
		return nil, err
	}
	p := &j.phases[i]
	ctx, cancel := context.WithValue(j.engine.ctx, keyInHand{}, &j.shared.key), context.CancelFunc(func() {})
	if p.timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, p.timeout)
	}
	defer cancel()
	j.onExit = func() error { return failed(i, j.record.State, errGoexit) }
	err := j.guarded(func() error {
		return fn(ctx, j.engine.rules.token(j.engine.id, j.record.Incarnation, j.record.Begun), s)
	})
	state, encodeErr := encodeState(s, j.limit())
	if encodeErr != nil {
		state = j.record.State
	}
	return state, cmp.Or(err, encodeErr)
}

// guarded makes a panic in fn its error.
func (j *journey[Tx]) guarded(fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			if err = damage(v); err == nil {
				err = j.panicked(v)
			}
		}
	}()
	return fn()
}

func (j *journey[Tx]) panicked(v any) error {
	err := &panicError{value: v, stack: debug.Stack()}
	j.engine.log.Error("keystate: a phase panicked", "key", j.shared.key, "machine", j.name, "after", j.record.Point, "panic", v, "stack", string(err.stack))
	return err
}

// effectFailed does what the phase's policy says about an error of its effect.
func (j *journey[Tx]) effectFailed(i int, state []byte, err error) error {
	return j.failed(i, &j.phases[i], state, err)
}

// askingFailed deals with an error of Reconcile: what became of the effect is still open, so that it can be neither
// ignored nor, unless it is marked as final, an answer.
func (j *journey[Tx]) askingFailed(i int, state []byte, err error) error {
	p := j.phases[i]
	p.onError = Retry
	return j.failed(i, &p, state, err)
}

func (j *journey[Tx]) failed(i int, p *phase[Tx], state []byte, err error) error {
	if j.engine.ctx.Err() != nil && !p.decides(err) { // a shutdown is not a failure
		return j.rewrite(event{kind: release, at: j.engine.now(), sent: true})
	}
	j.err = err
	v, reason := j.engine.rules.judge(p, err, true, j.record.Attempts, j.inRun)
	switch v {
	case ignored:
		return j.commit(leg{from: i, state: j.record.State, stop: len(j.phases), ignored: map[int]string{i: err.Error()}})
	case withdrawn:
		return j.withdraw(err)
	}
	return j.rewrite(j.consequence(p, v, reason, err, j.record.Attempts, j.inRun, state)...)
}

// consequence is what a verdict does to a key whose attempt is counted already.
func (j *journey[Tx]) consequence(p *phase[Tx], v verdict, reason ParkReason, err error, attempts, inRun int, state []byte) []event {
	at := j.engine.now()
	failed := event{kind: fail, at: at, err: err.Error()}
	switch v {
	case refused:
		return []event{{kind: refuse, at: at, point: p.to, state: state, err: err.Error()}}
	case stalled:
		return []event{{kind: park, at: at, reason: reason, err: err.Error()}}
	case later:
		return []event{failed, {kind: wait, at: at, due: at.Add(p.retry.pause(attempts))}}
	}
	j.pause = p.retry.pause(inRun) // not of all attempts: somebody waits
	return []event{failed, p.try(at)}
}

func (j *journey[Tx]) stall(reason ParkReason, err error) error {
	j.err = err
	return j.rewrite(event{kind: park, at: j.engine.now(), reason: reason, err: err.Error()})
}

// rewrite applies events to the key and runs no phase.
func (j *journey[Tx]) rewrite(events ...event) error {
	var r Record
	err := j.engine.store.Update(context.Background(), func(tx Tx) (err error) {
		if r, err = j.engine.rules.next(j.record, events...); err != nil {
			return err
		}
		return putLast(j.engine.store.Keys(tx), &r)
	})
	if err != nil {
		return err
	}
	j.turn(r)
	return nil
}

// withdraw forgets the key, and returns what its callers are told. Of one that was never stored there is nothing to forget.
func (j *journey[Tx]) withdraw(why error) error {
	before, attempts := j.phases[0].to, max(1, j.record.Attempts)
	if j.record.Version > 0 {
		err := j.engine.store.Update(context.Background(), func(tx Tx) error {
			return j.strikeOff(j.engine.store.Keys(tx), event{kind: refuse, at: j.engine.now(), point: before, err: why.Error()})
		})
		if err != nil {
			return err
		}
	}
	j.record = Record{}
	told := Event{Key: j.shared.key, Machine: j.name, Point: Started, Attempt: attempts, Err: why}
	j.engine.observe(j.engine.observer.Withdrawn, told)
	return &withdrawal{key: j.shared.key, before: before, err: why}
}

// strikeOff deletes the key's record by way of its end: a store deletes finished records only.
func (j *journey[Tx]) strikeOff(keys Keys, end event) error {
	r, err := j.engine.rules.next(j.record, end)
	if err != nil {
		return err
	}
	if err := keys.Put(&r); err != nil {
		return err
	}
	if _, err := j.engine.rules.next(r, event{kind: reap}); err != nil {
		return err
	}
	return keys.Delete(r)
}

// turn takes over what was committed without a point being reached.
func (j *journey[Tx]) turn(r Record) {
	j.record, j.sent, j.resend = r, r.FirstTried, false
	j.inRun++
	j.tell(j.err)
}

// tell reports how a key went on after an attempt that did not succeed.
func (j *journey[Tx]) tell(err error) {
	o := &j.engine.observer
	switch j.record.Status {
	case Running, Waiting:
		if err != nil {
			j.observe(o.Retried, err)
		}
	case Parked:
		j.engine.log.Warn("keystate: key parked", "key", j.shared.key, "machine", j.name, "before", j.before(j.record), "reason", j.record.ParkReason, "error", err)
		j.observe(o.Parked, err)
	case Answered:
		j.observe(o.Finished, err)
	}
}

func (j *journey[Tx]) observe(f func(Event), err error) {
	if f != nil {
		f(Event{Key: j.shared.key, Machine: j.name, Point: j.record.Point, Attempt: j.record.Attempts, Err: err})
	}
}

// A leg is what is committed in one transaction: an effect's result, or the claim of a new key, and all
// phases from there up to the next effect.
type leg struct {
	request []byte         // of a new key
	from    int            // the first phase
	state   []byte         // before it, or after its effect
	acted   bool           // the first phase's effect is done
	stop    int            // the phase not to enter
	closing []event        // what happens there
	ignored map[int]string // errors of phases that are passed over
	retreat error          // why the key is withdrawn instead
	effect  time.Duration
}

// A phaseFailure is a phase's error on its way through the store.
type phaseFailure struct {
	phase int
	err   error
	state []byte // as the phase left it; nil when it did not say
}

func (f *phaseFailure) Error() string { return f.err.Error() }
func (f *phaseFailure) Unwrap() error { return f.err }

// commit carries the key along a leg. When a phase fails, what came before it still commits, together
// with what the failure means.
func (j *journey[Tx]) commit(l leg) error {
	for {
		t, err := j.embark(l)
		if err != nil {
			return err
		}
		began := time.Now()
		j.onExit = t.lost
		err = j.engine.store.Update(context.Background(), t.transact)
		if err == nil {
			j.arrive(t, time.Since(began))
			return nil
		}
		failed := t.failure(err)
		switch {
		case failed != nil:
			return j.carryOn(l, failed)
		case l.request != nil && errors.Is(err, ErrFenced): // somebody else has made the key
			j.shared.known.Store(true)
			j.engine.misses.Store(0)
			if err = j.takeUp(); !errors.Is(err, ErrNotFound) { // unless it is gone again
				return err
			}
		default:
			return err
		}
	}
}

// carryOn commits a leg of which a phase has failed, or withdraws the key. What made a new key's phase fail may be that somebody
// else has made the key, and its phases have run.
func (j *journey[Tx]) carryOn(l leg, failed *phaseFailure) error {
	l = j.amend(l, failed)
	if l.retreat == nil {
		return j.commit(l)
	}
	if l.request != nil {
		if err := j.takeUp(); !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return j.withdraw(l.retreat)
}

// A trip is one call of Update along a leg; the store may run it more than once.
type trip[Tx any] struct {
	*journey[Tx]
	leg    leg
	start  Record // with which the leg begins: the stored one, or a new one
	end    int    // the phase before which the leg ends
	ahead  any    // the state, decoded before the transaction for its first run: all others wait for those who are in it
	at     int    // the phase whose commit is running
	last   int    // the last one whose commit has run
	left   []byte // the state after it
	next   Record
	outbox outbox
	events []event
	took   []time.Duration // in each phase's commit
}

// embark prepares for a leg, in the memory of the one before.
func (j *journey[Tx]) embark(l leg) (t *trip[Tx], err error) {
	t = &j.trip
	*t = trip[Tx]{journey: j, leg: l, at: -1, events: t.events, took: t.took}
	if t.start, err = t.depart(); err != nil {
		return t, err
	}
	writes := false
	for t.end = l.from; t.goesThrough(t.end); t.end++ {
		writes = writes || t.writesIn(t.end)
	}
	if writes {
		j.onExit = func() error { return errGoexit }
		err = j.guarded(func() error { // the state's type may decode itself
			t.ahead, err = t.unpack()
			return err
		})
	}
	return t, err
}

// depart is the record with which the leg begins. That a new one is there already shows when it is put.
func (t *trip[Tx]) depart() (Record, error) {
	if t.leg.request == nil {
		return t.record, nil
	}
	return t.engine.rules.next(Record{}, event{
		kind: begin, at: t.engine.now(), key: t.shared.key, machine: t.name, fingerprint: t.shared.print,
		incarnation: newIncarnation(), epoch: t.engine.epoch, state: t.leg.request,
	})
}

// goesThrough says whether the leg, when it comes to phase i, goes on beyond: the phase has no effect that is still to be run.
func (t *trip[Tx]) goesThrough(i int) bool {
	if i >= t.leg.stop {
		return false
	}
	_, skip := t.leg.ignored[i]
	return t.phases[i].effect == nil || skip || i == t.leg.from && (t.leg.acted || t.record.Acted)
}

// writesIn says whether the leg runs the commit of phase i.
func (t *trip[Tx]) writesIn(i int) bool {
	_, skip := t.leg.ignored[i]
	return t.phases[i].commit != nil && !skip
}

// unpack returns a fresh copy of the state.
func (t *trip[Tx]) unpack() (any, error) {
	s := t.fresh()
	return s, decodeEncoded(t.leg.state, s)
}

// lost goes on with a leg whose goroutine has ended in a phase.
func (t *trip[Tx]) lost() error {
	failed := t.failure(errGoexit)
	if failed == nil { // it ended between two commits: where the state encodes or decodes itself
		return errGoexit
	}
	return t.carryOn(t.leg, failed)
}

// transact is what happens in the transaction.
func (t *trip[Tx]) transact(tx Tx) error {
	t.at, t.last, t.outbox, t.took = -1, -1, outbox{owner: t.shared.key}, t.took[:0]
	keys := t.engine.store.Keys(tx)
	t.engine.openOutbox(tx, &t.outbox)
	defer t.engine.closeOutbox(tx)
	state, err := t.phasesIn(tx, keys)
	if err != nil {
		return err
	}
	t.events = t.arrivals(state)
	if t.next, err = t.engine.rules.next(t.start, t.events...); err != nil {
		return err
	}
	return putLast(keys, &t.next)
}

// phasesIn runs the commits of the leg, and returns the state at its end.
func (t *trip[Tx]) phasesIn(tx Tx, keys Keys) (state []byte, err error) {
	s := t.ahead
	t.ahead = nil
	for i := t.leg.from; i < t.end; i++ {
		began := time.Now()
		if t.writesIn(i) {
			if s == nil {
				if s, err = t.unpack(); err != nil {
					return nil, err
				}
			}
			t.last = i
			err := t.commitPhase(i, tx, s)
			if err == nil {
				err = check(keys) // or it would seem to be the store that fails, and for ever
			}
			if err != nil {
				return nil, t.halted(i, err, s)
			}
		}
		t.took = append(t.took, time.Since(began))
	}
	if s == nil { // no commit has touched it
		return t.leg.state, nil
	}
	if state, err = encodeState(s, t.limit()); err != nil {
		return nil, t.halted(t.last, err, s)
	}
	t.left = state
	return state, nil
}

// halted keeps the state as a failing phase left it, for a refusal to answer with.
func (t *trip[Tx]) halted(i int, err error, s any) error {
	state, encodeErr := encodeState(s, t.limit())
	if encodeErr != nil {
		state = t.leg.state
	}
	return &phaseFailure{phase: i, err: err, state: state}
}

// commitPhase runs one phase's commit; while it does, at names the phase.
func (t *trip[Tx]) commitPhase(i int, tx Tx, s any) error {
	t.at = i
	err := t.guarded(func() error { return t.phases[i].commit(t.commitContext(), tx, s) })
	t.at = -1
	return err
}

// commitContext is what the key's commits get.
func (j *journey[Tx]) commitContext() context.Context {
	if j.commitCtx == nil {
		j.commitCtx = context.WithValue(j.engine.commitCtx, keyInHand{}, &j.shared.key)
	}
	return j.commitCtx
}

// keyInHand leads a phase from its context to its key.
type keyInHand struct{}

// KeyOf returns the key for which a phase runs, given the context that its Effect, Commit or Reconcile got, and the zero Key
// for any other context.
func KeyOf(ctx context.Context) Key {
	if key, ok := ctx.Value(keyInHand{}).(*Key); ok {
		return *key
	}
	return Key{}
}

// arrivals are the events of a leg: the points reached, and what happens at its end.
func (t *trip[Tx]) arrivals(state []byte) []event {
	at, end := t.engine.now(), t.end
	events := t.events[:0]
	for i := t.leg.from; i < end; i++ {
		events = append(events, event{kind: reach, at: at, point: t.phases[i].to, state: state, err: t.leg.ignored[i]})
	}
	switch {
	case end == t.leg.stop && t.leg.closing != nil:
		if end == t.leg.from && t.leg.acted {
			events = append(events, event{kind: act, at: at, state: t.leg.state})
		}
		return append(events, t.leg.closing...)
	case end < len(t.phases): // an effect comes next
		return append(events, t.phases[end].try(at))
	}
	return events
}

// failure is the phase's error in what Update returned, if it is one.
func (t *trip[Tx]) failure(err error) *phaseFailure {
	var failed *phaseFailure
	switch {
	case errors.Is(err, ErrStorageFull): // also where it was a phase's write that found no room
		return nil
	case errors.As(err, &failed):
		return failed
	case errors.Is(err, ErrRejected) && t.last >= 0: // if it was for an earlier phase's writes, what is left without this one's is rejected, too
		return &phaseFailure{phase: t.last, err: err, state: t.left}
	case t.at >= 0: // it never came back: runtime.Goexit
		return &phaseFailure{phase: t.at, err: err}
	}
	return nil
}

// amend changes a leg according to what the failure of one of its phases means.
func (j *journey[Tx]) amend(l leg, f *phaseFailure) leg {
	p := &j.phases[f.phase]
	j.err = f.err
	attempts, inRun, counted := 1, 1, false
	if f.phase == l.from && l.request == nil {
		attempts, inRun, counted = max(1, j.record.Attempts), j.inRun, j.record.Attempts > 0
	}
	v, reason := j.engine.rules.judge(p, f.err, false, attempts, inRun)
	switch v {
	case withdrawn:
		l.retreat = f.err
		return l
	case ignored:
		if f.phase == l.from && l.acted { // nothing of the phase is kept
			l.state, l.acted = j.record.State, false
		}
		if l.ignored = maps.Clone(l.ignored); l.ignored == nil {
			l.ignored = map[int]string{}
		}
		l.ignored[f.phase] = f.err.Error()
		l.stop, l.closing = len(j.phases), nil
		return l
	}
	l.stop, l.closing = f.phase, j.consequence(p, v, reason, f.err, attempts, inRun, f.state)
	if !counted {
		l.closing = append([]event{p.try(j.engine.now())}, l.closing...)
	}
	return l
}

// arrive takes over what a leg has committed.
func (j *journey[Tx]) arrive(t *trip[Tx], took time.Duration) {
	created, before := t.leg.request != nil, len(j.record.History)
	if created {
		before = 1
	}
	j.engine.enqueueStaged(t.outbox.staged)
	if t.leg.closing != nil {
		j.inRun++ // of the phase that failed; a first attempt counts as one below
		if len(t.next.History) > before || created {
			j.inRun = 2
		}
		j.record, j.sent = t.next, t.next.FirstTried
	} else {
		j.record, j.sent, j.inRun, j.err = t.next, time.Time{}, 1, nil
	}
	j.resend = false
	j.report(t, before, created, took)
}

// report tells the observer of a leg.
func (j *journey[Tx]) report(t *trip[Tx], before int, created bool, took time.Duration) {
	o := &j.engine.observer
	if created {
		j.engine.observe(o.Claimed, Event{Key: j.shared.key, Machine: j.name, Point: Started})
	}
	if o.Committed != nil {
		for n, passage := range j.record.History[before:] {
			if n >= len(t.took) {
				break // finished by a refusal, not by a phase
			}
			ev := Event{Key: j.shared.key, Machine: j.name, Point: passage.Point, Attempt: passage.Attempts, Commit: t.took[n], Took: took}
			if n == 0 {
				ev.Effect = t.leg.effect
			}
			j.engine.observe(o.Committed, ev)
		}
	}
	if t.leg.closing != nil || j.record.Status == Answered {
		j.tell(j.err)
	}
}
