package keyhttp

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
	"time"
)

// Options are what [Handle] and [Middleware] have in common. Only Scope must be given; zero values mean the defaults.
type Options struct {
	// Scope says who asks: the account or tenant that the request was authenticated for. Keys of different scopes never meet, so
	// that nobody is given another's answer. An error is the answer: a [*Problem] as it is, any other as 401. So is an empty
	// scope; [Public] is for endpoints that have no callers to tell apart. It must not read the body.
	Scope func(*http.Request) (string, error)

	// Methods are the request methods that need a key. Others pass through Middleware, and are 405 at Handle. Default: POST, PATCH.
	Methods []string

	// Optional lets requests come without a key: Middleware passes them on without protection, Handle mints a key and tells it in
	// the answer. Default: 400.
	Optional bool

	// Strict accepts nothing but the draft's structured string: "8e03…" with its quotes. Default: the bare value as well.
	Strict bool

	// QueryParameter is a parameter of the URL that may carry the key instead of the header, for clients that cannot set one. URLs are
	// logged in many places. Default: none.
	QueryParameter string

	// KeyLife refuses keys that are UUIDv7 and were minted longer ago, unless they are known. It makes minted keys expire that
	// were never used, and keeps a retry that comes after its key's retention from being taken for a new request. Default: any age.
	KeyLife time.Duration

	// CompareHeaders are the request headers that a retry must repeat. Default: Content-Type.
	CompareHeaders []string

	// CanonicalJSON compares JSON bodies by what they say: order of names and white space do not matter. Default: byte for byte.
	CanonicalJSON bool

	// MaxBody is the largest request body, in bytes. It is held in memory. Default: 1 MiB.
	MaxBody int64

	// MaxResponse is the largest answer, body and headers, that is stored, in bytes. A larger one is given once; retries get
	// [AnswerNotKept]. With the state it must fit into keystate's Options.MaxState. Default: 1 MiB.
	MaxResponse int

	// KeepHeaders are response headers that are stored, besides those that describe the content. Set-Cookie and headers of
	// authentication are never stored.
	KeepHeaders []string

	// Seal changes an answer before it is stored, to redact or to encrypt it, and Open undoes that, if it can be undone, before the
	// answer is given again. Handle gives the first answer, too, from what is stored. Default: it is stored as it is.
	Seal, Open func(Response) (Response, error)

	// Wait is how long a request whose key is in flight waits for the answer. Default: not at all, it gets 409.
	Wait time.Duration

	// MaxWaiters is how many requests wait at a time; others get 409 at once. Default: 1000.
	MaxWaiters int

	// RetryAfter is when clients are told to ask again, in whole seconds. Default: 1 s.
	RetryAfter time.Duration

	// ProblemBase is what the types of problems begin with: where their documentation is. Default: "https://example.com/keystate/problems/".
	ProblemBase string

	// WriteProblem writes a problem in a form of the API's own. Its type is whole by then, its status set, and the headers Should-Retry and
	// Retry-After are. Default: as RFC 9457 has it.
	WriteProblem func(w http.ResponseWriter, r *http.Request, p *Problem)

	// Logger gets what leads to an answer of 500 and above. Default: slog.Default().
	Logger *slog.Logger

	// AtMostOnce, of Middleware only, is for handlers that must not run again when a crash or a panic cut them off: the key is parked as
	// [keystate.Indeterminate] until an operator has looked. Default: it is forgotten, and the client's retry runs the handler again.
	AtMostOnce bool

	// Save, of Middleware only, says which answers are stored. One that is not is given once, and its key is forgotten. Default:
	// all but rejections (307, 308, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 425, 429) and, without AtMostOnce, 5xx.
	Save func(status int) bool
}

// Public is the scope of everybody. Whoever knows or guesses a key is given its answer: only for endpoints that have no
// secrets and no callers to tell apart.
func Public(*http.Request) (string, error) { return "public", nil }

// described are the response headers that are always stored: they say what the body is, or where.
var described = []string{
	"Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Content-Location", "Content-Type", "Etag",
	"Expires", "Last-Modified", "Link", "Location", "Retry-After", "Vary",
}

// secret are the response headers that are never stored: they are meant for one answer to one client.
var secret = []string{
	"Authentication-Info", "Authorization", "Proxy-Authenticate", "Proxy-Authentication-Info", "Proxy-Authorization",
	"Set-Cookie", "Set-Cookie2", "Www-Authenticate",
}

// rejections are the statuses with which handlers turn requests away, or send them elsewhere, before they have done anything.
var rejections = []int{307, 308, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 425, 429}

// orDefault fills in the defaults, and finds all faults at once.
func (o Options) orDefault() (Options, error) {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf("keyhttp: "+format, args...)) }
	if o.Scope == nil {
		fault("Options.Scope is missing; Public is for endpoints without callers to tell apart")
	}
	if (o.Seal == nil) && (o.Open != nil) {
		fault("Options.Open undoes Seal, and there is none")
	}
	for _, d := range []struct {
		name  string
		value int64
	}{
		{"KeyLife", int64(o.KeyLife)}, {"MaxBody", o.MaxBody}, {"MaxResponse", int64(o.MaxResponse)}, {"Wait", int64(o.Wait)},
		{"MaxWaiters", int64(o.MaxWaiters)}, {"RetryAfter", int64(o.RetryAfter)},
	} {
		if d.value < 0 {
			fault("Options.%s is negative", d.name)
		}
	}
	o.KeepHeaders = canonicalNames(append(slices.Clone(described), o.KeepHeaders...))
	for _, name := range o.KeepHeaders {
		if slices.Contains(secret, name) {
			fault("Options.KeepHeaders: %s is meant for one answer and is never stored", name)
		}
	}
	if o.CompareHeaders == nil {
		o.CompareHeaders = []string{"Content-Type"}
	}
	o.CompareHeaders = canonicalNames(o.CompareHeaders)
	if o.Methods == nil {
		o.Methods = []string{http.MethodPost, http.MethodPatch}
	}
	o.MaxBody = cmp.Or(o.MaxBody, 1<<20)
	o.MaxResponse = cmp.Or(o.MaxResponse, 1<<20)
	o.MaxWaiters = cmp.Or(o.MaxWaiters, 1000)
	o.RetryAfter = cmp.Or(o.RetryAfter, time.Second)
	o.ProblemBase = cmp.Or(o.ProblemBase, "https://example.com/keystate/problems/")
	o.Logger = cmp.Or(o.Logger, slog.Default())
	if o.Save == nil {
		atMostOnce := o.AtMostOnce
		o.Save = func(status int) bool { return !slices.Contains(rejections, status) && (status < 500 || atMostOnce) }
	}
	return o, errors.Join(faults...)
}

// canonicalNames spells header names as net/http keeps them, in order, each once.
func canonicalNames(names []string) []string {
	spelled := make([]string, len(names))
	for i, name := range names {
		spelled[i] = textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name))
	}
	slices.Sort(spelled)
	return slices.Compact(spelled)
}
