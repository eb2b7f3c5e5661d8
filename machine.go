package keystate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
)

// A Machine is a registered, named list of phases: what a request with state S is for. It is safe for concurrent use.
type Machine[S any] struct {
	core core
	name string
}

// core is a machine without its type parameters.
type core interface {
	start(ctx context.Context, c *call) (r *run, joined bool, err error)
	stage(tx any, key Key, print [16]byte, request []byte) error
	path() []landmark
	limit() int
}

// machine is a registered machine inside its engine.
type machine[Tx any] struct {
	engine   *Engine[Tx]
	name     string
	phases   []phase[Tx]
	position map[RecoveryPoint]int // by present and former names: the index of the phase that comes next
	fresh    func() any            // a new, zero *S
}

// Register names a machine and takes its phases; S is inferred. It returns all faults of the phases at once. It
// fails too when stored keys of the machine rest on recovery points that the phases no longer name, and lists them (see
// [Phase].Formerly and [Options.ParkUnknown]): a deploy that would strand a request stops here, not when its customer retries.
//
// Interrupted keys of the machine resume in the background as soon as Register returns.
func Register[Tx, S any](e *Engine[Tx], name string, phases []Phase[Tx, S]) (*Machine[S], error) {
	m := &machine[Tx]{
		engine: e, name: name, position: map[RecoveryPoint]int{Started: 0},
		fresh: func() any { return new(S) },
	}
	for i, p := range phases {
		m.phases = append(m.phases, erase(p))
		m.phases[i].first = i == 0
		for _, point := range append([]RecoveryPoint{p.To}, p.Formerly...) {
			m.position[point] = i + 1
		}
	}
	if err := checkPhases(name, m.phases); err != nil {
		return nil, err
	}
	if err := e.adopt(m); err != nil {
		return nil, err
	}
	return &Machine[S]{core: m, name: name}, nil
}

// point is the present name of a stored point.
func (m *machine[Tx]) point(stored RecoveryPoint) RecoveryPoint {
	if i := m.position[stored]; i > 0 {
		return m.phases[i-1].to
	}
	return stored
}

// next finds the phase with which a key goes on. A deploy may have changed what comes after its point: a phase that had begun,
// and whose effect may have been sent, comes first all the same, under whatever name, and what was inserted before it is
// passed over. Where there is no such phase any more, only an operator can tell what is right. Stale says that another phase had
// begun, of which nothing left the store.
func (m *machine[Tx]) next(r Record) (i int, stale bool, err error) {
	i, known := m.position[r.Point]
	if !known {
		return 0, false, fmt.Errorf("machine %q names no point %q", m.name, r.Point)
	}
	for _, p := range r.History {
		if m.position[p.Point] > i {
			return 0, false, fmt.Errorf("machine %q puts the point %q before %q, which was reached already", m.name, r.Point, p.Point)
		}
	}
	if r.Begun == "" {
		return i, false, nil
	}
	begun, known := m.position[r.Begun]
	switch begun--; {
	case known && begun == i:
		return i, false, nil
	case r.FirstTried.IsZero() && !r.Acted:
		return i, true, nil
	case known && begun > i:
		return begun, false, nil
	}
	return 0, false, fmt.Errorf("machine %q names no point %q after %q, and an effect of that phase is under way", m.name, r.Begun, r.Point)
}

// before is the point that a stored key would reach next.
func (m *machine[Tx]) before(r Record) RecoveryPoint {
	i, _, err := m.next(r)
	if err != nil || i >= len(m.phases) {
		return r.Point
	}
	return m.phases[i].to
}

// Name returns the name under which the machine was registered.
func (m *Machine[S]) Name() string { return m.name }

// Do carries a request to its end and returns the state as the last phase left it. The first call with a key runs
// the phases; every further one with the same key and request returns the same answer without running anything, or waits for it
// while it is being made. A key that an earlier failure interrupted goes on from its last recovery point.
//
// The error is nil; or a [*FinalError], which is an answer like any other; or a [*PhaseError] when the key stopped short
// of its end and the engine will go on with it (or, parked, an operator); or [ErrWithdrawn], with which the key is forgotten; or
// another of the package's sentinels. When ctx ends, Do returns its error, and the run goes on without the caller: to learn what became of it, ask again with the same key.
func (m *Machine[S]) Do(ctx context.Context, key Key, request S) (S, error) {
	c := newCall(key)
	defer c.end()
	s := request // comes back as the answer
	r, err := m.begin(ctx, c, &s)
	if err != nil {
		var none S
		return none, err
	}
	err = r.wait(ctx, &s)
	return s, err
}

// Start is Do without the waiting: it returns as soon as the key's claim is durable, so that the request will be carried
// to its end whatever happens to this process. A request that is withdrawn before is an error of Start, afterwards one of [Run.Wait].
func (m *Machine[S]) Start(ctx context.Context, key Key, request S) (*Run[S], error) {
	c := newCall(key)
	defer c.end()
	r, err := m.begin(ctx, c, &request)
	if err != nil {
		return nil, err
	}
	r.run = c.kept(r.run)
	return r.claimed(ctx)
}

// Find is Start for a key that is there already: it returns the saved answer, joins the run that is under way, or carries on
// what was interrupted. Where there is no such key it returns [ErrNotFound] and begins nothing. Of the request it uses only what
// tells it from another one (see [Fingerprinter]).
func (m *Machine[S]) Find(ctx context.Context, key Key, request S) (*Run[S], error) {
	c := newCall(key)
	defer c.end()
	if err := key.validate(); err != nil {
		return nil, err
	}
	var err error
	if c.print, err = m.fingerprint(request); err != nil {
		return nil, err
	}
	r, joined, err := m.core.start(ctx, c)
	if err != nil {
		return nil, err
	}
	return (&Run[S]{c.kept(r), joined}).claimed(ctx)
}

// begin answers a call, or begins its run.
func (m *Machine[S]) begin(ctx context.Context, c *call, request *S) (r Run[S], err error) {
	if err := c.key.validate(); err != nil {
		return r, err
	}
	e := stateEncoders.Get().(*stateEncoder) // for as long as the call needs what it has encoded
	defer stateEncoders.Put(e)
	if c.request, c.print, err = m.encodeWith(e, request); err != nil {
		return r, err
	}
	r.run, r.joined, err = m.core.start(ctx, c)
	return r, err
}

// A Fingerprinter is a state that knows what tells its request from another one under the same key: the digest of what
// Fingerprint returns is compared instead of that of the whole state, unless it returns nothing. It is called with the request
// as it was given to Do, Start, Find or Stage.
type Fingerprinter interface {
	Fingerprint() []byte
}

// encode returns a request in msgpack, and what tells it from another one.
func (m *Machine[S]) encode(request S) (b []byte, print [16]byte, err error) {
	e := stateEncoders.Get().(*stateEncoder)
	defer stateEncoders.Put(e)
	b, print, err = m.encodeWith(e, &request)
	return bytes.Clone(b), print, err
}

// encodeWith is encode in the encoder's memory.
func (m *Machine[S]) encodeWith(e *stateEncoder, request *S) (b []byte, print [16]byte, err error) {
	if b, err = e.encode(request, m.core.limit()); err != nil {
		return nil, print, err
	}
	if own := ownPrint(request); len(own) > 0 {
		return b, ownFingerprint(m.name, own), wellFormed(b)
	}
	print, err = fingerprint(m.name, b)
	return b, print, err
}

// fingerprint is encode's without the encoding, where that is not needed for it.
func (m *Machine[S]) fingerprint(request S) ([16]byte, error) {
	if own := ownPrint(&request); len(own) > 0 {
		return ownFingerprint(m.name, own), nil
	}
	_, print, err := m.encode(request)
	return print, err
}

// ownPrint is what a request says itself that tells it from another one, if it does.
func ownPrint[S any](request *S) []byte {
	f, ok := any(request).(Fingerprinter)
	if !ok && reflect.TypeFor[S]().Kind() == reflect.Pointer { // a pointer to it has no methods
		f, ok = any(*request).(Fingerprinter)
	}
	if !ok {
		return nil
	}
	return f.Fingerprint()
}

// Stage starts another key inside a Commit, or inside [Engine.Update], in the same transaction: the transactional
// outbox. The key exists exactly if the commit does, and the engine carries it on by itself afterwards. Staging a key
// again with the same request does nothing; with another one it is [ErrMismatch].
func Stage[Tx, S any](tx Tx, m *Machine[S], key Key, request S) error {
	if err := key.validate(); err != nil {
		return err
	}
	b, print, err := m.encode(request)
	if err != nil {
		return err
	}
	return m.core.stage(tx, key, print, b)
}

// A Run is one key's way to its end, as a caller of [Machine.Start] or [Machine.Find] sees it.
type Run[S any] struct {
	run    *run
	joined bool
}

// claimed waits until the key is held for good.
func (r *Run[S]) claimed(ctx context.Context) (*Run[S], error) {
	select {
	case <-r.run.claimed:
	case <-r.run.done:
		if r.run.record.Version == 0 && !r.run.announced() { // it never was
			return nil, r.run.err
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return r, nil
}

// Done is closed when the run has ended: with an answer, or short of it.
func (r *Run[S]) Done() <-chan struct{} { return r.run.done }

// Replayed says whether the answer had been saved before the run was started. It waits for nothing.
func (r *Run[S]) Replayed() bool { return r.run.replayed }

// Joined says whether the run was under way when it was asked for: for another caller, or by the engine itself.
func (r *Run[S]) Joined() bool { return r.joined || r.run.elsewhere.Load() }

// Wait returns what [Machine.Do] returns. Each call returns a copy of its own.
func (r *Run[S]) Wait(ctx context.Context) (S, error) {
	var s S
	err := r.wait(ctx, &s)
	return s, err
}

// wait is Wait for a state that was another one before.
func (r *Run[S]) wait(ctx context.Context, s *S) error {
	var none S
	*s = none
	select {
	case <-r.run.done:
	default:
		select {
		case <-r.run.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := r.run.err
	if record := &r.run.record; record.Status == Answered && err == nil {
		if err = r.decode(s); err == nil && record.Refusal != nil {
			err = finalError(record)
		}
	}
	return err
}

// decode fills s with the answer. What this process has encoded itself need not be looked through first.
func (r *Run[S]) decode(s *S) error {
	if r.run.replayed {
		return decodeState(r.run.record.State, s)
	}
	return decodeEncoded(r.run.record.State, s)
}

func finalError(r *Record) error {
	return &FinalError{Key: r.Key, Machine: r.Machine, Before: r.Refusal.Before, Reason: r.Refusal.Reason}
}

// DecodeState decodes a record's state, as [Engine.Key] shows it, into a value of the machine's type.
func (m *Machine[S]) DecodeState(r Record) (S, error) {
	var s S
	if r.Machine != m.name {
		return s, fmt.Errorf("keystate: %s belongs to machine %q, not %q", r.Key, r.Machine, m.name)
	}
	return s, decodeState(r.State, &s)
}

// A landmark is one phase as a drawing shows it.
type landmark struct {
	to         RecoveryPoint
	effect     bool
	commit     bool
	atMostOnce bool
}

func (m *machine[Tx]) path() []landmark {
	marks := make([]landmark, len(m.phases))
	for i, p := range m.phases {
		marks[i] = landmark{to: p.to, effect: p.effect != nil, commit: p.commit != nil, atMostOnce: p.atMostOnce}
	}
	return marks
}

func (m *machine[Tx]) limit() int { return m.engine.opts.MaxState }

func (l landmark) label() string {
	var parts []string
	if l.effect && l.atMostOnce {
		parts = append(parts, "effect at most once")
	} else if l.effect {
		parts = append(parts, "effect")
	}
	if l.commit {
		parts = append(parts, "commit")
	}
	return strings.Join(parts, ", ")
}

// String draws the machine as a Mermaid stateDiagram-v2.
func (m *Machine[S]) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "---\ntitle: %s\n---\nstateDiagram-v2\n    direction LR\n    [*] --> %s\n", m.name, Started)
	from := Started
	for _, l := range m.core.path() {
		fmt.Fprintf(&b, "    %s --> %s", mermaidName(from), mermaidName(l.to))
		if label := l.label(); label != "" {
			fmt.Fprintf(&b, " : %s", label)
		}
		b.WriteByte('\n')
		from = l.to
	}
	fmt.Fprintf(&b, "    %s --> [*]\n", Finished)
	return b.String()
}

// mermaidName spells a point as Mermaid takes it for a state's id.
func mermaidName(p RecoveryPoint) string {
	return strings.Map(func(r rune) rune {
		if r == '_' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' {
			return r
		}
		return '_'
	}, string(p))
}

// DOT draws the machine for Graphviz.
func (m *Machine[S]) DOT() string {
	var b strings.Builder
	fmt.Fprintf(&b, "digraph %q {\n    rankdir=LR\n    node [shape=box, style=rounded]\n", m.name)
	from := Started
	for _, l := range m.core.path() {
		fmt.Fprintf(&b, "    %q -> %q [label=%q]\n", from, l.to, l.label())
		from = l.to
	}
	b.WriteString("}\n")
	return b.String()
}

// stage puts a waiting key beside what else the transaction writes.
func (m *machine[Tx]) stage(anyTx any, key Key, print [16]byte, request []byte) error {
	tx, ok := anyTx.(Tx)
	if !ok {
		return fmt.Errorf("keystate: stage %s: the machine %q belongs to a store with another type of transaction", key, m.name)
	}
	out := m.engine.outboxOf(tx)
	if out == nil {
		return fmt.Errorf("keystate: stage %s: the transaction is none of a Commit or Update of the machine's engine that is running", key)
	}
	if out.owner == key {
		return fmt.Errorf("%w: %s would stage itself", ErrMismatch, key)
	}
	keys := m.engine.store.Keys(tx)
	stored, err := keys.Get(key)
	if err == nil {
		if !m.owns(&stored, print) {
			return fmt.Errorf("%w: %s", ErrMismatch, key)
		}
		return nil
	}
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	if err := m.engine.audited(m.engine.commitCtx); err != nil {
		return err
	}
	r, err := m.engine.rules.next(Record{}, event{
		kind: stage, at: m.engine.now(), epoch: m.engine.epoch, key: key, machine: m.name, fingerprint: print, incarnation: newIncarnation(), state: request,
	})
	if err != nil {
		return err
	}
	if err := keys.Put(&r); err != nil {
		return err
	}
	out.staged = append(out.staged, r)
	return nil
}

// owns says whether a stored key was used for this machine and request.
func (m *machine[Tx]) owns(stored *Record, print [16]byte) bool {
	return stored.Machine == m.name && m.engine.rules.same(stored.Fingerprint, print)
}
