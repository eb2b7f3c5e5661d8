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

// Update runs fn in a transaction. It is run again when the server ends it because of others, or the connection is lost; when the
// connection is lost in the middle of the commit, the store looks whether it took effect. If it has not, it may be on its way still: the
// next run excludes it, since both write the same version of the same keys.
func (s *Store) Update(ctx context.Context, fn func(tx pgx.Tx) error) error {
	if err := s.open(); err != nil {
		return err
	}
	doubt := false
	err := s.again(ctx, func() error {
		err := s.try(ctx, fn)
		doubt = doubt || errors.Is(err, errUnseen)
		return err
	})
	if err != nil && doubt && !errors.Is(err, keystate.ErrOutcomeUnknown) {
		err = fmt.Errorf("%w: %w", keystate.ErrOutcomeUnknown, err)
	}
	return s.meaning(err)
}

// errUnseen says that a commit whose connection was lost had not taken effect when the store looked.
var errUnseen = errors.New("the connection was lost in the commit, and its effect is not seen")

// passing says whether an error is one with which what has failed may be run again, and may succeed.
func passing(err error) bool {
	return crossed(err) || cutOff(err) || errors.Is(err, errOverdue) || errors.Is(err, errStandby) || errors.Is(err, errUndone)
}

// again runs what may be run again, with growing pauses, until it has failed for too long.
func (s *Store) again(ctx context.Context, do func() error) error {
	pauses := backoff.ExponentialBackOff{InitialInterval: time.Millisecond, MaxInterval: 500 * time.Millisecond, Multiplier: 2, RandomizationFactor: 0.5}
	var failed time.Time // for the first time
	for {
		err := do()
		if !passing(err) || errors.Is(err, keystate.ErrOutcomeUnknown) {
			return err
		}
		if failed.IsZero() {
			failed = time.Now()
		}
		pause := pauses.NextBackOff()
		if time.Since(failed)+pause > s.options.RetryTimeout {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-s.ctx.Done():
			return errors.Join(err, keystate.ErrClosed)
		}
	}
}

// try is one run of a transaction.
func (s *Store) try(ctx context.Context, fn func(tx pgx.Tx) error) error {
	t, err := s.prepare(ctx, pgx.TxOptions{IsoLevel: s.options.Isolation})
	if err != nil {
		return err
	}
	lost, err := t.through(ctx, fn)
	if lost != nil {
		return s.settle(ctx, t, lost) // with the connection given back: it takes one, and all those there are may have been lost in commits
	}
	return s.demoted(err)
}

// through runs fn and commits. It returns what has cut the commit off, or else what has come of it.
func (t *txn) through(ctx context.Context, fn func(tx pgx.Tx) error) (lost, err error) {
	defer t.leave() // also when fn ends the goroutine
	if err := t.run(fn); err != nil {
		return nil, err
	}
	err = t.commit(ctx)
	if err == nil || code(err) != "" && !cutOff(err) || errors.Is(err, keystate.ErrFenced) || errors.Is(err, keystate.ErrRejected) || errors.Is(err, pgx.ErrTxClosed) {
		return nil, err
	}
	return t.conn.reason(err), nil
}

// run runs fn. Whatever fn makes of it, a transaction that the server has ended, or whose connection is lost, ends with that.
func (t *txn) run(fn func(tx pgx.Tx) error) error {
	err := guarded(func() error { return fn(t) })
	switch {
	case t.fate != nil:
		err = t.fate
	case passing(err) && t.gone(): // a batch, a part of the transaction or the bare connection has heard of it
		err = fmt.Errorf("%w: %v", errUndone, err) // no error of fn's any more
	}
	return t.conn.reason(err)
}

// gone says whether nothing of the transaction can be committed.
func (t *txn) gone() bool {
	conn := t.conn.Conn().PgConn()
	return conn.IsClosed() || conn.TxStatus() == 'E'
}

// demoted gives up connections to a server that takes writes no more: another one does, or will.
func (s *Store) demoted(err error) error {
	if refusesWrites(err) {
		s.pool.Reset()
		err = fmt.Errorf("%w: %w", errStandby, err)
	}
	return err
}

// prepare gets a connection for a transaction, which begins with its first statement.
func (s *Store) prepare(ctx context.Context, options pgx.TxOptions) (*txn, error) {
	conn, err := s.line(ctx, s.options.TransactionTimeout)
	if err != nil {
		return nil, err
	}
	return &txn{conn: conn, options: options, store: s, ctx: ctx, nonce: newNonce()}, nil
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
	ctx, cancel := s.outlasting(ctx)
	defer cancel()
	var done bool
	err := s.again(ctx, func() (err error) {
		done, err = s.bears(ctx, t.written[len(t.written)-1], t.nonce)
		return err
	})
	switch {
	case err != nil:
		return unknown(err)
	case done:
		return nil
	}
	return fmt.Errorf("keystate/postgres: %w: %w", errUnseen, lost)
}

// outlasting is a context that does not end with another, but does soon after it: what became of a commit is worth knowing also when it is the
// caller's end that has cut it off.
func (s *Store) outlasting(ctx context.Context) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(s.options.Lease, cancel) })
	return longer, func() {
		stop()
		cancel()
	}
}

// bears says whether a key's row bears a nonce. Whoever is still writing the row is waited for: first by trying to insert it, and then by
// locking it.
func (s *Store) bears(ctx context.Context, key keystate.Key, nonce []byte) (found bool, err error) {
	err = s.on(ctx, s.options.TransactionTimeout, func(l *line) error {
		found, err = s.bearsOn(ctx, l, key, nonce)
		return err
	})
	return found, err
}

func (s *Store) bearsOn(ctx context.Context, l *line, key keystate.Key, nonce []byte) (bool, error) {
	tx, err := l.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return false, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) // a row that was not there is not to stay
	tag, err := tx.Exec(ctx, s.sql.settle, []byte(key.ID), []byte(key.Scope))
	if err != nil {
		return false, err
	}
	if tag.RowsAffected() > 0 {
		return false, nil
	}
	var found []byte
	err = tx.QueryRow(ctx, s.sql.nonceOf, []byte(key.ID), []byte(key.Scope)).Scan(&found)
	if err != nil || !bytes.Equal(found, nonce) {
		return false, err
	}
	// The row is there, but a synchronous standby may not have it yet: the commit may have been cut off while it waited for that. The lock is
	// in the log behind it, and its own commit waits for the standby.
	return true, tx.Commit(ctx)
}

// View runs fn in a transaction that reads one consistent state. It is run again when the connection is lost.
func (s *Store) View(ctx context.Context, fn func(tx pgx.Tx) error) error {
	if err := s.open(); err != nil {
		return err
	}
	return s.meaning(s.again(ctx, func() error { return s.view(ctx, fn) }))
}

// view is one run of a transaction that reads.
func (s *Store) view(ctx context.Context, fn func(tx pgx.Tx) error) error {
	t, err := s.prepare(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return err
	}
	defer t.leave()
	if _, err := t.begun(ctx); err != nil {
		return t.conn.reason(err)
	}
	t.reading = true
	return t.run(fn)
}

// Get reads a record as it is now, in one trip to the server.
func (s *Store) Get(ctx context.Context, key keystate.Key) (r keystate.Record, err error) {
	if err := s.open(); err != nil {
		return r, err
	}
	err = s.again(ctx, func() error {
		return s.on(ctx, s.options.TransactionTimeout, func(l *line) error {
			r, err = record(l.QueryRow(ctx, s.sql.get, []byte(key.ID), []byte(key.Scope)))
			return err
		})
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return r, keystate.ErrNotFound
	}
	return r, s.meaning(err)
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
