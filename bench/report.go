package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"example.com/keystate/bench/plot"
)

// report writes results.md and the plots.
func (b *bench) report() error {
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	r := &text{b: b}
	r.head()
	r.beside()
	r.stored()
	r.replay()
	r.recovery()
	r.reaping()
	r.noise()
	r.how()
	path := filepath.Join(b.out, "results.md")
	err := errors.Join(r.failed, os.WriteFile(path, []byte(r.String()), 0o644))
	if err == nil {
		fmt.Fprintln(os.Stderr, "written:", path)
	}
	return err
}

// text is the report while it is written.
type text struct {
	strings.Builder
	b      *bench
	failed error
}

func (t *text) f(format string, args ...any) { fmt.Fprintf(t, format+"\n", args...) }

func (t *text) table(first string, columns ...string) {
	t.f("\n| %s | %s |\n|---|%s", first, strings.Join(columns, " | "), strings.Repeat("---:|", len(columns)))
}

func (t *text) row(first string, columns ...string) {
	t.f("| %s | %s |", first, strings.Join(columns, " | "))
}

// figure draws a plot beside the report, and shows it there.
func (t *text) figure(name string, c plot.Chart) {
	f, err := os.Create(filepath.Join(t.b.out, name))
	if err != nil {
		t.failed = errors.Join(t.failed, err)
		return
	}
	_, err = c.WriteTo(f)
	t.failed = errors.Join(t.failed, err, f.Close())
	t.f("\n![%s](%s)", c.Title, name)
}

func (t *text) head() {
	b := t.b
	t.f("# Results\n\nWritten by `bench/`; what it means is in [bench.md](../bench.md).\n")
	if b.short {
		t.f("**This was a short run, which shows that the program works. Its figures mean nothing.**\n")
	}
	t.f("- %s, with `go run -C bench . %s`, in %s", b.began.UTC().Format("2006-01-02 15:04 UTC"), strings.Join(os.Args[1:], " "),
		time.Since(b.began).Round(time.Second))
	t.f("- %s; load average before: %s", describeMachine(b.dir), b.load)
	t.f("- %s; %s", runtime.Version(), versions())
	if b.server != nil {
		if said, err := b.server.describe(); err == nil {
			t.f("- %s", said)
		}
	}
	if b.noServer != "" {
		t.f("- Nothing of PostgreSQL: %s", b.noServer)
	}
	if b.failed != nil {
		t.f("\n**Something failed:**\n\n```\n%v\n```", b.failed)
	}
	t.f("\nThe request: a local write of 200 bytes; an effect that does nothing, durable before and after; a local write and an answer of 300 bytes. Every commit waits for the disk.")
}

// versions are those of what is measured.
func versions() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "modules unknown"
	}
	var found []string
	for _, path := range []string{"go.etcd.io/bbolt", sqliteModule, pureModule, pgxModule, dbosModule, goWorkflowsModule} {
		for _, m := range info.Deps {
			if m.Path == path {
				found = append(found, strings.TrimPrefix(path, "github.com/")+" "+m.Version)
			}
		}
	}
	return strings.Join(slices.Compact(found), ", ")
}

func (t *text) beside() {
	if len(t.b.side) == 0 {
		return
	}
	t.f("\n## Beside each other\n")
	t.f("%d turns of %v for each, in turns; medians, and the least and the most of the turns. × is the median of the turns' ratios.", t.b.turns, t.b.slice)
	if !t.b.short || len(t.b.side) > 1 {
		t.figure("embedded.svg", t.b.overCallers("Requests a second, embedded stores", embedded))
		t.figure("postgres.svg", t.b.overCallers("Requests a second, PostgreSQL", onServer))
	}
	for _, s := range t.b.side {
		t.side(s)
	}
	at := t.b.side[len(t.b.side)/2]
	t.figure("latency-embedded.svg", latencies(at, "embedded stores", embedded))
	t.figure("latency-postgres.svg", latencies(at, "PostgreSQL", onServer))
}

func embedded(x *cell) bool { return x.on != onPostgres }
func onServer(x *cell) bool { return x.on == onPostgres }

func (t *text) side(s side) {
	t.table(fmt.Sprintf("%d callers", s.callers), "requests/s", "× "+byUpdate, "keystate on the same store is × it", "p50 ms", "p99 ms", "commits", "flushes", "KB on disk", "allocations", "CPU µs", "others' CPU")
	update := find(s.cells, byUpdate)
	for _, x := range s.cells {
		if x.failed != nil {
			t.row(x.name, "failed")
			continue
		}
		own := find(s.cells, keystateOnBolt)
		if x.on == onPostgres {
			own = find(s.cells, keystateOnPostgres)
		}
		p50, p99 := number(x.p50.median()*1e3), number(x.p99.median()*1e3)
		if x.limit {
			p50, p99 = "", ""
		}
		t.row(x.name, x.rateText(), ratio(x, update), ratio(own, x), p50, p99, number(x.commits.median()), number(x.flushes.median()),
			number(x.device.median()/1e3), number(x.allocations.median()), number(x.cpu.median()*1e6), percent(x.disturbs.median()))
	}
	if slices.ContainsFunc(s.cells, onServer) {
		t.table(fmt.Sprintf("%d callers, PostgreSQL", s.callers), "connections", "round trips", "statements", "WAL flushes", "WAL bytes")
		for _, x := range s.cells {
			if onServer(x) && x.failed == nil {
				t.row(x.name, fmt.Sprint(x.place.connections), number(x.trips), number(x.statements), number(x.walFlushes.median()), number(x.walBytes.median()))
			}
		}
	}
	if engine := find(s.cells, keystateOnBolt); engine != nil && engine.failed == nil {
		share := ""
		if limit := find(s.cells, rawBolt); limit != nil {
			share = fmt.Sprintf("; %s of raw bbolt in such groups", percent(engine.rate.over(limit.rate).median()))
		}
		t.f("\nkeystate on bbolt has %d commits in a transaction%s; p99 is %s × p50.", engine.group, share, number(engine.p99.over(engine.p50).median()))
	}
}

func (x *cell) rateText() string {
	return fmt.Sprintf("%s (%s–%s)", number(x.rate.median()), number(x.rate.min()), number(x.rate.max()))
}

func find(cells []*cell, name string) *cell {
	i := slices.IndexFunc(cells, func(x *cell) bool { return x.name == name })
	if i < 0 {
		return nil
	}
	return cells[i]
}

func ratio(one, other *cell) string {
	if one == nil || other == nil {
		return ""
	}
	return number(one.rate.over(other.rate).median())
}

// number writes three digits that count, and nothing for what is not known.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return ""
	case a >= 100:
		return plot.Number(math.Round(v))
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1 || a == 0:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.2g", v)
	}
}

func percent(share float64) string {
	if math.IsNaN(share) {
		return ""
	}
	return fmt.Sprintf("%.0f %%", 100*share)
}

// styleOf gives contenders the same look in all plots.
func styleOf(c contender) plot.Style {
	switch {
	case c.limit:
		return plot.Limit
	case c.name == keystateOnBolt || c.name == keystateOnPostgres:
		return plot.Strong
	}
	n := 0
	for _, other := range contenders {
		if other.name == c.name {
			break
		}
		if (other.on == onPostgres) == (c.on == onPostgres) && styleOf(other) >= 0 {
			n++
		}
	}
	return plot.Style(n)
}

// overCallers is the plot of rates over callers.
func (b *bench) overCallers(title string, which func(*cell) bool) plot.Chart {
	c := plot.Chart{Title: title, Note: "Three-phase request, every commit on disk; median of the turns, with the least and the most",
		X: plot.Axis{Label: "callers at once", Log: true},
		Y: plot.Axis{Label: "requests per second", Log: true}}
	lines := map[string]*plot.Line{}
	var order []string
	for _, s := range b.side {
		c.X.Ticks = append(c.X.Ticks, plot.Tick{At: float64(s.callers), Text: fmt.Sprint(s.callers)})
		for _, x := range s.cells {
			if !which(x) || len(x.rate) == 0 {
				continue
			}
			if lines[x.name] == nil {
				lines[x.name] = &plot.Line{Label: x.label, Style: styleOf(x.contender)}
				order = append(order, x.name)
			}
			lines[x.name].Points = append(lines[x.name].Points,
				plot.Point{X: float64(s.callers), Y: x.rate.median(), Low: x.rate.min(), High: x.rate.max()})
		}
	}
	for _, name := range order {
		c.Lines = append(c.Lines, *lines[name])
	}
	return strongestLast(c)
}

// strongestLast has what the chart is about drawn over the rest.
func strongestLast(c plot.Chart) plot.Chart {
	slices.SortStableFunc(c.Lines, func(a, b plot.Line) int {
		return cmp.Compare(boolInt(a.Style == plot.Strong), boolInt(b.Style == plot.Strong))
	})
	return c
}

func boolInt(v bool) int {
	if v {
		return 1
	}
	return 0
}

// latencies is the plot of how long requests took: over the share that took no longer, which is stretched towards its end.
func latencies(s side, title string, which func(*cell) bool) plot.Chart {
	c := plot.Chart{Title: fmt.Sprintf("How long a request takes, %d callers, %s", s.callers, title), Note: "All turns together; the axis is stretched towards the slowest",
		X: plot.Axis{Label: "share of the requests that took no longer", Log: true},
		Y: plot.Axis{Label: "latency in milliseconds", Log: true}}
	shares := []float64{0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999}
	stretched := func(share float64) float64 { return 1 / (1 - share) }
	for _, share := range []float64{0.1, 0.5, 0.9, 0.99, 0.999} {
		c.X.Ticks = append(c.X.Ticks, plot.Tick{At: stretched(share), Text: fmt.Sprintf("%g %%", share*100)})
	}
	for _, x := range s.cells {
		if !which(x) || x.limit || x.latency.n == 0 {
			continue
		}
		line := plot.Line{Label: x.label, Style: styleOf(x.contender)}
		for _, share := range shares {
			if float64(x.latency.n)*(1-share) >= 5 { // of fewer, the next run will say something else
				line.Points = append(line.Points, plot.Point{X: stretched(share), Y: x.latency.quantile(share).Seconds() * 1e3})
			}
		}
		c.Lines = append(c.Lines, line)
	}
	return strongestLast(c)
}

// noise tells in which turns the machine was not quiet.
func (t *text) noise() {
	t.f("\n## Was the machine quiet?\n")
	var all spread
	var loud []string
	look := func(what string, x *cell) {
		if x == nil {
			return
		}
		for turn, share := range x.disturbs {
			all = append(all, share)
			if share > tooMuch {
				loud = append(loud, fmt.Sprintf("%s, turn %d: %s", what, turn+1, percent(share)))
			}
		}
	}
	for _, s := range t.b.side {
		for _, x := range s.cells {
			look(fmt.Sprintf("%d callers, %s", s.callers, x.name), x)
		}
	}
	for _, f := range t.b.full {
		look(fmt.Sprintf("%s beside %d %s keys", f.full.name, f.stored, f.kind.name), f.empty)
		look(fmt.Sprintf("%s with %d %s keys", f.full.name, f.stored, f.kind.name), f.full)
	}
	for _, x := range append([]*cell{t.b.bare}, t.b.replays...) {
		if x != nil {
			look("replay, "+x.name, x)
		}
	}
	if len(all) == 0 || all.max() == 0 {
		t.f("That could not be found out here.")
		return
	}
	t.f("Of the processors' time, neither this program nor PostgreSQL had, the hypervisor's share included, and with the kernel's own work for them: %s in the median turn, %s at most.",
		percent(all.median()), percent(all.max()))
	if len(loud) == 0 {
		return
	}
	t.f("\n**In %d of %d turns that was more than %s: believe ratios, and those of them with care.**\n", len(loud), len(all), percent(tooMuch))
	slices.Sort(loud)
	for _, line := range loud[:min(10, len(loud))] {
		t.f("- %s", line)
	}
	if len(loud) > 10 {
		t.f("- and %d more", len(loud)-10)
	}
	fmt.Fprintf(os.Stderr, "WARNING: the machine was not quiet in %d of %d turns\n", len(loud), len(all))
}

// how says how things were counted.
func (t *text) how() {
	t.f(`
## How it was counted

- **commits**: transactions for a request. bbolt: its own number of the last one; SQLite by hand: counted where they are made; PostgreSQL: its own count, with those that only read.
- **flushes**: of the disk's cache, as the kernel counts them for the whole disk, so that contenders cannot differ in what is counted. bbolt flushes twice for a transaction, SQLite and PostgreSQL once; a file that grows, checkpoints and the
  file system's own journal add to that. Empty where the kernel does not tell.
- **KB on disk**: written to the disk, as the kernel counts them for the whole disk.
- **WAL flushes, WAL bytes**: PostgreSQL's own count, over a turn with opening and warm-up.
- **allocations**: of this process, those of the caller included. **CPU**: user and system time of this process and of PostgreSQL's.
- **p50, p99**: of a turn's requests, in buckets 3 %% wide; the median of the turns.
- Each contender is open during its turn only, is warmed up for a fifth of it, has at each number of callers a store that was empty at the first turn, and is asked afterwards for some of the answers again and for its business rows, all of which are counted at the end.`)
}
