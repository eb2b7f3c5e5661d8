//go:build unix

package child

import "syscall"

// Suspend stops a process where it is, until [Process.Wake]. It does not know.
func (p *Process) Suspend() error { return p.Signal(syscall.SIGSTOP) }

// Wake lets a process go on.
func (p *Process) Wake() error { return p.Signal(syscall.SIGCONT) }
