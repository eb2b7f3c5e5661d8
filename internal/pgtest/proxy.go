package pgtest

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// A Place is where on its way a message meets the end of its connection.
type Place int

const (
	// BeforeRequest: the message does not reach the server; all before it do, and are answered.
	BeforeRequest Place = iota

	// AfterRequest: the server has done what the message asks for, and the client gets nothing of the answer.
	AfterRequest

	// MidAnswer: the server has done what the message asks for, and the client gets the first half of the answer's
	// bytes.
	MidAnswer

	// InFlight: the client's connection ends while the message is on its way, with all that follows up to the next
	// message that asks for an answer. They reach the server when the test calls [Cut.Deliver]: after the client has
	// looked, perhaps.
	InFlight
)

func (p Place) String() string {
	switch p {
	case BeforeRequest:
		return "before the request"
	case AfterRequest:
		return "after the request"
	case MidAnswer:
		return "in the middle of the answer"
	case InFlight:
		return "with the request in flight"
	}
	return "nowhere"
}

// A Match picks messages.
type Match func(Message) bool

// Any picks every message but a connection's first and last.
func Any(m Message) bool { return m.Type != startup && m.Type != terminate }

// OfType picks messages by their type on the wire.
func OfType(typ byte) Match { return func(m Message) bool { return m.Type == typ } }

// Runs picks the messages that have the server run SQL, not only prepare it, which begins so, letter case apart.
func Runs(sql string) Match {
	return func(m Message) bool {
		text := strings.TrimSpace(m.SQL)
		return (m.Type == query || m.Type == execute) && len(text) >= len(sql) && strings.EqualFold(text[:len(sql)], sql)
	}
}

// Nth picks the n-th of the messages that another picks, from 1, on whatever connections they come.
func Nth(n int, match Match) Match {
	seen := 0
	return func(m Message) bool {
		if match(m) {
			seen++
			return seen == n
		}
		return false
	}
}

// A Cut ends one connection, once.
type Cut struct {
	place   Place
	match   Match
	made    chan struct{}
	deliver chan struct{}
	settled chan struct{}

	making, delivering sync.Once
}

func (c *Cut) make() { c.making.Do(func() { close(c.made) }) }

// Made is closed when the cut has been made, before the client can see it.
func (c *Cut) Made() <-chan struct{} { return c.made }

// Happened tells whether the cut has been made.
func (c *Cut) Happened() bool {
	select {
	case <-c.made:
		return true
	default:
		return false
	}
}

// Deliver lets go what an InFlight cut has held back, and returns when the server has done with it.
func (c *Cut) Deliver() {
	c.delivering.Do(func() { close(c.deliver) })
	<-c.settled
}

// Counts are what has gone through a proxy.
type Counts struct {
	Connections int
	Messages    int // from clients, but for those that open, authenticate and end a connection
	Statements  int // that the server was asked to run

	// Times that a client sent something to be answered, and then waited: what it sends in one go counts once,
	// however many answers it asks for. Opening a connection is not counted.
	RoundTrips int
}

// A Proxy stands between clients and a server. It listens on a loopback port, and speaks without encryption to the
// server, over whatever its DSN says.
type Proxy struct {
	dsn      string
	network  string
	address  string
	listener net.Listener
	ended    chan struct{}
	wg       sync.WaitGroup

	mu     sync.Mutex
	closed bool
	cuts   []*Cut
	counts Counts
	delay  time.Duration
	open   map[net.Conn]bool
	mute   map[string]bool // what cancels on connections that were cut: a cut network carries no cancellation either
}

// NewProxy sets up a proxy before the server that a DSN names. It ends with the test.
func NewProxy(t testing.TB, dsn string) *Proxy {
	t.Helper()
	config, err := pgconn.ParseConfig(dsn)
	if err != nil {
		t.Fatalf("pgtest: proxy: %v", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("pgtest: proxy: %v", err)
	}
	host, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatalf("pgtest: proxy: %v", err)
	}
	p := &Proxy{
		dsn:      withAddress(dsn, host, port),
		listener: listener,
		ended:    make(chan struct{}),
		open:     map[net.Conn]bool{},
		mute:     map[string]bool{},
	}
	p.network, p.address = pgconn.NetworkAddress(config.Host, config.Port)
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// DSN names the same database by way of the proxy.
func (p *Proxy) DSN() string { return p.dsn }

// Cut has the next message that match picks meet the end of its connection. The proxy calls match for every message
// of every connection, in the order in which they come, until it picks one. When the client sees the end, the server
// has done all that it ever will on that connection, but for a cut with the request in flight. Requests to cancel
// what the cut connection does are lost, too.
func (p *Proxy) Cut(place Place, match Match) *Cut {
	c := &Cut{
		place: place, match: match,
		made: make(chan struct{}), deliver: make(chan struct{}), settled: make(chan struct{}),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cuts = append(p.cuts, c)
	return c
}

// CutAll ends all connections there are, as a network does, with whatever is on its way.
func (p *Proxy) CutAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.open {
		conn.Close()
	}
}

// Delay has every message, in both directions, take this much longer from now on. It does not wait for the one before.
func (p *Proxy) Delay(each time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = each
}

// Counts are what has gone through so far.
func (p *Proxy) Counts() Counts {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts
}

// Since is what has gone through after earlier counts.
func (c Counts) Since(earlier Counts) Counts {
	return Counts{
		Connections: c.Connections - earlier.Connections,
		Messages:    c.Messages - earlier.Messages,
		Statements:  c.Statements - earlier.Statements,
		RoundTrips:  c.RoundTrips - earlier.RoundTrips,
	}
}

func (p *Proxy) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	close(p.ended)
	p.listener.Close()
	p.CutAll()
	p.wg.Wait()
}

// keep tells whether a connection may live: once the proxy ends, none does.
func (p *Proxy) keep(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.open[conn] = true
	}
	return !p.closed
}

func (p *Proxy) drop(conn net.Conn) {
	conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, conn)
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(client) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer p.drop(client)
	if !p.keep(client) {
		return
	}
	r := bufio.NewReaderSize(client, readBuffer)
	first, err := greet(client, r)
	if err != nil {
		return
	}
	server, err := net.Dial(p.network, p.address)
	if err != nil {
		return
	}
	defer p.drop(server)
	if !p.keep(server) {
		return
	}
	if binary.BigEndian.Uint32(first.raw[4:]) == cancelRequest {
		if !p.muted(string(first.raw[8:])) {
			server.Write(first.raw)
			io.Copy(io.Discard, server) // the server answers by closing
		}
		return
	}
	p.count(func(c *Counts) { c.Connections++ })
	l := &link{
		proxy: p, client: client, server: server, done: make(chan struct{}),
		known: known{statements: map[string]string{}, portals: map[string]string{}},
	}
	l.carry(frames(r, l.done, first))
}

// greet refuses encryption, and returns the message that opens the connection, or asks to cancel what another does.
func greet(client net.Conn, r *bufio.Reader) (frame, error) {
	for {
		first, err := readStartup(r)
		if err != nil {
			return frame{}, err
		}
		switch binary.BigEndian.Uint32(first.raw[4:]) {
		case sslRequest, gssRequest:
			if _, err := client.Write([]byte{'N'}); err != nil {
				return frame{}, err
			}
		default:
			return first, nil
		}
	}
}

func (p *Proxy) count(change func(*Counts)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.counts)
}

// pick returns the cut that a message meets, if any.
func (p *Proxy) pick(m Message) *Cut {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, c := range p.cuts {
		if c.match(m) {
			p.cuts = append(p.cuts[:i:i], p.cuts[i+1:]...)
			return c
		}
	}
	return nil
}

func (p *Proxy) muted(secret string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mute[secret]
}

func (p *Proxy) silence(secret string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mute[secret] = true
}

func (p *Proxy) late(f frame) {
	p.mu.Lock()
	delay := p.delay
	p.mu.Unlock()
	if delay == 0 {
		return
	}
	select {
	case <-time.After(time.Until(f.at.Add(delay))):
	case <-p.ended:
	}
}
