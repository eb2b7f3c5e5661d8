package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

// This file is the world outside: a payment processor as a program meets it. It takes the Idempotency-Key header at its
// word and forgets nothing, but it answers late, or never, or with a fault of its own.

// An order is what the processor is asked to do.
type order struct {
	Reference string `json:"reference"` // the client's name for it; the processor does not look at it
	From      string `json:"from"`
	To        string `json:"to"`
	Cents     int64  `json:"cents"`
	Payout    string `json:"payout,omitempty"` // of a receipt: what it is for
}

// kinds of entries
const (
	payoutKind  = "payout"
	receiptKind = "receipt"
)

// An entry is one line of the processor's ledger: something done, once.
type entry struct {
	Kind  string `json:"kind"`
	ID    string `json:"id"`
	Token string `json:"token"`
	order
}

const slowest = 10 * time.Second

// faults are the shares of the calls that go wrong.
type faults struct {
	seed int64
	fail float64 // answered with 500, and nothing done
	lose float64 // done, and the connection closed without an answer
	slow float64 // done, and no answer until the client has given up
}

// counts is what GET /stats shows. Calls and what became of them count from the start of the process, the rest is in the ledger.
type counts struct {
	Calls    int `json:"calls"`
	Replays  int `json:"replays"`
	Declined int `json:"declined"`
	Refused  int `json:"refused"` // a token came with another order
	Failed   int `json:"failed"`
	Lost     int `json:"lost"`
	Slow     int `json:"slow"`

	Tokens            int `json:"tokens"`
	Payouts           int `json:"payouts"`
	DuplicatePayouts  int `json:"duplicate_payouts"` // beyond the first with the same reference
	Receipts          int `json:"receipts"`
	DuplicateReceipts int `json:"duplicate_receipts"`
}

// A processor does each order once per token. Its ledger is on disk before it answers.
type processor struct {
	faults faults
	ledger *os.File

	mu      sync.Mutex
	byToken map[string]entry
	numbers map[string]int // entries by kind
	seen    map[string]int // calls by kind and reference: the faults' dice
	done    map[string]int // entries by kind and reference
	counts  counts
}

func openProcessor(path string, f faults) (*processor, error) {
	entries, size, err := readLedger(path)
	if err != nil {
		return nil, err
	}
	ledger, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = ledger.Seek(size, io.SeekStart)
	if err = errors.Join(err, ledger.Truncate(size)); err != nil { // a line that was cut off was never answered
		return nil, errors.Join(err, ledger.Close())
	}
	p := &processor{
		faults: f, ledger: ledger,
		byToken: map[string]entry{}, numbers: map[string]int{}, seen: map[string]int{}, done: map[string]int{},
	}
	for _, e := range entries {
		p.note(e)
	}
	return p, nil
}

// readLedger reads the whole lines of a ledger, and says where they end.
func readLedger(path string) (entries []entry, size int64, err error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, nil
	}
	for line := range bytes.Lines(text) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		var e entry
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, 0, fmt.Errorf("%s: line %d: %w", path, len(entries)+1, err)
		}
		entries = append(entries, e)
		size += int64(len(line))
	}
	return entries, size, err
}

// note takes an entry in that is on disk.
func (p *processor) note(e entry) {
	p.byToken[e.Token] = e
	p.numbers[e.Kind]++
	p.counts.Tokens++
	again := p.done[e.Kind+" "+e.Reference] > 0
	p.done[e.Kind+" "+e.Reference]++
	switch {
	case e.Kind == payoutKind && again:
		p.counts.DuplicatePayouts++
	case again:
		p.counts.DuplicateReceipts++
	}
	p.counts.Payouts, p.counts.Receipts = p.numbers[payoutKind], p.numbers[receiptKind]
}

func (p *processor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /payouts", func(w http.ResponseWriter, r *http.Request) { p.serve(w, r, payoutKind) })
	mux.HandleFunc("POST /receipts", func(w http.ResponseWriter, r *http.Request) { p.serve(w, r, receiptKind) })
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		reply(w, http.StatusOK, p.counts)
	})
	return mux
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

func (p *processor) serve(w http.ResponseWriter, r *http.Request, kind string) {
	token := r.Header.Get("Idempotency-Key")
	var o order
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&o); err != nil || token == "" {
		reply(w, http.StatusBadRequest, refusal{"an order and an Idempotency-Key are needed"})
		return
	}
	fault := p.count(kind, o)
	if fault == &p.counts.Failed {
		reply(w, http.StatusInternalServerError, refusal{"out of order"})
		return
	}
	status, answer, err := p.do(kind, token, o)
	switch {
	case err != nil: // what is on disk now, the next start of the processor will find out
		fmt.Fprintln(os.Stderr, "processor:", err)
		os.Exit(1)
	case fault == &p.counts.Lost:
		panic(http.ErrAbortHandler)
	case fault == &p.counts.Slow:
		select {
		case <-r.Context().Done():
		case <-time.After(slowest): // of a client that does not give up
		}
		panic(http.ErrAbortHandler)
	}
	reply(w, status, answer)
}

// count counts a call, and draws which fault it meets, if any. The draw depends on the order and on how often it
// came, not on who else calls.
func (p *processor) count(kind string, o order) (fault *int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts.Calls++
	name := kind + " " + o.Reference
	p.seen[name]++
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %d", name, p.seen[name])
	drawn := rand.New(rand.NewPCG(uint64(p.faults.seed), h.Sum64())).Float64()
	for _, f := range []struct {
		share float64
		count *int
	}{{p.faults.fail, &p.counts.Failed}, {p.faults.lose, &p.counts.Lost}, {p.faults.slow, &p.counts.Slow}} {
		if drawn -= f.share; drawn < 0 {
			*f.count++
			return f.count
		}
	}
	return nil
}

// A refusal is the body of an answer that is none of 2xx.
type refusal struct {
	Error string `json:"error"`
}

// A confirmation is the body of a 201.
type confirmation struct {
	PayoutID  string `json:"payout_id,omitempty"`
	ReceiptID string `json:"receipt_id,omitempty"`
}

// do carries an order out, or answers as it did when the token came first.
func (p *processor) do(kind, token string, o order) (status int, answer any, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, known := p.byToken[token]
	switch {
	case known && (e.Kind != kind || e.order != o):
		p.counts.Refused++
		return http.StatusUnprocessableEntity, refusal{"the Idempotency-Key was used for another order"}, nil
	case known:
		p.counts.Replays++
	default:
		if reason := decline(kind, o); reason != "" { // decided by the order alone, so there is nothing to keep
			p.counts.Declined++
			return http.StatusPaymentRequired, refusal{reason}, nil
		}
		e = entry{Kind: kind, Token: token, order: o, ID: fmt.Sprintf("%s-%06d", kind, p.numbers[kind]+1)}
		if err := p.write(e); err != nil {
			return 0, nil, err
		}
		p.note(e)
	}
	if kind == payoutKind {
		return http.StatusCreated, confirmation{PayoutID: e.ID}, nil
	}
	return http.StatusCreated, confirmation{ReceiptID: e.ID}, nil
}

func (p *processor) write(e entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	_, err = p.ledger.Write(append(line, '\n'))
	return errors.Join(err, p.ledger.Sync())
}

const payoutLimit = 5_000_00

// decline is why the processor will not carry an order out.
func decline(kind string, o order) string {
	switch {
	case kind != payoutKind:
		return ""
	case strings.HasPrefix(o.To, "declined@"):
		return "the payee's account is closed"
	case o.Cents > payoutLimit:
		return "over the limit of " + money(payoutLimit)
	}
	return ""
}

// runProcessor is the processor's process. It ends when its standard input does.
func runProcessor(args []string) error {
	var f faults
	flags := flag.NewFlagSet("processor", flag.ExitOnError)
	ledger := flags.String("ledger", "", "the `file` of what was done")
	flags.Int64Var(&f.seed, "seed", 0, "of the faults")
	flags.Float64Var(&f.fail, "fail", 0, "share of the calls that are answered with 500")
	flags.Float64Var(&f.lose, "lose", 0, "share of the calls whose answer is lost")
	flags.Float64Var(&f.slow, "slow", 0, "share of the calls that time out")
	flags.Parse(args)
	p, err := openProcessor(*ledger, f)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: p.handler()}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	fmt.Printf("http://%s\n", listener.Addr())
	io.Copy(io.Discard, os.Stdin)
	err = server.Close()
	if fault := <-served; !errors.Is(fault, http.ErrServerClosed) {
		err = fault
	}
	p.mu.Lock() // held for good: no order is half done
	return errors.Join(err, p.ledger.Close())
}

// A client speaks to the processor.
type client struct {
	url  string
	http http.Client
}

// A declinedError is the processor's word that it will not do what it was asked to, now or later.
type declinedError struct{ reason string }

func (e *declinedError) Error() string { return "declined: " + e.reason }

func (c *client) pay(ctx context.Context, token string, o order) (payout string, err error) {
	done, err := c.post(ctx, "/payouts", token, o)
	return done.PayoutID, err
}

func (c *client) deliver(ctx context.Context, token string, o order) (receipt string, err error) {
	done, err := c.post(ctx, "/receipts", token, o)
	return done.ReceiptID, err
}

func (c *client) post(ctx context.Context, path, token string, o order) (done confirmation, err error) {
	body, err := json.Marshal(o)
	if err != nil {
		return done, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+path, bytes.NewReader(body))
	if err != nil {
		return done, err
	}
	req.Header.Set("Idempotency-Key", token)
	req.Header.Set("Content-Type", "application/json")
	req.GetBody = nil // or net/http, seeing the header, would send again by itself what no answer came to
	resp, err := c.http.Do(req)
	if err != nil {
		return done, err
	}
	defer resp.Body.Close()
	answer := json.NewDecoder(bufio.NewReader(resp.Body))
	if resp.StatusCode == http.StatusCreated {
		if err = answer.Decode(&done); err == nil && done == (confirmation{}) {
			err = errors.New("the processor's answer names nothing")
		}
		return done, err
	}
	var no refusal
	err = answer.Decode(&no)
	if resp.StatusCode == http.StatusPaymentRequired && err == nil {
		return done, &declinedError{no.Error}
	}
	return done, fmt.Errorf("the processor answers %s: %s", resp.Status, cmp.Or(no.Error, "no reason given"))
}

func (c *client) stats(ctx context.Context) (s counts, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+"/stats", nil)
	if err != nil {
		return s, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return s, err
	}
	defer resp.Body.Close()
	return s, json.NewDecoder(resp.Body).Decode(&s)
}
