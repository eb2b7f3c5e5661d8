//go:build !unix

package pgtest

import (
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
)

const (
	fast      = syscall.SIGINT
	immediate = syscall.SIGQUIT
)

var errElsewhere = fmt.Errorf("%w; on %s, pgtest starts none", errNoPrograms, runtime.GOOS)

// An account is a user of the machine.
type account struct{ name string }

// A guard guards nothing where there is no server.
type guard struct{}

// A listed process is one that the system knows of.
type listed struct {
	pid, parent int
	state       byte
}

func serverAccount() (*account, error)        { return nil, errElsewhere }
func (a *account) own(string) error           { return nil }
func (a *account) reaches(string) bool        { return true }
func runAs(*exec.Cmd, *account)               {}
func signalProcess(int, syscall.Signal) error { return errElsewhere }
func processes() (map[int]listed, error)      { return nil, errElsewhere }
func (p *process) killAll() error             { return errElsewhere }
func (p *process) freezeAll() error           { return errElsewhere }
func (p *process) thawAll() error             { return errElsewhere }
func setGuard(string) (*guard, error)         { return nil, errElsewhere }
func (g *guard) watch(int) error              { return nil }
func (g *guard) release(string) error         { return nil }
