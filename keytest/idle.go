package keytest

import (
	"context"
	"testing"
	"time"

	"example.com/keystate"
)

// Idle waits until the engine has nothing left to carry on: each key of a registered machine is finished or parked. It
// waits for retries that are due later, too, so a test with a backoff runs it in a [testing/synctest] bubble, where waiting takes no
// time. After a minute it fails the test, and says what is left.
func Idle[Tx any](t testing.TB, e *keystate.Engine[Tx]) {
	t.Helper()
	const patience = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := e.Resume(ctx); err != nil {
		s, _ := e.Stats(t.Context())
		t.Fatalf("keytest: the engine is not idle: %v; %d keys under way, %d queued, %d running, %d waiting, %d parked",
			err, s.UnderWay, s.Queued, s.Running, s.Waiting, s.Parked)
	}
}
