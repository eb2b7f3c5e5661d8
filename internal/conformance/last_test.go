package conformance

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"example.com/keystate"
)

func TestAStoreThatPutsTheLastRecordWithItsCommitMayPass(t *testing.T) {
	defer goleak.VerifyNone(t)
	setFlags(t, map[string]string{"rapid.checks": "20"})
	var parted atomic.Int64
	Store(t, func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
		return &partingBolt{Store: OpenBolt(t, dir), parted: &parted}
	}, BoltRows())
	if parted.Load() == 0 {
		t.Error("the suite has put no record last")
	}
}

// A partingBolt stores what is put last when the function has returned, as with a server's commit; where it is faulty, in another way.
type partingBolt struct {
	keystate.Store[*bbolt.Tx]
	is      string // empty: sound
	parted  *atomic.Int64
	pending sync.Map // *bbolt.Tx → keystate.Record
	updates atomic.Int64
}

// brokenPartings are ways to put a record last that are wrong, and the checks that find them.
var brokenPartings = []struct{ is, foundBy string }{
	{"what is put last is left out", "a record that is put last is stored as Put does"},
	{"what is put last has the version that it had", "a record that is put last is stored as Put does"},
	{"what is put last is there when its transaction is not", "a record that is put last goes with the rest of its transaction"},
	{"what is put last is there, and its transaction is not", "a record that is put last goes with the rest of its transaction"},
	{"what is put last needs no holder", "a record that is put last by whoever does not hold it undoes its transaction"},
	{"the rest is committed where what is put last is refused", "a record that is put last by whoever does not hold it undoes its transaction"},
	{"who is refused at the last is told that all is well", "a record that is put last by whoever does not hold it undoes its transaction"},
	{"who is refused at the last is not told why", "a record that is put last by whoever does not hold it undoes its transaction"},
	{"who loses a race at the last is told that it won", "one of many puts a record last"},
	{"what is put last in a View is passed over", "a record that is put last in a View is refused"},
}

func (s *partingBolt) Update(ctx context.Context, fn func(*bbolt.Tx) error) error {
	s.updates.Add(1)
	defer s.updates.Add(-1)
	var last keystate.Record
	var parts bool
	err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
		s.pending.Delete(tx)
		err := fn(tx)
		var pending any
		if pending, parts = s.pending.LoadAndDelete(tx); !parts {
			return err
		}
		s.parted.Add(1)
		last = pending.(keystate.Record)
		if err != nil {
			return err
		}
		return s.part(s.Store.Keys(tx), last)
	})
	alone := func() error {
		return s.Store.Update(ctx, func(tx *bbolt.Tx) error { r := last; return s.Store.Keys(tx).Put(&r) })
	}
	switch fenced := errors.Is(err, keystate.ErrFenced); {
	case parts && err != nil && s.is == "what is put last is there when its transaction is not":
		_ = alone()
	case parts && errors.Is(err, errUndone):
		return alone()
	case fenced && s.is == "who is refused at the last is told that all is well",
		fenced && s.is == "who loses a race at the last is told that it won" && s.updates.Load() > 1:
		return nil
	case fenced && s.is == "who is refused at the last is not told why":
		return errors.New(err.Error())
	}
	return err
}

// part is what is done at the end of a transaction.
func (s *partingBolt) part(keys keystate.Keys, r keystate.Record) error {
	switch s.is {
	case "what is put last is left out":
		return nil
	case "what is put last is there, and its transaction is not":
		return errUndone
	case "what is put last needs no holder":
		return force(keys, r)
	case "the rest is committed where what is put last is refused":
		_ = keys.Put(&r)
		return nil
	}
	return keys.Put(&r)
}

func (s *partingBolt) Keys(tx *bbolt.Tx) keystate.Keys { return partingKeys{s.Store.Keys(tx), s, tx} }

type partingKeys struct {
	keystate.Keys
	store *partingBolt
	tx    *bbolt.Tx
}

func (k partingKeys) PutLast(r *keystate.Record) error {
	if !k.tx.Writable() {
		if k.store.is == "what is put last in a View is passed over" {
			return nil
		}
		return errors.New("a View cannot write")
	}
	k.store.pending.Store(k.tx, *r)
	if k.store.is != "what is put last has the version that it had" {
		r.Version++
	}
	return nil
}
