package keystate

import (
	"context"
	"errors"
	"testing"

	"go.etcd.io/bbolt"
)

// A knowing store knows of transactions that cannot be committed, though nobody says so.
type knowing struct {
	Store[*bbolt.Tx]
	spoiled *bbolt.Tx
}

var errHidden = errors.New("the transaction is spoiled")

func (s *knowing) Keys(tx *bbolt.Tx) Keys { return knowingKeys{s.Store.Keys(tx), s, tx} }

type knowingKeys struct {
	Keys
	store *knowing
	tx    *bbolt.Tx
}

func (k knowingKeys) Check() error {
	if k.store.spoiled == k.tx {
		return errHidden
	}
	return nil
}

// Update commits nothing of a transaction that is spoiled.
func (s *knowing) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	return s.Store.Update(ctx, func(tx *bbolt.Tx) error {
		s.spoiled = nil
		err := fn(tx)
		if err == nil && s.spoiled == tx {
			err = errors.New("the store says no")
		}
		return err
	})
}

// Otherwise it would be the store that fails, again and again for ever, and no policy would decide.
func TestAPhaseThatHidesWhatKeepsItsTransactionFromBeingCommittedHasFailed(t *testing.T) {
	opts := (&Options{Logger: quiet}).orDefault()
	file, err := openBolt(storePath(t), opts)
	if err != nil {
		t.Fatal(err)
	}
	s := &knowing{Store: file}
	e, err := New[*bbolt.Tx](s, &opts)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	var later int
	m, err := Register(e, "hiding", []Phase[*bbolt.Tx, string]{
		{To: "first", Commit: func(context.Context, *bbolt.Tx, *string) error { return nil }},
		{To: "hidden", OnError: Fail, Commit: func(_ context.Context, tx *bbolt.Tx, _ *string) error {
			s.spoiled = tx
			return nil
		}},
		{To: Finished, Commit: func(context.Context, *bbolt.Tx, *string) error {
			later++
			return nil
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.Do(t.Context(), Key{Scope: "s", ID: "k"}, "")
	if final := (*FinalError)(nil); !errors.As(err, &final) || final.Reason != errHidden.Error() || later != 0 {
		t.Errorf("the caller gets %v, and a later phase has run %d times", err, later)
	}
	r, err := e.Key(t.Context(), Key{Scope: "s", ID: "k"})
	if err != nil || r.Status != Answered {
		t.Errorf("the key is %s, %v", r.Status, err)
	}
}
