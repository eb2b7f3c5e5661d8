package main

import (
	"cmp"
	"math"
	"math/bits"
	"slices"
	"time"
)

// A histogram counts durations in buckets each of which is at most 1/32 wider than its lower bound.
type histogram struct {
	counts [64 * subBuckets]uint64
	n      uint64
}

const subBuckets = 32

func bucketOf(d time.Duration) int {
	v := uint64(max(d, 0))
	if v < subBuckets {
		return int(v)
	}
	shift := bits.Len64(v) - bits.Len64(subBuckets)
	return (shift+1)*subBuckets + int(v>>shift) - subBuckets
}

// upper is the largest duration that falls into a bucket.
func upper(bucket int) time.Duration {
	if bucket < subBuckets {
		return time.Duration(bucket)
	}
	shift := bucket/subBuckets - 1
	return time.Duration((uint64(bucket%subBuckets+subBuckets+1) << shift) - 1)
}

func (h *histogram) add(d time.Duration) {
	h.counts[bucketOf(d)]++
	h.n++
}

func (h *histogram) merge(other *histogram) {
	for i, n := range other.counts {
		h.counts[i] += n
	}
	h.n += other.n
}

// quantile is a duration that the given share of all do not exceed, 0 of none.
func (h *histogram) quantile(share float64) time.Duration {
	rank := max(1, uint64(math.Ceil(share*float64(h.n))))
	var seen uint64
	for i, n := range h.counts {
		if seen += n; seen >= rank {
			return upper(i)
		}
	}
	return 0
}

// A spread is what several turns gave.
type spread []float64

func (s spread) sorted() []float64 { return slices.SortedFunc(slices.Values(s), cmp.Compare[float64]) }

// median is the middle, of an even number the mean of the two in the middle; of none, it is not a number.
func (s spread) median() float64 {
	sorted := s.sorted()
	n := len(sorted)
	if n == 0 {
		return math.NaN()
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func (s spread) min() float64 { return bound(s, slices.Min[[]float64]) }
func (s spread) max() float64 { return bound(s, slices.Max[[]float64]) }

func bound(s spread, of func([]float64) float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	return of(s)
}

// over are the ratios of two contenders' turns: what one turn's noise did to both cancels out.
func (s spread) over(other spread) spread {
	ratios := make(spread, 0, len(s))
	for i := range min(len(s), len(other)) {
		if other[i] != 0 {
			ratios = append(ratios, s[i]/other[i])
		}
	}
	return ratios
}
