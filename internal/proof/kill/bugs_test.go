//go:build unix

package kill

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// A bug is something wrong with the child, on purpose.
type bug string

const (
	answersEarly    bug = "the answer is given before its commit is durable"
	inventsTokens   bug = "each attempt at an effect has a token of its own"
	twoTransactions bug = "a phase's writes and its recovery point are in two transactions"
	countsInMemory  bug = "a commit believes what an earlier try of it left in memory"
	givesUp         bug = "a key parks that nobody retries"
	opensSlowly     bug = "the store takes longer than a second to open"
	hoards          bug = "memory is not let go of"
	neverSyncs      bug = "the store is never synced"
)

// openSplit opens the store so that each Update is two.
func openSplit(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], error) {
	db, err := openOwn(path, o, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return nil, err
	}
	return keystate.New[*bbolt.Tx](&split{Store: keystate.Bolt(db)}, o)
}

// openUnsynced opens the store so that nothing is synced once it is made.
func openUnsynced(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], error) {
	db, err := openOwn(path, o, &bbolt.Options{Timeout: time.Second, NoSync: true, NoGrowSync: true})
	if err != nil {
		return nil, err
	}
	return keystate.New(keystate.Bolt(db), o)
}

// openOwn opens the store's file as a program does that brings its own database.
func openOwn(path string, o *keystate.Options, own *bbolt.Options) (*bbolt.DB, error) {
	if _, err := os.Stat(path); err != nil { // keystate makes a file whole or not at all
		e, err := keystate.Open(path, o)
		if err != nil {
			return nil, err
		}
		if err := e.Close(); err != nil {
			return nil, err
		}
	}
	return bbolt.Open(path, 0o600, own)
}

// split is a store that writes the records of a transaction in a second one.
type split struct {
	keystate.Store[*bbolt.Tx]
	late sync.Map // *bbolt.Tx → *[]keystate.Record
}

func (s *split) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	var late []keystate.Record
	err := s.Store.Update(ctx, func(tx *bbolt.Tx) error {
		late = nil
		s.late.Store(tx, &late)
		defer s.late.Delete(tx)
		return fn(tx)
	})
	if err != nil || len(late) == 0 {
		return err
	}
	return s.Store.Update(context.Background(), func(tx *bbolt.Tx) error {
		for _, r := range late {
			if err := s.Store.Keys(tx).Put(&r); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *split) Keys(tx *bbolt.Tx) keystate.Keys {
	k := s.Store.Keys(tx)
	if late, ok := s.late.Load(tx); ok {
		return splitKeys{k, late.(*[]keystate.Record)}
	}
	return k
}

type splitKeys struct {
	keystate.Keys
	late *[]keystate.Record
}

func (k splitKeys) Put(r *keystate.Record) error {
	stored, err := k.Get(r.Key)
	if err != nil && !errors.Is(err, keystate.ErrNotFound) || stored.Version != r.Version {
		return errors.Join(err, keystate.ErrFenced)
	}
	*k.late = append(*k.late, *r)
	r.Version++
	return nil
}
