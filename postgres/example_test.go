package postgres_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"example.com/keystate"
	"example.com/keystate/postgres"
	"github.com/jackc/pgx/v5"
)

type Transfer struct {
	From, To string
	Cents    int64
	Payout   string // filled in by payout_sent
}

var phases = []keystate.Phase[pgx.Tx, Transfer]{
	{To: "funds_reserved", Commit: func(ctx context.Context, tx pgx.Tx, t *Transfer) error {
		return postgres.Queue(ctx, tx, `UPDATE accounts SET cents = cents - $1 WHERE name = $2`, t.Cents, t.From) // CHECK (cents >= 0)
	}},
	{To: "payout_sent", Effect: func(ctx context.Context, token string, t *Transfer) error {
		t.Payout = "po_" + token // call the processor here, with token as its idempotency key
		return nil
	}},
	{To: keystate.Finished, Commit: func(ctx context.Context, tx pgx.Tx, t *Transfer) error {
		return postgres.Queue(ctx, tx, `INSERT INTO payouts (id, cents) VALUES ($1, $2)`, t.Payout, t.Cents)
	}},
}

func Example() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, os.Getenv("DATABASE_URL"), nil) // makes its tables in a schema of their own
	if err != nil {
		log.Fatal(err)
	}
	engine, err := keystate.New(store, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close() // the store, too
	transfers, err := keystate.Register(engine, "transfer", phases)
	if err != nil {
		log.Fatal(err)
	}
	answer, err := transfers.Do(ctx, keystate.Key{Scope: "ada", ID: "8e03978e"}, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(answer.Payout, err)
}
