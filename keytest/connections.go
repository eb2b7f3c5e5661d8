package keytest

import (
	"context"
	"net"
	"slices"
	"sync"
)

// Connections are those of one process to a server, for the Open of a [Case] whose store is on one. Dial is what its driver dials with; Kill breaks
// them all, as the death of the process does: the server sees that they are gone, and is told nothing. Embedded beside the store, they make it [Killable]:
//
//	type mortal struct {
//		*postgres.Store
//		*keytest.Connections
//	}
//
// A server has a clock of its own, by which leases end, and in a bubble hours pass in no time. Either the server goes by the
// bubble's clock, as docs/testing.md shows for PostgreSQL; or leases are short, and each death takes as long as one.
type Connections struct {
	mu     sync.Mutex
	open   []*connection
	killed bool
}

// Dial connects as a [net.Dialer] does, as long as the process lives.
func (c *Connections) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	made, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.killed {
		made.Close()
		return nil, errKilled
	}
	conn := &connection{made, c}
	c.open = append(c.open, conn)
	return conn, nil
}

// Kill breaks the connections, and there will be no others.
func (c *Connections) Kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.killed = true
	for _, conn := range c.open {
		conn.Conn.Close()
	}
}

// A connection is forgotten when it is closed.
type connection struct {
	net.Conn
	of *Connections
}

func (c *connection) Close() error {
	c.of.mu.Lock()
	c.of.open = slices.DeleteFunc(c.of.open, func(other *connection) bool { return other == c })
	c.of.mu.Unlock()
	return c.Conn.Close()
}
