// Package show moves money between users, and goes on moving it while its processes are killed again and again: examples/transfer with
// its keys and books in a file, examples/transfer/postgres with the same in PostgreSQL.
//
//	show.go      the program: its flags, what comes before the first worker, and after the last
//	lives.go     who starts whom, and the kills
//	worker.go    the process that runs the phases
//	requests.go  what it is asked, and what it says
//	tally.go     the count at the end
//	bar.go       how far it has got
//	generate.go  how transfers.jsonl was made
package show

import (
	"bytes"
	"context"
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
	"sync"
	"syscall"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
)

// A Store is where the keys and the books are: a file, or a database. Its name is what -store says.
type Store[Tx any] interface {
	money.Tables[Tx]

	// Check says why there can be no store of this name.
	Check(name string) error

	// Find says what there is, in words for a person; if there is nothing, it says nothing.
	Find(ctx context.Context, name string) (what string, err error)

	// Open opens it, or makes it.
	Open(ctx context.Context, name string, opts *keystate.Options) (*keystate.Engine[Tx], error)

	// Remove removes it, if it is there. No process has it open.
	Remove(ctx context.Context, name string) error
}

// A Program is a show on one kind of store.
type Program[Tx any] struct {
	Store[Tx]
	Usage     string // of the flag -store
	Transfers []byte // what is worked through by default

	// Workers is how many there are at a time, unless the flag says otherwise. With one there is no such flag: the store is one process's.
	Workers int

	// Stall is how long a worker is suspended: longer than its lease, where there are several.
	Stall time.Duration
}

// Run is the program: the show, or one of the processes that the show is made of.
func (p Program[Tx]) Run(args []string) error {
	if IsChild(args) {
		signal.Ignore(os.Interrupt) // a terminal sends it to all; the show ends its processes itself
		if args[0] == "processor" {
			return processor.Run(args[1:])
		}
		return p.runWorker(args[1:])
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	set, err := p.parse(args)
	if err != nil {
		return err
	}
	table := io.Writer(os.Stdout)
	if set.Out == "-" {
		table = os.Stderr
	}
	began := time.Now()
	t, err := p.Perform(ctx, set)
	if err != nil {
		return err
	}
	t.Print(table)
	if len(t.Wrong) > 0 {
		return fmt.Errorf("seed %d: %d faults:\n\t%s", set.Seed, len(t.Wrong), strings.Join(t.Wrong[:min(len(t.Wrong), 20)], "\n\t"))
	}
	fmt.Fprintf(table, "\nEach payout and each receipt is there once, and every cent. (%.1f s, seed %d)\n", time.Since(began).Seconds(), set.Seed)
	return nil
}

// IsChild says whether a program with these arguments is one of a show's processes, and not the show.
func IsChild(args []string) bool {
	return len(args) > 0 && (args[0] == "processor" || args[0] == "worker")
}

// Settings are the show's flags.
type Settings struct {
	File        string
	Out         string
	Store       string
	Dir         string
	Keep        bool
	Kills       int
	Workers     int
	Concurrency int
	Seed        int64
	Faults      processor.Faults
}

// UsualFaults are the shares of the processor's calls that go wrong.
var UsualFaults = processor.Faults{Fail: 0.08, Lose: 0.08, Slow: 0.01}

func (p Program[Tx]) parse(args []string) (Settings, error) {
	s := Settings{Faults: UsualFaults, Workers: p.Workers}
	flags := flag.NewFlagSet("transfer", flag.ExitOnError)
	flags.StringVar(&s.File, "file", "", "the `file` of transfers, one JSON object a line: {\"key\":…, \"from\":…, \"to\":…, \"cents\":…}; - is standard input (default: 1,000 that come with the program)")
	flags.StringVar(&s.Out, "out", "", "the `file` for the answers, one line each; - is standard output, and the table goes to standard error (default: none)")
	flags.StringVar(&s.Store, "store", "", p.Usage)
	flags.BoolVar(&s.Keep, "keep", false, "keep the store, and go on with the one that is there")
	flags.IntVar(&s.Kills, "kills", 40, "how often the worker is killed")
	flags.IntVar(&s.Concurrency, "concurrency", 16, "requests at a time")
	flags.Int64Var(&s.Seed, "seed", 0, "of the processor's faults and the moments of the kills (default: drawn)")
	if p.several() {
		flags.IntVar(&s.Workers, "workers", p.Workers, "worker processes at a time; each answers -concurrency requests at a time")
		flags.StringVar(&s.Dir, "dir", "", "with -keep: the `directory` for the processor's ledger and the answers given")
		flags.Lookup("kills").Usage = "how often a worker is killed; a quarter as often one is told to end, and now and then suspended before"
	}
	flags.Parse(args)
	switch {
	case flags.NArg() > 0:
		return s, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case s.Kills < 0 || s.Concurrency < 1:
		return s, errors.New("-kills must not be negative, and -concurrency at least 1")
	case s.Workers < 1:
		return s, errors.New("-workers must be at least 1")
	case p.several() && s.Keep != (s.Dir != ""):
		return s, errors.New("-keep and -dir go together: what the processor has paid must be kept with the store")
	}
	if s.Seed == 0 {
		s.Seed = rand.Int64()
	}
	return s, p.Check(s.Store)
}

// A stage is a program's store as the show sees it.
type stage interface {
	Find(ctx context.Context, name string) (what string, err error)
	Remove(ctx context.Context, name string) error
	books(ctx context.Context, name string) (audit.Books, error)
	several() bool
	stall() time.Duration
}

func (p Program[Tx]) stall() time.Duration { return p.Stall }

// several says whether there may be more than one worker at a time. Then the store's name is no path, either.
func (p Program[Tx]) several() bool { return p.Workers > 1 }

// books reads a store that no worker has open. Where there is none yet, the books are as on the first day.
func (p Program[Tx]) books(ctx context.Context, name string) (audit.Books, error) {
	found, err := p.Find(ctx, name)
	if err != nil || found == "" {
		return audit.Books{Books: money.Books{Accounts: money.OpeningBalances}}, err
	}
	engine, err := p.Open(ctx, name, forEver())
	if err != nil {
		return audit.Books{}, err
	}
	return audit.Look(ctx, engine, p.Store)
}

// A show is one run through a file.
type show struct {
	Settings
	Tally
	stage   stage
	beside  string // the paths of the ledger and of the answers begin so
	lines   []line
	spool   string // the file as the workers read it
	address string // the processor's

	mu      sync.Mutex // what the workers change together
	rng     *rand.Rand
	doomed  int              // lives that have begun and will be ended
	seen    map[int]bool     // lines that a worker has answered in this show
	claims  map[string]*life // by key: who claimed it first
	last    []*life          // those that were not ended
	history *os.File         // what is in given, on disk
	bar     bar
}

func (s *show) ledgerPath() string  { return s.beside + ".ledger.jsonl" }
func (s *show) historyPath() string { return s.beside + ".answers.jsonl" }

// Perform does the whole show, and leaves nothing behind but what was asked for.
func (p Program[Tx]) Perform(ctx context.Context, set Settings) (*Tally, error) {
	dir, err := os.MkdirTemp("", "transfer-")
	if err != nil {
		return nil, err
	}
	s := &show{
		Settings: set, stage: p, spool: filepath.Join(dir, "transfers.jsonl"), rng: rand.New(rand.NewPCG(uint64(set.Seed), 0)),
		seen: map[int]bool{}, claims: map[string]*life{},
	}
	s.Desks = set.Workers
	s.given, s.lost, s.resumed, s.Answers = map[request]answer{}, map[int]string{}, map[string]bool{}, map[int]answer{}
	end, err := s.settle(ctx, dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err = s.prepare(ctx, p.Transfers); err == nil {
		err = errors.Join(s.play(ctx), s.history.Close())
	}
	if err == nil {
		err = s.conclude(ctx)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("interrupted: %w", context.Cause(ctx))
	}
	return &s.Tally, errors.Join(err, end(context.WithoutCancel(ctx)))
}

// settle finds places for all that the show leaves, and says how to remove what is not to stay. dir is the show's own.
func (s *show) settle(ctx context.Context, dir string) (end func(context.Context) error, err error) {
	leave := []string{dir}
	switch named := s.Store != ""; {
	case named && s.Keep:
	case named:
		if found, err := s.stage.Find(ctx, s.Store); err != nil {
			return nil, err
		} else if found != "" {
			return nil, fmt.Errorf("%s exists: with -keep, the show goes on with it", found)
		}
	case s.Keep:
		s.Store = filepath.Join(dir, "transfers.db")
		leave = []string{s.spool}
		fmt.Fprintf(os.Stderr, "the store is kept: -keep -store %s\n", s.Store)
	default:
		s.Store = filepath.Join(dir, "transfers.db")
	}
	switch {
	case s.Dir != "":
		s.beside = filepath.Join(s.Dir, "transfers")
		err = os.MkdirAll(s.Dir, 0o700)
	case s.stage.several():
		s.beside = filepath.Join(dir, "transfers")
	default:
		s.beside = s.Store
	}
	if s.Keep {
		return func(context.Context) error { return remove(leave) }, err
	}
	leave = append(leave, s.ledgerPath(), s.historyPath())
	return func(ctx context.Context) error { return errors.Join(s.stage.Remove(ctx, s.Store), remove(leave)) }, err
}

func remove(paths []string) (err error) {
	for _, path := range paths {
		err = errors.Join(err, os.RemoveAll(path))
	}
	return err
}

// prepare reads the file, and what earlier shows have left.
func (s *show) prepare(ctx context.Context, usual []byte) (err error) {
	text := usual
	switch s.File {
	case "":
	case "-":
		text, err = io.ReadAll(os.Stdin)
	default:
		text, err = os.ReadFile(s.File)
	}
	if err = errors.Join(err, os.WriteFile(s.spool, text, 0o600)); err != nil {
		return err
	}
	if s.lines, err = readLines(s.spool); err != nil {
		return err
	}
	s.Requests = len(s.lines)
	if s.Before, err = s.stage.books(ctx, s.Store); err != nil {
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

// conclude counts, and writes the answers.
func (s *show) conclude(ctx context.Context) (err error) {
	for _, l := range s.last {
		s.compare(l.answers)
	}
	if s.Ledger, _, err = processor.ReadLedger(s.ledgerPath()); err != nil {
		return err
	}
	if s.After, err = s.stage.books(ctx, s.Store); err != nil {
		return err
	}
	s.judge(s.lines)
	return s.writeAnswers()
}

// compare takes in what a worker answered at the end: what was answered before, it must answer, too, and what one leaves open, none settles.
func (s *show) compare(answers map[int]answer) {
	for n := range s.seen {
		a, ok := answers[n]
		if !ok {
			s.lost[n] = "was answered, and then not any more"
		} else if other, ok := s.Answers[n]; !ok || other.definite() {
			s.Answers[n] = a
		}
	}
}

func (s *show) writeAnswers() error {
	if s.Out == "" {
		return nil
	}
	var b bytes.Buffer
	for _, l := range s.lines {
		if a, ok := s.Answers[l.number]; ok {
			if err := json.NewEncoder(&b).Encode(a); err != nil {
				return err
			}
		}
	}
	if s.Out == "-" {
		_, err := os.Stdout.Write(b.Bytes())
		return err
	}
	return os.WriteFile(s.Out, b.Bytes(), 0o644)
}
