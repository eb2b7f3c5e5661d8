package plot

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// drawn is what a chart's SVG says: its texts, and how many elements of each name it has.
type drawn struct {
	texts    []string
	elements map[string]int
	lines    []string // points of polylines
}

func parse(t *testing.T, c Chart) drawn {
	t.Helper()
	var b strings.Builder
	if _, err := c.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	d := drawn{elements: map[string]int{}}
	inText := false
	for dec := xml.NewDecoder(strings.NewReader(b.String())); ; {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return d
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
		switch token := token.(type) {
		case xml.StartElement:
			d.elements[token.Name.Local]++
			inText = token.Name.Local == "text"
			for _, a := range token.Attr {
				if token.Name.Local == "polyline" && a.Name.Local == "points" {
					d.lines = append(d.lines, a.Value)
				}
				if strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf") {
					t.Errorf("%s=%q", a.Name.Local, a.Value)
				}
			}
		case xml.EndElement:
			inText = false
		case xml.CharData:
			if inText {
				d.texts = append(d.texts, string(token))
			}
		}
	}
}

func sample() Chart {
	return Chart{
		Title: "Requests & answers <fast>",
		X:     Axis{Label: "callers at once", Log: true, Ticks: []Tick{{1, "1"}, {16, "16"}, {256, "256"}}},
		Y:     Axis{Label: "requests per second", Log: true},
		Lines: []Line{
			{Label: "ours", Style: Strong, Points: []Point{{X: 1, Y: 900}, {X: 16, Y: 8000, Low: 7000, High: 9500}, {X: 256, Y: 42_000}}},
			{Label: "theirs", Style: 0, Points: []Point{{X: 1, Y: 300}, {X: 16, Y: 310}, {X: 256, Y: 320}}},
			{Label: "failed", Style: 1, Points: []Point{{X: 1, Y: math.NaN()}}},
		},
	}
}

func TestAChartHasItsTitleAxesTicksAndLabels(t *testing.T) {
	d := parse(t, sample())
	for _, want := range []string{"Requests & answers <fast>", "callers at once", "requests per second", "1", "16", "256", "ours", "theirs",
		"500", "1,000", "2,000", "5,000", "10,000", "20,000", "50,000"} {
		if !slices.Contains(d.texts, want) {
			t.Errorf("%q is not there: %q", want, d.texts)
		}
	}
	if slices.Contains(d.texts, "failed") || d.elements["polyline"] != 2 {
		t.Errorf("a line without points was drawn: %q, %d lines", d.texts, d.elements["polyline"])
	}
}

func TestALogAxisGivesEqualFactorsEqualLengths(t *testing.T) {
	d := parse(t, sample())
	var xs []float64
	for point := range strings.SplitSeq(d.lines[0], " ") {
		text, _, _ := strings.Cut(point, ",")
		x, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Fatal(err)
		}
		xs = append(xs, x)
	}
	if math.Abs((xs[1]-xs[0])-(xs[2]-xs[1])) > 0.1 {
		t.Errorf("1, 16 and 256 are at %g", xs)
	}
}

func TestAnEmptyChartIsStillAChart(t *testing.T) {
	if d := parse(t, Chart{Title: "nothing", X: Axis{Log: true}, Y: Axis{}}); !slices.Contains(d.texts, "nothing") {
		t.Errorf("%q", d.texts)
	}
}

func TestTicksAreRound(t *testing.T) {
	for _, test := range []struct {
		axis     Axis
		min, max float64
		want     string
	}{
		{Axis{Log: true}, 1, 100, "1 2 5 10 20 50 100"},
		{Axis{Log: true}, 0.1, 1_000_000, "0.1 1 10 100 1,000 10,000 100,000 1,000,000"},
		{Axis{}, 0, 60, "0 10 20 30 40 50 60"},
		{Axis{}, 0, 1.05, "0 0.2 0.4 0.6 0.8 1"},
	} {
		var got []string
		for _, tick := range test.axis.ticks(test.min, test.max) {
			got = append(got, tick.Text)
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%g to %g: %q, not %q", test.min, test.max, got, test.want)
		}
	}
}

func TestLabelsMakeRoomAndStayInside(t *testing.T) {
	for _, wanted := range [][]float64{{100, 100, 100}, {20, 25, 90, 91, 92}, {10, 400}, {395, 396, 399}, {}} {
		got := spreadOut(wanted, 16, 10, 400)
		for i, y := range got {
			if y < 10-1e-9 || y > 400+1e-9 {
				t.Errorf("%g: one is at %g", wanted, y)
			}
			if i > 0 && y-got[i-1] < 16-1e-9 {
				t.Errorf("%g: two are %g apart", wanted, y-got[i-1])
			}
		}
	}
	if got := spreadOut([]float64{50, 200}, 16, 10, 400); !slices.Equal(got, []float64{50, 200}) {
		t.Errorf("moved without need: %g", got)
	}
}

func TestLooksDifferWithoutColour(t *testing.T) {
	seen := map[string]bool{}
	for i, l := range looks {
		if seen[l.dash] || l.dash == "" || l.dash == limit.dash {
			t.Errorf("look %d has the dashes of another", i)
		}
		seen[l.dash] = true
		if c := contrast(l.light, "#ffffff"); c < 3.5 {
			t.Errorf("look %d is hard to see on white: %.1f", i, c)
		}
		if c := contrast(l.dark, "#0d1117"); c < 4.5 {
			t.Errorf("look %d is hard to see on black: %.1f", i, c)
		}
	}
}

// contrast is that of WCAG 2.
func contrast(a, b string) float64 {
	x, y := luminance(a), luminance(b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}

func luminance(colour string) float64 {
	n, _ := strconv.ParseUint(colour[1:], 16, 32)
	part := func(shift uint) float64 {
		v := float64(n>>shift&0xff) / 255
		if v <= 0.04045 {
			return v / 12.92
		}
		return math.Pow((v+0.055)/1.055, 2.4)
	}
	return 0.2126*part(16) + 0.7152*part(8) + 0.0722*part(0)
}
