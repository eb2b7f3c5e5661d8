package conformance

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"example.com/keystate"
)

func (s *storeTrial[Tx]) absentIsNotFound() error {
	present := keystate.Key{Scope: "a", ID: "b"}
	absent := []keystate.Key{
		{ID: "b"}, {Scope: "a", ID: "B"}, {Scope: "A", ID: "b"}, {Scope: "a", ID: "b\x00"}, {Scope: "a", ID: "b "},
		{Scope: "a\x00", ID: "b"}, {Scope: "a", ID: "bb"}, {Scope: "b", ID: "a"}, {ID: "ab"}, {ID: "a/b"},
	}
	notFound := func() error {
		for _, key := range absent {
			if err := s.holdsNot(key); err != nil {
				return err
			}
			err := s.update(func(tx recordTx[Tx]) error {
				_, err := tx.Get(key)
				return err
			})
			if !errors.Is(err, keystate.ErrNotFound) {
				return fmt.Errorf("in an Update, getting %q: %v, want ErrNotFound", key, err)
			}
		}
		return nil
	}
	if err := cmp.Or(s.holdsNot(present), notFound()); err != nil {
		return err
	}
	if _, err := s.put(claimed(present, "first")); err != nil {
		return err
	}
	return notFound()
}

func (s *storeTrial[Tx]) fieldsComeBack() error {
	return s.random(func(t *rapid.T, s *storeTrial[Tx]) error {
		key := func(r keystate.Record) keystate.Key { return r.Key }
		drawn := rapid.SliceOfNDistinct(drawnRecord(), 1, 4, key).Draw(t, "records")
		var stored []keystate.Record
		err := s.update(func(tx recordTx[Tx]) error {
			stored = slices.Clone(drawn)
			for i := range stored {
				if err := tx.Put(&stored[i]); err != nil {
					return err
				}
				got, err := tx.Get(stored[i].Key)
				if err := cmp.Or(err, sameRecord(got, stored[i])); err != nil {
					return fmt.Errorf("in its own transaction: %w", err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for i, r := range stored {
			drawn[i].Version, drawn[i].Sequence = 1, r.Sequence
			if err := cmp.Or(sameRecord(r, drawn[i]), s.holds(r)); err != nil {
				return err
			}
		}
		if err := s.lists(stored); err != nil {
			return err
		}
		if err := s.reopen(); err != nil {
			return err
		}
		for _, r := range stored {
			if err := s.holds(r); err != nil {
				return fmt.Errorf("after reopening: %w", err)
			}
		}
		return s.lists(stored)
	})
}

// lists demands that the listings hold these records and no others.
func (s *storeTrial[Tx]) lists(want []keystate.Record) error {
	c, err := s.contents()
	if err != nil {
		return err
	}
	return sameRecords(byKey(slices.Concat(c.unfinished, c.finished)), byKey(want))
}

func byKey(records []keystate.Record) []keystate.Record {
	return slices.SortedFunc(slices.Values(records), func(a, b keystate.Record) int {
		return cmp.Or(cmp.Compare(a.Key.Scope, b.Key.Scope), cmp.Compare(a.Key.ID, b.Key.ID))
	})
}

// random runs a property of new stores for drawn values; what falsifies it is the error.
func (s *storeTrial[Tx]) random(property func(*rapid.T, *storeTrial[Tx]) error) error {
	hearing := &hearingTB{TB: s.tb}
	rapid.Check(hearing, func(t *rapid.T) {
		if err := s.afresh(func(s *storeTrial[Tx]) error { return property(t, s) }); err != nil {
			t.Fatal(err)
		}
	})
	return errors.Join(hearing.errs...)
}

// A hearingTB keeps the errors that it is told.
type hearingTB struct {
	testing.TB
	errs []error
}

func (h *hearingTB) Error(args ...any) { h.errs = append(h.errs, errors.New(fmt.Sprint(args...))) }
func (h *hearingTB) Errorf(format string, args ...any) {
	h.errs = append(h.errs, fmt.Errorf(format, args...))
}
func (h *hearingTB) Fatal(args ...any)                 { h.Error(args...) }
func (h *hearingTB) Fatalf(format string, args ...any) { h.Errorf(format, args...) }
func (h *hearingTB) Fail()                             { h.Error("it fails") }
func (h *hearingTB) FailNow()                          {} // rapid's last word: it has told an error before
func (h *hearingTB) Failed() bool                      { return len(h.errs) > 0 }

// drawnKey draws any key, with those that are easily got wrong in front.
func drawnKey() *rapid.Generator[keystate.Key] {
	part := func(least int) *rapid.Generator[string] {
		nasty := []string{
			strings.Repeat("\xff", 255), strings.Repeat("\x00", 255), "\xff", "\x00", "/", "a/b", "a\x00b", "'", "%", "é", "\xc3",
		}
		if least == 0 {
			nasty = append(nasty, "", "", "")
		}
		return rapid.OneOf(
			rapid.SampledFrom(nasty),
			rapid.Map(rapid.SliceOfN(rapid.Byte(), least, 255), func(b []byte) string { return string(b) }),
			rapid.StringMatching(`[a-z0-9-]{1,40}`),
		)
	}
	return rapid.Custom(func(t *rapid.T) keystate.Key {
		return keystate.Key{Scope: part(0).Draw(t, "scope"), ID: part(1).Draw(t, "ID")}
	})
}

// drawnRecord draws any new record that makes sense: what a record must not be, a store may refuse.
func drawnRecord() *rapid.Generator[keystate.Record] {
	const farFuture = 1 << 52 // microseconds: the year 2112
	instant := rapid.Map(rapid.Int64Range(1, farFuture), func(micros int64) time.Time { return time.UnixMicro(micros).UTC() })
	maybe := rapid.OneOf(rapid.Just(time.Time{}), instant)
	point := rapid.Map(rapid.StringN(1, 30, 100), func(s string) keystate.RecoveryPoint { return keystate.RecoveryPoint(s) })
	text := rapid.OneOf(rapid.Just(""), rapid.StringN(0, 300, 1024))
	attempts := rapid.OneOf(rapid.IntRange(0, 5), rapid.Just(1<<31-1))
	id := rapid.Map(rapid.SliceOfN(rapid.Byte(), 16, 16), func(b []byte) [16]byte { return [16]byte(b) })
	passage := rapid.Custom(func(t *rapid.T) keystate.Passage {
		return keystate.Passage{
			Point: point.Draw(t, "point"), At: instant.Draw(t, "at"),
			Attempts: attempts.Draw(t, "attempts"), Ignored: text.Draw(t, "ignored"),
		}
	})
	return rapid.Custom(func(t *rapid.T) keystate.Record {
		r := keystate.Record{
			Key: drawnKey().Draw(t, "key"), Machine: rapid.StringN(1, 20, 80).Draw(t, "machine"),
			Status: rapid.SampledFrom(everyStatus).Draw(t, "status"),
			State:  rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "state"), Epoch: rapid.Uint64Range(0, 1<<60).Draw(t, "epoch"),
			Incarnation: id.Draw(t, "incarnation"), Fingerprint: id.Draw(t, "fingerprint"),
			Created: instant.Draw(t, "created"), Due: maybe.Draw(t, "due"), Attempts: attempts.Draw(t, "attempts"),
			Resend: rapid.Bool().Draw(t, "resend"), LastError: text.Draw(t, "last error"),
			History: rapid.OneOf(rapid.SliceOfN(passage, 1, 4), rapid.SliceOfN(passage, 50, 60)).Draw(t, "history"),
		}
		last := &r.History[len(r.History)-1]
		switch r.Status {
		case keystate.Answered:
			last.Point, r.Ended = keystate.Finished, instant.Draw(t, "ended")
			if rapid.Bool().Draw(t, "refused") {
				r.Refusal = &keystate.Refusal{Before: point.Draw(t, "before"), Reason: text.Draw(t, "reason")}
			}
		case keystate.Parked:
			r.ParkReason = rapid.SampledFrom([]keystate.ParkReason{
				keystate.AttemptsUsedUp, keystate.Indeterminate, keystate.TokenExpired, keystate.Undecodable, keystate.UnknownPoint,
			}).Draw(t, "park reason")
		}
		if r.Point = last.Point; r.Point == keystate.Finished && r.Status != keystate.Answered {
			t.Skip("only a finished key rests on the last point")
		}
		if rapid.Bool().Draw(t, "has begun") {
			r.Begun, r.FirstTried, r.Acted = point.Draw(t, "begun"), maybe.Draw(t, "first tried"), rapid.Bool().Draw(t, "acted")
		}
		return r
	})
}

func (s *storeTrial[Tx]) largestRecord() error {
	long := func(c string, n int) string { return strings.Repeat(c, n) }
	r := finished(keystate.Key{Scope: long("\xff", 255), ID: long("\x00", 255)}, "first")
	r.State = bytes.Repeat([]byte("state\x00\xff\x80"), 1<<17)
	r.LastError, r.Refusal = long("e", 1024), &keystate.Refusal{Before: "paid", Reason: long("é", 512)}
	r.History = nil
	for i := range 99 {
		point := keystate.RecoveryPoint(fmt.Sprintf("point %d", i))
		r.History = append(r.History, keystate.Passage{Point: point, At: longAgo, Attempts: i, Ignored: long("i", 1024)})
	}
	r.History = append(r.History, keystate.Passage{Point: keystate.Finished, At: longAgo})
	running := r
	running.Key.ID, running.Status, running.Ended, running.Refusal = long("\xff", 255), keystate.Running, time.Time{}, nil
	running.History = slices.Clone(r.History)
	running.History[99].Point, running.Point = "shipped", "shipped"

	stored, err := s.putAll([]keystate.Record{r, running})
	if err != nil {
		return err
	}
	if stored[1], err = s.put(stored[1]); err != nil {
		return err
	}
	if err := s.lists(stored); err != nil {
		return err
	}
	return cmp.Or(s.reopen(), s.holds(stored[0]), s.holds(stored[1]))
}

func (s *storeTrial[Tx]) keysLookAlike() error {
	keys := []keystate.Key{
		{Scope: "a", ID: "bc"}, {Scope: "ab", ID: "c"}, {ID: "abc"},
		{Scope: "a", ID: "b/c"}, {Scope: "a/b", ID: "c"}, {ID: "a/b/c"}, {Scope: "a/", ID: "b/c"}, {Scope: "a", ID: "/b/c"},
		{Scope: "a", ID: "b\x00c"}, {Scope: "a\x00b", ID: "c"}, {ID: "a\x00b\x00c"}, {Scope: "a\x00", ID: "b\x00c"},
		{Scope: "a", ID: "b\xffc"}, {Scope: "a\xffb", ID: "c"}, {ID: "a\xffb\xffc"},
		{Scope: "a", ID: "b"}, {Scope: "a", ID: "b\x00"}, {Scope: "a", ID: "b\x00\x00"}, {Scope: "a", ID: "B"},
		{ID: "\x01a"}, {Scope: "\x01", ID: "a"}, {ID: "a"}, {ID: "\x00"}, {Scope: "\x00", ID: "\x00"}, {ID: "\x00\x00"},
		{ID: "é"}, {ID: "e\u0301"}, {ID: "\xff"}, {ID: "\ufffd"}, {ID: " a"}, {ID: "a "},
	}
	var stored []keystate.Record
	for i, key := range keys {
		r, err := s.put(moved(claimed(key, strconv.Itoa(i)), everyStatus[i%4]))
		if err != nil {
			return fmt.Errorf("a key that is new: %w", err)
		}
		stored = append(stored, r)
	}
	for _, r := range stored {
		if err := s.holds(r); err != nil {
			return err
		}
	}
	return s.lists(stored)
}

func (s *storeTrial[Tx]) recordsAreCopies() error {
	want := claimed(orderKey(1), "first")
	spoil := func(r keystate.Record) {
		r.State[0] ^= 0xff
		r.History[0].Ignored = "spoilt"
	}
	err := s.update(func(tx recordTx[Tx]) error {
		r := claimed(orderKey(1), "first")
		if err := tx.Put(&r); err != nil {
			return err
		}
		spoil(r)
		got, err := tx.Get(r.Key)
		if err == nil {
			spoil(got)
		}
		return err
	})
	if err != nil {
		return err
	}
	want.Version = 1
	if err := s.holds(want); err != nil {
		return err
	}
	got, err := s.get(want.Key)
	if err != nil {
		return err
	}
	spoil(got)
	if err := s.holds(want); err != nil {
		return err
	}
	kept, err := s.contents()
	if err != nil {
		return err
	}
	for i := range 50 { // what was read outlives the transaction and the pages that it was read from
		if _, err := s.put(claimed(orderKey(100+i), "later")); err != nil {
			return err
		}
	}
	return sameRecord(kept.unfinished[0], want)
}

func (s *storeTrial[Tx]) putCountsVersions() error {
	r := claimed(orderKey(1), "first")
	for want := uint64(1); want <= 5; want++ {
		var err error
		if r, err = s.put(moved(r, unfinishedStatuses[want%3])); err != nil {
			return err
		}
		if r.Version != want {
			return fmt.Errorf("after write %d, Put has set the version to %d", want, r.Version)
		}
		if err := s.holds(r); err != nil {
			return err
		}
	}
	thrice := r
	err := s.update(func(tx recordTx[Tx]) error {
		thrice = r
		return cmp.Or(tx.Put(&thrice), tx.Put(&thrice), tx.Put(&thrice))
	})
	if err != nil {
		return err
	}
	if r, err = s.put(moved(thrice, keystate.Answered)); err != nil {
		return err
	}
	if r.Version != 9 {
		return fmt.Errorf("after 9 writes the version is %d", r.Version)
	}
	return s.holds(r)
}

func (s *storeTrial[Tx]) putFences() error {
	held := map[keystate.Status]keystate.Record{}
	for i, status := range everyStatus {
		r := claimed(orderKey(i), "first")
		var err error
		for range 2 {
			if r, err = s.put(r); err != nil {
				return err
			}
		}
		if held[status], err = s.put(moved(r, status)); err != nil {
			return err
		}
	}
	for status, r := range held {
		stale, future, stranger, fresh := r, r, r, claimed(r.Key, "second")
		stale.Version--
		future.Version++
		stranger.Incarnation[15]++
		cases := map[string]keystate.Record{
			"a version ago": stale, "a version ahead": future, "another incarnation": stranger, "a new key's": fresh,
		}
		for what, wrong := range cases {
			if err := s.fenced(wrong); err != nil {
				return fmt.Errorf("%s, on a key that is %q: %w", what, status, err)
			}
		}
	}
	ghost := claimed(orderKey(9), "first")
	ghost.Version = 1
	if err := s.fenced(ghost); err != nil {
		return fmt.Errorf("version 1 of a key that is not there: %w", err)
	}
	return s.holdsNot(ghost.Key)
}

// fenced demands that Put refuses a record and writes nothing, even where the transaction commits.
func (s *storeTrial[Tx]) fenced(wrong keystate.Record) error {
	before, err := s.contents()
	if err != nil {
		return err
	}
	for _, status := range everyStatus {
		var refused error
		after := moved(wrong, status)
		want := after
		err := s.update(func(tx recordTx[Tx]) error {
			after = moved(wrong, status)
			want = after
			refused = tx.Put(&after)
			return nil
		})
		if err != nil {
			return err
		}
		if !errors.Is(refused, keystate.ErrFenced) {
			return fmt.Errorf("putting %q, to be %q, returned %v, want ErrFenced", wrong.Key, status, refused)
		}
		if err := sameRecord(after, want); err != nil {
			return fmt.Errorf("a Put that is refused has changed what it was given: %w", err)
		}
		if _, err := s.put(after); !errors.Is(err, keystate.ErrFenced) {
			return fmt.Errorf("an Update that puts %q returned %v, want ErrFenced", wrong.Key, err)
		}
	}
	return s.unchanged(before)
}

func (s *storeTrial[Tx]) deleteFences() error {
	for i, status := range unfinishedStatuses {
		r, err := s.put(moved(claimed(orderKey(i), "first"), status))
		if err != nil {
			return err
		}
		if err := s.notDeleted(r, nil); err != nil {
			return fmt.Errorf("a record that is %q: %w", status, err)
		}
	}
	r, err := s.put(finished(orderKey(5), "first"))
	if err != nil {
		return err
	}
	stale, future, stranger, ghost := r, r, r, r
	stale.Version--
	future.Version++
	stranger.Incarnation[0]++
	ghost.Key = orderKey(6)
	for what, wrong := range map[string]keystate.Record{
		"a version ago": stale, "a version ahead": future, "another incarnation": stranger, "a key that is not there": ghost,
	} {
		if err := s.notDeleted(wrong, keystate.ErrFenced); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	if err := s.delete(r); err != nil {
		return fmt.Errorf("deleting a finished record: %w", err)
	}
	if err := s.holdsNot(r.Key); err != nil {
		return err
	}
	if c, err := s.contents(); err != nil || len(c.finished) != 0 || c.counts.Finished != 0 {
		return fmt.Errorf("after the only finished record was deleted, there are %d, %+v, %v", len(c.finished), c.counts, err)
	}
	second, err := s.put(finished(r.Key, "second"))
	if err != nil {
		return fmt.Errorf("a deleted key is used again: %w", err)
	}
	if err := s.notDeleted(r, keystate.ErrFenced); err != nil {
		return fmt.Errorf("the key's former life: %w", err)
	}
	return cmp.Or(s.reopen(), s.holds(second))
}

// notDeleted demands that Delete refuses, with the wanted error if there is one, and changes nothing, even where the
// transaction commits.
func (s *storeTrial[Tx]) notDeleted(r keystate.Record, want error) error {
	before, err := s.contents()
	if err != nil {
		return err
	}
	var refused error
	err = s.update(func(tx recordTx[Tx]) error {
		refused = tx.Delete(r)
		return nil
	})
	if err != nil {
		return err
	}
	if refused == nil || want != nil && !errors.Is(refused, want) {
		return fmt.Errorf("deleting %q returned %v, want %v", r.Key, refused, cmp.Or(want, errors.New("an error")))
	}
	return s.unchanged(before)
}
