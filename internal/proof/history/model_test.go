package history

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// What a key does when one call comes after another, and nothing ever fails.

// A verb is what somebody does to a key.
type verb string

const (
	do      verb = "do"
	retry   verb = "retry"
	abandon verb = "abandon"
	reap    verb = "reap"
)

// A deed is a verb with what it is done to.
type deed struct {
	verb verb
	key  int
	item int // of do: which request
}

// A result is what came of a deed.
type result string

const (
	answered   result = "answered"     // do, reap: the answer
	mismatched result = "mismatch"     // do: the key is another request's
	stopped    result = "stopped"      // do: the key waits, and the engine will go on with it
	parked     result = "parked"       // do: the key stands still
	carriedOut result = "done"         // retry, abandon: it was parked, and is no more
	notParked  result = "not parked"   // retry, abandon: nothing was done
	unknownKey result = "no such key"  // retry, abandon: nothing was done
	lost       result = "nobody knows" // it may have happened, or not
)

// An outcome is a result, with the answer if there is one.
type outcome struct {
	result result
	answer answer
}

// An answer is what a client is told, or was to be told.
type answer struct {
	item   int
	text   string // never the same in two lives
	reason string // of a refusal
}

// abandoned is what operators say when they abandon a key.
const abandoned = "abandoned: history"

// A status is where a key is in its life.
type status string

const (
	absent status = "absent"
	inHand status = "claimed" // perhaps parked, perhaps even finished: nobody has seen it
	still  status = "parked"
	given  status = "given up" // abandoned, and nobody has seen the answer
	ended  status = "answered"
)

// A state is what is known of a key.
type state struct {
	status status
	item   int    // whose it is
	answer answer // of an ended one
	past   string // the answer of its last life
}

// step returns the states in which a deed with that outcome may leave a key; none: it cannot have that outcome.
func (s state) step(d deed, o outcome) []state {
	switch d.verb {
	case do:
		return s.do(d, o)
	case reap:
		return s.reap(o)
	}
	return s.operate(d, o)
}

func (s state) as(next status) []state {
	s.status = next
	return []state{s}
}

// do is a request.
func (s state) do(d deed, o outcome) []state {
	if s.status == absent {
		if o.result == lost {
			return []state{s, {status: inHand, item: d.item, past: s.past}}
		}
		s = state{status: inHand, item: d.item, past: s.past}
	}
	if o.result == lost {
		return []state{s}
	}
	if d.item != s.item {
		return s.only(o.result == mismatched)
	}
	switch o.result {
	case answered:
		return s.tell(o.answer)
	case stopped:
		return s.only(s.status == inHand)
	case parked:
		if s.status == inHand || s.status == still {
			return s.as(still)
		}
	}
	return nil
}

// tell is the answer that somebody sees.
func (s state) tell(a answer) []state {
	switch {
	case a.item != s.item || a.text == s.past:
		return nil
	case s.status == ended:
		return s.only(a == s.answer)
	case s.status == inHand, s.status == given && a.reason == abandoned:
		return []state{{status: ended, item: s.item, answer: a, past: s.past}}
	}
	return nil
}

func (s state) only(possible bool) []state {
	if possible {
		return []state{s}
	}
	return nil
}

// reap forgets a key; what it was answered with shows then at the latest.
func (s state) reap(o outcome) []state {
	if seen := s.tell(o.answer); seen != nil {
		return []state{{status: absent, past: o.answer.text}}
	}
	return nil
}

// operate is what an operator does to a parked key.
func (s state) operate(d deed, o outcome) []state {
	next, may := inHand, s.status == still || s.status == inHand
	if d.verb == abandon {
		next = given
	}
	switch o.result {
	case carriedOut:
		if may {
			return s.as(next)
		}
		return nil
	case notParked:
		return s.only(s.status != absent && s.status != still)
	case unknownKey:
		return s.only(s.status == absent)
	}
	if may { // lost
		return append(s.as(next), s)
	}
	return []state{s}
}

// key is the model of porcupine's.
var key = porcupine.NondeterministicModel{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[int][]porcupine.Operation{}
		for _, op := range history {
			k := op.Input.(deed).key
			byKey[k] = append(byKey[k], op)
		}
		var parts [][]porcupine.Operation
		for _, ops := range byKey {
			parts = append(parts, ops)
		}
		return parts
	},
	Init: func() []any { return []any{state{status: absent}} },
	Step: func(s, input, output any) (next []any) {
		for _, n := range s.(state).step(input.(deed), output.(outcome)) {
			next = append(next, n)
		}
		return next
	},
}

// linearize says why there is no order of the calls in which a key without concurrency and crashes could have answered them.
func linearize(history []porcupine.Operation) error {
	const hang = time.Minute // it takes milliseconds
	model := key.ToModel()
	if porcupine.CheckOperationsTimeout(model, history, hang) == porcupine.Ok {
		return nil
	}
	for _, ops := range key.Partition(history) {
		verdict, info := porcupine.CheckOperationsVerbose(model, ops, hang)
		if verdict != porcupine.Ok {
			return fmt.Errorf("porcupine: %s: %d calls of key %d have no order; it goes as far as\n%s",
				verdict, len(ops), ops[0].Input.(deed).key, excerpt(ops, info.PartialLinearizationsOperations()[0]))
		}
	}
	return fmt.Errorf("porcupine: the history has no order, and each key's has one")
}

// excerpt shows the end of the longest order that was found, and what does not fit behind it.
func excerpt(ops []porcupine.Operation, orders [][]porcupine.Operation) string {
	var longest []porcupine.Operation
	for _, order := range orders {
		if len(order) > len(longest) {
			longest = order
		}
	}
	placed := map[int64]bool{} // by the moment of the call, which no other of the key has
	for _, op := range longest {
		placed[op.Call] = true
	}
	rest := slices.DeleteFunc(slices.Clone(ops), func(op porcupine.Operation) bool { return placed[op.Call] })
	slices.SortFunc(rest, func(a, b porcupine.Operation) int { return int(a.Return - b.Return) })
	var b strings.Builder
	show := func(title string, ops []porcupine.Operation) {
		b.WriteString(title + "\n")
		for _, op := range ops {
			fmt.Fprintf(&b, "  [%d, %d] %+v: %+v\n", op.Call, op.Return, op.Input, op.Output)
		}
	}
	show("…", longest[max(0, len(longest)-4):])
	show("and does not fit:", rest[:min(len(rest), 4)])
	return b.String()
}

func TestTheModelOfAKeyKnowsWhatCannotBe(t *testing.T) {
	one, two := answer{item: 1, text: "one"}, answer{item: 1, text: "two"}
	given := answer{item: 1, text: "three", reason: abandoned}
	others := answer{item: 2, text: "four"}
	ask, other := deed{verb: do, item: 1}, deed{verb: do, item: 2}
	type call struct {
		deed
		outcome
	}
	for name, c := range map[string]struct {
		calls []call
		legal bool
	}{
		"a replay":                           {[]call{{ask, outcome{answered, one}}, {ask, outcome{answered, one}}}, true},
		"two answers":                        {[]call{{ask, outcome{answered, one}}, {ask, outcome{answered, two}}}, false},
		"an answer to another request":       {[]call{{ask, outcome{answered, one}}, {other, outcome{answered, one}}}, false},
		"a mismatch":                         {[]call{{ask, outcome{answered, one}}, {other, outcome{result: mismatched}}}, true},
		"a mismatch with nobody":             {[]call{{other, outcome{result: mismatched}}}, false},
		"a mismatch with a lost call":        {[]call{{ask, outcome{result: lost}}, {other, outcome{result: mismatched}}}, true},
		"a lost call that never was":         {[]call{{ask, outcome{result: lost}}, {other, outcome{answered, others}}}, true},
		"a lost call that was, and was not":  {[]call{{ask, outcome{result: lost}}, {other, outcome{result: mismatched}}, {other, outcome{answered, others}}}, false},
		"a mismatch with one's own":          {[]call{{ask, outcome{answered, one}}, {ask, outcome{result: mismatched}}}, false},
		"a mismatch that takes the key":      {[]call{{ask, outcome{answered, one}}, {other, outcome{answered, others}}}, false},
		"a new life":                         {[]call{{ask, outcome{answered, one}}, {deed{verb: reap}, outcome{answered, one}}, {ask, outcome{answered, two}}}, true},
		"an answer of another life":          {[]call{{ask, outcome{answered, one}}, {deed{verb: reap}, outcome{answered, one}}, {ask, outcome{answered, one}}}, false},
		"another answer is reaped":           {[]call{{ask, outcome{answered, one}}, {deed{verb: reap}, outcome{answered, two}}}, false},
		"a parked key is reaped":             {[]call{{ask, outcome{result: parked}}, {deed{verb: reap}, outcome{answered, one}}}, false},
		"a parked key answers":               {[]call{{ask, outcome{result: parked}}, {ask, outcome{answered, one}}}, false},
		"a parked key is retried":            {[]call{{ask, outcome{result: parked}}, {deed{verb: retry}, outcome{result: carriedOut}}, {ask, outcome{answered, one}}}, true},
		"a parked key is abandoned":          {[]call{{ask, outcome{result: parked}}, {deed{verb: abandon}, outcome{result: carriedOut}}, {ask, outcome{answered, given}}}, true},
		"an abandoned key answers otherwise": {[]call{{ask, outcome{result: parked}}, {deed{verb: abandon}, outcome{result: carriedOut}}, {ask, outcome{answered, one}}}, false},
		"a parked key is said not to be":     {[]call{{ask, outcome{result: parked}}, {deed{verb: retry}, outcome{result: notParked}}}, false},
		"an answered key stops":              {[]call{{ask, outcome{answered, one}}, {ask, outcome{result: stopped}}}, false},
		"an answered key is retried":         {[]call{{ask, outcome{answered, one}}, {deed{verb: retry}, outcome{result: carriedOut}}}, false},
		"a key in hand is unknown":           {[]call{{ask, outcome{result: stopped}}, {deed{verb: retry}, outcome{result: unknownKey}}}, false},
	} {
		var history []porcupine.Operation
		for i, c := range c.calls {
			history = append(history, porcupine.Operation{Input: c.deed, Output: c.outcome, Call: int64(2 * i), Return: int64(2*i + 1)})
		}
		if err := linearize(history); (err == nil) != c.legal {
			t.Errorf("%s: %v", name, err)
		}
	}
}
