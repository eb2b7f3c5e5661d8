package postgres

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"time"

	"example.com/keystate"
	"github.com/cenkalti/backoff/v5"
	"github.com/jackc/pgx/v5"
)

// Update runs fn in a transaction. It is run again when the server ends it because of others, or the connection is lost before its
// commit; when the connection is lost in the middle of the commit, the store looks whether it took effect.
func (s *Store) Update(ctx context.Context, fn func(tx pgx.Tx) error) error {
	if err := s.open(); err != nil {
		return err
	}
	return s.meaning(s.again(ctx, func() error { return s.try(ctx, fn) }))
}

// again runs what may be run again, so often and with growing pauses.
func (s *Store) again(ctx context.Context, do func() error) (err error) {
	pauses := backoff.ExponentialBackOff{InitialInterval: time.Millisecond, MaxInterval: 500 * time.Millisecond, Multiplier: 2, RandomizationFactor: 0.5}
	for range s.options.Tries {
		if err = do(); !crossed(err) && !cutOff(err) || errors.Is(err, keystate.ErrOutcomeUnknown) {
			return err
		}
		select {
		case <-time.After(pauses.NextBackOff()):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-s.ctx.Done():
			return errors.Join(err, keystate.ErrClosed)
		}
	}
	return err
}

// try is one run of a transaction.
func (s *Store) try(ctx context.Context, fn func(tx pgx.Tx) error) error {
	tx, err := s.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: s.options.Isolation})
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) // also when fn ends the goroutine; after the commit it does nothing
	t := &txn{Tx: tx, store: s, ctx: ctx, nonce: newNonce()}
	if err := guarded(func() error { return fn(t) }); err != nil {
		return err
	}
	err = tx.Commit(ctx)
	if err == nil || code(err) != "" && !cutOff(err) || errors.Is(err, pgx.ErrTxCommitRollback) {
		return err
	}
	return s.settle(ctx, t, err)
}

// guarded makes a panic in fn its error.
func guarded(fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("keystate/postgres: panic: %v\n%s", v, debug.Stack())
		}
	}()
	return fn()
}

// settle finds out what became of a transaction whose commit has no answer: the rows that it wrote bear its nonce, or do not.
func (s *Store) settle(ctx context.Context, t *txn, lost error) error {
	unknown := func(why error) error {
		return fmt.Errorf("%w: the connection was lost in the commit (%w), and what became of it cannot be told: %w", keystate.ErrOutcomeUnknown, lost, why)
	}
	if len(t.written) == 0 {
		return unknown(errors.New("it wrote no key"))
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.options.Lease)
	defer cancel()
	var done bool
	var err error
	for range s.options.Tries {
		if done, err = s.bears(ctx, t.written[len(t.written)-1], t.nonce); err == nil {
			break
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return unknown(errors.Join(err, ctx.Err()))
		}
	}
	switch {
	case err != nil:
		return unknown(err)
	case done:
		return nil
	}
	return fmt.Errorf("keystate/postgres: the connection was lost and nothing was committed: %w", lost)
}

// bears says whether a key's row bears a nonce. Whoever is still writing the row is waited for: first by trying to insert it, and then by
// locking it.
func (s *Store) bears(ctx context.Context, key keystate.Key, nonce []byte) (bool, error) {
	tx, err := s.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return false, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) // nothing of this is to stay
	tag, err := tx.Exec(ctx, s.sql.settle, []byte(key.ID), []byte(key.Scope))
	if err != nil {
		return false, err
	}
	if tag.RowsAffected() > 0 {
		return false, nil
	}
	var found []byte
	err = tx.QueryRow(ctx, s.sql.nonceOf, []byte(key.ID), []byte(key.Scope)).Scan(&found)
	return bytes.Equal(found, nonce), err
}

// View runs fn in a transaction that reads one consistent state.
func (s *Store) View(ctx context.Context, fn func(tx pgx.Tx) error) error {
	if err := s.open(); err != nil {
		return err
	}
	return s.meaning(s.view(ctx, fn))
}

func (s *Store) view(ctx context.Context, fn func(tx pgx.Tx) error) error {
	tx, err := s.beginView(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	return guarded(func() error { return fn(&txn{Tx: tx, store: s, ctx: ctx, reading: true}) })
}

// beginView begins again where the connection that it got was lost before.
func (s *Store) beginView(ctx context.Context) (tx pgx.Tx, err error) {
	err = s.again(ctx, func() error {
		tx, err = s.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
		return err
	})
	return tx, err
}

func newNonce() []byte {
	b := make([]byte, 16)
	rand.Read(b)
	return b
}

func isNetwork(err error) bool {
	var n net.Error
	return errors.As(err, &n) && !n.Timeout() || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed)
}
