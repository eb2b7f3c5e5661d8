package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test's own binary be the processor and the workers of the shows in the tests.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "processor" || os.Args[1] == "worker") {
		if err := run(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// someTransfers writes the first n lines of the file that comes with the program.
func someTransfers(t *testing.T, n int) string {
	t.Helper()
	lines := slices.Collect(bytes.Lines(transfersFile))[:n]
	path := filepath.Join(t.TempDir(), "some.jsonl")
	if err := os.WriteFile(path, bytes.Join(lines, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// mustPerform runs a show in which nothing may be wrong.
func mustPerform(t *testing.T, s settings) *tally {
	t.Helper()
	result, err := perform(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	result.print(&table)
	t.Logf("seed %d\n%s", s.seed, table.String())
	for _, w := range result.wrong {
		t.Error(w)
	}
	return result
}

func TestKilledWorkersPayOnceAndASecondRunCallsNobody(t *testing.T) {
	dir := t.TempDir()
	s := settings{
		file: someTransfers(t, 100), store: filepath.Join(dir, "kept.db"), out: filepath.Join(dir, "first"), keep: true,
		kills: 5, concurrency: 8, seed: time.Now().UnixNano(), faults: usualFaults,
	}
	first := mustPerform(t, s)
	if first.requests != 100 || first.killed != 5 || len(first.answers) != 100 || first.payouts.entries == 0 || first.calls.Calls < first.payouts.entries {
		t.Errorf("the show was not a show: %d requests, %d kills, %d answers, %d payouts, %d calls",
			first.requests, first.killed, len(first.answers), first.payouts.entries, first.calls.Calls)
	}
	s.out = filepath.Join(dir, "second")
	second := mustPerform(t, s)
	if second.calls.Calls != 0 {
		t.Errorf("the second run called the processor %d times", second.calls.Calls)
	}
	a, errA := os.ReadFile(filepath.Join(dir, "first"))
	b, errB := os.ReadFile(filepath.Join(dir, "second"))
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("the answers of the second run differ (%v, %v)", errA, errB)
	}
}

func TestAShowLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	mustPerform(t, settings{file: someTransfers(t, 10), store: filepath.Join(dir, "gone.db"), kills: 1, concurrency: 2, seed: 1, faults: usualFaults})
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("there is %v (%v)", left, err)
	}
}

func TestAShowTouchesNoStoreThatItWasNotTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mine.db")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := perform(t.Context(), settings{store: path, concurrency: 1}); err == nil {
		t.Error("it went on")
	}
	if text, err := os.ReadFile(path); string(text) != "mine" {
		t.Errorf("the file holds %q (%v)", text, err)
	}
}

func TestAnInterruptedShowEndsItsProcesses(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("that will do")
	time.AfterFunc(100*time.Millisecond, func() { cancel(enough) })
	_, err := perform(ctx, settings{kills: 1000, concurrency: 4, seed: 1, faults: usualFaults}) // it waits for each process
	if !errors.Is(err, enough) {
		t.Errorf("it ended with %v", err)
	}
}

func TestTheFileIsTheGeneratedOne(t *testing.T) {
	var b bytes.Buffer
	if err := generate(&b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), transfersFile) {
		t.Error("transfers.jsonl is stale: go generate ./examples/transfer")
	}
	if n := bytes.Count(transfersFile, []byte("\n")); n != generated {
		t.Errorf("it has %d lines", n)
	}
}

// processorAt serves a processor with its ledger in the file at path.
func processorAt(t *testing.T, path string, f faults) (*processor, *client) {
	t.Helper()
	p, err := openProcessor(path, f)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(p.handler())
	t.Cleanup(func() {
		server.Close()
		p.ledger.Close()
	})
	return p, &client{url: server.URL}
}

var twenty = order{Reference: "order-1", From: "ada", To: "bob", Cents: 20_00}

func TestProcessorPaysOncePerToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	p, c := processorAt(t, path, faults{})
	first, err := c.pay(t.Context(), "token", twenty)
	if err != nil || first == "" {
		t.Fatal(first, err)
	}
	again, err := c.pay(t.Context(), "token", twenty)
	if err != nil || again != first {
		t.Errorf("the second answer is %q, %v; the first was %q", again, err, first)
	}
	other := twenty
	other.Cents++
	if id, err := c.pay(t.Context(), "token", other); err == nil || !strings.Contains(err.Error(), "422") {
		t.Errorf("the token with another order: %q, %v", id, err)
	}
	if id, err := c.deliver(t.Context(), "token", twenty); err == nil || !strings.Contains(err.Error(), "422") {
		t.Errorf("the token with a receipt: %q, %v", id, err)
	}
	if want := (counts{Calls: 4, Replays: 1, Refused: 2, Tokens: 1, Payouts: 1}); p.counts != want {
		t.Errorf("counted %+v, not %+v", p.counts, want)
	}
	p.ledger.Close()
	_, c = processorAt(t, path, faults{})
	if late, err := c.pay(t.Context(), "token", twenty); err != nil || late != first {
		t.Errorf("after a restart the answer is %q, %v; it was %q", late, err, first)
	}
}

func TestProcessorSeesOneTransferUnderTwoTokens(t *testing.T) {
	p, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), faults{})
	for _, token := range []string{"a", "b"} {
		if _, err := c.pay(t.Context(), token, twenty); err != nil {
			t.Fatal(err)
		}
		if _, err := c.deliver(t.Context(), "receipt "+token, twenty); err != nil {
			t.Fatal(err)
		}
	}
	want := counts{Calls: 4, Tokens: 4, Payouts: 2, DuplicatePayouts: 1, Receipts: 2, DuplicateReceipts: 1}
	if p.counts != want {
		t.Errorf("counted %+v, not %+v", p.counts, want)
	}
}

func TestProcessorFaults(t *testing.T) {
	for name, f := range map[string]struct {
		faults
		done int
	}{
		"fails": {faults{fail: 1}, 0},
		"loses": {faults{lose: 1}, 1},
		"slow":  {faults{slow: 1}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			p, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), f.faults)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if id, err := c.pay(ctx, "token", twenty); err == nil {
				t.Errorf("it answered %q", id)
			}
			if s, err := c.stats(t.Context()); err != nil || s.Payouts != f.done || p.numbers[payoutKind] != f.done {
				t.Errorf("it counts %d payouts, not %d (%v)", s.Payouts, f.done, err)
			}
		})
	}
}

func TestProcessorDeclines(t *testing.T) {
	p, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), faults{})
	for _, o := range []order{
		{Reference: "1", From: "ada", To: "declined@closed.example", Cents: 1},
		{Reference: "2", From: "ada", To: "bob", Cents: payoutLimit + 1},
	} {
		var no *declinedError
		if id, err := c.pay(t.Context(), o.Reference, o); !errors.As(err, &no) {
			t.Errorf("%+v: %q, %v", o, id, err)
		}
	}
	if p.numbers[payoutKind] != 0 {
		t.Error("it paid")
	}
}

func TestProcessorNeedsAToken(t *testing.T) {
	_, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), faults{})
	resp, err := http.Post(c.url+"/payouts", "application/json", strings.NewReader(`{"reference":"1","cents":1}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Error(resp.Status)
	}
}

func TestProcessorForgetsALineThatWasCutOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	p, c := processorAt(t, path, faults{})
	if _, err := c.pay(t.Context(), "whole", twenty); err != nil {
		t.Fatal(err)
	}
	p.ledger.WriteString(`{"kind":"payout","id":"payout-0000`)
	p.ledger.Close()
	p, c = processorAt(t, path, faults{})
	if id, err := c.pay(t.Context(), "next", twenty); err != nil || id != "payout-000002" {
		t.Error(id, err)
	}
	entries, _, err := readLedger(path)
	if err != nil || len(entries) != 2 || p.counts.Payouts != 2 {
		t.Errorf("the ledger has %v (%v)", entries, err)
	}
}

// sound is the end of a show in which ada paid bob and nothing else was possible.
func sound() (*tally, []line) {
	paidOne := request{Key: "1", From: "ada", To: "bob", Cents: 20_00}
	refusedOne := request{Key: "2", From: "ada", To: "ada", Cents: 20_00}
	accounts := maps.Clone(openingBalances)
	accounts["ada"] -= 20_00
	accounts["bob"] += 20_00
	answers := map[int]answer{
		1: {Line: 1, request: paidOne, Status: paid, Payout: "payout-1"},
		2: {Line: 2, request: refusedOne, Status: refused, Error: "payer and payee are the same"},
	}
	t := &tally{
		requests: 2, answers: answers,
		given:  map[request]answer{paidOne: answers[1], refusedOne: answers[2]},
		lost:   map[int]string{},
		before: books{accounts: openingBalances},
		after:  books{accounts: accounts, payouts: map[string]string{"1": "payout-1"}, receipts: map[string]string{"1": "receipt-1"}},
		ledger: []entry{
			{Kind: payoutKind, ID: "payout-1", Token: "a", order: order{Reference: "1", From: "ada", To: "bob", Cents: 20_00}},
			{Kind: receiptKind, ID: "receipt-1", Token: "b", order: order{Reference: "1", From: "ada", To: "bob", Cents: 20_00, Payout: "payout-1"}},
		},
	}
	return t, []line{{number: 1, request: paidOne}, {number: 2, request: refusedOne}}
}

func TestTheAuditSeesEachFault(t *testing.T) {
	s, lines := sound()
	if s.audit(lines); len(s.wrong) > 0 {
		t.Fatal(s.wrong)
	}
	for name, spoil := range map[string]func(*tally){
		"payout twice":           func(s *tally) { s.ledger = append(s.ledger, s.ledger[0]) },
		"receipt twice":          func(s *tally) { s.ledger = append(s.ledger, s.ledger[1]) },
		"payout missing":         func(s *tally) { s.ledger = s.ledger[1:] },
		"receipt missing":        func(s *tally) { s.ledger = s.ledger[:1] },
		"payout nobody asked":    func(s *tally) { s.ledger[0].Reference = "2" },
		"payout of more":         func(s *tally) { s.ledger[0].Cents++ },
		"payout of another name": func(s *tally) { s.ledger[0].ID = "payout-9" },
		"receipt not noted":      func(s *tally) { delete(s.after.receipts, "1") },
		"a cent gone":            func(s *tally) { s.after.accounts["carol"]-- },
		"a cent moved":           func(s *tally) { s.after.accounts["carol"]--; s.after.accounts["dan"]++ },
		"a cent held":            func(s *tally) { s.after.accounts["ada"]--; s.after.reserved = map[string]int64{"1": 1} },
		"answer changed":         func(s *tally) { s.lost[1] = "was another" },
		"answer missing":         func(s *tally) { delete(s.answers, 2) },
		"no answer yet":          func(s *tally) { s.answers[2] = answer{Line: 2, request: s.answers[2].request, Status: open} },
		"paid to oneself": func(s *tally) {
			r := s.answers[2].request
			s.given[r] = answer{Line: 2, request: r, Status: paid, Payout: "payout-1"}
		},
		"mismatch with nothing": func(s *tally) {
			r := s.answers[2].request
			s.given[r] = answer{Line: 2, request: r, Status: mismatch}
		},
		"one key, two requests": func(s *tally) {
			r := s.answers[1].request
			r.Cents++
			s.given[r] = answer{Line: 3, request: r, Status: refused}
		},
		"key left over":     func(s *tally) { s.after.unfinished = 1 },
		"key parked":        func(s *tally) { s.after.parked = 1 },
		"token used anew":   func(s *tally) { s.calls.Refused = 1 },
		"call in a replay":  func(s *tally) { s.settledBefore, s.calls.Calls = true, 1 },
		"account vanished":  func(s *tally) { delete(s.after.accounts, "declined@closed.example") },
		"books without pay": func(s *tally) { s.after.payouts["3"] = "payout-3" },
	} {
		t.Run(name, func(t *testing.T) {
			s, lines := sound()
			spoil(s)
			if s.audit(lines); len(s.wrong) == 0 {
				t.Error("it saw nothing")
			}
		})
	}
}

func TestMoneyReadsLikeMoney(t *testing.T) {
	for cents, want := range map[int64]string{0: "0.00", 5: "0.05", 123_45: "123.45", 1_234_567_89: "1,234,567.89", -1_000_00: "-1,000.00"} {
		if got := money(cents); got != want {
			t.Errorf("%d cents are %s, not %s", cents, got, want)
		}
	}
}
