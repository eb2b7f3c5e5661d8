package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"example.com/keystate"
	"go.etcd.io/bbolt"
)

// What no contender can get past: the same bytes, in the groups that the engine on bbolt has reached, with nothing decided, encoded or
// waited for, by one goroutine. Of a group's members, half claim a key and half finish one.

var limits = []contender{
	{name: rawBolt, label: "raw bbolt", on: onBolt, open: openRawBolt, limit: true},
	{name: "limit: pwrite and fdatasync", label: "pwrite + fdatasync", on: onFile, open: openRawFile, limit: true},
}

// A writer is a contender that commits groups.
type writer interface {
	// commit is one transaction of so many members, and says how many requests it has finished.
	commit(group int) (finished int, err error)
}

var errNoRequest = errors.New("a limit answers nobody")

// noRequest is what a limit has in common with stations.
type noRequest struct{}

func (noRequest) request(context.Context, string) (order, error)   { return order{}, errNoRequest }
func (noRequest) business(context.Context, string) ([]byte, error) { return nil, errNoRequest }
func (noRequest) rows(context.Context) (int, error)                { return 0, errNoRequest }

// records are the two that the engine writes for a request, taken from an engine: of a key in its effect, and of a finished one.
func records(dir string) (live, done keystate.Record, err error) {
	folder, err := os.MkdirTemp(dir, "records")
	if err != nil {
		return live, done, err
	}
	defer os.RemoveAll(folder)
	e := &boltEngine{}
	if e.Engine, err = keystate.Open(boltPath(place{dir: folder}), e.observe(forEver)); err != nil {
		return live, done, err
	}
	defer e.Engine.Close()
	if err := e.Update(context.Background(), makeOrders); err != nil {
		return live, done, err
	}
	id := keystate.NewID()
	look := func(r *keystate.Record) error {
		found, err := e.Key(context.Background(), key(id))
		*r = found
		return err
	}
	looking := phases(putBusiness)
	act := looking[1].Effect
	looking[1].Effect = func(ctx context.Context, token string, s *order) error {
		return errors.Join(look(&live), act(ctx, token, s))
	}
	if e.orders, err = keystate.Register(e.Engine, "order", looking); err != nil {
		return live, done, err
	}
	if _, err := e.request(context.Background(), id); err != nil {
		return live, done, err
	}
	return live, done, look(&done)
}

func frames(dir string) (live, done []byte, err error) {
	l, d, err := records(dir)
	if err != nil {
		return nil, nil, err
	}
	live, err1 := l.MarshalBinary()
	done, err2 := d.MarshalBinary()
	return live, done, errors.Join(err1, err2)
}

// boltWriter writes with raw bbolt what the engine writes (docs/format.md).
type boltWriter struct {
	noRequest
	halves
	db         *bbolt.DB
	live, done []byte
	open       []string
	n          uint64
}

const keystateMap = 1 << 30 // keystate opens its file so

var (
	liveBucket  = []byte("live")
	doneBucket  = []byte("done")
	indexBucket = []byte("index")
	ledgerKey   = []byte("ledger")
	ledgerValue = make([]byte, 77)
)

func openRawBolt(p place) (station, error) {
	w := &boltWriter{}
	var err error
	if w.live, w.done, err = frames(p.dir); err != nil {
		return nil, err
	}
	if w.db, err = bbolt.Open(filepath.Join(p.dir, "raw.db"), 0o600, &bbolt.Options{InitialMmapSize: keystateMap}); err != nil {
		return nil, err
	}
	return w, w.db.Update(func(tx *bbolt.Tx) error {
		if _, err := tx.CreateBucketIfNotExists(ordersBucket); err != nil {
			return err
		}
		root, err := tx.CreateBucketIfNotExists(keysBucket)
		for _, name := range [][]byte{liveBucket, doneBucket, indexBucket} {
			if err == nil {
				_, err = root.CreateBucketIfNotExists(name)
			}
		}
		return err
	})
}

func (w *boltWriter) commit(group int) (finished int, err error) {
	closing := w.open[:min(w.share(group), len(w.open))]
	err = w.db.Update(func(tx *bbolt.Tx) error {
		root, orders := tx.Bucket(keysBucket), tx.Bucket(ordersBucket)
		live, done, index := root.Bucket(liveBucket), root.Bucket(doneBucket), root.Bucket(indexBucket)
		done.FillPercent = 0.95
		for _, id := range closing {
			w.n++
			sequence := binary.BigEndian.AppendUint64(nil, w.n)
			entry := append(binary.BigEndian.AppendUint64(nil, w.n<<16|w.n*0x9e3779b97f4a7c15>>48), sequence...) // minted keys lie by their time
			err := errors.Join(
				orders.Put([]byte(settledRow(id)), businessRow),
				live.Delete([]byte("\x05"+handScope+id)),
				done.Put(sequence, w.done),
				index.Put(entry, nil))
			if err != nil {
				return err
			}
		}
		w.open = w.open[len(closing):]
		for range group - len(closing) {
			id := keystate.NewID()
			if err := errors.Join(orders.Put([]byte(reservedRow(id)), businessRow), live.Put([]byte("\x05"+handScope+id), w.live)); err != nil {
				return err
			}
			w.open = append(w.open, id)
		}
		return root.Put(ledgerKey, ledgerValue)
	})
	return len(closing), err
}

// halves deals out the members of groups: half of all finish a key, and of an odd group one more every other time.
type halves struct{ odd bool }

func (h *halves) share(group int) int {
	if group%2 == 0 {
		return group / 2
	}
	h.odd = !h.odd
	if h.odd {
		return group / 2
	}
	return group/2 + 1
}

func (w *boltWriter) commits() (int64, error) { return boltCommits(w.db.View) }

func (w *boltWriter) close() error { return w.db.Close() }

// fileWriter appends the same contents to a file, around a ring that was written and synced before, so that no sync has more
// to do than the contents.
type fileWriter struct {
	noRequest
	halves
	file        *os.File
	claim, done int // bytes
	at          int64
	synced      int64
}

const ringSize = 64 << 20

func openRawFile(p place) (station, error) {
	live, done, err := frames(p.dir)
	if err != nil {
		return nil, err
	}
	id := keystate.NewID()
	w := &fileWriter{claim: len(live) + len(reservedRow(id)) + len(businessRow), done: len(done) + len(settledRow(id)) + len(businessRow)}
	if w.file, err = os.OpenFile(filepath.Join(p.dir, "raw"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	for at := int64(0); at < ringSize && err == nil; at += 1 << 20 {
		_, err = w.file.WriteAt(make([]byte, 1<<20), at)
	}
	return w, errors.Join(err, w.file.Sync())
}

func (w *fileWriter) commit(group int) (finished int, err error) {
	finished = w.share(group)
	contents := make([]byte, (group-finished)*w.claim+finished*w.done)
	if w.at+int64(len(contents)) > ringSize {
		w.at = 0
	}
	if _, err := w.file.WriteAt(contents, w.at); err != nil {
		return 0, err
	}
	w.at += int64(len(contents))
	w.synced++
	return finished, syncContents(w.file)
}

func (w *fileWriter) commits() (int64, error) { return w.synced, nil }
func (w *fileWriter) close() error            { return w.file.Close() }

// perform has a writer commit groups for a while.
func perform(w writer, group int, d time.Duration) (pace, error) {
	p := pace{}
	start := time.Now()
	for time.Since(start) < d {
		before := time.Now()
		n, err := w.commit(group)
		if err != nil {
			return p, fmt.Errorf("a group of %d: %w", group, err)
		}
		p.latency.add(time.Since(before))
		p.requests += n
	}
	p.took = time.Since(start)
	return p, nil
}
