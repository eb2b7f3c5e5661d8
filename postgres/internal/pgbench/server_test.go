package pgbench

import (
	"context"
	"fmt"
	"os"
	"runtime"

	"strings"
	"testing"

	"example.com/keystate/internal/pgtest"
	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// What an operator of a small server sets, and pgtest or PostgreSQL leaves otherwise. That commits wait for the disk, that pages are
// logged in full and how autovacuum works is PostgreSQL's default.
var settings = []struct{ name, value string }{
	{"shared_buffers", "1GB"},
	{"effective_cache_size", "3GB"},
	{"maintenance_work_mem", "512MB"},
	{"max_wal_size", "8GB"},
	{"checkpoint_timeout", "15min"},
	{"random_page_cost", "1.1"},
	{"max_connections", "300"},
}

// startServer starts a server of the benchmark's own. TMPDIR says on which disk.
func startServer(b *testing.B, more ...pgtest.Option) *pgtest.Server {
	b.Helper()
	var opts []pgtest.Option
	for _, s := range settings {
		opts = append(opts, pgtest.Set(s.name, s.value))
	}
	return pgtest.Start(b, append(opts, more...)...)
}

// describe tells on what was measured: the server's settings are asked from the server.
func describe(tb testing.TB, dsn string) string {
	tb.Helper()
	conn := connect(tb, dsn)
	defer conn.Close(context.Background())
	show := func(name string) (value string) {
		if err := conn.QueryRow(tb.Context(), `SELECT current_setting($1)`, name).Scan(&value); err != nil {
			tb.Fatal(err)
		}
		return value
	}
	var text strings.Builder
	fmt.Fprintf(&text, "PostgreSQL %s over a Unix socket, %s, pgx %s, DBOS %s, %d processors for clients and server together\n",
		show("server_version"), runtime.Version(), release(tb, "github.com/jackc/pgx/v5"), release(tb, dbosModule), runtime.NumCPU())
	names := []string{"fsync", "synchronous_commit", "full_page_writes", "wal_level", "wal_sync_method", "commit_delay", "autovacuum", "autovacuum_naptime"}
	for _, s := range settings {
		names = append(names, s.name)
	}
	for i, name := range names {
		if i > 0 {
			text.WriteString(", ")
		}
		fmt.Fprintf(&text, "%s=%s", name, show(name))
	}
	text.WriteString("\n")
	return text.String()
}

// release is the version of a module that go.mod asks for. (A test binary has no build information about its modules.)
func release(tb testing.TB, module string) string {
	tb.Helper()
	file, err := os.ReadFile("go.mod")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(file)) {
		if version, ok := strings.CutPrefix(strings.TrimSpace(line), module+" "); ok {
			return version
		}
	}
	tb.Fatalf("go.mod does not name %s", module)
	return ""
}

func connect(tb testing.TB, dsn string) *pgx.Conn {
	tb.Helper()
	conn, err := pgx.Connect(tb.Context(), dsn)
	if err != nil {
		tb.Fatal(err)
	}
	return conn
}

// execute runs statements that are not measured.
func execute(tb testing.TB, dsn string, statements ...string) {
	tb.Helper()
	conn := connect(tb, dsn)
	defer conn.Close(context.Background())
	for _, sql := range statements {
		if _, err := conn.Exec(tb.Context(), sql); err != nil {
			tb.Fatalf("%s: %v", sql, err)
		}
	}
}
