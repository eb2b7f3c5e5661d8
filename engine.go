// Package keystate lets an interrupted request take up where it left off.
//
// A client names a request by an idempotency key. The package models each [Key] as a state machine (started, the recovery
// points that the program registers, finished) that is kept in a bbolt file. A [Machine] is an ordered list of phases. Each
// [Phase] may act on the outside world, its effect, and then write to the store, its commit; the commit's writes, the new recovery
// point and the request's state go into one transaction. A process may stop at any instant: the next request with the same
// key, or the engine by itself after a restart, continues from the last recovery point. Once a key is finished, every further
// request with it gets the saved answer.
//
//	type Transfer struct {
//		From, To string
//		Cents    int64
//		Payout   string // filled in by payout_sent
//	}
//
//	type phase = keystate.Phase[*bbolt.Tx, Transfer]
//
//	engine, err := keystate.Open("payments.db", nil)
//	transfers, err := keystate.Register(engine, "transfer", []phase{
//		{To: "funds_reserved", Commit: reserveFunds},
//		{To: "payout_sent", Effect: sendPayout, Commit: recordPayout},
//		{To: keystate.Finished, Commit: settle},
//	})
//	answer, err := transfers.Do(ctx, keystate.Key{Scope: "ada", ID: id}, Transfer{From: "ada", To: "bob", Cents: 20_00})
//
// # What is promised
//
// A commit takes effect exactly once. An effect runs at least once, each time with the same token, which the other side is to
// treat as an idempotency key; [Phase].AtMostOnce and Reconcile are for other sides that do not. What [Machine.Do] returned
// as done is on disk. An error that leaves the outcome open says so: nothing is guessed. docs/guarantees.md has it all, with
// what is not promised.
//
// # Where it comes from
//
// Stripe's Idempotency-Key; the atomic phases and recovery points of Brandur Leach's "Implementing Stripe-like Idempotency Keys in
// Postgres"; draft-ietf-httpapi-idempotency-key-header.
package keystate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/bbolt"
)

// Options tune an engine. The zero value, and nil, mean the defaults.
type Options struct {
	// Retention is how long a finished key keeps its answer, from its finish. Default: 72 h; negative: for ever.
	Retention time.Duration

	// Parallelism is how many interrupted keys resume at the same time. Default: 16.
	Parallelism int

	// MaxRuns is how many requests run at the same time. Further callers wait in line under their own
	// contexts, and nothing is claimed for them yet. Default: 1024.
	MaxRuns int

	// MaxState is the largest encoded state, in bytes: request, interim results and answer. Default: 4 MiB.
	MaxState int

	// MaxBytes is how much the bbolt file may hold while new keys are still accepted; unfinished ones may go beyond
	// it. Default: no limit.
	MaxBytes int64

	// Headroom is the disk space, in bytes, that new keys must leave for unfinished ones. Default: 64 MiB; negative: none.
	Headroom int64

	// LockTimeout is how long Open waits for another process to let go of the file. Default: 1 s.
	LockTimeout time.Duration

	// CloseTimeout is how long Close waits for effects, which see their contexts end, and for readers. Default: 10 s.
	CloseTimeout time.Duration

	// VerifyLimit is the size of a file, in bytes, up to which Open checks all of it; of a larger one it checks what is
	// unfinished, the index is checked while new keys wait, and [Verify] checks the rest. Default: 64 MiB; negative: never all of it.
	VerifyLimit int64

	// ParkUnknown lets Register park stored keys that rest on points which the phases no longer name, instead of failing. Default: it fails.
	ParkUnknown bool

	// RefuseInFlight gives [ErrInProgress] to a caller whose key is under way, instead of letting it wait for the answer.
	// Default: it waits.
	RefuseInFlight bool

	// Logger gets what an operator should know: parked keys, panics, failing storage. Default: slog.Default().
	Logger *slog.Logger

	// Observer is told of everything that happens, for metrics and tracing. Default: nobody is.
	Observer *Observer
}

func (o *Options) orDefault() Options {
	if o == nil {
		o = new(Options)
	}
	d := *o
	d.Retention = orDefault(d.Retention, 72*time.Hour)
	d.Parallelism = max(1, orDefault(d.Parallelism, 16))
	d.MaxRuns = max(1, orDefault(d.MaxRuns, 1024))
	d.MaxState = min(max(1, orDefault(d.MaxState, 4<<20)), math.MaxInt32/2)
	d.Headroom = orDefault(d.Headroom, 64<<20)
	d.LockTimeout = orDefault(d.LockTimeout, time.Second)
	d.CloseTimeout = orDefault(d.CloseTimeout, 10*time.Second)
	d.VerifyLimit = orDefault(d.VerifyLimit, 64<<20)
	if d.Logger == nil {
		d.Logger = slog.Default()
	}
	if d.Observer == nil {
		d.Observer = new(Observer)
	}
	return d
}

// An Observer is told what happens, after it is durable. Any of the functions may be nil. They are called on the goroutine
// to which it happens, which waits for them: they must be quick, safe for concurrent use, and not call the engine.
type Observer struct {
	Claimed   func(Event) // a key begins, or is taken up again
	Committed func(Event) // a recovery point is reached: Point, Attempt, Effect, Commit, Took
	Retried   func(Event) // an attempt failed, and there will be another: Err
	Parked    func(Event) // a key stands still: Err
	Finished  func(Event) // a key has its answer; Err is what led to a refusal
	Replayed  func(Event) // a saved answer was given again
	Withdrawn func(Event) // a request was withdrawn, and its key is forgotten if it was stored: Err
	Reaped    func(Event) // finished keys were deleted: Size
	Grouped   func(Event) // a group commit: Size is how many shared it, Took how long it took
}

// An Event is one thing that happened.
type Event struct {
	Key     Key
	Machine string
	Point   RecoveryPoint // the last one reached
	Attempt int
	Err     error
	Effect  time.Duration // in the phase's Effect
	Commit  time.Duration // in the phase's Commit
	Took    time.Duration // the whole transaction, with the wait for its group and the sync
	Size    int
}

// An Engine runs machines on a store. It is safe for concurrent use.
type Engine[Tx any] struct {
	store      Store[Tx]
	shared     SharedStore[Tx] // the store, if other engines may have it open
	opts       Options
	observer   Observer
	log        *slog.Logger
	id         [16]byte
	epoch      uint64
	rules      rules[Tx]
	ctx        context.Context // ends when the engine closes
	cancel     context.CancelFunc
	commitCtx  context.Context // what a Commit gets
	slots      chan struct{}
	idle       chan func()    // hands a run to a goroutine that has ended another
	dueNow     chan struct{}  // holds a token when due may have a key for the engine to take up
	background sync.WaitGroup // the engine's own goroutines
	finished   atomic.Int64   // keys finished since the last reaping
	storeClock atomic.Pointer[reading]
	misses     atomic.Int32 // looks for callers' keys in a row that found nothing; of a shared store
	journeys   sync.Pool    // *journey[Tx], of runs that have ended

	mu       sync.Mutex
	closed   bool
	machines map[string]*machine[Tx]
	runs     map[Key]*run
	due      dueQueue
	resuming int           // keys that the engine has taken up by itself and that are under way
	waiting  int           // who waits for changed
	changed  chan struct{} // closed and replaced when a run or a reader ends, if anybody waits for it
	outboxes map[any]*outbox
	readers  map[*reader]struct{}
}

// rules are the engine's decisions, all of them pure. The property tests break them one at a time.
type rules[Tx any] struct {
	next    func(Record, ...event) (Record, error)
	token   func(store, incarnation [16]byte, to RecoveryPoint) string
	same    func(stored, asked [16]byte) bool
	plan    func(p *phase[Tx], firstTried, now time.Time) plan
	judge   func(p *phase[Tx], err error, byEffect bool, attempts, inRun int) (verdict, ParkReason)
	expired func(r Record, now time.Time, retention time.Duration) bool
}

func soundRules[Tx any]() rules[Tx] {
	return rules[Tx]{
		next:    Record.next,
		token:   token,
		same:    func(stored, asked [16]byte) bool { return stored == asked },
		plan:    (*phase[Tx]).plan,
		judge:   (*phase[Tx]).judge,
		expired: Record.expired,
	}
}

// Open opens the store in the bbolt file at path, and makes one where there is nothing: whole or not at all. A file that is
// damaged, foreign or empty is refused with [ErrCorrupt] or [ErrNotAStore], and one that another process has open with
// [ErrLocked]; none of them is touched. Interrupted keys resume when their machine is registered.
func Open(path string, opts *Options) (*Engine[*bbolt.Tx], error) {
	o := opts.orDefault()
	store, err := openBolt(path, o)
	if err != nil {
		return nil, err
	}
	e, err := New[*bbolt.Tx](store, &o)
	if err != nil {
		return nil, errors.Join(err, closeBolt(store.db, store.file))
	}
	return e, nil
}

// New starts an engine on any store. The engine closes the store when it is closed.
func New[Tx any](store Store[Tx], opts *Options) (*Engine[Tx], error) {
	return newEngine(store, opts, soundRules[Tx]())
}

func newEngine[Tx any](store Store[Tx], opts *Options, rules rules[Tx]) (*Engine[Tx], error) {
	o := opts.orDefault()
	e := &Engine[Tx]{
		store: store, opts: o, observer: *o.Observer, log: o.Logger, rules: rules,
		slots:    make(chan struct{}, o.MaxRuns),
		idle:     make(chan func()),
		dueNow:   make(chan struct{}, 1),
		machines: map[string]*machine[Tx]{}, runs: map[Key]*run{}, due: newDueQueue(),
		changed: make(chan struct{}), outboxes: map[any]*outbox{}, readers: map[*reader]struct{}{},
	}
	e.shared, _ = store.(SharedStore[Tx])
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.commitCtx = context.WithValue(context.Background(), inCommit{}, true)
	if l, ok := store.(limiter); ok {
		l.limit(o.MaxBytes, o.Headroom)
	}
	if g, ok := store.(grouper); ok && e.observer.Grouped != nil {
		g.onGroup(e.observer.Grouped)
	}
	var err error
	if e.id, e.epoch, err = store.Boot(e.ctx); err != nil {
		e.cancel()
		return nil, err
	}
	if err := e.readClock(); err != nil {
		e.cancel()
		return nil, err
	}
	e.background.Go(e.recover)
	e.background.Go(e.reapForEver)
	e.background.Go(e.watch)
	if e.shared != nil {
		e.background.Go(e.share)
	}
	return e, nil
}

// inCommit marks the context that a Commit gets.
type inCommit struct{}

// now is the time as records keep it, to the microsecond and in UTC, by the wall clock, or by the store's where engines share it.
func (e *Engine[Tx]) now() time.Time {
	at := time.Now()
	if c := e.storeClock.Load(); c != nil {
		at = c.at.Add(at.Sub(c.read))
	}
	return recorded(at)
}

func recorded(at time.Time) time.Time { return at.Round(0).Truncate(time.Microsecond).UTC() }

func newIncarnation() [16]byte { return uuid.New() }

func (e *Engine[Tx]) observe(f func(Event), ev Event) {
	if f != nil {
		f(ev)
	}
}

// admit says whether the store has room for a new key.
func (e *Engine[Tx]) admit() error {
	if a, ok := e.store.(admitter); ok {
		return a.admit()
	}
	return nil
}

// join returns the run of a key that is under way, or nil.
func (e *Engine[Tx]) join(m *machine[Tx], key Key, print [16]byte) (*run, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, ErrClosed
	}
	return e.joinLocked(m, key, print)
}

func (e *Engine[Tx]) joinLocked(m *machine[Tx], key Key, print [16]byte) (*run, error) {
	r := e.runs[key]
	switch {
	case r == nil:
		return nil, nil
	case r.machine != m.name || !e.rules.same(r.print, print):
		select {
		case <-r.claimed:
			return nil, fmt.Errorf("%w: %s", ErrMismatch, key)
		default: // it may turn out not to own the key
			return r, errContested
		}
	case e.opts.RefuseInFlight:
		return nil, fmt.Errorf("%w: %s", ErrInProgress, key)
	}
	r.joined = true
	return r, nil
}

// errContested says that a run with another request is on its way to claim the key.
var errContested = errors.New("keystate: the key is contested")

// enroll makes a run for a caller's key, or joins the one that has been made meanwhile: at most one is under way.
func (e *Engine[Tx]) enroll(m *machine[Tx], key Key, print [16]byte, known bool) (r *run, mine bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, false, ErrClosed
	}
	if r, err := e.joinLocked(m, key, print); r != nil || err != nil {
		return r, false, err
	}
	r = newRun(key, m.name, print)
	r.slot = true
	r.known.Store(e.due.remove(key) || known)
	e.runs[key] = r
	return r, true, nil
}

// dismiss ends a run: whoever waits for it gets its answer, and a key that is to go on is due later.
func (e *Engine[Tx]) dismiss(r *run) {
	e.mu.Lock()
	if e.runs[r.key] == r {
		delete(e.runs, r.key)
	}
	stored := r.known.Load() || r.record.Version > 0
	switch {
	case r.broken == nil && r.record.Status == Waiting:
		e.queueLocked(r.record)
	case e.shared != nil && errors.Is(r.broken, ErrOutcomeUnknown), // such a store works on: a look will tell what there is
		r.broken != nil && stored && !lasting(r.broken):
		e.queueLocked(Record{Key: r.key, Machine: r.machine, Fingerprint: r.print, Due: e.now().Add(storagePause)})
	}
	if r.record.Status == Answered && !r.replayed {
		e.finished.Add(1)
	}
	if !r.slot {
		e.resuming--
		e.nudge()
	}
	e.signalLocked()
	e.mu.Unlock()
	if r.slot {
		e.freeSlot()
	}
	close(r.done)
}

// queueLocked notes a key that the engine is to take up by itself.
func (e *Engine[Tx]) queueLocked(r Record) {
	if e.machines[r.Machine] != nil {
		e.due.add(r)
		e.nudge()
	}
}

// nudge lets recovery look at what is due.
func (e *Engine[Tx]) nudge() {
	select {
	case e.dueNow <- struct{}{}:
	default:
	}
}

// signalLocked wakes those who wait for a run or a reader to end.
func (e *Engine[Tx]) signalLocked() {
	if e.waiting > 0 {
		close(e.changed)
		e.changed = make(chan struct{})
	}
}

// await waits until ready, which is asked again whenever a run or a reader has ended.
func (e *Engine[Tx]) await(ctx context.Context, ready func() bool) error {
	e.mu.Lock()
	e.waiting++
	defer func() {
		e.waiting--
		e.mu.Unlock()
	}()
	for !ready() {
		changed := e.changed
		e.mu.Unlock()
		select {
		case <-changed:
			e.mu.Lock()
		case <-ctx.Done():
			e.mu.Lock()
			return ctx.Err()
		}
	}
	return nil
}

func (e *Engine[Tx]) takeSlot(ctx context.Context) error {
	select {
	case e.slots <- struct{}{}:
		return nil
	default:
	}
	select {
	case e.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-e.ctx.Done():
		return ErrClosed
	}
}

func (e *Engine[Tx]) freeSlot() { <-e.slots }

// sleep waits, and reports whether the engine is still open then.
func (e *Engine[Tx]) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-e.ctx.Done():
	}
	return e.ctx.Err() == nil
}

// An outbox holds what a transaction stages while it runs.
type outbox struct {
	owner  Key // whose commit it is
	staged []Record
}

// openOutbox lets Stage find the outbox of a transaction.
func (e *Engine[Tx]) openOutbox(tx Tx, out *outbox) {
	e.mu.Lock()
	e.outboxes[tx] = out
	e.mu.Unlock()
}

func (e *Engine[Tx]) closeOutbox(tx Tx) {
	e.mu.Lock()
	delete(e.outboxes, tx)
	e.mu.Unlock()
}

func (e *Engine[Tx]) outboxOf(tx Tx) *outbox {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.outboxes[tx]
}

// spawn runs fn on a goroutine. Those that have ended a run wait for another, since a new one would first have to grow its
// stack; there are never more than there were runs at a time.
func (e *Engine[Tx]) spawn(fn func()) {
	select {
	case e.idle <- fn:
	default:
		go func() {
			for fn != nil {
				fn()
				select {
				case fn = <-e.idle:
				case <-e.ctx.Done():
					return
				}
			}
		}()
	}
}

// enqueueStaged lets the engine take up what a commit has staged.
func (e *Engine[Tx]) enqueueStaged(staged []Record) {
	if len(staged) == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range staged {
		e.queueLocked(r)
	}
}

// Update runs fn in a transaction of the store, together with other commits; it is durable when Update returns nil. fn may
// be called more than once, exactly one call takes effect. In it, [Stage] starts keys. fn must not call the engine.
func (e *Engine[Tx]) Update(ctx context.Context, fn func(tx Tx) error) error {
	if ctx.Value(inCommit{}) != nil {
		return ErrInCommit
	}
	var out outbox
	err := e.store.Update(ctx, func(tx Tx) error {
		out = outbox{}
		e.openOutbox(tx, &out)
		defer e.closeOutbox(tx)
		return fn(tx)
	})
	if err == nil {
		e.enqueueStaged(out.staged)
	}
	return err
}

// View runs fn in a read-only transaction; fn may be called more than once where the store is a server's. It should be short: while it is open, the file
// cannot reuse pages.
func (e *Engine[Tx]) View(ctx context.Context, fn func(tx Tx) error) error {
	if ctx.Value(inCommit{}) != nil {
		return ErrInCommit
	}
	done, err := e.read()
	if err != nil {
		return err
	}
	defer done()
	return e.store.View(ctx, fn)
}

// A reader is a program's open View.
type reader struct {
	since  time.Time
	caller string
	warned bool
}

// read notes a reader, and returns how to strike it off.
func (e *Engine[Tx]) read() (done func(), err error) {
	_, file, line, _ := runtime.Caller(2)
	r := &reader{since: time.Now(), caller: fmt.Sprintf("%s:%d", file, line)}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, ErrClosed
	}
	e.readers[r] = struct{}{}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.readers, r)
		e.signalLocked()
	}, nil
}

// look reads records in a transaction of its own.
func (e *Engine[Tx]) look(ctx context.Context, fn func(Keys) error) error {
	e.mu.Lock()
	closed := e.closed
	e.mu.Unlock()
	if closed {
		return ErrClosed
	}
	return e.store.View(ctx, func(tx Tx) error { return fn(e.store.Keys(tx)) })
}

// load reads a key's record.
func (e *Engine[Tx]) load(ctx context.Context, key Key) (r Record, err error) {
	if g, ok := e.store.(getter); ok {
		r, err = g.Get(ctx, key)
	} else {
		err = e.look(ctx, func(k Keys) error {
			r, err = k.Get(key)
			return err
		})
	}
	return r, e.missing(ctx, err)
}

// recall reads what a call needs of its key's record.
func (e *Engine[Tx]) recall(ctx context.Context, c *call) (err error) {
	r := &c.replay.record
	if s, ok := e.store.(recaller); ok {
		return e.missing(ctx, s.recall(c.key, r))
	}
	*r, err = e.load(ctx, c.key)
	return err
}

// missing is the error of a look for a key: that it is not there is believed of an audited store.
func (e *Engine[Tx]) missing(ctx context.Context, err error) error {
	if errors.Is(err, ErrNotFound) {
		err = cmp.Or(e.audited(ctx), err)
	}
	return err
}

// audited waits until the store knows that what is not found in it is not there.
func (e *Engine[Tx]) audited(ctx context.Context) error {
	if a, ok := e.store.(auditor); ok {
		return a.audited(ctx)
	}
	return nil
}

// Key returns a key's record, or [ErrNotFound].
func (e *Engine[Tx]) Key(ctx context.Context, key Key) (Record, error) {
	if err := key.validate(); err != nil {
		return Record{}, err
	}
	r, err := e.load(ctx, key)
	if errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("%w: %s", ErrNotFound, key)
	}
	return r, err
}

// A Filter picks keys. Empty fields match everything.
type Filter struct {
	Machine string
	Point   RecoveryPoint
	Status  Status
}

func (f Filter) matches(r Record) bool {
	return (f.Machine == "" || f.Machine == r.Machine) &&
		(f.Point == "" || f.Point == r.Point) &&
		(f.Status == "" || f.Status == r.Status)
}

const scanPage = 256 // records in one read transaction

// Keys iterates over the keys that match: first the unfinished ones, then the finished ones in the order of
// finishing. It reads page by page, each in a transaction of its own, so a key that moves meanwhile may be seen
// twice or as it was a moment ago; none is missed that matches all the time. An error ends the iteration.
func (e *Engine[Tx]) Keys(ctx context.Context, f Filter) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for r, err := range e.scan(ctx, f) {
			if err != nil || f.matches(r) {
				if !yield(r, err) || err != nil {
					return
				}
			}
		}
	}
}

// scan iterates over all keys that can match by their status.
func (e *Engine[Tx]) scan(ctx context.Context, f Filter) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		if f.Status != Answered && f.Point != Finished && !e.pages(ctx, unfinishedPage, yield) {
			return
		}
		if (f.Status == Answered || f.Status == "") && (f.Point == Finished || f.Point == "") {
			e.pages(ctx, finishedPage, yield)
		}
	}
}

func unfinishedPage(k Keys, last Record) ([]Record, error) { return k.Unfinished(last.Key, scanPage) }
func finishedPage(k Keys, last Record) ([]Record, error)   { return k.Finished(last.Sequence, scanPage) }

// pages yields page after page, and reports whether to go on.
func (e *Engine[Tx]) pages(ctx context.Context, next func(k Keys, last Record) ([]Record, error), yield func(Record, error) bool) bool {
	var page []Record
	var last Record
	for {
		err := ctx.Err()
		if err == nil {
			err = e.look(ctx, func(k Keys) (err error) {
				page, err = next(k, last)
				return err
			})
		}
		if err != nil {
			yield(Record{}, err)
			return false
		}
		for _, r := range page {
			if !yield(r, nil) {
				return false
			}
		}
		if len(page) < scanPage {
			return true
		}
		last = page[len(page)-1]
	}
}

// Stats is what an engine and its store hold at a moment.
type Stats struct {
	Counts         // stored keys by status; Running includes interrupted ones that wait for their turn
	UnderWay int   // runs of this engine
	Queued   int   // keys that the engine will take up by itself
	Bytes    int64 // of the bbolt file that hold something
	Free     int64 // bytes of the bbolt file that will be used again before it grows
}

// Stats reads the counts. It costs the same however many keys there are.
func (e *Engine[Tx]) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	err := e.look(ctx, func(k Keys) (err error) {
		s.Counts, err = k.Counts()
		return err
	})
	if sized, ok := e.store.(sizer); ok && err == nil {
		s.Bytes, s.Free = sized.size()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	s.UnderWay, s.Queued = len(e.runs), e.due.len()
	return s, err
}

// Close refuses new work, ends the contexts of effects, lets commits drain and closes the store. Whatever is
// interrupted resumes when the store is opened again; a shutdown costs no attempt. When effects or readers do not end
// within Options.CloseTimeout, Close says which, and closes the store under them. Further calls do nothing.
func (e *Engine[Tx]) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.mu.Unlock()
	e.cancel()
	e.background.Wait()
	late := e.drain()
	if e.storeHeld() {
		go e.store.Close() // bbolt waits for its readers
		return late
	}
	return errors.Join(late, e.store.Close())
}

func (e *Engine[Tx]) storeHeld() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.readers) > 0
}

// drain waits until no run and no reader is left, and says which are after the timeout.
func (e *Engine[Tx]) drain() error {
	ctx, cancel := context.WithTimeout(context.Background(), e.opts.CloseTimeout)
	defer cancel()
	var left []string
	err := e.await(ctx, func() bool {
		left = e.leftLocked()
		return len(left) == 0
	})
	if err != nil {
		slices.Sort(left)
		return fmt.Errorf("keystate: closed although these have not ended: %s", strings.Join(left, ", "))
	}
	return nil
}

func (e *Engine[Tx]) leftLocked() []string {
	var left []string
	for key := range e.runs {
		left = append(left, "the run of "+key.String())
	}
	for r := range e.readers {
		left = append(left, "the View at "+r.caller)
	}
	return left
}
