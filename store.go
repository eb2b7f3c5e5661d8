package keystate

import (
	"context"
	"time"
)

// A Store gives an [Engine] transactions, and the records of its keys inside them. Tx is what a phase's Commit
// writes with; it must be comparable. All methods are safe for concurrent use.
type Store[Tx any] interface {
	// Boot is called once, before anything else. It returns the store's identity, made when the store was
	// created, and an epoch greater than that of every earlier Boot: records claimed under a smaller one have lost their holder.
	Boot(ctx context.Context) (id [16]byte, epoch uint64, err error)

	// Update runs fn in a transaction that is durable when Update returns nil, and has left no trace when it
	// returns fn's error. fn may run more than once, concurrently with nothing; each run starts from a clean slate.
	// A panic in fn becomes an error and rolls back as an error does. So does runtime.Goexit, or it rolls back and ends
	// the goroutine that called Update.
	Update(ctx context.Context, fn func(tx Tx) error) error

	// View runs fn in a transaction that reads one consistent, durable state. fn may run more than once: a store on a server loses connections.
	View(ctx context.Context, fn func(tx Tx) error) error

	// Keys gives access to the records inside a transaction, and only until it ends.
	Keys(tx Tx) Keys

	Close() error
}

// A SharedStore is open in several engines at the same time, in one process or in many. Each boot holds the keys that bear its epoch as
// long as it renews its lease, by the store's clock; then others may take them over. That a boot has lost a key it learns when it
// writes: [ErrFenced].
type SharedStore[Tx any] interface {
	Store[Tx]

	// Renew says that the boot is at work, and returns for how long that holds. Close ends it at once.
	Renew(ctx context.Context) (lease time.Duration, err error)

	// Alive says whether the lease of an epoch's boot still holds.
	Alive(tx Tx, epoch uint64) (bool, error)

	// Adopt gives the boot up to limit waiting or running keys of the named machines whose boot is not alive, none to two boots.
	// They bear its epoch when it returns.
	Adopt(ctx context.Context, machines []string, limit int) ([]Record, error)
}

// A Reaper is a store that deletes finished records by itself, many at once.
type Reaper interface {
	// Reap deletes up to limit finished records whose retention has passed by the store's clock, counted from when it gave them their
	// Sequence, the lowest first. It passes over those that another call is just deleting, and waits for none. It returns how many it has deleted; and if
	// those were fewer than limit, in how long the next one is due: 0 if others are at it, the retention if there is none.
	Reap(ctx context.Context, retention time.Duration, limit int) (reaped int, next time.Duration, err error)
}

// Keys are the engine's records inside one transaction.
type Keys interface {
	// Get returns the record of a key, or [ErrNotFound].
	Get(Key) (Record, error)

	// Put stores r if the stored record has its Incarnation and Version (Version 0: there is none), and increments the Version;
	// otherwise it returns [ErrFenced]. A record that becomes finished gets the next Sequence.
	Put(r *Record) error

	// Delete removes a finished record if the stored one has the same Incarnation and Version; otherwise it returns [ErrFenced].
	Delete(r Record) error

	// Unfinished lists records that are not finished, in an order of the store's own that does not change, after the given key.
	Unfinished(after Key, limit int) ([]Record, error)

	// Finished lists finished records in the order of finishing, after the given Sequence.
	Finished(after uint64, limit int) ([]Record, error)

	// Counts tells how many records there are in each status.
	Counts() (Counts, error)
}

// Counts is how many keys there are in each status.
type Counts struct {
	Running, Waiting, Parked, Finished uint64
}

func (c *Counts) of(s Status) *uint64 {
	switch s {
	case Running:
		return &c.Running
	case Waiting:
		return &c.Waiting
	case Parked:
		return &c.Parked
	case Answered:
		return &c.Finished
	}
	panic("keystate: no count for status " + string(s))
}

// Optional abilities of a store.
type (
	// An admitter says whether there is room for a new key.
	admitter interface{ admit() error }

	// An auditor may still be looking through the store when it is open. That a key is not there is believed when audited returns nil.
	auditor interface {
		audited(ctx context.Context) error
	}

	// A limiter refuses new keys when it holds more than maxBytes, or leaves less than headroom on its disk.
	limiter interface {
		limit(maxBytes, headroom int64)
	}

	// A grouper tells of every group commit.
	grouper interface{ onGroup(func(Event)) }

	// A getter reads one record as it is now, durable, without a transaction around it.
	getter interface {
		Get(ctx context.Context, key Key) (Record, error)
	}

	// A recaller is a getter for calls: it reads over a record whose memory it uses again, and of one with an answer no more than a replay
	// tells: Key, Machine, Status, Point, State and Fingerprint. Nobody waits in it.
	recaller interface {
		recall(key Key, r *Record) error
	}

	// A timekeeper has a clock of its own, by which all engines on it go: theirs may be hours apart.
	timekeeper interface {
		Now(ctx context.Context) (time.Time, error)
	}

	// A parter stores a record as [Keys.Put] does, as the last thing that a transaction does, in one go with its commit. Where Put
	// would return [ErrFenced], Update does. The record's Sequence is not told.
	parter interface {
		PutLast(r *Record) error
	}

	// A checker knows of its transaction what keeps it from being committed, though the phase that has done it says that all is well.
	checker interface{ Check() error }

	// A sizer knows how large the store is.
	sizer interface{ size() (used, free int64) }
)

// check returns what keeps a transaction from being committed, as far as its store knows.
func check(keys Keys) error {
	if c, ok := keys.(checker); ok {
		return c.Check()
	}
	return nil
}

// putLast stores a record as the last thing that a transaction does.
func putLast(keys Keys, r *Record) error {
	if p, ok := keys.(parter); ok {
		return p.PutLast(r)
	}
	return keys.Put(r)
}
