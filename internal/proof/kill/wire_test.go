//go:build unix

package kill

import (
	"encoding/gob"
	"io"
	"sync"
)

// What parent and child tell each other, over the child's standard input and output.

// A transfer is a request, and what its phases fill in.
type transfer struct {
	ID       string // the key's
	From, To string
	Cents    int64
	Token    string `json:",omitempty"`
	Payout   string `json:",omitempty"`
}

// A command goes to the child; one of its fields is set.
type command struct {
	Request *request
	Reply   *reply
	Finish  bool // carry everything on to its end, and count
	Close   bool
}

// A request comes from a client.
type request struct {
	Number   int
	Transfer transfer
}

// A reply is the outside world's to a call.
type reply struct {
	Number int
	Payout string
	Fault  string
}

// A report comes from the child; one of its fields is set.
type report struct {
	Hello  bool // it is about to open the store
	Ready  *opened
	Answer *answer
	Call   *call
	Owed   *owedError
	Counts *counts
	Closed bool
	Broken string // what should never happen in a child
}

// opened says that the machines are registered, and how long the store took to open.
type opened struct{ Microseconds int64 }

// An answer ends a request, or asks the client to come again.
type answer struct {
	Number int
	Text   string // what the key was answered with; empty: it has not ended
	Closed bool   // the child is closing
}

// A call is one of an effect to the outside world.
type call struct {
	Number int
	Book   string // whose effect it is
	Token  string
}

// An owedError is an obstacle to a commit whose effect is done. The parent hears of it when the effect's result is durable.
type owedError struct{ Book, Token string }

func (e *owedError) Error() string { return "the commit of " + e.Book + " is owed" }
func (e *owedError) Unwrap() error { return errStumbled }

// counts are the stored keys when everything has ended.
type counts struct{ Unfinished, Finished uint64 }

// A line sends messages, from any goroutine.
type line struct {
	mu  sync.Mutex
	out *gob.Encoder
}

func newLine(w io.Writer) *line { return &line{out: gob.NewEncoder(w)} }

// send loses what nobody is there to hear any more: the other side has been killed.
func (l *line) send(message any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.out.Encode(message)
}
