package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"testing"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"example.com/keystate/keytest"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) { pgtest.Main(m, pgtest.FsyncOff) }

// schemaOf is where the store lives that a test keeps in a directory.
func schemaOf(dir string) string {
	h := fnv.New64a()
	h.Write([]byte(dir))
	return fmt.Sprintf("s_%x", h.Sum64())
}

func TestStore(t *testing.T) {
	dsn := pgtest.Database(t)
	keytest.Store(t, func(t testing.TB, dir string) keystate.Store[pgx.Tx] {
		schema := schemaOf(dir) // and the program's rows with it
		return openStore(t, pgtest.With(dsn, "search_path", schema), &postgres.Options{Schema: schema})
	}, rows)
}

// openStore opens a store, and makes the program's table beside it.
func openStore(t testing.TB, dsn string, o *postgres.Options) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(t.Context(), dsn, o)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `CREATE TABLE IF NOT EXISTS program_rows (name text PRIMARY KEY, value text NOT NULL)`); err != nil {
		t.Fatal(err)
	}
	return s
}

// rows are the program's own.
var rows = keytest.Rows[pgx.Tx]{
	Put: func(tx pgx.Tx, name, value string) error {
		_, err := tx.Exec(context.Background(), `INSERT INTO program_rows VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
		return err
	},
	Get: func(tx pgx.Tx, name string) (value string, found bool, err error) {
		err = tx.QueryRow(context.Background(), `SELECT value FROM program_rows WHERE name = $1`, name).Scan(&value)
		if errors.Is(err, pgx.ErrNoRows) {
			return "", false, nil
		}
		return value, err == nil, err
	},
}
