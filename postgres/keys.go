package postgres

import (
	"cmp"
	"errors"
	"fmt"

	"example.com/keystate"
	"github.com/jackc/pgx/v5"
)

// Keys gives access to the records inside a transaction, and only until it ends.
func (s *Store) Keys(tx pgx.Tx) keystate.Keys {
	t, ok := tx.(*txn)
	if !ok || t.store != s {
		return brokenKeys{errors.New("keystate/postgres: the transaction is none of this store's")}
	}
	return t
}

// record makes a record of a row.
func record(row pgx.Row) (r keystate.Record, err error) {
	var frame []byte
	var version, epoch, finished int64
	if err := row.Scan(&frame, &version, &epoch, &finished); err != nil {
		return r, err
	}
	if err := r.UnmarshalBinary(frame); err != nil {
		return r, err
	}
	r.Version, r.Epoch, r.Sequence = uint64(version), uint64(epoch), uint64(finished)
	return r, nil
}

// Get returns the record of a key, or ErrNotFound.
func (t *txn) Get(key keystate.Key) (keystate.Record, error) {
	r, err := record(t.QueryRow(t.ctx, t.store.sql.get, []byte(key.ID), []byte(key.Scope)))
	if errors.Is(err, pgx.ErrNoRows) {
		return r, keystate.ErrNotFound
	}
	return r, t.store.meaning(err)
}

// A write is a statement by which the engine changes a record. It fails unless it finds the record as its holder left it.
type write struct {
	key  keystate.Key
	sql  string
	args []any
}

// result reads what the statement returns: the number that a finished record got.
func (w *write) result(row pgx.Row) (finished int64, err error) {
	err = row.Scan(&finished)
	if errors.Is(err, pgx.ErrNoRows) || code(err) == invalidText || code(err) == uniqueViolation {
		err = fmt.Errorf("%w: %s", keystate.ErrFenced, w.key)
	}
	return finished, err
}

// write is how a record is stored, and what it is then.
func (t *txn) write(r keystate.Record, insert, update string) (*write, keystate.Record, error) {
	if t.reading {
		return nil, r, errReading
	}
	next := r
	next.Version++
	next.Sequence = 0
	frame, err := next.MarshalBinary()
	if err != nil {
		return nil, r, err
	}
	ends := r.Status == keystate.Answered
	if r.Version == 0 {
		return &write{r.Key, insert, []any{[]byte(r.Key.ID), []byte(r.Key.Scope), []byte(r.Machine), string(r.Status), r.Incarnation[:],
			int64(next.Version), int64(r.Epoch), ends, t.last, t.nonce, frame}}, next, nil
	}
	return &write{r.Key, update, []any{[]byte(r.Key.ID), []byte(r.Key.Scope), string(r.Status), int64(r.Epoch), ends, t.last,
		t.nonce, frame, r.Incarnation[:], int64(r.Version)}}, next, nil
}

// Put stores a record if its holder puts it.
func (t *txn) Put(r *keystate.Record) error {
	w, next, err := t.write(*r, t.store.sql.insert, t.store.sql.update)
	if err != nil {
		return err
	}
	finished, err := w.result(t.QueryRow(t.ctx, w.sql, w.args...))
	if err != nil {
		return t.store.meaning(err)
	}
	t.last = max(t.last, finished)
	t.written = append(t.written, r.Key)
	next.Sequence = uint64(finished)
	*r = next
	return nil
}

// PutLast is Put at the end of a transaction: the record is stored, or found in the hands of another, as the transaction commits.
func (t *txn) PutLast(r *keystate.Record) error {
	w, next, err := t.write(*r, t.store.sql.insertLast, t.store.sql.updateLast)
	if err != nil {
		return err
	}
	t.parting = w
	t.written = append(t.written, r.Key)
	*r = next
	return nil
}

// Check says what keeps the transaction from being committed, though whoever has used it says nothing of it.
func (t *txn) Check() error {
	conn := t.conn.Conn().PgConn()
	switch {
	case t.fate != nil:
		return t.fate
	case t.ended:
		return errOwnRollback
	case t.tx == nil || conn.IsClosed():
		return nil // what will be, the commit says
	case conn.IsBusy():
		return errOpenRows
	}
	switch conn.TxStatus() {
	case 'T':
		return nil
	case 'E':
		return fmt.Errorf("%w: %w", errHidden, cmp.Or(t.failed, errUnnamed))
	}
	return errOwnSQL
}

// What a phase may do to its transaction and say nothing of.
var (
	errHidden      = errors.New("keystate/postgres: the phase goes on after an SQL error, with which the server has undone its transaction; a part that may fail is to be run in tx.Begin")
	errUnnamed     = errors.New("it was seen by a batch or a part of the transaction only")
	errOpenRows    = errors.New("keystate/postgres: the phase has left rows open")
	errOwnRollback = errors.New("keystate/postgres: the phase has rolled its transaction back")
	errOwnSQL      = errors.New("keystate/postgres: the phase has ended its transaction by SQL")
)

// Delete removes a finished record if its holder does.
func (t *txn) Delete(r keystate.Record) error {
	if t.reading {
		return errReading
	}
	tag, err := t.Exec(t.ctx, t.store.sql.erase, []byte(r.Key.ID), []byte(r.Key.Scope), r.Incarnation[:], int64(r.Version))
	if err != nil {
		return t.store.meaning(err)
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("%w: %s", keystate.ErrFenced, r.Key)
	}
	return nil
}

// Unfinished lists records that are not finished, by their keys.
func (t *txn) Unfinished(after keystate.Key, limit int) ([]keystate.Record, error) {
	return t.list(t.store.sql.unfinished, []byte(after.ID), []byte(after.Scope), limit)
}

// Finished lists finished records in the order of finishing.
func (t *txn) Finished(after uint64, limit int) ([]keystate.Record, error) {
	if int64(after) < 0 { // there is none so great
		return nil, nil
	}
	return t.list(t.store.sql.finished, int64(after), limit)
}

func (t *txn) list(sql string, args ...any) (records []keystate.Record, err error) {
	rows, err := t.Query(t.ctx, sql, args...)
	if err != nil {
		return nil, t.store.meaning(err)
	}
	defer rows.Close()
	for rows.Next() {
		r, err := record(rows)
		if err != nil {
			return nil, t.store.meaning(err)
		}
		records = append(records, r)
	}
	return records, t.store.meaning(rows.Err())
}

// Counts counts the records; that takes the longer, the more there are.
func (t *txn) Counts() (c keystate.Counts, err error) {
	rows, err := t.Query(t.ctx, t.store.sql.counts)
	if err != nil {
		return c, t.store.meaning(err)
	}
	defer rows.Close()
	for rows.Next() {
		var status string
		var n int64
		if err := rows.Scan(&status, &n); err != nil {
			return c, t.store.meaning(err)
		}
		switch keystate.Status(status) {
		case keystate.Running:
			c.Running = uint64(n)
		case keystate.Waiting:
			c.Waiting = uint64(n)
		case keystate.Parked:
			c.Parked = uint64(n)
		case keystate.Answered:
			c.Finished = uint64(n)
		default:
			return c, fmt.Errorf("%w: the status %q", keystate.ErrCorrupt, status)
		}
	}
	return c, t.store.meaning(rows.Err())
}

var errReading = errors.New("keystate/postgres: a View cannot write")

// brokenKeys are the keys of a transaction that has none.
type brokenKeys struct{ err error }

func (b brokenKeys) Get(keystate.Key) (keystate.Record, error)               { return keystate.Record{}, b.err }
func (b brokenKeys) Put(*keystate.Record) error                              { return b.err }
func (b brokenKeys) Delete(keystate.Record) error                            { return b.err }
func (b brokenKeys) Unfinished(keystate.Key, int) ([]keystate.Record, error) { return nil, b.err }
func (b brokenKeys) Finished(uint64, int) ([]keystate.Record, error)         { return nil, b.err }
func (b brokenKeys) Counts() (keystate.Counts, error)                        { return keystate.Counts{}, b.err }
