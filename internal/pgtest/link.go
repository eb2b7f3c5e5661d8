package pgtest

import (
	"bufio"
	"net"
	"sync"
)

const (
	readBuffer = 256 << 10 // what a client sends in one go is to be read in one go
	inTransit  = 1024      // frames that may be delayed at once
)

// A link is one client's connection through a proxy.
type link struct {
	proxy          *Proxy
	client, server net.Conn
	known          known
	done           chan struct{} // the server has closed, and so is the client's connection

	mu     sync.Mutex
	debts  debts
	target *Cut // to be made at an answer to come
	asked  bool // a Flush asks for that answer: no Sync needs to follow
	ending *Cut // made as soon as the server has closed
	secret string
}

// frames reads ahead, so that each frame can be delayed from the time when it came.
func frames(r *bufio.Reader, done <-chan struct{}, first ...frame) <-chan frame {
	ch := make(chan frame, inTransit)
	for _, f := range first {
		ch <- f
	}
	go func() {
		defer close(ch)
		for {
			f, err := readFrame(r)
			if err != nil {
				return
			}
			select {
			case ch <- f:
			case <-done:
				return
			}
		}
	}()
	return ch
}

// carry returns when the link has ended in both directions.
func (l *link) carry(requests <-chan frame) {
	var answers sync.WaitGroup
	answers.Go(l.carryAnswers)
	defer answers.Wait()

	cut, at := l.carryRequests(requests)
	switch {
	case cut == nil:
	case cut.place == InFlight:
		l.fly(cut, at, requests)
	default:
		l.endBy(cut)
	}
	l.finishServer()
	<-l.done
	if cut != nil {
		cut.make() // if the server had closed before
		close(cut.settled)
	}
}

// finishServer tells the server that nothing more comes. It does what it has got, and closes.
func (l *link) finishServer() {
	half, ok := l.server.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		l.server.Close()
	}
}

// carryRequests carries what the client sends until it ends, or until a cut is to be made before a message. All
// before that message is sent to the server.
func (l *link) carryRequests(requests <-chan frame) (*Cut, frame) {
	w := bufio.NewWriter(l.server)
	defer w.Flush()
	for f := range requests {
		l.proxy.late(f)
		m, err := l.known.read(f)
		if err != nil {
			return nil, f
		}
		cut := l.proxy.pick(m)
		if cut != nil && (cut.place == BeforeRequest || cut.place == InFlight) {
			return cut, f
		}
		l.tally(f)
		l.expect(f.typ, cut)
		if _, err := w.Write(f.raw); err != nil {
			return nil, f
		}
		if len(requests) == 0 && w.Flush() != nil {
			return nil, f
		}
	}
	return nil, frame{}
}

func (l *link) tally(f frame) {
	l.proxy.count(func(c *Counts) {
		switch f.typ {
		case startup, terminate, password:
			return
		case query, execute:
			c.Statements++
		}
		c.Messages++
		if asks(f.typ) && f.last {
			c.RoundTrips++
		}
	})
}

// expect notes the answer that a message will have, and the cut to be made at it.
func (l *link) expect(typ byte, cut *Cut) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if typ == flush && l.target != nil {
		l.asked = true
	}
	if cut != nil {
		l.target = cut
	}
	l.debts.owe(typ, cut)
}

// endBy has a cut made when the server has closed.
func (l *link) endBy(cut *Cut) {
	l.silence()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ending = cut
}

func (l *link) silence() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.secret != "" {
		l.proxy.silence(l.secret)
	}
}

// fly ends the client's connection, and holds back what it has sent until that is to be delivered.
func (l *link) fly(cut *Cut, f frame, requests <-chan frame) {
	held := f.raw
	for ok := true; ok && !asks(f.typ); {
		if f, ok = <-requests; ok {
			held = append(held, f.raw...)
		}
	}
	l.silence()
	cut.make()
	l.client.Close()
	select {
	case <-cut.deliver:
		l.server.Write(held)
	case <-l.proxy.ended:
	}
}

// carryAnswers carries what the server sends until it closes, or until a cut is to be made at an answer. Then the
// client's connection ends.
func (l *link) carryAnswers() {
	defer close(l.done)
	defer l.client.Close()
	answers := frames(bufio.NewReaderSize(l.server, readBuffer), nil)
	w := bufio.NewWriter(l.client)
	cut, kept := l.carryUntilHeld(answers, w)
	if cut != nil {
		if cut.place == MidAnswer {
			w.Write(kept[:len(kept)/2])
		}
		w.Flush()
		l.endBy(cut)
		l.finishServer()
		for range answers { // until the server has done with all
		}
		defer close(cut.settled)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ending != nil {
		l.ending.make()
	}
}

// carryUntilHeld carries answers. From the one on at which a cut is to be made, it holds them back, until the server
// has done with what came with the message; it returns the cut, and the answer to that message.
func (l *link) carryUntilHeld(answers <-chan frame, w *bufio.Writer) (held *Cut, kept []byte) {
	complete := false
	for f := range answers {
		l.proxy.late(f)
		current, settled, asked := l.pay(f)
		if held == nil {
			held = cutOf(current, settled)
		}
		if held == nil {
			w.Write(f.raw) // if the client is gone, the server is still to be heard out
			if len(answers) == 0 {
				w.Flush()
			}
			continue
		}
		if current.cut == held && !complete {
			kept = append(kept, f.raw...)
		}
		complete = complete || cutOf(debt{}, settled) == held
		if complete && (asked || f.typ == readyForQuery) {
			return held, kept
		}
	}
	w.Flush()
	return held, kept
}

func (l *link) pay(f frame) (current debt, settled []debt, asked bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f.typ == secretKey {
		l.secret = string(f.body())
	}
	current, settled = l.debts.pay(f.typ)
	return current, settled, l.asked
}

func cutOf(current debt, settled []debt) *Cut {
	for _, d := range settled {
		if d.cut != nil {
			return d.cut
		}
	}
	return current.cut
}
