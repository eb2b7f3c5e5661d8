package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
	"example.com/keystate/keyhttp"
)

// A verdict is what the torture has come to.
type verdict struct {
	audit.Count
	answers         []answer
	line            lineCounts
	calls           processor.Counts
	killed, stopped int
	resumed         int

	balances map[string]int64  // as the service tells them at the end
	told     map[string]string // by place: transfers as the service tells them at the end
}

// A transfer is one as the service tells it.
type transfer struct {
	ID     string `json:"id"`
	From   string `json:"from"`
	To     string `json:"to"`
	Cents  int64  `json:"cents"`
	Status string `json:"status"`
	Payout string `json:"payout"`
	Reason string `json:"reason"`
}

const settling = 30 * time.Second // that the service has for what goes on without callers, when all is up

// look asks the service what has become of everything, once nothing is unfinished any more.
func (v *verdict) look(ctx context.Context, service string) error {
	ctx, cancel := context.WithTimeout(ctx, settling)
	defer cancel()
	for {
		var health struct{ Unfinished, Parked int }
		if err := get(ctx, service+"/healthz", "", &health); err != nil {
			return err
		}
		if health.Unfinished == 0 {
			break
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%d keys are unfinished after %s", health.Unfinished, settling)
		}
	}
	v.balances, v.told = map[string]int64{}, map[string]string{}
	for name := range money.OpeningBalances {
		var a struct{ Cents int64 }
		if err := get(ctx, service+"/v1/accounts/"+url.PathEscape(name), name, &a); err != nil {
			return err
		}
		v.balances[name] = a.Cents
	}
	for _, a := range v.answers {
		at := a.place()
		if _, done := v.told[at]; at == "" || done {
			continue
		}
		text, err := getText(ctx, service+at, a.order.From)
		if err != nil {
			return err
		}
		v.told[at] = text
	}
	return nil
}

// place is where the transfer of an answer is to be found, if it has left one.
func (a answer) place() string {
	if a.status == http.StatusCreated {
		return a.location
	}
	var p keyhttp.Problem
	if json.Unmarshal([]byte(a.text), &p) != nil {
		return ""
	}
	return p.Instance
}

func get(ctx context.Context, at, account string, into any) error {
	text, err := getText(ctx, at, account)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(text), into)
}

func getText(ctx context.Context, at, account string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return "", err
	}
	r.Header.Set("Authorization", "Bearer "+account+"-secret")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s %s", at, resp.Status, text)
	}
	return string(text), err
}

// judge counts, and notes what is wrong.
func (v *verdict) judge() {
	v.Due = map[string]money.Transfer{}
	keys := map[string][]answer{}
	for _, a := range v.answers {
		keys[a.key] = append(keys[a.key], a)
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		v.judgeKey(key, keys[key])
	}
	v.Judge()
	if !maps.Equal(v.balances, v.After.Accounts) {
		v.Fault("the service tells the balances %v, and the books have %v", v.balances, v.After.Accounts)
	}
	for id, t := range v.After.Transfers {
		if t.Status != money.Paid && t.Status != money.Declined {
			v.Fault("the transfer %s is still %s", id, t.Status)
		}
	}
	if n := v.calls.Refused; n > 0 {
		v.Fault("a token was used for another order %d times", n)
	}
}

// judgeKey holds all answers under one key against each other. The key belongs to one order; another one has been told so.
func (v *verdict) judgeKey(key string, answers []answer) {
	var first *answer
	causes := 0
	for i := range answers {
		a := &answers[i]
		if a.status == http.StatusUnprocessableEntity && a.kind == keyhttp.KeyReused {
			continue
		}
		if !a.replayed {
			causes++
		}
		switch {
		case first == nil:
			first = a
		case a.order != first.order:
			v.Fault("the key %s was answered for two orders: %s and %s", key, first.order.body(), a.order.body())
		case a.status != first.status || a.text != first.text || a.location != first.location:
			v.Fault("the key %s has two answers: %d %s and %d %s", key, first.status, first.text, a.status, a.text)
		}
	}
	if first == nil {
		v.Fault("the key %s belongs to no order, and they were told that it is another's", key)
		return
	}
	if causes > 1 {
		v.Fault("%d answers under the key %s are said to be no replays", causes, key)
	}
	for _, a := range answers {
		if a.order == first.order && a.kind == keyhttp.KeyReused {
			v.Fault("the order %s was told that its own key %s is another's", a.order.body(), key)
		}
	}
	v.judgeAnswer(first)
}

// judgeAnswer holds an answer against its order and against what the service tells at the end.
func (v *verdict) judgeAnswer(a *answer) {
	if !a.order.may(a.status, a.kind) {
		v.Fault("the order %s got %d %s", a.order.body(), a.status, a.text)
		return
	}
	if a.place() == "" {
		return
	}
	var t transfer
	if err := json.Unmarshal([]byte(v.told[a.place()]), &t); err != nil {
		v.Fault("the transfer at %s: %v", a.place(), err)
		return
	}
	if asked := (order{t.From, t.To, t.Cents}); asked != a.order {
		v.Fault("the order %s got the transfer %s", a.order.body(), asked.body())
	}
	switch {
	case a.status != http.StatusCreated:
		if t.Status != money.Declined {
			v.Fault("the transfer %s was answered as declined and is %s", t.ID, t.Status)
		}
		return
	case t.Status != money.Paid || v.told[a.place()] != a.text:
		v.Fault("the transfer %s was answered with %s and is %s", t.ID, a.text, v.told[a.place()])
	}
	if _, known := v.Due[t.ID]; known {
		v.Fault("two keys were given the transfer %s", t.ID)
	}
	v.Due[t.ID] = money.Transfer{ID: t.ID, From: t.From, To: t.To, Cents: t.Cents, Payout: t.Payout}
}

// print writes the table.
func (v *verdict) print(w io.Writer) {
	statuses, keys := map[int]int{}, map[string]bool{}
	for _, a := range v.answers {
		statuses[a.status]++
		keys[a.key] = true
	}
	var kinds []string
	for _, s := range slices.Sorted(maps.Keys(statuses)) {
		kinds = append(kinds, fmt.Sprintf("%d × %d", statuses[s], s))
	}
	l, c := v.line, v.calls
	for _, r := range []struct {
		name   string
		value  any
		remark string
	}{
		{"keys", len(keys), ""},
		{"requests", len(v.answers), "answered with " + strings.Join(kinds, ", ")},
		{"attempts", l.attempts, "that reached the proxy"},
		{"dropped requests", l.met[requestDropped], ""},
		{"dropped answers", l.met[answerDropped], fmt.Sprintf("and %d cut short", l.met[cutShort])},
		{"doubled requests", l.met[doubled], fmt.Sprintf("and %d delayed", l.met[delayed])},
		{"unreachable", l.unreachable, "the service was away, or went away before it answered"},
		{"replays", l.replays, ""},
		{"409", l.statuses[http.StatusConflict], "in flight"},
		{"422", l.statuses[http.StatusUnprocessableEntity], "the key is another's, or payer and payee are the same"},
		{"503", l.statuses[http.StatusServiceUnavailable], "interrupted, and going on"},
		{"kills", v.killed, fmt.Sprintf("and %d stops", v.stopped)},
		{"resumed keys", v.resumed, ""},
		{"processor calls", c.Calls, fmt.Sprintf("%d answers lost, %d timed out, %d failed, %d replayed", c.Lost, c.Slow, c.Failed, c.Replays)},
		{"payouts", v.Payouts.Entries, ""},
		{"duplicate payouts", v.Payouts.Duplicate, ""},
		{"missing payouts", v.Payouts.Missing, ""},
		{"unasked payouts", v.Payouts.Unasked, ""},
		{"receipts", v.Receipts.Entries, fmt.Sprintf("%d duplicate, %d missing", v.Receipts.Duplicate, v.Receipts.Missing)},
		{"money before", money.Text(v.Before.Sum()), ""},
		{"money after", money.Text(v.After.Sum()), ""},
	} {
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%-20s %12v   %s", r.name, r.value, r.remark), " "))
	}
}
