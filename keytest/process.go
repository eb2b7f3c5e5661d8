package keytest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"example.com/keystate"
)

// A place is where a fault may strike in a process: at the call of an effect, at the call of a commit, at a transaction.
type place struct {
	kind  placeKind
	phase int    // of an effect or a commit
	name  string // the point that the phase leads to; the points that a transaction reaches
}

type placeKind int

const (
	atEffect placeKind = iota
	atCommit
	atWrite
)

// A fault is something that goes wrong at a place.
type fault struct {
	what  what
	at    int // the place's number within the process
	place place
}

type what string

const (
	killedBeforeEffect what = "killed before the effect of %s"
	killedAfterEffect  what = "killed after the effect of %s and before its commit"
	killedForLong      what = "killed after the effect of %s and away until its token is forgotten"
	answerLost         what = "the effect of %s happens and its answer is lost"
	timedOut           what = "the effect of %s happens and times out"
	effectFailed       what = "the effect of %s fails once"
	shutDown           what = "shut down during the effect of %s"
	commitFailed       what = "the commit of %s fails once"
	commitFailedKilled what = "the commit of %s fails once and the process is killed before the next try"
	killedBeforeWrite  what = "killed in the transaction of %s"
	killedAfterWrite   what = "killed when the transaction of %s is durable and nobody has heard of it"
	writtenTwice       what = "the transaction of %s is undone and run again"
	stillAfterEffect   what = "stands still after the effect of %s until another process has taken over"
	stillBeforeWrite   what = "stands still before the transaction of %s until another process has taken over"
)

// faultsAt are the faults that may strike at each kind of place.
var faultsAt = map[placeKind][]what{
	atEffect: {killedBeforeEffect, killedAfterEffect, killedForLong, answerLost, timedOut, effectFailed, shutDown},
	atCommit: {commitFailed, commitFailedKilled},
	atWrite:  {killedBeforeWrite, killedAfterWrite, writtenTwice},
}

// faultsBeside are those that may strike while another process has the store open.
var faultsBeside = map[placeKind][]what{
	atEffect: {killedBeforeEffect, killedAfterEffect, stillAfterEffect, shutDown},
	atWrite:  {killedBeforeWrite, killedAfterWrite, stillBeforeWrite},
}

// ends says whether the process does not survive the fault.
func (f what) ends() bool {
	return strings.HasPrefix(string(f), "killed") || f == shutDown || f == commitFailedKilled
}

// fails says whether the phase sees, or seems to return, an error.
func (f what) fails() bool {
	return slices.Contains([]what{answerLost, timedOut, effectFailed, commitFailed, commitFailedKilled}, f)
}

func (f fault) String() string { return fmt.Sprintf(string(f.what), f.place.name) }

var (
	errKilled = fmt.Errorf("keytest: the process was killed: %w", keystate.ErrClosed)
	errFault  = errors.New("keytest: an error by design")
	errUndone = errors.New("keytest: undone")
)

// A process is one life of the program. It is the store that its engine sees, and it stands between the engine and
// the program's phases: so it can die at any place.
type process[Tx, S any] struct {
	keystate.Store[Tx]
	play    *play[Tx, S]
	fault   fault
	engine  *keystate.Engine[Tx]
	machine *keystate.Machine[S]
	started chan struct{} // closed when the program has started: interrupted keys go on before
	close   func() error
	epoch   uint64 // of the boot
	turns   turnstile

	mu        sync.Mutex
	places    []place
	dead      bool
	still     chan struct{} // the process stands still until it is closed
	closing   bool
	killLater bool             // after the next transaction
	known     keystate.Record  // the key's, as this process has committed it last
	passing   map[any]*passage // transactions under way
}

// boot starts the program: it opens the store, and the engine on it, and registers the machine.
func (p *play[Tx, S]) boot(life int) (*process[Tx, S], error) {
	proc := &process[Tx, S]{Store: p.subject.open(p.t, p.dir), play: p, started: make(chan struct{}), turns: newTurnstile(), passing: map[any]*passage{}}
	defer close(proc.started)
	if err := p.canDie(proc.Store); err != nil {
		return nil, errors.Join(err, proc.Store.Close())
	}
	if life < len(p.scenario.faults) {
		proc.fault = p.scenario.faults[life]
	}
	opts := p.subject.Options
	opts.Retention = -1
	if opts.Headroom == 0 {
		opts.Headroom = -1
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	var err error
	if proc.engine, err = keystate.New(proc.asStore(), &opts); err != nil {
		return nil, errors.Join(err, proc.Store.Close())
	}
	proc.close = sync.OnceValue(proc.engine.Close)
	phases := p.subject.Phases
	if p.scenario.deploy && life > 0 {
		phases = p.subject.Next
	}
	if proc.machine, err = keystate.Register(proc.engine, p.subject.machine(), proc.wrap(phases(proc.engine))); err != nil {
		return nil, errors.Join(err, proc.close())
	}
	return proc, nil
}

// reach notes that the process has come to a place, and says what strikes there: not before the program has started, which would
// fail in the middle of its start.
func (p *process[Tx, S]) reach(at place) (n int, strikes what) {
	p.mu.Lock()
	n = len(p.places)
	p.places = append(p.places, at)
	p.mu.Unlock()
	if p.fault.what == "" || p.fault.at != n {
		return n, ""
	}
	select {
	case <-p.started:
	case <-time.After(time.Second): // it is the start that has come here
	}
	return n, p.fault.what
}

// die ends the process where it is: nothing that it does from here on has an effect.
func (p *process[Tx, S]) die() error {
	p.mu.Lock()
	p.dead = true
	p.mu.Unlock()
	if store, ok := p.Store.(Killable); ok {
		store.Kill()
	}
	return errKilled
}

// gone says whether the process is dead. Where it stands still, so does whoever asks.
func (p *process[Tx, S]) gone() bool {
	p.mu.Lock()
	still, dead := p.still, p.dead
	p.mu.Unlock()
	if still != nil {
		<-still
	}
	return dead
}

// over says whether the process has ended, one way or the other.
func (p *process[Tx, S]) over() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead || p.closing
}

// wrap puts the process around the program's phases.
func (p *process[Tx, S]) wrap(phases []keystate.Phase[Tx, S]) []keystate.Phase[Tx, S] {
	phases = slices.Clone(phases)
	o := p.play.outcome
	o.policies = make([]keystate.ErrorPolicy, len(phases))
	for i := range phases {
		ph := &phases[i]
		o.policies[i] = ph.OnError
		o.reconciles = o.reconciles || ph.Reconcile != nil
		if effect := ph.Effect; effect != nil {
			at := place{atEffect, i, string(ph.To)}
			ph.Effect = func(ctx context.Context, token string, s *S) error { return p.effect(ctx, token, s, at, effect) }
		}
		if commit := ph.Commit; commit != nil {
			at := place{atCommit, i, string(ph.To)}
			ph.Commit = func(ctx context.Context, tx Tx, s *S) error { return p.commit(ctx, tx, s, at, commit) }
		}
	}
	return phases
}

func (p *process[Tx, S]) effect(ctx context.Context, token string, s *S, at place, effect func(context.Context, string, *S) error) error {
	if p.gone() {
		return errKilled
	}
	_, strikes := p.reach(at)
	switch strikes {
	case killedBeforeEffect:
		return p.die()
	case effectFailed:
		return errFault
	case shutDown:
		p.shutDown()
		<-ctx.Done()
	}
	p.play.entering(at, s)
	p.play.sending(at, token)
	if err := effect(ctx, token, s); err != nil {
		return err
	}
	p.play.leaving(at, s)
	switch strikes {
	case killedAfterEffect, killedForLong:
		return p.die()
	case stillAfterEffect:
		p.standStill()
	case answerLost:
		return errFault
	case timedOut:
		return waitFor(ctx)
	}
	return nil
}

// waitFor waits until a context ends, but not for ever: a phase may have no timeout.
func waitFor(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-time.After(time.Hour):
	}
	return context.DeadlineExceeded
}

func (p *process[Tx, S]) shutDown() {
	p.mu.Lock()
	p.closing = true
	p.mu.Unlock()
	go func() {
		if err := p.close(); err != nil {
			p.play.find(fmt.Sprintf("the engine does not close: %v", err), "the effect does not end when its context does")
		}
	}()
}

func (p *process[Tx, S]) commit(ctx context.Context, tx Tx, s *S, at place, commit func(context.Context, Tx, *S) error) error {
	_, strikes := p.reach(at)
	switch strikes {
	case commitFailed:
		return errFault
	case commitFailedKilled:
		p.mu.Lock()
		p.killLater = true
		p.mu.Unlock()
		return errFault
	}
	p.play.entering(at, s)
	if err := commit(context.WithValue(ctx, commitOf{}, at.name), tx, s); err != nil {
		return err
	}
	p.play.leaving(at, s)
	return nil
}

// Boot notes the epoch.
func (p *process[Tx, S]) Boot(ctx context.Context) (id [16]byte, epoch uint64, err error) {
	id, p.epoch, err = p.Store.Boot(ctx)
	return id, p.epoch, err
}

// View reads, unless the process is dead.
func (p *process[Tx, S]) View(ctx context.Context, fn func(tx Tx) error) error {
	if p.gone() {
		return errKilled
	}
	return p.Store.View(ctx, fn)
}
