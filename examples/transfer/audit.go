package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"example.com/keystate"
	"go.etcd.io/bbolt"
)

// This file is the count at the end. It believes nobody: the answers are held against the processor's ledger, and the
// books against both.

// books are the program's own buckets, and what is left to do.
type books struct {
	accounts   map[string]int64
	reserved   map[string]int64
	payouts    map[string]string
	receipts   map[string]string
	unfinished uint64
	parked     uint64
}

// sum is all the money there is.
func (b books) sum() (total int64) {
	for _, part := range []map[string]int64{b.accounts, b.reserved} {
		for _, amount := range part {
			total += amount
		}
	}
	return total
}

// readBooks reads a store that no worker has open. Where there is none yet, the books are as on the first day.
func readBooks(ctx context.Context, store string) (b books, err error) {
	if _, err := os.Stat(store); errors.Is(err, os.ErrNotExist) {
		return books{accounts: openingBalances}, nil
	}
	engine, err := keystate.Open(store, &keystate.Options{Retention: -1})
	if err != nil {
		return b, err
	}
	defer func() { err = errors.Join(err, engine.Close()) }()
	stats, err := engine.Stats(ctx)
	if err != nil {
		return b, err
	}
	b.unfinished, b.parked = stats.Running+stats.Waiting, stats.Parked
	err = engine.View(ctx, func(tx *bbolt.Tx) error {
		if tx.Bucket(accountsBucket) == nil {
			b.accounts = openingBalances
			return nil
		}
		b.accounts, b.reserved = amounts(tx.Bucket(accountsBucket)), amounts(tx.Bucket(reservedBucket))
		b.payouts, b.receipts = texts(tx.Bucket(payoutsBucket)), texts(tx.Bucket(receiptsBucket))
		return nil
	})
	return b, err
}

func amounts(b *bbolt.Bucket) map[string]int64 {
	m := map[string]int64{}
	b.ForEach(func(k, _ []byte) error {
		m[string(k)], _ = cents(b, string(k))
		return nil
	})
	return m
}

func texts(b *bbolt.Bucket) map[string]string {
	m := map[string]string{}
	b.ForEach(func(k, v []byte) error {
		m[string(k)] = string(v)
		return nil
	})
	return m
}

// A tally is what the show has come to.
type tally struct {
	requests, killed  int
	resumed           map[string]bool
	answers           map[int]answer     // by line, as the last worker gave them
	given             map[request]answer // definite answers as they were given first, in this run or an earlier one
	lost              map[int]string     // by line: answers that were given and then differed, or never came again
	calls             counts
	ledger            []entry
	before, after     books
	settledBefore     bool // all that was asked had been answered, and done, when the show began
	payouts, receipts found
	wrong             []string
}

// found compares what should be in the ledger once with what is.
type found struct{ entries, duplicate, missing, unasked int }

// audit counts, and collects what is wrong.
func (t *tally) audit(lines []line) {
	due := t.judgeAnswers(lines)
	t.payouts = t.match(payoutKind, due, t.after.payouts)
	t.receipts = t.match(receiptKind, due, t.after.receipts)
	t.judgeMoney()
	for _, n := range slices.Sorted(maps.Keys(t.lost)) {
		t.fault("line %d %s", n, t.lost[n])
	}
	if t.after.unfinished+t.after.parked > 0 {
		t.fault("%d keys are unfinished and %d parked", t.after.unfinished, t.after.parked)
	}
	if n := t.calls.Refused; n > 0 {
		t.fault("a token was used for another order %d times", n)
	}
	if t.settledBefore && t.calls.Calls > 0 {
		t.fault("everything had its answer before, and the processor was called %d times", t.calls.Calls)
	}
}

func (t *tally) fault(format string, args ...any) {
	t.wrong = append(t.wrong, fmt.Sprintf(format, args...))
}

// judgeAnswers holds the answers against the requests, and returns what must have been paid, by key.
func (t *tally) judgeAnswers(lines []line) (due map[string]answer) {
	uses := map[string]map[request]bool{} // of each key
	note := func(r request) {
		if uses[r.Key] == nil {
			uses[r.Key] = map[request]bool{}
		}
		uses[r.Key][r] = true
	}
	for _, l := range lines {
		note(l.request)
		a, ok := t.answers[l.number]
		switch {
		case !ok:
			t.fault("line %d has no answer", l.number)
		case !a.definite():
			t.fault("line %d is %s: %s", l.number, a.Status, a.Error)
		case a.request != l.request:
			t.fault("line %d got the answer of another request", l.number)
		}
	}
	due = map[string]answer{}
	owners := map[string]request{}
	for r, a := range t.given {
		note(r)
		switch owner, owned := owners[r.Key]; {
		case a.Status == mismatch || a.Status == invalid:
			continue
		case owned && owner != r:
			t.fault("the key %q was answered for two requests", r.Key)
		}
		owners[r.Key] = r
		if a.Status == paid {
			due[r.Key] = a
			if reason := unpayable(r); reason != "" {
				t.fault("%q was paid, although %s", r.Key, reason)
			}
		}
	}
	for r, a := range t.given {
		if a.Status == mismatch && len(uses[r.Key]) < 2 {
			t.fault("%q was answered as used for another request, and there is none", r.Key)
		}
	}
	return due
}

// unpayable says why a request cannot have been paid, whatever came before it.
func unpayable(r request) string {
	_, payer := openingBalances[r.From]
	_, payee := openingBalances[r.To]
	switch {
	case !payer || !payee:
		return "an account is unknown"
	case r.Cents <= 0:
		return "the amount is not positive"
	case r.From == r.To:
		return "payer and payee are the same"
	}
	return decline(payoutKind, order{To: r.To, Cents: r.Cents})
}

// match holds the ledger's entries of a kind against what is due, one each, and against what the store has noted.
func (t *tally) match(kind string, due map[string]answer, noted map[string]string) (f found) {
	times := map[string]int{}
	for _, e := range t.ledger {
		if e.Kind != kind {
			continue
		}
		f.entries++
		times[e.Reference]++
		a, ok := due[e.Reference]
		asked := order{Reference: a.Key, From: a.From, To: a.To, Cents: a.Cents}
		if kind == receiptKind {
			asked.Payout = a.Payout
		}
		switch {
		case times[e.Reference] > 1:
			f.duplicate++
			t.fault("the %s of %q was made %d times", kind, e.Reference, times[e.Reference])
		case !ok:
			f.unasked++
			t.fault("the %s of %q was made, and its answer is not %q", kind, e.Reference, paid)
		case e.order != asked:
			t.fault("the %s of %q is for another transfer", kind, e.Reference)
		case kind == payoutKind && e.ID != a.Payout:
			t.fault("the payout of %q is %s, and the answer names %s", e.Reference, e.ID, a.Payout)
		case noted[e.Reference] != e.ID:
			t.fault("the %s of %q is %s, and the books have %q", kind, e.Reference, e.ID, noted[e.Reference])
		}
	}
	for _, key := range slices.Sorted(maps.Keys(due)) {
		if times[key] == 0 {
			f.missing++
			t.fault("the %s of %q is missing", kind, key)
		}
	}
	if len(noted) != len(due) {
		t.fault("the books have %d %ss, and there are %d paid transfers", len(noted), kind, len(due))
	}
	return f
}

// judgeMoney holds the books against themselves, and each account against the processor's ledger.
func (t *tally) judgeMoney() {
	if before, after := t.before.sum(), t.after.sum(); before != after {
		t.fault("there were %s, and there are %s", money(before), money(after))
	}
	for id, amount := range t.after.reserved {
		t.fault("%s are still reserved for %q", money(amount), id)
	}
	expected := maps.Clone(openingBalances)
	for _, e := range t.ledger {
		if e.Kind == payoutKind {
			expected[e.From] -= e.Cents
			expected[e.To] += e.Cents
		}
	}
	for _, name := range slices.Sorted(maps.Keys(expected)) {
		if balance := t.after.accounts[name]; balance != expected[name] {
			t.fault("%s has %s, and by the processor's ledger %s", name, money(balance), money(expected[name]))
		}
	}
	if len(t.after.accounts) != len(expected) {
		t.fault("there are %d accounts, and there should be %d", len(t.after.accounts), len(expected))
	}
}

// print writes the table.
func (t *tally) print(w io.Writer) {
	statuses := map[string]int{}
	for _, a := range t.answers {
		statuses[a.Status]++
	}
	var kinds []string
	for _, s := range []string{paid, declined, refused, mismatch, invalid, parked, open} {
		if n := statuses[s]; n > 0 {
			kinds = append(kinds, fmt.Sprintf("%d %s", n, s))
		}
	}
	c := t.calls
	for _, r := range []struct {
		name   string
		value  any
		remark string
	}{
		{"requests", t.requests, ""},
		{"answers", len(t.answers), strings.Join(kinds, ", ")},
		{"kills", t.killed, ""},
		{"resumed keys", len(t.resumed), ""},
		{"processor calls", c.Calls, fmt.Sprintf("%d answers lost, %d timed out, %d failed, %d replayed", c.Lost, c.Slow, c.Failed, c.Replays)},
		{"payouts", t.payouts.entries, ""},
		{"duplicate payouts", t.payouts.duplicate, ""},
		{"missing payouts", t.payouts.missing, ""},
		{"receipts", t.receipts.entries, ""},
		{"duplicate receipts", t.receipts.duplicate, ""},
		{"missing receipts", t.receipts.missing, ""},
		{"lost answers", len(t.lost), ""},
		{"money before", money(t.before.sum()), ""},
		{"money after", money(t.after.sum()), ""},
	} {
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%-20s %12v   %s", r.name, r.value, r.remark), " "))
	}
}

// money writes an amount as people do.
func money(cents int64) string {
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
