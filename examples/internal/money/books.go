package money

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"go.etcd.io/bbolt"
)

// The program's own buckets, in the same file as the keys.
var (
	accountsBucket  = []byte("accounts")  // name → cents
	reservedBucket  = []byte("reserved")  // transfer → cents that are neither the payer's nor the payee's
	transfersBucket = []byte("transfers") // transfer → the Transfer as the last commit left it; a refused one leaves none
	receiptsBucket  = []byte("receipts")  // transfer → the processor's receipt
)

// OpeningBalances are the accounts and what is in them on the first day, in cents.
var OpeningBalances = map[string]int64{
	"ada": 2_000_00, "bob": 1_500_00, "carol": 1_200_00, "dan": 900_00, "erin": 1_100_00,
	"frank": 300_00, "heidi": 700_00, "ivan": 20_00, "judy": 1_000_00, "mallory": 5_00,
	"Zoë": 800_00, "Ólafur": 600_00, "李雷": 1_300_00, "محمد": 950_00, "Søren Å.": 400_00, "🦊 fox": 250_00,
	"grace":                   100_000_00,
	"declined@closed.example": 0,
}

// OpenAccounts makes the program's buckets, with the opening balances, unless they are there.
func OpenAccounts(tx *bbolt.Tx) error {
	if tx.Bucket(accountsBucket) != nil {
		return nil
	}
	for _, name := range [][]byte{accountsBucket, reservedBucket, transfersBucket, receiptsBucket} {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	for name, balance := range OpeningBalances {
		if err := putCents(tx.Bucket(accountsBucket), name, balance); err != nil {
			return err
		}
	}
	return nil
}

// Balance is what is in an account.
func Balance(tx *bbolt.Tx, account string) (amount int64, ok bool) {
	return cents(tx.Bucket(accountsBucket), account)
}

// Find returns the transfer with an ID as it stands.
func Find(tx *bbolt.Tx, id string) (t Transfer, ok bool, err error) {
	text := tx.Bucket(transfersBucket).Get([]byte(id))
	if text == nil {
		return t, false, nil
	}
	err = json.Unmarshal(text, &t)
	return t, err == nil, err
}

// Books are all that the program's buckets hold.
type Books struct {
	Accounts  map[string]int64
	Reserved  map[string]int64
	Transfers map[string]Transfer
	Receipts  map[string]string
}

// ReadBooks reads the buckets. Where there are none yet, the books are as on the first day.
func ReadBooks(tx *bbolt.Tx) (Books, error) {
	if tx.Bucket(accountsBucket) == nil {
		return Books{Accounts: OpeningBalances}, nil
	}
	b := Books{map[string]int64{}, map[string]int64{}, map[string]Transfer{}, map[string]string{}}
	return b, errors.Join(
		amounts(tx.Bucket(accountsBucket), b.Accounts),
		amounts(tx.Bucket(reservedBucket), b.Reserved),
		tx.Bucket(transfersBucket).ForEach(func(id, _ []byte) (err error) {
			b.Transfers[string(id)], _, err = Find(tx, string(id))
			return err
		}),
		tx.Bucket(receiptsBucket).ForEach(func(id, number []byte) error {
			b.Receipts[string(id)] = string(number)
			return nil
		}),
	)
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

func amounts(b *bbolt.Bucket, into map[string]int64) error {
	return b.ForEach(func(name, text []byte) error {
		amount, ok := cents(b, string(name))
		if !ok {
			return fmt.Errorf("%q has %q cents", name, text)
		}
		into[string(name)] = amount
		return nil
	})
}

func putTransfer(tx *bbolt.Tx, t *Transfer) error {
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return tx.Bucket(transfersBucket).Put([]byte(t.ID), text)
}

// cents reads an amount. Amounts are kept as decimal text.
func cents(b *bbolt.Bucket, name string) (amount int64, ok bool) {
	text := b.Get([]byte(name))
	if text == nil {
		return 0, false
	}
	amount, err := strconv.ParseInt(string(text), 10, 64)
	return amount, err == nil
}

func putCents(b *bbolt.Bucket, name string, amount int64) error {
	return b.Put([]byte(name), strconv.AppendInt(nil, amount, 10))
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
