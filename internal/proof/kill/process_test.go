//go:build unix

package kill

import (
	"bufio"
	"bytes"
	"context"
	"encoding/gob"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"sync"
	"time"
)

// A process is one child, from its start to its death.
type process struct {
	w      *world
	cmd    *exec.Cmd
	out    *line
	stderr bytes.Buffer
	hello  chan struct{} // closed when it is about to open the store
	ready  chan struct{} // closed when it serves
	closed chan struct{} // closed when it says that the store is closed
	gone   chan struct{} // closed when it is dead, and all that it said has been judged
	counts chan counts
	killed sync.Once

	mu      sync.Mutex
	pending map[int]*pending
}

// A pending request waits for its answer.
type pending struct {
	book   *book
	knew   int
	answer chan answer
}

func startProcess(w *world, path string, b bug) (*process, error) {
	p := &process{
		w: w, cmd: exec.Command(os.Args[0]), pending: map[int]*pending{}, counts: make(chan counts, 1),
		hello: make(chan struct{}), ready: make(chan struct{}), closed: make(chan struct{}), gone: make(chan struct{}),
	}
	p.cmd.Env = append(os.Environ(), pathVariable+"="+path, bugVariable+"="+string(b))
	p.cmd.Stderr = &p.stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = newLine(in)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.hear(gob.NewDecoder(bufio.NewReaderSize(out, 1<<16)))
	return p, nil
}

// hear judges what the child says, in the order in which it says it, until there is no more: what it had
// said when it was killed counts.
func (p *process) hear(in *gob.Decoder) {
	for {
		var r report
		if err := in.Decode(&r); err != nil {
			break
		}
		p.judge(&r)
	}
	if err := p.cmd.Wait(); err != nil && p.cmd.ProcessState.ExitCode() >= 0 { // not by a signal
		p.w.blame(fmt.Errorf("the child ended by itself: %w: %.2000s", err, p.stderr.Bytes()))
	}
	close(p.gone)
}

func (p *process) judge(r *report) {
	switch {
	case r.Hello:
		close(p.hello)
	case r.Ready != nil:
		if took := time.Duration(r.Ready.Microseconds) * time.Microsecond; took > openWithin {
			p.w.blame(fmt.Errorf("the store took %v to open", took))
		}
		close(p.ready)
	case r.Answer != nil:
		p.mu.Lock()
		q := p.pending[r.Answer.Number]
		p.mu.Unlock()
		if q == nil {
			p.w.blame(fmt.Errorf("an answer to nobody: %+v", *r.Answer))
			return
		}
		if r.Answer.Text != "" {
			p.w.acknowledge(q.book, r.Answer.Text, q.knew)
		}
		select {
		case q.answer <- *r.Answer:
		default: // a child that answers twice; the second one was judged
		}
	case r.Call != nil:
		reply, after := p.w.carryOut(*r.Call)
		time.AfterFunc(after, func() { p.out.send(command{Reply: &reply}) })
	case r.Owed != nil:
		p.w.keep(*r.Owed)
	case r.Counts != nil:
		p.counts <- *r.Counts
	case r.Closed:
		close(p.closed)
	case r.Broken != "":
		p.w.blame(fmt.Errorf("a child says: %s", r.Broken))
	}
}

// request sends a client's request.
func (p *process) request(b *book) *pending {
	p.w.mu.Lock()
	q := &pending{book: b, knew: b.answered(), answer: make(chan answer, 1)}
	p.w.mu.Unlock()
	number := rand.Int()
	p.mu.Lock()
	p.pending[number] = q
	p.mu.Unlock()
	p.out.send(command{Request: &request{Number: number, Transfer: b.transfer}})
	return q
}

// await waits for one of the child's milestones, and no longer than it lives.
func (p *process) await(milestone <-chan struct{}) {
	select {
	case <-milestone:
	case <-p.gone:
	case <-p.w.broken:
	case <-time.After(hang):
		p.w.blame(fmt.Errorf("the child hangs: %.2000s", p.stderr.Bytes()))
	}
}

// kill ends the child with SIGKILL, and waits until all that it said has been judged. The command of -after-kill is run
// before the child is quite dead: its thread that waits for a sync lives until the sync is done, and the power is to fail
// during syncs, too. From the signal on, it can say no more.
func (p *process) kill() {
	p.killed.Do(func() {
		_ = p.cmd.Process.Kill() // it may have ended by itself
		if err := runAfterKill(); err != nil {
			p.w.blame(err)
		}
	})
	<-p.gone
}

func runAfterKill() error {
	if *afterKill == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	c := exec.CommandContext(ctx, "sh", "-c", *afterKill)
	c.WaitDelay = time.Second
	if said, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %.2000s", *afterKill, err, said)
	}
	return nil
}

var peak = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// weigh makes sure that the child's memory has stayed within bounds, where the system tells.
func (p *process) weigh() {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return
	}
	found := peak.FindSubmatch(status)
	if found == nil {
		return
	}
	kilobytes, _ := strconv.ParseInt(string(found[1]), 10, 64)
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	p.w.seen["memory looked at"]++
	p.w.heaviest = max(p.w.heaviest, kilobytes<<10)
	if kilobytes<<10 > memoryLimit {
		p.w.wrong("the child has used %d MiB", kilobytes>>10)
	}
}

// A moment is when a child is killed.
type moment int

const (
	starting moment = iota // at any time since its start
	atOpen                 // while it makes or opens the file
	recovering
	working
	closing
)

// moments are drawn from, with the longer lives rarer.
var moments = []moment{starting, atOpen, atOpen, recovering, recovering, working, working, working, closing, closing}

// live lets the child live until its moment has come, and kills it.
func (p *process) live(m moment) {
	upTo := func(d time.Duration) { time.Sleep(rand.N(d)) }
	switch m {
	case starting:
		upTo(10 * time.Millisecond)
	case atOpen:
		p.await(p.hello)
		longest := 3 * time.Millisecond
		if *folder != "" { // nobody knows how fast that disk is
			longest <<= rand.IntN(6)
		}
		upTo(longest)
	case recovering:
		p.await(p.ready)
		upTo(5 * time.Millisecond)
	case working:
		p.await(p.ready)
		upTo(140 * time.Millisecond)
	case closing:
		p.await(p.ready)
		upTo(60 * time.Millisecond)
		p.out.send(command{Close: true})
		upTo(5 * time.Millisecond)
	}
	p.weigh()
	p.kill()
	p.w.sight(p.died(m))
}

// died tells in which part of its life the child was killed.
func (p *process) died(m moment) string {
	past := func(milestone <-chan struct{}) bool {
		select {
		case <-milestone:
			return true
		default:
			return false
		}
	}
	switch {
	case !past(p.hello):
		return "killed before it came to the file"
	case !past(p.ready):
		return "killed while opening the file"
	case past(p.closed):
		return "closed before it was killed"
	case m == closing:
		return "killed while closing"
	}
	return "killed at work"
}

// A street is where clients find the child of the moment.
type street struct {
	mu      sync.Mutex
	open    *process
	changed chan struct{}
}

func (s *street) put(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = p
	close(s.changed)
	s.changed = make(chan struct{})
}

// next returns a child other than the last, or nil when a promise was broken.
func (s *street) next(w *world, last *process) *process {
	for {
		s.mu.Lock()
		p, changed := s.open, s.changed
		s.mu.Unlock()
		if p != last {
			return p
		}
		select {
		case <-changed:
		case <-w.broken:
			return nil
		}
	}
}

// ask is a client that wants an answer, whatever becomes of the children that it asks.
func (s *street) ask(w *world, b *book) {
	p := s.next(w, nil)
	for p != nil {
		q := p.request(b)
		select {
		case a := <-q.answer:
			if a.Text != "" {
				return
			}
			if !a.Closed {
				continue
			}
			p.await(p.gone)
		case <-p.gone:
		case <-w.broken:
			return
		}
		p = s.next(w, p)
	}
}

// crowd lets clients ask for new transfers and old ones until enough is closed, and waits until each has its answer.
func (s *street) crowd(w *world, clients int, enough <-chan struct{}) (done <-chan struct{}) {
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			for {
				select {
				case <-enough:
					return
				case <-w.broken:
					return
				default:
				}
				b := w.oldBook()
				if b == nil || rand.IntN(3) > 0 {
					b = w.newBook()
				}
				s.ask(w, b)
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		all.Wait()
		close(ended)
	}()
	return ended
}
