package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"example.com/keystate"
	"example.com/keystate/keytest"
	"go.etcd.io/bbolt"
)

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

// The show kills at random; here the same phases are stopped at every place, with the processor that the show uses.
func TestTransferSurvivesEveryCrash(t *testing.T) {
	for name, request := range map[string]Transfer{
		"paid":                      {ID: "t1", From: "ada", To: "bob", Cents: 20_00},
		"declined by the processor": {ID: "t2", From: "ada", To: "declined@closed.example", Cents: 20_00},
		"more than there is":        {ID: "t3", From: "ada", To: "bob", Cents: 1_000_000_00},
	} {
		t.Run(name, func(t *testing.T) {
			keytest.Crash(t, func(*keytest.World) keytest.Case[*bbolt.Tx, Transfer] { return transferCase(t, request) })
		})
	}
}

func transferCase(t *testing.T, request Transfer) keytest.Case[*bbolt.Tx, Transfer] {
	ledger := filepath.Join(t.TempDir(), "ledger")
	processor, err := openProcessor(ledger, faults{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { processor.ledger.Close() })
	processing := &client{url: "http://processor", http: http.Client{Transport: directLine{processor.handler()}}}
	return keytest.Case[*bbolt.Tx, Transfer]{
		Phases: func(e *keystate.Engine[*bbolt.Tx]) []keystate.Phase[*bbolt.Tx, Transfer] {
			desk := &teller{processor: processing}
			if desk.receipts, err = keystate.Register(e, "receipt", desk.receiptPhases()); err != nil {
				t.Fatal(err)
			}
			return desk.transferPhases()
		},
		Setup:   openAccounts,
		Request: request,
		Check:   moneyIsConserved,
		Outside: func() any {
			entries, _, err := readLedger(ledger)
			return []any{entries, err} // but for the tokens, the same in every run
		},
	}
}

// moneyIsConserved also when a transfer was declined or refused, and then nothing stays reserved.
func moneyIsConserved(tx *bbolt.Tx, _ Transfer, _ error) error {
	is := books{accounts: amounts(tx.Bucket(accountsBucket)), reserved: amounts(tx.Bucket(reservedBucket))}
	was := books{accounts: openingBalances}
	if len(is.reserved) > 0 || is.sum() != was.sum() {
		return fmt.Errorf("there is %s and %v reserved, of %s", money(is.sum()), is.reserved, money(was.sum()))
	}
	return nil
}
