package keytest

import (
	"maps"
	"testing"
	"time"
)

func TestLeavesAreWhatCanBeComparedOfAValue(t *testing.T) {
	type inner struct {
		N     int
		bytes [2]byte
	}
	type ring struct {
		Name string
		Next *ring
	}
	round := &ring{Name: "r"}
	round.Next = round
	at := time.Date(2026, 11, 23, 12, 0, 0, 5, time.FixedZone("east", 3600))
	for _, c := range []struct {
		name string
		v    any
		want map[string]string
	}{
		{"nothing", nil, map[string]string{}},
		{"a scalar", 7, map[string]string{"": "7"}},
		{"zeros", struct {
			A int
			B string
			C []int
			D map[string]int
			E *int
			F time.Time
			G func()
		}{C: []int{}, D: map[string]int{}}, map[string]string{}},
		{"what is inside", struct {
			A *inner
			M map[string]any
			S []string
			T time.Time
		}{&inner{N: 1, bytes: [2]byte{'o', 'k'}}, map[string]any{"x": 2.5, "a \"b\"": true}, []string{"", "s"}, at},
			map[string]string{"A.N": "1", "A.bytes": `"ok"`, "M.x": "2.5", `M."a \"b\""`: "true", "S.1": `"s"`, "T": "2026-11-23T11:00:00.000000005Z"}},
	} {
		if got := leaves(c.v); !maps.Equal(got, c.want) {
			t.Errorf("%s: %q", c.name, got)
		}
	}
	if n := len(leaves(round)); n == 0 || n > deepest {
		t.Errorf("a ring has %d leaves", n)
	}
}
