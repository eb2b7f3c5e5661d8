package processor

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// processorAt serves a processor with its ledger in the file at path.
func processorAt(t *testing.T, path string, f Faults) (*Processor, *Client) {
	t.Helper()
	p, err := Open(path, f)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(p.Handler())
	t.Cleanup(func() {
		server.Close()
		p.ledger.Close()
	})
	return p, &Client{URL: server.URL}
}

var twenty = Order{Reference: "order-1", From: "ada", To: "bob", Cents: 20_00}

func TestProcessorPaysOncePerToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	p, c := processorAt(t, path, Faults{})
	first, err := c.Pay(t.Context(), "token", twenty)
	if err != nil || first == "" {
		t.Fatal(first, err)
	}
	again, err := c.Pay(t.Context(), "token", twenty)
	if err != nil || again != first {
		t.Errorf("the second answer is %q, %v; the first was %q", again, err, first)
	}
	other := twenty
	other.Cents++
	if id, err := c.Pay(t.Context(), "token", other); err == nil || !strings.Contains(err.Error(), "422") {
		t.Errorf("the token with another order: %q, %v", id, err)
	}
	if id, err := c.Deliver(t.Context(), "token", twenty); err == nil || !strings.Contains(err.Error(), "422") {
		t.Errorf("the token with a receipt: %q, %v", id, err)
	}
	if want := (Counts{Calls: 4, Replays: 1, Refused: 2, Tokens: 1, Payouts: 1}); p.counts != want {
		t.Errorf("counted %+v, not %+v", p.counts, want)
	}
	p.ledger.Close()
	_, c = processorAt(t, path, Faults{})
	if late, err := c.Pay(t.Context(), "token", twenty); err != nil || late != first {
		t.Errorf("after a restart the answer is %q, %v; it was %q", late, err, first)
	}
}

func TestProcessorSeesOneTransferUnderTwoTokens(t *testing.T) {
	p, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), Faults{})
	for _, token := range []string{"a", "b"} {
		if _, err := c.Pay(t.Context(), token, twenty); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Deliver(t.Context(), "receipt "+token, twenty); err != nil {
			t.Fatal(err)
		}
	}
	want := Counts{Calls: 4, Tokens: 4, Payouts: 2, DuplicatePayouts: 1, Receipts: 2, DuplicateReceipts: 1}
	if p.counts != want {
		t.Errorf("counted %+v, not %+v", p.counts, want)
	}
}

func TestProcessorFaults(t *testing.T) {
	for name, f := range map[string]struct {
		Faults
		done int
	}{
		"fails": {Faults{Fail: 1}, 0},
		"loses": {Faults{Lose: 1}, 1},
		"slow":  {Faults{Slow: 1}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			p, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), f.Faults)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if id, err := c.Pay(ctx, "token", twenty); err == nil {
				t.Errorf("it answered %q", id)
			}
			if s, err := c.Stats(t.Context()); err != nil || s.Payouts != f.done || p.numbers[Payout] != f.done {
				t.Errorf("it counts %d payouts, not %d (%v)", s.Payouts, f.done, err)
			}
		})
	}
}

func TestProcessorDeclines(t *testing.T) {
	p, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), Faults{})
	for _, o := range []Order{
		{Reference: "1", From: "ada", To: "declined@closed.example", Cents: 1},
		{Reference: "2", From: "ada", To: "bob", Cents: PayoutLimit + 1},
	} {
		var no *DeclinedError
		if id, err := c.Pay(t.Context(), o.Reference, o); !errors.As(err, &no) {
			t.Errorf("%+v: %q, %v", o, id, err)
		}
	}
	if p.numbers[Payout] != 0 {
		t.Error("it paid")
	}
}

func TestProcessorNeedsAToken(t *testing.T) {
	_, c := processorAt(t, filepath.Join(t.TempDir(), "ledger"), Faults{})
	resp, err := http.Post(c.URL+"/payouts", "application/json", strings.NewReader(`{"reference":"1","cents":1}`))
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
	p, c := processorAt(t, path, Faults{})
	if _, err := c.Pay(t.Context(), "whole", twenty); err != nil {
		t.Fatal(err)
	}
	p.ledger.WriteString(`{"kind":"payout","id":"payout-0000`)
	p.ledger.Close()
	p, c = processorAt(t, path, Faults{})
	if id, err := c.Pay(t.Context(), "next", twenty); err != nil || id != "payout-000002" {
		t.Error(id, err)
	}
	entries, _, err := ReadLedger(path)
	if err != nil || len(entries) != 2 || p.counts.Payouts != 2 {
		t.Errorf("the ledger has %v (%v)", entries, err)
	}
}

func TestProcessorPausesForAnOrderAndNotForItsReplay(t *testing.T) {
	p, err := Open(filepath.Join(t.TempDir(), "ledger"), Faults{Pause: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	synctest.Test(t, func(t *testing.T) {
		for _, want := range []time.Duration{time.Hour, 0} {
			r := httptest.NewRequest("POST", "/payouts", strings.NewReader(`{"reference":"1","from":"ada","to":"bob","cents":1}`))
			r.Header.Set("Idempotency-Key", "token")
			began := time.Now()
			p.Handler().ServeHTTP(httptest.NewRecorder(), r)
			if took := time.Since(began); took != want {
				t.Errorf("it took %v, not %v", took, want)
			}
		}
	})
}
