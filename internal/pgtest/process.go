package pgtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// A process is a program that was started and has, once done is closed, ended with err.
type process struct {
	pid  int
	done chan struct{}
	err  error
}

// launch starts a program from a thread that lives as long as the program: Linux signals the death of a parent when
// the thread that started the child ends.
func launch(cmd *exec.Cmd) (*process, error) {
	p := &process{done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
		}
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("pgtest: start %s: %w", cmd.Path, err)
	}
	return p, nil
}

func (p *process) signal(sig syscall.Signal) error {
	select {
	case <-p.done:
		return os.ErrProcessDone // its number may be another's by now
	default:
		return signalProcess(p.pid, sig)
	}
}

// stop asks for an end, ever more firmly, until it comes.
func (p *process) stop(signals ...syscall.Signal) error {
	for _, sig := range signals {
		if err := p.signal(sig); errors.Is(err, os.ErrProcessDone) {
			return nil
		} else if err != nil {
			return fmt.Errorf("pgtest: signal %v to process %d: %w", sig, p.pid, err)
		}
		select {
		case <-p.done:
			return nil
		case <-time.After(patience):
		}
	}
	return fmt.Errorf("pgtest: process %d does not end", p.pid)
}
