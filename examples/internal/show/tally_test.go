package show

import (
	"maps"
	"testing"

	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
)

// sound is the end of a show in which ada paid bob and nothing else was possible.
func sound() (*Tally, []line) {
	paidOne := request{Key: "1", From: "ada", To: "bob", Cents: 20_00}
	refusedOne := request{Key: "2", From: "ada", To: "ada", Cents: 20_00}
	accounts := maps.Clone(money.OpeningBalances)
	accounts["ada"] -= 20_00
	accounts["bob"] += 20_00
	answers := map[int]answer{
		1: {Line: 1, request: paidOne, Status: paid, Payout: "payout-1"},
		2: {Line: 2, request: refusedOne, Status: refused, Error: "payer and payee are the same"},
	}
	t := &Tally{
		Requests: 2, Answers: answers,
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
	for name, spoil := range map[string]func(*Tally){
		"payout twice":           func(s *Tally) { s.Ledger = append(s.Ledger, s.Ledger[0]) },
		"receipt twice":          func(s *Tally) { s.Ledger = append(s.Ledger, s.Ledger[1]) },
		"payout missing":         func(s *Tally) { s.Ledger = s.Ledger[1:] },
		"receipt missing":        func(s *Tally) { s.Ledger = s.Ledger[:1] },
		"payout nobody asked":    func(s *Tally) { s.Ledger[0].Reference = "2" },
		"payout of more":         func(s *Tally) { s.Ledger[0].Cents++ },
		"payout of another name": func(s *Tally) { s.Ledger[0].ID = "payout-9" },
		"receipt not noted":      func(s *Tally) { delete(s.After.Receipts, "1") },
		"a cent gone":            func(s *Tally) { s.After.Accounts["carol"]-- },
		"a cent moved":           func(s *Tally) { s.After.Accounts["carol"]--; s.After.Accounts["dan"]++ },
		"a cent held":            func(s *Tally) { s.After.Accounts["ada"]--; s.After.Reserved = map[string]int64{"1": 1} },
		"answer changed":         func(s *Tally) { s.lost[1] = "was another" },
		"answer missing":         func(s *Tally) { delete(s.Answers, 2) },
		"no answer yet":          func(s *Tally) { s.Answers[2] = answer{Line: 2, request: s.Answers[2].request, Status: open} },
		"paid to oneself": func(s *Tally) {
			r := s.Answers[2].request
			s.given[r] = answer{Line: 2, request: r, Status: paid, Payout: "payout-1"}
		},
		"mismatch with nothing": func(s *Tally) {
			r := s.Answers[2].request
			s.given[r] = answer{Line: 2, request: r, Status: mismatch}
		},
		"one key, two requests": func(s *Tally) {
			r := s.Answers[1].request
			r.Cents++
			s.given[r] = answer{Line: 3, request: r, Status: refused}
		},
		"key left over":     func(s *Tally) { s.After.Unfinished = 1 },
		"key parked":        func(s *Tally) { s.After.Parked = 1 },
		"token used anew":   func(s *Tally) { s.Calls.Refused = 1 },
		"call in a replay":  func(s *Tally) { s.settledBefore, s.Calls.Calls = true, 1 },
		"account vanished":  func(s *Tally) { delete(s.After.Accounts, "declined@closed.example") },
		"books without pay": func(s *Tally) { s.After.Transfers["3"] = money.Transfer{Payout: "payout-3"} },
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
