package pgtest

import (
	"testing"
)

func TestProcessWhoseNameIsMadeToConfuseIsRead(t *testing.T) {
	got, err := parseStat([]byte("42 (a) Z 1 (b) T 7 42 42 0 -1"))
	if want := (listed{pid: 42, parent: 7, state: 'T'}); err != nil || got != want {
		t.Errorf("%+v: %v", got, err)
	}
	for _, bad := range []string{"", "42", "42 (a)", "42 (a) S", "x (a) S 1", "42 (a) S y", ")("} {
		if got, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q is %+v", bad, got)
		}
	}
}
