package postgres

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"example.com/keystate"
	"github.com/jackc/pgx/v5"
)

// From one machine to many: the keys of a bbolt file move into the tables, with the identity from which their tokens come, so that what
// is under way there goes on here under the same tokens.
//
// While they move, the store's row bears a mark instead of an identity, and no engine boots: a request whose key is not here yet would
// be carried out as a new one. Each batch is a transaction that looks for the mark. So the move may break off anywhere, and begin again.

// ErrDiffers: a key of the file, or the keys in all, are not in the database as they should be. Nothing was overwritten.
var ErrDiffers = errors.New("keystate/postgres: the database differs from the file")

// ImportOptions tune an [Store.Import]. The zero value, and nil, mean the defaults.
type ImportOptions struct {
	// Keep leaves the file in its place. Then it is the operator's to see to it that no engine ever runs on it again. Default: it is put aside.
	Keep bool

	// Progress is told after each batch. Default: nobody is.
	Progress func(Progress)
}

// Progress is how far an import is: all keys are copied, then all are compared.
type Progress struct {
	Copied, Verified, Total uint64
}

// Import moves all keys of the bbolt file at path into the tables: finished ones with their answers, in their order; unfinished ones as they
// are, to be taken over by the first engine here that has their machine. When it returns nil, every record in the tables has been
// compared with the file. The program's own buckets are the program's to move.
//
// No engine may have the file open, nor boot on the tables until Import is done: [keystate.New] refuses. The tables must be new: their
// store becomes the file's, with its identity. An Import that broke off is run again, and goes on. If an engine was at work on the file in between, it starts
// afresh. One that was done is only compared: with the exception of what has happened here since.
//
// At the end, before the first engine may boot, the file gets the name path.imported, and at path remains a text that no engine opens: two that carry the same keys on, here and
// there, would do everything twice. Windows cannot replace a file that is open; there it takes ImportOptions.Keep.
func (s *Store) Import(ctx context.Context, path string, opts *ImportOptions) error {
	if opts == nil {
		opts = new(ImportOptions)
	}
	switch {
	case s.epoch != 0:
		return errors.New("keystate/postgres: import: an engine has this store")
	case runtime.GOOS == "windows" && !opts.Keep:
		return errors.New("keystate/postgres: import: Windows cannot put the file aside while it is open: set Keep, and move it yourself")
	}
	if err := s.open(); err != nil {
		return err
	}
	if err := s.importFile(ctx, path, *opts); err != nil {
		return fmt.Errorf("keystate/postgres: import %s: %w", path, s.meaning(err))
	}
	return nil
}

func (s *Store) importFile(ctx context.Context, path string, opts ImportOptions) (err error) {
	place, err := placeOf(path)
	if err != nil {
		return err
	}
	file, err := keystate.OpenFile(place.file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	m := &move{store: s, sql: movingStatements(s.options), file: file, told: opts.Progress}
	stage, err := m.begin(ctx)
	if err != nil {
		return err
	}
	if stage == stale {
		if err := m.startAfresh(ctx); err != nil {
			return err
		}
	}
	if stage != arrived {
		if err := m.copy(ctx); err != nil {
			return err
		}
	}
	if err := m.verify(ctx, stage); err != nil {
		return err
	}
	if !opts.Keep {
		if err := place.putAside(); err != nil {
			return err
		}
	}
	if stage == arrived {
		return nil
	}
	return m.arrive(ctx)
}

// A move is one run of an import.
type move struct {
	store *Store
	sql   moving
	file  *keystate.File
	told  func(Progress)
	last  int64 // the number given to the last finished record
	now   int64 // by the server's clock, in microseconds
	at    Progress
}

func (m *move) identity() []byte {
	id := m.file.ID()
	return id[:]
}

// mark stands in the place of the identity while keys move: longer than one, so that no boot takes it for that. It tells the file, and the state of the file.
func (m *move) mark() []byte { return binary.BigEndian.AppendUint64(m.identity(), m.file.Epoch()) }

const markSize = 16 + 8

type stage int

const (
	begun   stage = iota // the tables are the file's, and hold some of its keys, or none
	stale                // they hold keys as they were when the file had another epoch
	arrived              // they hold all, and engines may have been at work since
)

// begin finds out how far the move is, and gives new tables the file's mark.
func (m *move) begin(ctx context.Context) (found stage, err error) {
	err = m.transact(ctx, func(tx pgx.Tx) error {
		var id []byte
		var epoch int64
		var used bool
		if err := tx.QueryRow(ctx, m.sql.state).Scan(&id, &epoch, &used, &m.now); err != nil {
			return err
		}
		moving := len(id) == markSize && bytes.Equal(id[:16], m.identity())
		switch {
		case bytes.Equal(id, m.identity()):
			found = arrived
		case bytes.Equal(id, m.mark()):
			found = begun
		case moving && binary.BigEndian.Uint64(id[16:]) > m.file.Epoch():
			return errors.New("the tables hold keys of a later state of this file: is it a backup?")
		case moving:
			found = stale
		case len(id) == markSize:
			return fmt.Errorf("the tables hold keys of another file, of identity %x, whose import is not done", id[:16])
		case epoch > 0 || used:
			return errors.New("the tables have been in use: a file's keys go into new ones, see Options.Schema")
		default:
			found = begun
			_, err := tx.Exec(ctx, m.sql.mark, m.mark(), int64(m.file.Epoch()))
			return err
		}
		return nil
	})
	return found, err
}

const clearedAtOnce = 5000

// startAfresh deletes what was copied before an engine was at work on the file again. No engine has ever seen it here.
func (m *move) startAfresh(ctx context.Context) error {
	for empty := false; !empty; {
		err := m.transact(ctx, func(tx pgx.Tx) error {
			var id []byte
			if err := tx.QueryRow(ctx, m.sql.lock).Scan(&id); err != nil {
				return err
			}
			if len(id) != markSize || !bytes.Equal(id[:16], m.identity()) {
				return errTaken
			}
			tag, err := tx.Exec(ctx, m.sql.clear, clearedAtOnce)
			if empty = err == nil && tag.RowsAffected() < clearedAtOnce; empty {
				_, err = tx.Exec(ctx, m.sql.mark, m.mark(), int64(m.file.Epoch()))
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

var errTaken = errors.New("another import has been at work on the tables meanwhile")

// transact runs fn in a transaction, again where the connection was lost: whatever it does, doing it twice does no harm.
func (m *move) transact(ctx context.Context, fn func(tx pgx.Tx) error) error {
	return m.store.again(ctx, func() error {
		return pgx.BeginTxFunc(ctx, m.store.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, fn)
	})
}

// arrive puts the identity in the place of the mark: engines may boot.
func (m *move) arrive(ctx context.Context) error {
	return m.transact(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, m.sql.arrive, m.identity(), m.mark())
		if err == nil && tag.RowsAffected() == 0 {
			err = errTaken
		}
		return err
	})
}

// copy puts the file's records into the tables. Finished ones go in their order: from the last that is there, it goes on.
func (m *move) copy(ctx context.Context) error {
	after, err := m.lastCopied(ctx)
	if err != nil {
		return err
	}
	insert := func(batch []keystate.Record) error { return m.insert(ctx, batch) }
	if err := m.unfinished(insert); err != nil {
		return err
	}
	return m.finished(after, insert)
}

// lastCopied is the Sequence in the file of the last finished record that is in the tables already.
func (m *move) lastCopied(ctx context.Context) (sequence uint64, err error) {
	var id, scope []byte
	var there int64
	err = m.store.again(ctx, func() error { return m.store.pool.QueryRow(ctx, m.sql.last).Scan(&id, &scope, &m.last, &there) })
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, m.count()
	}
	if err != nil {
		return 0, err
	}
	m.at.Copied = uint64(there)
	key := keystate.Key{Scope: string(scope), ID: string(id)}
	err = m.file.View(func(k keystate.Keys) error {
		r, err := k.Get(key)
		sequence = r.Sequence
		return err
	})
	if errors.Is(err, keystate.ErrNotFound) || err == nil && sequence == 0 {
		return 0, fmt.Errorf("%w: %s is finished here, and not there", ErrDiffers, key)
	}
	return sequence, cmp.Or(err, m.count())
}

// count finds out how many records there are to move.
func (m *move) count() error {
	return m.file.View(func(k keystate.Keys) error {
		c, err := k.Counts()
		m.at.Total = c.Running + c.Waiting + c.Parked + c.Finished
		return err
	})
}

const (
	recordsAtOnce = 256     // as many as an engine lists at once
	bytesAtOnce   = 4 << 20 // of states, in one statement
)

// unfinished gives all unfinished records of the file to fn, batch by batch.
func (m *move) unfinished(fn func([]keystate.Record) error) error {
	return m.pages(func(k keystate.Keys, last keystate.Record) ([]keystate.Record, error) {
		return k.Unfinished(last.Key, recordsAtOnce)
	}, fn)
}

// finished gives the finished ones after a Sequence to fn.
func (m *move) finished(after uint64, fn func([]keystate.Record) error) error {
	return m.pages(func(k keystate.Keys, last keystate.Record) ([]keystate.Record, error) {
		return k.Finished(max(after, last.Sequence), recordsAtOnce)
	}, fn)
}

func (m *move) pages(next func(k keystate.Keys, last keystate.Record) ([]keystate.Record, error), fn func([]keystate.Record) error) error {
	var last keystate.Record
	for {
		var page []keystate.Record
		err := m.file.View(func(k keystate.Keys) (err error) {
			page, err = next(k, last)
			return err
		})
		if err != nil || len(page) == 0 {
			return err
		}
		last = page[len(page)-1]
		for len(page) > 0 {
			n := fitting(page)
			if err := fn(page[:n]); err != nil {
				return err
			}
			page = page[n:]
		}
	}
}

// fitting is how many of the records go into one statement: at least one.
func fitting(records []keystate.Record) int {
	size := 0
	for i, r := range records {
		if size += len(r.State); size > bytesAtOnce && i > 0 {
			return i
		}
	}
	return len(records)
}

// insert puts records into the tables, and leaves alone what is there.
func (m *move) insert(ctx context.Context, batch []keystate.Record) error {
	c, err := m.columns(batch)
	if err != nil {
		return err
	}
	var inserted int64
	err = m.transact(ctx, func(tx pgx.Tx) error {
		if err := m.hold(ctx, tx); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, m.sql.insert, c.ids, c.scopes, c.machines, c.statuses, c.incarnations, c.versions, c.epochs, c.finished, c.records, newNonce())
		inserted = tag.RowsAffected()
		return err
	})
	if err == nil && inserted < int64(len(batch)) { // of an earlier run, or of a commit whose answer was lost
		_, err = m.compare(ctx, batch, equal)
	}
	if err != nil {
		return err
	}
	m.at.Copied += uint64(len(batch))
	m.tell()
	return nil
}

func (m *move) tell() {
	if m.told != nil {
		m.told(m.at)
	}
}

// hold makes sure that keys are still to move, and that nobody says otherwise before the transaction ends.
func (m *move) hold(ctx context.Context, tx pgx.Tx) error {
	var id []byte
	if err := tx.QueryRow(ctx, m.sql.lock).Scan(&id); err != nil {
		return err
	}
	if !bytes.Equal(id, m.mark()) {
		return errTaken
	}
	return nil
}

// columns are records as a statement takes them.
type columns struct {
	ids, scopes, machines, incarnations, records [][]byte
	statuses                                     []string
	versions, epochs, finished                   []int64
}

func (m *move) columns(batch []keystate.Record) (c columns, err error) {
	for _, r := range batch {
		c.ids, c.scopes = append(c.ids, []byte(r.Key.ID)), append(c.scopes, []byte(r.Key.Scope))
		c.machines, c.statuses = append(c.machines, []byte(r.Machine)), append(c.statuses, string(r.Status))
		c.incarnations = append(c.incarnations, r.Incarnation[:])
		c.versions, c.epochs = append(c.versions, int64(r.Version)), append(c.epochs, int64(r.Epoch))
		c.finished = append(c.finished, m.number(r))
		r.Sequence = 0
		frame, err := r.MarshalBinary()
		if err != nil {
			return c, err
		}
		c.records = append(c.records, frame)
	}
	return c, nil
}

// number is a finished record's place here: by the time when it ended, as if it had done so here, and after those before it. One that ended
// in the future, by a clock that was wrong, has ended now.
func (m *move) number(r keystate.Record) int64 {
	if r.Status != keystate.Answered {
		return 0
	}
	m.last = max(m.last+1, min(r.Ended.UnixMicro(), m.now)*1024)
	return m.last
}

// verify compares every record of the file with the one in the tables.
func (m *move) verify(ctx context.Context, at stage) error {
	same := equal
	if at == arrived {
		same = notBehind
	}
	if err := m.count(); err != nil {
		return err
	}
	m.at.Copied = m.at.Total
	m.last = 0
	compare := func(batch []keystate.Record) error {
		found, err := m.compare(ctx, batch, same)
		if err == nil {
			err = m.ordered(batch, found)
		}
		if err != nil {
			return err
		}
		m.at.Verified += uint64(len(batch))
		m.tell()
		return nil
	}
	if err := cmp.Or(m.unfinished(compare), m.finished(0, compare)); err != nil || at == arrived {
		return err
	}
	var here uint64
	err := m.store.again(ctx, func() error { return m.store.pool.QueryRow(ctx, m.sql.count).Scan(&here) })
	if err == nil && (here != m.at.Verified || here != m.at.Total) {
		err = fmt.Errorf("%w: %d keys are here, %d there", ErrDiffers, here, m.at.Total)
	}
	return err
}

// A duplicate is a record as it is in the tables.
type duplicate struct {
	keystate.Record
	machine, incarnation []byte // of the row
	status               string
}

// compare finds the records in the tables, and asks of each whether it is as it should be.
func (m *move) compare(ctx context.Context, batch []keystate.Record, same func(there keystate.Record, here duplicate) error) (found map[keystate.Key]duplicate, err error) {
	err = m.store.again(ctx, func() (err error) {
		found, err = m.find(ctx, batch)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, there := range batch {
		if err := same(there, found[there.Key]); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrDiffers, there.Key, err)
		}
	}
	return found, nil
}

// ordered checks that finished records have the order that they have in the file.
func (m *move) ordered(batch []keystate.Record, found map[keystate.Key]duplicate) error {
	for _, there := range batch {
		here := int64(found[there.Key].Sequence)
		if here == 0 || there.Sequence == 0 { // it has finished here, or not at all
			continue
		}
		if here <= m.last && found[there.Key].Incarnation == there.Incarnation {
			return fmt.Errorf("%w: %s is finished before others that finished earlier", ErrDiffers, there.Key)
		}
		m.last = here
	}
	return nil
}

// find reads the rows of the records' keys.
func (m *move) find(ctx context.Context, batch []keystate.Record) (map[keystate.Key]duplicate, error) {
	var ids, scopes [][]byte
	for _, r := range batch {
		ids, scopes = append(ids, []byte(r.Key.ID)), append(scopes, []byte(r.Key.Scope))
	}
	rows, err := m.store.pool.Query(ctx, m.sql.find, ids, scopes)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	found := make(map[keystate.Key]duplicate, len(batch))
	for rows.Next() {
		var d duplicate
		var id, scope []byte
		if d.Record, err = record(behind{rows, []any{&id, &scope, &d.machine, &d.status, &d.incarnation}}); err != nil {
			return nil, err
		}
		found[keystate.Key{Scope: string(scope), ID: string(id)}] = d
	}
	return found, rows.Err()
}

// behind is a row without its first columns, which go elsewhere.
type behind struct {
	row   pgx.Row
	first []any
}

func (b behind) Scan(dest ...any) error { return b.row.Scan(append(b.first, dest...)...) }

// equal says whether a record arrived as it was. Its Sequence is another.
func equal(there keystate.Record, here duplicate) error {
	switch {
	case here.Version == 0:
		return errors.New("it is missing")
	case here.Incarnation != there.Incarnation:
		return fmt.Errorf("its incarnation is %x, not %x", here.Incarnation, there.Incarnation)
	case here.Version != there.Version:
		return fmt.Errorf("its version is %d, not %d", here.Version, there.Version)
	case string(here.machine) != there.Machine, here.status != string(there.Status), !bytes.Equal(here.incarnation, there.Incarnation[:]),
		(here.Sequence == 0) != (there.Sequence == 0):
		return errors.New("its columns are not the record's")
	}
	there.Sequence, here.Sequence = 0, 0
	a, err1 := there.MarshalBinary()
	b, err2 := here.MarshalBinary()
	if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
		return cmp.Or(err1, err2, errors.New("its content is another"))
	}
	return nil
}

// notBehind says whether the file knows nothing that the tables do not. What is not there has been reaped or withdrawn since.
func notBehind(there keystate.Record, here duplicate) error {
	switch {
	case here.Version == 0:
	case here.Incarnation == there.Incarnation && here.Version < there.Version,
		here.Incarnation != there.Incarnation && here.Created.Before(there.Created):
		return errors.New("an engine has been at work on the file since the import")
	}
	return nil
}

// moving are the statements of an import.
type moving struct {
	state, mark, arrive, lock string // the store's row
	clear, insert             string
	last, find, count         string
}

func movingStatements(o Options) moving {
	t := tablesOf(o)
	sql := strings.NewReplacer("STORE", t.store, "BOOTS", t.boots, "KEYS", t.keys, "CLOCK", serverTime).Replace
	return moving{
		state: sql(`SELECT id, epoch, EXISTS (SELECT 1 FROM KEYS) OR EXISTS (SELECT 1 FROM BOOTS), (EXTRACT(EPOCH FROM CLOCK) * 1000000)::bigint
			FROM STORE WHERE one FOR UPDATE`),
		mark:   sql(`UPDATE STORE SET id = $1, epoch = GREATEST(epoch, $2) WHERE one`),
		arrive: sql(`UPDATE STORE SET id = $1 WHERE one AND id IN ($1, $2)`),
		lock:   sql(`SELECT id FROM STORE WHERE one FOR UPDATE`),
		clear:  sql(`DELETE FROM KEYS WHERE (id, scope) IN (SELECT id, scope FROM KEYS LIMIT $1)`),
		insert: sql(`INSERT INTO KEYS (id, scope, machine, status, incarnation, version, epoch, finished, nonce, record)
			SELECT id, scope, machine, status, incarnation, version, epoch, NULLIF(finished, 0), $10, record
			FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::text[], $5::bytea[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bytea[])
				AS r (id, scope, machine, status, incarnation, version, epoch, finished, record)
			ON CONFLICT (id, scope) DO NOTHING`),
		last: sql(`SELECT id, scope, finished, (SELECT count(*) FROM KEYS WHERE finished IS NOT NULL)
			FROM KEYS WHERE finished IS NOT NULL ORDER BY finished DESC LIMIT 1`),
		find: sql(`SELECT id, scope, machine, status, incarnation, record, version, epoch, COALESCE(finished, 0)
			FROM unnest($1::bytea[], $2::bytea[]) AS r (of_id, of_scope) JOIN KEYS ON id = of_id AND scope = of_scope`),
		count: sql(`SELECT count(*) FROM KEYS`),
	}
}
