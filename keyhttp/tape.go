package keyhttp

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"

	"github.com/felixge/httpsnoop"
)

// A tape records what a handler answers, and holds it back until it is on disk. When the handler flushes, or writes more than can be
// kept, the tape lets it through from then on.
type tape struct {
	recorder
	w        http.ResponseWriter
	limit    int
	written  int64
	declared int64 // by Content-Length, or -1
	through  bool  // what the handler writes goes out as it comes
	hijacked bool
	cut      bool // not all of the body is recorded
}

func newTape(w http.ResponseWriter, limit int) *tape {
	return &tape{recorder: recorder{header: w.Header().Clone()}, w: w, limit: limit, declared: -1}
}

// writer is what the handler writes to: whatever else the server's own ResponseWriter can do, it can do as well.
func (t *tape) writer() http.ResponseWriter {
	return t.reached(httpsnoop.Wrap(t.w, httpsnoop.Hooks{
		Header:      func(httpsnoop.HeaderFunc) httpsnoop.HeaderFunc { return t.Header },
		WriteHeader: func(httpsnoop.WriteHeaderFunc) httpsnoop.WriteHeaderFunc { return t.WriteHeader },
		Write:       func(httpsnoop.WriteFunc) httpsnoop.WriteFunc { return t.Write },
		Flush: func(next httpsnoop.FlushFunc) httpsnoop.FlushFunc {
			return func() {
				t.letThrough()
				next()
			}
		},
		FlushError: func(next httpsnoop.FlushErrorFunc) httpsnoop.FlushErrorFunc {
			return func() error { return t.flush(next) }
		},
		ReadFrom: func(httpsnoop.ReadFromFunc) httpsnoop.ReadFromFunc {
			return func(src io.Reader) (int64, error) { return io.Copy(writeOnly{t}, src) }
		},
		Hijack: func(next httpsnoop.HijackFunc) httpsnoop.HijackFunc {
			return func() (net.Conn, *bufio.ReadWriter, error) { return t.hijack(next) }
		},
	}))
}

// writeOnly hides that a tape may be able to do more than write.
type writeOnly struct{ io.Writer }

func (t *tape) WriteHeader(status int) {
	switch {
	case t.status != 0: // as for net/http, the first one counts
	case status == http.StatusSwitchingProtocols:
		t.status, t.sent, t.through, t.cut = status, t.header.Clone(), true, true
		t.sendHeader()
	case status >= 100 && status < 200:
		t.inform(status)
	default:
		t.recorder.WriteHeader(status)
		if n, err := strconv.ParseUint(t.sent.Get("Content-Length"), 10, 63); err == nil {
			t.declared = int64(n)
		}
	}
}

// inform sends an informational answer, such as 103 Early Hints. Its headers are no part of another answer than the handler's.
func (t *tape) inform(status int) {
	h := t.w.Header()
	before := h.Clone()
	replaceHeader(h, t.header)
	t.w.WriteHeader(status)
	replaceHeader(h, before)
}

func (t *tape) Write(b []byte) (int, error) {
	if t.hijacked {
		return 0, http.ErrHijacked
	}
	if t.status == 0 {
		t.WriteHeader(http.StatusOK)
	}
	switch t.written += int64(len(b)); {
	case len(b) == 0:
		return 0, nil
	case !bodyAllowed(t.status):
		return 0, http.ErrBodyNotAllowed
	case t.declared >= 0 && t.written > t.declared:
		return 0, http.ErrContentLength
	}
	if !t.cut && t.body.Len()+len(b) > t.limit {
		t.letThrough()
		t.cut, t.body = true, bytes.Buffer{}
	}
	if !t.cut {
		t.body.Write(b)
	}
	if !t.through {
		return len(b), nil
	}
	n, err := t.w.Write(b)
	if !t.cut { // a handler that broke off because its client is gone would leave half an answer to the retry
		return len(b), nil
	}
	return n, err
}

// flush lets the handler know that its client is gone only when nothing is recorded any more.
func (t *tape) flush(next func() error) error {
	t.letThrough()
	err := next()
	if t.cut || errors.Is(err, http.ErrNotSupported) {
		return err
	}
	return nil
}

func (t *tape) hijack(next httpsnoop.HijackFunc) (net.Conn, *bufio.ReadWriter, error) {
	if t.status != 0 {
		t.letThrough()
	}
	conn, rw, err := next()
	if err == nil {
		t.hijacked, t.cut, t.status = true, true, cmp.Or(t.status, http.StatusSwitchingProtocols)
	}
	return conn, rw, err
}

// letThrough sends what has been recorded, and from now on everything as it comes.
func (t *tape) letThrough() {
	if t.live() {
		return
	}
	t.finish()
	t.through = true
	t.sendHeader()
	t.sendBody()
}

func (t *tape) sendHeader() {
	replaceHeader(t.w.Header(), t.sent)
	t.w.WriteHeader(t.status)
}

func (t *tape) sendBody() {
	if t.body.Len() > 0 {
		t.w.Write(t.body.Bytes())
	}
}

// sendTrailers passes on what the handler has set after its header and net/http takes for trailers.
func (t *tape) sendTrailers() {
	declared := map[string]bool{}
	for _, list := range t.sent["Trailer"] {
		for name := range strings.SplitSeq(list, ",") {
			declared[textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name))] = true
		}
	}
	h := t.w.Header()
	for name, values := range t.header {
		if declared[name] || strings.HasPrefix(name, http.TrailerPrefix) {
			h[name] = values
		}
	}
}

// replaceHeader makes a header what another one is.
func replaceHeader(h, by http.Header) {
	clear(h)
	maps.Copy(h, by)
}

// recorded is the answer, and whether all of it was recorded. One that is shorter than its Content-Length is not all of it.
func (t *tape) recorded() (status int, header http.Header, body []byte, whole bool) {
	short := bodyAllowed(t.status) && t.written < t.declared
	return t.status, t.sent, t.body.Bytes(), !t.cut && !short
}

// finish ends the answer as net/http would.
func (t *tape) finish() {
	if !t.live() {
		t.recorder.finish()
	}
}

// live says whether the client has got a part of the answer.
func (t *tape) live() bool { return t.through || t.hijacked }

// send sends the answer, or what is left of it.
func (t *tape) send() {
	if t.hijacked {
		return
	}
	if !t.through {
		t.sendHeader()
		t.sendBody()
	}
	t.sendTrailers()
}
