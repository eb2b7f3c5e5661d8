package pgtest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
)

const databasePrefix = "pgtest_"

// The server that the tests of a package share, made when the first asks for it.
var shared struct {
	opts []Option
	once sync.Once

	server *Server // nil: it is another's, or there is none
	dsn    string
	err    error
}

// Main runs a package's tests from its TestMain, with these options for the server that they share, and ends it after
// them. A package whose server needs no options can do without.
func Main(m *testing.M, opts ...Option) {
	shared.opts = opts
	m.Run()
	if err := errors.Join(endShared(), dropSeeds()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func endShared() error {
	templates.Lock()
	defer templates.Unlock()
	if shared.server != nil {
		return shared.server.close()
	}
	var failed error
	for key, name := range templates.names {
		failed = errors.Join(failed, dropDatabase(key.dsn, name))
	}
	return failed
}

func startShared() {
	if shared.dsn = os.Getenv(dsnVariable); shared.dsn != "" {
		return
	}
	if shared.server, shared.err = start(shared.opts); shared.err == nil {
		shared.dsn = shared.server.DSN("postgres")
	}
}

// Database makes an empty database that goes with the test, on the server that the package's tests share, and returns
// its DSN.
func Database(t testing.TB) string {
	t.Helper()
	return sharedDatabase(t, nil)
}

// A Template is what databases are copied from, so that many tests share the work of setting one up.
type Template struct {
	fill func(ctx context.Context, dsn string) error
}

// NewTemplate makes a template that fill sets up, once for each server.
func NewTemplate(fill func(ctx context.Context, dsn string) error) *Template {
	return &Template{fill: fill}
}

// Database makes a copy that goes with the test, on the server that the package's tests share, and returns its DSN.
func (tmpl *Template) Database(t testing.TB) string {
	t.Helper()
	return sharedDatabase(t, tmpl)
}

func sharedDatabase(t testing.TB, tmpl *Template) string {
	t.Helper()
	shared.once.Do(startShared)
	if shared.err != nil {
		unavailable(t, shared.err)
	}
	name := createDatabase(t, shared.dsn, tmpl)
	var logged int64
	if shared.server != nil {
		logged = shared.server.logSize()
	}
	t.Cleanup(func() {
		t.Helper()
		if t.Failed() && shared.server != nil {
			shared.server.report(t, logged, name)
		}
		if err := dropDatabase(shared.dsn, name); err != nil {
			t.Error(err)
		}
	})
	return withDatabase(shared.dsn, name)
}

// Database makes an empty database on the server, and returns its DSN.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	return s.DSN(createDatabase(t, s.DSN("postgres"), nil))
}

// DatabaseFrom makes a copy of a template on the server, and returns its DSN.
func (s *Server) DatabaseFrom(t testing.TB, tmpl *Template) string {
	t.Helper()
	return s.DSN(createDatabase(t, s.DSN("postgres"), tmpl))
}

func createDatabase(t testing.TB, dsn string, tmpl *Template) string {
	t.Helper()
	source := "template1"
	if tmpl != nil {
		filled, err := tmpl.on(t.Context(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		source = filled
	}
	name := newName()
	if err := copyDatabase(t.Context(), dsn, name, source); err != nil {
		t.Fatal(err)
	}
	return name
}

func newName() string { return databasePrefix + strings.ToLower(rand.Text()[:16]) }

func copyDatabase(ctx context.Context, dsn, name, source string) error {
	err := onConn(ctx, dsn, func(conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "CREATE DATABASE "+name+" TEMPLATE "+source)
		return err
	})
	if err != nil {
		return fmt.Errorf("pgtest: make a database: %w", err)
	}
	return nil
}

// dropDatabase puts out whoever is still connected.
func dropDatabase(dsn, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := onConn(ctx, dsn, func(conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "DROP DATABASE "+name+" WITH (FORCE)")
		return err
	})
	if err != nil {
		return fmt.Errorf("pgtest: drop database %s: %w", name, err)
	}
	return nil
}

type templateKey struct {
	template *Template
	dsn      string
}

var templates = struct {
	sync.Mutex
	names map[templateKey]string
}{names: map[templateKey]string{}}

// on returns the name of the template's database on a server.
func (tmpl *Template) on(ctx context.Context, dsn string) (string, error) {
	templates.Lock()
	defer templates.Unlock()
	key := templateKey{template: tmpl, dsn: dsn}
	if name, ok := templates.names[key]; ok {
		return name, nil
	}
	name := newName()
	if err := copyDatabase(ctx, dsn, name, "template1"); err != nil {
		return "", err
	}
	if err := tmpl.fill(ctx, withDatabase(dsn, name)); err != nil {
		return "", errors.Join(fmt.Errorf("pgtest: fill a template: %w", err), dropDatabase(dsn, name))
	}
	templates.names[key] = name
	return name, nil
}

// With is a DSN, a URL or keywords and values, with a parameter set: application_name, statement_timeout, whatever a
// DSN may have.
func With(dsn, parameter, value string) string {
	u, ok := asURL(dsn)
	if !ok {
		return dsn + " " + parameter + "=" + value // the last one counts
	}
	query := u.Query()
	query.Set(parameter, value)
	u.RawQuery = query.Encode()
	return u.String()
}

// withDatabase is the DSN for another database of the same server.
func withDatabase(dsn, name string) string { return With(dsn, "dbname", name) }

// withAddress is the DSN for the same database by way of another address, without encryption.
func withAddress(dsn, host, port string) string {
	return With(With(With(dsn, "host", host), "port", port), "sslmode", "disable")
}

func asURL(dsn string) (*url.URL, bool) {
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return nil, false
	}
	u, err := url.Parse(dsn)
	return u, err == nil
}
