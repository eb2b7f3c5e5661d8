package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"example.com/keystate"
	"github.com/google/uuid"
	"go.etcd.io/bbolt"
)

// idAt makes a key's ID as it would have been made then.
type idAt func(at time.Time) string

func randomID(time.Time) string { return uuid.NewString() }

// mintedID is a UUIDv7 as it was made then.
func mintedID(at time.Time) string {
	id := uuid.New()
	ms := at.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	id[6] = id[6]&0x0f | 0x70
	return id.String()
}

// Keys that a store is filled with have finished at an even pace over this long, which ended this long ago.
const (
	pastSpan = 48 * time.Hour
	pastEnd  = 2 * time.Hour
)

const perBatch = 100_000

// batches are the IDs of so many keys of the past, in the order of their making.
func batches(keys int, newID idAt) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		from := time.Now().Add(-pastEnd - pastSpan)
		for start := 0; start < keys; start += perBatch {
			ids := make([]string, min(perBatch, keys-start))
			for i := range ids {
				ids[i] = newID(from.Add(pastSpan / time.Duration(keys) * time.Duration(start+i)))
			}
			if !yield(ids) {
				return
			}
		}
	}
}

// A mould is a record that an engine has made, from which others are cast: each with an ID, a state, an incarnation and times
// of its own.
type mould struct{ record keystate.Record }

func (m mould) cast(id string, at time.Time) (keystate.Record, error) {
	r := m.record
	if len(id) != len(r.Key.ID) {
		return r, errors.New("an ID of another length")
	}
	r.State = bytes.ReplaceAll(r.State, []byte(r.Key.ID), []byte(id))
	r.Key.ID = id
	r.Version, r.Sequence = 0, 0
	r.Created = at
	if !r.Ended.IsZero() {
		r.Ended = at
	}
	if !r.FirstTried.IsZero() {
		r.FirstTried = at
	}
	r.History = slices.Clone(r.History)
	for i := range r.History {
		r.History[i].At = at
	}
	rand.Read(r.Incarnation[:])
	rand.Read(r.Fingerprint[:])
	return r, nil
}

// finishedMould has an engine finish a key.
func finishedMould[Tx any](e *engine[Tx]) (m mould, err error) {
	id := keystate.NewID()
	if _, err = e.request(context.Background(), id); err != nil {
		return m, err
	}
	m.record, err = e.Key(context.Background(), key(id))
	return m, err
}

// fillOnBolt puts finished keys into the store as the engine writes them, without waiting for the disk until the end.
func fillOnBolt(p place, keys int, newID idAt, done func(int)) error {
	e, err := openBoltEngine(p, forEver)
	if err != nil {
		return err
	}
	m, err := finishedMould(&e.engine)
	if err := joinClose(err, e); err != nil {
		return err
	}
	db, err := bbolt.Open(boltPath(p), 0o600, nil)
	if err != nil {
		return err
	}
	store := keystate.Bolt(db)
	identity, _, err := store.Boot(context.Background())
	if err != nil {
		return errors.Join(err, db.Close())
	}
	db.NoSync = true
	at := time.Now().Add(-pastEnd).Truncate(time.Microsecond)
	err = store.Update(context.Background(), func(tx *bbolt.Tx) error { return store.Keys(tx).Delete(m.record) }) // it finished now
	for ids := range batches(keys, newID) {
		if err != nil {
			break
		}
		if err = putCasts(store, m, byPlace(identity, ids), at); err != nil {
			break
		}
		done(len(ids))
	}
	if err == nil {
		err = db.Sync()
	}
	return errors.Join(err, store.Close(), db.Close())
}

// byPlace orders IDs as their places in the index lie (docs/format.md), so that each transaction touches a part of it.
// That is for speed alone: any other order gives as good a store.
func byPlace(identity [16]byte, ids []string) []string {
	if len(ids) == 0 || strings.HasPrefix(ids[0][14:], "7") {
		return ids
	}
	places := make(map[string]uint64, len(ids))
	for _, id := range ids {
		h := sha256.New()
		h.Write(identity[:])
		h.Write([]byte{byte(len(handScope))})
		h.Write([]byte(handScope + id))
		places[id] = binary.BigEndian.Uint64(h.Sum(nil))
	}
	return slices.SortedFunc(slices.Values(ids), func(a, b string) int {
		if places[a] < places[b] {
			return -1
		}
		return 1
	})
}

const perTransaction = 10_000

func putCasts(store keystate.Store[*bbolt.Tx], m mould, ids []string, at time.Time) error {
	for part := range slices.Chunk(ids, perTransaction) {
		err := store.Update(context.Background(), func(tx *bbolt.Tx) error {
			keys := store.Keys(tx)
			for _, id := range part {
				r, err := m.cast(id, at)
				if err == nil {
					err = keys.Put(&r)
				}
				if err != nil {
					return fmt.Errorf("put key %s: %w", id, err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func joinClose(err error, s station) error { return errors.Join(err, s.close()) }
