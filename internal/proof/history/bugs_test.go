package history

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// Bugs, seeded between the engine and its store.

// A bug is something wrong with the store, and the judge who must find it.
type bug struct {
	name   string
	finder string
	update func(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error
	reads  func(f *faulty, d deed, k keystate.Keys) keystate.Keys // of a caller's deed
	writes func(f *faulty, k keystate.Keys) keystate.Keys

	prints  sync.Map // request → its fingerprint, as far as one was seen
	reaped  sync.Map // keystate.Key → its record, when it was reaped
	evicted sync.Map // keystate.Key: of which another request is to take the place
}

var bugs = []*bug{
	{name: "the fingerprint of a finished key is ignored", finder: byPorcupine, reads: ignorePrint, writes: learnPrint},
	{name: "a mismatch takes the key over", finder: byPorcupine, reads: evict, writes: makeRoom},
	{name: "the answer of an earlier life is replayed", finder: byPorcupine, reads: remember, writes: keepReaped},
	{name: "a commit is lost, and acknowledged", finder: byEither, update: loseSome},
	{name: "a commit is acknowledged before it is written, and the process dies", finder: byPorcupine, update: acknowledgeEarly},
	{name: "a commit takes effect twice", finder: byCount, update: commitTwice},
	{name: "a phase's rows and its record are in two transactions", finder: byCount, update: split},
	{name: "a key is reaped before its time", finder: byCount, reads: age},
}

// A faulty store is a mortal one with a bug.
type faulty struct {
	*mortal
	bug   *bug
	deeds sync.Map           // *bbolt.Tx → the deed for which it reads
	late  *[]keystate.Record // where Put puts records, while the transaction is to have none
}

func (f *faulty) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if f.bug.update == nil {
		return f.mortal.Update(ctx, fn)
	}
	return f.bug.update(f, ctx, fn)
}

func (f *faulty) View(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	d, _ := ctx.Value(asked{}).(deed)
	return f.mortal.View(ctx, func(tx *bbolt.Tx) error {
		f.deeds.Store(tx, d)
		defer f.deeds.Delete(tx)
		return fn(tx)
	})
}

func (f *faulty) Keys(tx *bbolt.Tx) keystate.Keys {
	k := f.mortal.Keys(tx)
	switch {
	case tx.Writable() && f.late != nil:
		return &wrongKeys{Keys: k, put: f.putLate}
	case tx.Writable() && f.bug.writes != nil:
		return f.bug.writes(f, k)
	case !tx.Writable() && f.bug.reads != nil:
		d, _ := f.deeds.Load(tx)
		return f.bug.reads(f, d.(deed), k)
	}
	return k
}

func (f *faulty) putLate(r *keystate.Record) error {
	*f.late = append(*f.late, *r)
	r.Version++
	return nil
}

// Keys with one method other than they should be.
type wrongKeys struct {
	keystate.Keys
	get      func(keystate.Key) (keystate.Record, error)
	put      func(*keystate.Record) error
	delete   func(keystate.Record) error
	finished func(after uint64, limit int) ([]keystate.Record, error)
}

func (k *wrongKeys) Get(key keystate.Key) (keystate.Record, error) {
	if k.get != nil {
		return k.get(key)
	}
	return k.Keys.Get(key)
}

func (k *wrongKeys) Put(r *keystate.Record) error {
	if k.put != nil {
		return k.put(r)
	}
	return k.Keys.Put(r)
}

func (k *wrongKeys) Delete(r keystate.Record) error {
	if k.delete != nil {
		return k.delete(r)
	}
	return k.Keys.Delete(r)
}

func (k *wrongKeys) Finished(after uint64, limit int) ([]keystate.Record, error) {
	if k.finished != nil {
		return k.finished(after, limit)
	}
	return k.Keys.Finished(after, limit)
}

// learnPrint remembers the fingerprints of requests, as they are claimed.
func learnPrint(f *faulty, k keystate.Keys) keystate.Keys {
	return &wrongKeys{Keys: k, put: func(r *keystate.Record) error {
		if s, err := stateOf(*r); err == nil {
			f.bug.prints.Store(deed{verb: do, key: s.Key, item: s.Item}, r.Fingerprint)
		}
		return k.Put(r)
	}}
}

func ignorePrint(f *faulty, d deed, k keystate.Keys) keystate.Keys {
	return &wrongKeys{Keys: k, get: func(key keystate.Key) (keystate.Record, error) {
		r, err := k.Get(key)
		if print, ok := f.bug.prints.Load(d); ok && r.Status == keystate.Answered {
			r.Fingerprint = print.([16]byte)
		}
		return r, err
	}}
}

func evict(f *faulty, d deed, k keystate.Keys) keystate.Keys {
	return &wrongKeys{Keys: k, get: func(key keystate.Key) (keystate.Record, error) {
		r, err := k.Get(key)
		s, decodeErr := stateOf(r)
		if err == nil && decodeErr == nil && d.verb == do && r.Status == keystate.Answered && s.Item != d.item {
			f.bug.evicted.Store(key, true)
			return keystate.Record{}, keystate.ErrNotFound
		}
		return r, err
	}}
}

func makeRoom(f *faulty, k keystate.Keys) keystate.Keys {
	return &wrongKeys{Keys: k, put: func(r *keystate.Record) error {
		if _, ok := f.bug.evicted.LoadAndDelete(r.Key); ok && r.Version == 0 {
			old, err := k.Get(r.Key)
			if err == nil && old.Status == keystate.Answered {
				err = k.(witness).Keys.Delete(old)
			}
			if err != nil {
				return err
			}
		}
		return k.Put(r)
	}}
}

func keepReaped(f *faulty, k keystate.Keys) keystate.Keys {
	return &wrongKeys{Keys: k, delete: func(r keystate.Record) error {
		f.bug.reaped.Store(r.Key, r)
		return k.Delete(r)
	}}
}

func remember(f *faulty, _ deed, k keystate.Keys) keystate.Keys {
	return &wrongKeys{Keys: k, get: func(key keystate.Key) (keystate.Record, error) {
		r, err := k.Get(key)
		if old, ok := f.bug.reaped.LoadAndDelete(key); ok && errors.Is(err, keystate.ErrNotFound) {
			return old.(keystate.Record), nil
		}
		return r, err
	}}
}

// age makes finished keys older than they are.
func age(_ *faulty, _ deed, k keystate.Keys) keystate.Keys {
	return &wrongKeys{Keys: k, finished: func(after uint64, limit int) ([]keystate.Record, error) {
		page, err := k.Finished(after, limit)
		for i := range page {
			page[i].Ended = page[i].Ended.Add(-retention / 2)
		}
		return page, err
	}}
}

var errRolledBack = errors.New("rolled back")

// rehearse runs fn and leaves no trace of it.
func (f *faulty) rehearse(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	err := f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		if err := fn(tx); err != nil {
			return err
		}
		return errRolledBack
	})
	if errors.Is(err, errRolledBack) {
		return nil
	}
	return err
}

func loseSome(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if rand.IntN(50) == 0 {
		return f.rehearse(ctx, fn)
	}
	return f.mortal.Update(ctx, fn)
}

func acknowledgeEarly(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if rand.IntN(50) > 0 {
		return f.mortal.Update(ctx, fn)
	}
	if err := f.rehearse(ctx, fn); err != nil {
		return err
	}
	_ = f.die("died after an acknowledgement")
	return nil
}

// withoutRecords runs fn so that its rows are written, and returns the records that are not.
func (f *faulty) withoutRecords(tx *bbolt.Tx, fn func(tx *bbolt.Tx) error) (late []keystate.Record, err error) {
	f.late = &late
	defer func() { f.late = nil }()
	err = fn(tx)
	return late, err
}

func commitTwice(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	return f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		if _, err := f.withoutRecords(tx, fn); err != nil {
			return err
		}
		return fn(tx)
	})
}

func split(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	var late []keystate.Record
	err := f.mortal.Update(ctx, func(tx *bbolt.Tx) (err error) {
		late, err = f.withoutRecords(tx, fn)
		return err
	})
	if err != nil || len(late) == 0 {
		return err
	}
	return f.mortal.Update(context.Background(), func(tx *bbolt.Tx) error {
		for _, r := range late {
			if err := f.mortal.Keys(tx).Put(&r); err != nil {
				return err
			}
		}
		return nil
	})
}
