package keytest

import (
	"fmt"
	"slices"
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

	// Check says what is wrong with the store and the answer when the key has ended; err is nil, or a [*keystate.FinalError], or
	// [keystate.ErrWithdrawn] when the first phase withdraws the request however often the client asks. That both are as in the run without a fault is checked besides. Default: nothing is wrong.
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

	// Open opens the store that lives in a folder, and makes it when there is none; on a server, the folder is a name that no other scenario has. It is called
	// for every process that is played, in the bubble, where whatever waits for others must be made: pools of connections. Default, for *bbolt.Tx: [OpenBolt].
	Open func(t testing.TB, dir string) keystate.Store[Tx]

	// Contents reads what the program has written to the store, as a value that can be compared: maps of rows, for one. Default, for
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
// A store that several engines may share, a [keystate.SharedStore], must be [Killable], and meets more faults: a second process has it open all the time,
// and goes on where the first is killed, shuts down, or stands still until it has been taken for dead.
//
// Every scenario is played in a [testing/synctest] bubble: waiting takes no time, and effects must not wait for anything outside
// it, such as a real network. For a client of an HTTP interface, put an [net/http.RoundTripper] into its Transport that calls the handler. The store
// may be a server: while it is at work, the bubble's time stands still. See [Connections].
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
	beside  bool          // the second process starts with the first, and has the store open with it
	later   time.Duration // than the run without a fault
}

func (s scenario) String() string {
	var parts []string
	for _, f := range s.faults {
		parts = append(parts, f.String())
	}
	switch {
	case s.callers > 1 && s.beside:
		parts = append(parts, fmt.Sprintf("%d callers at once, each at a process of its own", s.callers))
	case s.callers > 1:
		parts = append(parts, fmt.Sprintf("%d callers at once", s.callers))
	case s.beside && s.faults[0].what.ends():
		parts[0] += " beside another process"
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
	if m.plain.shared {
		all = append(all, m.besides()...)
	}
	if m.next != nil {
		for _, sc := range slices.Clone(all) {
			if len(sc.faults) > 0 && sc.faults[0].what.ends() && !sc.beside {
				all = append(all, scenario{faults: sc.faults, deploy: true})
			}
		}
	}
	return all
}

// besides are the scenarios in which another process has the store open all the time.
func (m *matrix[Tx, S]) besides() (all []scenario) {
	for _, f := range m.strikes(m.plain.processes[0], faultsBeside) {
		all = append(all, scenario{faults: []fault{f}, beside: true})
	}
	return append(all, scenario{callers: 2, beside: true})
}

func (m *matrix[Tx, S]) faultsIn(places []place) (all []fault) {
	for _, f := range m.strikes(places, faultsAt) {
		if f.what != killedForLong || m.plain.tokenLife > 0 {
			all = append(all, f)
		}
	}
	return all
}

// strikes are the faults at places.
func (m *matrix[Tx, S]) strikes(places []place, faults map[placeKind][]what) (all []fault) {
	for n, at := range places {
		if at.name == "" {
			continue // a transaction that fails by itself
		}
		for _, w := range faults[at.kind] {
			all = append(all, fault{what: w, at: n, place: at})
		}
	}
	return all
}

// pairs are the scenarios in which a second fault strikes, while the process recovers that was started after the first.
func (m *matrix[Tx, S]) pairs(first *outcome) (all []scenario) {
	if !first.pairs || len(first.processes) < 2 || first.scenario.deploy || first.scenario.beside {
		return nil
	}
	for _, f := range m.faultsIn(first.processes[1]) {
		all = append(all, scenario{faults: []fault{first.scenario.faults[0], f}})
	}
	return all
}
