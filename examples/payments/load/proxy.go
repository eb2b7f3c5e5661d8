package main

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"
)

// A fate is what becomes of a request on the line.
type fate int

const (
	carried        fate = iota
	requestDropped      // the connection is cut before the service sees anything
	answerDropped       // the service does its work, and the connection is cut
	cutShort            // half of the answer arrives
	doubled             // the service gets it twice at once, and one answer arrives
	delayed
)

// fates are the shares of the requests that meet them.
var fates = []struct {
	fate  fate
	share float64
}{{requestDropped, 0.05}, {answerDropped, 0.05}, {cutShort, 0.02}, {doubled, 0.03}, {delayed, 0.10}}

const longestDelay = 50 * time.Millisecond

// lineCounts are what a line has seen.
type lineCounts struct {
	attempts    int
	met         map[fate]int
	unreachable int         // the service was away, or went away before it had answered
	statuses    map[int]int // that the service answered with
	replays     int
}

// A line lies between the callers and the service.
type line struct {
	url      string
	seed     int64
	server   *http.Server
	upstream *http.Transport

	mu      sync.Mutex
	service string // where it is now
	seen    map[string]int
	count   lineCounts
}

func listen(seed int64) (*line, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &line{
		url: "http://" + listener.Addr().String(), seed: seed, upstream: &http.Transport{MaxIdleConnsPerHost: 256},
		seen: map[string]int{}, count: lineCounts{met: map[fate]int{}, statuses: map[int]int{}},
	}
	l.server = &http.Server{Handler: l, ReadHeaderTimeout: time.Minute}
	go l.server.Serve(listener)
	return l, nil
}

func (l *line) close() {
	l.server.Close()
	l.upstream.CloseIdleConnections()
}

// leadTo says where the service is.
func (l *line) leadTo(url string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.service = url
}

func (l *line) counts() lineCounts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.count
	c.met, c.statuses = maps.Clone(c.met), maps.Clone(c.statuses)
	return c
}

// draw counts a request and says what becomes of it. It depends on the request and on how often it came, not on who else calls.
func (l *line) draw(r *http.Request, body []byte) (f fate, delay time.Duration, service string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := fmt.Sprintf("%s %s %s", r.URL.Path, r.Header.Get("Idempotency-Key"), body)
	l.seen[name]++
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %d", name, l.seen[name])
	rng := rand.New(rand.NewPCG(uint64(l.seed), h.Sum64()))
	drawn := rng.Float64()
	for _, d := range fates {
		if drawn -= d.share; drawn < 0 {
			f = d.fate
			break
		}
	}
	l.count.attempts++
	l.count.met[f]++
	return f, time.Duration(rng.Int64N(int64(longestDelay))), l.service
}

func (l *line) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	f, delay, service := l.draw(r, body)
	switch f {
	case requestDropped:
		panic(http.ErrAbortHandler)
	case delayed:
		time.Sleep(delay)
	case doubled:
		twin := make(chan struct{})
		go func() {
			defer close(twin)
			l.forward(r, service, body)
		}()
		defer func() { <-twin }()
	}
	a, err := l.forward(r, service, body)
	if err != nil || f == answerDropped {
		panic(http.ErrAbortHandler)
	}
	maps.Copy(w.Header(), a.header)
	w.WriteHeader(a.status)
	if f == cutShort {
		w.Write(a.body[:len(a.body)/2])
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	w.Write(a.body)
}

// carry is an answer on its way.
type carry struct {
	status int
	header http.Header
	body   []byte
}

func (l *line) forward(r *http.Request, service string, body []byte) (c carry, err error) {
	defer func() { l.note(c, err) }()
	if service == "" {
		return c, errors.New("the service has not been up yet")
	}
	sent, err := http.NewRequestWithContext(r.Context(), r.Method, service+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return c, err
	}
	sent.Header = r.Header.Clone()
	sent.GetBody = nil // what is sent again, the line decides
	resp, err := l.upstream.RoundTrip(sent)
	if err != nil {
		return c, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return carry{resp.StatusCode, resp.Header, text}, err
}

func (l *line) note(c carry, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.count.unreachable++
		return
	}
	l.count.statuses[c.status]++
	if c.header.Get("Idempotent-Replayed") == "true" {
		l.count.replays++
	}
}
