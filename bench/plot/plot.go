// Package plot draws lines over two axes as an SVG. What a line is stands at its end; lines differ in luminance, dashes and marks,
// so that they can be told apart without colours; a dark page gets dark colours.
package plot

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// A Chart is lines over two axes.
type Chart struct {
	Title string
	Note  string // under the title
	X, Y  Axis
	Lines []Line
}

// An Axis has a label with a unit, and ticks.
type Axis struct {
	Label string
	Log   bool
	Ticks []Tick // empty: they are chosen
}

// A Tick is a place on an axis, and what is written there.
type Tick struct {
	At   float64
	Text string
}

// A Line is a series of points with what stands at its end.
type Line struct {
	Label  string
	Style  Style
	Points []Point // ascending in X
}

// A Point has a Y, and what it lay between in several measurements, if Low and High are not 0.
type Point struct{ X, Y, Low, High float64 }

// A Style is one of several that differ in luminance, dashes and mark; or what stands behind them all.
type Style int

// Strong is for what the chart is about, Limit for what none can pass; others are 0 and up.
const (
	Strong Style = -1
	Limit  Style = -2
)

type look struct {
	light, dark string // colours
	dash        string
	width       float64
	mark        mark
}

type mark int

const (
	disc mark = iota
	square
	triangle
	ring
	diamond
	openSquare
	cross
)

var (
	strong = look{"#0b3d91", "#7fb2ff", "", 3, disc}
	limit  = look{"#808080", "#8b949e", "1 4", 1.6, cross}
	looks  = []look{
		{"#c4501b", "#f0a070", "8 3", 1.6, square},
		{"#1b8a5a", "#7fdcb0", "5 3", 1.6, triangle},
		{"#7a2f8f", "#d7a0e8", "10 3 2 3", 1.6, ring},
		{"#a87400", "#f2d060", "3 2", 1.6, diamond},
		{"#3a3a3a", "#d0d0d0", "12 4", 1.6, openSquare},
		{"#b03060", "#f090b0", "6 2 1 2 1 2", 1.6, triangle},
		{"#2f8fb0", "#90d8f0", "2 2", 1.6, square},
	}
)

func (s Style) look() look {
	switch s {
	case Strong:
		return strong
	case Limit:
		return limit
	}
	return looks[int(s)%len(looks)]
}

const (
	width, height = 840.0, 480.0
	left, right   = 78.0, 232.0
	top, bottom   = 64.0, 58.0
	fontSize      = 13.0
	lineHeight    = 16.0
)

// scale maps an axis to a range of pixels.
type scale struct {
	log      bool
	min, max float64
	from, to float64
}

func (s scale) at(v float64) float64 {
	min, max := s.min, s.max
	if s.log {
		v, min, max = math.Log10(v), math.Log10(min), math.Log10(max)
	}
	return s.from + (v-min)/(max-min)*(s.to-s.from)
}

// usable says whether a value can be shown.
func (a Axis) usable(v float64) bool {
	return !math.IsNaN(v) && !math.IsInf(v, 0) && (!a.Log || v > 0)
}

// span is what an axis must show: its values, up to the next round number on each side where ticks are chosen.
func (a Axis) span(values []float64) (min, max float64) {
	for _, t := range a.Ticks {
		values = append(values, t.At)
	}
	if len(values) == 0 {
		return 1, 10
	}
	min, max = slices.Min(values), slices.Max(values)
	if a.Log {
		if len(a.Ticks) == 0 {
			min, max = roundDown(min), roundUp(max)
		}
		if min == max {
			min, max = min/2, max*2
		}
		return min, max
	}
	if len(a.Ticks) == 0 {
		min = math.Min(0, min)
		max *= 1.05
	}
	if min == max {
		max = min + 1
	}
	return min, max
}

// roundUp is the next of 1, 2, 5, 10 … times a power of ten.
func roundUp(v float64) float64 {
	decade := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{1, 2, 5, 10} {
		if m*decade >= v*(1-1e-9) {
			return m * decade
		}
	}
	return 10 * decade
}

func roundDown(v float64) float64 {
	decade := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{5, 2, 1} {
		if m*decade <= v*(1+1e-9) {
			return m * decade
		}
	}
	return decade
}

// ticks are the axis's own, or round numbers: on a log axis 1, 2 and 5 times powers of ten, or the powers alone where they are many.
func (a Axis) ticks(min, max float64) []Tick {
	if len(a.Ticks) > 0 {
		return a.Ticks
	}
	if !a.Log {
		return linearTicks(min, max)
	}
	multiples := []float64{1, 2, 5}
	if max/min > 2000 {
		multiples = []float64{1}
	}
	var ticks []Tick
	for decade := math.Pow(10, math.Floor(math.Log10(min)+1e-9)); decade <= max*(1+1e-9); decade *= 10 {
		for _, m := range multiples {
			if v := m * decade; v >= min*(1-1e-9) && v <= max*(1+1e-9) {
				ticks = append(ticks, Tick{v, Number(v)})
			}
		}
	}
	return ticks
}

func linearTicks(min, max float64) (ticks []Tick) {
	step := roundUp((max - min) / 6)
	for v := math.Ceil(min/step) * step; v <= max*(1+1e-9); v += step {
		ticks = append(ticks, Tick{v, Number(v)})
	}
	return ticks
}

// Number writes a number with separators between thousands, and no more digits than it takes.
func Number(v float64) string {
	if math.Abs(v) < 1000 {
		return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.3f", v), "0"), ".")
	}
	digits := fmt.Sprintf("%.0f", v)
	for i := len(digits) - 3; i > 0 && digits[i-1] != '-'; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// WriteTo writes the chart as an SVG.
func (c Chart) WriteTo(w io.Writer) (int64, error) {
	d := drawing{chart: c}
	d.draw()
	n, err := io.WriteString(w, d.text.String())
	return int64(n), err
}

type drawing struct {
	chart Chart
	text  strings.Builder
	x, y  scale
}

func (d *drawing) f(format string, args ...any) { fmt.Fprintf(&d.text, format+"\n", args...) }

func escape(text string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(text))
	return b.String()
}

func (d *drawing) draw() {
	c := &d.chart
	var xs, ys []float64
	for i := range c.Lines {
		l := &c.Lines[i]
		l.Points = slices.DeleteFunc(slices.Clone(l.Points), func(p Point) bool { return !c.X.usable(p.X) || !c.Y.usable(p.Y) })
		for _, p := range l.Points {
			xs, ys = append(xs, p.X), append(ys, p.Y)
			if p.Low != 0 || p.High != 0 {
				ys = append(ys, p.Low, p.High)
			}
		}
	}
	ys = slices.DeleteFunc(ys, func(v float64) bool { return !c.Y.usable(v) })
	xmin, xmax := c.X.span(xs)
	ymin, ymax := c.Y.span(ys)
	d.x = scale{c.X.Log, xmin, xmax, left, width - right}
	d.y = scale{c.Y.Log, ymin, ymax, height - bottom, top}

	d.f(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" width="%g" height="%g" role="img" aria-label="%s">`,
		width, height, width, height, escape(c.Title))
	d.style()
	d.f(`<rect class="page" width="%g" height="%g"/>`, width, height)
	d.f(`<text class="title" x="%g" y="26">%s</text>`, left, escape(c.Title))
	d.f(`<text class="note" x="%g" y="44">%s</text>`, left, escape(c.Note))
	d.axes()
	for i, l := range c.Lines {
		d.line(i, l)
	}
	d.labels()
	d.f(`</svg>`)
}

func (d *drawing) style() {
	d.f(`<style>`)
	d.f(`text { font: %gpx system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1f2328 }`, fontSize)
	d.f(`.page { fill: #ffffff } .title { font-size: 16px; font-weight: 600 } .note, .tick { fill: #59636e } .tick { font-size: 12px } .note { font-size: 12px }`)
	d.f(`.grid { stroke: #d8dee4; stroke-width: 1 } .axis { stroke: #59636e; stroke-width: 1 } .lead { stroke-width: 0.8; fill: none; opacity: 0.6 }`)
	d.f(`.range { stroke-width: 1; opacity: 0.55 } .hollow { fill: #ffffff }`)
	var dark strings.Builder
	for i, l := range d.chart.Lines {
		look := l.Style.look()
		d.f(`.s%d { stroke: %s } .f%d { fill: %s }`, i, look.light, i, look.light)
		fmt.Fprintf(&dark, ` .s%d { stroke: %s } .f%d { fill: %s }`, i, look.dark, i, look.dark)
	}
	d.f(`@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .page, .hollow { fill: #0d1117 } .note, .tick { fill: #9198a1 } .grid { stroke: #2b3139 } .axis { stroke: #9198a1 }%s }`, dark.String())
	d.f(`</style>`)
}

func (d *drawing) axes() {
	for _, t := range d.chart.Y.ticks(d.y.min, d.y.max) {
		y := d.y.at(t.At)
		d.f(`<line class="grid" x1="%g" x2="%.6g" y1="%.6g" y2="%.6g"/>`, left, width-right, y, y)
		d.f(`<text class="tick" text-anchor="end" x="%g" y="%.6g">%s</text>`, left-8, y+4, escape(t.Text))
	}
	base := height - bottom
	for _, t := range d.chart.X.ticks(d.x.min, d.x.max) {
		x := d.x.at(t.At)
		d.f(`<line class="axis" x1="%.6g" x2="%.6g" y1="%g" y2="%g"/>`, x, x, base, base+5)
		d.f(`<text class="tick" text-anchor="middle" x="%.6g" y="%g">%s</text>`, x, base+20, escape(t.Text))
	}
	d.f(`<line class="axis" x1="%g" x2="%g" y1="%g" y2="%g"/>`, left, width-right, base, base)
	d.f(`<text text-anchor="middle" x="%g" y="%g">%s</text>`, (left+width-right)/2, height-16, escape(d.chart.X.Label))
	middle := (top + base) / 2
	d.f(`<text text-anchor="middle" transform="translate(20 %g) rotate(-90)">%s</text>`, middle, escape(d.chart.Y.Label))
}

func (d *drawing) line(i int, l Line) {
	look := l.Style.look()
	var points []string
	for _, p := range l.Points {
		x, y := d.x.at(p.X), d.y.at(p.Y)
		points = append(points, fmt.Sprintf("%.6g,%.6g", x, y))
		if d.chart.Y.usable(p.Low) && d.chart.Y.usable(p.High) && p.High > p.Low {
			d.f(`<line class="range s%d" x1="%.6g" x2="%.6g" y1="%.6g" y2="%.6g"/>`, i, x, x, d.y.at(p.Low), d.y.at(p.High))
		}
	}
	if len(points) == 0 {
		return
	}
	d.f(`<polyline class="s%d" fill="none" stroke-width="%g" stroke-dasharray="%s" stroke-linejoin="round" points="%s"/>`,
		i, look.width, cmp.Or(look.dash, "none"), strings.Join(points, " "))
	for _, p := range l.Points {
		d.mark(i, look, d.x.at(p.X), d.y.at(p.Y))
	}
}

func (d *drawing) mark(i int, l look, x, y float64) {
	switch l.mark {
	case disc:
		d.f(`<circle class="f%d" cx="%.6g" cy="%.6g" r="4.5"/>`, i, x, y)
	case ring:
		d.f(`<circle class="hollow s%d" cx="%.6g" cy="%.6g" r="3.8" stroke-width="1.6"/>`, i, x, y)
	case square:
		d.f(`<rect class="f%d" x="%.6g" y="%.6g" width="7.6" height="7.6"/>`, i, x-3.8, y-3.8)
	case openSquare:
		d.f(`<rect class="hollow s%d" x="%.6g" y="%.6g" width="7" height="7" stroke-width="1.6"/>`, i, x-3.5, y-3.5)
	case triangle:
		d.f(`<path class="f%d" d="M%.6g %.6g l4.8 8.2 h-9.6 z"/>`, i, x, y-5)
	case diamond:
		d.f(`<path class="f%d" d="M%.6g %.6g l5 5 l-5 5 l-5 -5 z"/>`, i, x, y-5)
	case cross:
		d.f(`<path class="s%d" fill="none" stroke-width="1.6" d="M%.6g %.6g l7 7 m0 -7 l-7 7"/>`, i, x-3.5, y-3.5)
	}
}

// labels writes what each line is beside its end; where ends are close, labels make room for each other.
func (d *drawing) labels() {
	type label struct {
		line   int
		at     float64 // where the line ends
		y      float64
		x      float64
		strong bool
	}
	var all []label
	for i, l := range d.chart.Lines {
		if len(l.Points) > 0 {
			end := l.Points[len(l.Points)-1]
			y := d.y.at(end.Y)
			all = append(all, label{line: i, at: y, y: y, x: d.x.at(end.X), strong: l.Style == Strong})
		}
	}
	slices.SortStableFunc(all, func(a, b label) int { return cmp.Compare(a.at, b.at) })
	wanted := make([]float64, len(all))
	for i, l := range all {
		wanted[i] = l.at
	}
	for i, y := range spreadOut(wanted, lineHeight, top-6, height-bottom+6) {
		all[i].y = y
	}
	x := width - right + 34
	for _, l := range all {
		weight := ""
		if l.strong {
			weight = ` font-weight="600"`
		}
		d.f(`<path class="lead s%d" d="M%.6g %.6g L%.6g %.6g L%.6g %.6g"/>`, l.line, l.x+7, l.at, width-right+12, l.at, x-4, l.y)
		d.f(`<text class="f%d"%s x="%g" y="%.6g">%s</text>`, l.line, weight, x, l.y+4.5, escape(d.chart.Lines[l.line].Label))
	}
}

// spreadOut moves ascending places apart until each is at least gap from the next, each as little as that allows, within bounds.
func spreadOut(wanted []float64, gap, min, max float64) []float64 {
	type block struct {
		from, to int
		at       float64 // of its first
	}
	var blocks []block
	for i, y := range wanted {
		b := block{i, i + 1, y}
		for {
			mean := 0.0
			for j := b.from; j < b.to; j++ {
				mean += wanted[j] - float64(j-b.from)*gap
			}
			b.at = mean / float64(b.to-b.from)
			b.at = math.Max(min, math.Min(b.at, max-float64(b.to-b.from-1)*gap))
			if len(blocks) == 0 {
				break
			}
			last := blocks[len(blocks)-1]
			if last.at+float64(last.to-last.from)*gap <= b.at {
				break
			}
			b.from = last.from
			blocks = blocks[:len(blocks)-1]
		}
		blocks = append(blocks, b)
	}
	placed := make([]float64, 0, len(wanted))
	for _, b := range blocks {
		for j := range b.to - b.from {
			placed = append(placed, b.at+float64(j)*gap)
		}
	}
	return placed
}
