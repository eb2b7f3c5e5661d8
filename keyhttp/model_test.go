package keyhttp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// What the property's requests may rely on: a model that knows what was sent, what was heard, and what the program behind the
// endpoints did, and nothing of how keyhttp works.

// A propWorld is everything outside the processes: it outlives them.
type propWorld struct {
	sc   *propScenario
	seen *propSightings

	mu      sync.Mutex
	fault   error // the first thing that was not as promised
	journal []string
	began   time.Time
	healed  bool // from here on everything works
	encoded int
	lives   map[keystate.Key]*propLife
	deeds   []*propDeed
	tokens  map[string]*propDeed
	spent   map[string]int // turnouts that have been used, by key and place
}

// A propLife is what becomes of one key until it is forgotten.
type propLife struct {
	key      keystate.Key
	number   int
	born     time.Time
	sent     int             // requests that might have claimed it
	contents map[string]bool // what they said
	open     map[*propCall]bool
	loose    int    // requests after which there may be a record
	owner    string // what the request said whose key it is, once an answer has told
	answer   *propAnswer
	fresh    int // answers that did not say that they are replays
	deeds    []*propDeed
	released int // requests of it that were withdrawn, or answered with what is not saved
	revived  bool
	given    bool // an operator has abandoned it
}

type propAnswer struct {
	status int
	header http.Header // what is kept of it
	body   []byte
	deed   *propDeed
	huge   bool
}

func (a *propAnswer) same(b *propAnswer) bool {
	return a.status == b.status && bytes.Equal(a.body, b.body) && maps.EqualFunc(a.header, b.header, slices.Equal)
}

func (a *propAnswer) String() string { return fmt.Sprintf("%d %v %q", a.status, a.header, a.body) }

// A propDeed is one processing of a request: a state that Decode has made, or one run of a handler.
type propDeed struct {
	number  int
	life    *propLife
	content string
	process *propProcess
	token   string
	acted   int  // effects that happened
	handler bool // it is a handler's run
	once    bool // of a handler's: it may not run again
	saved   bool // of a handler's: it ended with an answer that is to be saved
	ended   bool // of a handler's: it ended with any answer
	cut     bool // of a handler's: it panicked
	huge    bool
	streams bool
	release int
}

func newPropWorld(sc *propScenario, seen *propSightings) *propWorld {
	return &propWorld{
		sc: sc, seen: seen, began: time.Now(),
		lives: map[keystate.Key]*propLife{}, tokens: map[string]*propDeed{}, spent: map[string]int{},
	}
}

func (w *propWorld) verdict() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fault
}

func (w *propWorld) violated(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violatedLocked(format, args...)
}

func (w *propWorld) violatedLocked(format string, args ...any) {
	if w.fault == nil {
		w.fault = fmt.Errorf("%w\n\t%s", fmt.Errorf(format, args...), strings.Join(w.journal[max(0, len(w.journal)-60):], "\n\t"))
	}
}

func (w *propWorld) log(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logLocked(format, args...)
}

func (w *propWorld) logLocked(format string, args ...any) {
	w.journal = append(w.journal, fmt.Sprintf("%12s ", time.Since(w.began))+fmt.Sprintf(format, args...))
}

func (w *propWorld) life(key keystate.Key) *propLife {
	l := w.lives[key]
	if l == nil {
		l = w.roll(key, 0)
	}
	return l
}

func (w *propWorld) roll(key keystate.Key, number int) *propLife {
	l := &propLife{key: key, number: number, born: time.Now(), contents: map[string]bool{}, open: map[*propCall]bool{}}
	w.lives[key] = l
	return l
}

// mayBeReaped says whether the key's retention can have passed.
func (l *propLife) mayBeReaped() bool { return time.Since(l.born) >= propRetention }

// mayNotRunAgain says whether a handler has begun of which nobody knows how far it came.
func (l *propLife) mayNotRunAgain() bool {
	return !l.revived && slices.ContainsFunc(l.deeds, func(d *propDeed) bool { return d.once && (!d.ended || d.saved) })
}

// turnout is how the next attempt at something goes.
func (w *propWorld) turnout(key keystate.Key, place string) propTurnout {
	w.mu.Lock()
	defer w.mu.Unlock()
	turnouts := w.sc.fate(key).at(place)
	at := key.String() + place
	n := w.spent[at]
	if w.spent[at]++; w.healed || n >= len(turnouts) {
		return works
	}
	w.logLocked("%s %s: %s", key, place, turnouts[n])
	return turnouts[n]
}

// make begins the processing of a request.
func (w *propWorld) make(p *propProcess, key keystate.Key, content string) *propDeed {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.life(key)
	d := &propDeed{number: len(w.deeds) + 1, life: l, content: content, process: p, huge: w.sc.fate(key).huge, release: p.release}
	w.deeds = append(w.deeds, d)
	l.deeds = append(l.deeds, d)
	w.logLocked("%s deed %d of process %d for %s", key, d.number, p.number, content)
	if expiry, expires := w.sc.expiry(w.began, key); expires && l.born.After(expiry) {
		w.violatedLocked("%s: a key that has expired is taken for a new request", key)
	}
	if !l.contents[content] {
		w.violatedLocked("%s: a request is processed that nobody has sent: %s", key, content)
	}
	return d
}

// act lets a machine's effect happen.
func (w *propWorld) act(p *propProcess, number int, token string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.dead.Load() {
		return
	}
	d := w.deeds[number-1]
	d.acted++
	w.logLocked("%s deed %d acts with %.8s", d.life.key, number, token)
	w.bindLocked(d, token)
	for _, other := range d.life.deeds {
		if other != d && other.acted > 0 && !d.life.mayBeReaped() {
			w.violatedLocked("%s: processed twice, as deed %d and deed %d", d.life.key, other.number, number)
		}
	}
	if d.acted > 1 {
		w.seen.note("an effect sent again")
	}
}

// bindLocked: one processing has one token, and no two have the same.
func (w *propWorld) bindLocked(d *propDeed, token string) {
	if owner := w.tokens[token]; token == "" || owner != nil && owner != d || d.token != "" && d.token != token {
		w.violatedLocked("%s: deed %d has the token %q, and had %q", d.life.key, d.number, token, d.token)
	}
	d.token, w.tokens[token] = token, d
}

// enter begins a handler's run.
func (w *propWorld) enter(p *propProcess, key keystate.Key, content, token string, atMostOnce bool) *propDeed {
	d := w.make(p, key, content)
	w.mu.Lock()
	defer w.mu.Unlock()
	d.handler, d.once = true, atMostOnce
	l := d.life
	for _, other := range l.deeds {
		cutOff := other.process.dead.Load() || other.process.refusals.Load() > 0 || other.cut
		switch {
		case other == d || !other.handler || l.mayBeReaped() || other.ended && !other.saved:
		case atMostOnce && other.once && !l.revived:
			w.violatedLocked("%s: a handler that may run at most once runs again: deed %d after deed %d", key, d.number, other.number)
		case !cutOff:
			w.violatedLocked("%s: a handler runs again: deed %d after deed %d", key, d.number, other.number)
		case cutOff:
			w.seen.note("a handler that was cut off runs again")
		}
		if other != d && l.answer != nil && l.answer.deed == other && !l.mayBeReaped() {
			w.violatedLocked("%s: a handler runs again whose answer was heard: deed %d after deed %d", key, d.number, other.number)
		}
	}
	if token == "" {
		w.violatedLocked("%s: a handler without a token", key)
	}
	return d
}

// leave ends a handler's run.
func (w *propWorld) leave(d *propDeed, ended, saved bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d.process.dead.Load() {
		return
	}
	d.ended, d.saved, d.cut = ended, saved, !ended
	w.logLocked("%s deed %d has ended %t, to be saved %t", d.life.key, d.number, ended, saved)
	if !saved {
		d.life.released++
	}
}

// A propAccount is what an answer says of itself.
type propAccount struct {
	Deed    int      `json:"deed"`
	Content string   `json:"content"`
	Reached []string `json:"reached,omitempty"`
	Encoded int      `json:"encoded"` // another number each time
	Release int      `json:"release"`
	Reason  string   `json:"reason,omitempty"`
	Padding string   `json:"padding,omitempty"`
}

func (w *propWorld) account(p *propProcess, deed int, content string, reached []string, reason error) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.encoded++
	a := propAccount{Deed: deed, Content: content, Reached: reached, Encoded: w.encoded, Release: p.release}
	if reason != nil {
		a.Reason = reason.Error()
	}
	if final := (*keystate.FinalError)(nil); errors.As(reason, &final) { // abandoned keys have no stored answer
		a.Encoded, a.Release = 0, 0
		return propJSON(a)
	}
	if deed > 0 && w.deeds[deed-1].huge {
		a.Padding = strings.Repeat("x", 2*propMaxResponse)
	}
	return propJSON(a)
}

func propJSON(a propAccount) []byte {
	b, err := json.Marshal(a)
	if err != nil {
		panic(err)
	}
	return b
}

// send notes that a request is on its way.
func (w *propWorld) send(q *propCall) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logLocked("%s ⇒ %s %s", q.key, q.visit, q.content)
	if !q.claims() {
		return
	}
	l := w.life(q.key)
	if l.sent == 0 {
		l.born = time.Now()
	}
	q.life, q.known = l, l.answer
	for other := range l.open {
		other.company, q.company = true, true
	}
	l.sent++
	l.contents[q.content] = true
	l.open[q] = true
	if l.sent > 1 && l.answer == nil {
		w.seen.note("a retry before there is an answer")
	}
}

// hear judges what came back.
func (w *propWorld) hear(q *propCall, heard *propHeard) {
	w.mu.Lock()
	defer w.mu.Unlock()
	unheard := q.r.Context().Err() != nil || q.p.dead.Load()
	w.logLocked("%s ⇐ %s unheard %t: %s", q.key, q.visit, unheard, heard)
	if q.life != nil {
		delete(q.life.open, q)
	}
	switch {
	case unheard:
		w.seen.note("a client that has gone away")
		w.mayBeKept(q)
	case heard.aborted:
		w.hearAbort(q)
	case q.visit.wrong != "":
		w.hearRefusal(q, heard)
	case heard.problem != "":
		w.hearProblem(q, heard)
	default:
		w.hearAnswer(q, heard)
	}
}

func (w *propWorld) mayBeKept(q *propCall) {
	if q.life != nil {
		q.life.loose++
	}
}

func (w *propWorld) hearAbort(q *propCall) {
	w.mayBeKept(q)
	if q.life == nil || !slices.ContainsFunc(q.life.deeds, func(d *propDeed) bool {
		return d.cut || (d.streams || d.huge) && (q.company || q.p.refusals.Load() > 0)
	}) {
		w.violatedLocked("%s: the connection breaks off", q.key)
	}
	w.seen.note("a panic passed on")
}

// hearRefusal: what is wrong with a request by itself is told, whatever there is for its key.
func (w *propWorld) hearRefusal(q *propCall, heard *propHeard) {
	want := propWrongs[q.visit.wrong]
	if q.visit.wrong == propPlain && q.visit.endpoint() > 0 {
		want = propWrong{200, ""}
	}
	if heard.status != want.status || heard.problem != want.problem || heard.replayed {
		w.violatedLocked("%s: %s is answered %s", q.key, q.visit.wrong, heard)
	}
	w.seen.note("wrong: " + string(q.visit.wrong))
}

func (w *propWorld) hearProblem(q *propCall, heard *propHeard) {
	l := q.life
	known := q.known != nil && !l.mayBeReaped() // what was heard before the request was sent
	if want := statuses[heard.problem]; want != heard.status && want != 0 {
		w.violatedLocked("%s: %s with status %d", q.key, heard.problem, heard.status)
	}
	if heard.replayed && heard.problem != AnswerNotKept {
		w.violatedLocked("%s: %s is said to be a replay", q.key, heard.problem)
	}
	owns := known && l.owner == q.content
	open := !q.p.closing.Load() && !q.p.full.Load()
	w.seen.note("problem: " + heard.problem)
	switch heard.problem {
	case KeyReused:
		others := len(l.contents)
		if l.contents[q.content] {
			others--
		}
		if l.owner == q.content && !l.mayBeReaped() || others == 0 {
			w.violatedLocked("%s: its owner is told that it is another's", q.key)
		}
	case KeyInFlight:
		w.mayBeKept(q)
		w.hearInFlight(q, heard, known)
	case RequestInvalid, propRefused:
		if !propRefuses(q.p.release, q.content) || known {
			w.violatedLocked("%s: refused as invalid (release %d), known %t: %s", q.key, q.p.release, known, q.content)
		}
	case KeyExpired:
		expiry, expires := w.sc.expiry(w.began, q.key)
		if known || !expires || !time.Now().After(expiry) {
			w.violatedLocked("%s: expired, known %t", q.key, known)
		}
	case AnswerNotKept:
		w.mayBeKept(q)
		w.hearOmitted(q, heard)
	case Interrupted, Unavailable:
		w.mayBeKept(q)
		if owns && open {
			w.violatedLocked("%s: the answer was heard, and now %s", q.key, heard.problem)
		}
		withdrawn := q.company && l.released > 0 // the run that it has joined
		obstacle := !open || q.p.refusals.Load() > 0 || withdrawn && heard.problem == Unavailable
		if heard.problem == Interrupted && q.visit.endpoint() == 0 && !w.healed {
			f := w.sc.fate(q.key)
			obstacle = obstacle || len(f.reserve)+len(f.pay)+len(f.settle) > 0
		}
		if !obstacle {
			w.violatedLocked("%s: %s without a reason", q.key, heard.problem)
		}
	case Parked:
		w.mayBeKept(q)
		if known || heard.before.Status != keystate.Parked && heard.after.Status != keystate.Parked {
			w.violatedLocked("%s: told that it is parked (known %t), and it is %s", q.key, known, heard.after.Status)
		}
	default:
		w.violatedLocked("%s: told %s", q.key, heard)
	}
}

// hearInFlight: there is another request with the key, or the engine goes on with one.
func (w *propWorld) hearInFlight(q *propCall, heard *propHeard, known bool) {
	before, after := heard.before, heard.after
	moved := before.Status == keystate.Running || after.Status == keystate.Running || before.Version != after.Version
	if known || !q.company && !moved {
		w.violatedLocked("%s: in flight, and it is not (known %t, company %t, %s → %s)",
			q.key, known, q.company, before.Status, after.Status)
	}
	if w.sc.wait > 0 && time.Since(q.began) < w.sc.wait && q.life.released == 0 {
		w.violatedLocked("%s: in flight after %s, and not after %s", q.key, time.Since(q.began), w.sc.wait)
	}
	if w.sc.wait > 0 {
		w.seen.note("in flight longer than anybody waits")
	}
}

func (w *propWorld) hearOmitted(q *propCall, heard *propHeard) {
	l := q.life
	huge := slices.ContainsFunc(l.deeds, func(d *propDeed) bool { return d.huge && d.content == q.content })
	switch {
	case !heard.replayed:
		w.violatedLocked("%s: a tombstone that is no replay", q.key)
	case l.given:
	case !huge:
		w.violatedLocked("%s: an answer is not kept that is not too large", q.key)
	case l.answer != nil && !l.answer.huge && !l.mayBeReaped():
		w.violatedLocked("%s: a tombstone after an answer", q.key)
	}
	w.own(q)
}

// own: an answer tells whose the key is.
func (w *propWorld) own(q *propCall) {
	if l := q.life; l.owner != "" && l.owner != q.content && !l.mayBeReaped() {
		w.violatedLocked("%s: it belongs to %s, and %s is answered", q.key, l.owner, q.content)
	}
	q.life.owner = q.content
}

func (w *propWorld) hearAnswer(q *propCall, heard *propHeard) {
	l := q.life
	if heard.echo != q.raw {
		w.violatedLocked("%s: sent as %s, and echoed as %s", q.key, q.raw, heard.echo)
	}
	if !q.saves(heard.status) {
		w.hearUnsaved(q, heard)
		return
	}
	w.mayBeKept(q)
	if heard.deed < 1 || heard.deed > len(w.deeds) {
		w.violatedLocked("%s: an answer of nobody's: %s", q.key, heard)
		return
	}
	d := w.deeds[heard.deed-1]
	if d.life.key != q.key || d.content != q.content {
		w.violatedLocked("%s: %s is given the answer to %s for %s", q.key, q.content, d.life.key, d.content)
		return
	}
	if l.answer != nil && l.answer.deed != d && l.mayBeReaped() {
		l.answer, l.owner, l.fresh, l.born = nil, "", 0, time.Now() // it was reaped while requests were open
	}
	w.own(q)
	w.hearReplay(q, heard)
	if heard.status == http.StatusFailedDependency && !l.given {
		w.violatedLocked("%s: nobody has abandoned it, and that is the answer: %s", q.key, heard)
	}
	if q.visit.endpoint() == 0 {
		w.reckon(q, heard, d)
	} else if !d.ended || !d.saved {
		w.violatedLocked("%s: an answer of deed %d, which has given none that is saved", q.key, d.number)
	}
	now := &propAnswer{heard.status, heard.kept, heard.body, d, d.huge}
	if l.answer == nil {
		l.answer = now
		w.seen.note(fmt.Sprintf("answer: %d", heard.status))
		return
	}
	if was := l.answer; !was.same(now) || d.huge && !l.given {
		w.violatedLocked("%s: answered %v at first, and now %v", q.key, was, now)
	}
	if d.release != q.p.release {
		w.seen.note("a replay by another release")
	}
}

// hearReplay: one answer is the first, and whoever asks after it was heard is told that it is a replay.
func (w *propWorld) hearReplay(q *propCall, heard *propHeard) {
	l := q.life
	if heard.dropped && (heard.replayed || q.visit.endpoint() == 0) {
		w.violatedLocked("%s: a header is sent that is not kept", q.key)
	}
	if heard.replayed {
		if l.sent == 1 {
			w.violatedLocked("%s: the first answer is said to be a replay", q.key)
		}
		w.seen.note("a replay")
		if w.sc.wait > 0 && time.Since(q.began) > 0 {
			w.seen.note("an answer waited for")
		}
		return
	}
	l.fresh++
	if q.known != nil || l.fresh > 1 {
		w.violatedLocked("%s: an answer that is a replay and does not say so", q.key)
	}
}

// hearUnsaved: nothing is kept, and the key is free.
func (w *propWorld) hearUnsaved(q *propCall, heard *propHeard) {
	l := q.life
	l.released++
	if q.known != nil && !l.mayBeReaped() {
		w.violatedLocked("%s: the answer was heard, and now %s", q.key, heard)
	}
	if heard.replayed {
		w.violatedLocked("%s: what is not saved is replayed", q.key)
	}
	w.seen.note(fmt.Sprintf("an answer that is not saved: %d of endpoint %d", heard.status, q.visit.endpoint()))
}

// reckon compares what an answer says with what is on disk.
func (w *propWorld) reckon(q *propCall, heard *propHeard, d *propDeed) {
	if heard.rows == nil {
		return // the process is on its way down, and nothing can be read
	}
	var a propAccount
	if err := json.Unmarshal(heard.body, &a); err != nil {
		w.violatedLocked("%s: the answer is %q: %v", q.key, heard.body, err)
		return
	}
	if heard.status == http.StatusCreated && !slices.Equal(a.Reached, propPoints) {
		w.violatedLocked("%s: done, and only %v was reached", q.key, a.Reached)
	}
	for _, point := range propPoints {
		want := 0
		if slices.Contains(a.Reached, point) {
			want = 1
		}
		if got := heard.rows[propRow(d.number, point)]; got != want {
			w.violatedLocked("%s: answered %d with %v reached, and on disk %q is written %d times",
				q.key, heard.status, a.Reached, point, got)
		}
	}
	if slices.Contains(a.Reached, "paid") && d.acted == 0 {
		w.violatedLocked("%s: paid, and nothing was sent", q.key)
	}
}

// audit compares what is on disk with what may be there.
func (w *propWorld) audit(records map[keystate.Key]keystate.Record, rows map[string]int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range slices.Collect(maps.Values(w.lives)) {
		written := 0
		for _, d := range l.deeds {
			mine := 0
			for _, point := range propPoints {
				n := rows[propRow(d.number, point)]
				if mine += n; n > 1 {
					w.violatedLocked("%s: deed %d is written %d times at %q", l.key, d.number, n, point)
				}
			}
			if mine > 0 {
				written++
			}
		}
		if written > 1 && !l.mayBeReaped() {
			w.violatedLocked("%s: %d deeds are written", l.key, written)
		}
		r, found := records[l.key]
		w.auditRecord(l, r, found, written)
	}
}

func (w *propWorld) auditRecord(l *propLife, r keystate.Record, found bool, written int) {
	switch {
	case found && (l.sent == 0 || l.loose == 0 && len(l.open) == 0):
		w.violatedLocked("%s: there is a record (%s) of what was turned away or is not saved", l.key, r.Status)
	case found && r.Status == keystate.Parked:
		w.seen.note("parked")
	case found || l.sent == 0 || len(l.open) > 0:
	case (l.answer != nil || written > 0 || l.mayNotRunAgain()) && !l.mayBeReaped():
		w.violatedLocked("%s: forgotten before its time", l.key)
	default:
		if l.answer != nil {
			w.seen.note("a key reaped")
		}
		w.roll(l.key, l.number+1)
	}
}

var errPropDead = fmt.Errorf("the process is dead: %w", keystate.ErrClosed)

// propDeclined is what a phase refuses a request with, for good.
type propDeclined struct{ at string }

func (d *propDeclined) Error() string { return "declined at " + d.at }

var errPropObstacle = errors.New("an obstacle")

// propSightings count how often each interesting thing has happened.
type propSightings struct {
	mu    sync.Mutex
	count map[string]int
}

func (s *propSightings) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count == nil {
		s.count = map[string]int{}
	}
	s.count[what]++
}

func (s *propSightings) missing(wanted []string) (missing []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, what := range wanted {
		if s.count[what] == 0 {
			missing = append(missing, what)
		}
	}
	return missing
}

func (s *propSightings) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	for _, what := range slices.Sorted(maps.Keys(s.count)) {
		fmt.Fprintf(&b, "\t%6d  %s\n", s.count[what], what)
	}
	return b.String()
}

// TestEveryFaultIsCaught breaks keyhttp in one way after another, and plays scenarios until the model objects. A fault that it
// does not object to within so many scenarios would be one that the property cannot see.
func TestEveryFaultIsCaught(t *testing.T) {
	const budget = 2000 // scenarios; the shyest fault takes some dozens on average
	for _, f := range propFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			for seed := range budget {
				if err := propPlay(t, propScenarios.Example(seed+1), f, &propSightings{}); err != nil {
					t.Logf("caught by scenario %d: %.200v", seed+1, err)
					return
				}
			}
			t.Errorf("survived %d scenarios", budget)
		})
	}
}

type (
	propPhase = keystate.Phase[*bbolt.Tx, Exchange[propTransfer]]
	propWork  = keystate.Phase[*bbolt.Tx, recording]
)

// A propFault is something wrong with keyhttp, seen from the place where it can be put in.
type propFault struct {
	name    string
	options func(p *propProcess, o *Options)
	front   func(p *propProcess, next http.Handler) http.Handler // around everything
	handler func(p *propProcess, h *Handler[propTransfer])
	lift    func([]propPhase) []propPhase // between Handle and the engine
	effect  func(g *guard, w *propWork)   // between Middleware and the engine
}

var propFaults = []propFault{
	// What tells a request from another.
	{name: "the digest is without the query", front: propBlind(func(r *http.Request) {
		r.URL.RawQuery = strings.Trim(strings.Replace(r.URL.RawQuery, "dry=1", "", 1), "&")
	})},
	{name: "the digest is without a compared header", options: propOptions(func(o *Options) { o.CompareHeaders = []string{"Content-Type"} })},
	{name: "the digest is without the method", front: propBlind(func(r *http.Request) {
		if r.Method == http.MethodPatch {
			r.Method = http.MethodPost
		}
	})},
	{name: "the digest is without the path", front: propBlind(func(r *http.Request) {
		if path, cut := strings.CutSuffix(r.URL.Path, "/b"); cut {
			r.URL.Path = path + "/a"
		}
	})},
	{name: "the digest is without the body", front: propBlind(func(r *http.Request) {
		r.Body = io.NopCloser(strings.NewReader(`{}`))
	})},
	{name: "the digest is with a header that may vary", options: propOptions(func(o *Options) {
		o.CompareHeaders = append(o.CompareHeaders, "User-Agent")
	})},
	{name: "the digest is with the key's parameter", front: propBlind(func(r *http.Request) {
		if strings.Contains(r.URL.RawQuery, "key=") {
			r.URL.RawQuery += "&spelled=1"
		}
	})},
	{name: "JSON is compared byte for byte", options: propOptions(func(o *Options) { o.CanonicalJSON = false })},
	{name: "a quoted key is another than the bare one", front: propBlind(func(r *http.Request) {
		if key := r.Header.Get(keyHeader); strings.HasPrefix(key, `"`) && len(key) > 8 {
			r.Header.Set(keyHeader, `"\"`+key[1:len(key)-1]+`\""`)
		}
	})},
	{name: "the scope is ignored", options: func(_ *propProcess, o *Options) {
		scope := o.Scope
		o.Scope = func(r *http.Request) (string, error) {
			_, err := scope(r)
			return "ada", err
		}
	}},

	// What a retry is told.
	{name: "a replay does not say that it is one", front: propHeaders(func(h http.Header) { h.Del(replayedHeader) })},
	{name: "a first answer says that it is a replay", front: propHeaders(func(h http.Header) {
		if h.Get("X-Deed") != "" {
			h.Set(replayedHeader, "true")
		}
	})},
	{name: "the answer is written anew at each replay", options: func(p *propProcess, o *Options) {
		o.Seal = func(r Response) (Response, error) { return r, nil }
		o.Open = func(r Response) (Response, error) {
			if r.Header.Get("X-Deed") != "" && len(r.Body) > 0 {
				r.Body = append(slices.Clone(r.Body), p.w.account(p, 0, "", nil, nil)...)
			}
			return r, nil
		}
	}},
	{name: "a replay loses a header's second value", options: func(p *propProcess, o *Options) {
		o.Seal = func(r Response) (Response, error) {
			r.Header = r.Header.Clone()
			r.Header["Link"] = r.Header["Link"][:1]
			return r, nil
		}
	}},
	{name: "a header is kept that is not to be kept", options: propOptions(func(o *Options) {
		o.KeepHeaders = append(o.KeepHeaders, "X-Dropped")
	})},
	{name: "Decode is asked before the key is looked up", front: func(p *propProcess, next http.Handler) http.Handler {
		return propTelling(p, next, RequestInvalid, func(r *http.Request) bool {
			return strings.HasPrefix(r.URL.Path, propPaths[0]) && r.Header.Get(keyHeader) != "" && propRefuses(p.release, propContentOf(r))
		})
	}},
	{name: "a known key expires", front: func(p *propProcess, next http.Handler) http.Handler {
		return propTelling(p, next, KeyExpired, func(r *http.Request) bool {
			id, err := parseKey(r.Header.Get(keyHeader), false)
			expiry, expires := p.sc.expiry(p.w.began, keystate.Key{ID: id})
			sound := err == nil && r.Header.Get("X-Account") != "" && r.ContentLength < propMaxBody && r.Method != http.MethodGet
			return sound && expires && time.Now().After(expiry)
		})
	}},
	{name: "an expired key is taken for a new request", options: propOptions(func(o *Options) { o.KeyLife = 0 })},
	{name: "a request stays in flight when its client goes away", front: stayInFlight},
	{name: "a request in flight is not waited for", options: propOptions(func(o *Options) { o.Wait = 0 })},

	// What is stored.
	{name: "answers are saved that are not to be saved", options: propOptions(func(o *Options) {
		o.Save = func(int) bool { return true }
	})},
	{name: "answers are not saved that are to be saved", options: propOptions(func(o *Options) {
		o.Save = func(status int) bool { return status != 201 }
	})},
	{name: "there is no tombstone: all of a large answer is stored", options: propOptions(func(o *Options) { o.MaxResponse = 1 << 20 })},
	{name: "there is no tombstone: a request with a large answer is forgotten", effect: func(g *guard, w *propWork) {
		w.Effect = func(ctx context.Context, token string, x *recording) error {
			err := g.run(ctx, token, x)
			if err == nil && x.Response.Omitted {
				return keystate.Withdraw(errNotSaved)
			}
			return err
		}
	}},
	{name: "a final error's answer is not stored", lift: propOnError(func(x *Exchange[propTransfer], err error) error {
		if keystate.IsFinal(err) {
			x.Response = nil
		}
		return err
	})},
	{name: "an obstacle is taken for the answer", lift: propOnError(func(_ *Exchange[propTransfer], err error) error {
		return keystate.Final(err)
	})},
	{name: "what Decode turns down is claimed all the same", handler: func(p *propProcess, h *Handler[propTransfer]) {
		decode := h.decode
		h.decode = func(r *http.Request) (propTransfer, error) {
			s, err := decode(r)
			if err != nil {
				c := r.Context().Value(callInHand{}).(*call)
				s = propTransfer{Deed: p.w.make(p, c.key, propContentOf(r)).number}
				_, _ = h.machine.Start(r.Context(), c.key, asExchange(c, s))
			}
			return s, err
		}
	}},
	{name: "an answer is sent before it is durable", handler: sendEarly, front: answerEarly},

	// When handlers run.
	{name: "a handler that may run at most once is forgotten after a crash", effect: func(g *guard, w *propWork) {
		w.Effect, w.AtMostOnce = g.run, false
	}},
	{name: "a handler that was cut off is taken for done", effect: func(g *guard, w *propWork) {
		w.Effect = func(ctx context.Context, token string, x *recording) error {
			err := g.run(ctx, token, x)
			if errors.Is(err, errNobody) {
				x.Response = &Response{Status: http.StatusNoContent}
				return nil
			}
			return err
		}
	}},
	{name: "a handler that panicked is taken for done", effect: func(g *guard, w *propWork) {
		w.Effect = func(ctx context.Context, token string, x *recording) error {
			err := g.run(ctx, token, x)
			if errors.Is(err, errPanicked) {
				x.Response = &Response{Status: http.StatusNoContent}
				return nil
			}
			return err
		}
	}},
	{name: "a handler is called for another request with the key", effect: func(g *guard, w *propWork) {
		w.Effect = func(ctx context.Context, token string, x *recording) error {
			g.mu.Lock()
			request := x.Request
			for id := range g.offers {
				if id.key == keystate.KeyOf(ctx) && id.digest != string(x.Request) {
					request = []byte(id.digest)
				}
			}
			g.mu.Unlock()
			other := recording{Request: request}
			err := g.run(ctx, token, &other)
			x.Response = other.Response
			return err
		}
	}},
	{name: "a handler's context ends with the client's", effect: func(g *guard, w *propWork) {
		w.Effect = func(ctx context.Context, token string, x *recording) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			g.mu.Lock()
			for _, a := range g.offers[identity{keystate.KeyOf(ctx), string(x.Request)}] {
				defer context.AfterFunc(a.call.r.Context(), cancel)()
			}
			g.mu.Unlock()
			return g.run(ctx, token, x)
		}
	}},
	{name: "a handler runs under another token each time", effect: func(g *guard, w *propWork) {
		w.Effect = func(ctx context.Context, token string, x *recording) error { return g.run(ctx, "", x) }
	}},
}

func propOptions(change func(*Options)) func(*propProcess, *Options) {
	return func(_ *propProcess, o *Options) { change(o) }
}

// propBlind hides something of each request from keyhttp, which the program still sees.
func propBlind(change func(*http.Request)) func(*propProcess, http.Handler) http.Handler {
	return func(_ *propProcess, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			r = r.Clone(context.WithValue(r.Context(), propOriginalBody{}, body))
			r.Body = io.NopCloser(bytes.NewReader(body))
			change(r)
			next.ServeHTTP(w, r)
		})
	}
}

// propHeaders changes the headers of each answer.
func propHeaders(change func(http.Header)) func(*propProcess, http.Handler) http.Handler {
	return func(_ *propProcess, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(&propEditor{w, change}, r) })
	}
}

type propEditor struct {
	http.ResponseWriter
	change func(http.Header)
}

func (e *propEditor) WriteHeader(status int) {
	e.change(e.Header())
	e.ResponseWriter.WriteHeader(status)
}

func (e *propEditor) Unwrap() http.ResponseWriter { return e.ResponseWriter }

// propTelling answers some requests with a problem, before anything else is asked.
func propTelling(p *propProcess, next http.Handler, kind string, which func(*http.Request) bool) http.Handler {
	o, err := p.options(propFault{}).orDefault()
	if err != nil {
		panic(err)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		again := func() *http.Request {
			r.Body = io.NopCloser(bytes.NewReader(body))
			return r
		}
		if which(again()) {
			o.refuse(w, r, newProblem(kind, "by design"))
			return
		}
		next.ServeHTTP(w, again())
	})
}

// stayInFlight forgets to forget the requests whose clients go away.
func stayInFlight(p *propProcess, next http.Handler) http.Handler {
	var gone sync.Map
	telling := propTelling(p, next, KeyInFlight, func(r *http.Request) bool {
		_, found := gone.Load(r.Header.Get("X-Account") + r.Header.Get(keyHeader))
		return found
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		telling.ServeHTTP(w, r)
		if r.Context().Err() != nil {
			gone.Store(r.Header.Get("X-Account")+r.Header.Get(keyHeader), true)
		}
	})
}

// propOnError puts something between a phase's error and the engine.
func propOnError(change func(*Exchange[propTransfer], error) error) func([]propPhase) []propPhase {
	return func(phases []propPhase) []propPhase {
		for i := range phases {
			p := &phases[i]
			if effect := p.Effect; effect != nil {
				p.Effect = func(ctx context.Context, token string, x *Exchange[propTransfer]) error {
					return change(x, effect(ctx, token, x))
				}
			}
			if commit := p.Commit; commit != nil {
				p.Commit = func(ctx context.Context, tx *bbolt.Tx, x *Exchange[propTransfer]) error {
					return change(x, commit(ctx, tx, x))
				}
			}
		}
		return phases
	}
}

// sendEarly hands each answer over as it is written, and answerEarly sends it.
func sendEarly(p *propProcess, h *Handler[propTransfer]) {
	write := h.answers.write
	h.answers.write = func(w http.ResponseWriter, s propTransfer, err error) {
		write(w, s, err)
		if s.Deed == 0 {
			return
		}
		rec := httptest.NewRecorder()
		write(rec, s, err)
		rec.Header().Del("X-Dropped")
		p.w.mu.Lock()
		key := p.w.deeds[s.Deed-1].life.key
		p.w.mu.Unlock()
		rec.Header().Set(keyHeader, strconv.Quote(key.ID))
		if to, found := p.early.Load(key); found {
			select {
			case to.(chan *httptest.ResponseRecorder) <- rec:
			default:
			}
		}
	}
}

func answerEarly(p *propProcess, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := parseKey(r.Header.Get(keyHeader), false)
		key := keystate.Key{Scope: r.Header.Get("X-Account"), ID: id}
		early := make(chan *httptest.ResponseRecorder, 1)
		_, taken := p.early.LoadOrStore(key, early)
		if err != nil || taken || r.Header.Get(keyHeader)[0] != '"' {
			next.ServeHTTP(w, r)
			return
		}
		rec, done := httptest.NewRecorder(), make(chan struct{})
		p.crowd.Go(func() {
			defer close(done)
			defer p.early.Delete(key)
			defer func() { _ = recover() }()
			next.ServeHTTP(rec, r)
		})
		var first *httptest.ResponseRecorder
		select {
		case first = <-early:
		case <-done:
			first = rec
		}
		maps.Copy(w.Header(), first.Header())
		w.WriteHeader(first.Code)
		w.Write(first.Body.Bytes())
	})
}
