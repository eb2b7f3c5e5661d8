package clienttest

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
)

// A fault is what happens to one request.
type fault int

const (
	sound      fault = iota
	lostBefore       // the connection is reset before the server has read a byte of the request
	lostAfter        // the work is done, and the connection is reset before a byte of the answer is out
	lostMidway       // the same, after half of the answer
	busyBefore       // a gateway answers 503 in the server's place
	busyAfter        // the work is done, and a gateway answers 503 in place of the answer
)

func (f fault) String() string {
	return [...]string{"sound", "lost before", "lost after", "lost midway", "busy before", "busy after"}[f]
}

// worked tells whether a request does its work in spite of the fault.
func (f fault) worked() bool {
	return f == sound || f == lostAfter || f == lostMidway || f == busyAfter
}

// A wire is a listener whose connections suffer faults, one per request, in the order in which requests come.
type wire struct {
	net.Listener

	mu       sync.Mutex
	coming   []fault
	requests int
}

func (w *wire) breaks(faults ...fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.coming = append(w.coming, faults...)
}

// seen is how many requests have begun to arrive.
func (w *wire) seen() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.requests
}

func (w *wire) next() fault {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.requests++
	if len(w.coming) == 0 {
		return sound
	}
	f := w.coming[0]
	w.coming = w.coming[1:]
	return f
}

func (w *wire) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &brittle{Conn: c, wire: w, answered: true}, nil
}

// brittle is a connection of a wire. A request begins with the first bytes that come after an answer.
type brittle struct {
	net.Conn
	wire *wire

	mu       sync.Mutex
	answered bool
	fault    fault
}

func (c *brittle) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > 0 && c.answered {
		c.answered, c.fault = false, c.wire.next()
		if c.fault == lostBefore {
			c.reset()
			return 0, io.ErrUnexpectedEOF
		}
	}
	return n, err
}

func (c *brittle) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answered = true
	switch c.fault {
	case lostMidway:
		n, _ := c.Conn.Write(b[:len(b)/2])
		c.Conn.Close() // not reset, which would take back the half that is out
		return n, io.ErrClosedPipe
	case lostAfter:
		c.reset()
		return 0, io.ErrClosedPipe
	}
	return c.Conn.Write(b)
}

// reset closes the connection so that the other end gets an error, not the end of a stream.
func (c *brittle) reset() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	c.Conn.Close()
}

type brittleKey struct{}

func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, brittleKey{}, c)
}

// gateway plays the part of what stands between a client and the server and may answer in its place.
func gateway(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := r.Context().Value(brittleKey{}).(*brittle)
		c.mu.Lock()
		f := c.fault
		c.mu.Unlock()
		switch f {
		case busyAfter:
			h.ServeHTTP(httptest.NewRecorder(), r)
			fallthrough
		case busyBefore:
			http.Error(w, "upstream is gone", http.StatusServiceUnavailable)
		default:
			h.ServeHTTP(w, r)
		}
	})
}
