package money_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
	"example.com/keystate/keytest"
	"go.etcd.io/bbolt"
)

// impatient is a teller whose processor answers at once or not at all.
var impatient = money.Patience{
	Timeout: 400 * time.Millisecond,
	Retry:   keystate.RetryPolicy{Attempts: 100, InRun: 5, Initial: 10 * time.Millisecond, Max: 500 * time.Millisecond},
}

// A direct line hands requests to a handler without a network, so that time can pass without waiting.
type directLine struct{ to http.Handler }

func (l directLine) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	l.to.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil { // the client has gone, whatever the other side has done
		return nil, err
	}
	return w.Result(), nil
}

// The examples kill at random; here the same phases are stopped at every place, with the processor that the examples use.
func TestTransferSurvivesEveryCrash(t *testing.T) {
	for name, request := range map[string]money.Transfer{
		"paid":                      {ID: "t1", From: "ada", To: "bob", Cents: 20_00},
		"declined by the processor": {ID: "t2", From: "ada", To: "declined@closed.example", Cents: 20_00},
		"more than there is":        {ID: "t3", From: "ada", To: "bob", Cents: 1_000_000_00},
	} {
		t.Run(name, func(t *testing.T) {
			keytest.Crash(t, func(*keytest.World) keytest.Case[*bbolt.Tx, money.Transfer] { return transferCase(t, request) })
		})
	}
}

func transferCase(t *testing.T, request money.Transfer) keytest.Case[*bbolt.Tx, money.Transfer] {
	ledger := filepath.Join(t.TempDir(), "ledger")
	p, err := processor.Open(ledger, processor.Faults{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	processing := &processor.Client{URL: "http://processor", HTTP: http.Client{Transport: directLine{p.Handler()}}}
	return keytest.Case[*bbolt.Tx, money.Transfer]{
		Phases: func(e *keystate.Engine[*bbolt.Tx]) []keystate.Phase[*bbolt.Tx, money.Transfer] {
			teller, err := money.NewTeller(e, money.Buckets{}, processing, impatient)
			if err != nil {
				t.Fatal(err)
			}
			return teller.Phases()
		},
		Setup:   money.OpenAccounts,
		Request: request,
		Check:   moneyIsConserved,
		Outside: func() any {
			entries, _, err := processor.ReadLedger(ledger)
			return []any{entries, err} // but for the tokens, the same in every run
		},
	}
}

// moneyIsConserved also when a transfer was declined or refused, and then nothing stays reserved.
func moneyIsConserved(tx *bbolt.Tx, _ money.Transfer, _ error) error {
	is, err := money.ReadBooks(tx)
	if err != nil {
		return err
	}
	was := money.Books{Accounts: money.OpeningBalances}
	if len(is.Reserved) > 0 || is.Sum() != was.Sum() {
		return fmt.Errorf("there is %s and %v reserved, of %s", money.Text(is.Sum()), is.Reserved, money.Text(was.Sum()))
	}
	return nil
}
