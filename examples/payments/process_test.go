package main

import (
	"context"
	"io"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/keystate/examples/internal/processor"
)

// These tests are about the service as a whole: flags, network, and its end.

func TestTheProcessEndsWithItsRequestsAnswered(t *testing.T) {
	for name, c := range map[string]struct {
		slow, grace string
		status      int
	}{
		"in time":     {"200ms", "1m", http.StatusCreated},
		"not in time": {"1h", "1ms", http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			store := filepath.Join(t.TempDir(), "payments.db")
			p := startProcess(t, "-addr", "127.0.0.1:0", "-store", store, "-slow", c.slow, "-grace", c.grace)
			answered := make(chan int)
			go func() { answered <- p.pay("k1") }()
			await(t, func() bool { // until the processor has paid
				entries, _, err := processor.ReadLedger(store + ".ledger.jsonl")
				return err == nil && len(entries) > 0
			})
			if err := p.stop(); err != nil {
				t.Error(err)
			}
			if status := <-answered; status != c.status {
				t.Errorf("the request under way is told %d", status)
			}
			again := startProcess(t, "-addr", "127.0.0.1:0", "-store", store)
			await(t, func() bool { return again.pay("k1") == http.StatusCreated })
			if err := again.stop(); err != nil {
				t.Error(err)
			}
			entries, _, err := processor.ReadLedger(store + ".ledger.jsonl")
			if err != nil || len(entries) == 0 || len(entries) > 2 {
				t.Errorf("the ledger has %v (%v)", entries, err)
			}
		})
	}
}

// A process is run in this one.
type process struct {
	t    *testing.T
	url  string
	stop func() error
}

func startProcess(t *testing.T, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out, in := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, args, in, io.Discard) }()
	p := &process{t: t, stop: sync.OnceValue(func() error {
		cancel()
		return <-ended
	})}
	t.Cleanup(func() { p.stop() })
	line := make([]byte, 100)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	p.url = strings.TrimSpace(string(line[:n]))
	return p
}

func (p *process) pay(key string) int {
	r, err := http.NewRequest("POST", p.url+"/v1/transfers", strings.NewReader(twenty))
	if err != nil {
		p.t.Error(err)
		return 0
	}
	r.Header = http.Header{"Authorization": {"Bearer ada-secret"}, "Idempotency-Key": {key}, "Content-Type": {"application/json"}}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		p.t.Error(err)
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// await asks until it is so.
func await(t *testing.T, so func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !so(); {
		if time.Now().After(end) {
			t.Fatal("it never was")
		}
		runtime.Gosched()
	}
}

func TestFlagsThatContradictAreRefused(t *testing.T) {
	for _, args := range [][]string{
		{"serve"}, {"-slow", "1s", "-processor", "http://127.0.0.1:1"}, {"-store", filepath.Join("no", "such", "place", "payments.db"), "-addr", "127.0.0.1:0"},
	} {
		if err := run(t.Context(), args, io.Discard, io.Discard); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
}
