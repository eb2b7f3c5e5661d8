package keystate

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"

	"example.com/keystate/internal/boltfile"
	"go.etcd.io/bbolt"
)

// How a damaged store is told from a sound one: by what bbolt panics over, and by counts and sums that must add up.

// checkRecords checks what the ledger says against what the buckets hold: the unfinished records always, the
// finished ones and their index when asked to.
func checkRecords(tx *bbolt.Tx, id [16]byte, all bool) error {
	k, err := newBoltKeys(tx, id)
	if err != nil {
		return err
	}
	want := k.ledger
	if err := k.tallyLive(); err != nil {
		return err
	}
	if all {
		if err := k.tallyDone(); err != nil {
			return err
		}
	} else {
		k.ledger.counts.Finished, k.ledger.doneSum, k.ledger.indexSum = want.counts.Finished, want.doneSum, want.indexSum
	}
	if k.ledger != want {
		return fmt.Errorf("%w: the records do not add up to what the ledger says: a key is missing, or was another", ErrCorrupt)
	}
	return nil
}

// tallyLive counts and sums the unfinished records anew.
func (k *boltKeys) tallyLive() error {
	k.ledger.counts, k.ledger.liveSum = Counts{}, 0
	return k.live.ForEach(func(name, frame []byte) error {
		r, err := decodeRecord(frame)
		if err != nil {
			return err
		}
		if !bytes.Equal(name, k.liveKey(r.Key)) || r.Status == Answered {
			return fmt.Errorf("%w: the record of %s lies where it does not belong", ErrCorrupt, r.Key)
		}
		k.add(k.ledger.counts.of(r.Status), &k.ledger.liveSum, liveDigest(frame))
		return nil
	})
}

// tallyDone counts and sums the finished records and their index anew. The index is judged by its own sum:
// the ledger's must equal both what the entries and what the records add up to.
func (k *boltKeys) tallyDone() error {
	var byRecords uint64
	k.ledger.doneSum = 0
	err := k.done.ForEach(func(name, frame []byte) error {
		h, err := peek(frame)
		if err != nil || len(name) != 8 || h.status != Answered {
			return cmp.Or(err, fmt.Errorf("%w: a record lies among the finished that is not", ErrCorrupt))
		}
		sequence := binary.BigEndian.Uint64(name)
		k.add(&k.ledger.counts.Finished, &k.ledger.doneSum, doneDigest(sequence, frame))
		byRecords += indexDigest(k.place(h.key()), sequence)
		return nil
	})
	if err != nil {
		return err
	}
	entries, byEntries, err := k.tallyIndex(func() bool { return false })
	if err != nil {
		return err
	}
	if byRecords != byEntries || entries != k.ledger.counts.Finished {
		return fmt.Errorf("%w: the index does not name the finished records", ErrCorrupt)
	}
	k.ledger.indexSum = byEntries
	return nil
}

// tallyIndex counts and sums the index's entries anew, unless it is stopped. They must ascend, or a search would miss some.
func (k *boltKeys) tallyIndex(stopped func() bool) (entries, sum uint64, err error) {
	var last []byte
	err = k.index.ForEach(func(entry, _ []byte) error {
		if len(entry) != 16 || bytes.Compare(last, entry) >= 0 {
			return fmt.Errorf("%w: an index entry of %d bytes, or out of order", ErrCorrupt, len(entry))
		}
		last = entry
		if entries++; entries%1024 == 0 && stopped() {
			return ErrClosed
		}
		sum += indexDigest(binary.BigEndian.Uint64(entry), binary.BigEndian.Uint64(entry[8:]))
		return nil
	})
	return entries, sum, err
}

// beginAudit has the index looked through in the background, as it is now: a finished key whose index page was lost would look like
// a new one, and be carried out again. So none is taken for new before.
func (s *boltStore) beginAudit() error {
	var tx *bbolt.Tx
	err := s.guard(func() (err error) {
		tx, err = s.db.Begin(false)
		return err
	})
	if err != nil {
		return fmt.Errorf("keystate: %w", err)
	}
	header, err := boltfile.ReadHeader(s.file, tx.Size())
	if err != nil {
		return errors.Join(pageError(err), tx.Rollback())
	}
	go func() {
		defer close(s.summed)
		err := s.guard(func() error { return s.auditIndex(tx, header) })
		if err = errors.Join(err, tx.Rollback()); err != nil && !errors.Is(err, ErrClosed) {
			s.fail(err)
		}
	}()
	return nil
}

// auditIndex checks the index's pages, and that its entries add up to what the ledger says. While tx is open, none of the pages is
// used for anything else, whatever is committed.
func (s *boltStore) auditIndex(tx *bbolt.Tx, header boltfile.Header) error {
	if err := boltfile.Check(whileOpen{s.file, &s.closing}, tx.Size(), header, indexed); err != nil {
		return pageError(err)
	}
	k, err := newBoltKeys(tx, s.id)
	if err != nil {
		return err
	}
	entries, sum, err := k.tallyIndex(s.closing.Load)
	if err == nil && (entries != k.ledger.counts.Finished || sum != k.ledger.indexSum) {
		err = fmt.Errorf("%w: the index does not add up to what the ledger says: a finished key would not be found", ErrCorrupt)
	}
	return err
}

// whileOpen reads until the store is being closed.
type whileOpen struct {
	io.ReaderAt
	closing *atomic.Bool
}

func (r whileOpen) ReadAt(b []byte, at int64) (int, error) {
	if r.closing.Load() {
		return 0, ErrClosed
	}
	return r.ReaderAt.ReadAt(b, at)
}

// audited waits until the index has been summed, and says whether it adds up.
func (s *boltStore) audited(ctx context.Context) error {
	select {
	case <-s.summed:
		return s.failure()
	default:
	}
	select {
	case <-s.summed:
		return s.failure()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// guard turns the panics and faults by which bbolt meets a damaged file into ErrCorrupt; all others go on.
func (s *boltStore) guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			if err = damage(v); err == nil {
				panic(v)
			}
		}
	}()
	return fn()
}

// damage recognizes a panic that bbolt, or the memory under its map, raises over a damaged file. It is called while that panics.
func damage(v any) error {
	if fault, ok := v.(interface{ Addr() uintptr }); ok {
		return fmt.Errorf("%w: reading it failed at address %#x", ErrCorrupt, fault.Addr())
	}
	const misuse = "assertion failed: managed tx " // of the program's: Commit or Rollback inside Update or View
	if text, ok := v.(string); ok && strings.HasPrefix(text, misuse) {
		return nil
	}
	raised, called := raisedInBolt()
	if !raised || isNil(v) && called { // a program that asks a bucket which is not there
		return nil
	}
	return fmt.Errorf("%w: bbolt: %v", ErrCorrupt, v)
}

func isNil(v any) bool {
	err, ok := v.(runtime.Error)
	return ok && strings.Contains(err.Error(), "nil pointer dereference")
}

// raisedInBolt says whether the present panic was raised in bbolt's own code, and whether a program's function had called it: what bbolt
// trusts and finds otherwise, it meets as an index or a length out of range, or as an assertion of its own.
func raisedInBolt() (raised, byProgram bool) {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs[:])])
	panicking := false
	for more := true; more; {
		var f runtime.Frame
		f, more = frames.Next()
		switch {
		case strings.HasPrefix(f.Function, "runtime."):
			panicking = panicking || f.Function == "runtime.gopanic"
		case !panicking: // those who deal with the panic
		case strings.HasPrefix(f.Function, "go.etcd.io/bbolt"):
			raised = true
		default:
			return raised, raised && !strings.HasPrefix(f.Function, ourPackage)
		}
	}
	return raised, false
}

// ourPackage is how the names of this package's functions begin.
var ourPackage = reflect.TypeFor[boltStore]().PkgPath() + "."
