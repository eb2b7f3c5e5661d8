package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// A pace is how a station did for a while.
type pace struct {
	requests int
	took     time.Duration
	latency  histogram
	last     []string // IDs of some requests that were answered last
}

func (p pace) rate() float64 { return float64(p.requests) / p.took.Seconds() }

// race lets so many callers make requests, each with the next of the IDs, until there are no more.
func race(s station, callers int, next func() (id string, more bool)) (pace, error) {
	p := pace{}
	var failed error
	var mu sync.Mutex
	var stop atomic.Bool
	var wg sync.WaitGroup
	start := time.Now()
	for range callers {
		wg.Go(func() {
			mine := pace{}
			var last string
			for id, more := next(); more && !stop.Load(); id, more = next() {
				before := time.Now()
				if _, err := s.request(context.Background(), id); err != nil {
					stop.Store(true)
					mu.Lock()
					failed = fmt.Errorf("request %s: %w", id, err)
					mu.Unlock()
					return
				}
				mine.latency.add(time.Since(before))
				mine.requests++
				last = id
			}
			mu.Lock()
			defer mu.Unlock()
			p.requests += mine.requests
			p.latency.merge(&mine.latency)
			if last != "" {
				p.last = append(p.last, last)
			}
		})
	}
	wg.Wait()
	p.took = time.Since(start)
	return p, failed
}

// during gives new IDs for a while.
func during(d time.Duration, newID func() string) func() (string, bool) {
	start := time.Now()
	return func() (string, bool) { return newID(), time.Since(start) < d }
}

// each gives the IDs of a list once.
func each(ids []string) func() (string, bool) {
	var n atomic.Int64
	return func() (string, bool) {
		i := int(n.Add(1)) - 1
		if i >= len(ids) {
			return "", false
		}
		return ids[i], true
	}
}

// again gives IDs of a list over and over for a while.
func again(d time.Duration, ids []string) func() (string, bool) {
	start := time.Now()
	var n atomic.Int64
	return func() (string, bool) { return ids[int(n.Add(1)*7919)%len(ids)], time.Since(start) < d }
}
