package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// A line is a connection in use, which is hung up when its user is not done with it in time. A server that is frozen, or a network that swallows what is
// sent, says nothing at all: no error ever comes of waiting for it, and no keepalive finds it out.
type line struct {
	*pooled
	wire  net.Conn
	limit time.Duration
	timer *time.Timer // nil without a limit
	hung  atomic.Bool
}

type pooled = pgxpool.Conn

var (
	errOverdue = errors.New("it took too long, and the connection was given up")
	errStandby = errors.New("the server takes no writes, as a standby does")
	errUndone  = errors.New("the server has ended the transaction, or the connection was lost")
)

// line gets a connection to a primary, and lets it be used for so long; 0 is for ever.
func (s *Store) line(ctx context.Context, limit time.Duration) (*line, error) {
	bounded, cancel := within(ctx, limit)
	conn, err := s.pool.Acquire(bounded)
	overdue := bounded.Err() != nil && ctx.Err() == nil
	cancel()
	switch {
	case err != nil && overdue:
		return nil, fmt.Errorf("%w: there was no connection within %s: %w", errOverdue, limit, err)
	case err != nil:
		return nil, err
	case conn.Conn().PgConn().ParameterStatus("in_hot_standby") == "on":
		s.pool.Reset() // the others lead there, too
		conn.Release()
		return nil, errStandby
	}
	l := &line{pooled: conn, wire: conn.Conn().PgConn().Conn(), limit: limit}
	if limit > 0 {
		l.timer = time.AfterFunc(limit, func() {
			l.hangUp()
			s.pool.Reset() // the others are perhaps as dead
		})
	}
	return l, nil
}

func within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if limit > 0 {
		return context.WithTimeout(ctx, limit)
	}
	return ctx, func() {}
}

// hangUp has whatever waits for the server fail at once.
func (l *line) hangUp() {
	l.hung.Store(true)
	l.wire.Close()
}

// reason tells of an error of the line's whether it is that of hanging up.
func (l *line) reason(err error) error {
	if err != nil && l.hung.Load() {
		return fmt.Errorf("%w after %s: %w", errOverdue, l.limit, err)
	}
	return err
}

// Release gives the connection back. One that was hung up is none of the pool's any more: to say goodbye to a server that does not answer takes long, and
// its place is needed.
func (l *line) Release() {
	if l.timer == nil || l.timer.Stop() {
		l.pooled.Release()
		return
	}
	l.hangUp() // whoever is about to do so must not find the next user's connection
	conn := l.Hijack()
	go conn.Close(context.Background())
}

// on runs fn on a connection.
func (s *Store) on(ctx context.Context, limit time.Duration, fn func(*line) error) error {
	l, err := s.line(ctx, limit)
	if err != nil {
		return err
	}
	defer l.Release()
	return l.reason(s.demoted(fn(l)))
}
