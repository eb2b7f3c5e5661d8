package keystate

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
)

// This file is the life of a key, and nothing else: no I/O, no clock, no goroutine.
// Every change of a stored record is one event applied by [Record.next]; docs/states.md is generated from its table.

// Key names a request: what a client sends as its idempotency key, within the scope (tenant, account) it belongs to.
// ID is 1 to 255 bytes, Scope at most 255; both are compared byte for byte.
type Key struct {
	Scope, ID string
}

// String returns "scope/id", or the ID alone when there is no scope.
func (k Key) String() string {
	if k.Scope == "" {
		return k.ID
	}
	return k.Scope + "/" + k.ID
}

// LogValue lets a key be logged as it is written elsewhere.
func (k Key) LogValue() slog.Value { return slog.StringValue(k.String()) }

const maxKeyPart = 255

func (k Key) validate() error {
	switch {
	case k.ID == "":
		return fmt.Errorf("%w: the ID is empty", ErrInvalidKey)
	case len(k.ID) > maxKeyPart:
		return fmt.Errorf("%w: the ID has %d bytes, the limit is %d", ErrInvalidKey, len(k.ID), maxKeyPart)
	case len(k.Scope) > maxKeyPart:
		return fmt.Errorf("%w: the scope has %d bytes, the limit is %d", ErrInvalidKey, len(k.Scope), maxKeyPart)
	}
	return nil
}

// NewID mints an ID for a [Key]: a UUIDv7 (RFC 9562), so that keys which the server mints lie next to
// each other in the store. It is unguessable enough to be handed out (74 random bits), and no secret.
func NewID() string {
	return uuid.Must(uuid.NewV7()).String()
}

// A RecoveryPoint is a named place from which an interrupted request continues: a past-tense fact, such as "payout_sent".
type RecoveryPoint string

const (
	// Started is where every key begins. Next: the first phase's point.
	Started RecoveryPoint = "started"

	// Finished is where every key ends. It is terminal: what Do returned first, it returns until the key is reaped.
	Finished RecoveryPoint = "finished"
)

// Status says what a key is doing.
type Status string

const (
	// Running: an engine holds the key, or held it when its process ended. Next: any of the others.
	Running Status = "running"

	// Waiting: the key is due later, by itself or with the client's next retry. Next: Running, Parked.
	Waiting Status = "waiting"

	// Parked: the key stands still until an operator or a deploy acts. Next: Waiting, by
	// [Engine.Retry]; or finished, by [Engine.Abandon].
	Parked Status = "parked"

	// Answered: the key is finished, its answer is saved. Next: it is reaped when its retention has passed.
	Answered Status = "finished"

	absent Status = ""
)

// A ParkReason says why a key is parked.
type ParkReason string

const (
	// AttemptsUsedUp: the phase failed as often as its policy allows.
	AttemptsUsedUp ParkReason = "attempts used up"

	// Indeterminate: an effect may or may not have happened, and must not be sent again blindly.
	Indeterminate ParkReason = "indeterminate"

	// TokenExpired: an effect may have happened, and the other side may have forgotten its token.
	TokenExpired ParkReason = "token expired"

	// Undecodable: the stored state does not decode into the machine's state type.
	Undecodable ParkReason = "undecodable"

	// UnknownPoint: the machine no longer names the recovery point on which the key rests.
	UnknownPoint ParkReason = "unknown point"
)

// A Record is a key as stored. A [Store] keeps it; [Engine.Key] and [Engine.Keys] show it.
type Record struct {
	Key     Key
	Machine string
	Status  Status
	Point   RecoveryPoint // the last point reached
	State   []byte        // msgpack

	Version     uint64    // counts the writes of this record; what [Keys.Put] fences on
	Epoch       uint64    // the boot that claimed the key last
	Sequence    uint64    // the position among the finished keys, given by the store
	Incarnation [16]byte  // random, drawn when the key was created: the root of its tokens
	Fingerprint [16]byte  // of the machine's name and the request
	Created     time.Time // when the key was first claimed or staged
	Ended       time.Time // when the key finished: retention counts from here

	// About the phase that comes after Point.
	Begun      RecoveryPoint // the point that it reaches, as it was named when it began; empty: it has not
	Attempts   int           // attempts begun
	FirstTried time.Time     // when its effect may have been sent for the first time; zero: it never was
	Resend     bool          // an operator's word that the effect may be sent again
	Acted      bool          // its effect is done and part of State; only its commit is owed
	Due        time.Time     // of a waiting key: when the engine takes it up by itself
	ParkReason ParkReason

	LastError string    // of the last attempt that failed, at most 1 KiB
	Refusal   *Refusal  // of a key that finished with a definitive failure
	History   []Passage // the points reached, in order
}

// A Refusal is a definitive failure: what a [FinalError] is made from, each time the same.
type Refusal struct {
	Before RecoveryPoint // the point that the refusing phase would have reached
	Reason string        // at most 1 KiB
}

// A Passage tells when a recovery point was reached, and how.
type Passage struct {
	Point    RecoveryPoint
	At       time.Time
	Attempts int    // attempts that the phase took, at least 1; 0 for Started
	Ignored  string // the error that the phase's policy ignored, if it did
}

// A token is what an effect passes downstream as its idempotency key. It is the same for every attempt at one
// effect and differs between any two effects: derived from the store, the key's incarnation and the point.
// Its form is a UUIDv8 (RFC 9562), which every payment API known to want a key accepts.
func token(store [16]byte, incarnation [16]byte, to RecoveryPoint) string {
	b := append(make([]byte, 0, 128), "keystate token 1\x00"...)
	b = append(append(append(b, store[:]...), incarnation[:]...), to...)
	sum := sha256.Sum256(b)
	u := uuid.UUID(sum[:16])
	u[6] = u[6]&0x0f | 0x80 // version 8
	u[8] = u[8]&0x3f | 0x80 // variant RFC 9562
	return u.String()
}

// An event is something that happens to a key. The fields that an event uses stand in the table below.
type event struct {
	kind eventKind
	at   time.Time

	key         Key           // begin, stage
	machine     string        // begin, stage
	fingerprint [16]byte      // begin, stage
	incarnation [16]byte      // begin, stage
	epoch       uint64        // begin, stage, claim, retry
	vacant      bool          // claim: whatever its epoch, the last holder is gone, or has let the key rest
	state       []byte        // begin, stage, act, reach, refuse
	point       RecoveryPoint // rename, try, reach, refuse, abandon
	due         time.Time     // wait
	reason      ParkReason    // park
	err         string        // fail, reach (ignored), park, refuse, abandon
	sent        bool          // try: there is an effect to send; release: it may have been sent
	first       time.Time     // release: when an earlier attempt may have sent it
	resend      bool          // release: whether it might be sent again all the same
	asks        bool          // retry: the phase has a Reconcile to ask
}

type eventKind string

const (
	begin   eventKind = "begin"
	stage   eventKind = "stage"
	claim   eventKind = "claim"
	rename  eventKind = "rename"
	forget  eventKind = "forget"
	try     eventKind = "try"
	act     eventKind = "act"
	reach   eventKind = "reach"
	fail    eventKind = "fail"
	wait    eventKind = "wait"
	release eventKind = "release"
	park    eventKind = "park"
	refuse  eventKind = "refuse"
	retry   eventKind = "retry"
	abandon eventKind = "abandon"
	reap    eventKind = "reap"
)

// A transition is one row of the table: in any of the statuses from, the event is legal and does what it says.
type transition struct {
	on   eventKind
	from []Status
	to   []Status // where it may lead; docs/states.md draws it
	does string
	do   func(Record, event) (Record, error)
}

// transitions is the whole life of a key. What is not in it is illegal.
var transitions = []transition{
	{begin, []Status{absent}, []Status{Running},
		"A client's request claims a new key.",
		func(r Record, e event) (Record, error) {
			r.create(e)
			r.Status, r.Epoch = Running, e.epoch
			return r, nil
		}},
	{stage, []Status{absent}, []Status{Waiting},
		"Another key's commit starts this one; the engine takes it up by itself.",
		func(r Record, e event) (Record, error) {
			r.create(e)
			r.Status, r.Epoch, r.Due = Waiting, e.epoch, e.at
			return r, nil
		}},
	{claim, []Status{Waiting, Running}, []Status{Running},
		"An engine takes up a waiting key, or one that its last holder left behind. A claim by an older boot is fenced.",
		func(r Record, e event) (Record, error) {
			if e.epoch < r.Epoch && !e.vacant {
				return r, ErrFenced
			}
			r.Status, r.Epoch, r.Due = Running, e.epoch, time.Time{}
			return r, nil
		}},
	{rename, []Status{Running, Waiting, Parked}, []Status{Running, Waiting, Parked},
		"A deploy gave the point another name; the key rests where it rested.",
		func(r Record, e event) (Record, error) {
			r.Point = e.point
			r.History[len(r.History)-1].Point = e.point
			return r, nil
		}},
	{forget, []Status{Running}, []Status{Running},
		"A deploy put another phase next; of the one that had begun nothing has left the store.",
		func(r Record, e event) (Record, error) {
			r.Begun, r.Attempts = "", 0
			return r, nil
		}},
	{try, []Status{Running}, []Status{Running},
		"An attempt at the next phase is counted, before it runs.",
		func(r Record, e event) (Record, error) {
			r.Attempts++
			r.Begun = cmp.Or(r.Begun, e.point)
			if e.sent && (r.FirstTried.IsZero() || r.Resend) {
				r.FirstTried, r.Resend = e.at, false
			}
			return r, nil
		}},
	{act, []Status{Running}, []Status{Running},
		"The effect is done and its result is kept, while its commit is still owed.",
		func(r Record, e event) (Record, error) {
			r.Acted, r.State = true, e.state
			return r, nil
		}},
	{reach, []Status{Running}, []Status{Running, Answered},
		"A phase's commit takes effect: the key rests on a new recovery point. Finished is the last.",
		func(r Record, e event) (Record, error) {
			err := r.arrive(e)
			return r, err
		}},
	{fail, []Status{Running}, []Status{Running},
		"An attempt failed; the run will try again.",
		func(r Record, e event) (Record, error) {
			r.LastError = clip(e.err)
			return r, nil
		}},
	{wait, []Status{Running}, []Status{Waiting},
		"The run gives up for now; the key is due later.",
		func(r Record, e event) (Record, error) {
			r.Status, r.Due = Waiting, e.due
			return r, nil
		}},
	{release, []Status{Running}, []Status{Waiting},
		"The engine closes before the attempt ended: the attempt is given back.",
		func(r Record, e event) (Record, error) {
			r.Status, r.Due = Waiting, e.at
			r.Attempts = max(0, r.Attempts-1)
			if !e.sent {
				r.FirstTried, r.Resend = e.first, e.resend
			}
			if r.Attempts == 0 && r.FirstTried.IsZero() {
				r.Begun = ""
			}
			return r, nil
		}},
	{park, []Status{Running, Waiting}, []Status{Parked},
		"Nothing but an operator or a deploy can carry the key on.",
		func(r Record, e event) (Record, error) {
			r.Status, r.ParkReason, r.Due = Parked, e.reason, time.Time{}
			if e.err != "" {
				r.LastError = clip(e.err)
			}
			return r, nil
		}},
	{refuse, []Status{Running}, []Status{Answered},
		"A phase fails for good: that is the answer. The state is kept as the phase left it.",
		func(r Record, e event) (Record, error) {
			if e.state != nil {
				r.State = e.state
			}
			r.conclude(e)
			return r, nil
		}},
	{retry, []Status{Parked}, []Status{Waiting},
		"An operator lets the key go on, with its attempts counted anew.",
		func(r Record, e event) (Record, error) {
			unsure := r.ParkReason == Indeterminate || r.ParkReason == TokenExpired
			r.Resend = unsure && !e.asks && !r.FirstTried.IsZero()
			r.Status, r.Due, r.ParkReason, r.Attempts = Waiting, e.at, "", 0
			r.Epoch = e.epoch
			return r, nil
		}},
	{abandon, []Status{Parked}, []Status{Answered},
		"An operator ends the key with a reason: that is the answer.",
		func(r Record, e event) (Record, error) {
			r.conclude(e)
			return r, nil
		}},
	{reap, []Status{Answered}, []Status{absent},
		"The retention has passed, or the request is withdrawn. A later use of the key is a new request.",
		func(r Record, e event) (Record, error) {
			return Record{}, nil
		}},
}

// errIllegal is our own bug: an event that the table does not allow.
var errIllegal = errors.New("keystate: illegal transition")

// next applies events in order and returns the record as it will be; r itself stays as it is, whatever happens.
func (r Record) next(events ...event) (Record, error) {
	r.History = append(make([]Passage, 0, len(r.History)+len(events)), r.History...)
	for _, e := range events {
		t := lookup(r.Status, e.kind)
		if t == nil {
			return r, fmt.Errorf("%w: %s: %q does not happen to a key that is %q", errIllegal, r.Key, e.kind, r.Status)
		}
		var err error
		if r, err = t.do(r, e); err != nil {
			return r, err
		}
	}
	return r, nil
}

// lookup finds the row for an event in a status, or nil where the event is illegal.
func lookup(from Status, on eventKind) *transition {
	for i := range transitions {
		if t := &transitions[i]; t.on == on && slices.Contains(t.from, from) {
			return t
		}
	}
	return nil
}

func (r *Record) create(e event) {
	*r = Record{
		Key: e.key, Machine: e.machine, Point: Started, State: e.state,
		Fingerprint: e.fingerprint, Incarnation: e.incarnation, Created: e.at,
		History: append(r.History, Passage{Point: Started, At: e.at}),
	}
}

func (r *Record) arrive(e event) error {
	for _, p := range r.History {
		if p.Point == e.point {
			return fmt.Errorf("%w: %s reached %q before", errIllegal, r.Key, e.point)
		}
	}
	r.History = append(r.History, Passage{Point: e.point, At: e.at, Attempts: max(1, r.Attempts), Ignored: clip(e.err)})
	r.Point, r.State = e.point, e.state
	r.begin()
	if e.point == Finished {
		r.Status, r.Ended = Answered, e.at
	}
	return nil
}

// conclude ends a key with a refusal.
func (r *Record) conclude(e event) {
	r.Refusal = &Refusal{Before: e.point, Reason: clip(e.err)}
	r.History = append(r.History, Passage{Point: Finished, At: e.at, Attempts: max(1, r.Attempts)})
	r.Status, r.Point, r.Ended = Answered, Finished, e.at
	r.ParkReason = ""
	r.begin()
}

// begin wipes what was about the phase before.
func (r *Record) begin() {
	r.Begun, r.Attempts, r.FirstTried, r.Resend, r.Acted = "", 0, time.Time{}, false, false
}

// expired says whether a finished key has served its time.
func (r Record) expired(now time.Time, retention time.Duration) bool {
	return r.Status == Answered && retention >= 0 && !now.Before(r.Ended.Add(retention))
}

// clip bounds what is stored of an error's text: 1 KiB, valid UTF-8.
func clip(s string) string {
	const limit, ellipsis = 1 << 10, "…"
	if len(s) > limit {
		s = s[:limit]
	}
	s = strings.ToValidUTF8(s, "?")
	if len(s) < limit {
		return s
	}
	s = s[:limit-len(ellipsis)]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s + ellipsis
}
