package keyhttp

import (
	"bufio"
	"io"
	"maps"
	"net"
	"net/http"

	"github.com/felixge/httpsnoop"
)

// A tape records what a handler answers, and holds it back until it is on disk. When the handler flushes, or writes more than can be
// kept, the tape lets it through from then on.
type tape struct {
	recorder
	w        http.ResponseWriter
	limit    int
	through  bool // what the handler writes goes out as it comes
	hijacked bool
	cut      bool // not all of the body is recorded
}

func newTape(w http.ResponseWriter, limit int) *tape {
	return &tape{recorder: recorder{header: w.Header().Clone()}, w: w, limit: limit}
}

// writer is what the handler writes to: whatever else the server's own ResponseWriter can do, it can do as well.
func (t *tape) writer() http.ResponseWriter {
	return httpsnoop.Wrap(t.w, httpsnoop.Hooks{
		Header: func(httpsnoop.HeaderFunc) httpsnoop.HeaderFunc { return t.Header },
		WriteHeader: func(next httpsnoop.WriteHeaderFunc) httpsnoop.WriteHeaderFunc {
			return func(status int) {
				if status < 200 {
					t.inform(next, status)
					return
				}
				t.WriteHeader(status)
			}
		},
		Write: func(httpsnoop.WriteFunc) httpsnoop.WriteFunc { return t.Write },
		Flush: func(next httpsnoop.FlushFunc) httpsnoop.FlushFunc {
			return func() {
				t.letThrough()
				next()
			}
		},
		ReadFrom: func(httpsnoop.ReadFromFunc) httpsnoop.ReadFromFunc {
			return func(src io.Reader) (int64, error) { return io.Copy(writeOnly{t}, src) }
		},
		Hijack: func(next httpsnoop.HijackFunc) httpsnoop.HijackFunc {
			return func() (net.Conn, *bufio.ReadWriter, error) {
				conn, rw, err := next()
				if err == nil {
					t.hijacked, t.cut = true, true
				}
				return conn, rw, err
			}
		},
	})
}

// writeOnly hides that a tape may be able to do more than write.
type writeOnly struct{ io.Writer }

// inform sends an informational answer, such as 103 Early Hints.
func (t *tape) inform(next httpsnoop.WriteHeaderFunc, status int) {
	maps.Copy(t.w.Header(), t.header)
	next(status)
}

func (t *tape) Write(b []byte) (int, error) {
	if t.status == 0 {
		t.WriteHeader(http.StatusOK)
	}
	if !bodyAllowed(t.status) {
		return 0, http.ErrBodyNotAllowed
	}
	if t.hijacked {
		return 0, http.ErrHijacked
	}
	if !t.cut && t.body.Len()+len(b) > t.limit {
		t.letThrough()
		t.cut = true
	}
	if !t.cut {
		t.body.Write(b)
	}
	if t.through {
		return t.w.Write(b)
	}
	return len(b), nil
}

// letThrough sends what has been recorded, and from now on everything as it comes.
func (t *tape) letThrough() {
	if t.through || t.hijacked {
		return
	}
	t.finish()
	t.through = true
	t.sendHeader()
	t.w.Write(t.body.Bytes())
}

func (t *tape) sendHeader() {
	replaceHeader(t.w.Header(), t.sent)
	t.w.WriteHeader(t.status)
}

// replaceHeader makes a header what another one is.
func replaceHeader(h, by http.Header) {
	clear(h)
	maps.Copy(h, by)
}

// recorded is the answer, and whether all of it was recorded.
func (t *tape) recorded() (status int, header http.Header, body []byte, whole bool) {
	return t.status, t.sent, t.body.Bytes(), !t.cut
}

// finish ends the answer as net/http would.
func (t *tape) finish() {
	if !t.through && !t.hijacked {
		t.recorder.finish()
	}
}

// live says whether the client has got a part of the answer.
func (t *tape) live() bool { return t.through || t.hijacked }

// send sends the answer, or what is left of it.
func (t *tape) send() {
	switch {
	case t.hijacked:
	case t.through:
		maps.Copy(t.w.Header(), t.header) // trailers
	default:
		t.sendHeader()
		t.w.Write(t.body.Bytes())
		maps.Copy(t.w.Header(), t.header)
	}
}
