package postgres

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Reap deletes finished records whose retention has passed by the server's clock, the first that finished, up to limit. It is one statement,
// which goes by the index of the finished and reads no states. Rows that others are just deleting are passed over: any number of engines reap side
// by side. It says how many it has deleted and, when that is all there was, in how long the next one is due.
func (s *Store) Reap(ctx context.Context, retention time.Duration, limit int) (reaped int, next time.Duration, err error) {
	if err := s.open(); err != nil {
		return 0, 0, err
	}
	err = s.again(ctx, func() error {
		return s.on(ctx, s.options.TransactionTimeout, func(l *line) error {
			return pgx.BeginTxFunc(ctx, l, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
				tag, err := tx.Exec(ctx, s.sql.reap, retention.Microseconds(), limit)
				if reaped = int(tag.RowsAffected()); err != nil || reaped == limit {
					return err
				}
				var micros int64
				err = tx.QueryRow(ctx, s.sql.due, retention.Microseconds()).Scan(&micros)
				next = max(0, time.Duration(micros)*time.Microsecond)
				return err
			})
		})
	})
	if err != nil {
		return 0, 0, fmt.Errorf("keystate/postgres: reap: %w", s.meaning(err))
	}
	return reaped, next, nil
}

// reaping are the statements of retention.
type reaping struct{ reap, due string }

func reapingStatements(o Options) reaping {
	// A finished record's number is the time when it finished, in microseconds and ten more bits.
	sql := strings.NewReplacer("KEYS", tablesOf(o).keys, "NOW", `(EXTRACT(EPOCH FROM statement_timestamp()) * 1000000)::bigint`).Replace
	return reaping{
		reap: sql(`WITH ripe AS MATERIALIZED
			(SELECT id, scope FROM KEYS WHERE finished <= (NOW - $1::bigint) * 1024 + 1023 ORDER BY finished LIMIT $2 FOR UPDATE SKIP LOCKED)
			DELETE FROM KEYS k USING ripe WHERE k.id = ripe.id AND k.scope = ripe.scope`),
		due: sql(`SELECT COALESCE((SELECT finished / 1024 + $1::bigint - NOW FROM KEYS WHERE finished IS NOT NULL ORDER BY finished LIMIT 1), $1::bigint)`),
	}
}
