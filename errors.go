package keystate

import (
	"errors"
	"fmt"
	"slices"
)

// Errors of a call: nothing was written.
var (
	// ErrInvalidKey: the key is empty or too long.
	ErrInvalidKey = errors.New("keystate: invalid key")

	// ErrMismatch: the key was used before, for another request or another machine. Its owner's record is untouched.
	ErrMismatch = errors.New("keystate: key was used for another request")

	// ErrInProgress: the key is in flight, and [Options.RefuseInFlight] asks not to wait for it.
	ErrInProgress = errors.New("keystate: key is in progress")

	// ErrTooLarge: the state is larger than [Options.MaxState].
	ErrTooLarge = errors.New("keystate: state too large")

	// ErrNotFound: there is no such key.
	ErrNotFound = errors.New("keystate: no such key")

	// ErrInCommit: a call from inside a commit would wait for that commit for ever. [Stage] is the way to start a key there.
	ErrInCommit = errors.New("keystate: called from inside a commit")

	// ErrClosed: the engine is closed. An interrupted key goes on when the store is opened again.
	ErrClosed = errors.New("keystate: engine is closed")
)

// Errors of a key's life.
var (
	// ErrParked: the key stands still until an operator or a deploy acts; see [Engine.Retry] and [Engine.Abandon].
	ErrParked = errors.New("keystate: key is parked")

	// ErrWithdrawn: the request's first phase has withdrawn it, see [Withdraw]. Nothing of it is kept: a later use of the key is a new
	// request. errors.Is and errors.As see through to the phase's own error.
	ErrWithdrawn = errors.New("keystate: request was withdrawn")

	// ErrFenced: another holder has written the key since; this one wrote nothing.
	ErrFenced = errors.New("keystate: key was taken over")
)

// Errors of the store.
var (
	// ErrLocked: another process, or another engine in this one, has the store open.
	ErrLocked = errors.New("keystate: store is locked")

	// ErrNotAStore: the path holds something that is no keystate store, or one of a later format. It was not touched.
	ErrNotAStore = errors.New("keystate: not a keystate store")

	// ErrCorrupt: the store contradicts itself. Nothing is guessed: restore a backup, or see [Verify] for what is damaged.
	ErrCorrupt = errors.New("keystate: store is damaged")

	// ErrMoved: the file at the path is no longer the one that is open. The engine stops.
	ErrMoved = errors.New("keystate: store was moved away")

	// ErrStorageFull: there is no room. Nothing was lost, and it works again when there is; new keys are
	// refused before unfinished ones run out of room.
	ErrStorageFull = errors.New("keystate: storage is full")

	// ErrRejected: the store turned a transaction down as it ended, for what had been written in it: a constraint that is checked then, a
	// statement that had been put off until then. Nothing was written. For a key it is a failure of the phase that wrote.
	ErrRejected = errors.New("keystate: the transaction was rejected")

	// ErrOutcomeUnknown: a write failed in a way that leaves open whether it is on disk. The engine refuses
	// further work; opening the store again finds out.
	ErrOutcomeUnknown = errors.New("keystate: outcome unknown")
)

// A PhaseError says where a key stopped short of its end, and why. The key is not lost: it waits, or is parked
// (then errors.Is(err, [ErrParked])). errors.Is and errors.As see through to the phase's own error.
type PhaseError struct {
	Key     Key
	Machine string
	Before  RecoveryPoint // the point that the phase would have reached
	Attempt int           // attempts at the phase so far
	Reason  ParkReason    // why the key is parked; empty while it waits
	Err     error
}

func (e *PhaseError) Error() string {
	parked := ""
	if e.Reason != "" {
		parked = fmt.Sprintf(" (parked: %s)", e.Reason)
	}
	return fmt.Sprintf("keystate: %s stopped before %q%s: %s", e.Key, e.Before, parked, cause(e.Err))
}

func (e *PhaseError) Unwrap() []error {
	if e.Reason != "" {
		return []error{e.Err, ErrParked}
	}
	return []error{e.Err}
}

// cause is an error's text without our own prefix, which the text around it bears already.
func cause(err error) string {
	const prefix = "keystate: "
	s := err.Error()
	if len(s) > len(prefix) && s[:len(prefix)] == prefix {
		return s[len(prefix):]
	}
	return s
}

// Final marks an error as definitive: it becomes the key's answer, and every retry gets it again as a
// [FinalError]. Final(nil) is nil.
func Final(err error) error {
	if err == nil {
		return nil
	}
	return &finalMark{err}
}

// IsFinal says whether an error is marked as definitive.
func IsFinal(err error) bool { return marked[*finalMark](err) }

type finalMark struct{ err error }

func (f *finalMark) Error() string { return f.err.Error() }
func (f *finalMark) Unwrap() error { return f.err }

// Withdraw marks an error of a machine's first phase as the word that nothing has come of the request, and that nothing is to be
// kept of it: a rate limit, a request that may not be made yet, a server in trouble. The key is forgotten. Whoever waits for it gets
// an error that is [ErrWithdrawn] and wraps this one; a later use of the key is a new request, with a new token and any content.
//
// An Effect, or a Commit after it, that returns it vouches for all attempts at the effect: what may have happened outside would
// happen again. Withdraw wins over everything that the phase says about errors, and over [Final]. From any phase but the machine's first it is
// an error like any other: by then something has come of the request. Withdraw(nil) is nil.
func Withdraw(err error) error {
	if err == nil {
		return nil
	}
	return &withdrawMark{err}
}

type withdrawMark struct{ err error }

func (w *withdrawMark) Error() string { return w.err.Error() }
func (w *withdrawMark) Unwrap() error { return w.err }

// marked says whether an error bears a mark of the type M for the phase that returned it. What a phase passes on from another
// key's run bears none: it has been judged there.
func marked[M error](err error) bool {
	switch e := err.(type) {
	case M:
		return true
	case *PhaseError, *withdrawal:
		return false
	case interface{ Unwrap() error }:
		return marked[M](e.Unwrap())
	case interface{ Unwrap() []error }:
		return slices.ContainsFunc(e.Unwrap(), marked[M])
	}
	return false
}

// A withdrawal is what callers are told of a key that its first phase has withdrawn.
type withdrawal struct {
	key    Key
	before RecoveryPoint
	err    error
}

func (w *withdrawal) Error() string {
	return fmt.Sprintf("keystate: %s withdrawn before %q: %s", w.key, w.before, cause(w.err))
}

func (w *withdrawal) Unwrap() []error { return []error{w.err, ErrWithdrawn} }

// A FinalError is a definitive failure: the answer to a request, saved like any other. It looks the same at the
// first answer and at every replay, so it carries the reason as text and not the error that the phase returned.
// What the phase left in the state is returned beside it.
type FinalError struct {
	Key     Key
	Machine string
	Before  RecoveryPoint // the point that the refusing phase would have reached
	Reason  string        // at most 1 KiB
}

func (e *FinalError) Error() string {
	return fmt.Sprintf("keystate: %s ended before %q: %s", e.Key, e.Before, e.Reason)
}
