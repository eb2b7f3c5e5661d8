package httpbench

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate"
)

var callers = []int{1, 16, 64}

// slice is how long one contender is measured at a time.
func slice() time.Duration {
	if testing.Short() {
		return 20 * time.Millisecond
	}
	return 300 * time.Millisecond
}

// field is all that is measured side by side. The first of each group is what the others are held against.
func field(b *testing.B) (requests, replays []contender) {
	handle, middleware := serve(b, handler(b)), serve(b, protected(b))
	without, other := serve(b, http.HandlerFunc(plain)), serveFiber(b)
	return []contender{
			bare(b),
			fresh("keyhttp.Handle", handle, keyName),
			fresh("keyhttp.Middleware", middleware, keyName),
			fresh("fiber's idempotency, in memory", other, keyNameFiber),
			fresh("net/http, no keys", without, keyName),
		}, []contender{
			again(b, "net/http, no keys", without, keyName, false),
			again(b, "keyhttp.Handle", handle, keyName, true),
			again(b, "keyhttp.Middleware", middleware, keyName, true),
			again(b, "fiber's idempotency, in memory", other, keyNameFiber, false),
		}
}

// BenchmarkSideBySide measures all of them in turns, and prints the medians of the rates and of the ratios.
//
//	go test -run '^$' -bench SideBySide -benchtime 1x .
func BenchmarkSideBySide(b *testing.B) {
	requests, replays := field(b)
	var tables strings.Builder
	for _, group := range []struct {
		title string
		of    []contender
	}{{"first requests", requests}, {"replays", replays}} {
		measured := map[int][]result{}
		for _, n := range callers {
			measured[n] = inTurns(b, group.of, n, 5*b.N)
		}
		fmt.Fprintf(&tables, "\n| %s |", group.title)
		for _, n := range callers {
			fmt.Fprintf(&tables, " %s | of the first | CPU |", atOnce(n))
		}
		tables.WriteString("\n|---|" + strings.Repeat("---:|", 3*len(callers)) + "\n")
		for i, c := range group.of {
			fmt.Fprintf(&tables, "| %s |", c.name)
			for _, n := range callers {
				r := measured[n][i]
				fmt.Fprintf(&tables, " %.0f/s | %.0f %% | %.1f µs |", r.rate, 100*r.ratio, r.cost)
			}
			tables.WriteString("\n")
		}
	}
	b.ReportMetric(0, "ns/op")
	fmt.Println(tables.String()) // b.Log would cut it off after ten lines
}

func atOnce(callers int) string {
	if callers == 1 {
		return "1 caller"
	}
	return fmt.Sprint(callers, " callers")
}

// A result is the median of a contender's rates, of their ratios to the first contender's in the same turn, and of its costs in µs.
type result struct{ rate, ratio, cost float64 }

func inTurns(b *testing.B, field []contender, callers, turns int) []result {
	rates, ratios, costs := make([][]float64, len(field)), make([][]float64, len(field)), make([][]float64, len(field))
	for turn := range turns + 1 {
		first := 0.0
		for i, c := range field {
			p := c.pace(b, callers, slice())
			if i == 0 {
				first = p.rate
			}
			if turn == 0 { // warms up
				continue
			}
			rates[i], ratios[i] = append(rates[i], p.rate), append(ratios[i], p.rate/first)
			costs[i] = append(costs[i], float64(p.cost.Nanoseconds())/1000)
		}
	}
	results := make([]result, len(field))
	for i := range field {
		results[i] = result{median(rates[i]), median(ratios[i]), median(costs[i])}
	}
	return results
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// BenchmarkEach measures one after the other, for profiles: -bench 'Each/replays/keyhttp.Handle/64'.
func BenchmarkEach(b *testing.B) {
	requests, replays := field(b)
	for title, group := range map[string][]contender{"requests": requests, "replays": replays} {
		for _, c := range group {
			for _, n := range callers {
				b.Run(fmt.Sprintf("%s/%s/%d", title, strings.ReplaceAll(c.name, "/", " "), n), func(b *testing.B) {
					var rates, costs []float64
					for b.Loop() {
						p := c.pace(b, n, slice())
						rates, costs = append(rates, p.rate), append(costs, float64(p.cost.Nanoseconds()))
					}
					b.ReportMetric(0, "ns/op")
					b.ReportMetric(median(rates), "req/s")
					b.ReportMetric(median(costs), "cpu-ns/req")
				})
			}
		}
	}
}

// BenchmarkReplayInProcess measures a replay without the network and without net/http's server, and what it allocates.
//
//	go test -run '^$' -bench ReplayInProcess -benchtime 2s .
func BenchmarkReplayInProcess(b *testing.B) {
	for _, c := range []struct {
		name string
		h    http.Handler
	}{{"net/http", http.HandlerFunc(plain)}, {"Handle", handler(b)}, {"Middleware", protected(b)}} {
		b.Run(strings.ReplaceAll(c.name, "/", " "), func(b *testing.B) {
			r, w := newRequest(b), &sink{header: http.Header{}}
			c.h.ServeHTTP(w, r.rewound())
			b.ReportAllocs()
			for b.Loop() {
				w.reset()
				c.h.ServeHTTP(w, r.rewound())
			}
			if w.status != http.StatusCreated || w.bytes < 200 {
				b.Errorf("answered %d with %d bytes", w.status, w.bytes)
			}
		})
	}
}

// repeated is a request that is sent again and again, without anything allocated for it.
type repeated struct {
	*http.Request
	body strings.Reader
}

func newRequest(b *testing.B) *repeated {
	r, err := http.NewRequest(http.MethodPost, "/orders", nil)
	if err != nil {
		b.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer ada")
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set(keyName, keystate.NewID())
	r.ContentLength = int64(len(body))
	return &repeated{Request: r}
}

func (r *repeated) rewound() *http.Request {
	r.body.Reset(body)
	r.Body = r
	return r.Request
}

func (r *repeated) Read(p []byte) (int, error) { return r.body.Read(p) }
func (r *repeated) Close() error               { return nil }

// A sink is a ResponseWriter that counts.
type sink struct {
	header        http.Header
	status, bytes int
}

func (w *sink) reset() {
	clear(w.header)
	w.status, w.bytes = 0, 0
}

func (w *sink) Header() http.Header    { return w.header }
func (w *sink) WriteHeader(status int) { w.status = status }
func (w *sink) Write(b []byte) (int, error) {
	w.bytes += len(b)
	return len(b), nil
}
