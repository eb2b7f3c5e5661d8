package main

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate/bench/plot"
)

func TestBucketsAreNarrowAndLeaveNoGap(t *testing.T) {
	last := time.Duration(-1)
	for bucket := range 59 * subBuckets {
		top := upper(bucket)
		if top <= last {
			t.Fatalf("bucket %d ends at %d, the one before at %d", bucket, top, last)
		}
		if bucketOf(last+1) != bucket || bucketOf(top) != bucket {
			t.Fatalf("bucket %d is from %d to %d, but they fall into %d and %d", bucket, last+1, top, bucketOf(last+1), bucketOf(top))
		}
		if width := float64(top-last-1) / math.Max(1, float64(last+1)); width > 1.0/subBuckets {
			t.Fatalf("bucket %d is %.3f wide", bucket, width)
		}
		last = top
	}
}

func TestQuantilesAreThoseOfAllValues(t *testing.T) {
	var one, two histogram
	var all []time.Duration
	for i := range 10_000 {
		d := time.Duration(math.Exp(rand.Float64()*12) * 1000)
		all = append(all, d)
		if i%3 == 0 {
			one.add(d)
		} else {
			two.add(d)
		}
	}
	one.merge(&two)
	slices.Sort(all)
	for _, share := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
		want := all[max(1, int(math.Ceil(share*float64(len(all)))))-1]
		if got := one.quantile(share); got < want || float64(got) > float64(want)*(1+1.0/subBuckets) {
			t.Errorf("%g: %v, not %v", share, got, want)
		}
	}
	if got := new(histogram).quantile(0.5); got != 0 {
		t.Errorf("of none: %v", got)
	}
}

func TestMedianAndRatiosOfTurns(t *testing.T) {
	if got := (spread{3, 1, 2}).median(); got != 2 {
		t.Errorf("of three: %g", got)
	}
	if got := (spread{4, 1, 2, 3}).median(); got != 2.5 {
		t.Errorf("of four: %g", got)
	}
	if got := (spread{}).median(); !math.IsNaN(got) {
		t.Errorf("of none: %g", got)
	}
	if got := (spread{10, 40, 5}).over(spread{5, 10}); !slices.Equal(got, spread{2, 4}) {
		t.Errorf("ratios: %g", got)
	}
}

func TestTheTimeLeftIsCorrectedByTheTimeTaken(t *testing.T) {
	const minute = time.Minute
	for _, test := range []struct{ total, done, took, want time.Duration }{
		{10 * minute, 0, 0, 10 * minute},
		{10 * minute, 5 * minute, 5 * minute, 5 * minute},
		{10 * minute, 5 * minute, 10 * minute, 10 * minute},
		{10 * minute, time.Second, 2 * minute, 10*minute - time.Second}, // too early
		{10 * minute, 10 * minute, 30 * minute, 0},
	} {
		if got := left(test.total, test.done, test.took); got != test.want {
			t.Errorf("%v of %v in %v: %v, not %v", test.done, test.total, test.took, got, test.want)
		}
	}
}

func TestProgressDoesEveryStepOnce(t *testing.T) {
	var done, told []string
	var at time.Time
	one := func(name string) step {
		return step{name, time.Second, func() { done = append(done, name); at = at.Add(2 * time.Second) }}
	}
	p := newProgress([]step{one("a"), one("b"), one("c")})
	p.now, p.tell = func() time.Time { return at }, func(text string) { told = append(told, text) }
	p.run()
	if !slices.Equal(done, []string{"a", "b", "c"}) {
		t.Errorf("%q", done)
	}
	if want := "   2/3  0:00:02 gone, 0:00:04 left  b"; told[1] != want {
		t.Errorf("%q, not %q", told[1], want)
	}
}

func TestDisturbanceIsWhatOthersHad(t *testing.T) {
	u := usage{busy: 3 * time.Second, self: time.Second, servers: time.Second, stolen: time.Second}
	took := 10 * time.Second
	if got, want := u.disturbance(took)*float64(numCPU), 0.2; math.Abs(got-want) > 1e-9 {
		t.Errorf("%g, not %g", got, want)
	}
}

func TestNumbersHaveThreeDigitsThatCount(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 0.0341: "0.034", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 1234567: "1,234,567", math.NaN(): ""} {
		if got := number(v); got != want {
			t.Errorf("%g: %q, not %q", v, got, want)
		}
	}
}

func TestEveryContenderHasALookOfItsOwnInItsPlot(t *testing.T) {
	seen := map[string]string{}
	for _, c := range contenders {
		if c.limit {
			continue
		}
		where := "embedded"
		if c.on == onPostgres {
			where = "PostgreSQL"
		}
		style := styleOf(c)
		key := where + plot.Number(float64(style))
		if other, taken := seen[key]; taken {
			t.Errorf("%s and %s look alike", c.name, other)
		}
		seen[key] = c.name
	}
}

func TestContendersAreChosenByPartsOfTheirNames(t *testing.T) {
	var names []string
	for _, c := range field("dbos|raw", contenders) {
		names = append(names, c.name)
	}
	if got := strings.Join(names, "; "); got != "DBOS on SQLite; DBOS on PostgreSQL; limit: raw bbolt" {
		t.Error(got)
	}
}
