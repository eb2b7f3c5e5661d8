package keyhttp

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"

	"example.com/keystate"
)

// Transport is an [http.RoundTripper] that lets a client ask until it is answered: it mints an idempotency key for each
// unsafe request that has none, and sends the request again, with the same key and the same body, until the answer is
// final. The zero value works; it is safe for concurrent use, and its fields must not change while it is in use.
//
//	client := &http.Client{Transport: &keyhttp.Transport{}}
//
// The server has to know idempotency keys: one that ignores the header does the work once for each attempt.
//
// A minted key lives as long as the call. A program that must not pay twice even if it is killed in between mints the
// key itself ([keystate.NewID]), writes it down first and sets the header: Transport keeps it as it is and retries the
// request likewise. It is the same with a header whose value is a zero-length slice, which [http.Transport] takes for
// "idempotent, but send no key".
//
// # What is sent again
//
//   - A request without an answer (the connection was refused, lost, timed out), unless its context has ended.
//   - 409 with a Retry-After: the key is in flight (draft-ietf-httpapi-idempotency-key-header has 409 for
//     that). A bare 409 is the application's own conflict, and final.
//   - 425, 429, 500, 502, 503 and 504.
//   - Should-Retry or Stripe-Should-Retry, true or false, overrules the status: the server knows better
//     (https://docs.stripe.com/error-low-level#should-retry). If there are both, Should-Retry counts.
//   - Idempotent-Replayed: true overrules everything: the answer is saved, asking again gives the same one.
//
// Everything else is final. The last response is returned as it came, its body open, whether it is final or not. If
// there is none, the error is an [*UnansweredError]. A response is an answer once its header is there: when reading its
// body fails, the caller has to ask again, with the key that the response's Request has.
//
// # How long
//
// Between attempts Transport waits for an exponentially growing, jittered time, and at least as long as Retry-After
// asks for (RFC 9110, section 10.2.3: seconds or a date; what is neither is ignored). If the request's deadline would
// pass first, it returns what it has at once. The wait ends with the context. An [http.Client]'s Timeout is a deadline
// for all attempts together.
//
// # Bodies
//
// A request with GetBody, which [http.NewRequest] sets for bytes and strings, is sent again with what that returns. A
// body without it is read into memory before the first attempt. One of more than MaxBody bytes is streamed, and its
// request sent once, with its key: the answer or error of that only attempt is returned.
//
// [http.Transport] by itself repeats a request that has an Idempotency-Key when a kept-alive connection turns out to be
// dead. That is no attempt here, and the key is the same.
type Transport struct {
	// Base sends the attempts. Default: [http.DefaultTransport].
	Base http.RoundTripper

	// Methods are those of the requests that get a key and are retried; others go to Base untouched. Default: POST, PATCH.
	Methods []string

	// Attempts is how often a request is sent in all. Default: 5.
	Attempts int

	// Initial is the first pause, give or take half of it; each further one is twice as long, up to Max.
	// Default: 200 ms, 10 s.
	Initial, Max time.Duration

	// Patience is the longest Retry-After that is waited for; a longer one ends the retrying, and the response that
	// has it is returned. Default: 1 minute. If negative, none is waited for.
	Patience time.Duration

	// MaxBody is how many bytes of a body without GetBody are held in memory for the retries. Default: 1 MiB. If
	// negative, none: such bodies are streamed, as one must be that is written only as the response is read.
	MaxBody int64

	// Bare sends a minted key as it is, which is what Stripe's API documents. Default: as the structured
	// string of the draft (RFC 9651), in quotes.
	Bare bool

	// Retrying, if it is set, is told before each pause what came of the attempt, a response or an error, and how long
	// the pause is going to be. It may read the response's body, and must not keep it.
	Retrying func(sent *http.Request, resp *http.Response, err error, pause time.Duration)
}

// An UnansweredError is returned for a keyed request that ended without a response in hand. Whether the work was done
// is unknown; a request with the same key and the same body finds out.
//
// An [http.Client] wraps it, so [errors.As] finds it there, save for the client's own Timeout, of which it keeps
// the text alone: where the key matters, give the request a context with a deadline instead.
type UnansweredError struct {
	Key      string // as it was sent: the value of the Idempotency-Key header
	Attempts int    // how often it was sent
	Err      error  // what came of the last attempt, joined with what kept the next one from being made, such as the context
}

func (e *UnansweredError) Error() string {
	return fmt.Sprintf("keyhttp: no answer for Idempotency-Key %s after attempt %d: %v", e.Key, e.Attempts, e.Err)
}

func (e *UnansweredError) Unwrap() error { return e.Err }

// Timeout makes the Timeout of the [net/url.Error] around it tell the truth, which asks the outermost error only.
func (e *UnansweredError) Timeout() bool {
	var timeout interface{ Timeout() bool }
	return errors.As(e.Err, &timeout) && timeout.Timeout()
}

// What is read of a response that is dropped, so that its connection can be used again. Beyond this, a new connection is
// cheaper.
const retryDrain = 64 << 10

// RoundTrip implements [http.RoundTripper].
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if !slices.Contains(t.methods(), cmp.Or(req.Method, http.MethodGet)) {
		return t.base().RoundTrip(req)
	}
	body, err := retryHold(req, cmp.Or(t.MaxBody, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("keyhttp: nothing was sent: read the request's body to be able to send it again: %w", err)
	}
	key, own := retryOwnKey(req)
	if !own {
		key = t.mint(req)
	}
	ctx, pauses := req.Context(), t.pauses()
	for attempt := 1; ; attempt++ {
		unanswered := func(err error) error { return &UnansweredError{Key: key, Attempts: attempt, Err: err} }
		sent := retryRequest(req)
		if !own {
			sent.Header.Set(keyHeader, key)
		}
		body.attach(sent)
		resp, err := t.base().RoundTrip(sent)

		wait, again := retryVerdict(resp, err)
		pause := max(wait, min(pauses.NextBackOff(), t.longest()))
		if !again || attempt >= cmp.Or(t.Attempts, 5) || body.again == nil ||
			wait > max(cmp.Or(t.Patience, time.Minute), 0) || retryTooLate(ctx, pause) {
			if err != nil {
				return nil, unanswered(err)
			}
			return resp, nil
		}
		if t.Retrying != nil {
			t.Retrying(sent, resp, err, pause)
		}
		if ended := retryPause(ctx, resp, pause); ended != nil {
			return nil, unanswered(errors.Join(ended, retryCause(resp, err)))
		}
		last := retryCause(resp, err)
		if body.next, err = body.again(); err != nil {
			return nil, unanswered(errors.Join(fmt.Errorf("get the body for the next attempt: %w", err), last))
		}
	}
}

// CloseIdleConnections passes the call of [http.Client.CloseIdleConnections] on to Base.
func (t *Transport) CloseIdleConnections() {
	if base, ok := t.base().(interface{ CloseIdleConnections() }); ok {
		base.CloseIdleConnections()
	}
}

func (t *Transport) base() http.RoundTripper {
	if t.Base == nil {
		return http.DefaultTransport
	}
	return t.Base
}

func (t *Transport) methods() []string {
	if len(t.Methods) == 0 {
		return []string{http.MethodPost, http.MethodPatch}
	}
	return t.Methods
}

func (t *Transport) longest() time.Duration { return cmp.Or(t.Max, 10*time.Second) }

func (t *Transport) pauses() *backoff.ExponentialBackOff {
	return &backoff.ExponentialBackOff{
		InitialInterval: cmp.Or(t.Initial, 200*time.Millisecond), MaxInterval: t.longest(),
		Multiplier: 2, RandomizationFactor: backoff.DefaultRandomizationFactor,
	}
}

// mint returns the value for the header of a request that has none. A keyed request that a redirect sends elsewhere is
// still the same one: an http.Client takes the caller's headers along, among which a minted key is not.
func (t *Transport) mint(req *http.Request) string {
	if from := req.Response; from != nil && from.Request != nil && retryKeepsMethod(from.StatusCode) {
		if key := from.Request.Header.Get(keyHeader); key != "" {
			return key
		}
	}
	if t.Bare {
		return keystate.NewID()
	}
	return `"` + keystate.NewID() + `"`
}

func retryKeepsMethod(redirect int) bool {
	return redirect == http.StatusTemporaryRedirect || redirect == http.StatusPermanentRedirect
}

// retryOwnKey returns the key that the caller set, however its name is spelled in the map.
func retryOwnKey(req *http.Request) (key string, own bool) {
	for name, values := range req.Header {
		if http.CanonicalHeaderKey(name) == keyHeader {
			return strings.Join(values, ", "), true
		}
	}
	return "", false
}

// retryRequest is what an attempt may change: a RoundTripper must not modify the caller's request. The trailers alone
// remain the caller's, who fills them in while the body is read.
func retryRequest(req *http.Request) *http.Request {
	sent := req.Clone(req.Context())
	sent.Trailer = req.Trailer
	if sent.Header == nil {
		sent.Header = make(http.Header)
	}
	return sent
}

// A retryBody is a request's body, for each attempt anew.
type retryBody struct {
	next  io.ReadCloser
	again func() (io.ReadCloser, error) // nil: there is no other attempt
}

func (b *retryBody) attach(sent *http.Request) {
	sent.Body = b.next
	if b.next != nil && b.next != http.NoBody {
		sent.GetBody = b.again
	}
}

// retryHold makes the body of req one that can be sent again, if it has at most limit bytes. It closes it if it fails
// or has read it to its end; otherwise that is for the first attempt to do. While it reads, the end of the context
// closes the body, so that a body that gives nothing more, such as a pipe, is not waited for.
func retryHold(req *http.Request, limit int64) (*retryBody, error) {
	switch {
	case req.Body == nil || req.Body == http.NoBody:
		return &retryBody{req.Body, func() (io.ReadCloser, error) { return req.Body, nil }}, nil
	case req.GetBody != nil:
		return &retryBody{req.Body, req.GetBody}, nil
	case limit < 0 || req.ContentLength > limit:
		return &retryBody{req.Body, nil}, nil
	}
	cut := context.AfterFunc(req.Context(), func() { req.Body.Close() })
	held, err := io.ReadAll(io.LimitReader(req.Body, min(limit, math.MaxInt64-1)+1))
	switch {
	case !cut():
		return nil, context.Cause(req.Context())
	case err != nil:
		req.Body.Close()
		return nil, err
	case int64(len(held)) > limit:
		return &retryBody{retryStream{io.MultiReader(bytes.NewReader(held), req.Body), req.Body}, nil}, nil
	}
	req.Body.Close()
	again := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(held)), nil }
	first, _ := again()
	return &retryBody{first, again}, nil
}

// A retryStream is a body of which the beginning has been read already.
type retryStream struct {
	io.Reader
	io.Closer
}

// retryVerdict says whether what came of an attempt is worth another one, and how long the server wants it to wait.
// The rules and their sources are those of [Transport].
func retryVerdict(resp *http.Response, err error) (wait time.Duration, again bool) {
	if err != nil {
		return 0, true
	}
	if resp == nil { // against the contract of Base, and http.Client has the error for it
		return 0, false
	}
	wait, asked := retryAfter(resp.Header, time.Now())
	if retryTrue(resp.Header.Get(replayedHeader)) {
		return wait, false
	}
	for _, hint := range []string{ShouldRetryHeader, "Stripe-Should-Retry"} {
		switch value := resp.Header.Get(hint); {
		case retryTrue(value):
			return wait, true
		case strings.EqualFold(value, "false"):
			return wait, false
		}
	}
	switch resp.StatusCode {
	case http.StatusConflict:
		return wait, asked
	case http.StatusTooEarly, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return wait, true
	}
	return wait, false
}

func retryTrue(value string) bool { return strings.EqualFold(value, "true") }

// retryAfter reads Retry-After = HTTP-date / delay-seconds (RFC 9110, section 10.2.3). A date is counted from the
// response's own Date if there is one, so that a client whose clock is wrong waits as long as any other. What is past is
// no wait; what is too large for a Duration is the longest one.
func retryAfter(h http.Header, now time.Time) (wait time.Duration, valid bool) {
	value := strings.Trim(h.Get("Retry-After"), " \t")
	seconds, err := strconv.ParseUint(value, 10, 64)
	switch {
	case err == nil && seconds <= uint64(math.MaxInt64/time.Second):
		return time.Duration(seconds) * time.Second, true
	case err == nil || errors.Is(err, strconv.ErrRange):
		return math.MaxInt64, true
	}
	date, err := http.ParseTime(value)
	if err != nil {
		return 0, false
	}
	if sent, err := http.ParseTime(h.Get("Date")); err == nil {
		now = sent
	}
	return max(date.Sub(now), 0), true
}

// retryTooLate says that no attempt can follow a pause: what there is, is the last answer.
func retryTooLate(ctx context.Context, pause time.Duration) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && time.Until(deadline) <= pause
}

// retryPause lets go of the response, if there is one, and waits. It returns why the context ended, if it did first.
func retryPause(ctx context.Context, resp *http.Response, pause time.Duration) error {
	over, cancel := context.WithTimeout(ctx, pause)
	defer cancel()
	if resp != nil {
		retryDrop(over, resp.Body)
	}
	<-over.Done()
	return context.Cause(ctx)
}

// retryDrop reads the rest of a body and closes it, so that its connection can be used again. One that is too long,
// or does not end before ctx does, costs the connection instead.
func retryDrop(ctx context.Context, body io.ReadCloser) {
	cut := context.AfterFunc(ctx, func() { body.Close() })
	io.CopyN(io.Discard, body, retryDrain)
	if cut() {
		body.Close()
	}
}

// retryCause is what came of an attempt, as an error.
func retryCause(resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("the last answer was %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
}
