// Transfer moves money between two users, and goes on moving it while its process is killed again and again.
//
//	go run ./examples/transfer
//
// starts a payment processor in a process of its own and a worker in another one, kills the worker with SIGKILL at random
// moments until it has worked through a file of transfers, and then counts: every cent, every payout, every receipt. It
// exits non-zero if one of them is missing or there twice. The keys and the books are in a bbolt file, which one process has open;
//
//	go run -C examples/transfer/postgres . -store postgres://…
//
// is the same with several workers at a time on one PostgreSQL database.
//
// What a program that uses keystate writes is transfer.go in [example.com/keystate/examples/internal/money]: the request, its
// phases, and what each of them does. The rest:
//
//	main.go           the show on a file
//	postgres/         the show on PostgreSQL, a module of its own
//	../internal/show  the show: who starts whom, the kills, the worker, the count at the end; and how transfers.jsonl was made
//	../internal       the other side of the effects, a payment processor with an HTTP interface and a ledger of its own; and
//	                  what else this program shares with examples/payments
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"strings"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/show"
	"go.etcd.io/bbolt"
)

//go:generate go run . generate transfers.jsonl

//go:embed transfers.jsonl
var transfersFile []byte

var program = show.Program[*bbolt.Tx]{
	Store:     file{},
	Usage:     "the bbolt `file`; the processor's ledger and the answers given lie beside it (default: in a temporary directory)",
	Transfers: transfersFile,
	Workers:   1,
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "transfer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "generate" {
		return os.WriteFile(args[1], show.Transfers(), 0o644)
	}
	return program.Run(args)
}

// A file holds the keys and the books. Its name is its path.
type file struct{ money.Buckets }

func (file) Check(path string) error {
	if strings.HasPrefix(path, "postgres://") || strings.HasPrefix(path, "postgresql://") {
		return errors.New("this is the show on a file; on PostgreSQL it is: go run -C examples/transfer/postgres . -store postgres://…")
	}
	return nil
}

func (file) Find(_ context.Context, path string) (string, error) {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return path, nil
}

func (file) Open(_ context.Context, path string, opts *keystate.Options) (*keystate.Engine[*bbolt.Tx], error) {
	return keystate.Open(path, opts)
}

func (file) Remove(_ context.Context, path string) error { return os.RemoveAll(path) }
