package pgtest

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Figures are what a server has counted: of its write-ahead log, for all databases; of commits and tables, for one.
type Figures struct {
	WALFlushes int64 // waits for the disk
	WALWrites  int64
	WALRecords int64
	WALBytes   int64
	Commits    int64
	Rollbacks  int64
	Tables     map[string]TableFigures // by schema and name: "public.keys"
}

// TableFigures are a table's.
type TableFigures struct {
	Inserted, Updated, Deleted int64
	HotUpdated                 int64 // without touching an index
	Live, Dead                 int64 // rows, as the server estimates them
	TableBytes, IndexBytes     int64
}

// Since is what was counted after earlier figures were taken. Rows and sizes are differences, too, and may be negative.
func (f Figures) Since(earlier Figures) Figures {
	f.WALFlushes -= earlier.WALFlushes
	f.WALWrites -= earlier.WALWrites
	f.WALRecords -= earlier.WALRecords
	f.WALBytes -= earlier.WALBytes
	f.Commits -= earlier.Commits
	f.Rollbacks -= earlier.Rollbacks
	tables := make(map[string]TableFigures, len(f.Tables))
	for name, table := range f.Tables {
		tables[name] = table.since(earlier.Tables[name])
	}
	f.Tables = tables
	return f
}

func (f TableFigures) since(earlier TableFigures) TableFigures {
	f.Inserted -= earlier.Inserted
	f.Updated -= earlier.Updated
	f.Deleted -= earlier.Deleted
	f.HotUpdated -= earlier.HotUpdated
	f.Live -= earlier.Live
	f.Dead -= earlier.Dead
	f.TableBytes -= earlier.TableBytes
	f.IndexBytes -= earlier.IndexBytes
	return f
}

// TakeFigures reads what a server has counted. A connection hands its counts over at most once a second, and for
// certain when it ends: TakeFigures waits until no other is connected to the database, so close the pool first.
func TakeFigures(t testing.TB, dsn string) Figures {
	t.Helper()
	f, err := takeFigures(t.Context(), dsn)
	if err != nil {
		t.Fatalf("pgtest: figures: %v", err)
	}
	return f
}

func takeFigures(ctx context.Context, dsn string) (Figures, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	f := Figures{Tables: map[string]TableFigures{}}
	err := onConn(ctx, dsn, func(conn *pgx.Conn) error {
		if err := awaitAlone(ctx, conn); err != nil {
			return err
		}
		var version int
		if err := conn.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&version); err != nil {
			return err
		}
		if err := conn.QueryRow(ctx, walQuery(version)).
			Scan(&f.WALFlushes, &f.WALWrites, &f.WALRecords, &f.WALBytes); err != nil {
			return err
		}
		err := conn.QueryRow(ctx, `SELECT xact_commit, xact_rollback FROM pg_stat_database
			WHERE datname = current_database()`).Scan(&f.Commits, &f.Rollbacks)
		if err != nil {
			return err
		}
		return f.takeTables(ctx, conn)
	})
	return f, err
}

func awaitAlone(ctx context.Context, conn *pgx.Conn) error {
	for {
		var others int
		err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
			AND backend_type IN ('client backend', 'autovacuum worker') AND pid <> pg_backend_pid()`).Scan(&others)
		if err != nil || others == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d others are connected to the database: close them first", others)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// walQuery asks for flushes, writes, records and bytes. Version 18 has moved the first two from pg_stat_wal to
// pg_stat_io.
func walQuery(version int) string {
	if version < 180000 {
		return "SELECT wal_sync, wal_write, wal_records, wal_bytes::bigint FROM pg_stat_wal"
	}
	return `SELECT io.flushes, io.writes, wal_records, wal_bytes::bigint FROM pg_stat_wal,
		(SELECT coalesce(sum(fsyncs), 0)::bigint AS flushes, coalesce(sum(writes), 0)::bigint AS writes
		 FROM pg_stat_io WHERE object = 'wal') AS io`
}

func (f *Figures) takeTables(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, `SELECT schemaname || '.' || relname, n_tup_ins, n_tup_upd, n_tup_del, n_tup_hot_upd,
		n_live_tup, n_dead_tup, pg_table_size(relid), pg_indexes_size(relid) FROM pg_stat_user_tables`)
	if err != nil {
		return err
	}
	var name string
	var table TableFigures
	_, err = pgx.ForEachRow(rows, []any{&name, &table.Inserted, &table.Updated, &table.Deleted, &table.HotUpdated,
		&table.Live, &table.Dead, &table.TableBytes, &table.IndexBytes}, func() error {
		f.Tables[name] = table
		return nil
	})
	return err
}
