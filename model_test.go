package keystate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
)

// The model against which property_test.go judges the engine. It has three witnesses who know nothing of each other:
//
//	the world   outside the store: it is what effects act on, and it remembers every token
//	the rows    in the program's own bucket: each commit writes one, so that a commit that counts twice, or half, shows
//	the notary  in the store, below the engine: it writes down in the same transaction what each record came to
//
// [testimony] compares them, in one read transaction, at any moment: also in the middle of everything.

// A parcel is the state of every machine in the property. For names the key to phases, who are not told it otherwise.
type parcel struct {
	For   Key
	Item  string
	Trail []string       // what each phase left, in order
	Times map[string]int // the same, counted: a state that two tries shared would count twice
}

func (s *parcel) leave(what string) {
	s.Trail = append(s.Trail, what)
	if s.Times == nil {
		s.Times = map[string]int{}
	}
	s.Times[what]++
}

// A step is a phase as the property drew it. Its id stays when a deploy gives it another name.
type step struct {
	id         int
	name       RecoveryPoint
	formerly   []RecoveryPoint
	effect     bool
	commit     bool
	stages     bool // its commit starts a receipt
	onError    ErrorPolicy
	retry      RetryPolicy
	tokenLife  time.Duration
	atMostOnce bool
	reconciles bool
	sending    []turnout // what the n-th send of the effect comes to; then it works
	asking     []turnout // what the n-th question comes to; then it is answered truly
	writing    []turnout // what the n-th attempt's commit comes to; then it works
	strikes    int       // the keys on which these strike, as bits; on others everything works
}

func (st *step) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d to %s", st.id, st.name)
	if st.effect {
		fmt.Fprintf(&b, ", effect %v", st.sending)
	}
	if st.atMostOnce {
		b.WriteString(" at most once")
	}
	if st.reconciles {
		fmt.Fprintf(&b, ", asks %v", st.asking)
	}
	if st.tokenLife > 0 {
		fmt.Fprintf(&b, ", token lives %s", st.tokenLife)
	}
	if st.commit {
		fmt.Fprintf(&b, ", commit %v", st.writing)
	}
	if st.stages {
		b.WriteString(" stages")
	}
	fmt.Fprintf(&b, ", on error %s, %+v, strikes %04b", [...]string{"retry", "fail", "ignore"}[st.onError], st.retry, st.strikes)
	return b.String()
}

// A turnout is what becomes of a phase's function.
type turnout string

const (
	works      turnout = "works"
	slow       turnout = "slow"         // 300 ms, then it works
	fails      turnout = "fails"        // an error, and nothing has happened outside
	answerLost turnout = "answer lost"  // it happens, and looks like an error
	hangs      turnout = "hangs"        // till its context ends, and nothing has happened
	hangsActed turnout = "hangs, acted" // it happens, then hangs till its context ends
	stubborn   turnout = "stubborn"     // 2 s whatever its context says, then it works
	final      turnout = "final"        // an error marked as Final
	withdraws  turnout = "withdraws"    // an error marked with Withdraw
	panics     turnout = "panics"       //
	exits      turnout = "exits"        // runtime.Goexit
	unknown    turnout = "unknown"      // of a question: it cannot be told
)

// A blueprint is a machine as the property drew it.
type blueprint struct {
	machine string
	steps   []*step
}

// position is the index of the step that follows a stored point.
func (b blueprint) position(point RecoveryPoint) (int, bool) {
	if point == Started {
		return 0, true
	}
	for i, st := range b.steps {
		if st.name == point || slices.Contains(st.formerly, point) {
			return i + 1, true
		}
	}
	return 0, false
}

// next is the index of the step with which a key goes on: the one after its point, or the one that it had begun and whose
// effect may be under way, when a deploy has put others before that. Where there is none, only an operator can help.
func (b blueprint) next(r Record) (int, bool) {
	i, known := b.position(r.Point)
	if !known || r.Begun == "" || r.FirstTried.IsZero() && !r.Acted {
		return i, known
	}
	after, known := b.position(r.Begun)
	return after - 1, known && after > i
}

func (b blueprint) nextStep(r Record) *step {
	if i, known := b.next(r); known && i < len(b.steps) {
		return b.steps[i]
	}
	return nil
}

// idOf finds the step that was ever called by a name.
func (b blueprint) idOf(name RecoveryPoint) (id int) {
	if name == Finished {
		return b.steps[len(b.steps)-1].id
	}
	fmt.Sscanf(string(name), "p%d", &id)
	return id
}

// A life is one incarnation of a key: how often the key was reaped before it.
type life struct {
	key Key
	n   int
}

func (l life) String() string { return fmt.Sprintf("%s#%d", l.key, l.n) }

// A deed is what one token may be used for: the effect of one step in one life of a key.
type deed struct {
	life
	step int
}

// A dossier is what the world knows of a deed.
type dossier struct {
	token    string
	sends    int       // begun by engines that are no zombies
	counted  int       // of these since the step was begun or revived, without those that a shutdown broke off
	first    time.Time // the first send since an operator's word that it may be sent again
	pardons  int       // an operator's words
	happened bool
	doneBy   *process // who knows that it succeeded, and has not died since
	gone     int      // questions
	cleared  bool     // asked since the last send, and told that it had not happened
	refused  *process // who was told that it fails for good
	doubted  bool     // the last question could not be answered

	withdrawn map[*process]bool // who was told by this step, the machine's first, to forget the key; nothing is to come between
}

// The world is what effects act on.
type world struct {
	db   *bbolt.DB
	seen *sightings

	mu       sync.Mutex
	fault    error         // the first thing that was not as promised
	steps    map[int]*step // all that there ever were
	deeds    map[deed]*dossier
	tokens   map[string]deed
	answers  map[life]answer
	allowed  map[Key]bool // parked keys that an operator has taken in hand
	parkings map[Key]map[ParkReason]bool
	inside   map[string]int  // runs of a key inside an engine
	retreats map[trouble]Key // the troubles with which a first step has withdrawn a key
	gone     map[life]bool   // lives that ended in that way
	healed   bool            // from here on everything works
	errors   int
	began    time.Time
	journal  []string // what happened, for whoever has to find out why
}

type answer struct {
	state []byte
	err   string
}

func newWorld(db *bbolt.DB, seen *sightings) *world {
	return &world{
		db: db, seen: seen, steps: map[int]*step{}, deeds: map[deed]*dossier{}, tokens: map[string]deed{}, answers: map[life]answer{},
		allowed: map[Key]bool{}, parkings: map[Key]map[ParkReason]bool{}, inside: map[string]int{}, retreats: map[trouble]Key{}, gone: map[life]bool{},
		began: time.Now(),
	}
}

// violated notes a broken promise; the first one counts.
func (w *world) violated(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violatedLocked(format, args...)
}

func (w *world) violatedLocked(format string, args ...any) {
	if w.fault == nil {
		w.fault = fmt.Errorf("%w\n\t%s", fmt.Errorf(format, args...), strings.Join(w.journal[max(0, len(w.journal)-60):], "\n\t"))
	}
}

// log keeps a journal of what happened.
func (w *world) log(p *process, format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logLocked(p, format, args...)
}

func (w *world) logLocked(p *process, format string, args ...any) {
	kind := ""
	switch {
	case p.dead.Load():
		kind = "(dead)"
	case p.zombie.Load():
		kind = "(zombie)"
	case p.closing.Load():
		kind = "(closing)"
	}
	w.journal = append(w.journal, fmt.Sprintf("%9.3fs %d%s ", time.Since(w.began).Seconds(), p.number, kind)+fmt.Sprintf(format, args...))
}

func (w *world) verdict() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fault
}

// A trouble is an error unlike any other.
type trouble int

func (t trouble) Error() string { return fmt.Sprintf("trouble %d", int(t)) }

func (w *world) trouble() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.troubleLocked()
}

func (w *world) troubleLocked() trouble {
	w.errors++
	return trouble(w.errors)
}

// retreat is an error marked with Withdraw. From the first step of a machine it is the word that the key vanishes, now and
// whatever else the step says about errors; from any other it is an error like any other.
func (w *world) retreat(p *process, d deed) (err error, heeded bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.retreatLocked(p, d)
}

func (w *world) retreatLocked(p *process, d deed) (err error, heeded bool) {
	t := w.troubleLocked()
	if !p.isFirst(d.step) {
		w.seen.note("a withdrawal from a later phase")
		return Withdraw(t), false
	}
	f := w.dossier(d)
	if f.withdrawn == nil {
		f.withdrawn = map[*process]bool{}
	}
	f.withdrawn[p], w.retreats[t] = true, d.key
	return Withdraw(t), true
}

// isFirst says whether a machine of the process begins with the step.
func (p *process) isFirst(step int) bool {
	for _, b := range p.blueprints {
		if b.steps[0].id == step {
			return true
		}
	}
	return false
}

// thinksBetter takes a commit's word back: it has been called again, and does not withdraw this time.
func (w *world) thinksBetter(p *process, d deed) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.dossier(d).withdrawn, p)
}

// toldToForget says whether the process was told by the machine's first step to forget a life of a key.
func (w *world) toldToForget(p *process, l life, machine string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dossier(deed{l, p.blueprints[machine].steps[0].id}).withdrawn[p]
}

func (w *world) dossier(d deed) *dossier {
	f := w.deeds[d]
	if f == nil {
		f = &dossier{}
		w.deeds[d] = f
	}
	return f
}

func (w *world) isHealed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.healed
}

// turnout picks what strikes the n-th time, and otherwise all is well.
func (st *step) turnout(script []turnout, n int, key Key) turnout {
	bit := 0
	for _, c := range []byte(key.ID) {
		bit = (bit + int(c)) % 4
	}
	if n < len(script) && st.strikes&(1<<bit) != 0 {
		return script[n]
	}
	return works
}

// What an effect and a question see of the store: only what is durable.
type durable struct {
	record Record
	found  bool
	life   life
	rows   map[int]int // by step
	book   []string
}

func (w *world) look(p *process, key Key) (d durable) {
	err := w.db.View(func(tx *bbolt.Tx) (err error) {
		d = durable{life: lifeOf(tx, key), rows: rowsOf(tx, lifeOf(tx, key)), book: bookOf(tx, lifeOf(tx, key))}
		k, err := newBoltKeys(tx, p.store.id)
		if err != nil {
			return err
		}
		d.record, err = k.Get(key)
		d.found = err == nil
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		return err
	})
	if err != nil {
		w.violated("the store cannot be read: %v", err)
	}
	return d
}

// send is every effect.
func (w *world) send(ctx context.Context, p *process, st *step, token string, s *parcel) error {
	key := s.For
	how, d, err := w.beginSend(p, st, token, s)
	if err != nil {
		return err
	}
	defer w.leave(p, key)
	switch how {
	case hangs:
		return w.broken(p, d, w.hang(ctx, p))
	case fails:
		s.leave(fmt.Sprintf("r%d", st.id))
		return w.broken(p, d, w.trouble())
	case final:
		w.refuse(p, d)
		s.leave(fmt.Sprintf("r%d", st.id))
		return Final(w.trouble())
	case withdraws:
		s.leave(fmt.Sprintf("r%d", st.id))
		err, heeded := w.retreat(p, d)
		if !heeded {
			return w.broken(p, d, err)
		}
		return err
	case slow:
		if err := nap(ctx, p, 300*time.Millisecond); err != nil {
			return w.broken(p, d, err)
		}
	case stubborn:
		_ = nap(context.Background(), p, 2*time.Second)
	}
	if err := w.happen(p, d); err != nil {
		return err
	}
	if p.crosses(afterEffect) {
		return errDead
	}
	s.leave(fmt.Sprintf("e%d", st.id))
	switch how {
	case answerLost:
		return w.broken(p, d, w.trouble())
	case hangsActed:
		return w.broken(p, d, w.hang(ctx, p))
	case panics:
		_ = w.broken(p, d, nil)
		panic(w.trouble())
	case exits:
		_ = w.broken(p, d, nil)
		runtime.Goexit()
	}
	w.succeeded(p, d)
	return nil
}

// beginSend checks everything that must be true when an effect begins.
func (w *world) beginSend(p *process, st *step, token string, s *parcel) (how turnout, d deed, err error) {
	if p.crosses(beforeEffect) {
		return "", d, errDead
	}
	now := w.look(p, s.For)
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.dead.Load() {
		return "", d, errDead
	}
	w.logLocked(p, "%s: effect %d begins, attempt %d", s.For, st.id, now.record.Attempts)
	if p.zombie.Load() { // asked under the lock: a successor may have started, and finished the key, while this waited for it

		return w.zombieSend(p, st, token, s), w.tokens[token], nil
	}
	d = deed{now.life, st.id}
	f := w.dossier(d)
	w.checkToken(f, d, token)
	w.enterLocked(p, s.For)
	w.checkDurable(p, st, s, now)
	switch {
	case f.doneBy != nil:
		w.violatedLocked("%s: the effect of step %d runs again after it was done", d.life, st.id)
	case f.refused == p:
		w.violatedLocked("%s: the effect of step %d runs again after it failed for good", d.life, st.id)
	case f.withdrawn[p]:
		w.violatedLocked("%s: the effect of step %d runs again after the key was withdrawn", d.life, st.id)
	case st.reconciles && f.sends > 0 && !f.cleared:
		w.violatedLocked("%s: the effect of step %d runs again, and nobody asked what became of it", d.life, st.id)
	case st.atMostOnce && !st.reconciles && f.sends > f.pardons:
		w.violatedLocked("%s: the at-most-once effect of step %d runs again", d.life, st.id)
	case st.tokenLife > 0 && !st.reconciles && !st.atMostOnce && !f.first.IsZero() && time.Since(f.first) >= st.tokenLife:
		w.violatedLocked("%s: the effect of step %d runs again %s after the first time, its token is honoured for %s", d.life, st.id, time.Since(f.first), st.tokenLife)
	case now.record.Attempts <= f.counted:
		w.violatedLocked("%s: %d attempts at step %d are counted, this is the %d.", d.life, now.record.Attempts, st.id, f.counted+1)
	case st.retry.Attempts > 0 && f.counted >= st.retry.Attempts:
		w.violatedLocked("%s: attempt %d at step %d, of %d", d.life, f.counted+1, st.id, st.retry.Attempts)
	}
	how = st.turnout(st.sending, f.sends, s.For)
	if w.healed {
		how = works
	}
	if f.sends++; f.sends > 1 {
		w.seen.note("an effect sent again")
	}
	f.counted++
	f.cleared, f.doubted = false, false
	if f.first.IsZero() {
		f.first = time.Now()
	}
	return how, d, nil
}

// checkDurable: an effect runs only when everything before it is durable, and while its own result is not.
func (w *world) checkDurable(p *process, st *step, s *parcel, now durable) {
	next := p.blueprints[now.record.Machine].nextStep(now.record)
	var stored parcel
	switch {
	case !now.found:
		w.violatedLocked("%s: the effect of step %d runs, and there is no record", s.For, st.id)
	case now.record.Status != Running:
		w.violatedLocked("%s: the effect of step %d runs while the key is %s", now.life, st.id, now.record.Status)
	case next != st:
		w.violatedLocked("%s: the effect of step %d runs while the key rests on %q", now.life, st.id, now.record.Point)
	case now.record.Acted:
		w.violatedLocked("%s: the effect of step %d runs again after its result was durable", now.life, st.id)
	case decodeState(now.record.State, &stored) != nil || !slices.Equal(stored.Trail, s.Trail):
		w.violatedLocked("%s: the effect of step %d sees %v, and %v is durable", now.life, st.id, s.Trail, stored.Trail)
	case now.rows[st.id] != 0:
		w.violatedLocked("%s: the effect of step %d runs after its commit", now.life, st.id)
	}
	for _, line := range now.book {
		if verb, id := parseLine(line); verb == "reach" && w.steps[id].commit && now.rows[id] != 1 {
			w.violatedLocked("%s: the effect of step %d runs, and step %d has committed %d times", now.life, st.id, id, now.rows[id])
		}
	}
}

// zombieSend only makes sure that a zombie uses no token for anything else.
func (w *world) zombieSend(p *process, st *step, token string, s *parcel) turnout {
	w.seen.note("a zombie's effect")
	w.enterLocked(p, s.For)
	d, known := w.tokens[token]
	if known && (d.key != s.For || d.step != st.id) {
		w.violatedLocked("a zombie uses the token of %s step %d for %s step %d", d.life, d.step, s.For, st.id)
	}
	return works
}

// checkToken: one token for one deed, one deed for one token.
func (w *world) checkToken(f *dossier, d deed, token string) {
	other, known := w.tokens[token]
	switch {
	case known && other != d:
		w.violatedLocked("the token of %s step %d is used for %s step %d", other.life, other.step, d.life, d.step)
	case f.token != "" && f.token != token:
		w.violatedLocked("%s: step %d is sent with another token than before", d.life, d.step)
	}
	w.tokens[token], f.token = d, token
}

func (w *world) enterLocked(p *process, key Key) {
	at := fmt.Sprint(p.number, " ", key)
	if w.inside[at]++; w.inside[at] > 1 {
		w.violatedLocked("%s: two runs at a time in one engine", key)
	}
}

func (w *world) leave(p *process, key Key) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inside[fmt.Sprint(p.number, " ", key)]--
}

// broken notes that an attempt came to nothing; one that a shutdown broke off does not count.
func (w *world) broken(p *process, d deed, err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.closing.Load() && !p.zombie.Load() {
		w.dossier(d).counted--
		w.seen.note("an attempt broken off by a shutdown")
	}
	return err
}

func (w *world) refuse(p *process, d deed) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dossier(d).refused = p
}

// happen is the moment in which the outside world changes. The dead change nothing.
func (w *world) happen(p *process, d deed) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.dead.Load() {
		return errDead
	}
	if d != (deed{}) {
		w.dossier(d).happened = true
	}
	return nil
}

func (w *world) succeeded(p *process, d deed) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !p.zombie.Load() {
		w.dossier(d).doneBy = p
	}
}

// hang waits until the context or the process ends.
func (w *world) hang(ctx context.Context, p *process) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-p.died:
		return errDead
	}
}

func nap(ctx context.Context, p *process, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.died:
		return errDead
	}
}

// ask is every Reconcile: it answers truly, unless its script says that it cannot.
func (w *world) ask(p *process, st *step, token string, s *parcel) (Outcome, error) {
	if p.crosses(beforeAsking) {
		return Unknown, errDead
	}
	now := w.look(p, s.For)
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.zombie.Load() {
		return Unknown, nil
	}
	w.logLocked(p, "%s: somebody asks about effect %d", s.For, st.id)
	d := deed{now.life, st.id}
	f := w.dossier(d)
	w.checkToken(f, d, token)
	if f.withdrawn[p] {
		w.violatedLocked("%s: somebody asks about the effect of step %d after the key was withdrawn", d.life, st.id)
	}
	how := st.turnout(st.asking, f.gone, s.For)
	if w.healed {
		how = works
	}
	f.gone++
	switch {
	case how == unknown:
		f.doubted = true
		w.seen.note("Reconcile cannot tell")
		return Unknown, nil
	case how == fails:
		return Unknown, errors.New("nobody answers the question")
	case how == withdraws:
		err, heeded := w.retreatLocked(p, d)
		if heeded {
			w.seen.note("Reconcile withdraws")
		}
		return Unknown, err
	case f.happened:
		s.leave(fmt.Sprintf("e%d", st.id))
		f.doneBy = p
		w.seen.note("Reconcile says done")
		return Done, nil
	}
	f.cleared = true
	w.seen.note("Reconcile says not done")
	return NotDone, nil
}

// write is every commit: a row in the program's bucket, beside what the engine writes.
func (w *world) write(p *process, tx *bbolt.Tx, st *step, s *parcel) error {
	l := lifeOf(tx, s.For)
	attempt := 1
	if r, err := p.store.boltStore.Keys(tx).Get(s.For); err == nil && p.blueprints[r.Machine].nextStep(r) == st {
		attempt = max(1, r.Attempts)
	}
	how := st.turnout(st.writing, attempt-1, s.For)
	if w.isHealed() {
		how = works
	}
	if how != withdraws {
		w.thinksBetter(p, deed{l, st.id})
	}
	rows := tx.Bucket(bucketRows)
	name := fmt.Appendf(nil, "%s|%d|%d", keyText(l.key), l.n, st.id)
	times, _ := strconv.Atoi(string(rows.Get(name)))
	if err := rows.Put(name, strconv.AppendInt(nil, int64(times+1), 10)); err != nil {
		return err
	}
	if err := rows.SetSequence(rows.Sequence() + 1); err != nil {
		return err
	}
	mark := fmt.Sprintf("c%d", st.id)
	if how != works {
		mark = fmt.Sprintf("r%d", st.id)
	}
	s.leave(mark)
	if st.stages && how == works {
		child := childOf(l, st.id)
		for range 2 { // the second time it must do nothing
			if err := Stage(tx, p.receipts, child, parcel{For: child, Item: "receipt"}); err != nil {
				return fmt.Errorf("staging: %w", err)
			}
		}
	}
	switch how {
	case fails:
		return w.trouble()
	case final:
		return Final(w.trouble())
	case withdraws:
		err, _ := w.retreat(p, deed{l, st.id})
		return err
	case panics:
		panic(w.trouble())
	case exits:
		runtime.Goexit()
	}
	return nil
}

const childScope = "staged"

func childOf(l life, step int) Key {
	return Key{Scope: childScope, ID: fmt.Sprintf("%s>%d>%d", keyText(l.key), l.n, step)}
}

// parent is where a staged key comes from.
func parent(child Key) (l life, step int) {
	parts := strings.Split(child.ID, ">")
	l.key = parseKey(parts[0])
	l.n, _ = strconv.Atoi(parts[1])
	step, _ = strconv.Atoi(parts[2])
	return l, step
}

func keyText(k Key) string { return k.Scope + "/" + k.ID }

func parseKey(s string) Key {
	scope, id, _ := strings.Cut(s, "/")
	return Key{scope, id}
}

// The buckets of the witnesses.
var (
	bucketRows   = []byte("rows")   // by the program: <key>|<life>|<step> → how often it was committed
	bucketBook   = []byte("book")   // by the notary: <key>|<life> → what happened, line by line
	bucketGraves = []byte("graves") // by the notary: <key> → how often it was reaped
	bucketAlive  = []byte("alive")  // by the notary: <key>, while there is a record
)

func lifeOf(tx *bbolt.Tx, key Key) life {
	n, _ := strconv.Atoi(string(tx.Bucket(bucketGraves).Get([]byte(keyText(key)))))
	return life{key, n}
}

func rowsOf(tx *bbolt.Tx, l life) map[int]int {
	rows := map[int]int{}
	prefix := fmt.Appendf(nil, "%s|%d|", keyText(l.key), l.n)
	c := tx.Bucket(bucketRows).Cursor()
	for name, times := c.Seek(prefix); bytes.HasPrefix(name, prefix); name, times = c.Next() {
		id, _ := strconv.Atoi(string(name[len(prefix):]))
		rows[id], _ = strconv.Atoi(string(times))
	}
	return rows
}

func bookOf(tx *bbolt.Tx, l life) []string {
	return strings.Fields(string(tx.Bucket(bucketBook).Get(bookName(l))))
}

func bookName(l life) []byte { return fmt.Appendf(nil, "%s|%d", keyText(l.key), l.n) }

func parseLine(line string) (verb string, step int) {
	verb, id, _ := strings.Cut(line, ":")
	step, _ = strconv.Atoi(id)
	return verb, step
}

// A notary stands between the engine and the records of one transaction. It writes down what is stored, and
// objects to what must never be.
type notary struct {
	Keys
	tx *bbolt.Tx
	p  *process
}

func (n *notary) Put(r *Record) error {
	old, err := n.Keys.Get(r.Key)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	if err := n.Keys.Put(r); err != nil {
		if errors.Is(err, ErrFenced) {
			n.p.w.seen.note("a zombie fenced")
			staged := r.Version == 0 // by another key's commit, since the engine looked
			if !n.p.zombie.Load() && !staged {
				n.p.w.violated("%s: the engine that is alive is fenced out", r.Key)
			}
		}
		return err
	}
	n.p.w.log(n.p, "%s: version %d, %s at %q, begun %q, attempts %d, acted %t %s %s", r.Key, r.Version, r.Status, r.Point, r.Begun, r.Attempts, r.Acted, r.ParkReason, r.LastError)
	n.checkChange(old, *r)
	n.checkWithdrawn(*r)
	return n.inscribe(old, *r)
}

// checkWithdrawn: what is withdrawn goes on in no way, and is gone when the transaction is durable that ends it.
func (n *notary) checkWithdrawn(r Record) {
	l := lifeOf(n.tx, r.Key)
	if !n.p.w.toldToForget(n.p, l, r.Machine) {
		return
	}
	if r.Refusal == nil {
		n.p.w.violated("%s: it is %s at %q after it was withdrawn", l, r.Status, r.Point)
		return
	}
	n.tx.OnCommit(func() {
		if n.p.w.look(n.p, r.Key).life == l {
			n.p.w.violated("%s: it was withdrawn, and is still there", l)
		}
	})
}

// checkChange objects to a change that is forbidden whatever happened before.
func (n *notary) checkChange(old, r Record) {
	w := n.p.w
	object := func(format string, args ...any) {
		w.violated("%s: "+format, append([]any{r.Key}, args...)...)
	}
	b := n.p.blueprints[r.Machine]
	w.mu.Lock()
	allowed := w.allowed[r.Key]
	w.mu.Unlock()
	if old.Version > 0 {
		from, known := b.position(old.Point)
		to, _ := b.position(r.Point)
		switch {
		case old.Status == Answered:
			object("a finished key changes")
		case old.Status == Parked && r.Status != Parked && !allowed:
			object("a parked key goes on by itself")
		case r.Incarnation != old.Incarnation || r.Fingerprint != old.Fingerprint || r.Machine != old.Machine || !r.Created.Equal(old.Created):
			object("it becomes another request")
		case r.Epoch < old.Epoch:
			object("the epoch goes back from %d to %d", old.Epoch, r.Epoch)
		case len(r.History) < len(old.History):
			object("its history is shortened")
		case known && r.Refusal == nil && to < from:
			object("the point moves back from %q to %q", old.Point, r.Point)
		}
		if r.FirstTried.IsZero() && !old.FirstTried.IsZero() && len(r.History) == len(old.History) && r.Status == Waiting && old.Status == Running {
			n.checkForgotten(r, b.nextStep(old))
		}
	}
	st := b.nextStep(r)
	if st != nil && st.retry.Attempts > 0 && r.Attempts > st.retry.Attempts {
		object("attempt %d at step %d, of %d", r.Attempts, st.id, st.retry.Attempts)
	}
	if r.Status == Parked && old.Status != Parked {
		n.checkParked(old, r, st)
	}
}

// checkForgotten: what may have been sent is not forgotten at a shutdown.
func (n *notary) checkForgotten(r Record, st *step) {
	if st == nil || n.p.zombie.Load() {
		return
	}
	l := lifeOf(n.tx, r.Key)
	w := n.p.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if f := w.deeds[deed{l, st.id}]; f != nil && !f.first.IsZero() {
		w.violatedLocked("%s: it is forgotten that step %d may have been sent", l, st.id)
	}
}

// checkParked: a key parks only for a reason, and for the right one.
func (n *notary) checkParked(old, r Record, st *step) {
	w := n.p.w
	right, f := false, &dossier{}
	l := lifeOf(n.tx, r.Key)
	w.mu.Lock()
	defer w.mu.Unlock()
	if st != nil {
		f = w.dossier(deed{l, st.id})
	}
	switch {
	case st == nil:
		right = r.ParkReason == UnknownPoint
	case r.ParkReason == AttemptsUsedUp:
		right = st.retry.Attempts > 0 && max(r.Attempts, 1) == st.retry.Attempts
	case r.ParkReason == Indeterminate:
		right = st.atMostOnce && !st.reconciles || st.reconciles && f.doubted || n.p.zombie.Load()
	case r.ParkReason == TokenExpired:
		right = st.tokenLife > 0 && !st.reconciles && !st.atMostOnce && time.Since(old.FirstTried) >= st.tokenLife
	}
	if !right {
		w.violatedLocked("%s: parked as %q after %q without a reason, at attempt %d", r.Key, r.ParkReason, r.Point, r.Attempts)
	}
	w.seen.note("parked: " + string(r.ParkReason))
	if w.parkings[r.Key] == nil {
		w.parkings[r.Key] = map[ParkReason]bool{}
	}
	w.parkings[r.Key][r.ParkReason] = true
}

// inscribe writes down which steps a record has come past.
func (n *notary) inscribe(old, r Record) error {
	l := lifeOf(n.tx, r.Key)
	b := n.p.blueprints[r.Machine]
	lines := bookOf(n.tx, l)
	if old.Version == 0 {
		if r.Key.Scope == childScope {
			n.p.w.seen.note("a key staged")
		}
		lines = append(lines, "begin:0")
		if err := n.tx.Bucket(bucketAlive).Put([]byte(keyText(r.Key)), []byte("1")); err != nil {
			return err
		}
	}
	at, _ := b.next(old)
	for i := max(1, len(old.History)); i < len(r.History); i++ {
		passage := r.History[i]
		if r.Refusal != nil && i == len(r.History)-1 {
			lines = append(lines, n.ending(old, r, b, at))
			break
		}
		if at >= len(b.steps) || b.steps[at].name != passage.Point {
			n.p.w.violated("%s: %q is reached, and it was not next", l, passage.Point)
			break
		}
		verb := "reach"
		if passage.Ignored != "" {
			verb = "ignore"
			n.p.w.seen.note("an error ignored")
		}
		lines = append(lines, fmt.Sprintf("%s:%d", verb, b.steps[at].id))
		at++
	}
	return n.tx.Bucket(bucketBook).Put(bookName(l), []byte(strings.Join(lines, " ")))
}

// ending is the line for a key that finishes otherwise than by its last step.
func (n *notary) ending(old, r Record, b blueprint, at int) string {
	acted := 0
	if old.Acted {
		acted = b.idOf(old.Begun)
	}
	if old.Status == Parked {
		n.p.w.seen.note("a key abandoned")
		return fmt.Sprintf("abandon:%d", acted)
	}
	if at >= len(b.steps) || b.steps[at].name != r.Refusal.Before {
		n.p.w.violated("%s: %q refuses, and it was not next", r.Key, r.Refusal.Before)
		return "refuse:0"
	}
	if !n.p.w.toldToForget(n.p, lifeOf(n.tx, r.Key), r.Machine) {
		n.p.w.seen.note("a key refused")
	}
	return fmt.Sprintf("refuse:%d", b.steps[at].id)
}

func (n *notary) Delete(r Record) error {
	l := lifeOf(n.tx, r.Key)
	withdrawn := r.Refusal != nil && len(r.History) == 2 && n.p.w.toldToForget(n.p, l, r.Machine)
	if r.Status != Answered {
		n.p.w.violated("%s is reaped, and it is %s", r.Key, r.Status)
	} else if kept := time.Since(r.Ended); kept < n.p.retention && !withdrawn {
		n.p.w.violated("%s is reaped %s after its end, retention is %s", r.Key, kept, n.p.retention)
	}
	if err := n.Keys.Delete(r); err != nil {
		return err
	}
	n.noteDeletion(l, withdrawn)
	return errors.Join(
		n.tx.Bucket(bucketGraves).Put([]byte(keyText(r.Key)), strconv.AppendInt(nil, int64(l.n+1), 10)),
		n.tx.Bucket(bucketAlive).Delete([]byte(keyText(r.Key))),
	)
}

func (n *notary) noteDeletion(l life, withdrawn bool) {
	w := n.p.w
	if !withdrawn {
		w.seen.note("a key reaped")
		return
	}
	w.seen.note("a key withdrawn")
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gone[l] = true
}

// testimony compares the witnesses in one transaction: the records, the rows and the book tell the same story.
func (w *world) testimony(id [16]byte) error {
	return w.db.View(func(tx *bbolt.Tx) error {
		k, err := newBoltKeys(tx, id)
		if err != nil {
			return err
		}
		records := map[Key]Record{}
		unfinished, err := k.Unfinished(Key{}, 1<<20)
		if err != nil {
			return err
		}
		finished, err := k.Finished(0, 1<<20)
		if err != nil {
			return err
		}
		for _, r := range slices.Concat(unfinished, finished) {
			if _, twice := records[r.Key]; twice {
				return fmt.Errorf("%s is stored twice", r.Key)
			}
			records[r.Key] = r
		}
		if err := checkRecords(tx, id, true); err != nil {
			return err
		}
		return errors.Join(checkAlive(tx, records), checkRows(tx, w.steps), checkTrails(tx, records, w.steps))
	})
}

// checkAlive: no key vanishes but by being reaped, and none appears from nowhere.
func checkAlive(tx *bbolt.Tx, records map[Key]Record) error {
	alive := 0
	err := tx.Bucket(bucketAlive).ForEach(func(name, _ []byte) error {
		alive++
		if _, found := records[parseKey(string(name))]; !found {
			return fmt.Errorf("%s has vanished", name)
		}
		return nil
	})
	if err == nil && alive != len(records) {
		err = fmt.Errorf("there are %d records, and %d keys were begun", len(records), alive)
	}
	return err
}

// checkRows: each step that was reached has committed exactly once, and no other has; what it staged exists.
func checkRows(tx *bbolt.Tx, steps map[int]*step) error {
	rows, book := tx.Bucket(bucketRows), tx.Bucket(bucketBook)
	expected := 0
	err := book.ForEach(func(name, lines []byte) error {
		text, n, _ := strings.Cut(string(name), "|")
		l := life{key: parseKey(text)}
		l.n, _ = strconv.Atoi(n)
		for _, line := range strings.Fields(string(lines)) {
			verb, id := parseLine(line)
			if verb != "reach" || !steps[id].commit {
				continue
			}
			expected++
			if times := string(rows.Get(fmt.Appendf(nil, "%s|%d", name, id))); times != "1" {
				return fmt.Errorf("%s: step %d has committed %q times", l, id, times)
			}
			if steps[id].stages && book.Get(bookName(life{key: childOf(l, id)})) == nil {
				return fmt.Errorf("%s: what step %d staged does not exist", l, id)
			}
		}
		if l.key.Scope == childScope {
			from, step := parent(l.key)
			if !slices.Contains(bookOf(tx, from), fmt.Sprintf("reach:%d", step)) {
				return fmt.Errorf("%s was staged by a commit that did not take effect", l)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if n := rows.Stats().KeyN; n != expected || int(rows.Sequence()) != expected {
		return fmt.Errorf("%d rows and %d commits for %d steps reached", n, rows.Sequence(), expected)
	}
	return nil
}

// checkTrails: the stored state is what the steps that were reached have left in it, no less and no more.
func checkTrails(tx *bbolt.Tx, records map[Key]Record, steps map[int]*step) error {
	for key, r := range records {
		l := lifeOf(tx, key)
		var s parcel
		if r.Refusal != nil {
			r.LastError = r.Refusal.Reason
		}
		if err := decodeState(r.State, &s); err != nil {
			return fmt.Errorf("%s: %w", l, err)
		}
		trail := slices.Clone(s.Trail)
		for _, line := range bookOf(tx, l) {
			var err error
			if trail, err = follow(trail, line, steps); err != nil {
				return fmt.Errorf("%s: the state tells of %v, and the steps were %v: %w: %s", l, s.Trail, bookOf(tx, l), err, r.LastError)
			}
		}
		if r.Acted && len(trail) == 1 && trail[0][0] == 'e' {
			trail = nil
		}
		if len(trail) > 0 {
			return fmt.Errorf("%s: the state tells of %v, and the steps were %v", l, s.Trail, bookOf(tx, l))
		}
		for what, times := range s.Times {
			if times != 1 {
				return fmt.Errorf("%s: the state tells %d times of %s", l, times, what)
			}
		}
	}
	return nil
}

var errLost = errors.New("it leads elsewhere")

// follow takes off a trail what one line of the book must have left there.
func follow(trail []string, line string, steps map[int]*step) ([]string, error) {
	verb, id := parseLine(line)
	st := steps[id]
	take := func(what string) bool {
		if len(trail) == 0 || trail[0] != fmt.Sprint(what, id) {
			return false
		}
		trail = trail[1:]
		return true
	}
	switch verb {
	case "reach":
		if st.effect && !take("e") || st.commit && !take("c") {
			return trail, errLost
		}
	case "refuse":
		acted := st.effect && take("e")
		refused := take("r")
		silent := slices.Contains(st.writing, exits) || slices.Contains(st.sending, exits) || slices.Contains(st.sending, hangs) || slices.Contains(st.asking, fails)
		if !acted && !refused && !silent {
			return trail, errLost
		}
	case "abandon":
		if id != 0 && !take("e") {
			return trail, errLost
		}
	}
	return trail, nil
}

// sightings count how often each interesting thing has happened: a property that never sees a crash proves nothing.
type sightings struct {
	mu    sync.Mutex
	count map[string]int
}

func (s *sightings) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count == nil {
		s.count = map[string]int{}
	}
	s.count[what]++
}

// missing are those that never happened.
func (s *sightings) missing(whats []string) (never []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, what := range whats {
		if s.count[what] == 0 {
			never = append(never, what)
		}
	}
	return never
}

func (s *sightings) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lines []string
	for what, n := range s.count {
		lines = append(lines, fmt.Sprintf("%8d  %s", n, what))
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[10:], b[10:]) })
	return strings.Join(lines, "\n")
}
