package money

import (
	"context"
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

// Buckets are the program's tables in a bbolt file.
type Buckets struct{}

func (Buckets) Create(_ context.Context, tx *bbolt.Tx) error        { return OpenAccounts(tx) }
func (Buckets) In(_ context.Context, tx *bbolt.Tx) OpenBooks        { return openBuckets{tx} }
func (Buckets) Read(_ context.Context, tx *bbolt.Tx) (Books, error) { return ReadBooks(tx) }

type openBuckets struct{ tx *bbolt.Tx }

func (o openBuckets) Balance(account string) (amount int64, known bool, err error) {
	amount, known = Balance(o.tx, account)
	return amount, known, nil
}

func (o openBuckets) SetBalance(account string, amount int64) error {
	return putCents(o.tx.Bucket(accountsBucket), account, amount)
}

func (o openBuckets) Reserved(transfer string) (amount int64, some bool, err error) {
	amount, some = cents(o.tx.Bucket(reservedBucket), transfer)
	return amount, some, nil
}

func (o openBuckets) Reserve(transfer string, amount int64) error {
	return putCents(o.tx.Bucket(reservedBucket), transfer, amount)
}

func (o openBuckets) Unreserve(transfer string) error {
	return o.tx.Bucket(reservedBucket).Delete([]byte(transfer))
}

func (o openBuckets) PutTransfer(t Transfer) error {
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return o.tx.Bucket(transfersBucket).Put([]byte(t.ID), text)
}

func (o openBuckets) PutReceipt(transfer, number string) error {
	return o.tx.Bucket(receiptsBucket).Put([]byte(transfer), []byte(number))
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
