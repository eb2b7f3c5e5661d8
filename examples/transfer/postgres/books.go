package main

import (
	"context"
	"errors"

	"example.com/keystate/examples/internal/money"
	"github.com/jackc/pgx/v5"
)

// Tables are the program's own, beside those of the keys. The phases read balances and write others without locking them: the
// transactions are serializable, and the store runs one again that met another.
type tables struct{}

// turn is the number of the lock under which one process after another looks whether the tables are there.
const turn = 0x7472616e73666572

func (tables) Create(ctx context.Context, tx pgx.Tx) error {
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(turn)); err != nil {
		return err
	}
	var there bool
	err := tx.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, schema+".accounts").Scan(&there)
	if err != nil || there {
		return err
	}
	for _, sql := range []string{
		`CREATE TABLE ` + schema + `.accounts (name text PRIMARY KEY, cents bigint NOT NULL CHECK (cents >= 0))`,
		`CREATE TABLE ` + schema + `.reserved (transfer text PRIMARY KEY, cents bigint NOT NULL CHECK (cents > 0))`,
		`CREATE TABLE ` + schema + `.transfers (id text PRIMARY KEY, payer text NOT NULL, payee text NOT NULL,
			cents bigint NOT NULL, status text NOT NULL, payout text NOT NULL, declined text NOT NULL)`,
		`CREATE TABLE ` + schema + `.receipts (transfer text PRIMARY KEY, number text NOT NULL)`,
	} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	for name, amount := range money.OpeningBalances {
		if _, err := tx.Exec(ctx, `INSERT INTO `+schema+`.accounts VALUES ($1, $2)`, name, amount); err != nil {
			return err
		}
	}
	return nil
}

func (tables) In(ctx context.Context, tx pgx.Tx) money.OpenBooks { return openTables{ctx, tx} }

type openTables struct {
	ctx context.Context
	tx  pgx.Tx
}

func (o openTables) exec(sql string, args ...any) error {
	_, err := o.tx.Exec(o.ctx, sql, args...)
	return err
}

// cents reads an amount, if there is one.
func (o openTables) cents(sql, name string) (amount int64, found bool, err error) {
	err = o.tx.QueryRow(o.ctx, sql, name).Scan(&amount)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, false, nil
	}
	return amount, err == nil, err
}

func (o openTables) Balance(account string) (amount int64, known bool, err error) {
	return o.cents(`SELECT cents FROM `+schema+`.accounts WHERE name = $1`, account)
}

func (o openTables) SetBalance(account string, amount int64) error {
	return o.exec(`UPDATE `+schema+`.accounts SET cents = $2 WHERE name = $1`, account, amount)
}

func (o openTables) Reserved(transfer string) (amount int64, some bool, err error) {
	return o.cents(`SELECT cents FROM `+schema+`.reserved WHERE transfer = $1`, transfer)
}

func (o openTables) Reserve(transfer string, amount int64) error {
	return o.exec(`INSERT INTO `+schema+`.reserved VALUES ($1, $2)`, transfer, amount)
}

func (o openTables) Unreserve(transfer string) error {
	return o.exec(`DELETE FROM `+schema+`.reserved WHERE transfer = $1`, transfer)
}

func (o openTables) PutTransfer(t money.Transfer) error {
	return o.exec(`INSERT INTO `+schema+`.transfers (id, payer, payee, cents, status, payout, declined) VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (id) DO UPDATE SET status = excluded.status, payout = excluded.payout, declined = excluded.declined`,
		t.ID, t.From, t.To, t.Cents, t.Status, t.Payout, t.Declined)
}

// PutReceipt expects that there is none yet: the commit that files one takes effect once.
func (o openTables) PutReceipt(transfer, number string) error {
	return o.exec(`INSERT INTO `+schema+`.receipts (transfer, number) VALUES ($1, $2)`, transfer, number)
}

func (tables) Read(ctx context.Context, tx pgx.Tx) (money.Books, error) {
	b := money.Books{Accounts: map[string]int64{}, Reserved: map[string]int64{}, Transfers: map[string]money.Transfer{}, Receipts: map[string]string{}}
	var name, number string
	var amount int64
	var t money.Transfer
	return b, errors.Join(
		each(ctx, tx, `SELECT name, cents FROM `+schema+`.accounts`, []any{&name, &amount}, func() { b.Accounts[name] = amount }),
		each(ctx, tx, `SELECT transfer, cents FROM `+schema+`.reserved`, []any{&name, &amount}, func() { b.Reserved[name] = amount }),
		each(ctx, tx, `SELECT transfer, number FROM `+schema+`.receipts`, []any{&name, &number}, func() { b.Receipts[name] = number }),
		each(ctx, tx, `SELECT id, payer, payee, cents, status, payout, declined FROM `+schema+`.transfers`,
			[]any{&t.ID, &t.From, &t.To, &t.Cents, &t.Status, &t.Payout, &t.Declined}, func() { b.Transfers[t.ID] = t }),
	)
}

// each does something with every row, when it is read into the variables.
func each(ctx context.Context, tx pgx.Tx, sql string, into []any, do func()) error {
	rows, err := tx.Query(ctx, sql)
	if err != nil {
		return err
	}
	_, err = pgx.ForEachRow(rows, into, func() error { do(); return nil })
	return err
}
