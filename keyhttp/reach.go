package keyhttp

import (
	"bufio"
	"net"
	"net/http"
)

// An http.ResponseController looks for what it needs behind one ResponseWriter after another, by their Unwrap methods. What it found
// behind the tape would write past it: reached gives it what it may find.

type unwrapper interface{ Unwrap() http.ResponseWriter }

// reached is a handler's writer w, with a tape that also records what is done by way of what the server's writer unwraps to.
func (t *tape) reached(w http.ResponseWriter) http.ResponseWriter {
	_, unwraps := t.w.(unwrapper)
	flusher, flushes := w.(http.Flusher)
	_, hijacks := w.(http.Hijacker)
	switch {
	case !unwraps, flushes && hijacks:
		return w
	case flushes:
		return outerFlusher{outer{w, t}, flusher}
	}
	return outer{w, t}
}

// An outer writer can do nothing but write. Behind it there is what the tape lets a ResponseController do.
type outer struct {
	http.ResponseWriter
	tape *tape
}

func (o outer) Unwrap() http.ResponseWriter { return controlled(o) }

// An outerFlusher can flush as well, as the server's writer can.
type outerFlusher struct {
	outer
	http.Flusher
}

// A controlled writer flushes and hijacks by way of the tape. Deadlines, which do not concern it, are found further behind.
type controlled struct {
	http.ResponseWriter
	tape *tape
}

func (c controlled) Unwrap() http.ResponseWriter { return c.tape.w }

func (c controlled) FlushError() error {
	if !canFlush(c.tape.w) {
		return http.ErrNotSupported
	}
	return c.tape.flush(http.NewResponseController(c.tape.w).Flush)
}

func (c controlled) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return c.tape.hijack(http.NewResponseController(c.tape.w).Hijack)
}

// canFlush says whether a ResponseController would find how to flush.
func canFlush(w http.ResponseWriter) bool {
	for {
		switch t := w.(type) {
		case interface{ FlushError() error }, http.Flusher:
			return true
		case unwrapper:
			w = t.Unwrap()
		default:
			return false
		}
	}
}
