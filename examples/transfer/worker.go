package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
	"go.etcd.io/bbolt"
)

// This file is the process that gets killed: it opens the store, registers the machines and answers the requests of a file.

// A request is one line of the file.
type request struct {
	Key   string `json:"key"`
	From  string `json:"from"`
	To    string `json:"to"`
	Cents int64  `json:"cents"`
}

func (r request) transfer() money.Transfer {
	return money.Transfer{ID: r.Key, From: r.From, To: r.To, Cents: r.Cents}
}

// What an answer's status says.
const (
	paid     = money.Paid
	declined = money.Declined // by the processor
	refused  = "refused"      // by reserveFunds
	mismatch = "mismatch"     // the key belongs to another request
	invalid  = "invalid"      // the line is no request
	parked   = "parked"       // an operator has to look; no answer yet
	open     = "open"         // it did not end in as many tries as were made; no answer yet
)

// transferKey names a transfer: the keys of all machines in a store are one set, and the scope tells them apart.
func transferKey(id string) keystate.Key { return keystate.Key{Scope: "transfer", ID: id} }

// patience is more than a program would have in earnest: here a death is an attempt, and there are many of both.
// It ends all the same, and then an operator sees the key.
var patience = money.Patience{
	Timeout: 400 * time.Millisecond,
	Retry:   keystate.RetryPolicy{Attempts: 100, InRun: 5, Initial: 10 * time.Millisecond, Max: 500 * time.Millisecond},
}

// An answer is one line of the output.
type answer struct {
	Line int `json:"line"` // of the file, from 1
	request
	Status string `json:"status"`
	Payout string `json:"payout,omitempty"`
	Error  string `json:"error,omitempty"`
}

func (a answer) definite() bool { return a.Status != parked && a.Status != open }

// A report is one line from a worker to the show.
type report struct {
	Ready       bool     `json:"ready,omitempty"`
	Interrupted []string `json:"interrupted,omitempty"` // with Ready: the keys that an earlier process left unfinished
	Answer      *answer  `json:"answer,omitempty"`
	Done        bool     `json:"done,omitempty"` // the file is worked through and nothing is left to resume
}

// A line is one line of the file, read.
type line struct {
	number int
	request
	err error
}

var errNoRequest = errors.New("the line is not a transfer in JSON that has a key")

// readLines reads requests; what is none has an error instead.
func readLines(path string) (lines []line, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	number := 0
	for raw := range bytes.Lines(text) {
		number++
		if raw = bytes.TrimSpace(raw); len(raw) == 0 {
			continue
		}
		l := line{number: number}
		if json.Unmarshal(raw, &l.request) != nil || l.Key == "" {
			l.request, l.err = request{}, errNoRequest
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// runWorker is the worker's process. It works through the file, and ends when its standard input does.
func runWorker(args []string) error {
	flags := flag.NewFlagSet("worker", flag.ExitOnError)
	store := flags.String("store", "", "the bbolt `file`")
	file := flags.String("file", "", "the `file` of transfers")
	address := flags.String("processor", "", "the processor's `address`")
	concurrency := flags.Int("concurrency", 1, "requests at a time")
	flags.Parse(args)
	lines, err := readLines(*file)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	w := &worker{out: json.NewEncoder(os.Stdout)}
	if err := w.open(ctx, *store, *address); err != nil {
		return err
	}
	err = w.work(ctx, lines, *concurrency)
	switch {
	case err == nil:
		<-ctx.Done()
	case ctx.Err() != nil: // the show is over; what is interrupted goes on when there is another one
		err = nil
	}
	return errors.Join(err, w.engine.Close())
}

type worker struct {
	engine    *keystate.Engine[*bbolt.Tx]
	transfers *keystate.Machine[money.Transfer]

	mu  sync.Mutex
	out *json.Encoder
}

func (w *worker) report(r report) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Encode(r)
}

// open opens the store and registers the machines. Whatever an earlier process left unfinished goes on from here by itself.
func (w *worker) open(ctx context.Context, store, address string) (err error) {
	// A transfer is remembered for ever: its file may be worked through again in a year.
	if w.engine, err = keystate.Open(store, &keystate.Options{Retention: -1}); err != nil {
		return err
	}
	err = w.register(ctx, address)
	if err != nil {
		return errors.Join(err, w.engine.Close())
	}
	return nil
}

func (w *worker) register(ctx context.Context, address string) error {
	if err := w.engine.Update(ctx, money.OpenAccounts); err != nil {
		return err
	}
	var interrupted []string
	for _, status := range []keystate.Status{keystate.Running, keystate.Waiting} {
		for r, err := range w.engine.Keys(ctx, keystate.Filter{Status: status}) {
			if err != nil {
				return err
			}
			interrupted = append(interrupted, r.Key.String())
		}
	}
	teller, err := money.NewTeller(w.engine, &processor.Client{URL: address}, patience)
	if err != nil {
		return err
	}
	if w.transfers, err = keystate.Register(w.engine, "transfer", teller.Phases()); err != nil {
		return err
	}
	return w.report(report{Ready: true, Interrupted: interrupted})
}

// work answers all lines, so many at a time, and then waits for what goes on without a caller: the receipts.
func (w *worker) work(ctx context.Context, lines []line, concurrency int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan line)
	var clerks sync.WaitGroup
	for range concurrency {
		clerks.Go(func() {
			for l := range next {
				a, err := w.answer(ctx, l)
				if err == nil {
					err = w.report(report{Answer: &a})
				}
				if err != nil {
					cancel(fmt.Errorf("line %d: %w", l.number, err))
				}
			}
		})
	}
	for _, l := range lines {
		select {
		case next <- l:
		case <-ctx.Done():
		}
	}
	close(next)
	clerks.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := w.engine.Resume(ctx); err != nil {
		return err
	}
	return w.report(report{Done: true})
}

const tries = 20 // of a request that is an answer short; each begins where the one before stopped

// answer gets a line its answer. The error is of the worker, not of the request.
func (w *worker) answer(ctx context.Context, l line) (answer, error) {
	a := answer{Line: l.number, request: l.request}
	if l.err != nil {
		a.Status, a.Error = invalid, l.err.Error()
		return a, nil
	}
	for range tries {
		t, err := w.transfers.Do(ctx, transferKey(l.Key), l.transfer())
		var final *keystate.FinalError
		var stopped *keystate.PhaseError
		switch {
		case err == nil && t.Declined != "":
			a.Status, a.Error = declined, t.Declined
		case err == nil:
			a.Status, a.Payout, a.Error = paid, t.Payout, ""
		case errors.As(err, &final):
			a.Status, a.Error = refused, final.Reason
		case errors.Is(err, keystate.ErrMismatch):
			a.Status, a.Error = mismatch, "the key was used for another transfer"
		case errors.Is(err, keystate.ErrInvalidKey):
			a.Status, a.Error = invalid, err.Error()
		case errors.Is(err, keystate.ErrParked):
			a.Status, a.Error = parked, err.Error()
		case errors.As(err, &stopped) && ctx.Err() == nil:
			a.Status, a.Error = open, err.Error() // it waits; asked again, it goes on at once
			continue
		default:
			return a, err
		}
		return a, nil
	}
	return a, nil
}
