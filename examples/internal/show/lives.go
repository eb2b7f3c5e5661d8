package show

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
		if err := s.live(ctx, l); err != nil || l.fate == spared {
			return err
		}
		s.count(l.fate)
	}
}

// A life is one worker's.
type life struct {
	desk    int
	fate    fate
	dealt   int            // how many lines it is asked
	enough  int            // when so many lines have been answered, it may be ended
	answers map[int]answer // that it gave
	done    bool           // it has nothing left to do
	lit     <-chan time.Time
}

// A fate is how a life ends.
type fate int

const (
	spared    fate = iota // when there is nothing left to do
	killed                // with SIGKILL
	dismissed             // as an operator would: it says goodbye
)

// Of the moments at which a worker is ended.
const (
	earlyShare   = 8                     // one in so many is ended while it starts
	earlyFuse    = 40 * time.Millisecond // at the latest then, from its start
	fuse         = 20 * time.Millisecond // at the latest, from when it has got as far as it was to get
	dismissEvery = 4                     // where there are several workers, one is dismissed after so many kills
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
	switch {
	case s.doomed == ends:
		l.dealt = len(s.lines)
		s.last = append(s.last, l)
		return l
	case s.stage.several() && (s.doomed+1)%(dismissEvery+1) == 0:
		l.fate = dismissed
	default:
		l.fate = killed
	}
	share := (s.Requests - len(s.seen)) * s.Workers / (ends - s.doomed + 1)
	s.doomed++
	l.enough = len(s.seen) + s.rng.IntN(2*share+1)
	if s.rng.IntN(earlyShare) == 0 {
		l.light(s.draw(earlyFuse))
	}
	return l
}

func (s *show) draw(longest time.Duration) time.Duration {
	return time.Duration(s.rng.Int64N(int64(longest)))
}

func (l *life) light(after time.Duration) {
	if l.fate != spared && l.lit == nil {
		l.lit = time.After(after)
	}
}

// live is a life from its beginning to its end.
func (s *show) live(ctx context.Context, l *life) error {
	w, err := child.Again(ctx, s.arguments(l)...)
	if err != nil {
		return err
	}
	ended := false
	for lines := w.Lines; lines != nil; {
		select {
		case text, ok := <-lines:
			if !ok {
				lines = nil
				break
			}
			err = errors.Join(err, s.hear(l, text))
			if l.done && l.fate == spared {
				w.LetGo()
			}
		case <-l.lit:
			ended = true
			if l.fate == killed {
				err = errors.Join(err, w.Kill())
			} else {
				w.LetGo()
			}
		}
	}
	fault := w.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case ended && l.fate == killed:
		return err
	case !ended && (l.fate != spared || !l.done):
		fault = errors.Join(errors.New("the worker ended early"), fault)
	}
	return errors.Join(err, fault)
}

func (s *show) arguments(l *life) []string {
	args := []string{"worker", "-store", s.Store, "-file", s.spool, "-processor", s.address, "-concurrency", fmt.Sprint(s.Concurrency)}
	if l.fate == spared { // all lines are its own
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

// count counts a life that was ended.
func (s *show) count(f fate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f == killed {
		s.Killed++
	} else {
		s.Dismissed++
	}
}
