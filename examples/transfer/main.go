// Transfer moves money between two users, and goes on moving it while its process is killed again and again.
//
//	go run ./examples/transfer
//
// starts a payment processor in a process of its own and a worker in another one, kills the worker with SIGKILL at random
// moments until it has worked through a file of transfers, and then counts: every cent, every payout, every receipt. It
// exits non-zero if one of them is missing or there twice.
//
// What a program that uses keystate writes is transfer.go in [example.com/keystate/examples/internal/money]: the request, its
// phases, and what each of them does. The rest:
//
//	worker.go     the process that runs the phases
//	main.go       the show: who starts whom, and the kills
//	tally.go      the count at the end
//	generate.go   how transfers.jsonl was made
//	../internal   the other side of the effects, a payment processor with an HTTP interface and a ledger of its own; and
//	              what else this program shares with examples/payments
package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/child"
	"example.com/keystate/examples/internal/processor"
)

// This file is the show: it starts the processor and one worker after another, kills the workers, and has it all
// counted.

//go:embed transfers.jsonl
var transfersFile []byte

func main() {
	err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "transfer:", err)
		os.Exit(1)
	}
}

// run is the program: the show, or one of the processes that the show is made of.
func run(args []string) error {
	if len(args) > 0 && (args[0] == "processor" || args[0] == "worker") {
		signal.Ignore(os.Interrupt) // a terminal sends it to all; the show ends its processes itself
		if args[0] == "processor" {
			return processor.Run(args[1:])
		}
		return runWorker(args[1:])
	}
	if len(args) == 2 && args[0] == "generate" {
		var b bytes.Buffer
		return errors.Join(generate(&b), os.WriteFile(args[1], b.Bytes(), 0o644))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return runShow(ctx, args)
}

// settings are the show's flags.
type settings struct {
	file        string
	out         string
	store       string
	keep        bool
	kills       int
	concurrency int
	seed        int64
	faults      processor.Faults
}

// usualFaults are the shares of the processor's calls that go wrong.
var usualFaults = processor.Faults{Fail: 0.08, Lose: 0.08, Slow: 0.01}

func runShow(ctx context.Context, args []string) error {
	s := settings{faults: usualFaults}
	flags := flag.NewFlagSet("transfer", flag.ExitOnError)
	flags.StringVar(&s.file, "file", "", "the `file` of transfers, one JSON object a line: {\"key\":…, \"from\":…, \"to\":…, \"cents\":…}; - is standard input (default: 1,000 that come with the program)")
	flags.StringVar(&s.out, "out", "", "the `file` for the answers, one line each; - is standard output, and the table goes to standard error (default: none)")
	flags.StringVar(&s.store, "store", "", "the bbolt `file`; the processor's ledger and the answers given lie beside it (default: in a temporary directory)")
	flags.BoolVar(&s.keep, "keep", false, "keep the store, and go on with the one that is there")
	flags.IntVar(&s.kills, "kills", 40, "how often the worker is killed")
	flags.IntVar(&s.concurrency, "concurrency", 16, "requests at a time")
	flags.Int64Var(&s.seed, "seed", 0, "of the processor's faults and the moments of the kills (default: drawn)")
	flags.Parse(args)
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case s.kills < 0 || s.concurrency < 1:
		return errors.New("-kills must not be negative, and -concurrency at least 1")
	}
	if s.seed == 0 {
		s.seed = rand.Int64()
	}
	table := io.Writer(os.Stdout)
	if s.out == "-" {
		table = os.Stderr
	}
	began := time.Now()
	t, err := perform(ctx, s)
	if err != nil {
		return err
	}
	t.print(table)
	if len(t.Wrong) > 0 {
		return fmt.Errorf("seed %d: %d faults:\n\t%s", s.seed, len(t.Wrong), strings.Join(t.Wrong[:min(len(t.Wrong), 20)], "\n\t"))
	}
	fmt.Fprintf(table, "\nEach payout and each receipt is there once, and every cent. (%.1f s, seed %d)\n", time.Since(began).Seconds(), s.seed)
	return nil
}

// A show is one run through a file.
type show struct {
	settings
	tally
	lines   []line
	spool   string // the file as the workers read it
	address string // the processor's
	rng     *rand.Rand
	seen    map[int]bool // lines that a worker has answered in this show
	history *os.File     // what is in given, on disk
	bar     bar
}

func (s *show) ledgerPath() string  { return s.store + ".ledger.jsonl" }
func (s *show) historyPath() string { return s.store + ".answers.jsonl" }

// perform does the whole show, and leaves nothing behind but what was asked for.
func perform(ctx context.Context, set settings) (t *tally, err error) {
	dir, err := os.MkdirTemp("", "transfer-")
	if err != nil {
		return nil, err
	}
	s := &show{settings: set, rng: rand.New(rand.NewPCG(uint64(set.seed), 0)), seen: map[int]bool{}}
	s.given, s.lost, s.resumed = map[request]answer{}, map[int]string{}, map[string]bool{}
	s.spool = filepath.Join(dir, "transfers.jsonl")
	leave := []string{dir}
	switch {
	case s.store != "" && s.keep:
	case s.store != "":
		if _, err := os.Stat(s.store); err == nil {
			return nil, errors.Join(fmt.Errorf("%s exists: with -keep, the show goes on with it", s.store), os.RemoveAll(dir))
		}
		leave = append(leave, s.store, s.ledgerPath(), s.historyPath())
	case s.keep:
		s.store = filepath.Join(dir, "transfers.db")
		leave = []string{s.spool}
		fmt.Fprintf(os.Stderr, "the store is kept: -keep -store %s\n", s.store)
	default:
		s.store = filepath.Join(dir, "transfers.db")
	}
	defer func() {
		for _, path := range leave {
			err = errors.Join(err, os.RemoveAll(path))
		}
	}()
	if err = s.prepare(ctx); err == nil {
		err = errors.Join(s.play(ctx), s.history.Close())
	}
	if err == nil {
		err = s.conclude(ctx)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("interrupted: %w", context.Cause(ctx))
	}
	return &s.tally, err
}

// prepare reads the file, and what earlier shows have left.
func (s *show) prepare(ctx context.Context) (err error) {
	text := transfersFile
	switch s.file {
	case "":
	case "-":
		text, err = io.ReadAll(os.Stdin)
	default:
		text, err = os.ReadFile(s.file)
	}
	if err = errors.Join(err, os.WriteFile(s.spool, text, 0o600)); err != nil {
		return err
	}
	if s.lines, err = readLines(s.spool); err != nil {
		return err
	}
	s.requests = len(s.lines)
	if s.Before, err = audit.ReadBooks(ctx, s.store); err != nil {
		return err
	}
	if s.history, err = os.OpenFile(s.historyPath(), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		return err
	}
	for d := json.NewDecoder(s.history); ; {
		var a answer
		if err := d.Decode(&a); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("%s: %w", s.historyPath(), err)
		}
		s.given[a.request] = a
	}
	s.settledBefore = s.Before.Unfinished == 0
	for _, l := range s.lines {
		if _, ok := s.given[l.request]; !ok {
			s.settledBefore = false
		}
	}
	return nil
}

// play runs the processes: the processor from beginning to end, and beside it one worker after another.
func (s *show) play(ctx context.Context) error {
	faults := s.faults
	faults.Seed = s.seed
	p, err := child.Again(ctx, append([]string{"processor"}, faults.Args(s.ledgerPath())...)...)
	if err != nil {
		return err
	}
	s.address = <-p.Lines
	working, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for range p.Lines {
		}
		cancel(errors.New("the processor ended early"))
	}()
	err = s.workers(working)
	if err == nil {
		s.calls, err = (&processor.Client{URL: s.address}).Stats(ctx)
	}
	ended := p.Wait()
	if ctx.Err() != nil { // then it was killed, like all of them
		return err
	}
	return errors.Join(err, ended)
}

// workers runs one worker after another: each is killed, but for the last.
func (s *show) workers(ctx context.Context) error {
	s.bar.start(s.requests, s.kills)
	defer s.bar.end()
	for s.killed < s.kills {
		if err := s.work(ctx, true); err != nil {
			return err
		}
		s.killed++
	}
	return s.work(ctx, false)
}

// Of the moments at which a worker is killed.
const (
	earlyShare = 8                     // one in so many is killed while it starts
	earlyFuse  = 40 * time.Millisecond // at the latest then, from its start
	fuse       = 20 * time.Millisecond // at the latest, from when it has got as far as it was to get
)

// work is one worker's life. The kills are spread over the file: a worker that is doomed dies a random moment after it
// has answered a random number of lines that nobody has answered before, or has got to the end of them.
func (s *show) work(ctx context.Context, doomed bool) error {
	w, err := child.Again(ctx, "worker", "-store", s.store, "-file", s.spool, "-processor", s.address, "-concurrency", fmt.Sprint(s.concurrency))
	if err != nil {
		return err
	}
	var lit <-chan time.Time
	light := func(longest time.Duration) {
		if doomed && lit == nil {
			lit = time.After(time.Duration(s.rng.Int64N(int64(longest))))
		}
	}
	if s.rng.IntN(earlyShare) == 0 {
		light(earlyFuse)
	}
	share := (s.requests - len(s.seen)) / (s.kills - s.killed + 1)
	enough := len(s.seen) + s.rng.IntN(2*share+1)
	s.answers = map[int]answer{}
	killed, done := false, false
	for lines := w.Lines; lines != nil; {
		select {
		case text, ok := <-lines:
			if !ok {
				lines = nil
				break
			}
			var r report
			if fault := json.Unmarshal([]byte(text), &r); fault != nil {
				err = errors.Join(err, fault)
			}
			err = errors.Join(err, s.take(r))
			done = done || r.Done
			if r.Done && !doomed {
				w.LetGo()
			}
			if (r.Ready || r.Answer != nil) && len(s.seen) >= enough || r.Done {
				light(fuse)
			}
		case <-lit:
			killed = true
			err = errors.Join(err, w.Kill())
		}
	}
	ended := w.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case killed:
		return err
	case doomed || !done:
		ended = errors.Join(errors.New("the worker ended early"), ended)
	}
	return errors.Join(err, ended)
}

// take takes in what a worker reports.
func (s *show) take(r report) error {
	for _, key := range r.Interrupted {
		s.resumed[key] = true
	}
	a := r.Answer
	if a == nil {
		return nil
	}
	s.seen[a.Line] = true
	s.answers[a.Line] = *a
	s.bar.draw(len(s.seen), s.killed)
	if !a.definite() {
		return nil
	}
	if first, ok := s.given[a.request]; ok {
		if first.Line = a.Line; first != *a {
			s.lost[a.Line] = fmt.Sprintf("was first %v, and then %v", first, *a)
		}
		return nil
	}
	s.given[a.request] = *a
	return json.NewEncoder(s.history).Encode(a)
}

// conclude counts, and writes the answers.
func (s *show) conclude(ctx context.Context) (err error) {
	for n := range s.seen {
		if _, ok := s.answers[n]; !ok {
			s.lost[n] = "was answered, and then not any more"
		}
	}
	if s.Ledger, _, err = processor.ReadLedger(s.ledgerPath()); err != nil {
		return err
	}
	if s.After, err = audit.ReadBooks(ctx, s.store); err != nil {
		return err
	}
	s.judge(s.lines)
	return s.writeAnswers()
}

func (s *show) writeAnswers() error {
	if s.out == "" {
		return nil
	}
	var b bytes.Buffer
	for _, l := range s.lines {
		if a, ok := s.answers[l.number]; ok {
			if err := json.NewEncoder(&b).Encode(a); err != nil {
				return err
			}
		}
	}
	if s.out == "-" {
		_, err := os.Stdout.Write(b.Bytes())
		return err
	}
	return os.WriteFile(s.out, b.Bytes(), 0o644)
}

// A bar shows on a terminal how far it has got; elsewhere nothing.
type bar struct {
	terminal     bool
	lines, kills int
	shown        string
}

const barWidth = 40

func (b *bar) start(lines, kills int) {
	info, err := os.Stderr.Stat()
	b.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	b.lines, b.kills = lines, kills
}

func (b *bar) draw(answered, killed int) {
	if !b.terminal || b.lines == 0 {
		return
	}
	full := barWidth * answered / b.lines
	text := fmt.Sprintf("\r[%s%s] %d/%d answered, %d/%d killed ", strings.Repeat("█", full), strings.Repeat("·", barWidth-full), answered, b.lines, killed, b.kills)
	if text != b.shown {
		b.shown = text
		fmt.Fprint(os.Stderr, text)
	}
}

func (b *bar) end() {
	if b.terminal {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}
