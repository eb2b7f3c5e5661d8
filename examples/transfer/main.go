package main

import (
	"bufio"
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
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
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
			return runProcessor(args[1:])
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
	faults      faults
}

// usualFaults are the shares of the processor's calls that go wrong.
var usualFaults = faults{fail: 0.08, lose: 0.08, slow: 0.01}

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
	if len(t.wrong) > 0 {
		return fmt.Errorf("seed %d: %d faults:\n\t%s", s.seed, len(t.wrong), strings.Join(t.wrong[:min(len(t.wrong), 20)], "\n\t"))
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
	if s.before, err = readBooks(ctx, s.store); err != nil {
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
	s.settledBefore = s.before.unfinished == 0
	for _, l := range s.lines {
		if _, ok := s.given[l.request]; !ok {
			s.settledBefore = false
		}
	}
	return nil
}

// play runs the processes: the processor from beginning to end, and beside it one worker after another.
func (s *show) play(ctx context.Context) error {
	p, err := spawn(ctx, "processor", "-ledger", s.ledgerPath(), "-seed", fmt.Sprint(s.seed),
		"-fail", fmt.Sprint(s.faults.fail), "-lose", fmt.Sprint(s.faults.lose), "-slow", fmt.Sprint(s.faults.slow))
	if err != nil {
		return err
	}
	s.address = <-p.lines
	working, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for range p.lines {
		}
		cancel(errors.New("the processor ended early"))
	}()
	err = s.workers(working)
	if err == nil {
		s.calls, err = (&client{url: s.address}).stats(ctx)
	}
	ended := p.dismiss()
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
	w, err := spawn(ctx, "worker", "-store", s.store, "-file", s.spool, "-processor", s.address, "-concurrency", fmt.Sprint(s.concurrency))
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
	for lines := w.lines; lines != nil; {
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
				w.leash.Close()
			}
			if (r.Ready || r.Answer != nil) && len(s.seen) >= enough || r.Done {
				light(fuse)
			}
		case <-lit:
			killed = true
			err = errors.Join(err, w.cmd.Process.Kill())
		}
	}
	ended := w.dismiss()
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
	if s.ledger, _, err = readLedger(s.ledgerPath()); err != nil {
		return err
	}
	if s.after, err = readBooks(ctx, s.store); err != nil {
		return err
	}
	s.audit(s.lines)
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

// A process is this program once more, as a part of the show. It ends when its leash is closed, so none is left
// behind, however the show ends.
type process struct {
	cmd   *exec.Cmd
	leash io.Closer
	lines chan string // of its standard output; a last one that was cut off was never said
}

func spawn(ctx context.Context, args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.CommandContext(ctx, self, args...), lines: make(chan string)}
	p.cmd.Stderr = os.Stderr
	if p.leash, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.lines)
		for b := bufio.NewReader(out); ; {
			text, err := b.ReadString('\n')
			if err != nil {
				return
			}
			p.lines <- strings.TrimSpace(text)
		}
	}()
	return p, nil
}

// dismiss lets a process end, and waits for it.
func (p *process) dismiss() error {
	p.leash.Close()
	for range p.lines {
	}
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("the %s: %w", p.cmd.Args[1], err)
	}
	return nil
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
