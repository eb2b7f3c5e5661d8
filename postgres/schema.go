package postgres

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// version is that of the tables as this release makes them.
const version = 1

// Schema returns the statements that make the tables, for programs that migrate by themselves. They may be run any number of times. It uses a narrow part of
// SQL, which CockroachDB, YugabyteDB and Aurora have, too: no sequences, no foreign keys, no advisory locks, no triggers.
func Schema(opts *Options) ([]string, error) {
	o, err := opts.orDefault()
	if err != nil {
		return nil, err
	}
	t := tablesOf(o)
	return []string{
		`CREATE SCHEMA IF NOT EXISTS ` + t.schema,

		// One row: which store this is, and the epoch of its last boot.
		`CREATE TABLE IF NOT EXISTS ` + t.store + ` (
			one     boolean PRIMARY KEY CHECK (one),
			id      bytea   NOT NULL,
			version integer NOT NULL,
			epoch   bigint  NOT NULL
		)`,

		// A row for each boot: until when it counts as alive.
		`CREATE TABLE IF NOT EXISTS ` + t.boots + ` (
			epoch       bigint      PRIMARY KEY,
			alive_until timestamptz NOT NULL
		)`,

		// A row for each key. What stands in columns of its own is what statements look at, and what they change without reading the
		// record; there it is authoritative.
		`CREATE TABLE IF NOT EXISTS ` + t.keys + ` (
			id          bytea  NOT NULL,
			scope       bytea  NOT NULL,
			machine     bytea  NOT NULL,
			status      text   NOT NULL,
			incarnation bytea  NOT NULL,
			version     bigint NOT NULL,
			epoch       bigint NOT NULL,
			finished    bigint,
			nonce       bytea  NOT NULL,
			record      bytea  NOT NULL,
			PRIMARY KEY (id, scope)
		)`,
		`CREATE INDEX IF NOT EXISTS ` + t.index("unfinished") + ` ON ` + t.keys + ` (id, scope) WHERE finished IS NULL`,
		`CREATE INDEX IF NOT EXISTS ` + t.index("finished") + ` ON ` + t.keys + ` (finished) WHERE finished IS NOT NULL`,
	}, nil
}

// Migrate makes the tables, or brings those of an earlier release up to this one. It may be run any number of times, also by several
// processes at once.
func Migrate(ctx context.Context, pool *pgxpool.Pool, opts *Options) error {
	o, err := opts.orDefault()
	if err != nil {
		return err
	}
	found, err := installed(ctx, pool, o)
	switch {
	case err != nil:
		return fmt.Errorf("keystate/postgres: look for the tables: %w", err)
	case found > version:
		return fmt.Errorf("keystate/postgres: the tables are of version %d, this release knows %d", found, version)
	case found == version:
		return nil
	}
	statements, err := Schema(&o)
	if err != nil {
		return err
	}
	for _, sql := range statements {
		if err := insist(ctx, func() error { _, err := pool.Exec(ctx, sql); return err }); err != nil {
			return fmt.Errorf("keystate/postgres: make the tables: %w", err)
		}
	}
	sql := statementsFor(o)
	if _, err := pool.Exec(ctx, sql.found, newNonce(), version); err != nil {
		return fmt.Errorf("keystate/postgres: make the tables: %w", err)
	}
	return nil
}

// insist runs a statement again that another process, doing the same, has got in the way of: IF NOT EXISTS is no lock.
func insist(ctx context.Context, do func() error) (err error) {
	for range 5 {
		if err = do(); err == nil || !madeMeanwhile(err) || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// installed is the version of the tables that are there, or 0.
func installed(ctx context.Context, pool *pgxpool.Pool, o Options) (found int, err error) {
	err = pool.QueryRow(ctx, `SELECT version FROM `+tablesOf(o).store).Scan(&found)
	if err == pgx.ErrNoRows || missing(err) {
		return 0, nil
	}
	return found, err
}

// tables are names as SQL takes them.
type tables struct {
	schema, store, boots, keys string
	prefix                     string
}

func tablesOf(o Options) tables {
	name := func(table string) string { return pgx.Identifier{o.Schema, o.Prefix + table}.Sanitize() }
	return tables{
		schema: pgx.Identifier{o.Schema}.Sanitize(), prefix: o.Prefix,
		store: name("store"), boots: name("boots"), keys: name("keys"),
	}
}

func (t tables) index(name string) string {
	return pgx.Identifier{t.prefix + "keys_" + name}.Sanitize()
}

// statements are all that is said to the server.
type statements struct {
	found, boot, enter         string // the store's row; a boot
	renew, leave, alive, now   string // its lease
	get, insert, update, erase string // a record
	insertLast, updateLast     string // … as a transaction commits
	unfinished, finished       string // pages
	counts                     string
	orphans, adopt             string
	settle, nonceOf            string
	reaping
}

// now is the server's clock, in whatever transaction.
const serverTime = `clock_timestamp()`

// next is a number for a record that finishes: microseconds of the server's clock and ten random bits, greater than $%d.
const sequence = `GREATEST((EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint * 1024 + floor(random() * 1024)::bigint, %s + 1)`

func statementsFor(o Options) statements {
	t := tablesOf(o)
	columns := `record, version, epoch, COALESCE(finished, 0)`
	sql := func(text string, more ...string) string {
		return strings.NewReplacer(append([]string{"STORE", t.store, "BOOTS", t.boots, "KEYS", t.keys, "COLUMNS", columns, "CLOCK", serverTime}, more...)...).Replace(text)
	}
	s := statements{
		found: sql(`INSERT INTO STORE (one, id, version, epoch) VALUES (true, $1, $2, 0) ON CONFLICT DO NOTHING`),
		boot:  sql(`UPDATE STORE SET epoch = epoch + 1 WHERE one RETURNING id, epoch`),
		enter: sql(`INSERT INTO BOOTS (epoch, alive_until) VALUES ($1, CLOCK + $2::bigint * interval '1 microsecond')`),
		renew: sql(`INSERT INTO BOOTS (epoch, alive_until) VALUES ($1, CLOCK + $2::bigint * interval '1 microsecond') ON CONFLICT (epoch) DO UPDATE SET alive_until = excluded.alive_until`),
		leave: sql(`DELETE FROM BOOTS WHERE epoch = $1`),
		alive: sql(`SELECT count(*) FROM BOOTS WHERE epoch = $1 AND alive_until > CLOCK`),

		now: sql(`SELECT CLOCK`),

		get: sql(`SELECT COLUMNS FROM KEYS WHERE id = $1 AND scope = $2`),
		insert: sql(`INSERT INTO KEYS (id, scope, machine, status, incarnation, version, epoch, finished, nonce, record)
			VALUES ($1, $2, $3, $4, $5, $6, $7, CASE WHEN $8 THEN SEQUENCE END, $10, $11) UNLESS RETURNING COALESCE(finished, 0) AS finished`,
			"SEQUENCE", fmt.Sprintf(sequence, "$9::bigint")),
		// COALESCE keeps the planner from the index of the unfinished, which is full of those that were until just now.
		update: sql(`UPDATE KEYS SET status = $3, version = version + 1, epoch = $4, finished = CASE WHEN $5 THEN SEQUENCE END, nonce = $7, record = $8
			WHERE id = $1 AND scope = $2 AND incarnation = $9 AND version = $10 AND COALESCE(finished, 0) = 0 RETURNING COALESCE(finished, 0) AS finished`,
			"SEQUENCE", fmt.Sprintf(sequence, "$6::bigint")),
		// As update, for a transaction that ends with it. ON CONFLICT finds the row without a predicate lock on its page of the index, on which all keys
		// lie that are at work: with update, transactions at SERIALIZABLE read that page and write to it, all of them, and the server ends many. Where
		// there is no row, what is inserted has the version 0. Neither may get to the commit behind it: what cannot be cast ends the transaction. It depends
		// on the row, or it would be cast when the statement is planned.
		updateLast: sql(`INSERT INTO KEYS AS k (id, scope, machine, status, incarnation, version, epoch, finished, nonce, record)
			VALUES ($1, $2, '', $3, $9, 0, $4, NULL, $7, $8) ON CONFLICT (id, scope) DO UPDATE SET status = excluded.status, version =
			CASE WHEN k.incarnation = excluded.incarnation AND k.version = $10 AND k.finished IS NULL THEN k.version + 1 ELSE FENCED END,
			epoch = excluded.epoch, finished = CASE WHEN $5 THEN SEQUENCE END, nonce = excluded.nonce, record = excluded.record
			RETURNING CASE WHEN k.version > 0 THEN COALESCE(k.finished, 0) ELSE FENCED END AS finished`,
			"SEQUENCE", fmt.Sprintf(sequence, "$6::bigint"), "FENCED", `CAST('keystate: another engine has the key; ' || k.version AS bigint)`),
		erase: sql(`DELETE FROM KEYS WHERE id = $1 AND scope = $2 AND incarnation = $3 AND version = $4 AND finished IS NOT NULL`),

		unfinished: sql(`SELECT COLUMNS FROM KEYS WHERE finished IS NULL AND (id, scope) > ($1, $2) ORDER BY id, scope LIMIT $3`),
		finished:   sql(`SELECT COLUMNS FROM KEYS WHERE finished > $1 ORDER BY finished LIMIT $2`),
		counts:     sql(`SELECT status, count(*) FROM KEYS GROUP BY status`),

		orphans: sql(`SELECT id, scope FROM KEYS WHERE finished IS NULL AND status IN ('running', 'waiting') AND machine = ANY($1)
			AND epoch <> $2 AND EXISTS (SELECT 1 FROM BOOTS WHERE epoch = $2 AND alive_until > CLOCK) AND epoch NOT IN (SELECT epoch FROM BOOTS WHERE alive_until > CLOCK) LIMIT $3 FOR UPDATE SKIP LOCKED`),
		adopt: sql(`UPDATE KEYS SET epoch = $3, version = version + 1, nonce = $4 WHERE id = $1 AND scope = $2 RETURNING COLUMNS`),

		settle: sql(`INSERT INTO KEYS (id, scope, machine, status, incarnation, version, epoch, finished, nonce, record)
			VALUES ($1, $2, '', '', '', 0, 0, NULL, '', '') ON CONFLICT (id, scope) DO NOTHING`),
		nonceOf: sql(`SELECT nonce FROM KEYS WHERE id = $1 AND scope = $2 FOR UPDATE`),
	}
	s.reaping = reapingStatements(o)
	s.insertLast = strings.Replace(s.insert, "UNLESS", "", 1)
	s.insert = strings.Replace(s.insert, "UNLESS", "ON CONFLICT (id, scope) DO NOTHING", 1)
	return s
}
