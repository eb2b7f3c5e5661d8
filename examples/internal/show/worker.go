package show

import (
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
)

// transferKey names a transfer: the keys of all machines in a store are one set, and the scope tells them apart.
func transferKey(id string) keystate.Key { return keystate.Key{Scope: "transfer", ID: id} }

// patience is more than a program would have in earnest: here a death is an attempt, and there are many of both.
// It ends all the same, and then an operator sees the key.
var patience = money.Patience{
	Timeout: 400 * time.Millisecond,
	Retry:   keystate.RetryPolicy{Attempts: 100, InRun: 5, Initial: 10 * time.Millisecond, Max: 500 * time.Millisecond},
}

// forEver are the options of a store whose transfers are remembered for ever: its file may be worked through again in a year.
func forEver() *keystate.Options { return &keystate.Options{Retention: -1} }

// runWorker is the worker's process, which gets killed. It works through its lines of the file, and ends when its standard input does.
func (p Program[Tx]) runWorker(args []string) error {
	flags := flag.NewFlagSet("worker", flag.ExitOnError)
	store := flags.String("store", "", "the store's `name`")
	file := flags.String("file", "", "the `file` of transfers")
	address := flags.String("processor", "", "the processor's `address`")
	concurrency := flags.Int("concurrency", 1, "requests at a time")
	desk := flags.Int("desk", 0, "the `number` of the worker's desk, from 0")
	desks := flags.Int("desks", 1, "how many there are: each worker gets its share of the lines")
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
	w := &worker[Tx]{program: p, out: json.NewEncoder(os.Stdout)}
	err = w.open(ctx, *store, *address)
	if err == nil {
		err = w.work(ctx, deal(lines, *desk, *desks), *concurrency)
	}
	switch {
	case err == nil:
		<-ctx.Done()
	case ctx.Err() != nil: // it was told to go, or the show is over; what is interrupted goes on elsewhere, or when there is another one
		err = nil
	}
	return errors.Join(err, w.close())
}

type worker[Tx any] struct {
	program   Program[Tx]
	engine    *keystate.Engine[Tx]
	transfers *keystate.Machine[money.Transfer]

	mu  sync.Mutex
	out *json.Encoder
}

func (w *worker[Tx]) report(r report) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Encode(r)
}

// open opens the store and registers the machines. Whatever an earlier process left unfinished goes on from here by itself.
func (w *worker[Tx]) open(ctx context.Context, store, address string) (err error) {
	opts := forEver()
	opts.Observer = &keystate.Observer{Claimed: w.tellClaim}
	if w.engine, err = w.program.Open(ctx, store, opts); err != nil {
		return err
	}
	err = w.engine.Update(ctx, func(tx Tx) error { return w.program.Create(ctx, tx) })
	if err != nil {
		return err
	}
	found, err := w.unfinished(ctx)
	if err != nil {
		return err
	}
	teller, err := money.NewTeller(w.engine, w.program.Store, &processor.Client{URL: address}, patience)
	if err != nil {
		return err
	}
	if w.transfers, err = keystate.Register(w.engine, "transfer", teller.Phases()); err != nil {
		return err
	}
	return w.report(report{Ready: true, Interrupted: found})
}

func (w *worker[Tx]) close() error {
	if w.engine == nil {
		return nil
	}
	return w.engine.Close()
}

// unfinished lists what an earlier process has left. Where there are several, others may be at work on what is unfinished: then it shows
// in the claims which keys went from one to another.
func (w *worker[Tx]) unfinished(ctx context.Context) (keys []string, err error) {
	if w.program.several() {
		return nil, nil
	}
	for _, status := range []keystate.Status{keystate.Running, keystate.Waiting} {
		for r, err := range w.engine.Keys(ctx, keystate.Filter{Status: status}) {
			if err != nil {
				return nil, err
			}
			keys = append(keys, r.Key.String())
		}
	}
	return keys, nil
}

func (w *worker[Tx]) tellClaim(e keystate.Event) {
	if w.program.several() {
		w.report(report{Claimed: e.Key.String()}) // who does not read it is gone
	}
}

// work answers all lines, so many at a time, and then waits for what goes on without a caller: the receipts.
func (w *worker[Tx]) work(ctx context.Context, lines []line, concurrency int) error {
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
	if err := errors.Join(w.engine.Resume(ctx), w.settled(ctx)); err != nil {
		return err
	}
	return w.report(report{Done: true})
}

// settled waits until there is nothing left to do, for other workers neither: what a dead one held is taken over when its lease ends.
func (w *worker[Tx]) settled(ctx context.Context) error {
	enough := time.After(settling)
	for {
		stats, err := w.engine.Stats(ctx)
		left := stats.Running + stats.Waiting
		if err != nil || left == 0 {
			return err
		}
		select {
		case <-time.After(glance):
		case <-enough:
			return fmt.Errorf("%d keys are unfinished after %s, and nobody carries them on", left, settling)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

const (
	settling = 30 * time.Second      // for what goes on without callers when all is answered
	glance   = 20 * time.Millisecond // between two looks at what is left
)

const tries = 20 // of a request that is an answer short; each begins where the one before stopped

// answer gets a line its answer. The error is of the worker, not of the request.
func (w *worker[Tx]) answer(ctx context.Context, l line) (answer, error) {
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
