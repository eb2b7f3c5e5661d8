//go:build unix

package kill

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
)

// What the parent has seen, and its verdict on it.

// A world is everything outside the child: the clients' memory, and the other side of the effects.
type world struct {
	mu       sync.Mutex
	books    map[string]*book // by whose effect it is: a transfer's ID, or "receipt/" and its token
	ids      []string         // of the transfers, in the order in which they were asked for first
	fault    error            // the first promise that was broken
	broken   chan struct{}    // closed then
	payouts  int
	seen     map[string]int
	heaviest int64 // most bytes of memory that a child has used
}

func newWorld() *world {
	return &world{books: map[string]*book{}, broken: make(chan struct{}), seen: map[string]int{}}
}

// wallClock is the time by which the child's keys are reaped, too: it may be set while the test runs.
func wallClock() time.Time { return time.Now().Round(0) }

// A book is what is known of a key: its lives, one after another. A new one begins when the key is used after it was reaped.
type book struct {
	transfer transfer
	since    time.Time // its latest life cannot have ended earlier
	lives    []*life
}

// A life is what became of a key between its claim and its reaping.
type life struct {
	token    string // empty: it was refused before its effect
	payout   string // what the outside world did; empty: nothing yet
	calls    int
	answer   string // what a client was told
	recorded bool   // the effect's result is in the store
}

// mayBegin says whether the key can have been reaped since its latest life.
func (b *book) mayBegin(now time.Time) bool {
	return len(b.lives) == 0 || !now.Before(b.since.Add(retention))
}

// begin opens a new life, which ends later than the one before it was reaped.
func (b *book) begin(l *life) {
	if len(b.lives) > 0 {
		b.since = b.since.Add(retention)
	}
	b.lives = append(b.lives, l)
}

// find returns the index of the life in which something holds, or -1.
func (b *book) find(holds func(*life) bool) int {
	for i := len(b.lives) - 1; i >= 0; i-- {
		if holds(b.lives[i]) {
			return i
		}
	}
	return -1
}

// answered is the index of the latest life whose answer is known: no later request may get that of an earlier one.
func (b *book) answered() int {
	return b.find(func(l *life) bool { return l.answer != "" })
}

// wrong notes a broken promise. The caller holds the lock.
func (w *world) wrong(format string, args ...any) {
	if w.fault == nil {
		w.fault = fmt.Errorf(format, args...)
		close(w.broken)
	}
}

// failed returns the first promise that was broken.
func (w *world) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fault
}

func (w *world) blame(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrong("%w", err)
}

func (w *world) sight(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[what]++
}

// newBook opens the book of a transfer that nobody has asked for yet.
func (w *world) newBook() *book {
	w.mu.Lock()
	defer w.mu.Unlock()
	from := rand.IntN(accounts)
	b := &book{since: wallClock(), transfer: transfer{
		ID:   fmt.Sprintf("transfer %d", len(w.ids)),
		From: account(from), To: account((from + 1 + rand.IntN(accounts-1)) % accounts),
		Cents: 1 + rand.Int64N(100),
	}}
	if rand.IntN(16) == 0 {
		b.transfer.Cents = opening/2 + rand.Int64N(opening) // it depends on the moment whether there is as much
	}
	w.ids = append(w.ids, b.transfer.ID)
	w.books[b.transfer.ID] = b
	return b
}

// oldBook picks a transfer that has been asked for: most often a recent one.
func (w *world) oldBook() *book {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.ids)
	if n == 0 {
		return nil
	}
	recent := min(n, 64)
	if rand.IntN(4) == 0 {
		recent = n
	}
	return w.books[w.ids[n-1-rand.IntN(recent)]]
}

// acknowledge judges an answer that a client has got, who knew of so many lives when it asked.
func (w *world) acknowledge(b *book, text string, knew int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var s settlement
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		w.wrong("%s: %v", text, err)
		return
	}
	asked := s.Transfer
	asked.Token, asked.Payout = "", ""
	if asked != b.transfer {
		w.wrong("%+v was answered with %s", b.transfer, text)
		return
	}
	i := b.find(func(l *life) bool { return l.token == s.Transfer.Token && (l.token != "" || l.answer == text) })
	if i < 0 && s.Transfer.Token == "" && b.mayBegin(wallClock()) {
		b.begin(&life{answer: text})
		i = len(b.lives) - 1
		w.seen["a refusal"]++
	}
	if i < 0 {
		w.wrong("%s: the answer %s belongs to nothing that happened; known: %s", b.transfer.ID, text, b)
		return
	}
	l := b.lives[i]
	switch {
	case l.payout != s.Transfer.Payout:
		w.wrong("%s: answered %s, but the payout was %q", b.transfer.ID, text, l.payout)
	case i < knew:
		w.wrong("%s: answered %s again, after %s", b.transfer.ID, text, b.lives[knew].answer)
	case l.answer == "":
		l.answer = text
	case l.answer != text:
		w.wrong("%s: answered %s, and before %s", b.transfer.ID, text, l.answer)
	default:
		w.seen["a replay"]++
	}
}

func (b *book) String() string {
	var s strings.Builder
	for _, l := range b.lives {
		fmt.Fprintf(&s, "%+v ", *l)
	}
	return s.String()
}

// carryOut is the other side of an effect: it honours tokens, and judges who calls with which. Some of its answers
// are lost, and some of its calls come to nothing. It says how long the answer takes.
func (w *world) carryOut(c call) (r reply, after time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	b, now := w.books[c.Book], wallClock()
	if b == nil {
		b = &book{since: now}
		w.books[c.Book] = b
	}
	i := b.find(func(l *life) bool { return l.token == c.Token })
	if i < 0 {
		if !b.mayBegin(now) {
			w.wrong("%s: a second effect, under the token %s; known: %s", c.Book, c.Token, b)
		} else if len(b.lives) > 0 {
			w.seen["a key used again after it was reaped"]++
		}
		i = len(b.lives)
		b.begin(&life{token: c.Token})
	}
	l := b.lives[i]
	switch {
	case i < len(b.lives)-1:
		w.wrong("%s: an effect of an earlier life; known: %s", c.Book, b)
	case l.answer != "":
		w.wrong("%s: the effect was called again, after the answer %s", c.Book, l.answer)
	case l.recorded:
		w.wrong("%s: the effect was called again, after its result was in the store", c.Book)
	}
	if l.calls++; l.calls > 1 {
		w.seen["an effect sent again"]++
	}
	b.since = now
	return w.perform(c.Number, l)
}

// keep notes that an effect's result is durable, although its commit is not.
func (w *world) keep(owed owedError) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen["a commit owed"]++
	b := w.books[owed.Book]
	if i := b.find(func(l *life) bool { return l.token == owed.Token }); i >= 0 && b.lives[i].payout != "" {
		b.lives[i].recorded = true
		return
	}
	w.wrong("%s: the commit of %s is owed; known: %s", owed.Book, owed.Token, b)
}

// perform does what an effect asks for, once.
func (w *world) perform(number int, l *life) (r reply, after time.Duration) {
	r.Number = number
	if l.calls == 1 && rand.IntN(16) == 0 {
		r.Fault = "the other side is not there"
		return r, 0
	}
	if l.payout == "" {
		w.payouts++
		l.payout = fmt.Sprintf("payout %d", w.payouts)
	}
	if r.Payout = l.payout; l.calls == 1 && rand.IntN(16) == 0 {
		r.Fault = "the answer is lost"
	}
	if rand.IntN(4) == 0 {
		after = time.Duration(rand.IntN(4_000)) * time.Microsecond
	}
	return r, after
}
