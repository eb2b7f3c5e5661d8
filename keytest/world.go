package keytest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A World plays the other side of effects: it does what it is asked to do, once per token, and remembers. Its zero value is
// a well-behaved one; the fields make it what other sides are in earnest. It is safe for concurrent use; the fields are
// set before it is used.
type World struct {
	// TokenLife is how long a token is honoured, from the deed that it came with. Then it is forgotten, and the same request
	// under it is done again. Default: for ever.
	TokenLife time.Duration

	// IgnoresTokens makes it do again whatever it is asked again.
	IgnoresTokens bool

	// Delay is how long a deed takes: half of it before it is done, half of it before the answer. Whoever does not wait so long is not
	// told. Default: none.
	Delay time.Duration

	mu     sync.Mutex
	deeds  []Deed
	times  map[string]int // of each request: deeds
	fails  int
	loses  int
	wrongs []wrong
}

// A Deed is something that the world has done.
type Deed struct {
	Token   string
	Request string
	Receipt string    // what was answered: the request, and how often it has been done by then
	At      time.Time // when it was done
	Asked   int       // how often it was asked for under this token
}

// A wrong is something that no effect may do to the world.
type wrong struct{ what, cause string }

// ErrLost is what the world answers when it has done what it was asked to, and its answer gets lost.
var ErrLost = errors.New("keytest: the answer was lost")

// ErrFailed is what the world answers when it has done nothing.
var ErrFailed = errors.New("keytest: the world failed")

// Do does what is requested unless it was done under this token, and returns a receipt: the same for the same token. The request is any
// text that says what is to be done. A token that comes again with another request is an error, as it is with Stripe.
func (w *World) Do(ctx context.Context, token, request string) (receipt string, err error) {
	if point, inside := ctx.Value(commitOf{}).(string); inside {
		w.blame(fmt.Sprintf("the commit of %s acts on the world: %q", point, request), "a commit may run more than once, and be undone: act in the Effect")
	}
	if err := pause(ctx, w.Delay/2); err != nil {
		return "", err
	}
	if receipt, err = w.act(token, request); err != nil {
		return "", err
	}
	return receipt, pause(ctx, w.Delay-w.Delay/2)
}

func pause(ctx context.Context, d time.Duration) error {
	if d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

func (w *World) act(token, request string) (receipt string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fails > 0 {
		w.fails--
		return "", ErrFailed
	}
	d := w.remembered(token)
	switch {
	case d == nil || w.IgnoresTokens:
		d = w.doLocked(token, request)
	case d.Request != request:
		w.blameLocked(fmt.Sprintf("a token came with %q, and again with %q", d.Request, request),
			"the effect makes what it sends anew at every attempt: a clock, a random number, memory; take it from the state, where an earlier phase has put it")
		return "", fmt.Errorf("keytest: the token was used for %q", d.Request)
	}
	d.Asked++
	receipt = d.Receipt
	if w.loses > 0 {
		w.loses--
		return "", ErrLost
	}
	return receipt, nil
}

// remembered returns the last deed under a token that the world has not forgotten, or nil.
func (w *World) remembered(token string) *Deed {
	for i := len(w.deeds) - 1; i >= 0; i-- {
		d := &w.deeds[i]
		if d.Token == token && (w.TokenLife == 0 || time.Since(d.At) < w.TokenLife) {
			return d
		}
	}
	return nil
}

func (w *World) doLocked(token, request string) *Deed {
	if w.times == nil {
		w.times = map[string]int{}
	}
	w.times[request]++
	w.deeds = append(w.deeds, Deed{Token: token, Request: request, Receipt: fmt.Sprintf("%s #%d", request, w.times[request]), At: time.Now()})
	return &w.deeds[len(w.deeds)-1]
}

// Find returns the receipt of what was done under a token, as a Reconcile asks for it. A world that ignores tokens finds
// them all the same; one that has forgotten a token finds nothing.
func (w *World) Find(token string) (receipt string, done bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d := w.remembered(token); d != nil {
		return d.Receipt, true
	}
	return "", false
}

// FailNext makes the next n requests come to nothing: each gets [ErrFailed].
func (w *World) FailNext(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fails = n
}

// LoseNext makes the world do the next n requests and lose its answers: each gets [ErrLost].
func (w *World) LoseNext(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.loses = n
}

// Deeds returns what was done, in order.
func (w *World) Deeds() []Deed {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Deed(nil), w.deeds...)
}

// counts is how often each request was done.
func (w *World) counts() map[string]int {
	counts := map[string]int{}
	for _, d := range w.Deeds() {
		counts[d.Request]++
	}
	return counts
}

func (w *World) blame(what, cause string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.blameLocked(what, cause)
}

func (w *World) blameLocked(what, cause string) { w.wrongs = append(w.wrongs, wrong{what, cause}) }

// commitOf marks the context that a commit gets, with the point it leads to.
type commitOf struct{}
