package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/keystate"
	"github.com/jackc/pgx/v5"
)

// Boot is called once by the engine. The lease begins with it.
func (s *Store) Boot(ctx context.Context) (id [16]byte, epoch uint64, err error) {
	var bytes []byte
	var n int64
	err = s.again(ctx, func() error {
		return s.on(ctx, s.options.TransactionTimeout, func(l *line) error {
			return pgx.BeginFunc(ctx, l, func(tx pgx.Tx) error {
				if err := tx.QueryRow(ctx, s.sql.boot).Scan(&bytes, &n); err != nil {
					return err
				}
				if len(bytes) == markSize { // before the commit: a boot that is refused leaves nothing behind
					return errMoving
				}
				_, err := tx.Exec(ctx, s.sql.enter, n, s.options.Lease.Microseconds())
				return err
			})
		})
	})
	switch {
	case err != nil:
		return id, 0, fmt.Errorf("keystate/postgres: boot: %w", s.meaning(err))
	case len(bytes) != len(id):
		return id, 0, fmt.Errorf("%w: the store's identity has %d bytes", keystate.ErrCorrupt, len(bytes))
	}
	s.epoch = uint64(n)
	return [16]byte(bytes), s.epoch, nil
}

// Renew says that the boot is at work. A server that does not answer is not waited for: there is to be time for another try before the
// lease has run out.
func (s *Store) Renew(ctx context.Context) (time.Duration, error) {
	err := s.on(ctx, s.options.Lease/2, func(l *line) error {
		_, err := l.Exec(ctx, s.sql.renew, int64(s.epoch), s.options.Lease.Microseconds())
		return err
	})
	return s.options.Lease, s.meaning(err)
}

// Now is the server's time. It is not asked for again when the server is away: the lease comes first.
func (s *Store) Now(ctx context.Context) (at time.Time, err error) {
	err = s.on(ctx, s.options.Lease/2, func(l *line) error { return l.QueryRow(ctx, s.sql.now).Scan(&at) })
	return at, s.meaning(err)
}

// Alive says whether the lease of an epoch's boot still holds.
func (s *Store) Alive(tx pgx.Tx, epoch uint64) (bool, error) {
	t, ok := tx.(*txn)
	if !ok {
		return false, errors.New("keystate/postgres: the transaction is none of this store's")
	}
	var n int
	err := t.QueryRow(t.ctx, s.sql.alive, int64(epoch)).Scan(&n)
	return n > 0, s.meaning(err)
}

// Adopt gives the boot keys whose own is not alive, while it is alive itself: when the server was away for longer than a lease, nobody's holds, and all
// are at work. Rows that another engine is just adopting are passed over. It is not run again when the server is away: the lease comes first.
func (s *Store) Adopt(ctx context.Context, machines []string, limit int) (adopted []keystate.Record, err error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	take := func(tx pgx.Tx) error {
		t := tx.(*txn)
		adopted = nil
		keys, err := t.orphans(machines, limit)
		if err != nil {
			return err
		}
		for _, key := range keys {
			r, err := record(t.QueryRow(ctx, s.sql.adopt, []byte(key.ID), []byte(key.Scope), int64(s.epoch), t.nonce))
			if err != nil {
				return err
			}
			t.written = append(t.written, key)
			adopted = append(adopted, r)
		}
		return nil
	}
	const enough = 5 // of others who are in the way: there is a next time
	for range enough {
		if err = s.try(ctx, take); !crossed(err) {
			break
		}
	}
	if err != nil {
		return nil, s.meaning(err)
	}
	return adopted, nil
}

func (t *txn) orphans(machines []string, limit int) (keys []keystate.Key, err error) {
	names := make([][]byte, len(machines))
	for i, name := range machines {
		names[i] = []byte(name)
	}
	rows, err := t.Query(t.ctx, t.store.sql.orphans, names, int64(t.store.epoch), limit)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (keystate.Key, error) {
		var id, scope []byte
		err := row.Scan(&id, &scope)
		return keystate.Key{Scope: string(scope), ID: string(id)}, err
	})
}

const farewell = 2 * time.Second // for the goodbye of a boot; without it, others wait for its lease to end

// leave ends the lease.
func (s *Store) leave() error {
	if s.epoch == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	if _, err := s.pool.Exec(ctx, s.sql.leave, int64(s.epoch)); err != nil {
		s.options.Logger.Warn("keystate/postgres: no goodbye: others take over when the lease ends", "lease", s.options.Lease, "error", err)
	}
	return nil
}

var errMoving = errors.New("a file's keys are being moved here: no engine can start until Import is done")
