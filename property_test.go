// The property: whatever happens to random machines, the promises of docs/guarantees.md hold. Scenarios are data: machines,
// and what clients, operators, deploys, clocks and crashes do to them. rapid draws and shrinks them; play carries one out,
// in a bubble of testing/synctest, so that hours pass in milliseconds; model_test.go judges; faults_test.go makes sure that it can.
//
// A soak, until something breaks:
//
//	go test -run 'TestPromises' -rapid.checks=100000 -timeout=0 .
package keystate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

// rounds is how many times rapid.checks scenarios of each mood are played: as many as take some seconds.
const rounds = 4

// moreRounds is how many more there are at most while something rare has not happened yet.
const moreRounds = 40

// TestPromises plays random scenarios, each mood with its own kind of trouble, and in the end makes sure that
// everything that the promises are about has happened.
func TestPromises(t *testing.T) {
	seen := &sightings{}
	playMoods := func(name string, rounds int) {
		t.Run(name, func(t *testing.T) {
			for _, m := range moods {
				t.Run(m.name, func(t *testing.T) {
					t.Parallel()
					for range rounds {
						rapid.Check(t, func(rt *rapid.T) {
							sc := scenarios(m).Draw(rt, "scenario")
							if err := play(t, sc, fault{}, seen); err != nil {
								rt.Fatalf("%v", err)
							}
						})
					}
				})
			}
		})
	}
	playMoods("moods", rounds)
	t.Run("stories", func(t *testing.T) {
		for _, s := range stories {
			t.Run(s.name, func(t *testing.T) {
				for range 5 {
					if err := play(t, s.scenario, fault{}, seen); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	})
	for more := 0; more < moreRounds && len(seen.missing(sights)) > 0 && !t.Failed(); more++ {
		playMoods("moods, for what was not seen yet", 1)
	}
	for _, what := range seen.missing(sights) {
		t.Errorf("never seen: %s", what)
	}
	if testing.Verbose() {
		t.Logf("seen:\n%s", seen)
	}
}

// sights are what must have happened while TestPromises played, or it has proved less than it says.
var sights = []string{
	"death before effect", "death after effect", "death before asking", "death before commit", "death in a group", "death in a group with others",
	"death after commit", "killed", "a zombie", "a zombie fenced", "a zombie's effect", "an attempt broken off by a shutdown",
	"parked: attempts used up", "parked: indeterminate", "parked: token expired", "parked: unknown point",
	"an effect sent again", "an error ignored", "a key refused", "a key abandoned", "a key revived", "a key reaped", "a key used again after it was reaped",
	"a key withdrawn", "a request withdrawn before it was stored", "a key used again after it was withdrawn", "a withdrawal from a later phase",
	"Reconcile says done", "Reconcile says not done", "Reconcile cannot tell", "Reconcile withdraws",
	"a phase added", "a phase renamed", "a phase removed", "a phase dropped", "a stranded key found at Register",
	"a key staged", "a group of several", "a failing member in a group", "a mismatch", "in progress", "a replay", "a caller that did not wait",
}

// Stories are what random scenarios tell rarely, and once went wrong or nearly did.
var stories = []struct {
	name string
	scenario
}{
	{"a phase on which a key rests is dropped", scenario{
		parcels: []*step{committing(1), committing(2), acting(3, hangs), committing(4)},
		strokes: []stroke{{do: sendsOff, visits: []visit{{}}}, moment, {do: kills, change: drops, at: 1}},
	}},
	{"two shutdowns in a row, and an effect that must not run twice", scenario{
		parcels: []*step{committing(1), but(acting(2, hangsActed), func(st *step) { st.atMostOnce = true }), committing(3)},
		strokes: []stroke{{do: sendsOff, visits: []visit{{}}}, moment, {do: restarts}, {do: restarts}, moment},
	}},
	{"a deploy renames a phase whose effect is under way", scenario{
		parcels: []*step{committing(1), acting(2, answerLost), committing(3)},
		strokes: []stroke{{do: sendsOff, visits: []visit{{}}}, moment, {do: restarts, change: renames, at: 1}, moment},
	}},
	{"a deploy inserts a phase before one whose effect is under way", scenario{
		parcels: []*step{committing(1), but(acting(2, answerLost), func(st *step) { st.atMostOnce, st.reconciles = true, true }), committing(3)},
		added:   []*step{acting(4, fails)},
		strokes: []stroke{{do: sendsOff, visits: []visit{{}}}, moment, {do: kills, change: adds, at: 1}, moment},
	}},
	{"a revived effect keeps its token when a shutdown follows at once and a deploy has renamed it", scenario{
		parcels: []*step{but(acting(1, hangsActed), func(st *step) { st.tokenLife = 3 * time.Second }), committing(2)},
		strokes: []stroke{
			{do: calls, visits: []visit{{}}}, {do: restarts, change: renames, at: 0}, {do: calls, visits: []visit{{}}},
			{do: revives}, {do: restarts}, moment,
		},
	}},
	{"a process dies before it asks what became of an effect", scenario{
		parcels: []*step{but(acting(1, answerLost), func(st *step) { st.reconciles, st.asking = true, []turnout{unknown} }), committing(2)},
		strokes: []stroke{{do: arms, death: beforeAsking, after: 1}, {do: calls, visits: []visit{{}}}, moment, {do: revives}, moment},
	}},
	{"a zombie wakes up when its key has been reaped and used again", scenario{
		parcels: []*step{but(acting(1, fails), func(st *step) {
			st.retry = RetryPolicy{InRun: 3, Initial: 10 * time.Minute, Max: 10 * time.Minute}
		}), committing(2)},
		strokes: []stroke{
			{do: sendsOff, visits: []visit{{}}}, moment, {do: undead}, {do: sleeps, pause: 4 * time.Minute},
			{do: sendsOff, visits: []visit{{}}}, {do: sleeps, pause: 30 * time.Minute},
		},
	}},
	{"a process dies in the middle of a group", scenario{
		parcels: []*step{committing(1), acting(2, works), committing(3)},
		strokes: []stroke{
			{do: arms, death: inGroup, after: 4},
			{do: calls, visits: []visit{{}, {key: 1}, {key: 2}, {key: 3}, {key: 4}, {key: 5}, {key: 6}, {key: 7}}}, moment,
		},
	}},
	{"two requests race for a key, and the owner comes back at once", scenario{
		parcels: []*step{committing(1)}, maxRuns: 2,
		strokes: []stroke{{do: calls, visits: []visit{{}, {item: 1}, {}, {item: 1}, {}, {item: 1}, {}, {item: 1}, {}, {item: 1}, {}, {item: 1}}}},
	}},
}

var moment = stroke{do: sleeps, pause: 100 * time.Millisecond}

func init() {
	for i := range stories {
		s := &stories[i].scenario
		s.parcels[len(s.parcels)-1].name = Finished
		s.receipts = []*step{but(committing(100), func(st *step) { st.name = Finished })}
		s.retention, s.parallelism, s.herded = 2*time.Minute, 16, true
		s.maxRuns = orDefault(s.maxRuns, 100)
	}
}

func committing(id int) *step {
	return &step{id: id, name: RecoveryPoint(fmt.Sprintf("p%d", id)), commit: true, strikes: 0b1111, retry: RetryPolicy{InRun: -1, Initial: 2 * time.Second}}
}

func acting(id int, sending ...turnout) *step {
	st := committing(id)
	st.effect, st.commit, st.sending = true, false, sending
	return st
}

func but(st *step, change func(*step)) *step {
	change(st)
	return st
}

// A scenario is machines, and what happens to them.
type scenario struct {
	parcels, receipts []*step
	added             []*step // what deploys add, in order
	retention         time.Duration
	parallelism       int
	maxRuns           int
	refuseInFlight    bool
	herded            bool // commits leave together every millisecond
	strokes           []stroke
}

// A stroke is one thing that happens, from outside, to the engine.
type stroke struct {
	do     deedKind
	visits []visit       // of calls and sendsOff
	pause  time.Duration // of sleeps
	death  boundary      // of arms
	after  int           // of arms: at which crossing
	change change        // of restarts, kills, undead
	at     int           // of changes: which phase; of operators: which parked key
}

type deedKind string

const (
	calls    deedKind = "calls"     // some clients call at once, and wait
	sendsOff deedKind = "sends off" // the same, and nobody waits for them
	sleeps   deedKind = "sleeps"    // the clock moves
	arms     deedKind = "arms"      // the process will die at a boundary
	kills    deedKind = "kills"     // it dies now
	restarts deedKind = "restarts"  // it is shut down and started anew
	undead   deedKind = "undead"    // a new one is started while the old one lives on
	revives  deedKind = "revives"   // an operator retries a parked key
	abandons deedKind = "abandons"  // an operator abandons one
)

// A visit is one call.
type visit struct {
	key      int
	item     int // another request where it differs
	receipt  bool
	patience time.Duration // 0: for ever
	start    bool          // Start and Wait instead of Do
	zombie   bool          // to a zombie, if there is one
}

// A boundary is where a process can die.
type boundary string

const (
	beforeEffect boundary = "before effect"
	afterEffect  boundary = "after effect"
	beforeAsking boundary = "before asking"
	beforeCommit boundary = "before commit"
	inGroup      boundary = "in a group"
	afterCommit  boundary = "after commit"
)

// A change is what a deploy does to the machine of parcels.
type change string

const (
	none    change = ""
	adds    change = "adds a phase"
	renames change = "renames a phase"
	removes change = "removes a phase"
	drops   change = "drops a phase without a word"
)

func (sc scenario) GoString() string {
	var b strings.Builder
	fmt.Fprintf(&b, "retention %s, parallelism %d, at most %d runs, refuse in flight %t, herded %t\n", sc.retention, sc.parallelism, sc.maxRuns, sc.refuseInFlight, sc.herded)
	for name, steps := range map[string][]*step{"parcel": sc.parcels, "receipt": sc.receipts, "added": sc.added} {
		for _, st := range steps {
			fmt.Fprintf(&b, "%-7s %s\n", name, st)
		}
	}
	for _, s := range sc.strokes {
		fmt.Fprintf(&b, "%s\n", s)
	}
	return b.String()
}

func (s stroke) String() string {
	switch s.do {
	case calls, sendsOff:
		return fmt.Sprintf("%-9s %+v", s.do, s.visits)
	case sleeps:
		return fmt.Sprintf("%-9s %s", s.do, s.pause)
	case arms:
		return fmt.Sprintf("%-9s %s, the %d. time", s.do, s.death, s.after)
	case kills, restarts, undead:
		return fmt.Sprintf("%-9s %s %d", s.do, s.change, s.at)
	}
	return fmt.Sprintf("%-9s %d", s.do, s.at)
}

// A mood is a kind of trouble: how often each stroke comes.
type mood struct {
	name    string
	strokes []deedKind
	most    int // strokes in a scenario
}

var moods = []mood{
	{"crashes", []deedKind{calls, arms, sendsOff, arms, kills, sleeps, calls, arms, revives}, 14},
	{"crowds", []deedKind{calls, sendsOff, calls, arms, sleeps, kills, abandons, revives}, 8},
	{"deploys", []deedKind{calls, restarts, sendsOff, restarts, sleeps, arms, kills, revives, abandons}, 14},
	{"zombies", []deedKind{calls, undead, sendsOff, undead, sleeps, arms, calls, restarts}, 12},
	{"years", []deedKind{calls, sleeps, sendsOff, sleeps, restarts, kills, revives, abandons}, 14},
}

// scenarios draws whole scenarios: few keys, small machines, short waits, so that everything meets everything.
func scenarios(m mood) *rapid.Generator[scenario] {
	return rapid.Custom(func(t *rapid.T) scenario {
		id := 0
		path := func(label string, most int, mayStage bool) []*step {
			var steps []*step
			for range rapid.IntRange(1, most).Draw(t, label) {
				id++
				steps = append(steps, drawStep(t, id, mayStage))
			}
			return steps
		}
		sc := scenario{
			parcels: path("phases", 6, true), receipts: path("phases of a receipt", 3, false), added: path("phases to add", 2, true),
			retention:      rapid.SampledFrom([]time.Duration{20 * time.Minute, 2 * time.Minute}).Draw(t, "retention"),
			parallelism:    rapid.SampledFrom([]int{16, 1}).Draw(t, "parallelism"),
			maxRuns:        rapid.SampledFrom([]int{100, 100, 2}).Draw(t, "runs"),
			refuseInFlight: rapid.IntRange(0, 7).Draw(t, "refuse in flight") == 7,
			herded:         rapid.Bool().Draw(t, "herded"),
		}
		sc.parcels[len(sc.parcels)-1].name, sc.receipts[len(sc.receipts)-1].name = Finished, Finished
		sc.strokes = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) stroke { return drawStroke(t, m) }), 1, m.most).Draw(t, "strokes")
		return sc
	})
}

func drawStep(t *rapid.T, id int, mayStage bool) *step {
	st := &step{
		id: id, name: RecoveryPoint(fmt.Sprintf("p%d", id)),
		effect: rapid.Bool().Draw(t, "effect"), commit: rapid.IntRange(0, 3).Draw(t, "commit") > 0,
		onError: rapid.SampledFrom([]ErrorPolicy{Retry, Retry, Retry, Ignore, Fail}).Draw(t, "on error"),
		retry: RetryPolicy{
			Attempts: rapid.SampledFrom([]int{3, 1, 2, 5, -1}).Draw(t, "attempts"),
			InRun:    rapid.SampledFrom([]int{3, -1, 2}).Draw(t, "attempts in a run"),
			Initial:  rapid.SampledFrom([]time.Duration{50 * time.Millisecond, 2 * time.Second}).Draw(t, "first wait"),
			Max:      10 * time.Second,
		},
		strikes: rapid.SampledFrom([]int{0b1111, 0b0001, 0b0101, 0}).Draw(t, "strikes"),
	}
	if st.effect {
		st.tokenLife = rapid.SampledFrom([]time.Duration{0, 0, 3 * time.Second, time.Minute}).Draw(t, "token life")
		st.atMostOnce = rapid.IntRange(0, 3).Draw(t, "at most once") == 3
		st.reconciles = rapid.IntRange(0, 2).Draw(t, "reconciles") > 0
		st.sending = rapid.SliceOfN(rapid.SampledFrom([]turnout{works, fails, slow, answerLost, hangs, hangsActed, stubborn, panics, exits, final, withdraws}), 0, 4).Draw(t, "sending")
		if st.reconciles {
			st.asking = rapid.SliceOfN(rapid.SampledFrom([]turnout{works, works, unknown, fails, withdraws}), 0, 2).Draw(t, "asking")
		}
	}
	if st.commit {
		st.stages = mayStage && rapid.IntRange(0, 2).Draw(t, "stages") == 2
		st.writing = rapid.SliceOfN(rapid.SampledFrom([]turnout{works, works, fails, panics, exits, final, withdraws}), 0, 4).Draw(t, "writing")
	}
	return st
}

func drawStroke(t *rapid.T, m mood) stroke {
	s := stroke{do: rapid.SampledFrom(m.strokes).Draw(t, "stroke")}
	switch s.do {
	case calls, sendsOff:
		s.visits = rapid.SliceOfN(rapid.Custom(drawVisit), 1, 5).Draw(t, "visits")
	case sleeps:
		s.pause = rapid.SampledFrom([]time.Duration{100 * time.Millisecond, 3 * time.Second, time.Minute, 4 * time.Minute, 30 * time.Minute}).Draw(t, "pause")
	case arms:
		s.death = rapid.SampledFrom([]boundary{beforeEffect, afterEffect, beforeCommit, inGroup, afterCommit, beforeAsking}).Draw(t, "death")
		if s.after = 1; s.death != beforeAsking {
			s.after = rapid.IntRange(1, 4).Draw(t, "after")
		}
	case kills, restarts, undead:
		s.change = rapid.SampledFrom([]change{none, adds, renames, removes, drops}).Draw(t, "change")
	}
	s.at = rapid.IntRange(0, 5).Draw(t, "at")
	return s
}

func drawVisit(t *rapid.T) visit {
	return visit{
		key:      rapid.IntRange(0, 3).Draw(t, "key"),
		item:     max(0, rapid.IntRange(-3, 1).Draw(t, "item")),
		receipt:  rapid.IntRange(0, 9).Draw(t, "receipt") == 9,
		patience: rapid.SampledFrom([]time.Duration{0, 0, 0, 200 * time.Millisecond}).Draw(t, "patience"),
		start:    rapid.IntRange(0, 3).Draw(t, "start") == 3,
		zombie:   rapid.IntRange(0, 2).Draw(t, "to the zombie") == 2,
	}
}

// errDead is what a process hears after its death, where a real one would hear nothing.
var errDead = errors.New("the process is dead")

// A process is an engine with its machines, from its boot to its death.
type process struct {
	number     int
	w          *world
	store      *mortal
	engine     *Engine[*bbolt.Tx]
	parcels    *Machine[parcel]
	receipts   *Machine[parcel]
	blueprints map[string]blueprint
	retention  time.Duration

	zombie, closing, dead atomic.Bool
	died                  chan struct{}

	mu    sync.Mutex
	death boundary
	after int
}

// crosses says whether the process is dead when it crosses a boundary, or dies there.
func (p *process) crosses(b boundary) bool {
	p.mu.Lock()
	dies := p.death == b
	if dies {
		p.after--
		dies = p.after == 0
	}
	p.mu.Unlock()
	if dies && p.die() {
		p.w.seen.note("death " + string(b))
		if b == inGroup && p.store.members() > 1 {
			p.w.seen.note("death in a group with others")
		}
	}
	return p.dead.Load()
}

// die ends the process: from now on it changes nothing, neither in the store nor in the world.
func (p *process) die() bool {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if p.dead.Swap(true) {
		return false
	}
	close(p.died)
	return true
}

// A mortal store is the bbolt store as a process has it: after its death nothing reaches it.
type mortal struct {
	*boltStore
	p      *process
	herded bool

	mu      sync.Mutex
	tx      *bbolt.Tx // of the present group
	inTx    int
	updates int
}

func (m *mortal) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if m.p.dead.Load() {
		return errDead
	}
	m.watchForLoops()
	if m.herded {
		time.Sleep(time.Millisecond)
	}
	err := m.boltStore.Update(ctx, func(tx *bbolt.Tx) error {
		if m.p.crosses(beforeCommit) {
			return errDead
		}
		m.join(tx)
		if err := fn(tx); err != nil {
			m.noteFailure(err)
			return err
		}
		if m.p.crosses(inGroup) {
			return errDead
		}
		return nil
	})
	if m.p.dead.Load() || err == nil && m.p.crosses(afterCommit) {
		return errDead
	}
	return err
}

func (m *mortal) View(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if m.p.dead.Load() {
		return errDead
	}
	return m.boltStore.View(ctx, fn)
}

func (m *mortal) recall(key Key, r *Record) error {
	if m.p.dead.Load() {
		return errDead
	}
	return m.boltStore.recall(key, r)
}

func (m *mortal) Keys(tx *bbolt.Tx) Keys {
	return &notary{Keys: m.boltStore.Keys(tx), tx: tx, p: m.p}
}

// join counts who shares a transaction.
func (m *mortal) join(tx *bbolt.Tx) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tx != tx {
		m.tx, m.inTx = tx, 0
	}
	if m.inTx++; m.inTx == 2 {
		m.p.w.seen.note("a group of several")
	}
}

func (m *mortal) members() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.inTx
}

func (m *mortal) noteFailure(err error) {
	var failed *phaseFailure
	if errors.As(err, &failed) && m.members() > 1 {
		m.p.w.seen.note("a failing member in a group")
	}
}

// watchForLoops ends a process that runs in circles.
func (m *mortal) watchForLoops() {
	m.mu.Lock()
	m.updates++
	loops := m.updates > 20_000
	m.mu.Unlock()
	if loops {
		m.p.w.violated("the engine runs in circles")
		m.p.die()
	}
}

// A playing is a scenario on its way.
type playing struct {
	sc      scenario
	fault   fault
	db      *bbolt.DB
	w       *world
	steps   []*step // of parcels, as deployed last
	added   int
	orphans []orphans
	heirs   map[int]int // of steps that are gone: the step before them
	p       *process
	zombies []*process
	booted  int
	absent  sync.WaitGroup // callers for whom nobody waits
}

// Orphans are points that a deploy dropped without a word.
type orphans struct {
	heir  int // the step after which their keys will go on
	names []RecoveryPoint
}

// play carries a scenario out, and returns the first promise that was broken.
func play(t *testing.T, sc scenario, f fault, seen *sightings) (err error) {
	defer func() {
		if v := recover(); v != nil { // synctest panics when goroutines wait for each other for ever
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	path := filepath.Join(t.TempDir(), "keys.db")
	if err := os.WriteFile(path, emptyStore(), 0o600); err != nil {
		return err
	}
	defer os.Remove(path)
	synctest.Test(t, func(t *testing.T) {
		err = playInBubble(path, sc, f, seen)
	})
	return err
}

func playInBubble(path string, sc scenario, f fault, seen *sightings) (err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, NoFreelistSync: true, NoGrowSync: true, InitialMmapSize: 64 << 20})
	if err != nil {
		return err
	}
	pl := &playing{sc: sc, fault: f, db: db, w: newWorld(db, seen), steps: sc.parcels, heirs: map[int]int{}}
	defer func() {
		err = errors.Join(err, db.Close())
	}()
	pl.enter(slices.Concat(sc.parcels, sc.receipts, sc.added))
	pl.boot(none, 0)
	for _, s := range sc.strokes {
		if pl.broken() != nil {
			break
		}
		pl.stroke(s)
		pl.tend()
		pl.testify()
	}
	if pl.broken() == nil {
		pl.end()
	}
	pl.clear()
	return pl.w.verdict()
}

// emptyStore is a bbolt file with everybody's buckets.
var emptyStore = sync.OnceValue(func() []byte {
	dir, err := os.MkdirTemp("", "keystate")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "empty.db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		panic(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketRows, bucketBook, bucketGraves, bucketAlive} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		panic(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	return b
})

func (pl *playing) broken() error { return pl.w.verdict() }

func (pl *playing) enter(steps []*step) {
	pl.w.mu.Lock()
	defer pl.w.mu.Unlock()
	for _, st := range steps {
		pl.w.steps[st.id] = st
	}
}

func (pl *playing) testify() {
	if err := pl.w.testimony(pl.p.store.id); err != nil {
		pl.w.violated("%v", err)
	}
}

func (pl *playing) stroke(s stroke) {
	pl.w.log(pl.p, "— %s", s)
	switch s.do {
	case calls:
		var crowd sync.WaitGroup
		pl.visit(&crowd, s.visits)
		crowd.Wait()
	case sendsOff:
		pl.visit(&pl.absent, s.visits)
	case sleeps:
		time.Sleep(s.pause)
	case arms:
		pl.p.mu.Lock()
		pl.p.death, pl.p.after = s.death, s.after
		pl.p.mu.Unlock()
	case kills:
		pl.p.die()
		pl.w.seen.note("killed")
		pl.bury(pl.p)
		pl.boot(s.change, s.at)
	case restarts:
		pl.shutDown()
		pl.boot(s.change, s.at)
	case undead:
		pl.curse()
		pl.boot(none, 0)
	case revives, abandons:
		pl.operate(s)
	}
}

// tend replaces a process that has died.
func (pl *playing) tend() {
	if pl.p.dead.Load() {
		pl.bury(pl.p)
		pl.boot(none, 0)
	}
}

// boot starts a process, with the machines that the last deploy left, after the change.
func (pl *playing) boot(c change, at int) {
	pl.deploy(c, at)
	pl.start(false)
}

func (pl *playing) start(parkUnknown bool) {
	pl.booted++
	p := &process{
		number: pl.booted, w: pl.w, died: make(chan struct{}), retention: pl.sc.retention,
		blueprints: map[string]blueprint{"parcel": {"parcel", pl.steps}, "receipt": {"receipt", pl.sc.receipts}},
	}
	p.store = &mortal{boltStore: newBoltStore(pl.db, pl.db.Path()), p: p, herded: pl.sc.herded}
	rules := soundRules[*bbolt.Tx]()
	store := pl.fault.apply(p.store, &rules)
	attached.Delete(pl.db) // whoever carries an engine besides is a zombie
	opts := &Options{
		Retention: pl.sc.retention, Parallelism: pl.sc.parallelism, MaxRuns: pl.sc.maxRuns, RefuseInFlight: pl.sc.refuseInFlight,
		Headroom: -1, ParkUnknown: parkUnknown, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	pl.p = p
	var err error
	if p.engine, err = newEngine(store, opts, rules); err != nil {
		pl.w.violated("the engine does not start: %v", err)
		return
	}
	if p.receipts, err = Register(p.engine, "receipt", p.phases("receipt")); err != nil {
		pl.w.violated("the machine of receipts is refused: %v", err)
		return
	}
	stranded := pl.stranded()
	p.parcels, err = Register(p.engine, "parcel", p.phases("parcel"))
	switch {
	case err != nil && !parkUnknown && len(stranded) > 0 && strings.Contains(err.Error(), string(stranded[0])):
		pl.w.seen.note("a stranded key found at Register")
		pl.close(p)
		pl.start(true)
	case err != nil:
		pl.w.violated("the machine of parcels is refused: %v", err)
	case len(stranded) > 0 && !parkUnknown:
		pl.w.violated("nobody notices that keys are stranded on %v", stranded)
	}
}

// stranded lists the points because of which unfinished keys cannot go on with the machine of parcels.
func (pl *playing) stranded() (points []RecoveryPoint) {
	for _, r := range pl.unfinished() {
		b := pl.p.blueprints[r.Machine]
		if _, known := b.next(r); known || r.Status == Parked {
			continue
		}
		if _, known := b.position(r.Point); known {
			points = append(points, r.Begun)
		} else {
			points = append(points, r.Point)
		}
	}
	return points
}

func (pl *playing) unfinished() (records []Record) {
	err := pl.db.View(func(tx *bbolt.Tx) error {
		k, err := newBoltKeys(tx, pl.p.store.id)
		if err != nil {
			return nil // there is nothing yet
		}
		records, err = k.Unfinished(Key{}, 1<<20)
		return err
	})
	if err != nil {
		pl.w.violated("the records cannot be read: %v", err)
	}
	return records
}

// phases makes phases of a blueprint's steps.
func (p *process) phases(machine string) []Phase[*bbolt.Tx, parcel] {
	var phases []Phase[*bbolt.Tx, parcel]
	for _, st := range p.blueprints[machine].steps {
		ph := Phase[*bbolt.Tx, parcel]{
			To: st.name, Formerly: st.formerly, OnError: st.onError, Retry: st.retry, Timeout: 5 * time.Second,
			TokenLife: st.tokenLife, AtMostOnce: st.atMostOnce,
		}
		if st.effect {
			ph.Effect = func(ctx context.Context, token string, s *parcel) error { return p.w.send(ctx, p, st, token, s) }
		}
		if st.reconciles {
			ph.Reconcile = func(ctx context.Context, token string, s *parcel) (Outcome, error) { return p.w.ask(p, st, token, s) }
		}
		if st.commit {
			ph.Commit = func(_ context.Context, tx *bbolt.Tx, s *parcel) error { return p.w.write(p, tx, st, s) }
		}
		phases = append(phases, ph)
	}
	return phases
}

// bury closes the engine of a process that is dead.
func (pl *playing) bury(p *process) {
	if p.engine != nil {
		_ = p.engine.Close()
	}
	pl.forgetUndurable(p)
}

// forgetUndurable: what a process knew and had not written down is lost with it.
func (pl *playing) forgetUndurable(p *process) {
	pl.w.mu.Lock()
	defer pl.w.mu.Unlock()
	for _, f := range pl.w.deeds {
		if f.doneBy == p {
			f.doneBy = nil
		}
	}
}

// curse makes a zombie of the process: it lives on, and does not know that it has a successor.
func (pl *playing) curse() {
	pl.p.zombie.Store(true)
	pl.forgetUndurable(pl.p)
	pl.zombies = append(pl.zombies, pl.p)
	pl.w.seen.note("a zombie")
}

// shutDown closes the engine in good order: that costs no attempt.
func (pl *playing) shutDown() {
	synctest.Wait()
	before := pl.unfinished()
	pl.p.closing.Store(true)
	pl.close(pl.p)
	if pl.p.dead.Load() {
		pl.bury(pl.p)
		return
	}
	after := map[Key]Record{}
	for _, r := range pl.unfinished() {
		after[r.Key] = r
	}
	for _, b := range before {
		a, found := after[b.Key]
		brokenOff := found && b.Status == Running && a.Status == Waiting && a.Version == b.Version+1 &&
			a.LastError == "" // a failure may come between, and then the attempt is spent
		if brokenOff && a.Attempts != max(0, b.Attempts-1) {
			pl.w.violated("%s: %d attempts before the shutdown, %d after it", b.Key, b.Attempts, a.Attempts)
		}
	}
}

func (pl *playing) close(p *process) {
	if err := p.engine.Close(); err != nil && !p.dead.Load() {
		pl.w.violated("closing: %v", err)
	}
}

// visit lets clients call, all at once.
func (pl *playing) visit(crowd *sync.WaitGroup, visits []visit) {
	for _, v := range visits {
		p := pl.p
		if v.zombie && len(pl.zombies) > 0 {
			p = pl.zombies[len(pl.zombies)-1]
		}
		crowd.Go(func() { pl.call(p, v) })
	}
}

func (pl *playing) call(p *process, v visit) {
	m := p.parcels
	if v.receipt {
		m = p.receipts
	}
	if m == nil {
		return
	}
	key := Key{ID: fmt.Sprintf("k%d", v.key)}
	request := parcel{For: key, Item: fmt.Sprintf("item %d", v.item)}
	ctx, cancel := context.WithCancel(context.Background())
	if v.patience > 0 {
		ctx, cancel = context.WithTimeout(ctx, v.patience)
	}
	defer cancel()
	if !v.start {
		got, err := m.Do(ctx, key, request)
		pl.hear(p, m, key, request, v.patience > 0, got, err)
		return
	}
	r, err := m.Start(ctx, key, request)
	if err != nil {
		pl.hear(p, m, key, request, v.patience > 0, parcel{}, err)
		return
	}
	if !pl.w.look(p, key).found && !pl.w.forgotten(key) {
		pl.w.violated("%s: Start has returned, and nothing is on disk", key)
	}
	got, err := r.Wait(ctx)
	pl.hear(p, m, key, request, v.patience > 0, got, err)
}

// hear judges what a client was told.
func (pl *playing) hear(p *process, m *Machine[parcel], key Key, request parcel, impatient bool, got parcel, err error) {
	w := pl.w
	var refusal *FinalError
	var stopped *PhaseError
	var mark *finalMark
	var cause trouble
	errors.As(err, &cause)
	w.mu.Lock()
	owner, retreat := w.retreats[cause]
	w.mu.Unlock()
	excused := p.dead.Load() || p.zombie.Load() || p.closing.Load()
	switch {
	case err == nil || errors.As(err, &refusal):
		pl.hearAnswer(p, m, key, request, got, refusal)
	case errors.Is(err, ErrMismatch):
		pl.hearMismatch(p, m, key, request)
	case errors.Is(err, ErrWithdrawn):
		pl.hearWithdrawal(p, key, got, retreat && owner == key, err)
	case excused:
	case retreat:
		w.violated("%s: its first phase has withdrawn it, and its caller is told %v", key, err)
	case errors.As(err, &mark):
		w.violated("%s: an error marked as Final is no answer: %v", key, err)
	case errors.As(err, &stopped):
		w.mu.Lock()
		parked := w.parkings[key][stopped.Reason]
		w.mu.Unlock()
		if (stopped.Reason != "") != errors.Is(err, ErrParked) || stopped.Reason != "" && !parked || errors.Is(err, ErrFenced) {
			w.violated("%s: told %v", key, err)
		}
	case errors.Is(err, ErrInProgress) && pl.sc.refuseInFlight:
		w.seen.note("in progress")
	case impatient && errors.Is(err, context.DeadlineExceeded):
		w.seen.note("a caller that did not wait")
	default:
		w.violated("%s: told %v", key, err)
	}
}

// hearAnswer: an answer is to one's own request, it is on disk, and it is always the same.
func (pl *playing) hearAnswer(p *process, m *Machine[parcel], key Key, request, got parcel, refusal *FinalError) {
	w := pl.w
	now := w.look(p, key)
	if got.For != key || got.Item != request.Item {
		w.violated("%s: %v is the answer to %v", key, got, request)
		return
	}
	if !now.found && now.life.n > 0 {
		return // it is reaped already
	}
	if !now.found || now.record.Status != Answered || now.record.Machine != m.name {
		w.violated("%s: answered, and the record on disk says %q", key, now.record.Status)
		return
	}
	var stored parcel
	if err := decodeState(now.record.State, &stored); err != nil || !reflect.DeepEqual(got, stored) || (refusal != nil) != (now.record.Refusal != nil) {
		w.violated("%s: answered %v, and the record on disk says otherwise", key, got)
	}
	a := answer{state: now.record.State}
	if refusal != nil {
		a.err = refusal.Error()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.life.n > 0 && w.gone[life{key, now.life.n - 1}] {
		w.seen.note("a key used again after it was withdrawn")
	} else if now.life.n > 0 {
		w.seen.note("a key used again after it was reaped")
	}
	first, known := w.answers[now.life]
	if known {
		w.seen.note("a replay")
		if !bytes.Equal(first.state, a.state) || first.err != a.err {
			w.violatedLocked("%s: answered %q %q at first, and now %q %q", now.life, first.state, first.err, a.state, a.err)
		}
	}
	w.answers[now.life] = a
}

// hearWithdrawal: it is the first phase's own word, there is no answer, and nothing of the request is left.
func (pl *playing) hearWithdrawal(p *process, key Key, got parcel, said bool, err error) {
	w := pl.w
	now := w.look(p, key)
	w.mu.Lock()
	defer w.mu.Unlock()
	var stopped *PhaseError
	if !said || got.For != (Key{}) || errors.As(err, &stopped) {
		w.violatedLocked("%s: told of a withdrawal that nobody has asked for: %v %v", key, got, err)
	}
	if now.life.n == 0 || !w.gone[life{key, now.life.n - 1}] {
		w.seen.note("a request withdrawn before it was stored")
	}
}

// forgotten says whether a life of the key has ended by a withdrawal.
func (w *world) forgotten(key Key) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for l := range w.gone {
		if l.key == key {
			return true
		}
	}
	return false
}

// hearMismatch: the key is somebody else's.
func (pl *playing) hearMismatch(p *process, m *Machine[parcel], key Key, request parcel) {
	pl.w.seen.note("a mismatch")
	_, print, err := m.encode(request)
	if err != nil {
		pl.w.violated("%v", err)
	}
	now := pl.w.look(p, key)
	if now.found && now.record.Fingerprint == print && now.record.Machine == m.name && !pl.w.forgotten(key) {
		pl.w.violated("%s: its owner is told of a mismatch", key)
	}
}

// operate lets an operator do something about a parked key.
func (pl *playing) operate(s stroke) {
	var parked []Record
	for _, r := range pl.unfinished() {
		if r.Status == Parked {
			parked = append(parked, r)
		}
	}
	if len(parked) == 0 {
		return
	}
	r := parked[s.at%len(parked)]
	if s.do == abandons {
		pl.abandon(r)
	} else {
		pl.revive(r)
	}
}

func (pl *playing) abandon(r Record) {
	pl.allow(r.Key, true)
	err := pl.p.engine.Abandon(context.Background(), r.Key, "lost in the post")
	pl.allow(r.Key, false)
	if err != nil && !pl.p.dead.Load() {
		pl.w.violated("%s: abandoning it: %v", r.Key, err)
	}
}

func (pl *playing) allow(key Key, yes bool) {
	pl.w.mu.Lock()
	defer pl.w.mu.Unlock()
	pl.w.allowed[key] = yes
}

// revive retries a parked key: attempts count anew, and what may have been sent may be sent again.
func (pl *playing) revive(r Record) {
	l := pl.w.look(pl.p, r.Key).life
	pl.w.mu.Lock()
	for d, f := range pl.w.deeds {
		if d.life == l {
			f.counted = 0
		}
	}
	pl.w.mu.Unlock()
	if st := pl.p.blueprints[r.Machine].nextStep(r); st != nil {
		pl.w.mu.Lock()
		f := pl.w.dossier(deed{l, st.id})
		if unsure := r.ParkReason == Indeterminate || r.ParkReason == TokenExpired; unsure && !st.reconciles {
			f.first, f.pardons = time.Time{}, f.sends
		}
		pl.w.mu.Unlock()
	}
	pl.allow(r.Key, true)
	err := pl.p.engine.Retry(context.Background(), r.Key)
	pl.allow(r.Key, false)
	if err != nil && !pl.p.dead.Load() {
		pl.w.violated("%s: retrying it: %v", r.Key, err)
	}
	pl.w.seen.note("a key revived")
}

// deploy changes the machine of parcels for the next process.
func (pl *playing) deploy(c change, at int) {
	if c == none || len(pl.zombies) > 0 {
		return
	}
	at %= len(pl.steps)
	last := at == len(pl.steps)-1
	names := append(slices.Clone(pl.steps[at].formerly), pl.steps[at].name)
	switch {
	case c == adds && pl.added < len(pl.sc.added):
		pl.steps = slices.Insert(slices.Clone(pl.steps), at, pl.sc.added[pl.added])
		pl.added++
	case c == renames && !last:
		renamed := *pl.steps[at]
		renamed.formerly = append(slices.Clone(renamed.formerly), renamed.name)
		renamed.name += "'"
		pl.replace(at, &renamed)
	case c == removes && at > 0 && !last && !pl.underWay(names...):
		pl.remove(at)
		pl.inherit(at-1, names)
	case c == drops && at > 0 && !last:
		pl.remove(at)
		pl.orphans = append(pl.orphans, orphans{heir: pl.steps[at-1].id, names: names})
	default:
		return
	}
	pl.w.seen.note(map[change]string{adds: "a phase added", renames: "a phase renamed", removes: "a phase removed", drops: "a phase dropped"}[c])
}

func (pl *playing) remove(at int) {
	pl.heirs[pl.steps[at].id] = pl.steps[at-1].id
	pl.steps = slices.Delete(slices.Clone(pl.steps), at, at+1)
}

// inherit lets a step have been called by the names of one that is gone.
func (pl *playing) inherit(at int, names []RecoveryPoint) {
	heir := *pl.steps[at]
	heir.formerly = append(slices.Clone(heir.formerly), names...)
	pl.replace(at, &heir)
}

func (pl *playing) replace(at int, st *step) {
	pl.steps = slices.Clone(pl.steps)
	pl.steps[at] = st
}

// end lets everything come to its end: the world is healed, operators revive what is parked, and nothing may be left.
func (pl *playing) end() {
	pl.w.log(pl.p, "— the end")
	pl.w.mu.Lock()
	pl.w.healed = true
	pl.w.mu.Unlock()
	for _, z := range pl.zombies {
		z.die()
		pl.bury(z)
	}
	pl.zombies = nil
	pl.disarm()
	pl.shutDown()
	pl.adoptOrphans()
	pl.boot(none, 0)
	pl.absent.Wait()
	for range 10 {
		if pl.broken() != nil || !pl.resume() {
			break
		}
	}
	pl.testify()
	if left := pl.unfinished(); len(left) > 0 {
		pl.w.violated("%s is still %s after %q when all is done: %s %s", left[0].Key, left[0].Status, left[0].Point, left[0].ParkReason, left[0].LastError)
	}
	pl.replayAll()
	if pl.broken() == nil {
		pl.outlive()
	}
}

func (pl *playing) disarm() {
	pl.p.mu.Lock()
	defer pl.p.mu.Unlock()
	pl.p.death = ""
}

// adoptOrphans is the deploy that says where keys on dropped points go on.
func (pl *playing) adoptOrphans() {
	for _, o := range pl.orphans {
		at := -1
		for at < 0 {
			at = slices.IndexFunc(pl.steps, func(st *step) bool { return st.id == o.heir })
			o.heir = pl.heirs[o.heir]
		}
		pl.inherit(at, slices.DeleteFunc(o.names, func(name RecoveryPoint) bool { return pl.underWay(name) }))
	}
	pl.orphans = nil
}

// underWay says whether an effect may be under way that leads to one of the points. To call another step by such
// a name would say that this is its effect.
func (pl *playing) underWay(names ...RecoveryPoint) bool {
	return slices.ContainsFunc(pl.unfinished(), func(r Record) bool { return slices.Contains(names, r.Begun) })
}

// resume waits until the engine has nothing left to do, and lets operators take what is parked then in hand, if anything is.
func (pl *playing) resume() (more bool) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	if err := pl.p.engine.Resume(ctx); err != nil {
		pl.w.violated("the engine finds no end: %v", err)
	}
	for _, r := range pl.unfinished() {
		if r.Status != Parked {
			continue
		}
		more = true
		if _, known := pl.p.blueprints[r.Machine].next(r); known {
			pl.revive(r)
		} else {
			pl.abandon(r) // an effect is under way, and its phase is gone
		}
	}
	return more
}

// replayAll asks for every answer once more.
func (pl *playing) replayAll() {
	for _, v := range []visit{{}, {item: 1}, {receipt: true}, {receipt: true, item: 1}} {
		for v.key = range 4 {
			key := Key{ID: fmt.Sprintf("k%d", v.key)}
			if pl.w.look(pl.p, key).found {
				pl.call(pl.p, v)
			}
		}
	}
}

// outlive waits until retention has passed: then nothing is left.
func (pl *playing) outlive() {
	time.Sleep(pl.sc.retention + 3*time.Minute)
	stats, err := pl.p.engine.Stats(context.Background())
	if err != nil || stats.Counts != (Counts{}) {
		pl.w.violated("after retention there are still %+v, %v", stats.Counts, err)
	}
	pl.testify()
}

// clear stops everything that still runs.
func (pl *playing) clear() {
	for _, p := range append(pl.zombies, pl.p) {
		p.die()
		pl.bury(p)
	}
	pl.absent.Wait()
}
