package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
)

// SQLite by hand uses mattn/go-sqlite3, which is SQLite itself behind cgo: of the drivers, the fastest that we found (by a tenth with
// a transaction per row, by a quarter with many rows in one, against modernc.org/sqlite). Without a C compiler, modernc.org/sqlite takes its place;
// the report names the driver. It goes as SQLite's own documentation has it: write-ahead log, synchronous=FULL, one connection that writes,
// transactions that begin IMMEDIATE, statements prepared once.

var sqliteContenders = []contender{
	{name: "SQLite by hand, transaction per step", label: "SQLite", on: onSQLite, open: openSQLiteByHand(oneByOne), fill: fillSQLiteByHand},
	{name: "SQLite by hand, group commit", label: "SQLite group commit", on: onSQLite, open: openSQLiteByHand(together)},
}

const sqliteSchema = `
CREATE TABLE IF NOT EXISTS idempotency_keys (
	scope          TEXT NOT NULL,
	key            TEXT NOT NULL,
	recovery_point TEXT NOT NULL,
	request        BLOB NOT NULL,
	state          BLOB,
	response       BLOB,
	PRIMARY KEY (scope, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS orders (name TEXT PRIMARY KEY, payload BLOB NOT NULL) WITHOUT ROWID;`

const (
	sqliteInsert = `INSERT INTO idempotency_keys (scope, key, recovery_point, request) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING`
	sqliteFind   = `SELECT recovery_point, request, state, response FROM idempotency_keys WHERE scope = ? AND key = ?`
	sqliteMove   = `UPDATE idempotency_keys SET recovery_point = ?, state = ? WHERE scope = ? AND key = ? AND recovery_point = ?`
	sqliteFinish = `UPDATE idempotency_keys SET recovery_point = ?, response = ?, state = NULL WHERE scope = ? AND key = ? AND recovery_point = ?`
	sqliteOrder  = `INSERT INTO orders (name, payload) VALUES (?, ?)`
)

// inSQLite is one SQLite transaction for each step, or for the steps that have come together.
type inSQLite struct {
	db         *sql.DB // for what only reads
	conn       *sql.Conn
	statements map[string]*sql.Stmt
	commit     func(w *inSQLite, step func() error) error
	mu         sync.Mutex // of whoever writes
	steps      chan sqliteStep
	ended      chan struct{}
	committed  atomic.Int64
}

type sqliteStep struct {
	do   func() error
	done chan error
}

func openSQLiteByHand(commit func(*inSQLite, func() error) error) func(place) (station, error) {
	return func(p place) (station, error) {
		w, err := openSQLite(p, commit)
		if err != nil {
			return nil, err
		}
		return hand{w}, nil
	}
}

func openSQLite(p place, commit func(*inSQLite, func() error) error) (*inSQLite, error) {
	ctx := context.Background()
	db, err := sql.Open(sqliteDriver, "file:"+filepath.Join(p.dir, "hand.sqlite")+sqliteParameters)
	if err != nil {
		return nil, err
	}
	w := &inSQLite{db: db, commit: commit, statements: map[string]*sql.Stmt{}, steps: make(chan sqliteStep, 1024), ended: make(chan struct{})}
	if w.conn, err = db.Conn(ctx); err != nil {
		return nil, err
	}
	if _, err := w.conn.ExecContext(ctx, sqliteSchema); err != nil {
		return nil, err
	}
	for _, text := range []string{"BEGIN IMMEDIATE", "COMMIT", "ROLLBACK", sqliteInsert, sqliteFind, sqliteMove, sqliteFinish, sqliteOrder} {
		if w.statements[text], err = w.conn.PrepareContext(ctx, text); err != nil {
			return nil, fmt.Errorf("%s: %w", text, err)
		}
	}
	go w.writeTogether()
	return w, nil
}

// oneByOne is a transaction for each step.
func oneByOne(w *inSQLite, step func() error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.transaction(step)
}

// together leaves the step to the one goroutine that writes.
func together(w *inSQLite, step func() error) error {
	s := sqliteStep{step, make(chan error, 1)}
	w.steps <- s
	return <-s.done
}

// transaction commits what some steps do, or nothing of it.
func (w *inSQLite) transaction(steps ...func() error) error {
	if _, err := w.exec("BEGIN IMMEDIATE"); err != nil {
		return err
	}
	for _, step := range steps {
		if err := step(); err != nil {
			_, failed := w.exec("ROLLBACK")
			return errors.Join(err, failed)
		}
	}
	_, err := w.exec("COMMIT")
	w.committed.Add(1)
	return err
}

// writeTogether commits the steps that have come while it wrote the ones before. When one of them fails, each gets a
// transaction to itself.
func (w *inSQLite) writeTogether() {
	defer close(w.ended)
	var group []sqliteStep
	for first := range w.steps {
		group = append(group[:0], first)
		for len(w.steps) > 0 && len(group) < cap(w.steps) {
			group = append(group, <-w.steps)
		}
		all := make([]func() error, len(group))
		for i, s := range group {
			all[i] = s.do
		}
		w.mu.Lock()
		err := w.transaction(all...)
		for _, s := range group {
			if err != nil && len(group) > 1 {
				s.done <- w.transaction(s.do)
			} else {
				s.done <- err
			}
		}
		w.mu.Unlock()
	}
}

func (w *inSQLite) exec(text string, args ...any) (int64, error) {
	result, err := w.statements[text].Exec(args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

func (w *inSQLite) claim(_ context.Context, r *handRecord) error {
	return w.commit(w, func() error {
		inserted, err := w.exec(sqliteInsert, handScope, r.id, started, r.request)
		if err != nil {
			return err
		}
		if inserted == 1 {
			r.point = started
			return nil
		}
		var request []byte
		err = w.statements[sqliteFind].QueryRow(handScope, r.id).Scan(&r.point, &request, &r.state, &r.response)
		if err == nil && !bytes.Equal(request, r.request) {
			err = errOther
		}
		return err
	})
}

func (w *inSQLite) move(_ context.Context, r *handRecord, to string, contents []byte, business string) error {
	text := sqliteMove
	if to == finished {
		text = sqliteFinish
	}
	err := w.commit(w, func() error {
		if business != "" {
			if _, err := w.exec(sqliteOrder, business, businessRow); err != nil {
				return err
			}
		}
		moved, err := w.exec(text, to, contents, handScope, r.id, r.point)
		if err == nil && moved == 0 {
			err = errOvertaken
		}
		return err
	})
	if err == nil {
		r.point = to
	}
	return err
}

func (w *inSQLite) commits() (int64, error) { return w.committed.Load(), nil }

func (w *inSQLite) business(ctx context.Context, name string) ([]byte, error) {
	return sqlBusiness(ctx, w.db, name)
}

func (w *inSQLite) rows(ctx context.Context) (int, error) { return sqlRows(ctx, w.db) }

func sqlBusiness(ctx context.Context, db *sql.DB, name string) (row []byte, err error) {
	err = db.QueryRowContext(ctx, `SELECT payload FROM orders WHERE name = ?`, name).Scan(&row)
	return row, err
}

func sqlRows(ctx context.Context, db *sql.DB) (n int, err error) {
	err = db.QueryRowContext(ctx, `SELECT count(*) FROM orders`).Scan(&n)
	return n, err
}

func (w *inSQLite) close() (err error) {
	close(w.steps)
	<-w.ended
	for _, s := range w.statements {
		err = errors.Join(err, s.Close())
	}
	return errors.Join(err, w.conn.Close(), w.db.Close())
}

// fillSQLiteByHand writes finished rows, many in a transaction.
func fillSQLiteByHand(p place, keys int, newID idAt, done func(int)) error {
	w, err := openSQLite(p, oneByOne)
	if err != nil {
		return err
	}
	insert, err := w.conn.PrepareContext(context.Background(),
		`INSERT INTO idempotency_keys (scope, key, recovery_point, request, response) VALUES (?, ?, '`+finished+`', ?, ?)`)
	if err != nil {
		return joinClose(err, hand{w})
	}
	defer insert.Close()
	for ids := range batches(keys, newID) {
		err = w.transaction(func() error {
			for _, id := range ids {
				request, response, err := finishedByHand(id)
				if err == nil {
					_, err = insert.Exec(handScope, id, request, response)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			break
		}
		done(len(ids))
	}
	return joinClose(err, hand{w})
}
