package keytest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/keystate"
)

// An outcome is what has come of a scenario.
type outcome struct {
	scenario  scenario
	processes [][]place // where faults can strike, in each
	found     []finding
	leaves    map[string]string      // the answer, what the program has written, and the outside world
	deeds     map[string]int         // of the World
	policies  []keystate.ErrorPolicy // of the phases
	happened  map[string]bool        // effects, by the point they lead to
	parked    error                  // the key rests there, and may
	refused   bool
	withdrawn string // what the client is told of it, if it is

	shared         bool // several processes may have the store open
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
		case f.what == killedBeforeWrite:
			return "a commit writes past tx, or " + memory
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
