//go:build linux && amd64

package disk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// What the traced processes do: a program that keeps orders with keystate.

const (
	roleVariable  = "KEYSTATE_DISK_ROLE"
	dirVariable   = "KEYSTATE_DISK_DIR"
	readsVariable = "KEYSTATE_DISK_READS"
	tellFD        = 3 // where a process says what it did; the tracer listens
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		os.Exit(play(role, os.Getenv(dirVariable)))
	}
	os.Exit(m.Run())
}

// stores are the files: the first is compacted into the second.
var stores = []string{"store.db", "compact.db"}

// A tell is what a process says when it has happened, before it goes on.
type tell struct {
	What    what
	Store   int
	Key     string
	Token   string // of an effect
	Fate    string
	Record  []byte // as stored
	Answer  string // the state, as JSON
	Refusal string
	Doing   string   // what failed
	Err     string   // how
	Names   []string // that the error answers to
}

type what string

const (
	opened     what = "opened"    // Open has succeeded
	asked      what = "asked"     // a request is about to be made
	claimed    what = "claimed"   // Start has returned
	answered   what = "answered"  // Wait has returned an answer, or where the key stands
	sending    what = "sending"   // an effect runs
	staging    what = "staging"   // a commit stages a key
	found      what = "found"     // in the store, when it was opened
	operating  what = "operating" // an operator is about to free a parked key
	retried    what = "retried"
	abandoned  what = "abandoned"
	reaping    what = "reaping" // finished keys are about to be deleted
	compacting what = "compacting"
	compacted  what = "compacted"
	closed     what = "closed"
	failed     what = "failed"
	ended      what = "ended"
)

// An order is a request. Its fate says what is to happen to it.
type order struct {
	ID, Fate string
	Payout   string
}

type phase = keystate.Phase[*bbolt.Tx, order]

type player struct {
	dir     string
	store   int
	role    string
	listen  func(tell)
	patient bool // effects succeed at once
	engine  *keystate.Engine[*bbolt.Tx]
	orders  *keystate.Machine[order]
	mu      sync.Mutex
	tries   map[string]int
}

var background = context.Background()

// play is main.
func play(role, dir string) int {
	if err := showDisk(os.Getenv(readsVariable) == "true"); err != nil {
		fmt.Fprintln(os.Stderr, "the system calls are not shown:", err)
		return 3
	}
	p := &player{dir: dir, role: role, tries: map[string]int{}, listen: shout}
	switch role {
	case "nothing":
		_, _ = os.ReadFile(filepath.Join(dir, "nothing"))
	case "script":
		p.script()
	case "successor":
		p.succeed()
	case "creator":
		o := options(-1)
		o.LockTimeout = time.Millisecond
		p.session(0, o, func() { p.ask(order{ID: fmt.Sprint("made by ", os.Getpid())}) })
	}
	p.say(tell{What: ended})
	return 0
}

func (p *player) script() {
	p.business()
	p.compact()
	p.session(1, options(-1), func() { p.ask(order{ID: "after compaction"}) })
}

// business is what every store sees: requests that share commits, an operator, reaping, a parked key that stays.
func (p *player) business() {
	p.session(0, options(-1), func() {
		p.together(
			func() { p.ask(order{ID: "plain"}) },
			func() { p.ask(order{ID: "refused", Fate: "refused"}) },
			func() { p.ask(order{ID: "flaky", Fate: "flaky"}) },
			func() { p.ask(order{ID: "stuck", Fate: "stuck"}) },
			func() { p.ask(order{ID: "hopeless", Fate: "stuck"}) },
			func() { p.ask(order{ID: "left", Fate: "stuck"}) },
			func() {
				p.ask(order{ID: "audited", Fate: "audited"})
				p.ask(audit(order{ID: "audited"}))
			},
		)
		p.operate("stuck", retried, func(key keystate.Key) error { return p.engine.Retry(background, key) })
		p.ask(order{ID: "stuck", Fate: "stuck"})
		p.operate("hopeless", abandoned, func(key keystate.Key) error { return p.engine.Abandon(background, key, "it is hopeless") })
		p.ask(order{ID: "plain"})
	})
	p.reap()
	p.session(0, options(-1), func() {
		p.ask(order{ID: "late"})
	})
}

// reap opens the store for as long as it takes to delete what is finished.
func (p *player) reap() {
	done := make(chan struct{}, 8)
	o := options(time.Millisecond)
	o.Observer = &keystate.Observer{Reaped: func(keystate.Event) { done <- struct{}{} }}
	o.Logger = slog.New(alarm(done))
	p.say(tell{What: reaping})
	p.session(0, o, func() {
		stats, err := p.engine.Stats(background)
		if p.check("Stats", err) && stats.Finished > 0 {
			<-done
		}
	})
}

// An alarm is a log that tells that reaping failed.
type alarm chan struct{}

func (a alarm) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelError }
func (a alarm) WithAttrs([]slog.Attr) slog.Handler               { return a }
func (a alarm) WithGroup(string) slog.Handler                    { return a }
func (a alarm) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, "reaping failed") {
		a <- struct{}{}
	}
	return nil
}

func (p *player) compact() {
	p.say(tell{What: compacting, Store: 1})
	try := func() error { return keystate.Compact(p.path(0), p.path(1)) }
	err := try()
	if !p.check("Compact", err) && !errors.Is(err, fs.ErrExist) {
		if err = try(); errors.Is(err, fs.ErrExist) { // the first try failed when all was done but to make sure of it
			p.check("Compact again", err)
		}
	}
	if err == nil {
		p.say(tell{What: compacted, Store: 1})
	}
}

// succeed is what the next process does with what the last one left: it carries everything to its end, and has work of its own.
func (p *player) succeed() {
	p.patient = true
	for i := range stores {
		if _, err := os.Stat(p.path(i)); err != nil && i > 0 {
			continue
		}
		p.session(i, options(-1), func() {
			p.check("Resume", p.engine.Resume(background))
			for r, err := range p.engine.Keys(background, keystate.Filter{Status: keystate.Parked}) {
				if p.check("Keys", err) {
					p.operate(r.Key.ID, retried, func(key keystate.Key) error { return p.engine.Retry(background, key) })
				}
			}
			p.check("Resume", p.engine.Resume(background))
			p.ask(order{ID: "new " + p.role})
		})
	}
}

func options(retention time.Duration) *keystate.Options {
	return &keystate.Options{Retention: retention, Headroom: -1, Logger: slog.New(slog.DiscardHandler)}
}

func (p *player) path(store int) string { return filepath.Join(p.dir, stores[store]) }

// session has the store open for as long as the work takes. One failure is not the end: whoever cannot open it tries again.
func (p *player) session(store int, o *keystate.Options, work func()) {
	p.store = store
	var err error
	for range 2 {
		p.engine, err = keystate.Open(p.path(store), o)
		if p.check("Open", err) {
			p.say(tell{What: opened})
			p.show()
			p.orders, err = keystate.Register(p.engine, "order", p.phases())
			if p.check("Register", err) {
				work()
			}
			p.check("Close", p.engine.Close())
			p.say(tell{What: closed})
			return
		}
	}
}

// show tells what was in the store.
func (p *player) show() {
	for r, err := range p.engine.Keys(background, keystate.Filter{}) {
		if p.check("Keys", err) {
			p.say(tell{What: found, Key: r.Key.ID, Record: frame(r)})
		}
	}
}

func frame(r keystate.Record) []byte {
	b, err := r.MarshalBinary()
	if err != nil {
		panic(err)
	}
	return b
}

// together does several things at once. What they commit first shares a commit: a transaction of the program's own holds
// the store until they are all in line.
func (p *player) together(all ...func()) {
	var crowd sync.WaitGroup
	held, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	crowd.Go(func() {
		err := p.engine.Update(background, func(*bbolt.Tx) error {
			once.Do(func() { close(held) })
			<-release
			return nil
		})
		once.Do(func() { close(held) }) // the store has failed before
		p.check("Update", err)
	})
	<-held
	for _, f := range all {
		crowd.Go(f)
	}
	const enough = 100
	for range enough {
		runtime.Gosched()
	}
	close(release)
	crowd.Wait()
}

// ask makes a request and tells what came of it. Where there was no room it asks again: there is some now.
func (p *player) ask(o order) {
	key := keystate.Key{ID: o.ID}
	p.say(tell{What: asked, Key: o.ID})
	for range 2 {
		var answer order
		run, err := p.orders.Start(background, key, o)
		if err == nil {
			p.say(tell{What: claimed, Key: o.ID})
			answer, err = run.Wait(background)
		}
		if p.conclude(o.ID, answer, err) {
			return
		}
		p.check("Do "+o.ID, err)
		if !errors.Is(err, keystate.ErrStorageFull) {
			return
		}
	}
}

// conclude tells of an answer, or that the key is parked; all else is a failure.
func (p *player) conclude(id string, answer order, err error) bool {
	t := tell{What: answered, Key: id}
	var refusal *keystate.FinalError
	switch {
	case errors.As(err, &refusal):
		t.Refusal = refusal.Reason
	case err != nil && !errors.Is(err, keystate.ErrParked):
		return false
	}
	if !errors.Is(err, keystate.ErrParked) {
		b, err := json.Marshal(answer)
		if err != nil {
			panic(err)
		}
		t.Answer = string(b)
	}
	p.say(t)
	r, err := p.engine.Key(background, keystate.Key{ID: id}) // nobody writes it any more
	if p.check("Key "+id, err) {
		t.Record = frame(r)
		p.say(t)
	}
	return true
}

func (p *player) operate(id string, done what, operate func(keystate.Key) error) {
	key := keystate.Key{ID: id}
	r, err := p.engine.Key(background, key)
	if err != nil || r.Status != keystate.Parked {
		return
	}
	p.say(tell{What: operating, Key: id})
	if p.check(string(done), operate(key)) {
		p.say(tell{What: done, Key: id, Record: frame(r)})
	}
}

func audit(o order) order { return order{ID: o.ID + "'s audit"} }

// points are the recovery points; a phase's commit writes a row of its name.
var points = []keystate.RecoveryPoint{"reserved", "paid", keystate.Finished}

var errDown = errors.New("the other side is down")

func (p *player) phases() []phase {
	const tries = 2
	row := func(tx *bbolt.Tx, o *order, point keystate.RecoveryPoint) error {
		b, err := tx.CreateBucketIfNotExists([]byte("rows"))
		if err != nil {
			return err
		}
		name := []byte(o.ID + "/" + string(point))
		return b.Put(name, append([]byte(string(b.Get(name))), '|'))
	}
	return []phase{
		{To: points[0], Commit: func(_ context.Context, tx *bbolt.Tx, o *order) error { return row(tx, o, points[0]) }},
		{
			To:     points[1],
			Retry:  keystate.RetryPolicy{Attempts: tries, InRun: tries, Initial: time.Microsecond, Max: time.Microsecond},
			Effect: p.pay,
			Commit: func(_ context.Context, tx *bbolt.Tx, o *order) error { return row(tx, o, points[1]) },
		},
		{To: points[2], Commit: func(_ context.Context, tx *bbolt.Tx, o *order) error {
			if err := row(tx, o, points[2]); err != nil || o.Fate != "audited" {
				return err
			}
			child := audit(*o)
			p.say(tell{What: staging, Key: child.ID})
			return keystate.Stage(tx, p.orders, keystate.Key{ID: child.ID}, child)
		}},
	}
}

// pay is the effect; the world outside is the tracer.
func (p *player) pay(_ context.Context, token string, o *order) error {
	p.say(tell{What: sending, Key: o.ID, Token: token})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tries[o.ID]++
	switch {
	case o.Fate == "refused":
		return keystate.Final(errors.New("no such account"))
	case p.patient:
	case o.Fate == "flaky" && p.tries[o.ID] < 2, o.Fate == "stuck" && p.tries[o.ID] < 3:
		return errDown
	}
	o.Payout = payout(token)
	return nil
}

func payout(token string) string { return "po_" + token[:8] }

// check tells of an error, and says whether there was none.
func (p *player) check(doing string, err error) bool {
	if err != nil {
		p.say(tell{What: failed, Doing: doing, Err: err.Error(), Names: namesOf(err)})
	}
	return err == nil
}

func (p *player) say(t tell) {
	t.Store = max(t.Store, p.store)
	p.listen(t)
}

// shout tells the tracer. It costs one system call, which never reaches the kernel.
func shout(t tell) {
	b, err := json.Marshal(t)
	if err == nil {
		_, err = syscall.Write(tellFD, b)
	}
	if err != nil {
		panic(err)
	}
}

// sentinels are what errors are known by.
var sentinels = map[string]error{
	"outcome unknown": keystate.ErrOutcomeUnknown, "storage full": keystate.ErrStorageFull, "corrupt": keystate.ErrCorrupt,
	"not a store": keystate.ErrNotAStore, "moved": keystate.ErrMoved, "locked": keystate.ErrLocked, "closed": keystate.ErrClosed,
	"fenced": keystate.ErrFenced, "parked": keystate.ErrParked, "mismatch": keystate.ErrMismatch, "not found": keystate.ErrNotFound,
	"exists": fs.ErrExist, "not exist": fs.ErrNotExist, "EIO": syscall.EIO, "ENOSPC": syscall.ENOSPC, "ENOMEM": syscall.ENOMEM,
}

// namesOf lists what a program can tell an error by.
func namesOf(err error) (names []string) {
	for name, sentinel := range sentinels {
		if errors.Is(err, sentinel) {
			names = append(names, name)
		}
	}
	var stopped *keystate.PhaseError
	if errors.As(err, &stopped) {
		names = append(names, "phase")
	}
	return names
}
