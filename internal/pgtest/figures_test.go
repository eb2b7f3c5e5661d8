package pgtest

import (
	"context"
	"testing"
)

func TestFiguresCountFlushesCommitsAndHotUpdates(t *testing.T) {
	t.Parallel()
	s := Start(t)
	dsn := s.Database(t)
	conn := connect(t, dsn)
	exec1(t, conn, "CREATE TABLE t (id int PRIMARY KEY, n int, indexed int)"+
		"WITH (fillfactor = 50, autovacuum_enabled = off)")
	exec1(t, conn, "CREATE INDEX ON t (indexed)")
	exec1(t, conn, "INSERT INTO t SELECT i, 0, 0 FROM generate_series(1, 10) i")
	conn.Close(t.Context())
	before := TakeFigures(t, dsn)

	conn = connect(t, dsn)
	const updates = 20
	for i := range updates {
		exec1(t, conn, "UPDATE t SET n = n + 1 WHERE id = $1", i%10+1)
	}
	for i := range 5 {
		exec1(t, conn, "UPDATE t SET indexed = indexed + 1 WHERE id = $1", i+1)
	}
	exec1(t, conn, "DELETE FROM t WHERE id = 10")
	exec1(t, conn, "BEGIN")
	exec1(t, conn, "UPDATE t SET n = 0")
	exec1(t, conn, "ROLLBACK")
	conn.Close(t.Context())

	after := TakeFigures(t, dsn)
	got, table := after.Since(before), after.Since(before).Tables["public.t"]
	if got.WALFlushes < updates+6 || got.WALFlushes > 2*(updates+6) ||
		got.WALWrites < updates || got.WALRecords < 2*updates || got.WALBytes < 1000 {
		t.Errorf("of the log: %+v", got)
	}
	if got.Commits < updates+6 || got.Rollbacks != 1 {
		t.Errorf("%d commits, %d rollbacks", got.Commits, got.Rollbacks)
	}
	if table.HotUpdated != updates+9 || table.Updated != updates+5+9 || table.Deleted != 1 || table.Inserted != 0 {
		t.Errorf("of rows: %+v", table)
	}
	whole := after.Tables["public.t"]
	if whole.Dead < 5 || whole.Live != 9 || whole.TableBytes < 8192 || whole.IndexBytes < 2*8192 {
		t.Errorf("as it is: %+v", whole)
	}
}

func TestFiguresWaitForConnectionsToEnd(t *testing.T) {
	dsn := withTable.Database(t)
	conn := connect(t, dsn)
	taken := make(chan Figures, 1)
	go func() {
		f, err := takeFigures(context.Background(), dsn)
		if err != nil {
			t.Error(err)
		}
		taken <- f
	}()
	eventually(t, "they are being taken", func() bool {
		return count(t, conn, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()") == 2
	})
	exec1(t, conn, "INSERT INTO t VALUES (1), (2), (3)")
	conn.Close(t.Context())
	if f := <-taken; f.Tables["public.t"].Inserted != 3 {
		t.Errorf("they are %+v", f)
	}
}

func TestFiguresAreAskedForWhereTheVersionHasThem(t *testing.T) {
	if walQuery(150000) != walQuery(179999) || walQuery(179999) == walQuery(180000) {
		t.Error("pg_stat_io has the log since 18")
	}
}
