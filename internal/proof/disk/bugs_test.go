//go:build linux && amd64

package disk

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A bug is a store, or a disk, that leaves something out. The tracer leaves it out: it tells the store that a call was carried out
// which was not. A proof that has never found anything proves nothing.
type bug struct {
	name string

	// lies says whether a call is left out.
	lies func(c *call, s *sight) bool

	// fails makes a sync fail beside it, each one in turn: some bugs only show after that. With silently, nobody is told that it failed.
	fails    func(c *call, s *sight) bool
	silently bool

	early bool // answers are told one sync too early

	// benign says why nothing can come of it. Then it is looked for all the same, and must not be found.
	benign string
}

// A sight is what the calls so far have shown of the file that is being written.
type sight struct {
	wrote *call // the last write
	clean bool  // it was synced
	grown bool  // and not synced since
}

func (s *sight) see(c *call) {
	switch {
	case c.op == opWrite:
		s.wrote, s.clean = c, false
	case c.op == opTruncate:
		s.grown = true
	case c.op.syncs() && c.name != "":
		s.clean, s.grown = true, false
	}
}

func draft(c *call) bool { return strings.Contains(c.name, ".creating-") }

func directorySync(c *call, _ *sight) bool { return c.op == opSync && c.name == "" }

// contentSync is the sync between data pages and meta page; metaSync is the one after the meta page.
func contentSync(c *call, s *sight) bool {
	return c.op == opSyncContent && !draft(c) && s.wrote != nil && !s.wrote.meta() && !s.grown
}

func metaSync(c *call, s *sight) bool {
	return c.op == opSyncContent && !draft(c) && s.wrote != nil && s.wrote.meta()
}

var bugs = []bug{
	{
		name: "a new file is not synced before it gets its name",
		lies: func(c *call, _ *sight) bool { return draft(c) && c.op.syncs() },
	},
	{
		name:   "a new file is not synced once more when bbolt has committed what it holds",
		lies:   func(c *call, s *sight) bool { return draft(c) && c.op.syncs() && s.clean },
		benign: "bbolt has synced each of its commits, and nothing is written after the last",
	},
	{
		name: "the directory is not synced",
		lies: directorySync,
	},
	{
		name: "the directory is not synced when a store is opened",
		lies: func(c *call, s *sight) bool { return directorySync(c, s) && s.wrote != nil && !draft(s.wrote) },
		fails: func(c *call, s *sight) bool {
			return directorySync(c, s) && (s.wrote == nil || draft(s.wrote))
		},
	},
	{
		name: "the data pages are not synced before the meta page is written",
		lies: contentSync,
	},
	{
		name: "the meta page is not synced before an answer is given",
		lies: metaSync,
	},
	{
		name:  "the meta pages are not written anew when a store is opened",
		lies:  func(c *call, _ *sight) bool { return c.metas() },
		fails: metaSync,
	},
	{
		name: "the meta pages are written anew, and not synced, when a store is opened",
		lies: func(c *call, s *sight) bool {
			return c.op == opSync && s.wrote != nil && s.wrote.metas() && c.name != ""
		},
		fails: metaSync,
	},
	{
		name: "the file does not grow before it is written to",
		lies: func(c *call, _ *sight) bool { return c.op == opTruncate },
		benign: "writing beyond a file's end makes it grow, and every page up to the last one used is written and synced " +
			"before the meta page that counts it",
	},
	{
		name:   "growth is not synced",
		lies:   func(c *call, s *sight) bool { return c.op == opSync && s.grown },
		benign: "the sync of the data pages, which comes before the meta page, covers it",
	},
	{
		name:     "the engine goes on after the data pages' sync has failed",
		fails:    contentSync,
		silently: true,
	},
	{
		name:     "the engine goes on after the meta page's sync has failed",
		fails:    metaSync,
		silently: true,
	},
	{
		name:  "answers are given one sync too early",
		early: true,
	},
}

// TestSeededBugsOfDiskAndStoreAreFound plays each bug to the judges of the other tests.
func TestSeededBugsOfDiskAndStoreAreFound(t *testing.T) {
	needTrace(t)
	work := make(chan bug)
	go func() {
		defer close(work)
		for _, b := range bugs {
			work <- b
		}
	}()
	atDesks(t, func(d *desk) error {
		for b := range work {
			began := time.Now()
			var x tally
			found, err := d.hunt(&x, b)
			t.Logf("%s: %d states, %v: %v", b.name, x.states.Load(), time.Since(began).Round(time.Millisecond), found)
			switch {
			case err != nil:
				t.Errorf("%s: %v", b.name, err)
			case found != nil && b.benign != "":
				t.Errorf("%s: found, although %s", b.name, b.benign)
			case found == nil && b.benign == "":
				t.Errorf("%s: not found", b.name)
			}
		}
		return nil
	})
}

// hunt plays a bug until it is found.
func (d *desk) hunt(x *tally, b bug) (found, err error) {
	const most = 60 // syncs that fail in turn
	left := 0
	if lies := b.lies; lies != nil {
		b.lies = func(c *call, s *sight) bool {
			lie := lies(c, s)
			if lie {
				left++
			}
			return lie
		}
	}
	for n := 1; n <= most && found == nil && (n == 1 || b.fails != nil); n++ {
		if done, err := d.suffer(b, n); done || err != nil {
			return nil, err
		}
		if b.lies != nil && left == 0 {
			return nil, errors.New("nothing was left out")
		}
		log, verdict := d.log, make(chan error)
		if b.early {
			log = early(log)
		}
		d.hand <- func(bench *bench) {
			at := cuts{}
			for i := range log {
				at[i+1] = 4
			}
			verdict <- bench.explore(x, log, at, 0)
		}
		found = <-verdict
	}
	return found, nil
}

// suffer plays the script and a successor with a bug in both, where the n-th call fails that is to fail. It is done when there is none.
func (d *desk) suffer(b bug, n int) (done bool, err error) {
	var s sight
	failures := 0
	decide := func(c *call) (a action) {
		defer s.see(c)
		switch {
		case b.fails != nil && b.fails(c, &s):
			if failures++; failures == n && b.silently {
				return action{kind: swallow}
			} else if failures == n {
				return action{refuse, syscall.EIO}
			}
		case b.lies != nil && b.lies(c, &s):
			return action{kind: lie}
		}
		return action{}
	}
	if err := d.record(decide); err != nil {
		return false, err
	}
	if failures < n && b.fails != nil {
		return true, nil
	}
	d.log = append(d.log, event{kind: told, tell: &tell{What: closed}})
	s = sight{}
	p, err := d.run("successor", decide)
	if err != nil {
		return false, err
	}
	if err := d.fate(p); err != nil {
		return false, fmt.Errorf("its successor %w", err)
	}
	return false, nil
}

// early is a log in which answers were told one sync earlier than they were.
func early(log []event) []event {
	var out []event
	for _, e := range log {
		if e.kind == told && e.tell.What == answered {
			i := len(out)
			for i > 0 && out[i-1].kind != synced {
				i--
			}
			if i > 0 {
				out = append(out[:i-1], append([]event{e}, out[i-1:]...)...)
				continue
			}
		}
		out = append(out, e)
	}
	return out
}
