package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"time"

	"example.com/keystate"
	"github.com/jackc/pgx/v5"
)

const (
	keysTable = "keystate.keys"
	copiers   = 2
)

// fillOnPostgres fills a database with finished keys. The engine makes the first; the others are copies of its row and its
// record, each with an ID, a state, an incarnation and a number of its own.
func fillOnPostgres(p place, keys int, newID idAt, done func(int)) error {
	e, err := openPGEngine(p, pgx.Serializable, phases(writeRow), forEver)
	if err != nil {
		return err
	}
	m, err := finishedMould(&e.engine)
	if err := joinClose(err, e); err != nil {
		return err
	}
	var columns []string
	var row []any
	var indexes []string
	err = onServerConn(p.dsn, func(ctx context.Context, conn *pgx.Conn) (err error) {
		if columns, row, err = firstRow(ctx, conn); err != nil {
			return err
		}
		if _, err := conn.Exec(ctx, "ALTER TABLE "+keysTable+" SET (autovacuum_enabled = false)"); err != nil {
			return err
		}
		indexes, err = dropIndexes(ctx, conn)
		return err
	})
	if err != nil {
		return err
	}
	if err := copyKeys(p, pgMould{m, columns, row}, keys, newID, done); err != nil {
		return err
	}
	return onServerConn(p.dsn, func(ctx context.Context, conn *pgx.Conn) error {
		for _, sql := range append(indexes, "ALTER TABLE "+keysTable+" RESET (autovacuum_enabled)", "VACUUM ANALYZE "+keysTable, "CHECKPOINT") {
			if _, err := conn.Exec(ctx, sql); err != nil {
				return fmt.Errorf("%s: %w", sql, err)
			}
		}
		return nil
	})
}

func firstRow(ctx context.Context, conn *pgx.Conn) (columns []string, values []any, err error) {
	rows, err := conn.Query(ctx, "SELECT * FROM "+keysTable)
	if err != nil {
		return nil, nil, err
	}
	defer rows.Close()
	for rows.Next() {
		if values, err = rows.Values(); err != nil {
			return nil, nil, err
		}
	}
	for _, field := range rows.FieldDescriptions() {
		columns = append(columns, field.Name)
	}
	return columns, values, rows.Err()
}

// dropIndexes returns the statements that make them again: that is faster than to keep them while rows come.
func dropIndexes(ctx context.Context, conn *pgx.Conn) (again []string, err error) {
	rows, err := conn.Query(ctx, `
		SELECT 'ALTER TABLE `+keysTable+` DROP CONSTRAINT ' || quote_ident(conname),
			'ALTER TABLE `+keysTable+` ADD CONSTRAINT ' || quote_ident(conname) || ' ' || pg_get_constraintdef(oid)
		FROM pg_constraint WHERE conrelid = $1::text::regclass AND contype = 'p'
		UNION ALL
		SELECT 'DROP INDEX ' || indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = $1::text::regclass AND NOT indisprimary`, keysTable)
	if err != nil {
		return nil, err
	}
	type index struct{ Drop, Again string }
	indexes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[index])
	if err != nil {
		return nil, err
	}
	for _, i := range indexes {
		if _, err := conn.Exec(ctx, i.Drop); err != nil {
			return nil, err
		}
		again = append(again, i.Again)
	}
	return again, nil
}

// A pgMould casts rows, too.
type pgMould struct {
	mould
	columns []string
	row     []any
}

func (m pgMould) castRow(id string, at time.Time) ([]any, error) {
	r, err := m.cast(id, at)
	if err != nil {
		return nil, err
	}
	r.Version = m.record.Version
	frame, err := r.MarshalBinary()
	if err != nil {
		return nil, err
	}
	var drawn [17]byte
	rand.Read(drawn[:])
	values := append([]any(nil), m.row...)
	for i, column := range m.columns {
		switch column {
		case "id":
			values[i] = []byte(id)
		case "incarnation":
			values[i] = r.Incarnation[:]
		case "nonce":
			values[i] = drawn[:16]
		case "finished":
			values[i] = at.UnixMicro()*1024 + int64(drawn[16])
		case "record":
			values[i] = frame
		}
	}
	return values, nil
}

// copyKeys copies rows over several connections at once. Keys finish at an even pace, as they were made.
func copyKeys(p place, m pgMould, keys int, newID idAt, done func(int)) error {
	from := time.Now().Add(-pastEnd - pastSpan)
	failed := make([]error, copiers)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for part := range copiers {
		wg.Go(func() {
			failed[part] = onServerConn(p.dsn, func(ctx context.Context, conn *pgx.Conn) error {
				i := part - copiers
				rows := pgx.CopyFromFunc(func() ([]any, error) {
					if i += copiers; i >= keys {
						return nil, nil
					}
					if i/copiers%1000 == 999 {
						mu.Lock()
						done(1000)
						mu.Unlock()
					}
					at := from.Add(pastSpan / time.Duration(keys) * time.Duration(i))
					return m.castRow(newID(at), at)
				})
				_, err := conn.CopyFrom(ctx, pgx.Identifier(strings.Split(keysTable, ".")), m.columns, rows)
				return err
			})
		})
	}
	wg.Wait()
	for _, err := range failed {
		if err != nil {
			return err
		}
	}
	return checkFilled(p, keys)
}

// checkFilled has the engine count the keys, and read one that was copied.
func checkFilled(p place, keys int) error {
	var id []byte
	var found int
	err := onServerConn(p.dsn, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT id, count(*) OVER () FROM `+keysTable+` ORDER BY finished LIMIT 1`).Scan(&id, &found)
	})
	if err != nil {
		return err
	}
	e, err := openPGEngine(p, pgx.Serializable, phases(writeRow), forEver)
	if err != nil {
		return err
	}
	r, err := e.Key(context.Background(), key(string(id)))
	if err == nil && (r.Status != keystate.Answered || found != keys+1) {
		err = fmt.Errorf("%d keys, not %d; one is %s", found, keys+1, r.Status)
	}
	return joinClose(err, e)
}
