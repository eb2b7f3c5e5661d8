package postgres_test

import (
	"net"
	"strconv"
	"sync"
	"testing"

	"example.com/keystate/internal/pgtest"
	"github.com/jackc/pgx/v5/pgconn"
)

// A relay stands between offices and a server, as an address does that moves with the primary: it leads to one server or the other, to none, or into a network
// that swallows everything.
type relay struct {
	dsn      string
	listener net.Listener
	ends     sync.WaitGroup

	mu        sync.Mutex
	to        string // a DSN; empty while there is no way through
	swallowed map[net.Conn]bool
	open      map[net.Conn]side
	swallows  side
}

// A side of a connection through a relay, by who speaks on it.
type side int

const (
	clients side = 1 << iota
	servers
)

func newRelay(t *testing.T, dsn string) *relay {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	r := &relay{listener: listener, to: dsn, open: map[net.Conn]side{}, swallowed: map[net.Conn]bool{}}
	r.dsn = pgtest.With(pgtest.With(pgtest.With(dsn, "host", "127.0.0.1"), "port", port), "sslmode", "disable")
	r.ends.Go(r.accept)
	t.Cleanup(func() {
		listener.Close()
		r.lead("")
		r.ends.Wait()
	})
	return r
}

// lead has new connections go to another server, or to none, and ends those there are.
func (r *relay) lead(dsn string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.to, r.swallows = dsn, 0
	for conn := range r.open {
		conn.Close()
	}
}

// swallow has all connections there are, and all that come, carry nothing more of what is said on some sides.
func (r *relay) swallow(sides side) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.swallows = sides
	for conn, side := range r.open {
		r.swallowed[conn] = side&sides != 0
	}
}

// carry has connections that come carry again. Those of before stay dead, and nobody says so.
func (r *relay) carry() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.swallows = 0
}

func (r *relay) accept() {
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.ends.Go(func() { r.serve(client) })
	}
}

func (r *relay) serve(client net.Conn) {
	defer client.Close()
	r.mu.Lock()
	to := r.to
	r.mu.Unlock()
	config, err := pgconn.ParseConfig(to)
	if err != nil || to == "" {
		return
	}
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	server, err := net.Dial(network, address)
	if err != nil {
		return
	}
	defer server.Close()
	if !r.note(to, client, server) {
		return
	}
	var ways sync.WaitGroup
	ways.Go(func() { r.pass(client, server) })
	ways.Go(func() { r.pass(server, client) })
	ways.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, client)
	delete(r.open, server)
}

// note says whether a connection still leads where it should.
func (r *relay) note(to string, client, server net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if to != r.to {
		return false
	}
	for conn, side := range map[net.Conn]side{client: clients, server: servers} {
		r.open[conn], r.swallowed[conn] = side, side&r.swallows != 0
	}
	return true
}

func (r *relay) pass(from, to net.Conn) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		r.mu.Lock()
		dead := r.swallowed[from]
		r.mu.Unlock()
		if dead {
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}
