package show

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
)

func TestAsManyWorkersAreKilledAsWasAsked(t *testing.T) {
	for _, c := range []struct{ workers, kills, dismissed, suspended int }{
		{1, 40, 0, 0}, {3, 0, 0, 0}, {3, 3, 0, 0}, {3, 4, 1, 0}, {3, 12, 3, 1}, {3, 60, 15, 5},
	} {
		s := &show{Settings: Settings{Kills: c.kills, Workers: c.workers}, stage: Program[*bbolt.Tx]{Workers: c.workers}, rng: rand.New(rand.NewPCG(1, 1))}
		for l := s.begin(0); len(l.blows) > 0; l = s.begin(0) {
			s.count(l.blows)
		}
		if s.Killed != c.kills || s.Dismissed != c.dismissed || s.Suspended != c.suspended {
			t.Errorf("%+v: %d killed, %d dismissed, %d suspended", c, s.Killed, s.Dismissed, s.Suspended)
		}
	}
}

// ended is a show whose one request has been answered by two workers at the end.
func ended(t *testing.T, one, other *answer) *show {
	history, err := os.Create(filepath.Join(t.TempDir(), "answers"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { history.Close() })
	s := &show{history: history, seen: map[int]bool{}}
	s.given, s.lost, s.Answers = map[request]answer{}, map[int]string{}, map[int]answer{}
	for _, a := range []*answer{one, other} {
		l := &life{answers: map[int]answer{}}
		if err := s.take(l, a); err != nil {
			t.Fatal(err)
		}
		s.last = append(s.last, l)
	}
	for _, l := range s.last {
		s.compare(l.answers)
	}
	return s
}

func TestEveryWorkerMustGiveTheSameAnswer(t *testing.T) {
	asked := request{Key: "1", From: "ada", To: "bob", Cents: 20_00}
	yes := answer{Line: 1, request: asked, Status: paid, Payout: "payout-1"}
	no := answer{Line: 1, request: asked, Status: refused, Error: "insufficient funds"}
	later := answer{Line: 1, request: asked, Status: open}
	for name, c := range map[string]struct {
		one, other *answer
		lost, open bool
	}{
		"the same":             {&yes, &yes, false, false},
		"another":              {&yes, &no, true, false},
		"none":                 {&yes, nil, true, false},
		"none from the first":  {nil, &yes, true, false},
		"not yet":              {&yes, &later, false, true},
		"the first one, later": {&later, &yes, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := ended(t, c.one, c.other)
			if _, lost := s.lost[1]; lost != c.lost {
				t.Errorf("lost: %v", s.lost)
			}
			if a := s.Answers[1]; a.definite() == c.open {
				t.Errorf("the answer is %v", a)
			}
		})
	}
}
