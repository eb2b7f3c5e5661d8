package keytest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// A play is one scenario as it is performed: process after process, until one of them has come to the end.
type play[Tx, S any] struct {
	t        testing.TB
	dir      string
	scenario scenario
	subject  Case[Tx, S]
	world    *World

	beside *process[Tx, S] // another that has the store open with the first

	mu      sync.Mutex
	outcome *outcome
	last    *remains // what the last phase has left in the state; only kept without faults
	answer  map[string]string
	token   string // of the first phase's effect, as it ran last
}

// What remains of a phase is the state as it has left it.
type remains struct {
	by    place
	state map[string]string
}

// perform plays a scenario in a bubble of its own.
func (m *matrix[Tx, S]) perform(t *testing.T, sc scenario) *outcome {
	p := &play[Tx, S]{dir: t.TempDir(), scenario: sc, world: new(World)}
	synctest.Test(t, func(t *testing.T) {
		p.t = t
		time.Sleep(sc.later)
		p.subject = m.build(p.world)
		p.perform()
	})
	return p.outcome
}

func (p *play[Tx, S]) perform() {
	p.outcome = &outcome{
		scenario: p.scenario, happened: map[string]bool{}, pairs: p.subject.Pairs, deploys: p.subject.Next != nil,
		tokenLife: p.world.TokenLife, ignoresTokens: p.world.IgnoresTokens, varies: p.subject.varies,
	}
	if err := p.setUp(); err != nil {
		p.find(fmt.Sprintf("the setup fails: %v", err), "")
		return
	}
	const mostLives = 10
	for life := range mostLives {
		proc, err := p.enter(life)
		if err != nil {
			cause := ""
			if p.scenario.deploy {
				cause = "the next release leaves out a point on which keys rest, and Formerly does not name it"
			}
			p.find(fmt.Sprintf("the program does not start: %v", err), cause)
			return
		}
		end := proc.live()
		if err := proc.close(); err != nil && end {
			p.find(fmt.Sprintf("the engine does not close: %v", err), "an effect does not end when its context does")
		}
		p.outcome.processes = append(p.outcome.processes, proc.places)
		if end {
			break
		}
		time.Sleep(p.absence(life))
	}
	p.leaveBeside()
	p.outcome.deeds = p.world.counts()
	for _, w := range p.world.wrongs {
		p.find(w.what, w.cause)
	}
}

// absence is how long it takes until another process is started.
func (p *play[Tx, S]) absence(life int) time.Duration {
	const restart, another = 17 * time.Second, time.Second
	if p.scenario.beside && life == 0 {
		return another
	}
	if life < len(p.scenario.faults) && p.scenario.faults[life].what == killedForLong {
		return p.world.TokenLife + restart
	}
	return restart
}

func (p *play[Tx, S]) setUp() (err error) {
	s := p.subject.open(p.t, p.dir)
	_, p.outcome.shared = s.(keystate.SharedStore[Tx])
	defer func() { err = errors.Join(err, s.Close()) }()
	ctx := context.Background()
	if _, _, err := s.Boot(ctx); err != nil || p.subject.Setup == nil {
		return err
	}
	return s.Update(ctx, p.subject.Setup)
}

func (p *play[Tx, S]) find(what, cause string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outcome.find(what, cause)
}

// entering compares the state that a phase is given with what the one before it has left.
func (p *play[Tx, S]) entering(at place, s *S) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at.kind == atEffect {
		p.outcome.happened[at.name] = true
	}
	if p.last != nil {
		p.survivesLocked(leaves(s), "when "+at.String()+" begins")
	}
}

// sending keeps the token of the first phase's effect.
func (p *play[Tx, S]) sending(at place, token string) {
	if at.phase == 0 {
		p.mu.Lock()
		p.token = token
		p.mu.Unlock()
	}
}

// forgets looks at what the first phase withdraws: nothing may have come of it.
func (p *play[Tx, S]) forgets() {
	p.mu.Lock()
	token := p.token
	p.mu.Unlock()
	if receipt, done := p.world.Find(token); done {
		p.find(fmt.Sprintf("the request is withdrawn, although the world has done it: %q", receipt),
			"keystate.Withdraw says that nothing has come of the request: an effect returns it for a sure no, and for nothing else")
	}
}

// leaving keeps the state as a phase has left it.
func (p *play[Tx, S]) leaving(at place, s *S) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.scenario.faults) == 0 && p.scenario.callers < 2 {
		p.last = &remains{by: at, state: leaves(s)}
	}
}

// undo forgets what a phase has left that belongs to a transaction which is undone: the store may run one again whenever it likes.
func (p *play[Tx, S]) undo() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = nil
}

// survivesLocked says what of the state that a phase has left has not survived.
func (p *play[Tx, S]) survivesLocked(now map[string]string, when string) {
	for _, d := range differences(p.last.state, now, nothing) {
		if d.want != "" {
			p.outcome.find(fmt.Sprintf("%s leaves %s in the state's %s; %s, it is %s", p.last.by, shown(d.want), d.path, when, shown(d.got)),
				"the field does not survive encoding: it is unexported, its tag leaves it out, or msgpack does not keep its kind")
		}
	}
	p.last = nil
}

func (at place) String() string {
	switch at.kind {
	case atEffect:
		return "the effect of " + at.name
	case atCommit:
		return "the commit of " + at.name
	}
	return "the transaction of " + at.name
}

// live lets clients ask until they are answered, and reports whether it has come to the end: otherwise the process has.
func (p *process[Tx, S]) live() (end bool) {
	var callers sync.WaitGroup
	for n := range max(1, p.play.scenario.callers) {
		asked := p
		if n > 0 && p.play.beside != nil {
			asked = p.play.beside
		}
		callers.Go(asked.serve)
	}
	callers.Wait()
	if !p.over() {
		p.finish()
	}
	if p.over() {
		return false
	}
	answer, err := p.carry()
	if p.over() { // a request that is withdrawn is made anew
		return false
	}
	p.hear(answer, err)
	p.conclude(answer, err)
	return true
}

// serve answers a client.
func (p *process[Tx, S]) serve() { p.hear(p.carry()) }

// carry asks as a client does, and acts as an operator would on a parked key, until there is an answer or the process ends. A
// request that is withdrawn is made once more: it may be its time by then.
func (p *process[Tx, S]) carry() (answer S, err error) {
	const patience, pause = 8, time.Second
	ctx, cancel := p.whileLeasesMayHold()
	defer cancel()
	withdrawals := 0
	for range patience {
		answer, err = p.machine.Do(ctx, p.play.subject.key(), p.play.subject.Request)
		var stopped *keystate.PhaseError
		switch {
		case !p.over() && withdrawals == 0 && errors.Is(err, keystate.ErrWithdrawn):
			withdrawals++
			time.Sleep(pause)
		case p.over() || !errors.As(err, &stopped):
			return answer, err
		case stopped.Reason == "":
			_ = p.engine.Resume(ctx)
		case !p.play.mayRetry(stopped):
			return answer, err
		default:
			_ = p.engine.Retry(ctx, p.play.subject.key()) // another caller may have been first
		}
	}
	return answer, err
}

// mayRetry says whether an operator may let a parked key go on: where an effect must not be sent twice, only if it was not sent.
func (p *play[Tx, S]) mayRetry(e *keystate.PhaseError) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch e.Reason {
	case keystate.AttemptsUsedUp:
		return true
	case keystate.Indeterminate, keystate.TokenExpired:
		return !p.outcome.happened[string(e.Before)]
	}
	return false
}

// hear compares an answer with the first one that was given: it stays the same.
func (p *process[Tx, S]) hear(answer S, err error) {
	if err != nil && refusal(err) == nil {
		return
	}
	heard := under("the answer", leaves(answer))
	if final := refusal(err); final != nil {
		heard["the refusal"] = final.Reason
	}
	p.play.mu.Lock()
	defer p.play.mu.Unlock()
	if p.play.answer == nil {
		p.play.answer = heard
		return
	}
	for _, d := range differences(p.play.answer, heard, nothing) {
		p.play.outcome.find(fmt.Sprintf("%s was %s in the first answer, and is %s in a later one", d.path, shown(d.want), shown(d.got)), "")
	}
}

// conclude takes down what it all has come to.
func (p *process[Tx, S]) conclude(answer S, err error) {
	o := p.play.outcome
	var stopped *keystate.PhaseError
	switch {
	case refusal(err) != nil:
		o.refused = true
	case errors.Is(err, keystate.ErrWithdrawn):
		o.withdrawn = err.Error()
	case errors.As(err, &stopped) && (stopped.Reason == keystate.Indeterminate || stopped.Reason == keystate.TokenExpired):
		o.parked = err // that is honest: an effect may have happened that must not happen twice
	case err != nil:
		p.play.find(fmt.Sprintf("the request does not end: %v", err), "")
		return
	case p.play.last != nil:
		p.play.mu.Lock()
		p.play.survivesLocked(leaves(answer), "in the answer")
		p.play.mu.Unlock()
	}
	var written map[string]string
	failed := p.engine.View(context.Background(), func(tx Tx) (failed error) {
		if written, failed = p.play.contents(tx); failed != nil || p.play.subject.Check == nil || o.parked != nil {
			return failed
		}
		if complaint := p.play.subject.Check(tx, answer, err); complaint != nil {
			p.play.find(fmt.Sprintf("the check says: %v", complaint), "")
		}
		return nil
	})
	if failed != nil {
		p.play.find(fmt.Sprintf("the store cannot be read: %v", failed), "")
		return
	}
	if p.play.subject.Outside != nil {
		maps.Copy(written, under(outside, leaves(p.play.subject.Outside())))
	}
	maps.Copy(written, p.play.answer)
	if o.withdrawn != "" {
		written["the withdrawal"] = strconv.Quote(o.withdrawn)
	}
	o.leaves = written
}

// contents is what the program has written to the store.
func (p *play[Tx, S]) contents(tx Tx) (map[string]string, error) {
	var all any
	var err error
	if p.subject.Contents != nil {
		all, err = p.subject.Contents(tx)
	} else if tx, ok := any(tx).(*bbolt.Tx); ok {
		all, err = buckets(tx)
	}
	return under("the store's", leaves(all)), err
}
