// Command bench measures keystate beside other ways to make the same request: written by hand with bbolt, SQLite and PostgreSQL, and with
// libraries for durable execution; and beside what the disk and bbolt allow at most. One run, one machine, the same durability.
//
//	go run -C bench .
//
// It writes docs/bench/results.md and plots beside it; -h lists what can be chosen. -short goes through all of it in a minute,
// to see that it works: its figures mean nothing.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"github.com/google/uuid"
)

// A bench is one run.
type bench struct {
	dir   string // where all stores are
	cache string // where filled stores stay
	out   string

	field         []contender
	callers       list
	pools         list
	stored        list
	turns         int
	slice         time.Duration
	pause         time.Duration // what it takes to open and close, for the time left
	storedCallers int
	replayed      int // keys
	interrupted   int // keys of a process that is killed
	staged        int // keys staged as interrupted, for keystate alone
	reaped        int // keys
	short         bool
	newID         func() string
	only          string
	parts         string

	server   *server
	noServer string // why there is none
	began    time.Time
	load     string
	failed   error
	openings map[string]pgtest.Figures // by contender

	side     []side
	full     []*fullness
	replays  []*cell
	bare     *cell
	resumed  []resumption
	staging  *staging
	reapings *reaping
}

// A side is all contenders beside each other.
type side struct {
	callers int
	cells   []*cell
}

type list []int

func (l *list) String() string { return strings.Trim(fmt.Sprint(*l), "[]") }

func (l *list) Set(text string) error {
	*l = nil
	for word := range strings.SplitSeq(text, ",") {
		if word == "" {
			continue
		}
		n, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		*l = append(*l, n)
	}
	return nil
}

func main() {
	b := &bench{callers: list{1, 16, 64, 256}, pools: list{16, 32, 64}, stored: list{1_000_000, 10_000_000}, pause: 400 * time.Millisecond,
		openings: map[string]pgtest.Figures{}}
	b.flags(flag.CommandLine)
	flag.Parse()
	if len(os.Args) > 1 && os.Args[1] == crashCommand {
		os.Exit(crash(os.Args[2:]))
	}
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func (b *bench) flags(f *flag.FlagSet) {
	f.StringVar(&b.dir, "dir", os.TempDir(), "the folder, and so the disk, on which everything is measured")
	f.StringVar(&b.cache, "cache", "", "the folder that keeps filled stores from run to run; empty: they are made anew, in -dir")
	f.StringVar(&b.out, "out", "../docs/bench", "the folder for the report and its plots")
	f.Var(&b.callers, "callers", "numbers of callers at once")
	f.Var(&b.pools, "pools", "numbers of connections to PostgreSQL to try: each contender gets the one that is best for it")
	f.Var(&b.stored, "stored", "numbers of finished keys in full stores; empty: none is filled")
	f.IntVar(&b.storedCallers, "stored-callers", 64, "callers at once on full stores")
	f.IntVar(&b.turns, "turns", 5, "how often each contender is measured")
	f.DurationVar(&b.slice, "slice", 1500*time.Millisecond, "how long a contender is measured at a time")
	f.IntVar(&b.replayed, "replayed", 10_000, "keys that are replayed")
	f.IntVar(&b.interrupted, "interrupted", 1000, "keys under way when a process is killed")
	f.IntVar(&b.staged, "staged", 100_000, "interrupted keys in the store from which keystate recovers")
	f.IntVar(&b.reaped, "reaped", 1_000_000, "keys to reap while requests run")
	f.StringVar(&b.only, "only", "", "take the contenders alone whose names contain one of these texts, separated by |")
	f.StringVar(&b.parts, "parts", "callers,stored,replay,recovery,reaping", "what is measured")
	f.BoolVar(&b.short, "short", false, "go through everything in about a minute; the figures mean nothing")
	random := f.Bool("random", false, "draw keys at random (UUIDv4) where -parts does not say otherwise, instead of minting them (UUIDv7)")
	b.newID = func() string {
		if *random {
			return uuid.NewString()
		}
		return keystate.NewID()
	}
}

// shorten makes the run one of a minute.
func (b *bench) shorten() {
	b.turns, b.slice, b.pause = 1, 100*time.Millisecond, 250*time.Millisecond
	b.callers, b.pools, b.stored = list{1, 16}, list{16}, list{2000}
	b.storedCallers, b.replayed, b.interrupted, b.staged, b.reaped = 16, 200, 50, 500, 2000
}

func (b *bench) run() (err error) {
	if b.short {
		b.shorten()
	}
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(b.dir, "keystate-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	b.cleanUpWhenInterrupted()
	if err := os.Chmod(b.dir, 0o755); err != nil { // PostgreSQL may have to run as another user
		return err
	}
	if b.cache == "" {
		b.cache = b.dir
	}
	b.began, b.load = time.Now(), loadAverage()
	b.field = field(b.only, contenders)
	stop, err := b.serve()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	newProgress(b.plan()).run()
	if err := b.report(); err != nil {
		return err
	}
	return b.failed
}

func (b *bench) cleanUpWhenInterrupted() {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		os.RemoveAll(b.dir)
		os.Exit(130)
	}()
}

// serve starts PostgreSQL beside the other stores. Without it, the contenders on it are left out.
func (b *bench) serve() (stop func() error, err error) {
	needed := false
	for _, c := range b.field {
		needed = needed || c.on == onPostgres
	}
	if !needed {
		return func() error { return nil }, nil
	}
	if err := os.Setenv("TMPDIR", filepath.Dir(b.dir)); err != nil {
		return nil, err
	}
	b.server, err = startServer()
	if errors.Is(err, errNoServer) {
		b.noServer = err.Error()
		fmt.Fprintln(os.Stderr, b.noServer)
		var rest []contender
		for _, c := range b.field {
			if c.on != onPostgres {
				rest = append(rest, c)
			}
		}
		b.field = rest
		return func() error { return nil }, nil
	}
	if err != nil {
		return nil, err
	}
	return b.server.stop, nil
}

// plan is all that is to be done.
func (b *bench) plan() (steps []step) {
	has := func(part string) bool { return strings.Contains(","+b.parts+",", ","+part+",") }
	if has("callers") {
		for _, n := range b.callers {
			steps = append(steps, b.beside(n)...)
		}
	}
	if has("stored") {
		steps = append(steps, b.onFullStores()...)
	}
	if has("replay") {
		steps = append(steps, b.replaying()...)
	}
	if has("recovery") {
		steps = append(steps, b.recovering()...)
	}
	if has("reaping") {
		steps = append(steps, b.whileReaping()...)
	}
	return steps
}
