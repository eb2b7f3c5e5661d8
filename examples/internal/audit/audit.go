// Package audit is the count at the end. It believes nobody: what was answered as paid is held against the processor's ledger,
// and the books against both.
package audit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
)

// Books are a store's books, and what is left to do in it.
type Books struct {
	money.Books
	Unfinished, Parked uint64
}

// ReadBooks reads a bbolt file that no program has open. Where there is none yet, the books are as on the first day.
func ReadBooks(ctx context.Context, store string) (b Books, err error) {
	if _, err := os.Stat(store); errors.Is(err, os.ErrNotExist) {
		return Books{Books: money.Books{Accounts: money.OpeningBalances}}, nil
	}
	engine, err := keystate.Open(store, &keystate.Options{Retention: -1})
	if err != nil {
		return b, err
	}
	return Look(ctx, engine, money.Buckets{})
}

// Look reads the books of an engine's store, and closes the engine.
func Look[Tx any](ctx context.Context, engine *keystate.Engine[Tx], tables money.Tables[Tx]) (b Books, err error) {
	defer func() { err = errors.Join(err, engine.Close()) }()
	stats, err := engine.Stats(ctx)
	if err != nil {
		return b, err
	}
	b.Unfinished, b.Parked = stats.Running+stats.Waiting, stats.Parked
	err = engine.View(ctx, func(tx Tx) (err error) {
		b.Books, err = tables.Read(ctx, tx)
		return err
	})
	return b, err
}

// A Count is one audit.
type Count struct {
	Before, After     Books
	Ledger            []processor.Entry
	Due               map[string]money.Transfer // what was answered as paid, by ID
	Payouts, Receipts Found
	Wrong             []string
}

// Found compares what should be in the ledger once with what is.
type Found struct{ Entries, Duplicate, Missing, Unasked int }

// Fault notes that something is wrong.
func (c *Count) Fault(format string, args ...any) {
	c.Wrong = append(c.Wrong, fmt.Sprintf(format, args...))
}

// Judge counts, and notes what is wrong.
func (c *Count) Judge() {
	payouts := map[string]string{}
	for id, t := range c.After.Transfers {
		if t.Payout != "" {
			payouts[id] = t.Payout
		}
	}
	c.Payouts = c.match(processor.Payout, payouts)
	c.Receipts = c.match(processor.Receipt, c.After.Receipts)
	c.judgeMoney()
	if c.After.Unfinished+c.After.Parked > 0 {
		c.Fault("%d keys are unfinished and %d parked", c.After.Unfinished, c.After.Parked)
	}
}

// match holds the ledger's entries of a kind against what is due, one each, and against what the books have noted.
func (c *Count) match(kind string, noted map[string]string) (f Found) {
	times := map[string]int{}
	for _, e := range c.Ledger {
		if e.Kind != kind {
			continue
		}
		f.Entries++
		times[e.Reference]++
		t, ok := c.Due[e.Reference]
		asked := processor.Order{Reference: t.ID, From: t.From, To: t.To, Cents: t.Cents}
		if kind == processor.Receipt {
			asked.Payout = t.Payout
		}
		switch {
		case times[e.Reference] > 1:
			f.Duplicate++
			c.Fault("the %s of %q was made %d times", kind, e.Reference, times[e.Reference])
		case !ok:
			f.Unasked++
			c.Fault("the %s of %q was made, and its answer is not %q", kind, e.Reference, money.Paid)
		case e.Order != asked:
			c.Fault("the %s of %q is for another transfer", kind, e.Reference)
		case kind == processor.Payout && e.ID != t.Payout:
			c.Fault("the payout of %q is %s, and the answer names %s", e.Reference, e.ID, t.Payout)
		case noted[e.Reference] != e.ID:
			c.Fault("the %s of %q is %s, and the books have %q", kind, e.Reference, e.ID, noted[e.Reference])
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.Due)) {
		if times[id] == 0 {
			f.Missing++
			c.Fault("the %s of %q is missing", kind, id)
		}
	}
	if len(noted) != len(c.Due) {
		c.Fault("the books have %d %ss, and there are %d paid transfers", len(noted), kind, len(c.Due))
	}
	return f
}

// judgeMoney holds the books against themselves, and each account against the processor's ledger.
func (c *Count) judgeMoney() {
	if before, after := c.Before.Sum(), c.After.Sum(); before != after {
		c.Fault("there were %s, and there are %s", money.Text(before), money.Text(after))
	}
	for id, amount := range c.After.Reserved {
		c.Fault("%s are still reserved for %q", money.Text(amount), id)
	}
	expected := maps.Clone(money.OpeningBalances)
	for _, e := range c.Ledger {
		if e.Kind == processor.Payout {
			expected[e.From] -= e.Cents
			expected[e.To] += e.Cents
		}
	}
	for _, name := range slices.Sorted(maps.Keys(expected)) {
		if balance := c.After.Accounts[name]; balance != expected[name] {
			c.Fault("%s has %s, and by the processor's ledger %s", name, money.Text(balance), money.Text(expected[name]))
		}
	}
	if len(c.After.Accounts) != len(expected) {
		c.Fault("there are %d accounts, and there should be %d", len(c.After.Accounts), len(expected))
	}
}
