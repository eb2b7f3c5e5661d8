package pgbench

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate/internal/pgtest"
)

// BenchmarkSideBySide makes the three-phase request with all contenders, in turns, at several numbers of callers, on one server, and prints
// the medians of the rates and of the ratios; what the server counted for a request; and round trips, counted
// by a proxy apart from the rest, which it would slow down.
//
//	go test -run '^$' -bench SideBySide -benchtime 1x -timeout 30m .
func BenchmarkSideBySide(b *testing.B) {
	server := startServer(b)
	turns, slice, callers := *flagTurns, *flagSlice, []int(flagCallers)
	if testing.Short() {
		turns, slice, callers = 1, 30*time.Millisecond, []int{1, 16}
	}
	var runners []*runner
	for _, c := range field() {
		runners = append(runners, &runner{contender: c, dsn: server.Database(b)})
	}
	for _, r := range runners {
		r.learnOpening(b)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s%d turns of %v for each, keys %s\n", describe(b, server.DSN("postgres")), turns, slice, *flagKeys)
	for _, n := range callers {
		for _, r := range runners {
			r.reset()
			r.choosePool(b, n, slice/2)
		}
		for turn := range turns {
			for i := range runners {
				runners[(turn+i)%len(runners)].takeTurn(b, n, slice)
			}
		}
		for _, r := range runners {
			r.countTrips(b, n)
		}
		fmt.Printf("# %d callers are done\n", n)
		fmt.Fprint(&text, table(n, runners))
		b.ReportMetric(ratioOf(runners[0], runners, byHand), fmt.Sprintf("x-by-hand-%d", n))
	}
	b.ReportMetric(0, "ns/op")
	fmt.Println(text.String()) // b.Log would cut it off after ten lines
}

// field is who takes part.
func field() []contender {
	if *flagOnly == "" {
		return contenders
	}
	return slices.DeleteFunc(slices.Clone(contenders), func(c contender) bool {
		return c.name != byHand && !slices.ContainsFunc(strings.Split(*flagOnly, "|"), func(text string) bool {
			return strings.Contains(c.name, text)
		})
	})
}

// A runner is a contender with its own database, and what was measured of it at one number of callers. It is open only during its turn,
// so that nobody's idle connections and pollers stand in another's way.
type runner struct {
	contender
	dsn     string
	opening pgtest.Figures // of a turn without requests

	connections int
	rates       []float64
	requests    int            // in turns, warm-up included
	counted     pgtest.Figures // in turns, without opening
	trips       float64        // for a request
	statements  float64
}

func (r *runner) reset() {
	r.connections, r.rates, r.requests, r.counted, r.trips, r.statements = 0, nil, 0, pgtest.Figures{}, 0, 0
}

// learnOpening makes the tables, and then counts what it takes to open and to close.
func (r *runner) learnOpening(b *testing.B) {
	b.Helper()
	r.open(b, r.dsn, 1+flagPools[0]).close()
	before := pgtest.TakeFigures(b, r.dsn)
	r.open(b, r.dsn, 1+flagPools[0]).close()
	r.opening = pgtest.TakeFigures(b, r.dsn).Since(before)
}

// choosePool tries pools of several sizes, twice and in turns, and keeps to the one with which the contender is fastest. More connections than the server has
// processors and disks to serve make all of them slower.
func (r *runner) choosePool(b *testing.B, callers int, d time.Duration) {
	b.Helper()
	var sizes []int
	for _, size := range flagPools {
		if len(sizes) == 0 || size <= 2*callers {
			sizes = append(sizes, size)
		}
	}
	r.connections = sizes[0]
	if len(sizes) == 1 || testing.Short() {
		return
	}
	rates := make([]float64, len(sizes))
	for range 2 {
		for i, size := range sizes {
			s := r.open(b, r.dsn, size)
			run(b, s, callers, d/4, keyKind())
			rates[i] += run(b, s, callers, d, keyKind()).rate()
			s.close()
		}
	}
	best := slices.Index(rates, slices.Max(rates))
	r.connections = sizes[best]
}

func (r *runner) takeTurn(b *testing.B, callers int, d time.Duration) {
	b.Helper()
	r.takeTurnWith(b, callers, d, keyKind())
}

func (r *runner) takeTurnWith(b *testing.B, callers int, d time.Duration, newID func() string) {
	b.Helper()
	before := pgtest.TakeFigures(b, r.dsn)
	s := r.open(b, r.dsn, r.connections)
	warm := run(b, s, callers, d/5, newID)
	measured := run(b, s, callers, d, newID)
	s.close()
	counted := pgtest.TakeFigures(b, r.dsn).Since(before).Since(r.opening)
	r.rates = append(r.rates, measured.rate())
	r.requests += warm.requests + measured.requests
	r.counted.WALFlushes += counted.WALFlushes
	r.counted.WALBytes += counted.WALBytes
	r.counted.Commits += counted.Commits
	r.counted.Rollbacks += counted.Rollbacks
}

// countTrips counts what goes over the connections, once statements are prepared on all of them.
func (r *runner) countTrips(b *testing.B, callers int) {
	b.Helper()
	requests, warm := 600, 20*r.connections+callers
	if testing.Short() {
		requests, warm = 10, 40
	}
	proxy := pgtest.NewProxy(b, r.dsn)
	s := r.open(b, proxy.DSN(), r.connections)
	defer s.close()
	runSome(b, s, callers, warm)
	before := proxy.Counts()
	n := runSome(b, s, callers, requests).requests
	counts := proxy.Counts().Since(before)
	r.trips, r.statements = float64(counts.RoundTrips)/float64(n), float64(counts.Statements)/float64(n)
}

// ratioOf is the median, over the turns, of one's rate divided by another's.
func ratioOf(one *runner, runners []*runner, other string) float64 {
	i := slices.IndexFunc(runners, func(r *runner) bool { return r.name == other })
	var ratios []float64
	for turn, rate := range one.rates {
		ratios = append(ratios, rate/runners[i].rates[turn])
	}
	return median(ratios)
}

// table shows them beside each other. Flushes are waits for the disk: several callers may share one.
func table(callers int, runners []*runner) string {
	var text strings.Builder
	fmt.Fprintf(&text, "\n| %d callers | requests/s | x by hand, READ COMMITTED | %s is x of it | round trips | statements | commits | rollbacks | WAL flushes | WAL bytes | connections |\n",
		callers, runners[0].name)
	text.WriteString("|---|" + strings.Repeat("---:|", 10) + "\n")
	for _, r := range runners {
		each := func(n int64) float64 { return float64(n) / float64(max(1, r.requests)) }
		fmt.Fprintf(&text, "| %s | %.0f (%.0f to %.0f) | %.2f | %.2f | %.1f | %.1f | %.2f | %.2f | %.2f | %.0f | %d |\n",
			r.name, median(r.rates), slices.Min(r.rates), slices.Max(r.rates), ratioOf(r, runners, byHand), ratioOf(runners[0], runners, r.name), r.trips, r.statements,
			each(r.counted.Commits), each(r.counted.Rollbacks), each(r.counted.WALFlushes), each(r.counted.WALBytes), r.connections)
	}
	return text.String()
}
