package keytest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/keystate"
)

// A Case is one request on its way through a program's phases.
type Case[Tx, S any] struct {
	// Phases makes the phases as the program does when it starts. It is called for every process that is played, so that what
	// a phase keeps in memory is gone after a crash, as it would be. It may register other machines with the
	// engine whose keys the phases stage; their effects are run, and no fault strikes in them.
	Phases func(e *keystate.Engine[Tx]) []keystate.Phase[Tx, S]

	// Next makes the phases of the next release. When it is given, it also starts after each crash of the present one: then the key
	// must end, and nothing may be done twice. Default: there is none.
	Next func(e *keystate.Engine[Tx]) []keystate.Phase[Tx, S]

	// Setup writes what the store holds before the request. Default: nothing.
	Setup func(tx Tx) error

	// Request is what the client asks for.
	Request S

	// Check says what is wrong with the store and the answer when the key has ended; err is nil, or a [*keystate.FinalError].
	// That both are as in the run without a fault is checked besides. Default: nothing is wrong.
	Check func(tx Tx, answer S, err error) error

	// Outside is what the outside world has come to, for a program that does not use the [World]: any value that can be
	// compared. Default: nothing.
	Outside func() any

	// Varies lists what may differ between two runs of correct phases, by the path that a report names it with, or the path's beginning.
	// What two runs without a fault differ in, since it depends on the time or on chance, need not be listed. Default: nothing.
	Varies []string

	// Pairs lets a second fault strike in the process that recovers from the first: thoroughly, and many times as long.
	Pairs bool

	// Machine is the machine's name. Default: "machine".
	Machine string

	// Key is the request's key. Default: one of keytest's own.
	Key keystate.Key

	// Options are the engine's. Nothing is reaped; nothing is logged unless there is a Logger; Headroom is none by default.
	Options keystate.Options

	// Open opens the store that lives in a folder, and makes it when there is none. Default, for *bbolt.Tx: [OpenBolt].
	Open func(t testing.TB, dir string) keystate.Store[Tx]

	// Contents reads what the program has written to the store, as a value that can be compared. Default, for
	// *bbolt.Tx: all of the program's buckets; for others: nothing is compared but by Check.
	Contents func(tx Tx) (any, error)
}

func (c *Case[Tx, S]) machine() string {
	if c.Machine == "" {
		return "machine"
	}
	return c.Machine
}

func (c *Case[Tx, S]) key() keystate.Key {
	if c.Key == (keystate.Key{}) {
		return keystate.Key{Scope: "keytest", ID: "request"}
	}
	return c.Key
}

func (c *Case[Tx, S]) open(t testing.TB, dir string) keystate.Store[Tx] {
	if c.Open != nil {
		return c.Open(t, dir)
	}
	if s, ok := any(OpenBolt(t, dir)).(keystate.Store[Tx]); ok {
		return s
	}
	t.Fatalf("keytest: Case.Open must say how to open a store whose transactions are %T", *new(Tx))
	return nil
}

func (c *Case[Tx, S]) varies(path string) bool {
	return slices.ContainsFunc(c.Varies, func(start string) bool { return strings.HasPrefix(path, start) })
}

// Crash proves that a machine's phases come to the same end wherever a fault strikes. build makes the case and is called for every
// scenario, with a new [World] for the effects to act on.
//
// The request runs once without a fault, on a real store. Then it runs again for each place where a fault can strike
// and each fault: the process is killed before an effect, after it, in a transaction and when it is durable; the effect's answer is lost, or
// comes too late; effect or commit fail once; a transaction is undone and run again; the process is shut down; two callers ask at the same time.
// Whatever was interrupted is resumed by a new process. Each of these is a subtest, and its errors say what differs from the
// run without a fault, and what probably causes it.
//
// Every scenario is played in a [testing/synctest] bubble: waiting takes no time, and phases must not wait for anything outside
// it, such as a real network. For a client of an HTTP interface, put an [net/http.RoundTripper] into its Transport that calls the handler.
func Crash[Tx, S any](t *testing.T, build func(w *World) Case[Tx, S]) {
	t.Helper()
	m := &matrix[Tx, S]{build: build}
	if found := m.measure(t); len(found) > 0 {
		for _, f := range found {
			t.Error(f)
		}
		return
	}
	for _, sc := range m.scenarios() {
		t.Run(sc.String(), func(t *testing.T) {
			t.Helper()
			first := m.perform(t, sc)
			for _, f := range m.judge(first) {
				t.Error(f)
			}
			for _, pair := range m.pairs(first) {
				t.Run(pair.String(), func(t *testing.T) {
					t.Helper()
					for _, f := range m.judge(m.perform(t, pair)) {
						t.Error(f)
					}
				})
			}
		})
	}
}

// A scenario is what goes wrong in one run.
type scenario struct {
	faults  []fault // the n-th strikes in the n-th process
	deploy  bool    // the second process is of the next release
	callers int
	later   time.Duration // than the run without a fault
}

func (s scenario) String() string {
	var parts []string
	for _, f := range s.faults {
		parts = append(parts, f.String())
	}
	switch {
	case s.callers > 1:
		parts = append(parts, fmt.Sprintf("%d callers at once", s.callers))
	case s.deploy && len(s.faults) > 0:
		parts = append(parts, "the next release starts")
	case s.deploy:
		parts = append(parts, "the next release alone")
	}
	if len(parts) == 0 {
		return "without a fault"
	}
	return strings.Join(parts, ", then ")
}

// A finding is something that is wrong, as the author of the phases would want to read it.
type finding struct {
	scenario    string
	what, cause string
}

func (f finding) String() string {
	s := f.scenario + ":\n\t" + f.what
	if f.cause != "" {
		s += "\n\tprobably: " + f.cause
	}
	return s
}

// A matrix is a case with all the scenarios that it gives rise to.
type matrix[Tx, S any] struct {
	build  func(w *World) Case[Tx, S]
	plain  *outcome        // without a fault
	again  *outcome        // the same, at another time
	varies map[string]bool // what the two differ in
	next   *outcome        // of the next release, without a fault
}

// measure runs the case without a fault: to see where one can strike, and again at another time, to see what varies.
func (m *matrix[Tx, S]) measure(t *testing.T) []finding {
	m.plain = m.perform(t, scenario{})
	m.again = m.perform(t, scenario{later: 26*time.Hour + 17*time.Minute + 43*time.Second + 191*time.Millisecond})
	found := append(m.plain.found, m.again.found...)
	m.varies = map[string]bool{}
	for _, d := range differences(m.plain.leaves, m.again.leaves, nothing) {
		m.varies[d.path] = true
	}
	if len(found) == 0 && m.plain.deploys {
		m.next = m.perform(t, scenario{deploy: true})
		found = m.next.found
	}
	return slices.CompactFunc(found, func(a, b finding) bool { return a == b })
}

// scenarios are all in which one thing goes wrong.
func (m *matrix[Tx, S]) scenarios() (all []scenario) {
	for _, f := range m.faultsIn(m.plain.processes[0]) {
		all = append(all, scenario{faults: []fault{f}})
	}
	all = append(all, scenario{callers: 2})
	if m.next != nil {
		for _, sc := range slices.Clone(all) {
			if len(sc.faults) > 0 && sc.faults[0].what.ends() {
				all = append(all, scenario{faults: sc.faults, deploy: true})
			}
		}
	}
	return all
}

func (m *matrix[Tx, S]) faultsIn(places []place) (all []fault) {
	for n, at := range places {
		if at.name == "" {
			continue // a transaction that fails by itself
		}
		for _, w := range faultsAt[at.kind] {
			if w != killedForLong || m.plain.tokenLife > 0 {
				all = append(all, fault{what: w, at: n, place: at})
			}
		}
	}
	return all
}

// pairs are the scenarios in which a second fault strikes, while the process recovers that was started after the first.
func (m *matrix[Tx, S]) pairs(first *outcome) (all []scenario) {
	if !first.pairs || len(first.processes) < 2 || first.scenario.deploy {
		return nil
	}
	for _, f := range m.faultsIn(first.processes[1]) {
		all = append(all, scenario{faults: []fault{first.scenario.faults[0], f}})
	}
	return all
}

// An outcome is what has come of a scenario.
type outcome struct {
	scenario  scenario
	processes [][]place // where faults can strike, in each
	found     []finding
	leaves    map[string]string // the answer, what the program has written, and the outside world
	deeds     map[string]int    // of the World
	policies  []keystate.ErrorPolicy
	happened  map[string]bool // effects, by the point they lead to
	parked    error           // the key rests there, and may
	refused   bool

	deploys, pairs bool
	tokenLife      time.Duration
	ignoresTokens  bool
	reconciles     bool
	varies         func(path string) bool // by the author's word
}

func (o *outcome) find(what, cause string) {
	o.found = append(o.found, finding{o.scenario.String(), what, cause})
}

// judge compares an outcome with the run without a fault.
func (m *matrix[Tx, S]) judge(o *outcome) []finding {
	if o.leaves == nil { // it never came to an end, and says why
		return o.found
	}
	suspicion := o.suspicion()
	if m.judgeDeeds(o) {
		suspicion = o.suspicionOfDeeds()
	}
	if m.comparable(o) {
		for _, d := range differences(m.plain.leaves, o.leaves, func(path string) bool { return m.varies[path] || o.varies(path) }) {
			if strings.HasPrefix(d.path, outside) {
				o.find(d.String(), o.suspicionOfDeeds())
			} else {
				o.find(d.String(), suspicion)
			}
		}
	}
	for _, f := range o.scenario.faults {
		if o.refused && m.policy(o) == keystate.Fail && (f.what == answerLost || f.what == timedOut) {
			o.find("the request is refused, although the effect has happened",
				"OnError: Fail makes an answer of every error, also of one behind which the effect has happened: retry, and return keystate.Final for a sure no")
		}
	}
	return o.found
}

// outside begins the paths of what the program's author says of the outside world.
const outside = "outside"

// comparable says whether the end must be that of the run without a fault.
func (m *matrix[Tx, S]) comparable(o *outcome) bool {
	return o.parked == nil && !o.scenario.deploy && m.policy(o) == keystate.Retry
}

// policy is what the phase makes of an error in which a fault has struck: unless it retries, the end is another by right.
func (m *matrix[Tx, S]) policy(o *outcome) keystate.ErrorPolicy {
	for _, f := range o.scenario.faults {
		if f.what.fails() && o.policies[f.place.phase] != keystate.Retry {
			return o.policies[f.place.phase]
		}
	}
	return keystate.Retry
}

// judgeDeeds looks at what was done to the world: nothing twice, and nothing left out. It reports whether something was done too often.
func (m *matrix[Tx, S]) judgeDeeds(o *outcome) (tooOften bool) {
	want, got := m.wantedDeeds(), m.named(o.deeds)
	for _, request := range slices.Sorted(maps.Keys(got)) {
		if n := got[request]; n > want[request] {
			tooOften = true
			o.find(fmt.Sprintf("the world has done %s %s; without a fault, %s", request, times(n), times(want[request])), o.suspicionOfDeeds())
		}
	}
	for _, request := range slices.Sorted(maps.Keys(want)) {
		if got[request] == 0 && m.comparable(o) {
			o.find(fmt.Sprintf("the world has not done %s", request), "an effect relies on memory, or a Reconcile says Done of what is not")
		}
	}
	return tooOften
}

// wantedDeeds is how often each request is made of the world, in whichever release.
func (m *matrix[Tx, S]) wantedDeeds() map[string]int {
	want := m.named(m.plain.deeds)
	if m.next != nil {
		for request, n := range m.named(m.next.deeds) {
			want[request] = max(n, want[request])
		}
	}
	return want
}

// named is how often each request was made, where those that are made up anew in every run count as one.
func (m *matrix[Tx, S]) named(deeds map[string]int) map[string]int {
	counts := map[string]int{}
	for request, n := range deeds {
		name := strconv.Quote(request)
		if m.plain.deeds[request] != m.again.deeds[request] || m.plain.deeds[request] == 0 && m.madeUp() {
			name = "a request that differs from run to run"
		}
		counts[name] += n
	}
	return counts
}

// madeUp says whether there are requests which depend on the time or on chance.
func (m *matrix[Tx, S]) madeUp() bool { return !maps.Equal(m.plain.deeds, m.again.deeds) }

func times(n int) string {
	switch n {
	case 0:
		return "never"
	case 1:
		return "once"
	case 2:
		return "twice"
	}
	return fmt.Sprintf("%d times", n)
}

// suspicion is what probably makes an end differ.
func (o *outcome) suspicion() string {
	const memory = "a phase keeps in memory what belongs into the state"
	for _, f := range o.scenario.faults {
		switch {
		case f.what == writtenTwice:
			return "the commit uses something besides tx, s and ctx: a clock, a random number, memory"
		case f.place.kind != atEffect || f.what == killedBeforeEffect || f.what == effectFailed:
		case o.reconciles:
			return "Reconcile says Done and does not fill in the state as the effect does, or " + memory
		default:
			return "the effect writes to the store by itself, or " + memory
		}
	}
	return memory
}

func (o *outcome) suspicionOfDeeds() string {
	long := slices.ContainsFunc(o.scenario.faults, func(f fault) bool { return f.what == killedForLong })
	switch {
	case o.ignoresTokens:
		return "this world ignores tokens: the phase needs AtMostOnce, or a Reconcile that asks"
	case long:
		return fmt.Sprintf("the world forgets tokens after %s: the phase's TokenLife must say so", o.tokenLife)
	case o.scenario.deploy:
		return "the next release runs an effect again that has happened: Formerly must name the point"
	}
	return "the effect does not pass its token on, or makes one of its own"
}

// refusal is a definitive failure among errors.
func refusal(err error) *keystate.FinalError {
	var final *keystate.FinalError
	errors.As(err, &final)
	return final
}
