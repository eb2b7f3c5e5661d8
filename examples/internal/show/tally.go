package show

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
)

// A Tally is what the show has come to: the answers are held against the requests, and all of it against the ledger and the books.
type Tally struct {
	audit.Count
	Requests  int
	Desks     int // workers at a time
	Killed    int
	Dismissed int            // not counted in Killed
	Suspended int            // of these, before
	Answers   map[int]answer // by line, as the last workers gave them
	Calls     processor.Counts

	resumed       map[string]bool
	given         map[request]answer // definite answers as they were given first, in this run or an earlier one
	lost          map[int]string     // by line: answers that were given and then differed, or never came again
	settledBefore bool               // all that was asked had been answered, and done, when the show began
}

// judge counts, and collects what is wrong.
func (t *Tally) judge(lines []line) {
	t.judgeAnswers(lines)
	t.Judge()
	for _, n := range slices.Sorted(maps.Keys(t.lost)) {
		t.Fault("line %d %s", n, t.lost[n])
	}
	if n := t.Calls.Refused; n > 0 {
		t.Fault("a token was used for another order %d times", n)
	}
	if t.settledBefore && t.Calls.Calls > 0 {
		t.Fault("everything had its answer before, and the processor was called %d times", t.Calls.Calls)
	}
}

// judgeAnswers holds the answers against the requests, and finds what must have been paid.
func (t *Tally) judgeAnswers(lines []line) {
	uses := map[string]map[request]bool{} // of each key
	note := func(r request) {
		if uses[r.Key] == nil {
			uses[r.Key] = map[request]bool{}
		}
		uses[r.Key][r] = true
	}
	for _, l := range lines {
		note(l.request)
		a, ok := t.Answers[l.number]
		switch {
		case !ok:
			t.Fault("line %d has no answer", l.number)
		case !a.definite():
			t.Fault("line %d is %s: %s", l.number, a.Status, a.Error)
		case a.request != l.request:
			t.Fault("line %d got the answer of another request", l.number)
		}
	}
	t.Due = map[string]money.Transfer{}
	owners := map[string]request{}
	for r, a := range t.given {
		note(r)
		switch owner, owned := owners[r.Key]; {
		case a.Status == mismatch || a.Status == invalid:
			continue
		case owned && owner != r:
			t.Fault("the key %q was answered for two requests", r.Key)
		}
		owners[r.Key] = r
		if a.Status == paid {
			due := r.transfer()
			due.Payout = a.Payout
			t.Due[r.Key] = due
			if reason := unpayable(r); reason != "" {
				t.Fault("%q was paid, although %s", r.Key, reason)
			}
		}
	}
	for r, a := range t.given {
		if a.Status == mismatch && len(uses[r.Key]) < 2 {
			t.Fault("%q was answered as used for another request, and there is none", r.Key)
		}
	}
}

// unpayable says why a request cannot have been paid, whatever came before it.
func unpayable(r request) string {
	_, payer := money.OpeningBalances[r.From]
	_, payee := money.OpeningBalances[r.To]
	switch {
	case !payer || !payee:
		return "an account is unknown"
	case r.Cents <= 0:
		return "the amount is not positive"
	case r.From == r.To:
		return "payer and payee are the same"
	}
	return processor.Decline(processor.Payout, processor.Order{To: r.To, Cents: r.Cents})
}

// Print writes the table.
func (t *Tally) Print(w io.Writer) {
	statuses := map[string]int{}
	for _, a := range t.Answers {
		statuses[a.Status]++
	}
	var kinds []string
	for _, s := range []string{paid, declined, refused, mismatch, invalid, parked, open} {
		if n := statuses[s]; n > 0 {
			kinds = append(kinds, fmt.Sprintf("%d %s", n, s))
		}
	}
	c := t.Calls
	rows := []row{
		{"requests", t.Requests, ""},
		{"answers", len(t.Answers), strings.Join(kinds, ", ")},
		{"kills", t.Killed, t.crowd()},
		{"resumed keys", len(t.resumed), ""},
		{"processor calls", c.Calls, fmt.Sprintf("%d answers lost, %d timed out, %d failed, %d replayed", c.Lost, c.Slow, c.Failed, c.Replays)},
		{"payouts", t.Payouts.Entries, ""},
		{"duplicate payouts", t.Payouts.Duplicate, ""},
		{"missing payouts", t.Payouts.Missing, ""},
		{"receipts", t.Receipts.Entries, ""},
		{"duplicate receipts", t.Receipts.Duplicate, ""},
		{"missing receipts", t.Receipts.Missing, ""},
		{"lost answers", len(t.lost), ""},
		{"money before", money.Text(t.Before.Sum()), ""},
		{"money after", money.Text(t.After.Sum()), ""},
	}
	for _, r := range rows {
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%-20s %12v   %s", r.name, r.value, r.remark), " "))
	}
}

// A row is one line of the table.
type row struct {
	name   string
	value  any
	remark string
}

// crowd says of the kills, where there were several workers, how many, and what else was done to them.
func (t *Tally) crowd() string {
	if t.Desks == 1 && t.Dismissed == 0 {
		return ""
	}
	return fmt.Sprintf("of %d workers at a time; %d more said goodbye, %d of them had been suspended", t.Desks, t.Dismissed, t.Suspended)
}
