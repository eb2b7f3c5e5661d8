package keyhttp

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"example.com/keystate"
)

// The types of problems, each behind Options.ProblemBase.
const (
	KeyMissing       = "key-missing"        // 400: the request needs a key
	KeyMalformed     = "key-malformed"      // 400: empty, too long, of forbidden characters, or more than one
	KeyAmbiguous     = "key-ambiguous"      // 400: header and query parameter name different keys
	KeyExpired       = "key-expired"        // 400: minted too long ago, and not known
	KeyReused        = "key-reused"         // 422: the key was used for another request
	KeyInFlight      = "key-in-flight"      // 409: the request is being worked on; ask again
	RequestInvalid   = "request-invalid"    // 400: Decode did not take it
	RequestTooLarge  = "request-too-large"  // 413: beyond Options.MaxBody, or the engine's MaxState
	ScopeUnknown     = "scope-unknown"      // 401: it is not known who asks
	MethodNotAllowed = "method-not-allowed" // 405: none of Options.Methods
	AnswerNotKept    = "answer-not-kept"    // 410: the request is done, and its answer could not be kept
	Interrupted      = "interrupted"        // 503: the work stopped short of its end and goes on by itself; ask again
	Parked           = "parked"             // 500: the work stopped short of its end until an operator has looked
	Unavailable      = "unavailable"        // 503: the store cannot take the key, so nothing was done; ask again
)

// ShouldRetryHeader says whether it makes sense to send the request again, under the same key: "true" or "false". It is on every problem.
// Stripe's Stripe-Should-Retry says the same.
const ShouldRetryHeader = "Should-Retry"

// statuses are those of the problems that we tell ourselves.
var statuses = map[string]int{
	KeyMissing: 400, KeyMalformed: 400, KeyAmbiguous: 400, KeyExpired: 400, KeyReused: 422, KeyInFlight: 409, RequestInvalid: 400,
	RequestTooLarge: 413, ScopeUnknown: 401, MethodNotAllowed: 405, AnswerNotKept: 410, Interrupted: 503, Parked: 500, Unavailable: 503,
}

var titles = map[string]string{
	KeyMissing:       "The request needs an idempotency key",
	KeyMalformed:     "The idempotency key is malformed",
	KeyAmbiguous:     "The request names two idempotency keys",
	KeyExpired:       "The idempotency key has expired",
	KeyReused:        "The idempotency key was used for another request",
	KeyInFlight:      "The request is being worked on",
	RequestInvalid:   "The request is invalid",
	RequestTooLarge:  "The request is too large",
	ScopeUnknown:     "It is not known who asks",
	MethodNotAllowed: "The method is not allowed",
	AnswerNotKept:    "The answer was not kept",
	Interrupted:      "The work was interrupted and goes on",
	Parked:           "The work was stopped",
	Unavailable:      "The service cannot take the request",
}

// A Problem is an answer that is an error, as RFC 9457 has it. [Endpoint].Decode and [Options].Scope return one to say what is
// wrong; it is sent as it is, and never stored.
type Problem struct {
	Type     string `json:"type"` // a URI; without a scheme it is put behind Options.ProblemBase. Default: "about:blank"
	Title    string `json:"title,omitempty"`
	Status   int    `json:"status"` // Default: 400
	Detail   string `json:"detail,omitempty"`
	Instance string `json:"instance,omitempty"`

	// RetryAfter says that it makes sense to send the same again, and when, in whole seconds. Default: it makes none.
	RetryAfter time.Duration `json:"-"`

	cause error // for the log
}

func (p *Problem) Error() string {
	return fmt.Sprintf("%d %s: %s", p.Status, p.Type, cmp.Or(p.Detail, p.Title))
}

func (p *Problem) Unwrap() error { return p.cause }

func newProblem(kind, format string, args ...any) *Problem {
	return &Problem{Type: kind, Title: titles[kind], Status: statuses[kind], Detail: fmt.Sprintf(format, args...)}
}

func (o *Options) expired() *Problem {
	return newProblem(KeyExpired, "The key was minted more than %s ago and has not been used, or its answer has been forgotten since. If you do not know what became of the request, find out before you send it with a new key.", o.KeyLife)
}

// problemOf is what a client is told of an error that is not the application's answer.
func (o *Options) problemOf(err error) *Problem {
	var given *Problem
	var stopped *keystate.PhaseError
	again, cause := o.RetryAfter, err
	p := newProblem(Unavailable, "The request was not taken, or what came of it was not kept. Send the same request again, with the same key.")
	switch {
	case errors.As(err, &given):
		return given
	case errors.Is(err, keystate.ErrMismatch):
		p, again = newProblem(KeyReused, "The key was used before, for a request that differs from this one. Send the same request as then, or a new key."), 0
	case errors.Is(err, keystate.ErrInProgress):
		p = newProblem(KeyInFlight, "A request with this key is being worked on. Send the same request again, with the same key.")
	case errors.Is(err, keystate.ErrInvalidKey):
		p, again = newProblem(KeyMalformed, "%v.", err), 0
	case errors.Is(err, keystate.ErrTooLarge) && !errors.As(err, &stopped):
		p, again = newProblem(RequestTooLarge, "The request is larger than can be stored."), 0
	case errors.Is(err, keystate.ErrParked):
		p, again = newProblem(Parked, "The request was begun and could not be carried to its end; what was done is kept. It goes on when an operator has looked. The same key will then give the answer."), 0
	case errors.As(err, &stopped):
		p = newProblem(Interrupted, "The request was begun and stopped short of its end; what was done is kept, and it goes on by itself. Send the same request again, with the same key, to learn the answer.")
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		p = newProblem(Interrupted, "The answer took too long; the work goes on. Send the same request again, with the same key, to learn the answer.")
	}
	p.RetryAfter, p.cause = again, cause
	return p
}

// refuse sends a problem.
func (o *Options) refuse(w http.ResponseWriter, r *http.Request, p *Problem) {
	q := *p
	q.Status = cmp.Or(q.Status, http.StatusBadRequest)
	if q.Status >= http.StatusInternalServerError && r.Context().Err() == nil { // of a client that is gone there is nothing to tell
		o.Logger.LogAttrs(r.Context(), levelOf(q.Status), "keyhttp: request refused", attributes(r, &q)...)
	}
	switch u, err := url.Parse(q.Type); {
	case q.Type == "":
		q.Type = "about:blank" // RFC 9457, section 4.2.1
	case err != nil || u.Scheme == "":
		q.Type = o.ProblemBase + q.Type
	}
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set(ShouldRetryHeader, strconv.FormatBool(q.RetryAfter > 0))
	if q.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(q.RetryAfter.Seconds()))))
	}
	if o.WriteProblem != nil {
		o.WriteProblem(w, r, &q)
		return
	}
	writeProblem(w, &q)
}

func writeProblem(w http.ResponseWriter, p *Problem) {
	body, err := json.Marshal(p)
	if err != nil {
		http.Error(w, p.Title, p.Status)
		return
	}
	body = append(body, '\n')
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(p.Status)
	w.Write(body)
}
