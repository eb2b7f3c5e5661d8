package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"example.com/keystate/internal/pgtest"
	"github.com/jackc/pgx/v5"
)

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

// A server is PostgreSQL, for as long as the program runs.
type server struct {
	*pgtest.Server
	life *life
	pid  int // of its first process; 0 if it is not known
}

// startServer starts PostgreSQL; where there is none, it says so with errNoServer.
func startServer(opts ...pgtest.Option) (*server, error) {
	s := &server{life: &life{}}
	for _, o := range settings {
		opts = append(opts, pgtest.Set(o.name, o.value))
	}
	if err := s.life.attempt(func(t testing.TB) { s.Server = pgtest.Start(t, opts...) }); err != nil {
		return nil, err
	}
	return s, onServerConn(s.DSN("postgres"), func(ctx context.Context, conn *pgx.Conn) error {
		var file string
		err := conn.QueryRow(ctx, `SELECT pg_read_file('postmaster.pid')`).Scan(&file)
		first, _, _ := strings.Cut(file, "\n")
		s.pid, _ = strconv.Atoi(first)
		return err
	})
}

var errNoServer = errors.New("there is no PostgreSQL")

// database makes an empty one.
func (s *server) database() (dsn string, err error) {
	err = s.life.attempt(func(t testing.TB) { dsn = s.Server.Database(t) })
	return dsn, err
}

// figures are what the server has counted, when nobody is connected any more.
func (s *server) figures(dsn string) (f pgtest.Figures, err error) {
	err = s.life.attempt(func(t testing.TB) { f = pgtest.TakeFigures(t, dsn) })
	return f, err
}

// proxied counts what goes over the connections while fn works at another address.
func (s *server) proxied(dsn string, fn func(p *pgtest.Proxy) error) error {
	l := &life{}
	err := l.attempt(func(t testing.TB) {
		if err := fn(pgtest.NewProxy(t, dsn)); err != nil {
			t.Fatal(err)
		}
	})
	return errors.Join(err, l.end())
}

func (s *server) stop() error { return s.life.end() }

// describe tells on what was measured: the server is asked for its settings.
func (s *server) describe() (text string, err error) {
	names := []string{"server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_level", "wal_sync_method", "autovacuum"}
	for _, o := range settings {
		names = append(names, o.name)
	}
	text = "PostgreSQL over a Unix socket"
	err = onServerConn(s.DSN("postgres"), func(ctx context.Context, conn *pgx.Conn) error {
		for _, name := range names {
			var value string
			if err := conn.QueryRow(ctx, `SELECT current_setting($1)`, name).Scan(&value); err != nil {
				return err
			}
			text += fmt.Sprintf(", %s=%s", name, value)
		}
		return nil
	})
	return text, err
}

// A life is a test's, for the package pgtest, which is made for tests: what it starts ends with the life.
type life struct {
	testing.TB // its private method; what pgtest calls is below
	cleanups   []func()
	failed     error
}

type ended struct{ why error }

// attempt runs fn as a test runs, and returns what made it fail, or be skipped.
func (l *life) attempt(fn func(t testing.TB)) (err error) {
	defer func() {
		switch v := recover().(type) {
		case nil:
			err, l.failed = l.failed, nil
		case ended:
			err, l.failed = v.why, nil
		default:
			panic(v)
		}
	}()
	fn(l)
	return nil
}

func (l *life) end() error {
	return l.attempt(func(testing.TB) {
		for len(l.cleanups) > 0 {
			last := l.cleanups[len(l.cleanups)-1]
			l.cleanups = l.cleanups[:len(l.cleanups)-1]
			last()
		}
	})
}

func (l *life) Helper()                  {}
func (l *life) Name() string             { return "bench" }
func (l *life) Context() context.Context { return context.Background() }
func (l *life) Cleanup(fn func())        { l.cleanups = append(l.cleanups, fn) }
func (l *life) Failed() bool             { return l.failed != nil }
func (l *life) Log(args ...any)          { fmt.Fprintln(os.Stderr, args...) }
func (l *life) Logf(f string, a ...any)  { fmt.Fprintf(os.Stderr, f+"\n", a...) }
func (l *life) Error(args ...any)        { l.failed = errors.Join(l.failed, errors.New(fmt.Sprint(args...))) }
func (l *life) Errorf(f string, a ...any) {
	l.failed = errors.Join(l.failed, fmt.Errorf(f, a...))
}
func (l *life) Fatal(args ...any)         { panic(ended{errors.New(fmt.Sprint(args...))}) }
func (l *life) Fatalf(f string, a ...any) { panic(ended{fmt.Errorf(f, a...)}) }
func (l *life) Skip(args ...any) {
	panic(ended{fmt.Errorf("%w: %s", errNoServer, fmt.Sprint(args...))})
}

// drop removes a database.
func (s *server) drop(dsn string) error {
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		return err
	}
	return onServerConn(s.DSN("postgres"), func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "DROP DATABASE "+config.Database+" WITH (FORCE)")
		return err
	})
}

func (s *server) size(dsn string) (bytes int64, err error) {
	err = onServerConn(dsn, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT pg_database_size(current_database())").Scan(&bytes)
	})
	return bytes, err
}

func onServerConn(dsn string, fn func(ctx context.Context, conn *pgx.Conn) error) error {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	return errors.Join(fn(ctx, conn), conn.Close(ctx))
}
