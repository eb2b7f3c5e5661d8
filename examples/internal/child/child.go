// Package child runs the processes that a program is made of, and leaves none of them behind.
package child

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// A Process writes lines, and ends when its standard input does or when it is told to.
type Process struct {
	*os.Process
	Lines <-chan string // of its standard output; a last one that was cut off was never said

	cmd   *exec.Cmd
	leash io.Closer
}

// Again starts this program once more, with other arguments.
func Again(ctx context.Context, args ...string) (*Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return Start(exec.CommandContext(ctx, self, args...))
}

// Start starts a program. Its standard error is this one's unless the command says otherwise.
func Start(cmd *exec.Cmd) (*Process, error) {
	if cmd.Stderr == nil {
		cmd.Stderr = os.Stderr
	}
	leash, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for b := bufio.NewReader(out); ; {
			text, err := b.ReadString('\n')
			if err != nil {
				return
			}
			lines <- strings.TrimSpace(text)
		}
	}()
	return &Process{Process: cmd.Process, Lines: lines, cmd: cmd, leash: leash}, nil
}

// LetGo closes the process's standard input.
func (p *Process) LetGo() error { return p.leash.Close() }

// Wait lets a process end, and waits for it. The error names the program and its first argument; in the others may be a password.
func (p *Process) Wait() error {
	p.leash.Close()
	for range p.Lines {
	}
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(p.cmd.Args[:min(2, len(p.cmd.Args))], " "), err)
	}
	return nil
}
