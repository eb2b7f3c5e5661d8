package pgbench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/vmihailenco/msgpack/v5"
)

// By hand means as https://brandur.org/idempotency-keys has it: a row for each key with a recovery point; one transaction that claims the
// key; one for each atomic phase that follows, which moves the recovery point together with the business write; the last one writes the
// answer. A retry goes on from the recovery point, a finished key is answered from its row. pgx is used as it comes: a pool, statements
// prepared and cached.
//
// It spares itself, and this store does not: to tell one process from another that took its key over, other than by the time of the claim;
// to take over keys whose process died, before a client asks again; to let a second caller wait for the answer of the first; to find out what
// became of a commit whose connection was lost; tokens for effects; attempts, pauses between them and errors, kept; history;
// checksums; an index by which finished keys are deleted.

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
)

const (
	started  = "started"
	reserved = "funds_reserved"
	sent     = "payout_sent"
	finished = "finished"
)

const (
	handScope   = "bench"
	lockTimeout = 90 * time.Second // as in the essay: then a retry may take a key over
)

var (
	errUnderWay  = errors.New("the key is under way")
	errOther     = errors.New("the key was used for another request")
	errOvertaken = errors.New("another has taken the key over")
)

// A way is how the steps reach the server.
type way interface {
	claim(ctx context.Context, pool *pgxpool.Pool, r *handRecord) error
	move(ctx context.Context, pool *pgxpool.Pool, r *handRecord, to, sql string, contents []byte, business string) error
}

type hand struct {
	pool *pgxpool.Pool
	way  way
}

func openByHand(w way) func(testing.TB, string, int) station {
	return func(tb testing.TB, dsn string, connections int) station {
		tb.Helper()
		return &hand{openPool(tb, dsn, connections, handTable), w}
	}
}

func (h *hand) close() { h.pool.Close() }

// handRecord is a key's row.
type handRecord struct {
	id       string
	point    string
	lockedAt time.Time
	request  []byte
	state    []byte
	response []byte
}

func (h *hand) request(ctx context.Context, id string) (answer order, err error) {
	asked := order{Account: id, Cents: 500}
	r := &handRecord{id: id}
	if r.request, err = msgpack.Marshal(asked); err != nil {
		return answer, err
	}
	if err := h.way.claim(ctx, h.pool, r); err != nil {
		return answer, err
	}
	for r.point != finished {
		if err := h.step(ctx, r, asked); err != nil {
			return answer, fmt.Errorf("key %s after %s: %w", id, r.point, err)
		}
	}
	return answer, msgpack.Unmarshal(r.response, &answer)
}

// step goes on from a recovery point to the next.
func (h *hand) step(ctx context.Context, r *handRecord, asked order) error {
	switch r.point {
	case started:
		return h.way.move(ctx, h.pool, r, reserved, handMove, nil, r.id+"/reserved")
	case reserved:
		asked.Payout = payOut(r.id)
		state, err := msgpack.Marshal(asked)
		if err != nil {
			return err
		}
		r.state = state
		return h.way.move(ctx, h.pool, r, sent, handMove, state, "")
	case sent:
		if err := msgpack.Unmarshal(r.state, &asked); err != nil {
			return err
		}
		asked.Receipt = receipt
		response, err := msgpack.Marshal(asked)
		if err != nil {
			return err
		}
		r.response = response
		return h.way.move(ctx, h.pool, r, finished, handFinish, response, r.id+"/settled")
	}
	return errors.New("an unknown recovery point")
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

func (w inTransactions) move(ctx context.Context, pool *pgxpool.Pool, r *handRecord, to, sql string, contents []byte, business string) error {
	err := w.transaction(ctx, pool, func(tx pgx.Tx) error {
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
			if err := write(ctx, tx, business); err != nil {
				return err
			}
		}
		tag, err := tx.Exec(ctx, sql, handScope, r.id, r.point, r.lockedAt, to, contents)
		if err == nil && tag.RowsAffected() == 0 {
			return errOvertaken
		}
		return err
	})
	if err == nil {
		r.point = to
	}
	return err
}

// inStatements is the least that four commits take: one statement for each step, which the server commits by itself. The business write has to
// fit into that statement, so it is a bound, and no way to write programs.
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

func (inStatements) move(ctx context.Context, pool *pgxpool.Pool, r *handRecord, to, sql string, contents []byte, business string) error {
	var moved int64
	if business == "" {
		tag, err := pool.Exec(ctx, sql, handScope, r.id, r.point, r.lockedAt, to, contents)
		if err != nil {
			return err
		}
		moved = tag.RowsAffected()
	} else {
		writing := handMoveWriting
		if sql == handFinish {
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
	r.point = to
	return nil
}
