package httpbench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// http.Client takes more time for a request than a server for a replay, and on the same cores. So the load comes over
// bare connections, which are kept alive, from requests that are bytes already.

// A caller is one client.
type caller interface {
	ask() error
	hangUp()
}

// A contender is something that callers ask.
type contender struct {
	name string
	call func(tb testing.TB) caller
}

// A pace is how many requests a second were done, and what a request took of the processors, for the client and the server
// together: other programs on the same machine change the rate, and hardly the cost.
type pace struct {
	rate float64
	cost time.Duration
}

// pace lets so many callers ask for a while.
func (c *contender) pace(tb testing.TB, callers int, d time.Duration) pace {
	tb.Helper()
	var done atomic.Int64
	var wg sync.WaitGroup
	all := make([]caller, callers)
	for i := range all {
		all[i] = c.call(tb)
		defer all[i].hangUp()
	}
	start, used := time.Now(), cpuTime()
	for _, one := range all {
		wg.Go(func() {
			n := int64(0)
			defer func() { done.Add(n) }()
			for time.Since(start) < d {
				if err := one.ask(); err != nil {
					tb.Errorf("%s: %v", c.name, err)
					return
				}
				n++
			}
		})
	}
	wg.Wait()
	n := done.Load()
	return pace{float64(n) / time.Since(start).Seconds(), (cpuTime() - used) / time.Duration(max(1, n))}
}

// A line is a connection to a server, and what is sent over it.
type line struct {
	conn     net.Conn
	in       *bufio.Reader
	out      []byte
	next     func(out []byte) []byte // appends the next request
	status   int
	replayed bool // what is expected of the answer
}

func dial(tb testing.TB, address string, status int, replayed bool, next func(out []byte) []byte) *line {
	tb.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		tb.Fatal(err)
	}
	return &line{conn: conn, in: bufio.NewReader(conn), next: next, status: status, replayed: replayed}
}

func (l *line) hangUp() { l.conn.Close() }

func (l *line) ask() error {
	l.out = l.next(l.out[:0])
	if _, err := l.conn.Write(l.out); err != nil {
		return err
	}
	return l.answer()
}

var (
	contentLength  = []byte("content-length:")
	replayedHeader = []byte("idempotent-replayed:")
)

// answer reads an answer to its end, and sees to it that it is the one that is measured.
func (l *line) answer() error {
	head, err := l.in.ReadSlice('\n') // HTTP/1.1 200 OK
	if err != nil {
		return err
	}
	if len(head) < 12 {
		return fmt.Errorf("answered %q", head)
	}
	status, err := strconv.Atoi(string(head[9:12]))
	if err != nil {
		return err
	}
	length, replayed := -1, false
	for {
		field, err := l.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(field) <= 2 {
			break
		}
		switch {
		case startsWith(field, contentLength):
			if length, err = strconv.Atoi(string(bytes.TrimSpace(field[len(contentLength):]))); err != nil {
				return err
			}
		case startsWith(field, replayedHeader):
			replayed = true
		}
	}
	if length < 0 {
		return errors.New("the answer has no Content-Length")
	}
	if status != l.status || replayed != l.replayed {
		body, _ := io.ReadAll(io.LimitReader(l.in, int64(length)))
		return fmt.Errorf("answered %d, replayed %v: %s", status, replayed, body)
	}
	_, err = l.in.Discard(length)
	return err
}

// startsWith compares a field's name, however it is spelled.
func startsWith(field, name []byte) bool {
	return len(field) > len(name) && bytes.EqualFold(field[:len(name)], name)
}
