package keytest

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// Property is [Crash] for requests that rapid draws. For each of them it draws one scenario, or two faults of which the second
// strikes the process that recovers from the first, and compares the end with that of the same request without a fault. What fails is shrunk to
// the smallest request and the first fault that do. The case's Request is the drawn one; Pairs is not looked at.
//
// rapid's flags say how many requests there are, such as -rapid.checks=10000; 100 is the default.
func Property[Tx, S any](t *testing.T, requests *rapid.Generator[S], build func(w *World, request S) Case[Tx, S]) {
	t.Helper()
	rapid.Check(t, func(rt *rapid.T) { property(t, rt, requests, build) })
}

func property[Tx, S any](t *testing.T, rt *rapid.T, requests *rapid.Generator[S], build func(w *World, request S) Case[Tx, S]) {
	request := requests.Draw(rt, "request")
	m := &matrix[Tx, S]{build: func(w *World) Case[Tx, S] {
		c := build(w, request)
		c.Request, c.Pairs = request, true
		return c
	}}
	must(rt, m.measure(t))
	o := m.perform(t, draw(rt, "scenario", m.scenarios()))
	must(rt, m.judge(o))
	if pairs := m.pairs(o); len(pairs) > 0 && rapid.Bool().Draw(rt, "another fault") {
		must(rt, m.judge(m.perform(t, draw(rt, "then", pairs))))
	}
}

func draw(rt *rapid.T, label string, all []scenario) scenario {
	return all[rapid.IntRange(0, len(all)-1).Draw(rt, label)]
}

// must fails when something was found.
func must(rt *rapid.T, found []finding) {
	if len(found) == 0 {
		return
	}
	var all []error
	for _, f := range found {
		all = append(all, errors.New(f.String()))
	}
	rt.Fatal(errors.Join(all...))
}
