package postgres

import (
	"context"
	"errors"
	"fmt"

	"example.com/keystate"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A txn is a transaction of the store: a pgx.Tx for the program, and for the engine what it knows beside it.
//
// Each trip to the server costs time while rows are locked, and the server's own. So BEGIN travels with the first statement, the
// last write of the engine with COMMIT, and what a phase queues with whatever is sent next.
type txn struct {
	tx      pgx.Tx // nil until the first statement
	conn    *line
	options pgx.TxOptions
	store   *Store
	ctx     context.Context
	nonce   []byte         // of this run of the transaction
	last    int64          // the last number given to a finished record
	written []keystate.Key // whose rows bear the nonce
	queued  []*pgx.QueuedQuery
	parting *write // what goes with COMMIT
	fate    error  // what ended the transaction on the server, or the connection; whatever the program makes of it
	failed  error  // what the last statement that failed was told
	reading bool
	ended   bool
}

var errOwnEnd = errors.New("keystate/postgres: the store itself ends the transaction in which a phase commits")

// heard keeps an error with which the transaction has to be run again.
func (t *txn) heard(err error) error {
	if t.fate == nil && (passing(err) || refusesWrites(err) && !t.reading) {
		t.fate = err
	}
	if c := code(err); c != "" && c != inFailedTransaction {
		t.failed = err
	}
	return err
}

// begun is the transaction in pgx's own form; what was queued is done by then.
func (t *txn) begun(ctx context.Context) (pgx.Tx, error) {
	if t.ended {
		return nil, pgx.ErrTxClosed
	}
	var err error
	switch {
	case len(t.queued) > 0:
		var results pgx.BatchResults
		results, err = t.send(ctx, func(*pgx.Batch) {})
		err = firstOf(err, results.Close())
	case t.tx == nil:
		t.tx, err = t.conn.BeginTx(ctx, t.options)
	}
	return t.tx, t.heard(err)
}

// Queue runs a statement whose result a phase does not need: it goes to the server with the next statement of the transaction, or with its
// commit, and spares a trip. If it fails, so does what it goes with; a commit that fails for it is an error of the phase. What has to be true of its effect is for a
// constraint to say, since nobody looks at how many rows it changed. In a transaction that is none of a [Store]'s it is run at once.
func Queue(ctx context.Context, tx pgx.Tx, sql string, args ...any) error {
	t, ok := tx.(*txn)
	if !ok {
		_, err := tx.Exec(ctx, sql, args...)
		return err
	}
	if t.ended {
		return pgx.ErrTxClosed
	}
	t.queued = append(t.queued, &pgx.QueuedQuery{SQL: sql, Arguments: args})
	return nil
}

// follows says whether something is to be sent ahead of a statement, and whether it can go in one trip: with arguments, and no options but a rewriter.
func (t *txn) follows(args []any) bool {
	if t.tx != nil && len(t.queued) == 0 || t.ended || len(args) == 0 {
		return false
	}
	switch args[0].(type) {
	case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		return false
	}
	return true
}

// send sends what there is to send, in one trip: BEGIN, what a phase has queued, and what is queued now, of which the results are returned.
func (t *txn) send(ctx context.Context, queue func(b *pgx.Batch)) (results pgx.BatchResults, err error) {
	var b pgx.Batch
	ahead := t.queued
	t.queued = nil
	if t.tx == nil {
		b.BeginTx(t.options)
	}
	b.QueuedQueries = append(b.QueuedQueries, ahead...)
	queue(&b)
	if t.tx == nil {
		results = t.conn.SendBatch(ctx, &b)
		t.tx = results.Tx()
		results.Exec() // of BEGIN; if it fails, so does what follows
	} else {
		results = t.tx.SendBatch(ctx, &b)
	}
	for range ahead {
		if _, err = results.Exec(); err != nil {
			return results, t.rejected(err)
		}
	}
	return results, nil
}

// Exec runs a statement.
func (t *txn) Exec(ctx context.Context, sql string, args ...any) (tag pgconn.CommandTag, err error) {
	if t.follows(args) {
		results, err := t.send(ctx, func(b *pgx.Batch) { b.Queue(sql, args...) })
		if err == nil {
			tag, err = results.Exec()
		}
		return tag, t.heard(firstOf(err, results.Close()))
	}
	tx, err := t.begun(ctx)
	if err != nil {
		return tag, err
	}
	tag, err = tx.Exec(ctx, sql, args...)
	return tag, t.heard(err)
}

// Query runs a statement that returns rows.
func (t *txn) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if t.follows(args) {
		results, err := t.send(ctx, func(b *pgx.Batch) { b.Queue(sql, args...) })
		if err != nil {
			results.Close()
			return failedRows(err)
		}
		found, err := results.Query()
		return &rows{Rows: found, txn: t, results: results}, t.heard(err)
	}
	tx, err := t.begun(ctx)
	if err != nil {
		return failedRows(err)
	}
	found, err := tx.Query(ctx, sql, args...)
	return &rows{Rows: found, txn: t}, t.heard(err)
}

func failedRows(err error) (pgx.Rows, error) {
	return pgx.FailedBatchResults(new(pgx.Batch), err).Query()
}

// QueryRow runs a statement that returns a row.
func (t *txn) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	found, _ := t.Query(ctx, sql, args...)
	return oneRow{found}
}

// SendBatch sends several statements at once.
func (t *txn) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if (t.tx == nil || len(t.queued) > 0) && !t.ended {
		results, err := t.send(ctx, func(all *pgx.Batch) { all.QueuedQueries = append(all.QueuedQueries, b.QueuedQueries...) })
		if err != nil {
			results.Close()
			return pgx.FailedBatchResults(b, err)
		}
		return results
	}
	tx, err := t.begun(ctx)
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	return tx.SendBatch(ctx, b)
}

// CopyFrom copies rows into a table.
func (t *txn) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, source pgx.CopyFromSource) (int64, error) {
	tx, err := t.begun(ctx)
	if err != nil {
		return 0, err
	}
	n, err := tx.CopyFrom(ctx, table, columns, source)
	return n, t.heard(err)
}

// Begin begins a part of the transaction that can be undone by itself.
func (t *txn) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := t.begun(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Begin(ctx)
}

// Prepare prepares a statement.
func (t *txn) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	tx, err := t.begun(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Prepare(ctx, name, sql)
}

// LargeObjects gives access to the large objects. A panic is the transaction's error.
func (t *txn) LargeObjects() pgx.LargeObjects {
	tx, err := t.begun(t.ctx)
	if err != nil {
		panic(err)
	}
	return tx.LargeObjects()
}

// Conn is the connection, on which the transaction has begun. A panic is the transaction's error.
func (t *txn) Conn() *pgx.Conn {
	if _, err := t.begun(t.ctx); err != nil {
		panic(err)
	}
	return t.conn.Conn()
}

// Commit is the store's.
func (t *txn) Commit(context.Context) error { return errOwnEnd }

// Rollback undoes what was done; Update then fails.
func (t *txn) Rollback(ctx context.Context) error {
	if t.ended {
		return pgx.ErrTxClosed
	}
	t.ended = true
	if t.tx == nil {
		return nil
	}
	return t.tx.Rollback(ctx)
}

// commit sends what is still queued, the last write if there is one, and COMMIT. Where one fails, the server does not get as far as the commit.
func (t *txn) commit(ctx context.Context) error {
	switch {
	case t.ended:
		return pgx.ErrTxClosed
	case t.tx == nil && t.parting == nil && len(t.queued) == 0:
		return nil
	}
	results, err := t.send(ctx, func(b *pgx.Batch) {
		if t.parting != nil {
			b.Queue(t.parting.sql, t.parting.args...)
		}
		b.Queue("commit")
	})
	if err == nil && t.parting != nil {
		_, err = t.parting.result(results.QueryRow())
	}
	if err != nil {
		results.Close()
		return err
	}
	tag, err := results.Exec()
	if err = firstOf(err, results.Close()); faulted(err) {
		err = t.rejected(err)
	}
	if err != nil {
		return err
	}
	t.ended = true
	if tag.String() == "ROLLBACK" {
		return t.rejected(pgx.ErrTxCommitRollback)
	}
	return nil
}

// rejected is the error of a transaction that fails for what the program did in it. One that the server has to be asked for again is none; nor is
// one with which the connection has gone, and perhaps the commit, unless it is known not to have been sent.
func (t *txn) rejected(err error) error {
	t.heard(err)
	var unsent pgx.ErrPreprocessingBatch
	if t.fate != nil || code(err) == "" && t.conn.Conn().PgConn().IsClosed() && !errors.As(err, &unsent) {
		return err
	}
	return fmt.Errorf("%w: %w", keystate.ErrRejected, err)
}

// leave gives the connection back, and undoes what has not been committed.
func (t *txn) leave() {
	if t.tx != nil && t.conn.Conn().PgConn().TxStatus() != 'I' {
		_ = t.tx.Rollback(context.WithoutCancel(t.ctx)) // if it fails, the connection is closed
	}
	t.ended = true
	t.conn.Release()
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// rows are a statement's, perhaps of one that led.
type rows struct {
	pgx.Rows
	txn     *txn
	results pgx.BatchResults
	err     error
}

func (r *rows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

func (r *rows) Close() {
	r.Rows.Close()
	if r.results != nil {
		r.err = r.results.Close()
		r.results = nil
	}
	r.txn.heard(r.Err())
}

func (r *rows) Err() error { return firstOf(r.Rows.Err(), r.err) }

// A oneRow is the first of rows, as pgx.Row.
type oneRow struct{ rows pgx.Rows }

func (o oneRow) Scan(dest ...any) error {
	defer o.rows.Close()
	if !o.rows.Next() {
		return firstOf(o.rows.Err(), pgx.ErrNoRows)
	}
	if err := o.rows.Scan(dest...); err != nil {
		return err
	}
	o.rows.Close()
	return o.rows.Err()
}
