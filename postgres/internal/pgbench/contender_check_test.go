package pgbench

import (
	"context"
	"testing"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
)

// What is measured must be the whole request: both business writes once, and the same answer when the key comes again.
func TestEveryContenderWritesOnceAndAnswersAgain(t *testing.T) {
	for _, c := range contenders {
		t.Run(c.name, func(t *testing.T) {
			dsn := pgtest.Database(t)
			s := c.open(t, dsn, 16)
			defer s.close()
			id := keystate.NewID()
			for range 2 {
				answer, err := s.request(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				if answer.Account != id || answer.Cents != 500 || len(answer.Payout) != 8 || len(answer.Receipt) != len(receipt) {
					t.Errorf("answer %+v", answer)
				}
			}
			conn := connect(t, dsn)
			defer conn.Close(context.Background())
			var rows, size int
			err := conn.QueryRow(t.Context(), `SELECT count(*), sum(length(payload)) FROM orders WHERE name IN ($1 || '/reserved', $1 || '/settled')`, id).Scan(&rows, &size)
			if err != nil || rows != 2 || size != 2*len(businessRow) {
				t.Errorf("%d rows of %d bytes, %v", rows, size, err)
			}
		})
	}
}
