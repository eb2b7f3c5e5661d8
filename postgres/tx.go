package postgres

import (
	"context"
	"errors"

	"example.com/keystate"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A txn is a transaction of the store: a pgx.Tx for the program, and for the engine what it knows beside it.
//
// Each trip to the server costs time while rows are locked, and the server's own. So BEGIN travels with the first statement, and the
// last write of the engine with COMMIT.
type txn struct {
	tx      pgx.Tx // nil until the first statement
	conn    *line
	options pgx.TxOptions
	store   *Store
	ctx     context.Context
	nonce   []byte         // of this run of the transaction
	last    int64          // the last number given to a finished record
	written []keystate.Key // whose rows bear the nonce
	parting *write         // what goes with COMMIT
	fate    error          // what ended the transaction on the server, or the connection; whatever the program makes of it
	failed  error          // what the last statement that failed was told
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

// begun is the transaction in pgx's own form.
func (t *txn) begun(ctx context.Context) (pgx.Tx, error) {
	if t.ended {
		return nil, pgx.ErrTxClosed
	}
	var err error
	if t.tx == nil {
		t.tx, err = t.conn.BeginTx(ctx, t.options)
	}
	return t.tx, t.heard(err)
}

// leads says whether BEGIN can go with a statement: one with arguments, and no options but a rewriter.
func (t *txn) leads(args []any) bool {
	if t.tx != nil || t.ended || len(args) == 0 {
		return false
	}
	switch args[0].(type) {
	case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		return false
	}
	return true
}

// lead sends BEGIN, with what is queued behind it.
func (t *txn) lead(ctx context.Context, queue func(b *pgx.Batch)) pgx.BatchResults {
	var b pgx.Batch
	b.BeginTx(t.options)
	queue(&b)
	results := t.conn.SendBatch(ctx, &b)
	t.tx = results.Tx()
	results.Exec() // of BEGIN; if it fails, so does what follows
	return results
}

// Exec runs a statement.
func (t *txn) Exec(ctx context.Context, sql string, args ...any) (tag pgconn.CommandTag, err error) {
	if t.leads(args) {
		results := t.lead(ctx, func(b *pgx.Batch) { b.Queue(sql, args...) })
		tag, err = results.Exec()
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
	if t.leads(args) {
		results := t.lead(ctx, func(b *pgx.Batch) { b.Queue(sql, args...) })
		found, err := results.Query()
		return &rows{Rows: found, txn: t, results: results}, t.heard(err)
	}
	tx, err := t.begun(ctx)
	if err != nil {
		return pgx.FailedBatchResults(new(pgx.Batch), err).Query()
	}
	found, err := tx.Query(ctx, sql, args...)
	return &rows{Rows: found, txn: t}, t.heard(err)
}

// QueryRow runs a statement that returns a row.
func (t *txn) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	found, _ := t.Query(ctx, sql, args...)
	return oneRow{found}
}

// SendBatch sends several statements at once.
func (t *txn) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if t.tx == nil && !t.ended {
		return t.lead(ctx, func(all *pgx.Batch) { all.QueuedQueries = append(all.QueuedQueries, b.QueuedQueries...) })
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

// commit commits, with the last write if there is one.
func (t *txn) commit(ctx context.Context) error {
	switch {
	case t.ended:
		return pgx.ErrTxClosed
	case t.parting != nil:
		return t.part(ctx)
	case t.tx != nil:
		t.ended = true
		return t.tx.Commit(ctx)
	}
	return nil
}

// part sends the last write and COMMIT: where the write fails, the server does not get as far as the commit.
func (t *txn) part(ctx context.Context) error {
	queue := func(b *pgx.Batch) {
		b.Queue(t.parting.sql, t.parting.args...)
		b.Queue("commit")
	}
	var results pgx.BatchResults
	if t.tx == nil {
		results = t.lead(ctx, queue)
	} else {
		var b pgx.Batch
		queue(&b)
		results = t.tx.SendBatch(ctx, &b)
	}
	if _, err := t.parting.result(results.QueryRow()); err != nil {
		results.Close()
		return err
	}
	tag, err := results.Exec()
	if err = firstOf(err, results.Close()); err != nil {
		return err
	}
	t.ended = true
	if tag.String() == "ROLLBACK" {
		return pgx.ErrTxCommitRollback
	}
	return nil
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
