package pgtest

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestFailoverKeepsAllThatWasAcknowledged(t *testing.T) {
	t.Parallel()
	pair := StartPair(t)
	dsn := pair.Database(t)
	conn := connect(t, dsn)
	exec1(t, conn, "CREATE TABLE t (n int PRIMARY KEY)")

	acknowledged := make(chan int)
	go func() {
		n := 0
		for ; ; n++ {
			if _, err := conn.Exec(context.Background(), "INSERT INTO t VALUES ($1)", n); err != nil {
				break
			}
			if n == 50 {
				acknowledged <- n // the primary dies from here on
			}
		}
		acknowledged <- n
	}()
	<-acknowledged
	if err := pair.Primary.Kill(); err != nil {
		t.Fatal(err)
	}
	n := <-acknowledged
	if err := pair.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn = connect(t, dsn)
	if kept := count(t, conn, "SELECT count(*) FROM t WHERE n < $1", n); kept != n {
		t.Errorf("of %d acknowledged rows, %d are there", n, kept)
	}
	exec1(t, conn, "INSERT INTO t VALUES (-1)")
}

func TestPairAcknowledgesNothingWithoutItsStandby(t *testing.T) {
	t.Parallel()
	pair := StartPair(t, FsyncOff)
	dsn := pair.Database(t)
	conn, other := connect(t, dsn), connect(t, dsn)
	exec1(t, conn, "CREATE TABLE t (n int)")
	if err := pair.Standby.Kill(); err != nil {
		t.Fatal(err)
	}
	inserted := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "INSERT INTO t VALUES (1)")
		inserted <- err
	}()
	eventually(t, "the insert waits for the standby", func() bool {
		return count(t, other, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == 1
	})
	select {
	case err := <-inserted:
		t.Fatalf("acknowledged: %v", err)
	default:
	}
	if err := pair.Standby.Restart(); err != nil {
		t.Fatal(err)
	}
	if err := <-inserted; err != nil {
		t.Error(err)
	}
}

func TestWithRemoteApplyTheStandbyShowsWhatWasAcknowledged(t *testing.T) {
	t.Parallel()
	pair := StartPair(t, FsyncOff, RemoteApply)
	conn := connect(t, pair.Database(t))
	exec1(t, conn, "CREATE TABLE t (n int)")
	standby := connect(t, pair.Standby.DSN(conn.Config().Database))
	for n := 1; n <= 100; n++ {
		exec1(t, conn, "INSERT INTO t VALUES ($1)", n)
		if shown := count(t, standby, "SELECT count(*) FROM t"); shown != n {
			t.Fatalf("%d of %d", shown, n)
		}
	}
	if _, err := standby.Exec(t.Context(), "INSERT INTO t VALUES (0)"); codeOf(err) != "25006" {
		t.Errorf("the standby takes a write: %v", err)
	}
}

func TestPairsDSNFindsWhicheverTakesWrites(t *testing.T) {
	t.Parallel()
	pair := StartPair(t, FsyncOff)
	folder := func() (folder string) {
		conn, err := pgx.Connect(t.Context(), pair.DSN("postgres"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if err := conn.QueryRow(t.Context(), "SHOW unix_socket_directories").Scan(&folder); err != nil {
			t.Fatal(err)
		}
		return folder
	}
	if got := folder(); got != pair.Primary.folder {
		t.Errorf("at first %s", got)
	}
	if err := pair.Primary.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := pair.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := folder(); got != pair.Standby.folder {
		t.Errorf("at last %s", got)
	}
}

func TestRejoinedPairFailsOverAgainAndLosesNothing(t *testing.T) {
	t.Parallel()
	pair := StartPair(t, FsyncOff)
	dsn := pair.Database(t)
	first := pair.DSN("postgres")
	exec1(t, connect(t, dsn), "CREATE TABLE t (n int)")
	for n := 1; n <= 3; n++ {
		exec1(t, connect(t, dsn), "INSERT INTO t VALUES ($1)", n)
		if err := pair.Primary.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := pair.Promote(t.Context()); err != nil {
			t.Fatal(err)
		}
		exec1(t, connect(t, dsn), "INSERT INTO t VALUES ($1)", -n)
		if err := pair.Rejoin(t.Context()); err != nil {
			t.Fatal(err)
		}
		if kept := count(t, connect(t, dsn), "SELECT count(*) FROM t"); kept != 2*n {
			t.Errorf("of %d rows, %d are there", 2*n, kept)
		}
	}
	if pair.DSN("postgres") != first {
		t.Error("the DSN has changed")
	}
}
