package postgres_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

func TestAWrongClockReapsNoAnswerBeforeItsTime(t *testing.T) {
	dsn, b := commonDatabase(t), &bank{}
	f := openOffice(t, dsn, "right", b, postgres.Options{}, false)
	if _, err := f.payments.Do(t.Context(), keyOf(1), paymentOf(1)); err != nil {
		t.Fatal(err)
	}
	inAnotherTime(t, 73*time.Hour, func(t *testing.T) { // retention is 72 h
		other := openOffice(t, dsn, "wrong", b, postgres.Options{}, false)
		if _, err := other.payments.Do(t.Context(), keyOf(2), paymentOf(2)); err != nil {
			t.Error(err)
		}
		time.Sleep(300 * time.Millisecond) // its reaper looks at once
		other.engine.Close()
		other.pool.Close()
	})
	if r, err := f.engine.Key(t.Context(), keyOf(1)); err != nil {
		t.Errorf("the answer of a moment ago: %v", err)
	} else if r2, err := f.engine.Key(t.Context(), keyOf(2)); err != nil || r2.Ended.Sub(r.Ended).Abs() > time.Hour {
		t.Errorf("by their records they ended at %s and %s, %v", r.Ended, r2.Ended, err)
	}
}

// The other side honours a token for an hour. An engine whose clock is behind must not take it for fresh.
func TestAWrongClockSendsNoTokenThatMayBeForgotten(t *testing.T) {
	dsn := commonDatabase(t)
	sent := atomic.Int32{}
	phases := []keystate.Phase[pgx.Tx, payment]{{To: keystate.Finished, TokenLife: time.Second, Retry: keystate.RetryPolicy{InRun: 1, Initial: time.Hour, Max: time.Hour},
		Effect: func(context.Context, string, *payment) error {
			sent.Add(1)
			return errors.New("no answer")
		}}}
	e, _ := openEngine(t, dsn)
	m, err := keystate.Register(e, "charge", phases)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Do(t.Context(), keyOf(1), paymentOf(1)); err == nil {
		t.Fatal("it has an answer")
	}
	time.Sleep(1100 * time.Millisecond)
	inAnotherTime(t, -5*time.Hour, func(t *testing.T) {
		e, pool := openEngine(t, dsn)
		m, err := keystate.Register(e, "charge", phases)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Do(t.Context(), keyOf(1), paymentOf(1)); !errors.Is(err, keystate.ErrParked) {
			t.Errorf("the caller gets %v", err)
		}
		e.Close()
		pool.Close()
	})
	if sent.Load() != 1 {
		t.Errorf("the effect was sent %d times", sent.Load())
	}
}
