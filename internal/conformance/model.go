package conformance

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"pgregory.net/rapid"

	"example.com/keystate"
)

// A storeModel is what a store should hold.
type storeModel struct {
	records  map[keystate.Key]keystate.Record
	rows     map[string]string
	sequence uint64 // of the last that finished
}

func (m storeModel) clone() storeModel {
	m.records, m.rows = maps.Clone(m.records), maps.Clone(m.rows)
	return m
}

// A storeOp is one act in a transaction.
type storeOp struct {
	kind   string
	key    keystate.Key
	status keystate.Status
	who    string
}

// opKinds, with those more often that lead somewhere.
var opKinds = []string{
	"finish", "delete", "claim", "move", "row", "finish", "delete", "claim", "move", "finish", "stale", "stranger",
}

func drawnOp() *rapid.Generator[storeOp] {
	keys := []keystate.Key{{ID: "a"}, {Scope: "a", ID: "\x00"}, {Scope: "a\x00", ID: "\xff"}, {Scope: "\xff", ID: "a/a"}}
	return rapid.Custom(func(t *rapid.T) storeOp {
		return storeOp{
			kind:   rapid.SampledFrom(opKinds).Draw(t, "act"),
			key:    rapid.SampledFrom(keys).Draw(t, "key"),
			status: rapid.SampledFrom(unfinishedStatuses).Draw(t, "status"),
			who:    rapid.SampledFrom([]string{"ada", "bob", "eve"}).Draw(t, "who"),
		}
	})
}

// act does to the store and to the model what op says, and compares the answers.
func act[Tx any](tx recordTx[Tx], m *storeModel, op storeOp) error {
	held, exists := m.records[op.key]
	mismatch := func(err error) error {
		return fmt.Errorf("%+v on version %d, %q: %w", op, held.Version, held.Status, err)
	}
	next := held
	if !exists {
		next = claimed(op.key, op.who)
	}
	if next.Status != keystate.Answered {
		next = moved(next, op.status)
		next.State = []byte(op.who)
	}
	want := keystate.ErrFenced // of Put; nil: it succeeds
	switch op.kind {
	case "row":
		m.rows[op.who] = string(op.status)
		return tx.setRow(op.who, string(op.status))
	case "delete":
		return actDelete(tx, m, op)
	case "claim":
		next = claimed(op.key, op.who)
		if !exists {
			want = nil
		}
	case "move", "finish":
		if held.Status == keystate.Answered {
			return nil // what becomes of such a Put is not promised
		}
		if exists {
			want = nil
		} else {
			next.Version = 1
		}
		if op.kind == "finish" {
			next = moved(next, keystate.Answered)
		}
	case "stale":
		next.Version += 2
	case "stranger":
		if !exists {
			next.Version = 1
		}
		next.Incarnation[3]++
	}
	given := next.Version
	err := tx.Put(&next)
	if want != nil {
		if !errors.Is(err, want) {
			return mismatch(fmt.Errorf("putting it returned %w, want %w", cmp.Or(err, errNone), want))
		}
		return nil
	}
	if err != nil || next.Version != given+1 {
		return mismatch(fmt.Errorf("putting it returned %w and version %d", cmp.Or(err, errNone), next.Version))
	}
	if next.Status == keystate.Answered {
		if next.Sequence <= m.sequence {
			return mismatch(fmt.Errorf("sequence %d comes after %d", next.Sequence, m.sequence))
		}
		m.sequence = next.Sequence
	}
	m.records[op.key] = next
	return nil
}

func actDelete[Tx any](tx recordTx[Tx], m *storeModel, op storeOp) error {
	held, exists := m.records[op.key]
	if !exists {
		held = claimed(op.key, op.who)
		held.Version = 1
	}
	err := tx.Delete(held)
	switch {
	case !exists && !errors.Is(err, keystate.ErrFenced):
		return fmt.Errorf("deleting %q, which is not there, returned %w", op.key, cmp.Or(err, errNone))
	case exists && (held.Status == keystate.Answered) != (err == nil):
		return fmt.Errorf("deleting %q, which is %q, returned %w", op.key, held.Status, cmp.Or(err, errNone))
	case err == nil:
		delete(m.records, op.key)
	}
	return nil
}

// agrees demands that a transaction sees what the model holds.
func agrees[Tx any](tx recordTx[Tx], m storeModel) error {
	c, err := contentsIn(tx)
	if err != nil {
		return err
	}
	all := slices.Concat(c.unfinished, c.finished)
	if err := sameRecords(byKey(all), byKey(slices.Collect(maps.Values(m.records)))); err != nil {
		return fmt.Errorf("listed: %w", err)
	}
	for key, want := range m.records {
		got, err := tx.Get(key)
		if err := cmp.Or(err, sameRecord(got, want)); err != nil {
			return fmt.Errorf("getting %q: %w", key, err)
		}
	}
	for name, want := range m.rows {
		if got, err := tx.row(name); err != nil || got != want {
			return fmt.Errorf("row %q is %q, %w, want %q", name, got, cmp.Or(err, errNone), want)
		}
	}
	return nil
}

func (s *storeTrial[Tx]) modelAgrees() error {
	return s.random(func(t *rapid.T, s *storeTrial[Tx]) error {
		m := storeModel{records: map[keystate.Key]keystate.Record{}, rows: map[string]string{}}
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		transact := func(t *rapid.T, end func() error) error {
			ops := rapid.SliceOfN(drawnOp(), 1, 6).Draw(t, "acts")
			var after storeModel
			var judged error
			err := ending(func() error {
				return s.update(func(tx recordTx[Tx]) error {
					after, judged = m.clone(), nil
					for _, op := range ops {
						if judged = act(tx, &after, op); judged != nil {
							return judged
						}
					}
					if judged = agrees(tx, after); judged != nil {
						return judged
					}
					return end()
				})
			})
			if must(judged); err == nil {
				m = after
			}
			return err
		}
		broken := errors.New("broken off")
		t.Repeat(map[string]func(*rapid.T){
			"commit": func(t *rapid.T) { must(transact(t, func() error { return nil })) },
			"error": func(t *rapid.T) {
				if err := transact(t, func() error { return broken }); !errors.Is(err, broken) {
					t.Fatalf("the function's error came back as %v", err)
				}
			},
			"panic": func(t *rapid.T) {
				if err := transact(t, func() error { panic(broken) }); err == nil || errors.Is(err, errPanicked) {
					t.Fatalf("a panic came back as %v", err)
				}
			},
			"reopen": func(*rapid.T) { must(s.reopen()) },
			"":       func(*rapid.T) { must(s.view(func(tx recordTx[Tx]) error { return agrees(tx, m) })) },
		})
		return nil
	})
}
