package keystate

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"pgregory.net/rapid"
)

//go:generate go test -run TestStatesDocumentIsCurrent -update .

var update = flag.Bool("update", false, "rewrite docs/states.md and testdata")

var (
	allStatuses = []Status{absent, Running, Waiting, Parked, Answered}
	allEvents   = []eventKind{begin, stage, claim, rename, forget, try, act, reach, fail, wait, release, park, refuse, retry, abandon, reap}
)

// inStatus is a sound record in a status.
func inStatus(s Status) Record {
	at := time.UnixMicro(1_000_000).UTC()
	if s == absent {
		return Record{}
	}
	r := Record{
		Key: Key{"ada", "1"}, Machine: "transfer", Status: s, Point: Started, State: []byte{0x80}, Version: 1, Epoch: 2,
		Created: at, History: []Passage{{Point: Started, At: at}},
	}
	switch s {
	case Running, Waiting:
		r.Begun = "payout_sent"
	case Parked:
		r.Begun, r.ParkReason = "payout_sent", AttemptsUsedUp
	case Answered:
		r.Point, r.Ended = Finished, at
		r.History = append(r.History, Passage{Point: Finished, At: at, Attempts: 1})
	}
	return r
}

// anEvent is an event of a kind, with everything in it that the kind needs.
func anEvent(kind eventKind) event {
	e := event{
		kind: kind, at: time.UnixMicro(2_000_000).UTC(), key: Key{"ada", "1"}, machine: "transfer", epoch: 2,
		state: []byte{0x80}, point: "payout_sent", due: time.UnixMicro(3_000_000).UTC(), err: "no",
	}
	if kind == park {
		e.reason = Indeterminate
	}
	return e
}

func TestEveryPairOfStatusAndEventIsLegalExactlyIfTheTableSaysSo(t *testing.T) {
	legal := map[Status]string{
		absent:   "begin stage",
		Running:  "claim rename forget try act reach fail wait release park refuse",
		Waiting:  "claim rename park",
		Parked:   "rename retry abandon",
		Answered: "reap",
	}
	for _, s := range allStatuses {
		for _, kind := range allEvents {
			before := inStatus(s)
			after, err := before.next(anEvent(kind))
			if want := slices.Contains(strings.Fields(legal[s]), string(kind)); want != (err == nil) {
				t.Errorf("%q in %q: legal is %v, got error %v", kind, s, want, err)
			}
			if err != nil && !errors.Is(err, errIllegal) {
				t.Errorf("%q in %q: %v is no illegal transition", kind, s, err)
			}
			if err == nil && !slices.Contains(lookup(s, kind).to, after.Status) {
				t.Errorf("%q in %q leads to %q, which the table does not draw", kind, s, after.Status)
			}
			if err == nil && kind != reap && after.check() != nil {
				t.Errorf("%q in %q makes a record that cannot be stored: %v", kind, s, after.check())
			}
			if !reflect.DeepEqual(before, inStatus(s)) {
				t.Errorf("%q in %q changed the record it was applied to", kind, s)
			}
		}
	}
}

func TestAnOlderBootIsFencedOutOfAClaim(t *testing.T) {
	r := inStatus(Running)
	r.Epoch = 3
	if _, err := r.next(event{kind: claim, epoch: 2}); !errors.Is(err, ErrFenced) {
		t.Fatalf("got %v", err)
	}
}

func TestAPointIsReachedOnce(t *testing.T) {
	r := inStatus(Running)
	r, err := r.next(anEvent(reach))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = r.next(anEvent(reach)); !errors.Is(err, errIllegal) {
		t.Fatalf("got %v", err)
	}
}

func TestAShutdownGivesTheAttemptBackAndRemembersWhetherTheEffectWasSent(t *testing.T) {
	once := anEvent(try)
	once.sent = true
	tried, _ := inStatus(Running).next(once)
	unsent, err := tried.next(event{kind: release})
	if err != nil || unsent.Attempts != 0 || !unsent.FirstTried.IsZero() {
		t.Errorf("unsent: %v, %+v", err, unsent)
	}
	earlier, err := tried.next(event{kind: release, first: tried.Created})
	if err != nil || earlier.FirstTried != tried.Created {
		t.Errorf("sent by an earlier attempt: %v, %+v", err, earlier)
	}
	sent, err := tried.next(event{kind: release, sent: true})
	if err != nil || sent.Attempts != 0 || sent.FirstTried.IsZero() {
		t.Errorf("sent: %v, %+v", err, sent)
	}
}

func TestRetryingAnIndeterminateKeyIsTheWordThatItMayBeSentAgain(t *testing.T) {
	for _, test := range []struct {
		reason ParkReason
		asks   bool
		resent bool
	}{
		{Indeterminate, false, true}, {Indeterminate, true, false},
		{TokenExpired, false, true}, {TokenExpired, true, false},
		{AttemptsUsedUp, false, false}, {Undecodable, false, false}, {UnknownPoint, false, false},
	} {
		r := inStatus(Parked)
		r.ParkReason, r.FirstTried, r.Attempts = test.reason, r.Created, 7
		r, err := r.next(event{kind: retry, asks: test.asks})
		if err != nil || r.Attempts != 0 || r.Resend != test.resent || r.FirstTried.IsZero() {
			t.Errorf("%+v: %v, resend %v", test, err, r.Resend)
		}
	}
}

func TestStoredTextIsBounded(t *testing.T) {
	for _, s := range []string{"", "short", strings.Repeat("x", 5000), strings.Repeat("ü", 3000), "\xff\xfe", strings.Repeat("\xff", 3000)} {
		got := clip(s)
		if len(got) > 1<<10 || !utf8.ValidString(got) || utf8.ValidString(s) && !strings.HasPrefix(s, strings.TrimSuffix(got, "…")) {
			t.Errorf("clip(%.20q…) = %d bytes, %.20q…", s, len(got), got)
		}
	}
}

func TestTokensDifferByStoreIncarnationAndPointAndByNothingElse(t *testing.T) {
	seen := map[string]string{}
	for s := range byte(3) {
		for i := range byte(3) {
			for _, to := range []RecoveryPoint{"a", "b", "ab"} {
				tok := token([16]byte{s}, [16]byte{i}, to)
				who := fmt.Sprint(s, i, to)
				if other, taken := seen[tok]; taken {
					t.Errorf("%s and %s share %s", who, other, tok)
				}
				seen[tok] = who
				if tok != token([16]byte{s}, [16]byte{i}, to) || len(tok) != 36 || tok[14] != '8' {
					t.Errorf("token %s is not a stable UUIDv8", tok)
				}
			}
		}
	}
}

func drawRecord(t *rapid.T) Record {
	text := rapid.StringN(0, 20, 60)
	name := rapid.StringMatching(`[a-z_]{1,12}`)
	moment := rapid.Custom(func(t *rapid.T) time.Time {
		if us := rapid.Int64Range(-1<<50, 1<<50).Draw(t, "µs"); us != 0 {
			return time.UnixMicro(us).UTC()
		}
		return time.Time{}
	})
	r := Record{
		Key:         Key{Scope: rapid.StringN(0, 9, 40).Draw(t, "scope"), ID: rapid.StringN(1, 9, 40).Draw(t, "id")},
		Machine:     name.Draw(t, "machine"),
		Status:      rapid.SampledFrom(allStatuses[1:]).Draw(t, "status"),
		State:       rapid.SliceOf(rapid.Byte()).Draw(t, "state"),
		Version:     rapid.Uint64().Draw(t, "version"),
		Epoch:       rapid.Uint64().Draw(t, "epoch"),
		Sequence:    rapid.Uint64().Draw(t, "sequence"),
		Incarnation: [16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "incarnation")),
		Fingerprint: [16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "fingerprint")),
		Created:     moment.Draw(t, "created"),
		Attempts:    rapid.IntRange(0, 1000).Draw(t, "attempts"),
		Begun:       "payout_sent",
		FirstTried:  moment.Draw(t, "tried"),
		Acted:       rapid.Bool().Draw(t, "acted"),
		Resend:      rapid.Bool().Draw(t, "resend"),
		Due:         moment.Draw(t, "due"),
		LastError:   text.Draw(t, "error"),
	}
	points := rapid.SliceOfNDistinct(name, 0, 5, rapid.ID).Draw(t, "points")
	r.History = []Passage{{Point: Started, At: r.Created}}
	for _, p := range points {
		r.History = append(r.History, Passage{Point: RecoveryPoint("p" + p), At: moment.Draw(t, "at"), Attempts: rapid.IntRange(0, 9).Draw(t, "took"), Ignored: text.Draw(t, "ignored")})
	}
	switch r.Status {
	case Parked:
		r.ParkReason = rapid.SampledFrom([]ParkReason{AttemptsUsedUp, Indeterminate, TokenExpired}).Draw(t, "reason")
	case Answered:
		r.Ended = time.UnixMicro(7).UTC()
		r.History = append(r.History, Passage{Point: Finished, At: r.Ended})
		if rapid.Bool().Draw(t, "refused") {
			r.Refusal = &Refusal{Before: "p", Reason: text.Draw(t, "refusal")}
		}
	}
	r.Point = r.History[len(r.History)-1].Point
	return r
}

func TestARecordSurvivesEncoding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawRecord(t)
		frame := appendRecord(nil, &r)
		got, err := decodeRecord(frame)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(frame, appendRecord(nil, &got)) {
			t.Fatalf("encoded again, it differs:\n%+v\n%+v", r, got)
		}
		if len(r.State) == 0 {
			r.State, got.State = nil, nil
		}
		if !reflect.DeepEqual(r, got) {
			t.Fatalf("want %+v\ngot  %+v", r, got)
		}
		h, err := peek(frame)
		if err != nil || !h.is(r.Key) || h.status != r.Status || h.version != r.Version {
			t.Fatalf("peek: %v %+v", err, h)
		}
	})
}

func TestAReplayTellsOfARecordWhatDecodingItTells(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawRecord(t)
		frame := appendRecord(nil, &r)
		got := Record{State: []byte("of the last one"), Machine: "another", LastError: "of the last one"}
		before := got
		answered := decodeAnswer(frame, r.Key, &got)
		if want := r.Status == Answered && r.Refusal == nil && !r.Acted && !r.Resend; answered != want {
			t.Fatalf("an answer: %t, of %+v", answered, r)
		}
		clear(frame) // as if its page were used for something else
		want := before
		if answered {
			want = Record{Key: r.Key, Machine: r.Machine, Status: r.Status, Point: r.Point, State: r.State, Fingerprint: r.Fingerprint}
		}
		if len(got.State) == 0 {
			want.State, got.State = nil, nil
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("want %+v\ngot  %+v", want, got)
		}
	})
}

func TestNoDamageToARecordGoesUnnoticed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawRecord(t)
		frame := appendRecord(nil, &r)
		damaged := bytes.Clone(frame)
		switch i := rapid.IntRange(0, len(frame)-1).Draw(t, "where"); rapid.IntRange(0, 2).Draw(t, "how") {
		case 0:
			damaged[i] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		case 1:
			damaged = damaged[:i]
		case 2:
			damaged = append(damaged, 0)
		}
		if _, err := decodeRecord(damaged); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotAStore) {
			t.Fatalf("got %v", err)
		}
	})
}

func FuzzDecodeRecord(f *testing.F) {
	for _, s := range allStatuses[1:] {
		r := inStatus(s)
		f.Add(appendRecord(nil, &r)[frameSize:])
	}
	f.Fuzz(func(t *testing.T, body []byte) { // with a frame that vouches for it, so that the decoder is reached
		frame := append(make([]byte, frameSize), body...)
		reframe(frame)
		var replayed Record
		decodeAnswer(frame, Key{ID: "any"}, &replayed)
		r, err := decodeRecord(frame)
		if err != nil {
			return
		}
		if again, err := decodeRecord(appendRecord(nil, &r)); err != nil || !reflect.DeepEqual(r, again) {
			t.Fatalf("%v\n%+v\n%+v", err, r, again)
		}
	})
}

// reframe makes a frame's head vouch for its body.
func reframe(frame []byte) {
	frame[0] = recordFormat
	n := len(frame) - frameSize
	frame[1], frame[2], frame[3], frame[4] = byte(n), byte(n>>8), byte(n>>16), byte(n>>24)
	sum := recordSum(frame)
	frame[5], frame[6], frame[7], frame[8] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
}

func TestStatesDocumentIsCurrent(t *testing.T) {
	const path = "docs/states.md"
	want := statesDocument()
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Fatalf("%s is stale; go generate makes it anew", path)
	}
}

// statesDocument draws the life of a key from its table.
func statesDocument() string {
	var b strings.Builder
	b.WriteString(`# The life of a key

Generated from the table in state.go by ` + "`go generate`" + `; a test fails when it is stale.

A key has two machines. Its recovery points are a straight line: started, the points that the program registers, finished.
Its life is the machine below: what can happen to a stored record, and what that leads to. What is not drawn is illegal.

` + "```mermaid\nstateDiagram-v2\n")
	name := func(s Status) string {
		if s == absent {
			return "[*]"
		}
		return string(s)
	}
	type edge struct{ from, to Status }
	labels := map[edge][]string{}
	var order []edge
	for _, t := range transitions {
		for i, from := range t.from {
			for j, to := range t.to {
				if len(t.from) == len(t.to) && len(t.from) > 1 && i != j {
					continue // it stays where it is
				}
				e := edge{from, to}
				if labels[e] == nil {
					order = append(order, e)
				}
				labels[e] = append(labels[e], string(t.on))
			}
		}
	}
	for _, e := range order {
		fmt.Fprintf(&b, "    %s --> %s : %s\n", name(e.from), name(e.to), strings.Join(labels[e], ", "))
	}
	b.WriteString("```\n\n| event | in | leads to | what happens |\n|---|---|---|---|\n")
	list := func(ss []Status) string {
		var names []string
		for _, s := range ss {
			if s == absent {
				names = append(names, "absent")
			} else {
				names = append(names, string(s))
			}
		}
		return strings.Join(names, ", ")
	}
	for _, t := range transitions {
		to := list(t.to)
		if len(t.from) == len(t.to) && len(t.from) > 1 {
			to = "the same"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", t.on, list(t.from), to, t.does)
	}
	b.WriteString("\nEvery write of a record counts its version up; a write that expects another version is fenced out.\n")
	return b.String()
}
