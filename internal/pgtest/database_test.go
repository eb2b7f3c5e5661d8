package pgtest

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestDatabasesAreIsolated(t *testing.T) {
	one, two := connect(t, Database(t)), connect(t, Database(t))
	for i, conn := range []*pgx.Conn{one, two} {
		exec1(t, conn, "CREATE TABLE t (n int)")
		exec1(t, conn, "INSERT INTO t SELECT generate_series(1, $1::int)", i+1)
	}
	if a, b := count(t, one, "SELECT count(*) FROM t"), count(t, two, "SELECT count(*) FROM t"); a != 1 || b != 2 {
		t.Errorf("%d and %d rows", a, b)
	}
}

func TestDatabaseGoesWithTheTestThoughAConnectionIsOpen(t *testing.T) {
	var name string
	t.Run("test", func(t *testing.T) {
		dsn := Database(t)
		conn, err := pgx.Connect(context.Background(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		name = conn.Config().Database
	})
	if n := count(t, connect(t, Database(t)), "SELECT count(*) FROM pg_database WHERE datname = $1", name); n != 0 {
		t.Errorf("%s is still there", name)
	}
}

func TestTemplateIsFilledOnceAndCopied(t *testing.T) {
	filled := 0
	template := NewTemplate(func(ctx context.Context, dsn string) error {
		filled++
		return onConn(ctx, dsn, func(conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, "CREATE TABLE t AS SELECT 7 AS n")
			return err
		})
	})
	one, two := connect(t, template.Database(t)), connect(t, template.Database(t))
	exec1(t, one, "UPDATE t SET n = 8")
	if a, b := count(t, one, "SELECT n FROM t"), count(t, two, "SELECT n FROM t"); a != 8 || b != 7 || filled != 1 {
		t.Errorf("%d and %d, filled %d times", a, b, filled)
	}
}

func TestTerminatedConnectionGets57P01(t *testing.T) {
	dsn := Database(t)
	victim, other := connect(t, With(dsn, "application_name", "victim")), connect(t, With(dsn, "application_name", "other"))
	slept := make(chan error, 1)
	go func() {
		_, err := victim.Exec(context.Background(), "SELECT pg_sleep(600)")
		slept <- err
	}()
	eventually(t, "the victim sleeps", func() bool {
		return count(t, other, `SELECT count(*) FROM pg_stat_activity
			WHERE wait_event = 'PgSleep' AND application_name = 'victim'`) == 1
	})
	ended, err := Terminate(t.Context(), dsn, "victim")
	if err != nil || ended != 1 {
		t.Fatalf("%d ended: %v", ended, err)
	}
	if err := <-slept; codeOf(err) != "57P01" {
		t.Errorf("the victim sees %v", err)
	}
	exec1(t, other, "SELECT 1")
}

func TestDSNForAnotherDatabaseOrAddress(t *testing.T) {
	for _, dsn := range []string{
		"postgres://u:p@db.example:6000/first?sslmode=require&application_name=app",
		"postgresql://u:p@/first?host=/run/pg&port=6000&dbname=second&application_name=app",
		"user=u password=p host=db.example port=6000 dbname=first application_name=app",
	} {
		config, err := pgx.ParseConfig(withAddress(withDatabase(dsn, "mine"), "127.0.0.1", "7000"))
		if err != nil {
			t.Fatal(err)
		}
		got := fmt.Sprint(config.User, config.Password, config.Host, config.Port, config.Database,
			config.RuntimeParams["application_name"], config.TLSConfig == nil, len(config.Fallbacks))
		if want := fmt.Sprint("u", "p", "127.0.0.1", 7000, "mine", "app", true, 0); got != want {
			t.Errorf("%s: %s, not %s", dsn, got, want)
		}
	}
}

func TestLogIsShownWithoutOtherTestsDatabases(t *testing.T) {
	log := "1 start\n2 pgtest_mine app LOG: a\n" +
		"3 pgtest_other app LOG: b\n\tmore of b\n4 pgtest_mine app LOG: c\n\tmore of c\n5 stop\n"
	want := "1 start\n2 pgtest_mine app LOG: a\n4 pgtest_mine app LOG: c\n\tmore of c\n5 stop\n"
	if got := string(withoutOthers([]byte(log), "pgtest_mine")); got != want {
		t.Errorf("%q", got)
	}
	if got := string(withoutOthers([]byte(log), "")); got != log {
		t.Errorf("of a server of a test's own: %q", got)
	}
}

func TestNewestProgramsAreTakenByNumber(t *testing.T) {
	got := newestFirst([]string{"/lib/pg/9.6/bin", "/lib/pg/15/bin", "/usr/local/pgsql/bin", "/lib/pg/17/bin"})
	want := []string{"/lib/pg/17/bin", "/lib/pg/15/bin", "/lib/pg/9.6/bin", "/usr/local/pgsql/bin"}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}
