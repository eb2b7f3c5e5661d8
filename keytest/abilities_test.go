package keytest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// An able store can do what a store need not: it stores what is put last when the function has returned, and reads one record by itself.
type able struct {
	keystate.Store[*bbolt.Tx]
	is      string // what is wrong with it; empty: nothing
	used    *uses
	pending sync.Map // *bbolt.Tx → keystate.Record
}

// uses counts what is made of the abilities.
type uses struct{ lasts, gets atomic.Int64 }

func (s *able) Update(ctx context.Context, fn func(*bbolt.Tx) error) error {
	err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
		s.pending.Delete(tx)
		err := fn(tx)
		last, parts := s.pending.LoadAndDelete(tx)
		if err != nil || !parts {
			return err
		}
		s.used.lasts.Add(1)
		return s.part(s.Store.Keys(tx), last.(keystate.Record))
	})
	if s.is == "who is refused at the last is told that all is well" && errors.Is(err, keystate.ErrFenced) {
		return nil
	}
	return err
}

func (s *able) part(keys keystate.Keys, r keystate.Record) error {
	switch s.is {
	case "what is put last is left out":
		return nil
	case "what is put last needs no holder":
		if stored, err := keys.Get(r.Key); err == nil {
			if r.Version = stored.Version; stored.Status == keystate.Answered {
				return nil // and the rest is committed
			}
		}
	}
	return keys.Put(&r)
}

func (s *able) Get(ctx context.Context, key keystate.Key) (r keystate.Record, err error) {
	s.used.gets.Add(1)
	err = s.View(ctx, func(tx *bbolt.Tx) error {
		r, err = s.Store.Keys(tx).Get(key)
		return err
	})
	return r, err
}

func (s *able) Keys(tx *bbolt.Tx) keystate.Keys { return ableKeys{s.Store.Keys(tx), s, tx} }

type ableKeys struct {
	keystate.Keys
	store *able
	tx    *bbolt.Tx
}

func (k ableKeys) PutLast(r *keystate.Record) error {
	k.store.pending.Store(k.tx, *r)
	r.Version++
	return nil
}

// An ableSeat is a seat that can.
type ableSeat struct {
	*able
	seat *seat
}

func (s ableSeat) Renew(ctx context.Context) (time.Duration, error) { return s.seat.Renew(ctx) }
func (s ableSeat) Alive(tx *bbolt.Tx, epoch uint64) (bool, error)   { return s.seat.Alive(tx, epoch) }
func (s ableSeat) Kill()                                            { s.seat.Kill() }
func (s ableSeat) Adopt(ctx context.Context, machines []string, limit int) ([]keystate.Record, error) {
	return s.seat.Adopt(ctx, machines, limit)
}

// An opener is an Open of a Case.
type opener func(t testing.TB, dir string) keystate.Store[*bbolt.Tx]

func alone(is string, used *uses) opener {
	return func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
		return &able{Store: OpenBolt(t, dir), is: is, used: used}
	}
}

func sharing(is string, used *uses) opener {
	h := newHub()
	return func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
		s := h.open(t, dir).(*seat)
		return ableSeat{&able{Store: s, is: is, used: used}, s}
	}
}

// openedBy lets the staging case, in which transactions write several keys, have other stores.
func openedBy(open opener) func(w *World) testCase {
	return func(w *World) testCase {
		c := stagingCase(w)
		c.Open = open
		return c
	}
}

func scenariosOf(t *testing.T, open opener) (names []string) {
	t.Helper()
	m := &matrix[*bbolt.Tx, transfer]{build: openedBy(open)}
	for _, f := range m.measure(t) {
		t.Error(f)
	}
	for _, sc := range m.scenarios() {
		names = append(names, sc.String())
	}
	return names
}

func TestWhatAStoreCanDoBesidesIsUsedAndChangesNoScenario(t *testing.T) {
	hub := newHub()
	for _, kind := range []struct {
		name        string
		plain, able func(used *uses) opener
	}{
		{"alone", func(*uses) opener { return OpenBolt }, func(u *uses) opener { return alone("", u) }},
		{"shared", func(*uses) opener { return hub.open }, func(u *uses) opener { return sharing("", u) }},
	} {
		t.Run(kind.name, func(t *testing.T) {
			used := new(uses)
			Crash(t, openedBy(kind.able(used)))
			if used.lasts.Load() == 0 || used.gets.Load() == 0 {
				t.Errorf("%d records were put last, and %d read alone", used.lasts.Load(), used.gets.Load())
			}
			if got, want := scenariosOf(t, kind.able(used)), scenariosOf(t, kind.plain(used)); !slices.Equal(got, want) {
				t.Errorf("the scenarios are\n%s\nand not\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

func TestAnEngineSeesNoMoreOfItsStoreThanThereIs(t *testing.T) {
	for _, store := range []struct {
		name string
		open opener
		can  bool
	}{
		{"bbolt", OpenBolt, false},
		{"shared", newHub().open, false},
		{"able", alone("", new(uses)), true},
		{"able and shared", sharing("", new(uses)), true},
	} {
		t.Run(store.name, func(t *testing.T) {
			s := store.open(t, t.TempDir())
			defer s.Close()
			if _, _, err := s.Boot(t.Context()); err != nil {
				t.Fatal(err)
			}
			p := &process[*bbolt.Tx, transfer]{
				Store: s, turns: newTurnstile(), play: &play[*bbolt.Tx, transfer]{}, passing: map[any]*passage{}, started: make(chan struct{}),
			}
			seen := p.asStore()
			_, reads := seen.(getter)
			_, shares := seen.(keystate.SharedStore[*bbolt.Tx])
			_, mayShare := s.(keystate.SharedStore[*bbolt.Tx])
			if reads != store.can || shares != mayShare {
				t.Errorf("it reads alone: %v; it is shared: %v", reads, shares)
			}
			err := seen.Update(t.Context(), func(tx *bbolt.Tx) error {
				if _, parts := seen.Keys(tx).(parter); parts != store.can {
					t.Errorf("it puts last: %v", parts)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTheDeadDoNotRead(t *testing.T) {
	p := &process[*bbolt.Tx, transfer]{turns: newTurnstile(), Store: alone("", new(uses))(t, t.TempDir())}
	defer p.Store.Close()
	_ = p.die()
	if _, err := p.asStore().(getter).Get(t.Context(), keystate.Key{ID: "request"}); !errors.Is(err, errKilled) {
		t.Errorf("one reads: %v", err)
	}
}

func TestAStoreThatPutsLastWronglyIsFound(t *testing.T) {
	for _, wrong := range []struct {
		is, says string
		open     func(is string, used *uses) opener
	}{
		{"what is put last is left out", "the request does not end", alone},
		{"what is put last needs no holder", "the store's", sharing},
		{"who is refused at the last is told that all is well", `has done "pay bob 500" twice`, sharing},
	} {
		t.Run(wrong.is, func(t *testing.T) {
			all := fmt.Sprint(findings(t, openedBy(wrong.open(wrong.is, new(uses)))))
			t.Logf("%.2000s", all)
			if !strings.Contains(all, wrong.says) {
				t.Errorf("no finding says %q", wrong.says)
			}
		})
	}
}
