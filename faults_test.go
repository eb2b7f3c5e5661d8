package keystate

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// TestEveryFaultIsCaught breaks the engine in one way after another, and plays scenarios until the model objects.
// A fault that it does not object to within so many scenarios would be one that the property cannot see.
func TestEveryFaultIsCaught(t *testing.T) {
	const budget = 3000 // scenarios; the shyest fault takes some dozens on average
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			for seed := range budget {
				m := moods[seed%len(moods)]
				if err := play(t, scenarios(m).Example(seed+1), f, &sightings{}); err != nil {
					t.Logf("caught by scenario %d after %s, in %s: %.300v", seed+1, time.Since(began).Round(time.Millisecond), m.name, err)
					return
				}
			}
			t.Errorf("survived %d scenarios", budget)
		})
	}
}

func TestEveryFaultIsListedInTheDocumentation(t *testing.T) {
	page, err := os.ReadFile("docs/testing.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(string(page)), " ")
	for _, f := range faults {
		if !strings.Contains(text, f.name) {
			t.Errorf("docs/testing.md does not list %q", f.name)
		}
	}
}

// A fault is something wrong with the engine: with a decision, with its transactions, or with its records.
type fault struct {
	name   string
	rules  func(r *rules[*bbolt.Tx])
	update func(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error
	keys   func(f *faulty, tx *bbolt.Tx, k Keys) Keys
}

var faults = []fault{
	// What a commit is.
	{name: "a stale holder is not fenced out", keys: overrideFence},
	{name: "a commit is acknowledged before it is durable", update: acknowledgeEarly},
	{name: "a commit is acknowledged and never written", update: loseSome},
	{name: "a phase is split into two transactions", update: split},
	{name: "a commit takes effect twice", update: commitTwice},
	{name: "the last member of a group is dropped", update: dropLast},
	{name: "a failed commit's writes are kept", update: keepFailed},
	{name: "a staged key is lost", keys: loseStaged},

	// What the store keeps.
	{name: "a finished key is missing from the index", keys: afterFinish(func(k *boltKeys, _ ledger, r *Record) error {
		return k.index.Delete(indexEntry(k.place(r.Key), r.Sequence))
	})},
	{name: "the index is written before the record, in a transaction of its own", update: indexFirst},
	{name: "a finished key stays among the unfinished", keys: afterFinish(func(k *boltKeys, _ ledger, r *Record) error {
		return k.live.Put(k.liveKey(r.Key), k.encode(r))
	})},
	{name: "two finished keys get one sequence", keys: afterFinish(func(k *boltKeys, _ ledger, _ *Record) error {
		k.ledger.next--
		return nil
	})},
	{name: "the digest of the unfinished lags behind", keys: afterPut(func(k *boltKeys, before ledger, r *Record) error {
		k.ledger.liveSum = before.liveSum
		return nil
	})},
	{name: "the digest of the finished is not updated", keys: afterFinish(func(k *boltKeys, before ledger, _ *Record) error {
		k.ledger.doneSum = before.doneSum
		return nil
	})},
	{name: "a parked key is not counted", keys: afterPut(func(k *boltKeys, _ ledger, r *Record) error {
		if r.Status == Parked {
			k.ledger.counts.Parked--
		}
		return nil
	})},
	{name: "a reaped key stays in the index", keys: afterDelete(func(k *boltKeys, r Record) error {
		return k.index.Put(indexEntry(k.place(r.Key), r.Sequence), nil)
	})},
	{name: "a reaped key stays in the digest", keys: afterDelete(func(k *boltKeys, r Record) error {
		k.ledger.doneSum++
		return nil
	})},

	// What a record says.
	{name: "the point moves without the state", rules: onEvents(func(r Record, events []event) []event {
		return each(events, reach, func(e *event) { e.state = r.State })
	})},
	{name: "a refusal drops the state", rules: onEvents(func(r Record, events []event) []event {
		return each(events, refuse, func(e *event) { e.state = r.State })
	})},
	{name: "a resumption begins at the beginning", rules: afterNext(claim, func(old Record, r *Record) {
		r.Point, r.History = Started, slices.Clone(old.History[:1])
	})},
	{name: "an effect's result is not remembered", rules: afterNext(act, func(_ Record, r *Record) { r.Acted = false })},
	{name: "a replay is of the state before the last phase", keys: replayOldState},
	{name: "the fingerprint is ignored", rules: func(r *rules[*bbolt.Tx]) {
		r.same = func(_, _ [16]byte) bool { return true }
	}},
	{name: "an older boot takes a key back", rules: onEvents(func(r Record, events []event) []event {
		return each(events, claim, func(e *event) { e.epoch = max(e.epoch, r.Epoch) })
	})},

	// What is tried, and how often.
	{name: "a resumption's attempt is not counted", rules: onEvents(func(_ Record, events []event) []event {
		if len(events) > 0 && events[0].kind == claim {
			return slices.DeleteFunc(slices.Clone(events), func(e event) bool { return e.kind == try })
		}
		return events
	})},
	{name: "a shutdown costs an attempt", rules: afterNext(release, func(old Record, r *Record) { r.Attempts = old.Attempts })},
	{name: "attempts are not bounded", rules: onVerdict(func(v verdict, reason ParkReason) (verdict, ParkReason) {
		if reason == AttemptsUsedUp {
			return again, ""
		}
		return v, reason
	})},
	{name: "a final error is tried again", rules: func(r *rules[*bbolt.Tx]) {
		judge := r.judge
		r.judge = func(p *phase[*bbolt.Tx], err error, byEffect bool, attempts, inRun int) (verdict, ParkReason) {
			var mark *finalMark
			if errors.As(err, &mark) {
				err = mark.err
			}
			return judge(p, err, byEffect, attempts, inRun)
		}
	}},
	{name: "a final error parks", rules: onVerdict(func(v verdict, reason ParkReason) (verdict, ParkReason) {
		if v == refused {
			return stalled, AttemptsUsedUp
		}
		return v, reason
	})},
	{name: "a withdrawal is tried again", rules: onVerdict(func(v verdict, reason ParkReason) (verdict, ParkReason) {
		if v == withdrawn {
			return again, ""
		}
		return v, reason
	})},
	{name: "a parked key goes on by itself", keys: unpark},
	{name: "interrupted keys are not found at Register", keys: overlookWaiting},

	// What may be sent, and under which token.
	{name: "an at-most-once effect is sent again", rules: onPlan(dontKnow, send)},
	{name: "a token's life is ignored", rules: onPlan(forgotten, send)},
	{name: "nobody asks before sending again", rules: onPlan(ask, send)},
	{name: "a shutdown forgets what may have been sent", rules: afterNext(release, func(_ Record, r *Record) { r.FirstTried = time.Time{} })},
	{name: "each attempt has its own token", rules: func(r *rules[*bbolt.Tx]) {
		var n atomic.Int64
		r.token = func(store, incarnation [16]byte, to RecoveryPoint) string {
			return fmt.Sprint(n.Add(1), incarnation, to)
		}
	}},
	{name: "two phases of a key share a token", rules: func(r *rules[*bbolt.Tx]) {
		r.token = func(store, incarnation [16]byte, _ RecoveryPoint) string { return token(store, incarnation, "") }
	}},
	{name: "two keys share a token", rules: func(r *rules[*bbolt.Tx]) {
		r.token = func(store, _ [16]byte, to RecoveryPoint) string { return token(store, [16]byte{}, to) }
	}},
	{name: "two lives of a key share their tokens", rules: onEvents(func(_ Record, events []event) []event {
		return each(events, begin, func(e *event) {
			sum := sha256.Sum256([]byte(e.key.String()))
			e.incarnation = [16]byte(sum[:16])
		})
	})},

	// What is withdrawn.
	{name: "a later phase's withdrawal is heeded", rules: func(r *rules[*bbolt.Tx]) {
		judge := r.judge
		r.judge = func(p *phase[*bbolt.Tx], err error, byEffect bool, attempts, inRun int) (verdict, ParkReason) {
			q := *p
			q.first = true
			return judge(&q, err, byEffect, attempts, inRun)
		}
	}},
	{name: "a first phase's mere failure withdraws the key", rules: func(r *rules[*bbolt.Tx]) {
		judge := r.judge
		r.judge = func(p *phase[*bbolt.Tx], err error, byEffect bool, attempts, inRun int) (verdict, ParkReason) {
			v, reason := judge(p, err, byEffect, attempts, inRun)
			if p.first && v == stalled {
				return withdrawn, ""
			}
			return v, reason
		}
	}},
	{name: "a policy wins over a withdrawal", rules: func(r *rules[*bbolt.Tx]) {
		judge := r.judge
		r.judge = func(p *phase[*bbolt.Tx], err error, byEffect bool, attempts, inRun int) (verdict, ParkReason) {
			if q := *p; p.onError != Retry {
				q.first = false
				p = &q
			}
			return judge(p, err, byEffect, attempts, inRun)
		}
	}},
	{name: "a withdrawn key keeps its refusal", rules: onVerdict(func(v verdict, reason ParkReason) (verdict, ParkReason) {
		if v == withdrawn {
			return refused, ""
		}
		return v, reason
	})},
	{name: "a withdrawn key waits to be taken up again", rules: onVerdict(func(v verdict, reason ParkReason) (verdict, ParkReason) {
		if v == withdrawn {
			return later, ""
		}
		return v, reason
	})},
	{name: "a withdrawn key ends in one transaction and is deleted in another", update: deleteLater, keys: holdBackDeletions},

	// What is reaped, and when.
	{name: "retention is ignored", rules: func(r *rules[*bbolt.Tx]) {
		r.expired = func(r Record, _ time.Time, _ time.Duration) bool { return r.Status == Answered }
	}},
	{name: "keys are reaped by their creation", rules: func(r *rules[*bbolt.Tx]) {
		r.expired = func(r Record, now time.Time, retention time.Duration) bool {
			return !now.Before(r.Created.Add(retention))
		}
	}},
	{name: "nothing is reaped", rules: func(r *rules[*bbolt.Tx]) {
		r.expired = func(Record, time.Time, time.Duration) bool { return false }
	}},
	{name: "unfinished keys are reaped", keys: reapUnfinished, rules: func(r *rules[*bbolt.Tx]) {
		next := r.next
		r.expired = func(r Record, now time.Time, retention time.Duration) bool {
			return !now.Before(r.Created.Add(retention))
		}
		r.next = func(r Record, events ...event) (Record, error) {
			if len(events) == 1 && events[0].kind == reap {
				return Record{}, nil
			}
			return next(r, events...)
		}
	}},
}

// onEvents changes what happens to a record.
func onEvents(change func(r Record, events []event) []event) func(*rules[*bbolt.Tx]) {
	return func(r *rules[*bbolt.Tx]) {
		next := r.next
		r.next = func(r Record, events ...event) (Record, error) { return next(r, change(r, events)...) }
	}
}

// each changes the events of a kind.
func each(events []event, kind eventKind, change func(*event)) []event {
	events = slices.Clone(events)
	for i := range events {
		if events[i].kind == kind {
			change(&events[i])
		}
	}
	return events
}

// afterNext changes what a record comes to when an event of the kind has happened to it.
func afterNext(kind eventKind, change func(old Record, r *Record)) func(*rules[*bbolt.Tx]) {
	return func(r *rules[*bbolt.Tx]) {
		next := r.next
		r.next = func(old Record, events ...event) (Record, error) {
			r, err := next(old, events...)
			if err == nil && slices.ContainsFunc(events, func(e event) bool { return e.kind == kind }) {
				change(old, &r)
			}
			return r, err
		}
	}
}

func onVerdict(change func(verdict, ParkReason) (verdict, ParkReason)) func(*rules[*bbolt.Tx]) {
	return func(r *rules[*bbolt.Tx]) {
		judge := r.judge
		r.judge = func(p *phase[*bbolt.Tx], err error, byEffect bool, attempts, inRun int) (verdict, ParkReason) {
			return change(judge(p, err, byEffect, attempts, inRun))
		}
	}
}

func onPlan(from, to plan) func(*rules[*bbolt.Tx]) {
	return func(r *rules[*bbolt.Tx]) {
		sound := r.plan
		r.plan = func(p *phase[*bbolt.Tx], firstTried, now time.Time) plan {
			if made := sound(p, firstTried, now); made != from {
				return made
			}
			return to
		}
	}
}

// A faulty store is a mortal one with a fault between it and the engine.
type faulty struct {
	*mortal
	fault   fault
	updates atomic.Int64

	captured *[]Record // of the member that is running, when its records are held back

	mu     sync.Mutex
	before map[Key][]byte // states, as of the last write but one
	stored map[Key][]byte
	held   []Record // to be deleted in a transaction of their own
}

// apply puts the fault where it belongs, and returns the store for the engine.
func (f fault) apply(m *mortal, r *rules[*bbolt.Tx]) Store[*bbolt.Tx] {
	if f.rules != nil {
		f.rules(r)
	}
	if f.update == nil && f.keys == nil {
		return m
	}
	return &faulty{mortal: m, fault: f, before: map[Key][]byte{}, stored: map[Key][]byte{}}
}

func (f *faulty) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if f.fault.update != nil {
		return f.fault.update(f, ctx, fn)
	}
	return f.mortal.Update(ctx, fn)
}

func (f *faulty) Keys(tx *bbolt.Tx) Keys {
	k := f.mortal.Keys(tx)
	switch {
	case tx.Writable() && f.captured != nil:
		return &heldBack{Keys: k, records: f.captured}
	case f.fault.keys != nil:
		return f.fault.keys(f, tx, k)
	}
	return k
}

// recall reads the records as they look with the fault.
func (f *faulty) recall(key Key, r *Record) error {
	if f.fault.keys == nil {
		return f.mortal.recall(key, r)
	}
	return f.View(context.Background(), func(tx *bbolt.Tx) (err error) {
		*r, err = f.Keys(tx).Get(key)
		return err
	})
}

// heldBack records are not stored.
type heldBack struct {
	Keys
	records *[]Record
}

func (h *heldBack) Get(key Key) (Record, error) {
	for _, r := range *h.records {
		if r.Key == key {
			r.Version++
			return r, nil
		}
	}
	return h.Keys.Get(key)
}

func (h *heldBack) Put(r *Record) error {
	*h.records = append(*h.records, *r)
	r.Version++
	return nil
}

// withoutRecords runs fn and holds its records back.
func (f *faulty) withoutRecords(ctx context.Context, fn func(tx *bbolt.Tx) error) (records []Record, err error) {
	err = f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		records = nil
		f.captured = &records
		defer func() { f.captured = nil }()
		return fn(tx)
	})
	return records, err
}

var (
	errDropped    = errors.New("dropped")
	errRolledBack = errors.New("rolled back")
)

// rehearse runs fn and leaves no trace of it.
func (f *faulty) rehearse(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	err := f.mortal.boltStore.Update(ctx, func(tx *bbolt.Tx) error {
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

func acknowledgeEarly(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	p := f.mortal.p
	if p.dead.Load() {
		return errDead
	}
	p.mu.Lock()
	last := p.death == afterCommit && p.after == 1
	p.mu.Unlock()
	if !last {
		return f.mortal.Update(ctx, fn)
	}
	if err := f.rehearse(ctx, fn); err != nil {
		return err
	}
	p.die()
	return nil
}

func loseSome(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if f.updates.Add(1)%5 == 0 {
		return f.rehearse(ctx, fn)
	}
	return f.mortal.Update(ctx, fn)
}

func split(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	records, err := f.withoutRecords(ctx, fn)
	if err != nil || len(records) == 0 {
		return err
	}
	return f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		for _, r := range records {
			if err := f.mortal.Keys(tx).Put(&r); err != nil {
				return err
			}
		}
		return nil
	})
}

func commitTwice(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if _, err := f.withoutRecords(ctx, fn); err != nil {
		return err
	}
	return f.mortal.Update(ctx, fn)
}

func dropLast(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	err := f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		if err := fn(tx); err != nil || f.mortal.members() < 2 {
			return err
		}
		return errDropped
	})
	if errors.Is(err, errDropped) {
		return nil
	}
	return err
}

func keepFailed(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	var failure error
	err := f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		var failed *phaseFailure
		if failure = fn(tx); errors.As(failure, &failed) {
			return nil
		}
		return failure
	})
	if err == nil {
		return failure
	}
	return err
}

// Keys with one method other than they should be.
type faultyKeys struct {
	Keys
	get      func(Key) (Record, error)
	put      func(*Record) error
	remove   func(Record) error
	page     func(after Key, limit int) ([]Record, error)
	finished func(after uint64, limit int) ([]Record, error)
}

func (k *faultyKeys) Get(key Key) (Record, error) {
	if k.get != nil {
		return k.get(key)
	}
	return k.Keys.Get(key)
}

func (k *faultyKeys) Put(r *Record) error {
	if k.put != nil {
		return k.put(r)
	}
	return k.Keys.Put(r)
}

func (k *faultyKeys) Delete(r Record) error {
	if k.remove != nil {
		return k.remove(r)
	}
	return k.Keys.Delete(r)
}

func (k *faultyKeys) Unfinished(after Key, limit int) ([]Record, error) {
	if k.page != nil {
		return k.page(after, limit)
	}
	return k.Keys.Unfinished(after, limit)
}

func (k *faultyKeys) Finished(after uint64, limit int) ([]Record, error) {
	if k.finished != nil {
		return k.finished(after, limit)
	}
	return k.Keys.Finished(after, limit)
}

// afterPut changes what the store keeps, when a record has been put.
func afterPut(change func(k *boltKeys, before ledger, r *Record) error) func(*faulty, *bbolt.Tx, Keys) Keys {
	return func(f *faulty, tx *bbolt.Tx, keys Keys) Keys {
		return &faultyKeys{Keys: keys, put: func(r *Record) error {
			k := f.mortal.boltStore.Keys(tx).(*boltKeys)
			before := k.ledger
			if err := keys.Put(r); err != nil {
				return err
			}
			return change(k, before, r)
		}}
	}
}

func afterFinish(change func(k *boltKeys, before ledger, r *Record) error) func(*faulty, *bbolt.Tx, Keys) Keys {
	return afterPut(func(k *boltKeys, before ledger, r *Record) error {
		if r.Status != Answered {
			return nil
		}
		return change(k, before, r)
	})
}

// afterDelete changes what the store keeps, when a record has been deleted.
func afterDelete(change func(k *boltKeys, r Record) error) func(*faulty, *bbolt.Tx, Keys) Keys {
	return func(f *faulty, tx *bbolt.Tx, keys Keys) Keys {
		return &faultyKeys{Keys: keys, remove: func(r Record) error {
			if err := keys.Delete(r); err != nil {
				return err
			}
			return change(f.mortal.boltStore.Keys(tx).(*boltKeys), r)
		}}
	}
}

// indexFirst writes the index entry of the key that finishes next, and takes it back when the record is there.
func indexFirst(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	entry := indexEntry(0, uint64(f.updates.Add(1))+1<<32)
	err := f.mortal.boltStore.Update(ctx, func(tx *bbolt.Tx) error {
		return f.mortal.boltStore.Keys(tx).(*boltKeys).index.Put(entry, nil)
	})
	if err != nil {
		return err
	}
	return f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		return errors.Join(f.mortal.boltStore.Keys(tx).(*boltKeys).index.Delete(entry), fn(tx))
	})
}

// deleteLater deletes what holdBackDeletions has left, in a transaction of its own.
func deleteLater(f *faulty, ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if err := f.mortal.Update(ctx, fn); err != nil {
		return err
	}
	f.mu.Lock()
	held := f.held
	f.held = nil
	f.mu.Unlock()
	if len(held) == 0 {
		return nil
	}
	return f.mortal.Update(ctx, func(tx *bbolt.Tx) error {
		for _, r := range held {
			if err := f.mortal.Keys(tx).Delete(r); err != nil && !errors.Is(err, ErrFenced) {
				return err
			}
		}
		return nil
	})
}

// holdBackDeletions leaves a record as it is when it was put in the same transaction.
func holdBackDeletions(f *faulty, tx *bbolt.Tx, k Keys) Keys {
	put := map[Key]bool{}
	return &faultyKeys{
		Keys: k,
		put: func(r *Record) error {
			put[r.Key] = true
			return k.Put(r)
		},
		remove: func(r Record) error {
			if !put[r.Key] {
				return k.Delete(r)
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			f.held = append(f.held, r)
			return nil
		},
	}
}

func overrideFence(_ *faulty, _ *bbolt.Tx, k Keys) Keys {
	return &faultyKeys{Keys: k, put: func(r *Record) error {
		if stored, err := k.Get(r.Key); err == nil {
			r.Version = stored.Version
		}
		return k.Put(r)
	}}
}

func loseStaged(_ *faulty, _ *bbolt.Tx, k Keys) Keys {
	return &faultyKeys{Keys: k, put: func(r *Record) error {
		if r.Version == 0 && r.Status == Waiting {
			r.Version++
			return nil
		}
		return k.Put(r)
	}}
}

func replayOldState(f *faulty, tx *bbolt.Tx, k Keys) Keys {
	f.mu.Lock()
	defer f.mu.Unlock()
	if tx.Writable() {
		return &faultyKeys{Keys: k, put: func(r *Record) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.before[r.Key], f.stored[r.Key] = f.stored[r.Key], r.State
			return k.Put(r)
		}}
	}
	return &faultyKeys{Keys: k, get: func(key Key) (Record, error) {
		r, err := k.Get(key)
		f.mu.Lock()
		defer f.mu.Unlock()
		if old := f.before[key]; err == nil && r.Status == Answered && old != nil {
			r.State = old
		}
		return r, err
	}}
}

func asWaiting(r Record) Record {
	if r.Status == Parked {
		r.Status, r.ParkReason = Waiting, ""
	}
	return r
}

func unpark(_ *faulty, _ *bbolt.Tx, k Keys) Keys {
	return &faultyKeys{
		Keys: k,
		get: func(key Key) (Record, error) {
			r, err := k.Get(key)
			return asWaiting(r), err
		},
		page: func(after Key, limit int) ([]Record, error) {
			records, err := k.Unfinished(after, limit)
			for i := range records {
				records[i] = asWaiting(records[i])
			}
			return records, err
		},
	}
}

func overlookWaiting(_ *faulty, _ *bbolt.Tx, k Keys) Keys {
	return &faultyKeys{Keys: k, page: func(after Key, limit int) ([]Record, error) {
		records, err := k.Unfinished(after, limit)
		return slices.DeleteFunc(records, func(r Record) bool { return r.Status == Waiting }), err
	}}
}

func reapUnfinished(_ *faulty, _ *bbolt.Tx, k Keys) Keys {
	return &faultyKeys{Keys: k, finished: func(after uint64, limit int) ([]Record, error) {
		finished, err := k.Finished(after, limit)
		if err != nil {
			return nil, err
		}
		unfinished, err := k.Unfinished(Key{}, limit)
		return append(unfinished, finished...), err
	}}
}
