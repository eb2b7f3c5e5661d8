package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
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
	for _, w := range result.Wrong {
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
	if first.requests != 100 || first.killed != 5 || len(first.answers) != 100 || first.Payouts.Entries == 0 || first.calls.Calls < first.Payouts.Entries {
		t.Errorf("the show was not a show: %d requests, %d kills, %d answers, %d payouts, %d calls",
			first.requests, first.killed, len(first.answers), first.Payouts.Entries, first.calls.Calls)
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

// sound is the end of a show in which ada paid bob and nothing else was possible.
func sound() (*tally, []line) {
	paidOne := request{Key: "1", From: "ada", To: "bob", Cents: 20_00}
	refusedOne := request{Key: "2", From: "ada", To: "ada", Cents: 20_00}
	accounts := maps.Clone(money.OpeningBalances)
	accounts["ada"] -= 20_00
	accounts["bob"] += 20_00
	answers := map[int]answer{
		1: {Line: 1, request: paidOne, Status: paid, Payout: "payout-1"},
		2: {Line: 2, request: refusedOne, Status: refused, Error: "payer and payee are the same"},
	}
	t := &tally{
		requests: 2, answers: answers,
		given: map[request]answer{paidOne: answers[1], refusedOne: answers[2]},
		lost:  map[int]string{},
	}
	t.Count = audit.Count{
		Before: audit.Books{Books: money.Books{Accounts: money.OpeningBalances}},
		After: audit.Books{Books: money.Books{
			Accounts:  accounts,
			Transfers: map[string]money.Transfer{"1": {ID: "1", From: "ada", To: "bob", Cents: 20_00, Status: money.Paid, Payout: "payout-1"}},
			Receipts:  map[string]string{"1": "receipt-1"},
		}},
		Ledger: []processor.Entry{
			{Kind: processor.Payout, ID: "payout-1", Token: "a", Order: processor.Order{Reference: "1", From: "ada", To: "bob", Cents: 20_00}},
			{Kind: processor.Receipt, ID: "receipt-1", Token: "b", Order: processor.Order{Reference: "1", From: "ada", To: "bob", Cents: 20_00, Payout: "payout-1"}},
		},
	}
	return t, []line{{number: 1, request: paidOne}, {number: 2, request: refusedOne}}
}

func TestTheAuditSeesEachFault(t *testing.T) {
	s, lines := sound()
	if s.judge(lines); len(s.Wrong) > 0 {
		t.Fatal(s.Wrong)
	}
	for name, spoil := range map[string]func(*tally){
		"payout twice":           func(s *tally) { s.Ledger = append(s.Ledger, s.Ledger[0]) },
		"receipt twice":          func(s *tally) { s.Ledger = append(s.Ledger, s.Ledger[1]) },
		"payout missing":         func(s *tally) { s.Ledger = s.Ledger[1:] },
		"receipt missing":        func(s *tally) { s.Ledger = s.Ledger[:1] },
		"payout nobody asked":    func(s *tally) { s.Ledger[0].Reference = "2" },
		"payout of more":         func(s *tally) { s.Ledger[0].Cents++ },
		"payout of another name": func(s *tally) { s.Ledger[0].ID = "payout-9" },
		"receipt not noted":      func(s *tally) { delete(s.After.Receipts, "1") },
		"a cent gone":            func(s *tally) { s.After.Accounts["carol"]-- },
		"a cent moved":           func(s *tally) { s.After.Accounts["carol"]--; s.After.Accounts["dan"]++ },
		"a cent held":            func(s *tally) { s.After.Accounts["ada"]--; s.After.Reserved = map[string]int64{"1": 1} },
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
		"key left over":     func(s *tally) { s.After.Unfinished = 1 },
		"key parked":        func(s *tally) { s.After.Parked = 1 },
		"token used anew":   func(s *tally) { s.calls.Refused = 1 },
		"call in a replay":  func(s *tally) { s.settledBefore, s.calls.Calls = true, 1 },
		"account vanished":  func(s *tally) { delete(s.After.Accounts, "declined@closed.example") },
		"books without pay": func(s *tally) { s.After.Transfers["3"] = money.Transfer{Payout: "payout-3"} },
	} {
		t.Run(name, func(t *testing.T) {
			s, lines := sound()
			spoil(s)
			if s.judge(lines); len(s.Wrong) == 0 {
				t.Error("it saw nothing")
			}
		})
	}
}
