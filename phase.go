package keystate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// A Phase carries a key to the recovery point To. It may act on the outside world (Effect) and write to the
// store (Commit); with neither it is a mere landmark.
type Phase[Tx, S any] struct {
	// To is the recovery point that the phase reaches. The last phase's is [Finished].
	To RecoveryPoint

	// Effect acts on the world outside the store. It runs at least once, never inside a transaction, and only
	// after everything before it is durable: after a crash it runs again with the same token, which it passes
	// on as the idempotency key of whatever it calls. What it puts into s is saved with the commit.
	// It ends when ctx does: at Timeout, or when the engine closes.
	Effect func(ctx context.Context, token string, s *S) error

	// Commit writes to the store in the transaction that moves the key to To. It may be called more than once,
	// each time with a fresh copy of the state; exactly one call takes effect. It uses nothing but tx, s and
	// ctx: no clock, no random number, no call to the engine (which would wait for itself: [ErrInCommit]).
	Commit func(ctx context.Context, tx Tx, s *S) error

	// OnError says what an error of Effect or Commit means. An error marked with [Final] is final whatever
	// stands here; one that the machine's first phase marks with [Withdraw] withdraws the request. Default: Retry.
	OnError ErrorPolicy

	// Retry says how often and how fast a failed phase is tried again.
	Retry RetryPolicy

	// Timeout bounds one run of Effect and of Reconcile, through their context. Default: 30 s; negative: none.
	Timeout time.Duration

	// TokenLife is how long the other side honours a token, counted from the first attempt by the wall clock. When it
	// has passed, an effect whose outcome is open is not sent again: Reconcile is asked, or the key parks as
	// [TokenExpired]. Default: for ever.
	TokenLife time.Duration

	// AtMostOnce is for an effect that the other side does not recognize when it comes twice. It runs again
	// only when Reconcile says that it did not happen; without Reconcile, a key whose effect may have
	// happened parks as [Indeterminate].
	AtMostOnce bool

	// Reconcile asks the other side what became of an effect. It is asked before every further attempt at
	// Effect that may have been sent. When it answers Done, it has filled in s as Effect would have, and
	// Effect is not run again; at NotDone it is; at Unknown the key parks as [Indeterminate].
	Reconcile func(ctx context.Context, token string, s *S) (Outcome, error)

	// Formerly lists the names that To had in earlier releases, and the points of removed phases that now count as To. A
	// stored key that rests on one of them goes on from here. A key whose effect is under way while a deploy inserts
	// a phase before it goes on with that effect, under the same token, and passes the inserted phase over.
	// Do not list a removed phase's point here while keys may have its effect under way: they would take this phase for it.
	Formerly []RecoveryPoint
}

// An ErrorPolicy says what an error means that is marked neither with [Final] nor, in a machine's first phase, with [Withdraw].
type ErrorPolicy int

const (
	// Retry: the error is an obstacle. The phase is tried again, at first while the caller waits, then by the engine.
	Retry ErrorPolicy = iota

	// Fail: the error is the answer, as if marked with [Final].
	Fail

	// Ignore: the key goes on to the phase's point. Nothing of the phase is kept, neither its writes nor what it
	// put into the state; the record's history bears the error.
	Ignore
)

// A RetryPolicy says how often a phase is tried, and how fast: waits grow exponentially by a factor of two from
// Initial to Max, each drawn from 50 % to 150 % of its length.
type RetryPolicy struct {
	Attempts int           // attempts in all, before the key parks; across crashes. Default: 10; negative: no bound.
	InRun    int           // of these, how many while the caller waits. Default: 3; negative: only the first.
	Initial  time.Duration // Default: 100 ms.
	Max      time.Duration // Default: 5 min.
}

// An Outcome is what Reconcile found out.
type Outcome int

const (
	Unknown Outcome = iota // it cannot be told: the key parks
	Done                   // the effect has happened, and the state says how
	NotDone                // the effect has not happened and, for this token, is not under way
)

// phase is a Phase without its state type, with its defaults filled in.
type phase[Tx any] struct {
	to         RecoveryPoint
	first      bool // of its machine: nothing can have come of a request before it
	formerly   []RecoveryPoint
	effect     func(ctx context.Context, token string, s any) error
	commit     func(ctx context.Context, tx Tx, s any) error
	reconcile  func(ctx context.Context, token string, s any) (Outcome, error)
	onError    ErrorPolicy
	retry      RetryPolicy
	timeout    time.Duration
	tokenLife  time.Duration
	atMostOnce bool
}

func erase[Tx, S any](p Phase[Tx, S]) phase[Tx] {
	e := phase[Tx]{
		to: p.To, formerly: p.Formerly, onError: p.OnError, retry: p.Retry.orDefault(),
		timeout: orDefault(p.Timeout, 30*time.Second), tokenLife: p.TokenLife, atMostOnce: p.AtMostOnce,
	}
	if p.Effect != nil {
		e.effect = func(ctx context.Context, token string, s any) error { return p.Effect(ctx, token, s.(*S)) }
	}
	if p.Commit != nil {
		e.commit = func(ctx context.Context, tx Tx, s any) error { return p.Commit(ctx, tx, s.(*S)) }
	}
	if p.Reconcile != nil {
		e.reconcile = func(ctx context.Context, token string, s any) (Outcome, error) {
			return p.Reconcile(ctx, token, s.(*S))
		}
	}
	return e
}

// try is the event of an attempt at the phase.
func (p *phase[Tx]) try(at time.Time) event {
	return event{kind: try, at: at, point: p.to, sent: p.effect != nil}
}

func (p RetryPolicy) orDefault() RetryPolicy {
	return RetryPolicy{
		Attempts: orDefault(p.Attempts, 10),
		InRun:    orDefault(p.InRun, 3),
		Initial:  orDefault(p.Initial, 100*time.Millisecond),
		Max:      orDefault(p.Max, 5*time.Minute),
	}
}

func orDefault[T comparable](v, fallback T) T {
	var zero T
	if v == zero {
		return fallback
	}
	return v
}

// pause is how long to wait after the n-th failed attempt.
func (p RetryPolicy) pause(n int) time.Duration {
	b := backoff.ExponentialBackOff{
		InitialInterval: p.Initial, MaxInterval: p.Max, Multiplier: 2, RandomizationFactor: backoff.DefaultRandomizationFactor,
	}
	var d time.Duration
	for range min(max(n, 1), 64) { // after 64 doublings every interval is at its cap
		d = b.NextBackOff()
	}
	return d
}

func (p RetryPolicy) usedUp(attempts int) bool {
	return p.Attempts > 0 && attempts >= p.Attempts
}

// A verdict is what a phase's error leads to.
type verdict int

const (
	again     verdict = iota // try again in this run
	later                    // let the key wait, and the engine try again
	ignored                  // go on without the phase
	refused                  // finish with the error as the answer
	stalled                  // park
	withdrawn                // forget the key
)

// judge decides what an error means, for a key with that many attempts begun in all, and inRun of them in this run.
// It is where every policy of a phase comes together.
func (p *phase[Tx]) judge(err error, byEffect bool, attempts, inRun int) (verdict, ParkReason) {
	switch {
	case p.withdraws(err):
		return withdrawn, ""
	case IsFinal(err) || p.onError == Fail:
		return refused, ""
	case p.onError == Ignore:
		return ignored, ""
	case byEffect && p.atMostOnce && p.reconcile == nil:
		return stalled, Indeterminate
	case p.retry.usedUp(attempts):
		return stalled, AttemptsUsedUp
	case inRun < p.retry.InRun:
		return again, ""
	}
	return later, ""
}

// withdraws says whether an error of the phase withdraws the request.
func (p *phase[Tx]) withdraws(err error) bool { return p.first && marked[*withdrawMark](err) }

// decides says whether an error of the phase decides what becomes of the key, rather than being an obstacle.
func (p *phase[Tx]) decides(err error) bool { return IsFinal(err) || p.withdraws(err) }

// A plan is how an effect is to be taken up.
type plan int

const (
	send      plan = iota // run it
	ask                   // ask what became of it first
	dontKnow              // park: it may have happened and must not happen twice
	forgotten             // park: it may have happened, and the other side may have forgotten its token
)

// plan decides how to take up the effect of a key whose first attempt, if any, was at firstTried.
func (p *phase[Tx]) plan(firstTried, now time.Time) plan {
	switch {
	case firstTried.IsZero():
		return send
	case p.reconcile != nil:
		return ask
	case p.atMostOnce:
		return dontKnow
	case p.tokenLife > 0 && now.Sub(firstTried) >= p.tokenLife:
		return forgotten
	}
	return send
}

const (
	maxPhases = 100
	maxName   = 100 // bytes of a machine's or point's name
)

// checkPhases finds all faults of a registration at once.
func checkPhases[Tx any](machine string, phases []phase[Tx]) error {
	var faults []error
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf("keystate: machine %q: "+format, append([]any{machine}, args...)...))
	}
	if machine == "" || len(machine) > maxName {
		fault("the name must have 1 to %d bytes", maxName)
	}
	if len(phases) == 0 || len(phases) > maxPhases {
		fault("there must be 1 to %d phases, not %d", maxPhases, len(phases))
	}
	named := map[RecoveryPoint]bool{Started: true}
	for i, p := range phases {
		last := i == len(phases)-1
		switch {
		case p.to == "" || len(p.to) > maxName:
			fault("phase %d: the point's name must have 1 to %d bytes", i+1, maxName)
		case p.to == Started:
			fault("phase %d: %q is where every key begins", i+1, Started)
		case p.to == Finished && !last:
			fault("phase %d: only the last phase reaches %q", i+1, Finished)
		case last && p.to != Finished:
			fault("phase %d: the last phase must reach %q, not %q", i+1, Finished, p.to)
		}
		for _, name := range append([]RecoveryPoint{p.to}, p.formerly...) {
			if named[name] {
				fault("phase %d: the point %q is named twice", i+1, name)
			}
			named[name] = true
		}
		if p.to == Finished && len(p.formerly) > 0 {
			fault("phase %d: a key that rests on a point cannot become finished by renaming it", i+1)
		}
		if p.effect == nil && (p.reconcile != nil || p.atMostOnce || p.tokenLife != 0) {
			fault("phase %d: Reconcile, AtMostOnce and TokenLife are about an effect, and there is none", i+1)
		}
		if p.onError < Retry || p.onError > Ignore {
			fault("phase %d: OnError is none of Retry, Fail, Ignore", i+1)
		}
		if p.retry.Initial < 0 || p.retry.Max < p.retry.Initial || p.tokenLife < 0 {
			fault("phase %d: a duration is negative, or Retry.Max is below Retry.Initial", i+1)
		}
	}
	return errors.Join(faults...)
}
