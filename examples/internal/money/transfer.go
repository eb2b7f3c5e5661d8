// Package money is what a program that uses keystate writes: the request, its phases, and what each of them does. It moves money
// between two accounts through a payment processor, and leaves a receipt. Programs that run it: examples/transfer, whose workers are
// killed, on a file and on PostgreSQL, and examples/payments, which is an HTTP service.
//
//	transfer.go  the phases
//	books.go     what they write to
//	buckets.go   the same in a bbolt file
package money

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/processor"
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

// A Teller knows where the books and the processor are, and what to stage when a transfer is paid. Tx is the store's transaction: a
// program that has one store writes *bbolt.Tx or pgx.Tx in its place.
type Teller[Tx any] struct {
	books     Tables[Tx]
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
func NewTeller[Tx any](e *keystate.Engine[Tx], books Tables[Tx], c *processor.Client, p Patience) (t *Teller[Tx], err error) {
	t = &Teller[Tx]{books: books, processor: c, patience: p}
	t.receipts, err = keystate.Register(e, "receipt", t.receiptPhases())
	return t, err
}

// Phases carry a transfer from its request to its answer. What is written in them, with the recovery point and the
// state, is one transaction; what is sent in them is sent with the same token however often it takes.
func (t *Teller[Tx]) Phases() []keystate.Phase[Tx, Transfer] {
	return []keystate.Phase[Tx, Transfer]{
		{To: "funds_reserved", Commit: t.reserveFunds},
		{To: "payout_sent", Effect: t.sendPayout, Commit: t.recordPayout, Timeout: t.patience.Timeout, Retry: t.patience.Retry},
		{To: keystate.Finished, Commit: t.settle},
	}
}

func (t *Teller[Tx]) receiptPhases() []keystate.Phase[Tx, Receipt] {
	return []keystate.Phase[Tx, Receipt]{
		{To: keystate.Finished, Effect: t.sendReceipt, Commit: t.recordReceipt, Timeout: t.patience.Timeout, Retry: t.patience.Retry},
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
func (t *Teller[Tx]) reserveFunds(ctx context.Context, tx Tx, s *Transfer) error {
	books := t.books.In(ctx, tx)
	balance, payerKnown, err := books.Balance(s.From)
	if err != nil {
		return err
	}
	_, payeeKnown, err := books.Balance(s.To)
	switch {
	case err != nil:
		return err
	case s.Cents <= 0:
		return keystate.Final(ErrAmount)
	case s.From == s.To:
		return keystate.Final(ErrSamePayee)
	case !payerKnown:
		return keystate.Final(&UnknownAccountError{s.From})
	case !payeeKnown:
		return keystate.Final(&UnknownAccountError{s.To})
	case balance < s.Cents:
		return keystate.Final(ErrInsufficientFunds)
	}
	s.Status = Pending
	return errors.Join(
		books.SetBalance(s.From, balance-s.Cents),
		books.Reserve(s.ID, s.Cents),
		books.PutTransfer(*s),
	)
}

// sendPayout lets the processor pay. A decline is not an error here: Final would end the key on the spot, with the
// funds reserved for ever. It is an outcome, which settle acts upon.
func (t *Teller[Tx]) sendPayout(ctx context.Context, token string, s *Transfer) error {
	id, err := t.processor.Pay(ctx, token, processor.Order{Reference: s.ID, From: s.From, To: s.To, Cents: s.Cents})
	if declined := (*processor.DeclinedError)(nil); errors.As(err, &declined) {
		s.Declined = declined.Reason
		return nil
	}
	s.Payout = id
	return err
}

func (t *Teller[Tx]) recordPayout(ctx context.Context, tx Tx, s *Transfer) error {
	return t.books.In(ctx, tx).PutTransfer(*s)
}

// settle gives the reserved money to whom it belongs now, and stages the receipt: there will be one exactly if this commits.
func (t *Teller[Tx]) settle(ctx context.Context, tx Tx, s *Transfer) error {
	books := t.books.In(ctx, tx)
	if s.Declined != "" {
		s.Status = Declined
		return errors.Join(release(books, s.ID, s.From), books.PutTransfer(*s))
	}
	s.Status = Paid
	return errors.Join(
		release(books, s.ID, s.To),
		books.PutTransfer(*s),
		keystate.Stage(tx, t.receipts, receiptKey(s.ID), Receipt{
			Transfer: s.ID, From: s.From, To: s.To, Cents: s.Cents, Payout: s.Payout,
		}),
	)
}

// release moves what is reserved for a transfer to an account.
func release(books OpenBooks, id, account string) error {
	held, ok, err := books.Reserved(id)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("nothing is reserved for %s", id)
	}
	balance, _, err := books.Balance(account)
	if err != nil {
		return err
	}
	return errors.Join(
		books.Unreserve(id),
		books.SetBalance(account, balance+held),
	)
}

func (t *Teller[Tx]) sendReceipt(ctx context.Context, token string, r *Receipt) (err error) {
	r.Number, err = t.processor.Deliver(ctx, token, processor.Order{
		Reference: r.Transfer, From: r.From, To: r.To, Cents: r.Cents, Payout: r.Payout,
	})
	return err
}

func (t *Teller[Tx]) recordReceipt(ctx context.Context, tx Tx, r *Receipt) error {
	return t.books.In(ctx, tx).PutReceipt(r.Transfer, r.Number)
}
