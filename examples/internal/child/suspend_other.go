//go:build !unix

package child

// Suspend does nothing: here a process cannot be stopped where it is.
func (p *Process) Suspend() error { return nil }

// Wake does nothing.
func (p *Process) Wake() error { return nil }
