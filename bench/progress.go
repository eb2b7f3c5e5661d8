package main

import (
	"fmt"
	"os"
	"time"
)

// A step is a part of the work, with what it is thought to take.
type step struct {
	name string
	cost time.Duration
	do   func()
}

// progress does the steps, and tells on standard error which one and how much time is left.
type progress struct {
	steps []step
	total time.Duration // thought
	now   func() time.Time
	tell  func(text string)
}

func newProgress(steps []step) *progress {
	p := &progress{steps: steps, now: time.Now, tell: func(text string) { fmt.Fprintln(os.Stderr, text) }}
	for _, s := range steps {
		p.total += s.cost
	}
	return p
}

func (p *progress) run() {
	start := p.now()
	var done time.Duration
	for i, s := range p.steps {
		took := p.now().Sub(start)
		p.tell(fmt.Sprintf("%4d/%d  %s gone, %s left  %s", i+1, len(p.steps), clock(took), clock(left(p.total, done, took)), s.name))
		s.do()
		done += s.cost
	}
	p.tell(fmt.Sprintf("done in %s", clock(p.now().Sub(start))))
}

// left corrects what the rest was thought to take by what the beginning took.
func left(total, done, took time.Duration) time.Duration {
	rest := total - done
	if done < total/50 || done == 0 { // too early to tell
		return rest
	}
	return time.Duration(float64(rest) * float64(took) / float64(done))
}

func clock(d time.Duration) string {
	d = d.Round(time.Second)
	return fmt.Sprintf("%d:%02d:%02d", int(d.Hours()), int(d.Minutes())%60, int(d.Seconds())%60)
}
