package show

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"example.com/keystate/examples/internal/child"
	"example.com/keystate/examples/internal/processor"
)

// play runs the processes: the processor from beginning to end, and beside it the workers.
func (s *show) play(ctx context.Context) error {
	faults := s.Faults
	faults.Seed = s.Seed
	p, err := child.Again(ctx, append([]string{"processor"}, faults.Args(s.ledgerPath())...)...)
	if err != nil {
		return err
	}
	s.address = <-p.Lines
	working, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for range p.Lines {
		}
		cancel(errors.New("the processor ended early"))
	}()
	err = s.workers(working)
	if err == nil {
		s.Calls, err = (&processor.Client{URL: s.address}).Stats(ctx)
	}
	ended := p.Wait()
	if ctx.Err() != nil { // then it was killed, like all of them
		return err
	}
	return errors.Join(err, ended)
}

// workers runs so many workers at a time, at desks that are numbered.
func (s *show) workers(ctx context.Context) error {
	s.bar.start(s.Requests, s.Kills)
	defer s.bar.end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var desks sync.WaitGroup
	for desk := range s.Workers {
		desks.Go(func() {
			if err := s.serve(ctx, desk); err != nil {
				cancel(err)
			}
		})
	}
	desks.Wait()
	return context.Cause(ctx)
}

// serve has one worker after another work at a desk: each is ended, but for the last.
func (s *show) serve(ctx context.Context, desk int) error {
	for {
		l := s.begin(desk)
		spared := len(l.blows) == 0
		if err := s.live(ctx, l); err != nil || spared {
			return err
		}
	}
}

// A life is one worker's.
type life struct {
	desk    int
	blows   []blow         // that are to come; who is spared has none
	dealt   int            // how many lines it is asked
	enough  int            // when so many lines have been answered, it may be ended
	answers map[int]answer // that it gave
	done    bool           // it has nothing left to do
	lit     <-chan time.Time
}

// A blow is what is done to a worker.
type blow int

const (
	kill    blow = iota // with SIGKILL
	dismiss             // as an operator would: it ends, and says goodbye
	suspend             // for longer than its lease: others take over what it holds, and it does not know
	wake
)

// Of the moments at which a worker is ended.
const (
	earlyShare   = 8                     // one in so many is ended while it starts
	earlyFuse    = 40 * time.Millisecond // at the latest then, from its start
	fuse         = 20 * time.Millisecond // at the latest, from when it has got as far as it was to get
	dismissEvery = 4                     // where there are several workers, one is dismissed after so many kills
	suspendEvery = 3                     // one in so many of these was suspended before
	awake        = 10 * fuse             // at the latest it is ended then, from when it goes on
)

// begin draws a life for a desk. The ends are spread over the file: a worker that is doomed is ended a random moment after a random
// number of lines have been answered that nobody had answered before, or after it has got to the end of its own.
func (s *show) begin(desk int) *life {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &life{desk: desk, answers: map[int]answer{}}
	ends := s.Kills
	if s.stage.several() {
		ends += s.Kills / dismissEvery
	}
	l.dealt = len(deal(s.lines, desk, s.Workers))
	if s.doomed == ends {
		l.dealt = len(s.lines)
		s.last = append(s.last, l)
		return l
	}
	l.blows = s.blows(s.doomed + 1)
	share := (s.Requests - len(s.seen)) * s.Workers / (ends - s.doomed + 1)
	s.doomed++
	l.enough = len(s.seen) + s.rng.IntN(2*share+1)
	if s.rng.IntN(earlyShare) == 0 {
		l.light(s.draw(earlyFuse))
	}
	return l
}

// blows are what is done to the n-th worker that is ended.
func (s *show) blows(n int) []blow {
	goodbye := n / (dismissEvery + 1)
	switch {
	case !s.stage.several() || n%(dismissEvery+1) > 0:
		return []blow{kill}
	case goodbye%suspendEvery > 0:
		return []blow{dismiss}
	}
	return []blow{suspend, wake, dismiss}
}

func (s *show) draw(longest time.Duration) time.Duration {
	return time.Duration(s.rng.Int64N(int64(longest)))
}

func (l *life) light(after time.Duration) {
	if len(l.blows) > 0 && l.lit == nil {
		l.lit = time.After(after)
	}
}

// live is a life from its beginning to its end.
func (s *show) live(ctx context.Context, l *life) error {
	w, err := child.Again(ctx, s.arguments(l)...)
	if err != nil {
		return err
	}
	doomed := len(l.blows) > 0
	var struck []blow
	for lines := w.Lines; lines != nil; {
		select {
		case text, ok := <-lines:
			if !ok {
				lines = nil
				break
			}
			err = errors.Join(err, s.hear(l, text))
			if l.done && !doomed {
				w.LetGo()
			}
		case <-l.lit:
			struck = append(struck, l.blows[0])
			err = errors.Join(err, s.strike(l, w))
		}
	}
	fault := w.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case slices.Contains(struck, kill):
		fault = nil
	case doomed && len(l.blows) > 0 || !doomed && !l.done:
		fault = errors.Join(errors.New("the worker ended early"), fault)
	}
	s.count(struck)
	return errors.Join(err, fault)
}

// strike strikes the next blow, and sees to the one after it.
func (s *show) strike(l *life, w *child.Process) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	struck := l.blows[0]
	l.blows, l.lit = l.blows[1:], nil
	switch struck {
	case kill:
		err = w.Kill()
	case dismiss:
		err = w.LetGo()
	case suspend:
		err = w.Suspend()
		l.light(s.stage.stall())
	case wake:
		err = w.Wake()
		l.light(s.draw(awake))
	}
	return err
}

func (s *show) arguments(l *life) []string {
	args := []string{"worker", "-store", s.Store, "-file", s.spool, "-processor", s.address, "-concurrency", fmt.Sprint(s.Concurrency)}
	if len(l.blows) == 0 { // all lines are its own
		return args
	}
	return append(args, "-desk", fmt.Sprint(l.desk), "-desks", fmt.Sprint(s.Workers))
}

// hear takes in what a worker reports.
func (s *show) hear(l *life, text string) error {
	var r report
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range r.Interrupted {
		s.resumed[key] = true
	}
	if r.Claimed != "" {
		s.claimed(l, r.Claimed)
	}
	err := s.take(l, r.Answer)
	l.done = l.done || r.Done
	if (r.Ready || r.Answer != nil) && len(s.seen) >= l.enough || len(l.answers) == l.dealt || r.Done {
		l.light(s.draw(fuse))
	}
	return err
}

// claimed notes who has claimed a key. If it was another one before, the key was taken over.
func (s *show) claimed(l *life, key string) {
	if first := s.claims[key]; first == nil {
		s.claims[key] = l
	} else if first != l {
		s.resumed[key] = true
	}
}

// take takes in an answer. Whoever gave one before, it must be the same.
func (s *show) take(l *life, a *answer) error {
	if a == nil {
		return nil
	}
	s.seen[a.Line] = true
	l.answers[a.Line] = *a
	s.bar.draw(len(s.seen), s.Killed)
	if !a.definite() {
		return nil
	}
	if first, ok := s.given[a.request]; ok {
		if first.Line = a.Line; first != *a {
			s.lost[a.Line] = fmt.Sprintf("was first %v, and then %v", first, *a)
		}
		return nil
	}
	s.given[a.request] = *a
	return json.NewEncoder(s.history).Encode(a)
}

// count counts what was done to a worker.
func (s *show) count(struck []blow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range struck {
		switch b {
		case kill:
			s.Killed++
		case dismiss:
			s.Dismissed++
		case suspend:
			s.Suspended++
		}
	}
}
