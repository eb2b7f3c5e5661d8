package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
	"example.com/keystate/keyhttp"
	"go.etcd.io/bbolt"
)

// keyLife is how long after it was minted a key may be used for the first time. It is shorter than the answers are kept (72 hours),
// so that no retry can come so late that it is taken for a new request.
const keyLife = 24 * time.Hour

// patience is what a payment has with its processor: for some 20 hours. Then it parks, and an operator sees it.
var patience = keystate.RetryPolicy{Attempts: 30, Initial: 50 * time.Millisecond, Max: time.Hour}

// A service is the store and the machine, without HTTP around them.
type service struct {
	engine    *keystate.Engine[*bbolt.Tx]
	transfers *keyhttp.Handler[money.Transfer]
	timeout   time.Duration // of one call to the processor
	log       *slog.Logger
}

// openService opens the store and registers the machines. What an earlier process left unfinished goes on from here by itself.
func openService(ctx context.Context, store string, calls *processor.Client, timeout time.Duration, log *slog.Logger) (*service, error) {
	s := &service{log: log, timeout: timeout}
	left := &leftovers{log: log}
	var err error
	if s.engine, err = keystate.Open(store, &keystate.Options{Logger: log, Observer: left.observer()}); err != nil {
		return nil, err
	}
	if err := s.register(ctx, calls, left); err != nil {
		return nil, errors.Join(err, s.engine.Close())
	}
	return s, nil
}

func (s *service) register(ctx context.Context, calls *processor.Client, left *leftovers) error {
	if err := s.engine.Update(ctx, money.OpenAccounts); err != nil {
		return err
	}
	if err := left.find(ctx, s.engine); err != nil {
		return err
	}
	teller, err := money.NewTeller(s.engine, money.Buckets{}, calls, money.Patience{Timeout: s.timeout, Retry: patience})
	if err != nil {
		return err
	}
	s.transfers, err = keyhttp.Handle(s.engine, "transfer", teller.Phases(), keyhttp.Endpoint[money.Transfer]{
		Options: keyhttp.Options{
			Scope:         scope,
			KeyLife:       keyLife,
			CanonicalJSON: true,
			MaxBody:       4 << 10,
			Logger:        s.log,
		},
		Decode: decodeTransfer,
		Encode: encodeTransfer,
	})
	return err
}

// slowestAnswer is how long a request may wait for the processor: for each of the attempts that are made while it waits.
func (s *service) slowestAnswer() time.Duration { return 4 * s.timeout }
