// Transfer moves money between two users, and goes on moving it while its process is killed again and again.
//
//	go run ./examples/transfer
//
// starts a payment processor in a process of its own and a worker in another one, kills the worker with SIGKILL at random
// moments until it has worked through a file of transfers, and then counts: every cent, every payout, every receipt. It
// exits non-zero if one of them is missing or there twice.
//
// This file is what a program that uses keystate writes: the request, its phases, and what each of them does. The rest:
//
//	worker.go     the process that runs the phases
//	processor.go  the other side of the effects: a payment processor with an HTTP interface and a ledger of its own
//	main.go       the show: who starts whom, and the kills
//	audit.go      the count at the end
//	generate.go   how transfers.jsonl was made
package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"example.com/keystate"
	"go.etcd.io/bbolt"
)

// A Transfer is a request to move money and, as its phases fill it in, the answer.
type Transfer struct {
	ID       string // what the client calls it
	From, To string
	Cents    int64

	Payout   string // filled in by payout_sent: the processor's name for the payout
	Declined string // filled in by payout_sent instead, when the processor will not pay: its reason
}

// A Receipt is a piece of work that each paid transfer leaves behind.
type Receipt struct {
	Transfer string // its ID
	From, To string
	Cents    int64
	Payout   string

	Number string // filled in by the effect
}

// A teller owns the two machines, and knows where the processor is.
type teller struct {
	processor *client
	transfers *keystate.Machine[Transfer]
	receipts  *keystate.Machine[Receipt]
}

// transferPhases carry a transfer from its request to its answer. What is written in them, with the recovery
// point and the state, is one transaction; what is sent in them is sent with the same token however often it takes.
func (t *teller) transferPhases() []keystate.Phase[*bbolt.Tx, Transfer] {
	return []keystate.Phase[*bbolt.Tx, Transfer]{
		{To: "funds_reserved", Commit: reserveFunds},
		{To: "payout_sent", Effect: t.sendPayout, Commit: recordPayout, Timeout: effectTimeout, Retry: patience},
		{To: keystate.Finished, Commit: t.settle},
	}
}

func (t *teller) receiptPhases() []keystate.Phase[*bbolt.Tx, Receipt] {
	return []keystate.Phase[*bbolt.Tx, Receipt]{
		{To: keystate.Finished, Effect: t.sendReceipt, Commit: recordReceipt, Timeout: effectTimeout, Retry: patience},
	}
}

const effectTimeout = 400 * time.Millisecond

// patience is more than a program would have in earnest: here a death is an attempt, and there are many of both.
// It ends all the same, and then an operator sees the key.
var patience = keystate.RetryPolicy{Attempts: 100, InRun: 5, Initial: 10 * time.Millisecond, Max: 500 * time.Millisecond}

// transferKey and receiptKey name the same transfer twice: the keys of all machines in a store are one set, and the
// scope tells them apart.
func transferKey(id string) keystate.Key { return keystate.Key{Scope: "transfer", ID: id} }
func receiptKey(id string) keystate.Key  { return keystate.Key{Scope: "receipt", ID: id} }

// The program's own buckets, in the same file as the keys.
var (
	accountsBucket = []byte("accounts") // name → cents
	reservedBucket = []byte("reserved") // transfer → cents that are neither the payer's nor the payee's
	payoutsBucket  = []byte("payouts")  // transfer → the processor's payout
	receiptsBucket = []byte("receipts") // transfer → the processor's receipt
)

// reserveFunds takes the money out of the payer's account. Nothing has happened in the world yet, so what speaks
// against the transfer is final: Final undoes this phase's writes, and the reason is the answer.
func reserveFunds(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
	accounts := tx.Bucket(accountsBucket)
	balance, payerKnown := cents(accounts, t.From)
	_, payeeKnown := cents(accounts, t.To)
	switch {
	case t.Cents <= 0:
		return keystate.Final(errors.New("the amount must be positive"))
	case t.From == t.To:
		return keystate.Final(errors.New("payer and payee are the same"))
	case !payerKnown:
		return keystate.Final(fmt.Errorf("unknown account %q", t.From))
	case !payeeKnown:
		return keystate.Final(fmt.Errorf("unknown account %q", t.To))
	case balance < t.Cents:
		return keystate.Final(errors.New("insufficient funds"))
	}
	return errors.Join(
		putCents(accounts, t.From, balance-t.Cents),
		putCents(tx.Bucket(reservedBucket), t.ID, t.Cents),
	)
}

// sendPayout lets the processor pay. A decline is not an error here: Final would end the key on the spot, with the
// funds reserved for ever. It is an outcome, which settle acts upon.
func (t *teller) sendPayout(ctx context.Context, token string, s *Transfer) error {
	id, err := t.processor.pay(ctx, token, order{Reference: s.ID, From: s.From, To: s.To, Cents: s.Cents})
	if declined := (*declinedError)(nil); errors.As(err, &declined) {
		s.Declined = declined.reason
		return nil
	}
	s.Payout = id
	return err
}

func recordPayout(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
	if t.Declined != "" {
		return nil
	}
	return tx.Bucket(payoutsBucket).Put([]byte(t.ID), []byte(t.Payout))
}

// settle gives the reserved money to whom it belongs now, and stages the receipt: there will be one exactly if this commits.
func (t *teller) settle(_ context.Context, tx *bbolt.Tx, s *Transfer) error {
	if s.Declined != "" {
		return release(tx, s.ID, s.From)
	}
	return errors.Join(
		release(tx, s.ID, s.To),
		keystate.Stage(tx, t.receipts, receiptKey(s.ID), Receipt{
			Transfer: s.ID, From: s.From, To: s.To, Cents: s.Cents, Payout: s.Payout,
		}),
	)
}

// release moves what is reserved for a transfer to an account.
func release(tx *bbolt.Tx, id, account string) error {
	accounts, reserved := tx.Bucket(accountsBucket), tx.Bucket(reservedBucket)
	held, ok := cents(reserved, id)
	if !ok {
		return fmt.Errorf("nothing is reserved for %s", id)
	}
	balance, _ := cents(accounts, account)
	return errors.Join(
		reserved.Delete([]byte(id)),
		putCents(accounts, account, balance+held),
	)
}

func (t *teller) sendReceipt(ctx context.Context, token string, r *Receipt) (err error) {
	r.Number, err = t.processor.deliver(ctx, token, order{Reference: r.Transfer, From: r.From, To: r.To, Cents: r.Cents, Payout: r.Payout})
	return err
}

func recordReceipt(_ context.Context, tx *bbolt.Tx, r *Receipt) error {
	return tx.Bucket(receiptsBucket).Put([]byte(r.Transfer), []byte(r.Number))
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
