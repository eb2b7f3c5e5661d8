package keyhttp

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"

	"example.com/keystate"
)

// An Endpoint is what lies between HTTP and a machine.
type Endpoint[S any] struct {
	Options

	// Decode makes the machine's state of a request that has not been seen before. It checks the request: an error is the answer, a
	// [*Problem] as it is and any other as 400, and since nothing has been claimed yet, it is not stored. The body can be read, and
	// [KeyOf] tells the key. Decode may mint names and read clocks: retries are recognized by what was sent, not by the state.
	Decode func(r *http.Request) (S, error)

	// Encode writes the answer, once, in the transaction that finishes the key: what it writes is stored, and sent now and at every
	// retry. Headers that are not kept (Options.KeepHeaders) are dropped. The error is nil, or what a phase failed with for good
	// (errors.As sees through [keystate.Final]), with the state as that phase left it; or a [*keystate.FinalError] for a key that an
	// operator has abandoned. Like a Commit, Encode may be called more than once: it uses nothing but its arguments.
	Encode func(w http.ResponseWriter, s S, err error)
}

// A Handler is a machine behind an endpoint.
type Handler[S any] struct {
	intake  *intake
	decode  func(*http.Request) (S, error)
	answers *answers[S]
	machine *keystate.Machine[Exchange[S]]
}

// Handle registers a machine and puts it behind an endpoint. Its phases are as for [keystate.Register]; one that writes the answer is
// put behind them, in the same transaction as the last: what is stored is what was sent. All faults are returned at once, and like
// Register, Handle fails when stored keys rest on recovery points that are gone.
//
// A request gets its answer when that is on disk. If the client goes away meanwhile, the work goes on and the answer is there for the retry.
// Answers of 5xx by Handle itself mean that there is no answer yet; nothing of them is stored.
func Handle[Tx, S any](e *keystate.Engine[Tx], machine string, phases []keystate.Phase[Tx, S], ep Endpoint[S]) (*Handler[S], error) {
	in, err := newIntake(ep.Options)
	if ep.Decode == nil || ep.Encode == nil {
		err = errors.Join(err, errors.New("keyhttp: Endpoint.Decode and Encode must be given"))
	}
	if err != nil {
		return nil, err
	}
	h := &Handler[S]{intake: in, decode: ep.Decode, answers: newAnswers(&in.Options, ep.Encode)}
	if h.machine, err = keystate.Register(e, machine, answering(phases, h.answers)); err != nil {
		return nil, err
	}
	return h, nil
}

// Machine is the machine as it is registered: its state is an Exchange, and "work_done" is the point before its end.
func (h *Handler[S]) Machine() *keystate.Machine[Exchange[S]] { return h.machine }

// ServeHTTP answers a request: by its machine, or as it was answered before.
func (h *Handler[S]) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !h.intake.keyed(r) {
		w.Header().Set("Allow", strings.Join(h.intake.Methods, ", "))
		h.intake.turnDown(w, r, newProblem(MethodNotAllowed, "This endpoint takes %s.", strings.Join(h.intake.Methods, ", ")))
		return
	}
	c, err := h.take(w, r)
	if err != nil {
		h.intake.turnDown(w, r, err)
		return
	}
	h.answers.await(c.key)
	defer h.answers.forget(c.key)
	run, err := h.start(c)
	if err != nil {
		h.fail(w, c, err)
		return
	}
	h.answer(w, c, run)
}

// take reads a request; one without a key gets one, where that is allowed.
func (h *Handler[S]) take(w http.ResponseWriter, r *http.Request) (*call, error) {
	c, err := h.intake.take(w, r)
	if !errors.Is(err, errNoKey) {
		return c, err
	}
	scope, err := h.intake.scope(r)
	if err != nil {
		return nil, err
	}
	minted := keystate.NewID()
	w.Header().Set(keyHeader, spell(minted))
	return h.intake.withKey(w, r, keystate.Key{Scope: scope, ID: minted})
}

// start finds the key's run, or begins it. A request that is known is not decoded: what Decode would say of it now, its answer has been
// decided.
func (h *Handler[S]) start(c *call) (*keystate.Run[Exchange[S]], error) {
	var none S
	run, err := h.machine.Find(c.r.Context(), c.key, asExchange(c, none))
	if !errors.Is(err, keystate.ErrNotFound) {
		return run, err
	}
	if h.intake.tooOld(c.key.ID) {
		return nil, h.intake.expired()
	}
	s, err := h.decode(c.readable(c.r.Context()))
	var given *Problem
	switch {
	case errors.As(err, &given):
		return nil, err
	case err != nil:
		return nil, newProblem(RequestInvalid, "%v", err)
	}
	return h.machine.Start(c.r.Context(), c.key, asExchange(c, s))
}

// answer waits for a run, and sends what came of it.
func (h *Handler[S]) answer(w http.ResponseWriter, c *call, run *keystate.Run[Exchange[S]]) {
	var x Exchange[S]
	var err error
	own := !run.Replayed() && !run.Joined()
	if own {
		x, err = run.Wait(c.r.Context())
	} else {
		x, err = joined(h.intake, c.r.Context(), run)
	}
	var final *keystate.FinalError
	if err != nil && !errors.As(err, &final) {
		h.fail(w, c, err)
		return
	}
	if !own {
		replayed(w)
	}
	switch large := h.answers.large(c.key); {
	case x.Response == nil: // nobody could write it
		h.answers.encode(x.State, err).send(w)
		return
	case x.Response.Omitted && own && large != nil:
		large.send(w)
		return
	}
	h.intake.give(w, c.r, x.Response)
}

// fail tells why there is no answer. An error with which the first phase withdrew the request is the application's to tell.
func (h *Handler[S]) fail(w http.ResponseWriter, c *call, err error) {
	if errors.Is(err, keystate.ErrWithdrawn) {
		var none S
		h.answers.encode(none, err).send(w)
		return
	}
	h.intake.turnDown(w, c.r, err)
}

// answers writes a machine's answers.
type answers[S any] struct {
	options *Options
	write   func(http.ResponseWriter, S, error)

	mu      sync.Mutex
	awaited map[keystate.Key]*awaited
}

// awaited is what the requests that are here with one key wait for.
type awaited struct {
	requests int
	large    *Response // the answer, if it is too large to keep: the error that led to it is not stored, so it cannot be written again
}

func newAnswers[S any](o *Options, write func(http.ResponseWriter, S, error)) *answers[S] {
	return &answers[S]{options: o, write: write, awaited: map[keystate.Key]*awaited{}}
}

// await lets a request with the key have an answer that is too large to keep, until it forgets it.
func (a *answers[S]) await(key keystate.Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.awaited[key] == nil {
		a.awaited[key] = &awaited{}
	}
	a.awaited[key].requests++
}

func (a *answers[S]) forget(key keystate.Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.awaited[key].requests--; a.awaited[key].requests == 0 {
		delete(a.awaited, key)
	}
}

func (a *answers[S]) large(key keystate.Key) *Response {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.awaited[key].large
}

// hand keeps an answer that is not stored for whoever awaits it.
func (a *answers[S]) hand(key keystate.Key, large *Response) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if w := a.awaited[key]; w != nil {
		w.large = large
	}
}

// encode is the whole answer, with the headers that may be kept, since others would be missing at the next retry.
func (a *answers[S]) encode(s S, err error) *Response {
	rec := newRecorder()
	a.write(rec, s, err)
	rec.finish()
	for name := range rec.sent {
		if !a.options.keeps(name) {
			delete(rec.sent, name)
		}
	}
	return &Response{Status: rec.status, Header: rec.sent, Body: rec.body.Bytes()}
}

// record puts the answer into what is stored.
func (a *answers[S]) record(ctx context.Context, x *Exchange[S], reason error) (err error) {
	answer := a.encode(x.State, reason)
	if x.Response, err = a.options.keep(answer.Status, answer.Header, answer.Body); err == nil && x.Response.Omitted {
		a.hand(keystate.KeyOf(ctx), answer)
	}
	return err
}

// refused sees to it that an error which ends the key has its answer. When there can be none, the phase is tried again.
func (a *answers[S]) refused(ctx context.Context, x *Exchange[S], policy keystate.ErrorPolicy, err error) error {
	if err == nil || !keystate.IsFinal(err) && policy != keystate.Fail {
		return err
	}
	if fault := a.record(ctx, x, err); fault != nil {
		return fault
	}
	return err
}

// errCutOff stands for what a phase that panicked would have said.
var errCutOff = errors.New("keyhttp: the phase was cut off")

// watched runs a phase. A panic in it is an error like any other, and where the phase's errors are answers, it is one.
func (a *answers[S]) watched(ctx context.Context, x *Exchange[S], policy keystate.ErrorPolicy, phase func() error) error {
	returned := false
	defer func() {
		if !returned {
			_ = a.refused(ctx, x, policy, errCutOff)
		}
	}()
	err := phase()
	returned = true
	return a.refused(ctx, x, policy, err)
}

// workDone is the point that the last phase reaches, and behind which only the answer is to be written.
const workDone keystate.RecoveryPoint = "work_done"

// answering lifts phases from their own state to what is stored, and puts one behind them that writes the answer.
func answering[Tx, S any](phases []keystate.Phase[Tx, S], a *answers[S]) []keystate.Phase[Tx, Exchange[S]] {
	var lifted []keystate.Phase[Tx, Exchange[S]]
	for i, p := range phases {
		q := keystate.Phase[Tx, Exchange[S]]{
			To: p.To, OnError: p.OnError, Retry: p.Retry, Timeout: p.Timeout, TokenLife: p.TokenLife, AtMostOnce: p.AtMostOnce, Formerly: p.Formerly,
		}
		if p.Effect != nil {
			q.Effect = func(ctx context.Context, token string, x *Exchange[S]) error {
				return a.watched(ctx, x, p.OnError, func() error { return p.Effect(ctx, token, &x.State) })
			}
		}
		if p.Commit != nil {
			q.Commit = func(ctx context.Context, tx Tx, x *Exchange[S]) error {
				return a.watched(ctx, x, p.OnError, func() error { return p.Commit(ctx, tx, &x.State) })
			}
		}
		if p.Reconcile != nil {
			q.Reconcile = func(ctx context.Context, token string, x *Exchange[S]) (keystate.Outcome, error) {
				outcome, err := p.Reconcile(ctx, token, &x.State)
				return outcome, a.refused(ctx, x, keystate.Retry, err) // what became of the effect is open, whatever the policy
			}
		}
		if i == len(phases)-1 && p.To == keystate.Finished && len(p.Formerly) == 0 {
			q.To = workDone
		}
		lifted = append(lifted, q)
	}
	if len(lifted) == 0 || lifted[len(lifted)-1].To != workDone {
		return lifted // Register says what is wrong with it
	}
	return append(lifted, keystate.Phase[Tx, Exchange[S]]{
		To:     keystate.Finished,
		Commit: func(ctx context.Context, _ Tx, x *Exchange[S]) error { return a.record(ctx, x, nil) },
		Retry:  keystate.RetryPolicy{InRun: -1}, // the same state gives the same fault, until a release mends it
	})
}
