package keyhttp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"slices"
	"sync"

	"example.com/keystate"
)

// Middleware protects any handler: it stores the handler's answer under the request's key, and gives it to every retry. It registers
// a machine of one phase, whose effect is the handler. A handler whose process ended in the middle, or whose answer the disk did not
// take, has perhaps done a part of its work, and nobody knows which: its key is forgotten, so that the client's retry runs the handler
// again from its beginning; or, with [Options.AtMostOnce], parked. A panic of the handler's is passed on; its key is treated the same.
//
// An answer is sent when it is on disk, unless the handler flushes or writes more than can be stored: what has been sent then may
// still have to be done again. What a handler sends in pieces is recorded to its end, also when the client is gone: its Write and
// Flush do not fail then.
//
// The handler gets a request whose body can be read as usual, whose context ends when the engine closes and not when the client goes
// away, and which knows its [KeyOf] and its [Token]. Nothing in front of Middleware may read the body.
func Middleware[Tx any](e *keystate.Engine[Tx], machine string, o Options) (func(http.Handler) http.Handler, error) {
	g, err := newGuard(e, machine, o)
	if err != nil {
		return nil, err
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, next) })
	}, nil
}

// A recording is an exchange about whose inside nothing is known.
type recording = Exchange[struct{}]

// A guard protects handlers.
type guard struct {
	intake  *intake
	machine *keystate.Machine[recording]

	mu     sync.Mutex
	offers map[identity][]*attempt // requests that wait, each with a handler that may run now
	taken  map[string]*attempt     // by token: requests whose handler a run has called
}

// An identity is a request as its retries share it.
type identity struct {
	key    keystate.Key
	digest string
}

func (c *call) identity() identity { return identity{c.key, string(c.digest)} }

// An attempt is one request that waits for its handler to run, or whose handler is running.
type attempt struct {
	call     *call
	next     http.Handler
	w        http.ResponseWriter
	tape     *tape         // from when the handler runs
	ended    chan struct{} // closed when the handler has ended; what follows is written before
	token    string        // of the run that has called the handler
	answer   *Response     // what is to be stored, if the handler has answered and it is to be stored
	unsaved  bool          // the handler has answered, and nothing of it is to be stored
	panicked any

	insisted bool // the answer has been put before the engine a second time
}

func newGuard[Tx any](e *keystate.Engine[Tx], machine string, o Options) (*guard, error) {
	in, err := newIntake(o)
	if err != nil {
		return nil, err
	}
	g := &guard{intake: in, offers: map[identity][]*attempt{}, taken: map[string]*attempt{}}
	g.machine, err = keystate.Register(e, machine, []keystate.Phase[Tx, recording]{{
		To: keystate.Finished, Effect: g.run, AtMostOnce: in.AtMostOnce, Timeout: -1,
	}})
	return g, err
}

func (g *guard) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	if !g.intake.keyed(r) {
		next.ServeHTTP(w, r)
		return
	}
	c, err := g.intake.take(w, r)
	switch {
	case errors.Is(err, errNoKey):
		next.ServeHTTP(w, r)
	case err != nil:
		g.intake.turnDown(w, r, err)
	default:
		g.attend(w, c, next)
	}
}

// attend offers a call's handler to whatever run there is for its key, and answers by what came of it.
func (g *guard) attend(w http.ResponseWriter, c *call, next http.Handler) {
	a := &attempt{call: c, next: next, w: w, ended: make(chan struct{})}
	g.offer(a)
	run, err := g.start(c)
	if err == nil && !run.Replayed() && !run.Joined() {
		<-run.Done() // whether the client is there or not: the handler may be writing to w
	}
	taken := !g.withdraw(a)
	defer g.strikeOff(a)
	switch {
	case taken: // perhaps by a run that somebody else began
		<-a.ended
		g.conclude(w, a, run, err)
	case err != nil:
		g.intake.turnDown(w, c.r, err)
	default:
		g.share(w, c, run)
	}
}

func (g *guard) start(c *call) (*keystate.Run[recording], error) {
	x := asExchange(c, struct{}{})
	if !g.intake.tooOld(c.key.ID) {
		return g.machine.Start(c.r.Context(), c.key, x)
	}
	run, err := g.machine.Find(c.r.Context(), c.key, x)
	if errors.Is(err, keystate.ErrNotFound) {
		return nil, g.intake.expired()
	}
	return run, err
}

// offer lets a run of the attempt's key call its handler. Of several requests that are the same, one will be called.
func (g *guard) offer(a *attempt) {
	g.mu.Lock()
	defer g.mu.Unlock()
	id := a.call.identity()
	g.offers[id] = append(g.offers[id], a)
}

// withdraw takes an offer back, unless a run has taken it up.
func (g *guard) withdraw(a *attempt) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	id := a.call.identity()
	i := slices.Index(g.offers[id], a)
	if i < 0 {
		return false
	}
	g.keepOffers(id, slices.Delete(g.offers[id], i, i+1))
	return true
}

// takeUp finds an attempt that is offered for a run, or nil.
func (g *guard) takeUp(id identity, token string) *attempt {
	g.mu.Lock()
	defer g.mu.Unlock()
	offers := g.offers[id]
	if len(offers) == 0 {
		return nil
	}
	g.keepOffers(id, offers[1:])
	a := offers[0]
	a.token, g.taken[token] = token, a
	return a
}

// answeredBy finds the attempt whose handler has answered for a token, or nil.
func (g *guard) answeredBy(token string) *attempt {
	g.mu.Lock()
	defer g.mu.Unlock()
	if a := g.taken[token]; a != nil && a.answer != nil {
		return a
	}
	return nil
}

// strikeOff forgets an attempt that has been taken up.
func (g *guard) strikeOff(a *attempt) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.taken[a.token] == a {
		delete(g.taken, a.token)
	}
}

func (g *guard) keepOffers(id identity, offers []*attempt) {
	if len(offers) == 0 {
		delete(g.offers, id)
		return
	}
	g.offers[id] = offers
}

var (
	errNobody   = errors.New("keyhttp: the handler was cut off, and there is no request to run it with")
	errPanicked = errors.New("keyhttp: the handler panicked")
	errNotSaved = errors.New("keyhttp: the answer is not one to be saved")
)

// run is the effect of every key: the handler. Where nobody is there for whom it could run, after a crash, the key is forgotten:
// the client's retry begins anew. A key that must not do that does not come here, but is parked.
func (g *guard) run(ctx context.Context, token string, x *recording) error {
	if a := g.answeredBy(token); a != nil { // and the engine could not take the answer
		x.Response = g.insist(a)
		return nil
	}
	a := g.takeUp(identity{keystate.KeyOf(ctx), string(x.Request)}, token)
	if a == nil {
		return keystate.Withdraw(errNobody)
	}
	if err := g.handle(ctx, token, a); err != nil {
		return err
	}
	if a.unsaved {
		return keystate.Withdraw(fmt.Errorf("%w: status %d", errNotSaved, a.tape.status))
	}
	x.Response = a.answer
	return nil
}

// insist is what is stored of an answer that the engine could not take: the same once more, if it was for the disk; otherwise that
// there is none to be had.
func (g *guard) insist(a *attempt) *Response {
	if a.insisted {
		g.intake.Logger.Error("keyhttp: an answer is not kept", "key", a.call.key, "error", "the engine does not take it; its MaxState may be too small for MaxResponse")
		return a.omitted()
	}
	a.insisted = true
	return a.answer
}

// decide says what is to be stored of an attempt's answer. The handler has run: whatever fails now, better no answer for the retry than
// a second run.
func (g *guard) decide(a *attempt) {
	fault := func(why any) {
		g.intake.Logger.Error("keyhttp: an answer is not kept", "key", a.call.key, "error", why)
	}
	defer func() {
		if v := recover(); v != nil {
			fault(fmt.Sprintf("panic: %v\n%s", v, debug.Stack()))
		}
	}()
	status, header, body, whole := a.tape.recorded()
	a.answer = a.omitted()
	if !g.intake.Save(status) {
		a.answer, a.unsaved = nil, true
		return
	}
	if !whole {
		return
	}
	kept, err := g.intake.keep(status, header, body)
	if err != nil {
		fault(err)
		return
	}
	a.answer = kept
}

// omitted is what is stored of an answer that is not.
func (a *attempt) omitted() *Response {
	status, _, _, _ := a.tape.recorded()
	return &Response{Status: status, Omitted: true}
}

// gave says whether what is stored is the handler's answer, or that it could not be.
func (a *attempt) gave(stored *Response) bool {
	return stored.equal(a.answer) || a.answer != nil && stored.equal(a.omitted())
}

// handle calls the handler. A panic is kept for the goroutine on which the request came in.
func (g *guard) handle(ctx context.Context, token string, a *attempt) (err error) {
	defer close(a.ended)
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		a.panicked = v
		if v != http.ErrAbortHandler {
			g.intake.Logger.Error("keyhttp: a handler panicked", "key", a.call.key, "panic", v, "stack", string(debug.Stack()))
		}
		if err = errPanicked; !g.intake.AtMostOnce {
			err = keystate.Withdraw(err)
		}
	}()
	a.tape = newTape(a.w, g.intake.MaxResponse)
	r := a.call.readable(handlerContext{ctx, a.call.r.Context(), token})
	defer func() {
		if r.MultipartForm != nil && a.call.r.MultipartForm == nil { // net/http does it only for the request that it has made itself
			r.MultipartForm.RemoveAll()
		}
	}()
	a.next.ServeHTTP(a.tape.writer(), r)
	a.tape.finish()
	g.decide(a)
	return nil
}

// conclude ends a request whose handler has run. Its answer is given when it is what is stored, or when it is not to be stored and
// the key is forgotten: the run that called the handler, and may have failed since, need not be the one that the request has begun
// or joined.
func (g *guard) conclude(w http.ResponseWriter, a *attempt, run *keystate.Run[recording], err error) {
	var x recording
	if err == nil {
		x, err = run.Wait(context.WithoutCancel(a.call.r.Context()))
	}
	forgotten := errors.Is(err, keystate.ErrWithdrawn) || errors.Is(err, keystate.ErrMismatch) // by now the key is another request's
	switch {
	case a.panicked != nil:
		panic(a.panicked)
	case a.unsaved && forgotten, err == nil && a.gave(x.Response):
		a.tape.send()
	case a.tape.live():
		panic(http.ErrAbortHandler) // the client must not take what it has for an answer
	case err != nil:
		g.intake.turnDown(w, a.call.r, err)
	default:
		replayed(w)
		g.intake.give(w, a.call.r, x.Response)
	}
}

// share gives the answer of another request's run, or a saved one.
func (g *guard) share(w http.ResponseWriter, c *call, run *keystate.Run[recording]) {
	x, err := joined(g.intake, c.r.Context(), run)
	switch final := (*keystate.FinalError)(nil); {
	case errors.As(err, &final): // an operator ended it
		replayed(w)
		g.intake.turnDown(w, c.r, newProblem(AnswerNotKept, "There is no answer, and the request will not be done again: %s.", final.Reason))
	case err != nil:
		g.intake.turnDown(w, c.r, err)
	default:
		replayed(w)
		g.intake.give(w, c.r, x.Response)
	}
}

// handlerContext is a handler's: it ends with the engine, and knows what the request's knew.
type handlerContext struct {
	context.Context
	request context.Context
	token   string
}

// tokenInHand leads a handler to its token.
type tokenInHand struct{}

func (c handlerContext) Value(key any) any {
	if key == (tokenInHand{}) {
		return c.token
	}
	if v := c.Context.Value(key); v != nil {
		return v
	}
	return c.request.Value(key)
}

// Token returns what a handler behind Middleware passes on as the idempotency key of whatever it calls. It is the same as long as the key
// is not forgotten: not after a crash without AtMostOnce, nor after an answer that was not saved.
func Token(ctx context.Context) string {
	token, _ := ctx.Value(tokenInHand{}).(string)
	return token
}
