package main

import (
	"bytes"
	"context"
	"path/filepath"

	"github.com/vmihailenco/msgpack/v5"
	"go.etcd.io/bbolt"
)

var boltContenders = []contender{
	{name: keystateOnBolt, label: "keystate/bbolt", on: onBolt, open: openOnBolt, fill: fillOnBolt},
	{name: byUpdate, label: "bbolt Update", on: onBolt, open: openBoltByHand((*bbolt.DB).Update), fill: fillBoltByHand},
	{name: "bbolt by hand, Batch per step", label: "bbolt Batch", on: onBolt, open: openBoltByHand((*bbolt.DB).Batch)},
}

var (
	ordersBucket = []byte("orders")
	keysBucket   = []byte("keys")
)

// inBolt is one bbolt transaction for each step, by Update or by Batch.
type inBolt struct {
	db     *bbolt.DB
	commit func(db *bbolt.DB, fn func(tx *bbolt.Tx) error) error
}

// boltRow is a key's row in bbolt.
type boltRow struct {
	Point                    string
	Request, State, Response []byte
}

func openBoltByHand(commit func(*bbolt.DB, func(*bbolt.Tx) error) error) func(place) (station, error) {
	return func(p place) (station, error) {
		db, err := bbolt.Open(filepath.Join(p.dir, "hand.db"), 0o600, nil)
		if err != nil {
			return nil, err
		}
		err = db.Update(func(tx *bbolt.Tx) error {
			for _, name := range [][]byte{keysBucket, ordersBucket} {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return nil
		})
		return hand{inBolt{db, commit}}, err
	}
}

// claim looks before it writes: a transaction of bbolt's that changes nothing is written and synced all the same.
func (b inBolt) claim(_ context.Context, r *handRecord) error {
	var known bool
	look := func(tx *bbolt.Tx) (err error) {
		known, err = r.read(tx)
		return err
	}
	if err := b.db.View(look); err != nil || known {
		return err
	}
	return b.commit(b.db, func(tx *bbolt.Tx) error {
		if err := look(tx); err != nil || known {
			return err
		}
		r.point = started
		return putRow(tx, r.id, boltRow{Point: started, Request: r.request})
	})
}

// read takes over what is stored of the key.
func (r *handRecord) read(tx *bbolt.Tx) (known bool, err error) {
	b := tx.Bucket(keysBucket).Get([]byte(r.id))
	if b == nil {
		return false, nil
	}
	var row boltRow
	if err := msgpack.Unmarshal(b, &row); err != nil {
		return true, err
	}
	if !bytes.Equal(row.Request, r.request) {
		return true, errOther
	}
	r.point, r.state, r.response = row.Point, row.State, row.Response
	return true, nil
}

func putRow(tx *bbolt.Tx, id string, row boltRow) error {
	b, err := msgpack.Marshal(row)
	if err != nil {
		return err
	}
	return tx.Bucket(keysBucket).Put([]byte(id), b)
}

func (b inBolt) move(_ context.Context, r *handRecord, to string, contents []byte, business string) error {
	err := b.commit(b.db, func(tx *bbolt.Tx) error {
		stored := handRecord{id: r.id, request: r.request}
		if known, err := stored.read(tx); err != nil {
			return err
		} else if !known || stored.point != r.point {
			return errOvertaken
		}
		if business != "" {
			if err := tx.Bucket(ordersBucket).Put([]byte(business), businessRow); err != nil {
				return err
			}
		}
		row := boltRow{Point: to, Request: r.request, State: contents}
		if to == finished {
			row.State, row.Response = nil, contents
		}
		return putRow(tx, r.id, row)
	})
	if err == nil {
		r.point = to
	}
	return err
}

func (b inBolt) commits() (n int64, err error) { return boltCommits(b.db.View) }

// boltCommits is bbolt's own number of the last transaction that wrote.
func boltCommits(view func(func(tx *bbolt.Tx) error) error) (n int64, err error) {
	err = view(func(tx *bbolt.Tx) error {
		n = int64(tx.ID())
		return nil
	})
	return n, err
}

func (b inBolt) business(_ context.Context, name string) (row []byte, err error) {
	err = b.db.View(func(tx *bbolt.Tx) (err error) {
		row, err = boltBusiness(tx, name)
		return err
	})
	return row, err
}

func boltBusiness(tx *bbolt.Tx, name string) ([]byte, error) {
	row := tx.Bucket(ordersBucket).Get([]byte(name))
	if row == nil {
		return nil, errNoRow
	}
	return bytes.Clone(row), nil
}

func (b inBolt) rows(context.Context) (n int, err error) {
	err = b.db.View(func(tx *bbolt.Tx) error {
		n = tx.Bucket(ordersBucket).Stats().KeyN
		return nil
	})
	return n, err
}

func (b inBolt) close() error { return b.db.Close() }

// fillBoltByHand writes finished rows, many in a transaction, without waiting for the disk until the end.
func fillBoltByHand(p place, keys int, newID idAt, done func(int)) error {
	s, err := openBoltByHand((*bbolt.DB).Update)(p)
	if err != nil {
		return err
	}
	db := s.(hand).way.(inBolt).db
	db.NoSync = true
	for ids := range batches(keys, newID) {
		err = db.Update(func(tx *bbolt.Tx) error {
			for _, id := range ids {
				request, response, err := finishedByHand(id)
				if err == nil {
					err = putRow(tx, id, boltRow{Point: finished, Request: request, Response: response})
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			break
		}
		done(len(ids))
	}
	if err == nil {
		err = db.Sync()
	}
	return joinClose(err, s)
}

// finishedByHand is what is in the row of a finished key.
func finishedByHand(id string) (request, response []byte, err error) {
	o := asked(id)
	if request, err = msgpack.Marshal(o); err != nil {
		return nil, nil, err
	}
	o.Payout, o.Receipt = id[:8], receipt
	response, err = msgpack.Marshal(o)
	return request, response, err
}
