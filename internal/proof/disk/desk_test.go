//go:build linux && amd64

package disk

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var seed = flag.Uint64("disk-seed", 1, "which states after a power cut are drawn")

// A desk is where one worker traces: a thread, and a directory that processes work in. The thread stays on one processor, with
// the processes that it traces: handing over between them is then twice as fast.
type desk struct {
	*tracer
	rng  *rand.Rand
	cpu  int
	of   int // desks
	side bench
	hand chan func(*bench)
}

// A bench stands beside each desk. There the files are opened that a power cut left: a thread that traces would be slow at it, since it
// shares its goroutine with no other.
type bench struct {
	dir string
	rng *rand.Rand
}

// atDesks runs work at as many desks as there are processors.
func atDesks(t *testing.T, work func(*desk) error) {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	var crowd sync.WaitGroup
	n := 0
	const most = 1024
	for cpu := range most {
		if !set.IsSet(cpu) || n == runtime.GOMAXPROCS(0) {
			continue
		}
		n++
		random := func(who uint64) *rand.Rand { return rand.New(rand.NewPCG(*seed, uint64(n)<<1|who)) }
		d := &desk{
			cpu: cpu, of: min(set.Count(), runtime.GOMAXPROCS(0)), rng: random(0),
			side: bench{fastDir(t), random(1)}, hand: make(chan func(*bench), 4),
		}
		dir := fastDir(t)
		crowd.Go(func() {
			for judge := range d.hand {
				judge(&d.side)
			}
		})
		crowd.Go(func() {
			defer close(d.hand)
			if err := d.sit(dir, work); err != nil {
				t.Error(err)
			}
		})
	}
	crowd.Wait()
}

func (d *desk) sit(dir string, work func(*desk) error) (err error) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
	var mine unix.CPUSet
	mine.Set(d.cpu)
	_ = unix.SchedSetaffinity(0, &mine)
	if d.tracer, err = newTracer(dir); err != nil {
		return err
	}
	return errors.Join(work(d), d.close())
}

// fastDir is a directory in memory, if there is a place for such: what is synced there is up to the tracer anyway.
func fastDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "keystate-disk-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// needTrace skips a test where processes cannot be traced. That is no excuse where all must be tested.
var needTrace = func() func(*testing.T) {
	try := sync.OnceValue(func() (err error) {
		var here sync.WaitGroup
		here.Go(func() {
			runtime.LockOSThread()
			var dir string
			if dir, err = os.MkdirTemp("", "trace"); err != nil {
				return
			}
			defer os.RemoveAll(dir)
			var tr *tracer
			if tr, err = newTracer(dir); err != nil {
				return
			}
			defer tr.close()
			var p *process
			if err = tr.clear(); err == nil {
				if p, err = tr.run("nothing", nil); err == nil {
					err = tr.fate(p)
				}
			}
			if err == nil && (p.calls != 1 || len(tr.log) != 1) {
				err = fmt.Errorf("%d calls and %d messages were seen instead of one", p.calls, len(tr.log))
			}
		})
		here.Wait()
		return err
	})
	return func(t *testing.T) {
		t.Helper()
		if err := try(); err != nil && os.Getenv("KEYSTATE_MUST_TRACE") != "" {
			t.Fatalf("processes cannot be traced here: %v", err)
		} else if err != nil {
			t.Skipf("processes cannot be traced here: %v", err)
		}
	}
}()

// real compares what the log says is in the directory with what is.
func (d *desk) real() error {
	p := newPlatter()
	for _, e := range d.log {
		p.apply(e)
	}
	left := p.cut(kept{})
	entries, err := os.ReadDir(d.dir)
	if err != nil || len(entries) != len(left) {
		return fmt.Errorf("%d files are there, %d in the log (%w)", len(entries), len(left), err)
	}
	for name, f := range left {
		if err := f.is(filepath.Join(d.dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// A tally counts states, and what was seen in them.
type tally struct {
	states, resumed atomic.Int64
	seen            sightings

	loud  bool // it tells of its progress
	mu    sync.Mutex
	since time.Time // when it did last
	then  int64     // states
}

// count counts a state, and tells of a long run that it is alive.
func (x *tally) count() {
	const pause = 10 * time.Second
	n := x.states.Add(1)
	if !x.loud {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	took := time.Since(x.since)
	if took < pause {
		return
	}
	if !x.since.IsZero() {
		fmt.Fprintf(os.Stderr, "%d states after a power cut judged, %.0f a second\n", n, float64(n-x.then)/took.Seconds())
	}
	x.since, x.then = time.Now(), n
}

// sightings are what was seen at least once.
type sightings struct{ all sync.Map }

func (s *sightings) note(what string) {
	if s != nil {
		s.all.Store(what, true)
	}
}

func (s *sightings) missing(of []string) (never []string) {
	for _, what := range of {
		if _, seen := s.all.Load(what); !seen {
			never = append(never, what)
		}
	}
	return never
}

// Cuts say how many states are to be drawn after how many events.
type cuts map[int]int

// explore lets the power fail at positions in a log and judges what is left. Of every so many states, one is carried on with.
func (b *bench) explore(x *tally, log []event, cuts cuts, every int) error {
	p, k := newPlatter(), newKnowledge()
	k.seen = &x.seen
	for i := 0; ; i++ {
		for n := range cuts[i] {
			fates := []fate{chance{b.rng}, chance{b.rng}, kept{}, lost{}}
			if err := b.cut(x, p, k, fates[(n+b.rng.IntN(len(fates)))%len(fates)], every); err != nil {
				return fmt.Errorf("power cut after %d of %d events: %w", i, len(log), err)
			}
		}
		if i == len(log) {
			return nil
		}
		p.apply(log[i])
		if log[i].kind == told {
			if err := k.hear(log[i].tell); err != nil {
				return err
			}
		}
	}
}

// cut judges one state.
func (b *bench) cut(x *tally, p *platter, k *knowledge, f fate, every int) error {
	left := p.cut(f)
	x.count()
	if err := k.judge(left, b.dir); err != nil {
		return err
	}
	if every == 0 || b.rng.IntN(every) > 0 {
		return nil
	}
	x.resumed.Add(1)
	if err := k.carryOn(left, b.dir); err != nil {
		return fmt.Errorf("carried on with: %w", err)
	}
	return nil
}
