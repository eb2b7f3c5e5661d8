package main

import (
	"bytes"
	"context"
	"errors"
	"time"

	"example.com/keystate"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// pgx is used as it comes: a pool, statements prepared and cached.

var postgresContenders = []contender{
	{name: keystateOnPostgres, label: "keystate/PostgreSQL", on: onPostgres, open: openOnPostgres(pgx.Serializable, queueRow), fill: fillOnPostgres},
	{name: keystateOnPostgres + ", READ COMMITTED", label: "keystate, read committed", on: onPostgres, open: openOnPostgres(pgx.ReadCommitted, queueRow)},
	{name: keystateOnPostgres + ", writes not queued", label: "keystate, not queued", on: onPostgres, open: openOnPostgres(pgx.Serializable, writeRow)},
	{name: byTransaction, label: "PostgreSQL", on: onPostgres, hold: lockTimeout, open: openPGByHand(inTransactions{isolation: pgx.ReadCommitted, lock: true})},
	{name: "PostgreSQL by hand, SERIALIZABLE", label: "PostgreSQL, serializable", on: onPostgres, hold: lockTimeout, open: openPGByHand(inTransactions{isolation: pgx.Serializable})},
	{name: "PostgreSQL by hand, READ COMMITTED, no SELECT FOR UPDATE", label: "PostgreSQL, no lock", on: onPostgres, hold: lockTimeout,
		open: openPGByHand(inTransactions{isolation: pgx.ReadCommitted})},
	{name: "PostgreSQL by hand, one statement per step", label: "PostgreSQL, one statement", on: onPostgres, hold: lockTimeout, open: openPGByHand(inStatements{})},
}

const (
	pgxModule = "github.com/jackc/pgx/v5"

	pgOrders    = `CREATE TABLE IF NOT EXISTS orders (name text PRIMARY KEY, payload bytea NOT NULL)`
	insertOrder = `INSERT INTO orders (name, payload) VALUES ($1, $2)`
)

func writeRow(ctx context.Context, tx pgx.Tx, name string) error {
	_, err := tx.Exec(ctx, insertOrder, name, businessRow)
	return err
}

// queueRow sends the row with the commit.
func queueRow(ctx context.Context, tx pgx.Tx, name string) error {
	return postgres.Queue(ctx, tx, insertOrder, name, businessRow)
}

// openPool connects with so many connections at most, all else as pgx has it, and makes tables.
func openPool(p place, tables ...string) (*pgxpool.Pool, error) {
	ctx := context.Background()
	config, err := pgxpool.ParseConfig(p.dsn)
	if err != nil {
		return nil, err
	}
	config.MaxConns = int32(max(4, p.connections))
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	for _, sql := range append(tables, pgOrders) {
		if _, err := pool.Exec(ctx, sql); err != nil {
			pool.Close()
			return nil, err
		}
	}
	return pool, nil
}

// pgRows are the business rows.
type pgRows struct{ pool *pgxpool.Pool }

func (r pgRows) business(ctx context.Context, name string) (row []byte, err error) {
	err = r.pool.QueryRow(ctx, `SELECT payload FROM orders WHERE name = $1`, name).Scan(&row)
	return row, err
}

func (r pgRows) rows(ctx context.Context) (n int, err error) {
	err = r.pool.QueryRow(ctx, `SELECT count(*) FROM orders`).Scan(&n)
	return n, err
}

// pgEngine is keystate on PostgreSQL.
type pgEngine struct {
	engine[pgx.Tx]
	pgRows
}

func openOnPostgres(isolation pgx.TxIsoLevel, put func(context.Context, pgx.Tx, string) error) func(place) (station, error) {
	return func(p place) (station, error) { return openPGEngine(p, isolation, phases(put), forEver) }
}

func openPGEngine(p place, isolation pgx.TxIsoLevel, phases []keystate.Phase[pgx.Tx, order], o keystate.Options) (*pgEngine, error) {
	pool, err := openPool(p)
	if err != nil {
		return nil, err
	}
	e := &pgEngine{pgRows: pgRows{pool}}
	store, err := postgres.New(context.Background(), pool, &postgres.Options{Isolation: isolation, Logger: quiet})
	if err != nil {
		return nil, err
	}
	if e.Engine, err = keystate.New[pgx.Tx](store, e.observe(o)); err != nil {
		return nil, err
	}
	e.closers = []func() error{e.Engine.Close, func() error { pool.Close(); return nil }}
	e.orders, err = keystate.Register(e.Engine, "order", phases)
	return e, err
}

const handTable = `CREATE TABLE IF NOT EXISTS idempotency_keys (
	scope          text        NOT NULL,
	key            text        NOT NULL,
	created_at     timestamptz NOT NULL DEFAULT now(),
	locked_at      timestamptz,
	recovery_point text        NOT NULL,
	request        bytea       NOT NULL,
	state          bytea,
	response       bytea,
	PRIMARY KEY (scope, key)
)`

const (
	handInsert = `INSERT INTO idempotency_keys (scope, key, locked_at, recovery_point, request) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING`
	handFind   = `SELECT recovery_point, locked_at, request, state, response FROM idempotency_keys WHERE scope = $1 AND key = $2 FOR UPDATE`
	handRetake = `UPDATE idempotency_keys SET locked_at = $3 WHERE scope = $1 AND key = $2`
	handLock   = `SELECT recovery_point, locked_at FROM idempotency_keys WHERE scope = $1 AND key = $2 FOR UPDATE`
	handMove   = `UPDATE idempotency_keys SET recovery_point = $5, state = $6 WHERE scope = $1 AND key = $2 AND recovery_point = $3 AND locked_at = $4`
	handFinish = `UPDATE idempotency_keys SET recovery_point = $5, response = $6, locked_at = NULL WHERE scope = $1 AND key = $2 AND recovery_point = $3 AND locked_at = $4`

	handMoveWriting   = `WITH moved AS (` + handMove + ` RETURNING 1), written AS (INSERT INTO orders (name, payload) SELECT $7, $8 FROM moved) SELECT count(*) FROM moved`
	handFinishWriting = `WITH moved AS (` + handFinish + ` RETURNING 1), written AS (INSERT INTO orders (name, payload) SELECT $7, $8 FROM moved) SELECT count(*) FROM moved`

	lockTimeout = 90 * time.Second // as in the essay: then a retry may take a key over
)

// A style is how a step reaches the server.
type style interface {
	claim(ctx context.Context, pool *pgxpool.Pool, r *handRecord) error
	move(ctx context.Context, pool *pgxpool.Pool, r *handRecord, to string, contents []byte, business string) error
}

type inPostgres struct {
	pgRows
	style style
}

func openPGByHand(s style) func(place) (station, error) {
	return func(p place) (station, error) {
		pool, err := openPool(p, handTable)
		return hand{inPostgres{pgRows{pool}, s}}, err
	}
}

func (p inPostgres) claim(ctx context.Context, r *handRecord) error {
	return p.style.claim(ctx, p.pool, r)
}

func (p inPostgres) move(ctx context.Context, r *handRecord, to string, contents []byte, business string) error {
	err := p.style.move(ctx, p.pool, r, to, contents, business)
	if err == nil {
		r.point = to
	}
	return err
}

func (p inPostgres) close() error {
	p.pool.Close()
	return nil
}

func handUpdate(to string) string {
	if to == finished {
		return handFinish
	}
	return handMove
}

// inTransactions is one transaction for each step, begun and committed as pgx does. With lock, the key's row is locked before
// it is looked at, and in every phase; without, the UPDATE at the phase's end finds out whether the key is still the caller's.
type inTransactions struct {
	isolation pgx.TxIsoLevel
	lock      bool
}

// transaction runs fn, and again when the server could not put it in a line with others.
func (w inTransactions) transaction(ctx context.Context, pool *pgxpool.Pool, fn func(tx pgx.Tx) error) error {
	for {
		err := pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: w.isolation}, fn)
		var said *pgconn.PgError
		if !errors.As(err, &said) || said.Code != "40001" {
			return err
		}
	}
}

func (w inTransactions) claim(ctx context.Context, pool *pgxpool.Pool, r *handRecord) error {
	return w.transaction(ctx, pool, func(tx pgx.Tx) error {
		now := time.Now().Truncate(time.Microsecond) // what the server keeps of it
		tag, err := tx.Exec(ctx, handInsert, handScope, r.id, now, started, r.request)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 1 {
			r.point, r.lockedAt = started, now
			return nil
		}
		return retake(ctx, tx, r, now)
	})
}

// retake takes up a key that is there.
func retake(ctx context.Context, tx pgx.Tx, r *handRecord, now time.Time) error {
	var request []byte
	var lockedAt *time.Time
	if err := tx.QueryRow(ctx, handFind, handScope, r.id).Scan(&r.point, &lockedAt, &request, &r.state, &r.response); err != nil {
		return err
	}
	switch {
	case !bytes.Equal(request, r.request):
		return errOther
	case r.point == finished:
		return nil
	case lockedAt != nil && now.Sub(*lockedAt) < lockTimeout:
		return errUnderWay
	}
	r.lockedAt = now
	_, err := tx.Exec(ctx, handRetake, handScope, r.id, now)
	return err
}

func (w inTransactions) move(ctx context.Context, pool *pgxpool.Pool, r *handRecord, to string, contents []byte, business string) error {
	return w.transaction(ctx, pool, func(tx pgx.Tx) error {
		if w.lock {
			var point string
			var lockedAt *time.Time
			if err := tx.QueryRow(ctx, handLock, handScope, r.id).Scan(&point, &lockedAt); err != nil {
				return err
			}
			if point != r.point || lockedAt == nil || !lockedAt.Equal(r.lockedAt) {
				return errOvertaken
			}
		}
		if business != "" {
			if err := writeRow(ctx, tx, business); err != nil {
				return err
			}
		}
		tag, err := tx.Exec(ctx, handUpdate(to), handScope, r.id, r.point, r.lockedAt, to, contents)
		if err == nil && tag.RowsAffected() == 0 {
			return errOvertaken
		}
		return err
	})
}

// inStatements is the least that four commits take: one statement for each step, which the server commits by itself. The business
// write has to fit into that statement, so it is a bound, and no way to write programs.
type inStatements struct{}

func (inStatements) claim(ctx context.Context, pool *pgxpool.Pool, r *handRecord) error {
	now := time.Now().Truncate(time.Microsecond)
	tag, err := pool.Exec(ctx, handInsert, handScope, r.id, now, started, r.request)
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 1 {
		r.point, r.lockedAt = started, now
		return nil
	}
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return retake(ctx, tx, r, now) })
}

func (inStatements) move(ctx context.Context, pool *pgxpool.Pool, r *handRecord, to string, contents []byte, business string) error {
	var moved int64
	if business == "" {
		tag, err := pool.Exec(ctx, handUpdate(to), handScope, r.id, r.point, r.lockedAt, to, contents)
		if err != nil {
			return err
		}
		moved = tag.RowsAffected()
	} else {
		writing := handMoveWriting
		if to == finished {
			writing = handFinishWriting
		}
		err := pool.QueryRow(ctx, writing, handScope, r.id, r.point, r.lockedAt, to, contents, business, businessRow).Scan(&moved)
		if err != nil {
			return err
		}
	}
	if moved == 0 {
		return errOvertaken
	}
	return nil
}
