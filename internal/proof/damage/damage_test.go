//go:build linux || darwin

package damage

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"go.uber.org/goleak"
)

var (
	damaged      = flag.Uint64("damaged", 10_000, "files to damage")
	damagedLarge = flag.Uint64("damaged-large", 300, "files to damage and open as if they were larger than VerifyLimit")
	damagedSeed  = flag.Int64("damaged-seed", -1, "the seed of the one file to damage and judge")
	damagedFrom  = flag.Uint64("damaged-from", 0, "the seed of the first file")
)

const (
	batch    = 250              // files that a child process judges
	silence  = 20 * time.Second // of a child, until it hangs; it says more of every file
	progress = 10 * time.Second
	childEnv = "KEYSTATE_DAMAGE_CHILD"
)

func TestMain(m *testing.M) {
	for env, do := range map[string]func(string) error{childEnv: serve, placeEnv: visitAsChild} {
		if order := os.Getenv(env); order != "" {
			if err := do(order); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	code := m.Run()
	if recorded.dir != "" {
		os.RemoveAll(recorded.dir)
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// recorded is where the recorded stores lie.
var recorded struct {
	sync.Once
	dir string
}

// stores records the stores once, in memory where the system has a directory for that.
func stores(t *testing.T) string {
	t.Helper()
	recorded.Do(func() {
		dir, err := os.MkdirTemp("/dev/shm", "damage")
		if err != nil {
			dir, err = os.MkdirTemp("", "damage")
		}
		must(t, err)
		recorded.dir = dir
		writeStores(t, dir)
	})
	return recorded.dir
}

// serve judges files in a child process: "dir product mode from until".
func serve(order string) error {
	var dir, name string
	var m mode
	var from, until uint64
	if _, err := fmt.Sscan(order, &dir, &name, &m, &from, &until); err != nil {
		return err
	}
	known, err := readStores(dir)
	if err != nil {
		return err
	}
	own, err := os.MkdirTemp(dir, "child")
	if err != nil {
		return err
	}
	defer os.RemoveAll(own)
	j, err := newJudge(products[name], known, own)
	if err != nil {
		return err
	}
	for seed := from; seed < until; seed++ {
		s := specimenOf(seed, m, known)
		report(seed, "begin", s.kind, s.String())
		v := j.judge(s)
		fault := ""
		if v.err != nil {
			fault = v.err.Error()
			keep(s)
		}
		slices.Sort(v.found)
		report(seed, "end", v.outcome, v.open.String(), strconv.FormatInt(j.peak, 10),
			strings.Join(slices.Compact(v.found), ","), fault)
	}
	return nil
}

// report tells the parent, in one line.
func report(seed uint64, fields ...string) {
	for i, f := range fields {
		fields[i] = strconv.Quote(f)
	}
	fmt.Printf("%d %s\n", seed, strings.Join(fields, " "))
}

// keep leaves the file where the parent says, for whoever looks for the cause.
func keep(s *specimen) {
	if dir := os.Getenv(childEnv + "_KEEP"); dir != "" {
		_ = os.WriteFile(filepath.Join(dir, fmt.Sprintf("damaged-%d.db", s.seed)), s.image, 0o600)
	}
}

// A tally is what became of many files.
type tally struct {
	sync.Mutex
	files    uint64
	outcomes map[string]map[string]int // by kind
	found    map[string]map[string]int // by kind: what was met after opening without a full check
	slowest  time.Duration
	slow     string
	memory   int64
	faults   []string
	enough   int // faults, after which no batch is begun
}

func newTally(enough int) *tally {
	return &tally{outcomes: map[string]map[string]int{}, found: map[string]map[string]int{}, enough: enough}
}

func count(in map[string]map[string]int, kind, what string) {
	if in[kind] == nil {
		in[kind] = map[string]int{}
	}
	in[kind][what]++
}

func (l *tally) fault(format string, args ...any) {
	l.Lock()
	defer l.Unlock()
	l.faults = append(l.faults, fmt.Sprintf(format, args...))
}

func (l *tally) ended() bool {
	l.Lock()
	defer l.Unlock()
	return len(l.faults) >= l.enough
}

// end takes in what a child says of a file.
func (l *tally) end(kind, what string, f []string) {
	l.Lock()
	defer l.Unlock()
	outcome, found, fault := f[0], f[3], f[4]
	l.files++
	count(l.outcomes, kind, outcome)
	if found != "" {
		for _, w := range strings.Split(found, ",") {
			count(l.found, kind, w)
		}
	}
	if took, _ := time.ParseDuration(f[1]); took > l.slowest {
		l.slowest, l.slow = took, what
	}
	if peak, _ := strconv.ParseInt(f[2], 10, 64); peak > l.memory {
		l.memory = peak
	}
	if fault != "" {
		l.faults = append(l.faults, what+": "+fault)
	}
}

// run judges the files from one seed until another with as many children as there are processors.
func run(t *testing.T, l *tally, product string, m mode, from, until uint64) {
	t.Helper()
	dir := stores(t)
	kept := t.ArtifactDir()
	next := make(chan [2]uint64)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for b := range next {
				for from := b[0]; from < b[1] && !l.ended(); {
					from = l.child(dir, kept, product, m, from, b[1])
				}
			}
		})
	}
	began, told := time.Now(), time.Now()
	for ; from < until && !l.ended(); from += batch {
		next <- [2]uint64{from, min(from+batch, until)}
		if time.Since(told) >= progress {
			told = time.Now()
			l.Lock()
			t.Logf("%d files, %.0f a second, %d faults", l.files, float64(l.files)/time.Since(began).Seconds(), len(l.faults))
			l.Unlock()
		}
	}
	close(next)
	workers.Wait()
	t.Logf("%d files in %v, %.0f a second", l.files, time.Since(began).Round(time.Millisecond), float64(l.files)/time.Since(began).Seconds())
}

// child judges files in a process of their own, and returns the seed with which to go on.
func (l *tally) child(dir, kept, product string, m mode, from, until uint64) (next uint64) {
	cmd := exec.Command(os.Args[0])
	order := fmt.Sprintf("%s=%s %s %s %d %d", childEnv, dir, product, m, from, until)
	cmd.Env = append(os.Environ(), order, childEnv+"_KEEP="+kept, "GOMAXPROCS=2")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.fault("%v", err)
		return until
	}
	if err := cmd.Start(); err != nil {
		l.fault("%v", err)
		return until
	}
	var kind, what string
	next = from
	begun := false
	watchdog := time.AfterFunc(silence, func() { _ = cmd.Process.Signal(syscall.SIGQUIT) })
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			break
		}
		watchdog.Reset(silence)
		seed, fields := parse(line)
		if fields[0] == "begin" {
			next, kind, what, begun = seed, fields[1], fields[2], true
			continue
		}
		l.end(kind, what, fields[1:])
		if next, begun = seed+1, false; l.ended() {
			_ = cmd.Process.Kill()
			watchdog.Stop()
			_ = cmd.Wait()
			return until
		}
	}
	hung := !watchdog.Stop()
	if err := cmd.Wait(); err == nil {
		return until
	} else if !begun {
		l.fault("a child that judges files from %d: %v\n%s", from, err, stderr.Bytes())
		return until
	} else {
		l.died(m, kind, what, hung, err, stderr.Bytes())
	}
	return next + 1
}

func (l *tally) died(m mode, kind, what string, hung bool, err error, stderr []byte) {
	l.Lock()
	defer l.Unlock()
	l.files++
	how := "killed the process"
	if hung {
		how = "hung"
	}
	count(l.outcomes, kind, how)
	recursion := bytes.Contains(stderr, []byte("goroutine stack exceeds")) || bytes.Count(stderr, []byte("bbolt.(*Cursor).")) > 20
	if m == limited && recursion {
		return
	}
	l.faults = append(l.faults, fmt.Sprintf("%s: %s: %v\n%s", what, how, err, stderr[:min(len(stderr), 3000)]))
}

func parse(line string) (seed uint64, fields []string) {
	number, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	seed, _ = strconv.ParseUint(number, 10, 64)
	for rest != "" {
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			break
		}
		field, _ := strconv.Unquote(quoted)
		fields = append(fields, field)
		rest = strings.TrimPrefix(rest[len(quoted):], " ")
	}
	return seed, append(fields, make([]string, max(0, 7-len(fields)))...)
}

// table writes what became of each kind.
func (l *tally) table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	for _, k := range kinds {
		fmt.Fprintf(w, "%s", k.name)
		for _, outcome := range slices.Sorted(maps.Keys(l.outcomes[k.name])) {
			fmt.Fprintf(w, "\t%s: %d", outcome, l.outcomes[k.name][outcome])
		}
		for _, what := range slices.Sorted(maps.Keys(l.found[k.name])) {
			fmt.Fprintf(w, "\t[then %s: %d]", what, l.found[k.name][what])
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	return b.String()
}

func TestADamagedFileIsRefusedByNameOrHoldsExactlyWhatWasCommitted(t *testing.T) {
	judgeMany(t, whole, *damaged)
}

// Of a file over VerifyLimit, Open does not look at what is finished. Damage there may be met later: then by name, and never as
// a wrong answer, or as a key that is not known. A leaf that has become a branch, or a branch of the program's own, may lead to itself
// and overflow bbolt's stack, which nobody can recover from; the table counts those.
func TestDamageAmongTheFinishedOfALargeFileIsMetByName(t *testing.T) {
	judgeMany(t, limited, *damagedLarge)
}

func judgeMany(t *testing.T, m mode, n uint64) {
	if n /= slowdown; n == 0 {
		n = 1
	}
	if testing.Short() {
		n /= 8
	}
	from, until := *damagedFrom, *damagedFrom+n
	if *damagedSeed >= 0 {
		from, until = uint64(*damagedSeed), uint64(*damagedSeed)+1
	}
	l := newTally(20)
	run(t, l, "keystate", m, from, until)
	for _, fault := range l.faults {
		t.Error(fault)
	}
	t.Logf("slowest open %v (%s); at most %d MiB in a process of %d files\n%s", l.slowest, l.slow, l.memory>>20, batch, l.table())
	if l.files != until-from && len(l.faults) == 0 {
		t.Errorf("%d files judged of %d", l.files, until-from)
	}
}

func TestAnOpenerThatIsWrongIsFoundOut(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(products)) {
		if name == "keystate" || name == "is-hungry" && memoryFactor > 1 {
			continue
		}
		t.Run(name, func(t *testing.T) {
			l := newTally(1)
			run(t, l, name, whole, 0, 10_000)
			if len(l.faults) == 0 {
				t.Fatalf("not found out by %d files", l.files)
			}
			t.Logf("found out by file %s", strings.SplitN(l.faults[0], "\n", 2)[0])
		})
	}
}
