// Package money is what a program that uses keystate writes: the request, its phases, and what each of them does. It moves money
// between two accounts through a payment processor, and leaves a receipt. Two programs run it: examples/transfer, whose workers are
// killed, and examples/payments, which is an HTTP service.
package money

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/processor"
	"go.etcd.io/bbolt"
)

// A Transfer is a request to move money and, as its phases fill it in, the answer.
type Transfer struct {
	ID       string // what the program calls it
	From, To string
	Cents    int64

	Status   string // filled in by the commits
	Payout   string // filled in by payout_sent: the processor's name for the payout
	Declined string // filled in by payout_sent instead, when the processor will not pay: its reason
}

// What a transfer's status says.
const (
	Pending  = "pending"  // the money has left the payer's account
	Paid     = "paid"     // and has arrived
	Declined = "declined" // or has come back
)

// A Receipt is a piece of work that each paid transfer leaves behind.
type Receipt struct {
	Transfer string // its ID
	From, To string
	Cents    int64
	Payout   string

	Number string // filled in by the effect
}

// A Teller knows where the processor is, and what to stage when a transfer is paid.
type Teller struct {
	processor *processor.Client
	patience  Patience
	receipts  *keystate.Machine[Receipt]
}

// Patience is what the teller has with the processor. The zero value means keystate's defaults.
type Patience struct {
	Timeout time.Duration // of one call
	Retry   keystate.RetryPolicy
}

// NewTeller registers the machine of the receipts. That of the transfers is for the program to register, after it: a
// transfer that an earlier process left unfinished stages its receipt as soon as it goes on.
func NewTeller(e *keystate.Engine[*bbolt.Tx], c *processor.Client, p Patience) (t *Teller, err error) {
	t = &Teller{processor: c, patience: p}
	t.receipts, err = keystate.Register(e, "receipt", t.receiptPhases())
	return t, err
}

// Phases carry a transfer from its request to its answer. What is written in them, with the recovery point and the
// state, is one transaction; what is sent in them is sent with the same token however often it takes.
func (t *Teller) Phases() []keystate.Phase[*bbolt.Tx, Transfer] {
	return []keystate.Phase[*bbolt.Tx, Transfer]{
		{To: "funds_reserved", Commit: reserveFunds},
		{To: "payout_sent", Effect: t.sendPayout, Commit: recordPayout, Timeout: t.patience.Timeout, Retry: t.patience.Retry},
		{To: keystate.Finished, Commit: t.settle},
	}
}

func (t *Teller) receiptPhases() []keystate.Phase[*bbolt.Tx, Receipt] {
	return []keystate.Phase[*bbolt.Tx, Receipt]{
		{To: keystate.Finished, Effect: t.sendReceipt, Commit: recordReceipt, Timeout: t.patience.Timeout, Retry: t.patience.Retry},
	}
}

// receiptKey names a transfer's receipt: the keys of all machines in a store are one set, and the scope tells them apart.
func receiptKey(id string) keystate.Key { return keystate.Key{Scope: "receipt", ID: id} }

// Why a transfer is refused before anything has happened; [UnknownAccountError] is one more reason.
var (
	ErrAmount            = errors.New("the amount must be positive")
	ErrSamePayee         = errors.New("payer and payee are the same")
	ErrInsufficientFunds = errors.New("insufficient funds")
)

// An UnknownAccountError names an account that there is not.
type UnknownAccountError struct{ Name string }

func (e *UnknownAccountError) Error() string { return fmt.Sprintf("unknown account %q", e.Name) }

// reserveFunds takes the money out of the payer's account. Nothing has happened in the world yet, so what speaks
// against the transfer is final: Final undoes this phase's writes, and the reason is the answer.
func reserveFunds(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
	accounts := tx.Bucket(accountsBucket)
	balance, payerKnown := cents(accounts, t.From)
	_, payeeKnown := cents(accounts, t.To)
	switch {
	case t.Cents <= 0:
		return keystate.Final(ErrAmount)
	case t.From == t.To:
		return keystate.Final(ErrSamePayee)
	case !payerKnown:
		return keystate.Final(&UnknownAccountError{t.From})
	case !payeeKnown:
		return keystate.Final(&UnknownAccountError{t.To})
	case balance < t.Cents:
		return keystate.Final(ErrInsufficientFunds)
	}
	t.Status = Pending
	return errors.Join(
		putCents(accounts, t.From, balance-t.Cents),
		putCents(tx.Bucket(reservedBucket), t.ID, t.Cents),
		putTransfer(tx, t),
	)
}

// sendPayout lets the processor pay. A decline is not an error here: Final would end the key on the spot, with the
// funds reserved for ever. It is an outcome, which settle acts upon.
func (t *Teller) sendPayout(ctx context.Context, token string, s *Transfer) error {
	id, err := t.processor.Pay(ctx, token, processor.Order{Reference: s.ID, From: s.From, To: s.To, Cents: s.Cents})
	if declined := (*processor.DeclinedError)(nil); errors.As(err, &declined) {
		s.Declined = declined.Reason
		return nil
	}
	s.Payout = id
	return err
}

func recordPayout(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
	return putTransfer(tx, t)
}

// settle gives the reserved money to whom it belongs now, and stages the receipt: there will be one exactly if this commits.
func (t *Teller) settle(_ context.Context, tx *bbolt.Tx, s *Transfer) error {
	if s.Declined != "" {
		s.Status = Declined
		return errors.Join(release(tx, s.ID, s.From), putTransfer(tx, s))
	}
	s.Status = Paid
	return errors.Join(
		release(tx, s.ID, s.To),
		putTransfer(tx, s),
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

func (t *Teller) sendReceipt(ctx context.Context, token string, r *Receipt) (err error) {
	r.Number, err = t.processor.Deliver(ctx, token, processor.Order{
		Reference: r.Transfer, From: r.From, To: r.To, Cents: r.Cents, Payout: r.Payout,
	})
	return err
}

func recordReceipt(_ context.Context, tx *bbolt.Tx, r *Receipt) error {
	return tx.Bucket(receiptsBucket).Put([]byte(r.Transfer), []byte(r.Number))
}
