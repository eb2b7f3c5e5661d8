package money

import (
	"context"
	"fmt"
)

// Tables are the program's own, in the same store as the keys: in a bbolt file they are [Buckets].
type Tables[Tx any] interface {
	// Create makes them, with the opening balances, unless they are there.
	Create(ctx context.Context, tx Tx) error

	// In opens the books in a transaction, and only until it ends.
	In(ctx context.Context, tx Tx) OpenBooks

	// Read reads all of them.
	Read(ctx context.Context, tx Tx) (Books, error)
}

// OpenBooks are what the phases read and write in one transaction. Amounts are in cents.
type OpenBooks interface {
	Balance(account string) (amount int64, known bool, err error)
	SetBalance(account string, amount int64) error

	// What is reserved for a transfer is neither the payer's nor the payee's.
	Reserved(transfer string) (amount int64, some bool, err error)
	Reserve(transfer string, amount int64) error
	Unreserve(transfer string) error

	PutTransfer(Transfer) error
	PutReceipt(transfer, number string) error
}

// OpeningBalances are the accounts and what is in them on the first day, in cents.
var OpeningBalances = map[string]int64{
	"ada": 2_000_00, "bob": 1_500_00, "carol": 1_200_00, "dan": 900_00, "erin": 1_100_00,
	"frank": 300_00, "heidi": 700_00, "ivan": 20_00, "judy": 1_000_00, "mallory": 5_00,
	"Zoë": 800_00, "Ólafur": 600_00, "李雷": 1_300_00, "محمد": 950_00, "Søren Å.": 400_00, "🦊 fox": 250_00,
	"grace":                   100_000_00,
	"declined@closed.example": 0,
}

// Books are all that the program's tables hold.
type Books struct {
	Accounts  map[string]int64
	Reserved  map[string]int64
	Transfers map[string]Transfer
	Receipts  map[string]string
}

// Sum is all the money there is.
func (b Books) Sum() (total int64) {
	for _, part := range []map[string]int64{b.Accounts, b.Reserved} {
		for _, amount := range part {
			total += amount
		}
	}
	return total
}

// Text writes an amount as people do.
func Text(cents int64) string {
	sign := ""
	if cents < 0 {
		sign, cents = "-", -cents
	}
	whole := fmt.Sprint(cents / 100)
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	return fmt.Sprintf("%s%s.%02d", sign, whole, cents%100)
}
