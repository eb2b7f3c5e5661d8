//go:build linux && amd64

package disk

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var rounds = flag.Int("disk-rounds", 1, "how often every system call fails, each time with other states after the power cut")

// failures are the ways in which a call can fail.
func failures(c *call) []action {
	const EIO, ENOSPC = syscall.EIO, syscall.ENOSPC
	switch c.op {
	case opWrite:
		all := []action{{refuse, EIO}, {spoil, EIO}, {refuse, ENOSPC}, {halve, ENOSPC}}
		if c.meta() { // before the others, it leaves what it leaves before the sync
			all = append(all, action{kind: kill})
		}
		return all
	case opTruncate, opLink, opRename:
		return []action{{refuse, EIO}, {spoil, EIO}, {refuse, ENOSPC}, {spoil, ENOSPC}, {kind: kill}}
	case opUnlink:
		return []action{{refuse, EIO}, {spoil, EIO}, {kind: kill}}
	case opSync, opSyncContent: // whether it took effect makes no difference: what may be on the disk is the same
		return []action{{refuse, EIO}, {refuse, ENOSPC}, {kind: kill}}
	case opOpen:
		if c.flags&unix.O_CREAT != 0 {
			return []action{{refuse, EIO}, {spoil, EIO}, {refuse, ENOSPC}, {kind: kill}}
		}
		return []action{{refuse, EIO}}
	case opClose: // Linux has closed it even so
		return []action{{spoil, EIO}}
	case opMap:
		return []action{{refuse, syscall.ENOMEM}}
	}
	return []action{{refuse, EIO}}
}

// A trial is one call that fails in one way.
type trial struct{ n, way int }

// TestEveryFailingCallLeavesNothingThatWasNotSaid makes every system call of the script fail in every way, lets the power
// fail afterwards, then lets a successor go on with what the failure left in the page cache, and lets the power fail again.
func TestEveryFailingCallLeavesNothingThatWasNotSaid(t *testing.T) {
	needTrace(t)
	writes, reads := experiment{tally: tally{loud: *rounds > 1}}, experiment{}
	for range *rounds {
		writes.round(t, false)
		reads.round(t, true)
	}
	writes.report(t, "writing calls, and those about names and locks")
	reads.report(t, "reading calls")
	if never := writes.seen.missing(inStates); len(never) > 0 && !raced && !testing.Short() {
		t.Errorf("in no state: %v", never)
	}
}

// An experiment sums up what its trials found.
type experiment struct {
	tally
	trials, delivered, processes atomic.Int64
	rounds                       int // done
	took                         time.Duration

	mu    sync.Mutex
	said  map[string]int // what came of it
	wrong []string
}

// round makes every call fail once in every way.
func (x *experiment) round(t *testing.T, reads bool) {
	began := time.Now()
	jobs := make(chan trial)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var planned sync.Once
	atDesks(t, func(d *desk) error {
		d.reads = reads
		d.rng = rand.New(rand.NewPCG(d.rng.Uint64(), uint64(x.rounds)))
		d.side.rng = rand.New(rand.NewPCG(d.rng.Uint64(), uint64(x.rounds)))
		var err error
		planned.Do(func() {
			var plan []trial
			if plan, err = d.plan(reads); err != nil {
				cancel()
				return
			}
			go func() {
				defer close(jobs)
				for _, j := range plan {
					select {
					case jobs <- j:
					case <-ctx.Done():
						return
					}
				}
			}()
		})
		if err != nil {
			return err
		}
		for {
			select {
			case j, more := <-jobs:
				if !more {
					return nil
				}
				if x.try(d, j); x.full() {
					cancel()
				}
			case <-ctx.Done():
				return nil
			}
		}
	})
	x.took += time.Since(began)
	x.rounds++
}

// plan lists the trials: from the longest of a few runs in which nothing fails, since which requests share a commit varies.
func (d *desk) plan(reads bool) (plan []trial, err error) {
	for range 4 {
		var this []trial
		if err := d.clear(); err != nil {
			return nil, err
		}
		p, err := d.run("script", func(c *call) action {
			if !reads || !c.op.changes() && c.op != opLock && c.op != opClose && c.op != opOpen {
				for way := range failures(c) {
					this = append(this, trial{c.n, way})
				}
			}
			return action{}
		})
		if err != nil {
			return nil, err
		}
		if err := errors.Join(d.fate(p), d.real()); err != nil {
			return nil, fmt.Errorf("where nothing fails: %w", err)
		}
		if len(this) > len(plan) {
			plan = this
		}
	}
	rand.New(rand.NewPCG(*seed, 0)).Shuffle(len(plan), func(i, j int) { plan[i], plan[j] = plan[j], plan[i] })
	return plan[:len(plan)/share(reads)], nil
}

// share is of how many calls one is tried.
func share(reads bool) int {
	switch {
	case raced || testing.Short():
		return 8
	case reads && *rounds == 1:
		return 2
	}
	return 1
}

// A failing is one call that was made to fail.
type failing struct {
	call  *call
	act   action
	since int // events in the log when it did
}

func (f *failing) String() string {
	if f.call == nil {
		return "for which nothing failed"
	}
	return fmt.Sprintf("%s %s", f.call, f.act)
}

// killed says whether a process ended because it was to be killed.
func (f *failing) killed(p *process) bool {
	return f.act.kind == kill && p.status.Signaled() && !p.hung
}

// fail makes the n-th call fail in one of its ways.
func (f *failing) fail(d *desk, j trial) func(*call) action {
	return func(c *call) action {
		switch {
		case c.n == j.n:
			if ways := failures(c); j.way < len(ways) {
				f.call, f.act, f.since = c, ways[j.way], len(d.log)
				return f.act
			}
		case f.act.kind == halve && c.op == opWrite && c.n > j.n && f.call.inode == c.inode && c.n == f.call.n+1:
			return action{refuse, f.act.errno} // there was room for half of it only
		}
		return action{}
	}
}

// try does one trial: at the desk, and then, while the next is under way there, beside it.
func (x *experiment) try(d *desk, j trial) {
	x.trials.Add(1)
	var f failing
	first, err := d.attempt(x, j, &f)
	if err != nil {
		x.object(fmt.Sprintf("%s: %v", &f, err))
	}
	if err != nil || f.call == nil {
		return
	}
	log := d.log
	d.hand <- func(b *bench) {
		at := cuts{f.since: 1, first: 2, len(log): 2}
		for range 2 {
			at[f.since+b.rng.IntN(first-f.since+1)]++
			at[first+b.rng.IntN(len(log)-first+1)]++
		}
		const carryOn = 24 // of so many states, one
		if err := b.explore(&x.tally, log, at, carryOn); err != nil {
			x.object(fmt.Sprintf("%s: %v", &f, err))
		}
	}
}

// attempt makes a call fail and has a successor go on. It says how long the log was in between.
func (d *desk) attempt(x *experiment, j trial, f *failing) (first int, err error) {
	if err := d.clear(); err != nil {
		return 0, err
	}
	p, err := d.run("script", f.fail(d, j))
	if err != nil {
		return 0, err
	}
	x.processes.Add(1)
	if err := d.fate(p); err != nil && !f.killed(p) {
		return 0, err
	}
	if f.call == nil {
		return 0, nil
	}
	x.delivered.Add(1)
	if !f.killed(p) && len(p.files) > 0 {
		return 0, fmt.Errorf("%d files were never closed", len(p.files))
	}
	var second failing
	if err := d.spoken(x, f, 0); err != nil || d.reads { // a call that reads leaves nothing that a successor would find
		return len(d.log), err
	}
	d.log = append(d.log, event{kind: told, tell: &tell{What: closed}})
	first = len(d.log)
	if p, err = d.run("successor", second.fail(d, x.misfortune(d))); err != nil {
		return 0, err
	}
	x.processes.Add(1)
	if err := d.fate(p); err != nil && !second.killed(p) {
		return 0, fmt.Errorf("its successor %w", err)
	}
	if err := d.spoken(x, &second, first); err != nil {
		return 0, fmt.Errorf("its successor, %s: %w", &second, err)
	}
	if d.rng.IntN(4) > 0 {
		return first, nil
	}
	return first, d.real()
}

// misfortune is a trial for the successor. In the first round nothing fails for it.
func (x *experiment) misfortune(d *desk) trial {
	const calls, ways = 80, 5 // or a few less
	if x.rounds == 0 {
		return trial{}
	}
	return trial{1 + d.rng.IntN(calls), d.rng.IntN(ways)}
}

// spoken judges what a process said of a failure.
func (d *desk) spoken(x *experiment, f *failing, from int) error {
	var first *tell
	over := f.act.kind == kill
	full := map[string]bool{} // by what was being done
	for _, e := range d.log[from:] {
		if e.kind != told || e.tell.What != failed {
			over = over || e.kind == told && e.tell.What == ended
			continue
		}
		t := e.tell
		if first == nil {
			first = t
		}
		if f.call == nil {
			return fmt.Errorf("%s failed: %s", t.Doing, t.Err)
		}
		if err := honest(t, t == first, f.act, f.call.op); err != nil {
			return err
		}
		if full[t.Doing] {
			return fmt.Errorf("%s failed again when there was room: %s", t.Doing, t.Err)
		}
		full[t.Doing] = slices.Contains(t.Names, "storage full") && !slices.Contains(t.Names, "outcome unknown")
	}
	if !over {
		return errors.New("it did not come to its end")
	}
	x.note(f, first)
	return nil
}

// note counts what came of a failure.
func (x *experiment) note(f *failing, first *tell) {
	if f.call == nil {
		return
	}
	what := "nothing was said"
	if first != nil {
		what = strings.Fields(first.Doing)[0] + ": " + strings.Join(slices.Sorted(slices.Values(first.Names)), ", ")
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.said == nil {
		x.said = map[string]int{}
	}
	x.said[fmt.Sprintf("%-10s %-28s %s", f.call.op, f.act, what)]++
}

func (x *experiment) object(to string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.wrong = append(x.wrong, to)
}

// full says whether enough is wrong.
func (x *experiment) full() bool {
	const enough = 2000
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.wrong) >= enough
}

func (x *experiment) report(t *testing.T, of string) {
	t.Logf("%s: %d trials, %d calls failed; %d processes, %.0f a second; %d states after a power cut judged, %d carried on with; %v",
		of, x.trials.Load(), x.delivered.Load(), x.processes.Load(), float64(x.processes.Load())/x.took.Seconds(), x.states.Load(), x.resumed.Load(),
		x.took.Round(time.Millisecond))
	if testing.Verbose() {
		for _, what := range slices.Sorted(maps.Keys(x.said)) {
			t.Logf("%5d  %s", x.said[what], what)
		}
	}
	for _, w := range x.wrong {
		t.Error(w)
	}
	if t.Failed() {
		return
	}
	if x.delivered.Load() < x.trials.Load()*3/4 { // which requests share a commit varies, and with it how many calls there are
		t.Errorf("only %d of %d calls failed", x.delivered.Load(), x.trials.Load())
	}
}
