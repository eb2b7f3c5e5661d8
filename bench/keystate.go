package main

import (
	"context"
	"errors"
	"path/filepath"
	"sync/atomic"

	"example.com/keystate"
	"go.etcd.io/bbolt"
)

// engine is what all this is about, on any store.
type engine[Tx any] struct {
	*keystate.Engine[Tx]
	orders  *keystate.Machine[order]
	closers []func() error

	groups, members, reaped atomic.Int64
}

// phases are the request, on a store that is written with put.
func phases[Tx any](put func(ctx context.Context, tx Tx, name string) error) []keystate.Phase[Tx, order] {
	return []keystate.Phase[Tx, order]{
		{To: reserved, Commit: func(ctx context.Context, tx Tx, s *order) error {
			return put(ctx, tx, reservedRow(s.Account))
		}},
		{To: sent, Effect: func(_ context.Context, token string, s *order) error {
			s.Payout = payOut(token)
			return nil
		}},
		{To: keystate.Finished, Commit: func(ctx context.Context, tx Tx, s *order) error {
			s.Receipt = receipt
			return put(ctx, tx, settledRow(s.Account))
		}},
	}
}

// observe has the engine tell what is counted.
func (e *engine[Tx]) observe(o keystate.Options) *keystate.Options {
	o.Logger = quiet
	o.Observer = &keystate.Observer{
		Grouped: func(ev keystate.Event) {
			e.groups.Add(1)
			e.members.Add(int64(ev.Size))
		},
		Reaped: func(ev keystate.Event) { e.reaped.Add(int64(ev.Size)) },
	}
	return &o
}

func key(id string) keystate.Key { return keystate.Key{Scope: handScope, ID: id} }

func (e *engine[Tx]) request(ctx context.Context, id string) (order, error) {
	return e.orders.Do(ctx, key(id), asked(id))
}

func (e *engine[Tx]) grouped() (transactions, members int64) {
	return e.groups.Load(), e.members.Load()
}

func (e *engine[Tx]) close() (err error) {
	for _, fn := range e.closers {
		err = errors.Join(err, fn())
	}
	return err
}

// boltEngine is keystate on bbolt.
type boltEngine struct{ engine[*bbolt.Tx] }

// forEver keeps finished keys, so that all measurements of a store see as many of them.
var forEver = keystate.Options{Retention: -1}

func openOnBolt(p place) (station, error) { return openBoltEngine(p, forEver) }

func boltPath(p place) string { return filepath.Join(p.dir, "keystate.db") }

func openBoltEngine(p place, o keystate.Options) (*boltEngine, error) {
	e := &boltEngine{}
	opened, err := keystate.Open(boltPath(p), e.observe(o))
	if err != nil {
		return nil, err
	}
	return e, e.start(opened)
}

// start makes the bucket for the business rows, and registers the machine.
func (e *boltEngine) start(opened *keystate.Engine[*bbolt.Tx]) (err error) {
	e.Engine = opened
	e.closers = []func() error{opened.Close}
	if err = opened.Update(context.Background(), makeOrders); err == nil {
		e.orders, err = keystate.Register(opened, "order", phases(putBusiness))
	}
	return err
}

func makeOrders(tx *bbolt.Tx) error {
	_, err := tx.CreateBucketIfNotExists(ordersBucket)
	return err
}

func putBusiness(_ context.Context, tx *bbolt.Tx, name string) error {
	return tx.Bucket(ordersBucket).Put([]byte(name), businessRow)
}

func (e *boltEngine) commits() (int64, error) {
	return boltCommits(func(fn func(tx *bbolt.Tx) error) error { return e.View(context.Background(), fn) })
}

func (e *boltEngine) business(ctx context.Context, name string) (row []byte, err error) {
	err = e.View(ctx, func(tx *bbolt.Tx) (err error) {
		row, err = boltBusiness(tx, name)
		return err
	})
	return row, err
}

func (e *boltEngine) rows(ctx context.Context) (n int, err error) {
	err = e.View(ctx, func(tx *bbolt.Tx) error {
		n = tx.Bucket(ordersBucket).Stats().KeyN
		return nil
	})
	return n, err
}
