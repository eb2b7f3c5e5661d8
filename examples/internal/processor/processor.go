// Package processor is the world outside: a payment processor as a program meets it. It takes the Idempotency-Key header at
// its word and forgets nothing, but it answers late, or never, or with a fault of its own.
package processor

import (
	"bytes"
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

// An Order is what the processor is asked to do.
type Order struct {
	Reference string `json:"reference"` // the client's name for it; the processor does not look at it
	From      string `json:"from"`
	To        string `json:"to"`
	Cents     int64  `json:"cents"`
	Payout    string `json:"payout,omitempty"` // of a receipt: what it is for
}

// What the processor does: the kinds of its ledger's entries.
const (
	Payout  = "payout"
	Receipt = "receipt"
)

// An Entry is one line of the processor's ledger: something done, once.
type Entry struct {
	Kind  string `json:"kind"`
	ID    string `json:"id"`
	Token string `json:"token"`
	Order
}

const slowest = 10 * time.Second

// Faults are what is wrong with a processor: the shares of the calls that go wrong, and how long the others take.
type Faults struct {
	Seed int64
	Fail float64 // answered with 500, and nothing done
	Lose float64 // done, and the connection closed without an answer
	Slow float64 // done, and no answer until the client has given up

	Pause time.Duration // between doing an order and answering
}

// Counts is what GET /stats shows. Calls and what became of them count from the start of the process, the rest is in the ledger.
type Counts struct {
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

// A Processor does each order once per token. Its ledger is on disk before it answers.
type Processor struct {
	faults Faults
	ledger *os.File

	mu      sync.Mutex
	byToken map[string]Entry
	numbers map[string]int // entries by kind
	seen    map[string]int // calls by kind and reference: the faults' dice
	done    map[string]int // entries by kind and reference
	counts  Counts
}

// Open goes on with the ledger at path.
func Open(path string, f Faults) (*Processor, error) {
	entries, size, err := ReadLedger(path)
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
	p := &Processor{
		faults: f, ledger: ledger,
		byToken: map[string]Entry{}, numbers: map[string]int{}, seen: map[string]int{}, done: map[string]int{},
	}
	for _, e := range entries {
		p.note(e)
	}
	return p, nil
}

// ReadLedger reads the whole lines of a ledger, and says where they end.
func ReadLedger(path string) (entries []Entry, size int64, err error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, nil
	}
	for line := range bytes.Lines(text) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		var e Entry
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, 0, fmt.Errorf("%s: line %d: %w", path, len(entries)+1, err)
		}
		entries = append(entries, e)
		size += int64(len(line))
	}
	return entries, size, err
}

// note takes an entry in that is on disk.
func (p *Processor) note(e Entry) {
	p.byToken[e.Token] = e
	p.numbers[e.Kind]++
	p.counts.Tokens++
	again := p.done[e.Kind+" "+e.Reference] > 0
	p.done[e.Kind+" "+e.Reference]++
	switch {
	case e.Kind == Payout && again:
		p.counts.DuplicatePayouts++
	case again:
		p.counts.DuplicateReceipts++
	}
	p.counts.Payouts, p.counts.Receipts = p.numbers[Payout], p.numbers[Receipt]
}

// Handler is the processor's interface: POST /payouts and /receipts, GET /stats.
func (p *Processor) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /payouts", func(w http.ResponseWriter, r *http.Request) { p.serve(w, r, Payout) })
	mux.HandleFunc("POST /receipts", func(w http.ResponseWriter, r *http.Request) { p.serve(w, r, Receipt) })
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

func (p *Processor) serve(w http.ResponseWriter, r *http.Request, kind string) {
	token := r.Header.Get("Idempotency-Key")
	var o Order
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&o); err != nil || token == "" {
		reply(w, http.StatusBadRequest, refusal{"an order and an Idempotency-Key are needed"})
		return
	}
	fault := p.count(kind, o)
	if fault == &p.counts.Failed {
		reply(w, http.StatusInternalServerError, refusal{"out of order"})
		return
	}
	done, err := p.do(kind, token, o)
	switch {
	case err != nil: // what is on disk now, the next start of the processor will find out
		fmt.Fprintln(os.Stderr, "processor:", err)
		os.Exit(1)
	case fault == &p.counts.Lost:
		panic(http.ErrAbortHandler)
	case fault == &p.counts.Slow:
		pause(r.Context(), slowest) // for a client that does not give up
		panic(http.ErrAbortHandler)
	case done.fresh:
		pause(r.Context(), p.faults.Pause)
	}
	reply(w, done.status, done.body)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// count counts a call, and draws which fault it meets, if any. The draw depends on the order and on how often it
// came, not on who else calls.
func (p *Processor) count(kind string, o Order) (fault *int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts.Calls++
	name := kind + " " + o.Reference
	p.seen[name]++
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %d", name, p.seen[name])
	drawn := rand.New(rand.NewPCG(uint64(p.faults.Seed), h.Sum64())).Float64()
	for _, f := range []struct {
		share float64
		count *int
	}{{p.faults.Fail, &p.counts.Failed}, {p.faults.Lose, &p.counts.Lost}, {p.faults.Slow, &p.counts.Slow}} {
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

// An outcome is an answer, and whether anything was done for it just now.
type outcome struct {
	status int
	body   any
	fresh  bool
}

// do carries an order out, or answers as it did when the token came first.
func (p *Processor) do(kind, token string, o Order) (done outcome, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, known := p.byToken[token]
	switch {
	case known && (e.Kind != kind || e.Order != o):
		p.counts.Refused++
		return outcome{status: http.StatusUnprocessableEntity, body: refusal{"the Idempotency-Key was used for another order"}}, nil
	case known:
		p.counts.Replays++
	default:
		if reason := Decline(kind, o); reason != "" { // decided by the order alone, so there is nothing to keep
			p.counts.Declined++
			return outcome{status: http.StatusPaymentRequired, body: refusal{reason}}, nil
		}
		e = Entry{Kind: kind, Token: token, Order: o, ID: fmt.Sprintf("%s-%06d", kind, p.numbers[kind]+1)}
		if err := p.write(e); err != nil {
			return outcome{}, err
		}
		p.note(e)
	}
	named := confirmation{ReceiptID: e.ID}
	if kind == Payout {
		named = confirmation{PayoutID: e.ID}
	}
	return outcome{http.StatusCreated, named, !known}, nil
}

func (p *Processor) write(e Entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	_, err = p.ledger.Write(append(line, '\n'))
	return errors.Join(err, p.ledger.Sync())
}

// PayoutLimit is the largest payout, in cents.
const PayoutLimit = 5_000_00

// Decline is why the processor will not carry an order out, or empty.
func Decline(kind string, o Order) string {
	switch {
	case kind != Payout:
		return ""
	case strings.HasPrefix(o.To, "declined@"):
		return "the payee's account is closed"
	case o.Cents > PayoutLimit:
		return fmt.Sprintf("over the limit of %d cents", PayoutLimit)
	}
	return ""
}

// Close ends a processor that nobody calls any more. No order is half done.
func (p *Processor) Close() error {
	p.mu.Lock() // held for good
	return p.ledger.Close()
}

// Run is the processor as a process of its own. It writes its address to standard output, and ends when its standard input does.
func Run(args []string) error {
	var f Faults
	flags := flag.NewFlagSet("processor", flag.ExitOnError)
	ledger := flags.String("ledger", "", "the `file` of what was done")
	flags.Int64Var(&f.Seed, "seed", 0, "of the faults")
	flags.Float64Var(&f.Fail, "fail", 0, "share of the calls that are answered with 500")
	flags.Float64Var(&f.Lose, "lose", 0, "share of the calls whose answer is lost")
	flags.Float64Var(&f.Slow, "slow", 0, "share of the calls that time out")
	flags.Parse(args)
	p, err := Open(*ledger, f)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return errors.Join(err, p.Close())
	}
	server := &http.Server{Handler: p.Handler()}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	fmt.Printf("http://%s\n", listener.Addr())
	io.Copy(io.Discard, os.Stdin)
	err = server.Close()
	if fault := <-served; !errors.Is(fault, http.ErrServerClosed) {
		err = fault
	}
	return errors.Join(err, p.Close())
}

// Args are the arguments with which [Run] starts a processor that has these faults.
func (f Faults) Args(ledger string) []string {
	return []string{
		"-ledger", ledger, "-seed", fmt.Sprint(f.Seed),
		"-fail", fmt.Sprint(f.Fail), "-lose", fmt.Sprint(f.Lose), "-slow", fmt.Sprint(f.Slow),
	}
}
