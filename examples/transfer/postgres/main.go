// Postgres is examples/transfer with its keys and books in PostgreSQL, and several workers at a time that share them.
//
//	go run -C examples/transfer/postgres . -store postgres://…
//
// starts a payment processor and three workers, each in a process of its own. Each transfer is asked of two workers at the same time. The
// workers are killed with SIGKILL at random moments, or told to end, and replaced, while the others go on and take over what they held.
// Some are suspended until their lease has ended, and then go on as if they still held what others have taken over. Then the last ones are asked for everything, and all is counted: every cent, every payout, every receipt, every answer. It exits non-zero
// if one of them is missing, or there twice, or not the same from whichever worker.
//
// All of it is in one schema of the database, which the show makes and, unless -keep, removes.
//
//	main.go   the show on PostgreSQL
//	books.go  the program's tables
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/show"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

var program = show.Program[pgx.Tx]{
	Store:     database{},
	Usage:     "the PostgreSQL database, as `postgres://user@host/name`; the show makes the schema " + schema + " in it",
	Transfers: show.Transfers(),
	Workers:   3,
	Stall:     3 * lease / 2,
}

func main() {
	if err := program.Run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "transfer:", err)
		os.Exit(1)
	}
}

// schema is where the keys and the books are.
const schema = "keystate_transfers"

// lease is how long others wait until they take over what a killed worker held. A program in earnest leaves it at the default: whose
// lease ends while it is only slow, has done its work for nothing.
const lease = time.Second

// A database holds the keys and the books. Its name is its connection string.
type database struct{ tables }

func (database) Check(dsn string) error {
	if dsn == "" {
		return errors.New("-store is needed: the PostgreSQL database, such as -store postgres://user@localhost/name")
	}
	_, err := pgx.ParseConfig(dsn)
	return err
}

func (database) Find(ctx context.Context, dsn string) (what string, err error) {
	err = connected(ctx, dsn, func(c *pgx.Conn) error {
		var name string
		err := c.QueryRow(ctx, `SELECT current_database() FROM pg_namespace WHERE nspname = $1`, schema).Scan(&name)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		what = fmt.Sprintf("the schema %s in the database %s", schema, name)
		return err
	})
	return what, err
}

func (database) Open(ctx context.Context, dsn string, opts *keystate.Options) (*keystate.Engine[pgx.Tx], error) {
	store, err := postgres.Open(ctx, dsn, &postgres.Options{Schema: schema, Lease: lease})
	if err != nil {
		return nil, err
	}
	engine, err := keystate.New[pgx.Tx](store, opts)
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return engine, nil
}

func (database) Remove(ctx context.Context, dsn string) error {
	return connected(ctx, dsn, func(c *pgx.Conn) error {
		_, err := c.Exec(ctx, `DROP SCHEMA IF EXISTS `+schema+` CASCADE`)
		return err
	})
}

func connected(ctx context.Context, dsn string, do func(*pgx.Conn) error) error {
	c, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	return errors.Join(do(c), c.Close(ctx))
}
