package keyhttp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"

	"example.com/keystate"
)

// An intake is where requests come in: what Handle and Middleware do alike before and after the work.
type intake struct {
	Options
	waiting chan struct{} // holds a token for each request that waits for another's run
}

func newIntake(o Options) (*intake, error) {
	o, err := o.orDefault()
	if err != nil {
		return nil, err
	}
	return &intake{Options: o, waiting: make(chan struct{}, o.MaxWaiters)}, nil
}

// keyed says whether a request needs a key.
func (in *intake) keyed(r *http.Request) bool { return slices.Contains(in.Methods, r.Method) }

// A call is a request that has a key.
type call struct {
	key    keystate.Key
	digest []byte
	r      *http.Request // whose body has been read
	body   []byte
}

// errNoKey says that a request has no key, and needs none.
var errNoKey = errors.New("keyhttp: the request has no key")

// take reads a request. What is wrong with it is told before anything is claimed.
func (in *intake) take(w http.ResponseWriter, r *http.Request) (*call, error) {
	s, problem := in.spelledKey(r)
	if problem == nil && s.id == "" && in.Optional {
		return nil, errNoKey // and needs no scope
	}
	scope, err := in.scope(r)
	switch {
	case err != nil:
		return nil, err
	case problem != nil:
		return nil, problem
	case s.id == "":
		return nil, newProblem(KeyMissing, "Send the header Idempotency-Key with a value of your own that is unique to this request, such as a UUID, and the same value when you repeat the request.")
	}
	w.Header().Set(keyHeader, s.raw)
	return in.withKey(w, r, keystate.Key{Scope: scope, ID: s.id})
}

func (in *intake) scope(r *http.Request) (string, error) {
	scope, err := in.Scope(r)
	var given *Problem
	switch {
	case errors.As(err, &given):
		return "", given
	case err != nil:
		p := newProblem(ScopeUnknown, "The request says not who asks, or not in a way that is accepted.")
		p.cause = err
		return "", p
	case scope == "":
		return "", newProblem(ScopeUnknown, "The request says not who asks.")
	}
	return scope, nil
}

// withKey reads the body, and so knows the request.
func (in *intake) withKey(w http.ResponseWriter, r *http.Request, key keystate.Key) (*call, error) {
	if r.ContentLength > in.MaxBody { // before a client that expects 100-continue begins to send it
		return nil, tooLarge(in.MaxBody)
	}
	body, err := in.read(w, r)
	if beyond := (*http.MaxBytesError)(nil); errors.As(err, &beyond) {
		return nil, tooLarge(beyond.Limit)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		p := newProblem(RequestInvalid, "The body could not be read to its end.")
		p.cause = err
		return nil, p
	}
	if err != nil || len(body) == 0 && (len(r.PostForm) > 0 || r.MultipartForm != nil) {
		p := newProblem(Unavailable, "The request cannot be told from another one.")
		p.cause = errBodyGone
		return nil, p
	}
	// The engine keeps the key for longer than the request lasts, and some servers lend out the memory of their strings.
	key = keystate.Key{Scope: strings.Clone(key.Scope), ID: strings.Clone(key.ID)}
	return &call{key: key, digest: in.digest(r, body), r: r, body: body}, nil
}

// readable is the request as it was, for those who have to read it: within a context, from its beginning, with its key.
func (c *call) readable(ctx context.Context) *http.Request {
	r := c.r.WithContext(context.WithValue(ctx, callInHand{}, c))
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(c.body)), int64(len(c.body))
	return r
}

// read reads a body to its end. Of one that has been read before, nothing is left: io.EOF.
func (in *intake) read(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.Body == nil {
		return nil, nil
	}
	limited := http.MaxBytesReader(w, r.Body, in.MaxBody)
	if r.ContentLength <= 0 { // it may still have one
		return io.ReadAll(limited)
	}
	body := make([]byte, r.ContentLength)
	_, err := io.ReadFull(limited, body)
	return body, err
}

var errBodyGone = errors.New("keyhttp: the body was read before it came here: what reads it, such as FormValue, must not come first")

func tooLarge(limit int64) *Problem {
	return newProblem(RequestTooLarge, "The body has more than %d bytes.", limit)
}

// callInHand leads from a request to its call.
type callInHand struct{}

// KeyOf returns the key of a request that Handle or Middleware has let in, for [Endpoint].Decode and for handlers; otherwise the zero Key.
func KeyOf(r *http.Request) keystate.Key {
	if c, ok := r.Context().Value(callInHand{}).(*call); ok {
		return c.key
	}
	return keystate.Key{}
}

// asExchange is what tells the call's request from another.
func asExchange[S any](c *call, s S) Exchange[S] { return Exchange[S]{Request: c.digest, State: s} }

// joined waits for the answer of a run that is not the caller's own, as long as the options allow.
func joined[S any](in *intake, ctx context.Context, run *keystate.Run[Exchange[S]]) (x Exchange[S], err error) {
	select {
	case <-run.Done():
	default:
		if in.Wait == 0 {
			return x, keystate.ErrInProgress
		}
		select {
		case in.waiting <- struct{}{}:
			defer func() { <-in.waiting }()
		default:
			return x, keystate.ErrInProgress
		}
		patience, cancel := context.WithTimeoutCause(ctx, in.Wait, keystate.ErrInProgress)
		defer cancel()
		select {
		case <-run.Done():
		case <-patience.Done():
			return x, context.Cause(patience)
		}
	}
	x, err = run.Wait(ctx)
	if errors.Is(err, keystate.ErrWithdrawn) { // there is no answer to share
		return x, keystate.ErrInProgress
	}
	return x, err
}

// replayed says of an answer that the request has not caused it.
func replayed(w http.ResponseWriter) { w.Header().Set(replayedHeader, "true") }

// give sends a stored answer.
func (in *intake) give(w http.ResponseWriter, r *http.Request, stored *Response) {
	answer, problem := in.open(stored)
	if problem != nil {
		in.refuse(w, r, problem)
		return
	}
	answer.send(w)
}

// turnDown tells of an error that is not the application's answer.
func (in *intake) turnDown(w http.ResponseWriter, r *http.Request, err error) {
	in.refuse(w, r, in.problemOf(err))
}

func levelOf(status int) slog.Level {
	if status == http.StatusServiceUnavailable {
		return slog.LevelWarn
	}
	return slog.LevelError
}

func attributes(r *http.Request, p *Problem) []slog.Attr {
	a := []slog.Attr{
		slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", p.Status),
		slog.String("type", strings.TrimSpace(p.Type)), slog.String("detail", p.Detail),
	}
	if p.cause != nil {
		a = append(a, slog.Any("error", p.cause))
	}
	return a
}
