package pgtest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

// Types of messages as they go over the wire, from the client.
const (
	startup   = 0 // has no type on the wire
	query     = 'Q'
	parse     = 'P'
	bind      = 'B'
	describe  = 'D'
	execute   = 'E'
	closing   = 'C' // of a statement or a portal
	sync_     = 'S'
	flush     = 'H'
	call      = 'F'
	terminate = 'X'
	password  = 'p'
)

// Types of messages from the server.
const (
	readyForQuery = 'Z'
	failure       = 'E'
	secretKey     = 'K' // with which a client may cancel what the connection does
)

// Requests that come before, or in the place of, the startup message.
const (
	sslRequest    = 80877103
	gssRequest    = 80877104
	cancelRequest = 80877102
)

const longestMessage = 1 << 30

// A Message is one that a client sends.
type Message struct {
	Type byte   // as on the wire: 'Q', 'P', 'B', 'E', 'S', …; 0 is a connection's first
	SQL  string // that it runs, parses, binds, describes or closes
}

// A frame is a message as it goes over the wire.
type frame struct {
	typ  byte
	raw  []byte
	at   time.Time // when it was read
	last bool      // nothing that came with it is left to read
}

func (f frame) body() []byte { return f.raw[5:] }

func readFrame(r *bufio.Reader) (frame, error) {
	head, err := r.Peek(5)
	if err != nil {
		return frame{}, err
	}
	raw, err := readSized(r, 1, binary.BigEndian.Uint32(head[1:]))
	return frame{typ: head[0], raw: raw, at: time.Now(), last: r.Buffered() == 0}, err
}

// readStartup reads a message without a type.
func readStartup(r *bufio.Reader) (frame, error) {
	head, err := r.Peek(4)
	if err != nil {
		return frame{}, err
	}
	raw, err := readSized(r, 0, binary.BigEndian.Uint32(head))
	if err == nil && len(raw) < 8 {
		err = errors.New("pgtest: a startup message without a version")
	}
	return frame{typ: startup, raw: raw, at: time.Now(), last: true}, err
}

// readSized reads a message of the length that it says it has, which counts the four bytes that say so.
func readSized(r *bufio.Reader, before int, length uint32) ([]byte, error) {
	if length < 4 || longestMessage < length {
		return nil, fmt.Errorf("pgtest: a message of %d bytes", length)
	}
	raw := make([]byte, before+int(length))
	_, err := io.ReadFull(r, raw)
	return raw, err
}

// known is the SQL behind the names of a connection's statements and portals.
type known struct {
	statements, portals map[string]string
}

// read tells what a frame from the client is about, and remembers what it names.
func (k *known) read(f frame) (Message, error) {
	m := Message{Type: f.typ}
	var err error
	switch f.typ {
	case query:
		var q pgproto3.Query
		err = q.Decode(f.body())
		m.SQL = q.String
	case parse:
		var p pgproto3.Parse
		err = p.Decode(f.body())
		m.SQL = p.Query
		k.statements[p.Name] = m.SQL
	case bind:
		var b pgproto3.Bind
		err = b.Decode(f.body())
		m.SQL = k.statements[b.PreparedStatement]
		k.portals[b.DestinationPortal] = m.SQL
	case execute:
		var e pgproto3.Execute
		err = e.Decode(f.body())
		m.SQL = k.portals[e.Portal]
	case describe:
		var d pgproto3.Describe
		err = d.Decode(f.body())
		m.SQL = k.named(d.ObjectType, d.Name)
	case closing:
		var c pgproto3.Close
		err = c.Decode(f.body())
		m.SQL = k.named(c.ObjectType, c.Name)
		if c.ObjectType == 'S' {
			delete(k.statements, c.Name)
		} else {
			delete(k.portals, c.Name)
		}
	}
	return m, err
}

func (k *known) named(object byte, name string) string {
	if object == 'S' {
		return k.statements[name]
	}
	return k.portals[name]
}

// asks tells whether the server answers whatever it owes when it gets a message of this type.
func asks(typ byte) bool {
	switch typ {
	case startup, query, call, sync_, flush:
		return true
	}
	return false
}

// answerEnds tells whether a message from the server is the last of its answer to a message of a type.
func answerEnds(typ, answer byte) bool {
	switch typ {
	case startup, query, call, sync_:
		return answer == readyForQuery
	case parse:
		return answer == '1'
	case bind:
		return answer == '2'
	case closing:
		return answer == '3'
	case describe:
		return answer == 'T' || answer == 'n'
	case execute:
		return answer == 'C' || answer == 'I' || answer == 's'
	}
	return false
}

// unasked tells whether the server sends messages of this type at any time, as part of no answer.
func unasked(answer byte) bool { return answer == 'N' || answer == 'A' || answer == 'S' }

// Debts are the answers that the server owes, in the order in which it will give them.
type debts struct {
	owed     []debt
	skipping bool // after a failure the server skips all up to the next Sync
}

type debt struct {
	typ byte
	cut *Cut // to be made at its answer
}

func (d *debts) owe(typ byte, cut *Cut) {
	switch typ {
	case startup, query, call, sync_, parse, bind, closing, describe, execute:
	default:
		return // it has no answer of its own
	}
	if d.skipping && typ != sync_ {
		return
	}
	d.skipping = false
	d.owed = append(d.owed, debt{typ: typ, cut: cut})
}

// pay takes off what a message from the server settles: the first debt that is not, and the debts that are.
func (d *debts) pay(answer byte) (current debt, settled []debt) {
	if len(d.owed) == 0 || unasked(answer) {
		return debt{}, nil
	}
	current = d.owed[0]
	n := 0
	switch {
	case answerEnds(current.typ, answer):
		n = 1
	case answer == failure && !answerEnds(current.typ, readyForQuery):
		for n < len(d.owed) && d.owed[n].typ != sync_ {
			n++
		}
		d.skipping = n == len(d.owed)
	}
	settled, d.owed = d.owed[:n:n], d.owed[n:]
	return current, settled
}
