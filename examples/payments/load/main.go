// Load is the torture of examples/payments.
//
//	go run ./examples/payments/load [-transfers 2000] [-kills 20] [-callers 32] [-seed N]
//
// builds the service and runs it in a process of its own, and in another one a payment processor that fails, is late, and loses
// answers. Callers with keyhttp.Transport ask for transfers, many of them several times at once, through a proxy that drops requests,
// drops answers, cuts them short, delays and doubles them. Meanwhile the service is killed with SIGKILL and started again. At the end
// everything is counted: each key must have one answer, the same to the byte however often it was asked for, and each transfer
// answered as paid one payout. It prints a table, and exits non-zero with the seed if anything is wrong. The seed gives the same
// plan again, and the same faults wherever the plan has the key; not the same moments.
//
//	main.go     flags, and the order of events
//	plan.go     what is asked for
//	callers.go  who asks
//	proxy.go    what lies between
//	keeper.go   who starts the service and kills it
//	judge.go    the count at the end
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/child"
	"example.com/keystate/examples/internal/processor"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 && args[0] == "processor" {
		signal.Ignore(os.Interrupt) // a terminal sends it to all; the load ends its processes itself
		return processor.Run(args[1:])
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	s, err := parse(args)
	if err != nil {
		return err
	}
	began := time.Now()
	v, err := perform(ctx, s)
	if err != nil {
		return fmt.Errorf("seed %d: %w", s.seed, err)
	}
	v.print(os.Stdout)
	if n := len(v.Wrong); n > 0 {
		return fmt.Errorf("seed %d: %d faults:\n\t%s", s.seed, n, strings.Join(v.Wrong[:min(n, 20)], "\n\t"))
	}
	fmt.Printf("\nEach key has one answer, each paid transfer one payout, and every cent is there. (%.1f s, seed %d)\n", time.Since(began).Seconds(), s.seed)
	return nil
}

// settings are the flags.
type settings struct {
	transfers int
	kills     int
	callers   int
	seed      int64
	server    string
	dir       string
}

func parse(args []string) (s settings, err error) {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	flags.IntVar(&s.transfers, "transfers", 2000, "how many keys are used")
	flags.IntVar(&s.kills, "kills", 20, "how often the service is killed; in between it is stopped with SIGTERM, a quarter as often")
	flags.IntVar(&s.callers, "callers", 32, "keys under way at a time")
	flags.Int64Var(&s.seed, "seed", 0, "of the plan and of the faults (default: drawn)")
	flags.StringVar(&s.server, "server", "", "the service's `program` (default: built from examples/payments)")
	flags.StringVar(&s.dir, "dir", "", "an empty or new `directory` for the store, the ledger and the service's log (default: a temporary one)")
	flags.Parse(args)
	switch {
	case flags.NArg() > 0:
		return s, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case s.transfers < 1 || s.callers < 1 || s.kills < 0:
		return s, errors.New("-transfers and -callers must be at least 1, and -kills not negative")
	}
	if s.seed == 0 {
		s.seed = rand.Int64()
	}
	return s, nil
}

// What goes wrong at the processor, and how long the service waits for it.
var (
	processorFaults = processor.Faults{Fail: 0.06, Lose: 0.06, Slow: 0.005}
	payoutTimeout   = 300 * time.Millisecond
)

const (
	eachTakes = 200 * time.Millisecond // at most, on average; beyond it the load gives up
	stillness = time.Minute            // for the rest
)

// perform does all of it, and leaves nothing behind, unless it was told where or something is wrong.
func perform(ctx context.Context, s settings) (v *verdict, err error) {
	if s.dir == "" {
		if s.dir, err = os.MkdirTemp("", "payments-load-"); err != nil {
			return nil, err
		}
		dir := s.dir
		defer func() {
			if err != nil || len(v.Wrong) > 0 {
				fmt.Fprintf(os.Stderr, "the store, the ledger and the service's log are in %s\n", dir)
				return
			}
			err = os.RemoveAll(dir)
		}()
	} else if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	} else if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
		return nil, errors.Join(err, fmt.Errorf("%s is not empty", s.dir))
	}
	if s.server == "" {
		s.server = filepath.Join(s.dir, "payments")
		build := exec.CommandContext(ctx, "go", "build", "-o", s.server, "example.com/keystate/examples/payments")
		if text, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build the service: %w\n%s", err, text)
		}
	}
	return s.perform(ctx)
}

func (s settings) storePath() string  { return filepath.Join(s.dir, "payments.db") }
func (s settings) ledgerPath() string { return filepath.Join(s.dir, "ledger.jsonl") }
func (s settings) logPath() string    { return filepath.Join(s.dir, "payments.log") }

func (s settings) perform(ctx context.Context) (v *verdict, err error) {
	v = &verdict{}
	if v.Before, err = audit.ReadBooks(ctx, s.storePath()); err != nil {
		return nil, err
	}
	faults := processorFaults
	faults.Seed = s.seed
	p, err := child.Again(ctx, append([]string{"processor"}, faults.Args(s.ledgerPath())...)...)
	if err != nil {
		return nil, err
	}
	processorURL := <-p.Lines
	err = s.torture(ctx, v, processorURL)
	if err == nil {
		v.calls, err = (&processor.Client{URL: processorURL}).Stats(ctx)
	}
	if err = errors.Join(err, p.Wait()); err != nil {
		return nil, err
	}
	if v.Ledger, _, err = processor.ReadLedger(s.ledgerPath()); err != nil {
		return nil, err
	}
	if v.After, err = audit.ReadBooks(ctx, s.storePath()); err != nil {
		return nil, err
	}
	v.judge()
	return v, nil
}

// torture has the callers ask while the service is killed; then, with everything up, it looks at what came of it.
func (s settings) torture(ctx context.Context, v *verdict, processorURL string) error {
	line, err := listen(s.seed)
	if err != nil {
		return err
	}
	defer line.close()
	k := &keeper{settings: s, processor: processorURL, line: line, progress: make(chan struct{}, 1), rng: rand.New(rand.NewPCG(uint64(s.seed), 1))}
	c := &callers{url: line.url, client: patient(), ended: k.note}
	asking, cancel := context.WithTimeout(ctx, stillness+time.Duration(s.transfers)*eachTakes)
	defer cancel()
	asking, enough := context.WithCancelCause(asking)
	asked := make(chan error, 1)
	go func() {
		err := c.askAll(asking, plan(s.seed, s.transfers), s.callers)
		asked <- err
		enough(err)
	}()
	defer report(&k.done, s.transfers)()
	server, err := k.lives(asking)
	if err != nil {
		enough(err)
		return fmt.Errorf("%d of %d keys are answered: %w", k.done.Load(), s.transfers, errors.Join(err, <-asked))
	}
	v.answers, v.line, v.killed, v.stopped = c.answers, line.counts(), k.killed, k.stopped
	err = v.look(ctx, server.url)
	if err = errors.Join(err, server.stop()); err != nil {
		return err
	}
	v.resumed, err = resumed(s.logPath())
	return err
}

// report tells of the progress every ten seconds, until it is ended.
func report(done *atomic.Int64, of int) (end func()) {
	began, tick, over := time.Now(), time.NewTicker(10*time.Second), make(chan struct{})
	go func() {
		for {
			select {
			case <-tick.C:
				n := done.Load()
				fmt.Fprintf(os.Stderr, "%d of %d keys answered, %.0f/s\n", n, of, float64(n)/time.Since(began).Seconds())
			case <-over:
				return
			}
		}
	}()
	return func() { tick.Stop(); close(over) }
}
