//go:build linux && amd64

package disk

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate"
)

const statesEnough = 6000

var statesWanted = flag.Int("disk-states", statesEnough, "states of a power cut during creation and compaction to judge")

// TestAPowerCutDuringCreationOrCompactionLeavesAWholeFileOrNone lets the power fail before and after every call of both, in every
// combination of names that may be there.
func TestAPowerCutDuringCreationOrCompactionLeavesAWholeFileOrNone(t *testing.T) {
	needTrace(t)
	wanted := *statesWanted
	if raced || testing.Short() {
		wanted /= 4
	}
	x := tally{loud: wanted > statesEnough}
	began := time.Now()
	atDesks(t, func(d *desk) error {
		if err := d.record(nil); err != nil {
			return err
		}
		log := d.log
		d.hand <- func(b *bench) {
			if err := b.making(&x, log, wanted/d.of); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	t.Logf("%d states after a power cut judged, %d carried on with; %v", x.states.Load(), x.resumed.Load(), time.Since(began).Round(time.Millisecond))
	if !t.Failed() && int(x.states.Load()) < wanted {
		t.Errorf("there were %d states only", x.states.Load())
	}
}

// record runs the script to its end.
func (d *desk) record(decide func(*call) action) error {
	if err := d.clear(); err != nil {
		return err
	}
	p, err := d.run("script", decide)
	if err != nil {
		return err
	}
	return d.fate(p)
}

// span is the part of a log from one thing told to another.
func span(log []event, from, to func(*tell) bool) (first, last int) {
	first = slices.IndexFunc(log, func(e event) bool { return e.kind == told && from(e.tell) })
	last = first + 1 + slices.IndexFunc(log[first+1:], func(e event) bool { return e.kind == told && to(e.tell) })
	return first, last
}

// making judges states of a new store and of a compacted one while they are being made.
func (b *bench) making(x *tally, log []event, states int) error {
	_, created := span(append([]event{{kind: told, tell: &tell{}}}, log...), func(*tell) bool { return true },
		func(t *tell) bool { return t.What == opened })
	compact, compactedAndOpen := span(log, func(t *tell) bool { return t.What == compacting },
		func(t *tell) bool { return t.What == opened && t.Store == 1 })
	each := states/(created+compactedAndOpen-compact) + 1
	p, k := newPlatter(), newKnowledge()
	var source *content
	for i, e := range log {
		if i == compact {
			source = p.cut(kept{})[stores[0]]
		}
		if i <= created || i >= compact && i <= compactedAndOpen {
			for n := range each {
				if err := b.makingCut(x, p, k, n, source); err != nil {
					return fmt.Errorf("power cut after %d of %d events: %w", i, len(log), err)
				}
			}
		}
		p.apply(e)
		if e.kind == told {
			if err := k.hear(e.tell); err != nil {
				return err
			}
		}
	}
	return nil
}

// makingCut judges the n-th state at a moment, and what becomes of drafts in it.
func (b *bench) makingCut(x *tally, p *platter, k *knowledge, n int, source *content) error {
	fates := []fate{lost{}, kept{}, chance{b.rng}, chance{b.rng}}
	sets := 1 << min(len(p.renamed), 10)
	f := &named{fate: fates[n/sets%len(fates)], bits: n % sets}
	left := p.cut(f)
	x.count()
	if source != nil && (left[stores[0]] == nil || !left[stores[0]].equal(source)) {
		return errors.New("the compaction has touched its source")
	}
	if err := k.judge(left, b.dir); err != nil {
		return err
	}
	const others, further = 4, 8
	if b.rng.IntN(others) == 0 {
		if err := b.sweeping(k, left); err != nil {
			return err
		}
	}
	if b.rng.IntN(further) > 0 {
		return nil
	}
	x.resumed.Add(1)
	return k.carryOn(left, b.dir)
}

// sweeping opens what a power cut left, drafts and all, and makes what is missing. Old drafts go, others stay.
func (b *bench) sweeping(k *knowledge, left directory) error {
	dir, err := os.MkdirTemp(b.dir, "sweeping")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := left.write(dir); err != nil {
		return err
	}
	longAgo := time.Now().Add(-2 * time.Hour)
	for name := range left {
		if strings.Contains(name, ".creating-") {
			if err := os.Chtimes(filepath.Join(dir, name), longAgo, longAgo); err != nil {
				return err
			}
		}
	}
	for i, name := range stores {
		fresh := filepath.Join(dir, "."+name+".creating-fresh")
		if err := os.WriteFile(fresh, nil, 0o600); err != nil {
			return err
		}
		path := filepath.Join(dir, name)
		if left[name] == nil && i == 1 {
			if err := keystate.Compact(filepath.Join(dir, stores[0]), path); err != nil {
				return fmt.Errorf("after a compaction was cut off: %w", err)
			}
		}
		if err := k.judgeStore(i, path); err != nil {
			return fmt.Errorf("after the making of %s was cut off: %w", name, err)
		}
		drafts, err := filepath.Glob(filepath.Join(dir, "."+name+".creating-*"))
		if err != nil || !slices.Equal(drafts, []string{fresh}) {
			return fmt.Errorf("beside %s there are %v (%w)", name, drafts, err)
		}
		if len(k.keys[1]) == 0 {
			break // there is nothing to compact yet
		}
	}
	return nil
}

// TestACreatorHeldUpAnywhereHurtsNobody holds a process up before each of its calls in turn while another opens the same store.
func TestACreatorHeldUpAnywhereHurtsNobody(t *testing.T) {
	needTrace(t)
	var x tally
	began := time.Now()
	work := make(chan race)
	go func() {
		defer close(work)
		const calls = 24 // of a creation
		for n := range calls {
			work <- race{n + 1, false}
			work <- race{n + 1, true}
		}
	}()
	atDesks(t, func(d *desk) error {
		for r := range work {
			from, err := d.race(r)
			if err != nil {
				t.Errorf("%+v: %v", r, err)
				continue
			}
			log := d.log
			d.hand <- func(b *bench) {
				at := cuts{}
				for i := from; i <= len(log); i++ {
					at[i] = 4
				}
				if err := b.explore(&x, log, at, 0); err != nil {
					t.Errorf("%+v: %v", r, err)
				}
			}
		}
		return nil
	})
	t.Logf("%d states after a power cut judged; %v", x.states.Load(), time.Since(began).Round(time.Millisecond))
}

// A race is between two creators: one is held up before its n-th call until the other has closed the store again, or while it has it open.
type race struct {
	n    int
	open bool
}

func (d *desk) race(r race) (from int, err error) {
	if err := d.clear(); err != nil {
		return 0, err
	}
	slow, err := d.start("creator", func(c *call) action {
		if c.n == r.n {
			return action{kind: pause}
		}
		return action{}
	})
	if err != nil {
		return 0, err
	}
	if err := d.until(func() bool { return d.held != nil || slow.ended }); err != nil {
		return 0, err
	}
	if slow.ended {
		return 0, errors.New("it makes fewer calls")
	}
	goOn := d.held
	d.held = nil
	quick, err := d.start("creator", func(*call) action {
		if r.open && len(d.log) > 0 {
			if last := d.log[len(d.log)-1]; last.kind == told && last.tell.What == answered {
				return action{kind: pause}
			}
		}
		return action{}
	})
	if err != nil {
		return 0, err
	}
	from = len(d.log)
	if err := d.until(func() bool { return d.held != nil || quick.ended }); err != nil {
		return 0, err
	}
	letQuick := d.held
	d.held = nil
	if err := goOn(); err != nil {
		return 0, err
	}
	if err := d.until(func() bool { return slow.ended }); err != nil {
		return 0, err
	}
	if r.open {
		if letQuick == nil {
			return 0, errors.New("the other did not get to have the store open")
		}
		if err := letQuick(); err != nil {
			return 0, err
		}
		if err := d.until(func() bool { return quick.ended }); err != nil {
			return 0, err
		}
	}
	return from, errors.Join(d.fate(slow), d.fate(quick), d.amicable(r))
}

// amicable says whether both creators got what they may expect.
func (d *desk) amicable(r race) error {
	answers := 0
	for _, e := range d.log {
		if e.kind != told {
			continue
		}
		switch t := e.tell; {
		case t.What == answered && t.Record != nil:
			answers++
		case t.What == failed && !(r.open && slices.Contains(t.Names, "locked")):
			return fmt.Errorf("%s failed: %s", t.Doing, t.Err)
		}
	}
	if answers == 0 || answers < 2 && !r.open {
		return fmt.Errorf("there are %d answers", answers)
	}
	return nil
}
