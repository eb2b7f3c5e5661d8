package keyhttp

import (
	"bytes"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
)

// A Response is an answer as it is stored.
type Response struct {
	Status int         `msgpack:"status"`
	Header http.Header `msgpack:"header,omitempty"` // what Options.KeepHeaders lets through
	Body   []byte      `msgpack:"body,omitempty"`

	// Omitted says that the answer was given once, and only its status is kept: it was larger than Options.MaxResponse, or Seal
	// failed, or it broke off.
	Omitted bool `msgpack:"omitted,omitempty"`
}

func (a *Response) equal(b *Response) bool {
	return a != nil && b != nil && a.Status == b.Status && a.Omitted == b.Omitted && bytes.Equal(a.Body, b.Body) &&
		maps.EqualFunc(a.Header, b.Header, slices.Equal)
}

// An Exchange is what is stored for a key: what tells its request from another, the machine's own state, and the answer when there is one.
type Exchange[S any] struct {
	Request  []byte    `msgpack:"request"`
	State    S         `msgpack:"state"`
	Response *Response `msgpack:"response,omitempty"`
}

// Fingerprint lets a retry be recognized by what the client sent, whatever became of it in the state.
func (x *Exchange[S]) Fingerprint() []byte { return x.Request }

// A recorder is a ResponseWriter that only remembers.
type recorder struct {
	header http.Header // as the handler changes it
	sent   http.Header // as it was when the status was written
	status int
	body   bytes.Buffer
}

func newRecorder() *recorder { return &recorder{header: http.Header{}} }

func (r *recorder) Header() http.Header { return r.header }

// WriteHeader panics at what is no status, as net/http does: stored, it would panic at every retry.
func (r *recorder) WriteHeader(status int) {
	switch {
	case r.status != 0: // the first one counts
	case status < 100 || status > 999:
		panic(fmt.Sprintf("keyhttp: %d is no status of an answer", status))
	case status >= 200: // what comes before is informational
		r.status, r.sent = status, r.header.Clone()
	}
}

func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
	return r.body.Write(b)
}

// finish ends the answer as net/http would.
func (r *recorder) finish() {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
	if _, given := r.sent["Content-Type"]; !given && r.body.Len() > 0 && r.sent.Get("Content-Encoding") == "" {
		r.sent.Set("Content-Type", http.DetectContentType(r.body.Bytes()))
	}
}

// keeps says whether a response header is stored.
func (o *Options) keeps(name string) bool {
	_, found := slices.BinarySearch(o.KeepHeaders, name)
	return found
}

// keep makes of an answer what is stored of it.
func (o *Options) keep(status int, header http.Header, body []byte) (*Response, error) {
	kept := Response{Status: status, Body: body}
	size := len(body)
	for name, values := range header {
		if !o.keeps(name) || len(values) == 0 {
			continue
		}
		if kept.Header == nil {
			kept.Header = http.Header{}
		}
		kept.Header[name] = values
		for _, v := range values {
			size += len(name) + len(v)
		}
	}
	if size > o.MaxResponse {
		return &Response{Status: status, Omitted: true}, nil
	}
	if o.Seal != nil {
		kept.Header, kept.Body = kept.Header.Clone(), bytes.Clone(body) // Seal may work in place, and the first answer is still to be sent
		sealed, err := o.Seal(kept)
		if err != nil {
			return nil, fmt.Errorf("keyhttp: seal the answer: %w", err)
		}
		kept = sealed
	}
	return &kept, nil
}

// open makes of what is stored what is sent.
func (o *Options) open(stored *Response) (Response, *Problem) {
	if stored.Omitted {
		return Response{}, newProblem(AnswerNotKept, "The request was done, and answered with status %d. The answer could not be kept, such as one that is too large, and the request will not be done again.", stored.Status)
	}
	if o.Open == nil {
		return *stored, nil
	}
	opened, err := o.Open(*stored)
	if err != nil {
		p := newProblem(Parked, "The request was done, and its answer cannot be read at present. It will not be done again.")
		p.cause = fmt.Errorf("keyhttp: open the stored answer: %w", err)
		return Response{}, p
	}
	return opened, nil
}

// send writes an answer out.
func (a *Response) send(w http.ResponseWriter) {
	h := w.Header()
	for name, values := range a.Header {
		h[name] = values
	}
	if bodyAllowed(a.Status) {
		h["Content-Length"] = []string{strconv.Itoa(len(a.Body))}
	}
	if _, typed := h["Content-Type"]; !typed && len(a.Body) > 0 {
		h["Content-Type"] = nil // net/http would guess one, and the first answer had none
	}
	w.WriteHeader(a.Status)
	if len(a.Body) > 0 {
		w.Write(a.Body) // a client that is gone asks again
	}
}

// bodyAllowed says whether an answer may have a body (RFC 9110, section 6.4.1).
func bodyAllowed(status int) bool {
	return status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified
}
