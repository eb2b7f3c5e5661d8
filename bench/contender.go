package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// The request that all contenders make, with a new key each time: a business write of 200 bytes (funds are reserved); an effect that
// does nothing (a payout is sent), with the store durable before and after; a business write of 200 bytes (it is booked) and an answer
// of 300 bytes.

type order struct {
	Account string
	Cents   int64
	Payout  string
	Receipt []byte
}

var (
	businessRow = make([]byte, 200)
	receipt     = make([]byte, 260) // with the other fields, an answer of 300 bytes
	quiet       = slog.New(slog.DiscardHandler)
)

func asked(id string) order { return order{Account: id, Cents: 500} }

// payOut is the effect. A process that stages a crash hangs in it.
var payOut = func(token string) string { return token[:8] }

func reservedRow(id string) string { return id + "/reserved" }
func settledRow(id string) string  { return id + "/settled" }

// A contender makes the request in its own way.
type contender struct {
	name  string // in tables
	label string // at a line in a plot
	on    store
	open  func(p place) (station, error)
	limit bool // it does not make the request; it writes what one must write

	// hold is how long the keys of a process that was killed stay locked, by a clock that only time moves.
	hold time.Duration

	// fill puts finished keys into an empty place. Without it, the contender is not measured on a full store.
	fill func(p place, keys int, newID idAt, done func(n int)) error
}

type store string

const (
	onBolt     store = "bbolt"
	onSQLite   store = "SQLite"
	onPostgres store = "PostgreSQL"
	onFile     store = "a file"
)

// A place is where a contender keeps what it keeps: a folder of its own, or a database.
type place struct {
	dir         string
	dsn         string
	connections int // to the server
}

// A station is a contender at work.
type station interface {
	request(ctx context.Context, id string) (order, error)
	// business gives the business row of a name, nil if there is none, and how many rows there are in all.
	business(ctx context.Context, name string) (row []byte, err error)
	rows(ctx context.Context) (int, error)
	close() error
}

// A committer knows how many transactions it has committed.
type committer interface{ commits() (int64, error) }

// A grouper knows how many commits have shared how many transactions.
type grouper interface {
	grouped() (transactions, members int64)
}

const (
	keystateOnBolt     = "keystate on bbolt"
	keystateOnPostgres = "keystate on PostgreSQL"
	byUpdate           = "bbolt by hand, Update per step"
	byTransaction      = "PostgreSQL by hand, READ COMMITTED"
	rawBolt            = "limit: raw bbolt"
)

var contenders = slices.Concat(boltContenders, sqliteContenders, workflowContenders, postgresContenders, limits)

// field is who takes part: those whose names contain one of the texts, separated by |.
func field(only string, all []contender) []contender {
	if only == "" {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(c contender) bool {
		return !slices.ContainsFunc(strings.Split(only, "|"), func(text string) bool {
			return strings.Contains(strings.ToLower(c.name), strings.ToLower(text))
		})
	})
}

func named(all []contender, name string) (contender, bool) {
	i := slices.IndexFunc(all, func(c contender) bool { return c.name == name })
	if i < 0 {
		return contender{}, false
	}
	return all[i], true
}

// check asks again for requests that were answered: each must get the whole answer, and have made both business writes.
func check(ctx context.Context, s station, ids []string) error {
	for _, id := range ids {
		answer, err := s.request(ctx, id)
		if err != nil {
			return fmt.Errorf("asked again for %s: %w", id, err)
		}
		if answer.Account != id || answer.Cents != 500 || len(answer.Payout) != 8 || len(answer.Receipt) != len(receipt) {
			return fmt.Errorf("asked again for %s: the answer is %+v", id, answer)
		}
		for _, name := range []string{reservedRow(id), settledRow(id)} {
			row, err := s.business(ctx, name)
			if err == nil && len(row) != len(businessRow) {
				err = fmt.Errorf("%d bytes, not %d", len(row), len(businessRow))
			}
			if err != nil {
				return fmt.Errorf("business row %s: %w", name, err)
			}
		}
	}
	return nil
}

// checkCount makes sure that every request has made its two business writes once.
func checkCount(ctx context.Context, s station, requests int) error {
	rows, err := s.rows(ctx)
	if err == nil && rows != 2*requests {
		err = fmt.Errorf("%d business rows after %d requests", rows, requests)
	}
	return err
}

var errNoRow = errors.New("there is no such row")
