//go:build unix

package pgtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
	"time"
)

const (
	fast      = syscall.SIGINT  // roll back, disconnect, write a checkpoint
	immediate = syscall.SIGQUIT // end as in a crash
)

// An account is a user of the machine.
type account struct {
	name     string
	uid, gid uint32
}

// serverAccount is who the server runs as where the tests run as root, which PostgreSQL refuses, and nil elsewhere.
func serverAccount() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("pgtest: user %s: %w", name, err)
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("pgtest: user %s: %w", name, err)
		}
		return &account{name: name, uid: uint32(uid), gid: uint32(gid)}, nil
	}
	return nil, errors.New("pgtest: PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
}

func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, int(a.uid), int(a.gid))
}

// runAs has a program run as an account, out of reach of the terminal's interrupts, and not outlive the tests.
func runAs(cmd *exec.Cmd, a *account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if a != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	dieWithParent(cmd.SysProcAttr)
}

// reaches tells whether the account may pass through all folders of a path.
func (a *account) reaches(path string) bool {
	if a == nil {
		return true
	}
	cmd := exec.Command("/bin/sh", "-c", `cd -- "$1"`, "sh", path)
	cmd.Dir = "/"
	runAs(cmd, a)
	return cmd.Run() == nil
}

func signalProcess(pid int, sig syscall.Signal) error {
	err := syscall.Kill(pid, sig)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// A listed process is one that the system knows of.
type listed struct {
	pid, parent int
	state       byte // T: stopped; Z: ended, and its parent does not know yet
}

// killAll kills a process and its children, none of which sees the others die and acts on it for long: the parent is
// stopped first, so that it can neither start nor mourn a child.
func (p *process) killAll() error {
	children, err := p.signalAll(syscall.SIGKILL)
	if err != nil {
		return err
	}
	<-p.done
	return awaitEnd(children)
}

// freezeAll stops a process and its children where they are.
func (p *process) freezeAll() error {
	_, err := p.signalAll(syscall.SIGSTOP)
	return err
}

// thawAll lets a process and its children go on.
func (p *process) thawAll() error {
	_, err := p.signalAll(syscall.SIGCONT)
	return err
}

// signalAll stops a process, signals its children, and then the process itself. It returns the children.
func (p *process) signalAll(sig syscall.Signal) ([]int, error) {
	if err := p.signal(syscall.SIGSTOP); err != nil {
		return nil, fmt.Errorf("pgtest: stop process %d: %w", p.pid, err)
	}
	children, err := p.childrenOnceStopped()
	if err != nil {
		return nil, err
	}
	for _, pid := range append(children, p.pid) {
		if err := signalProcess(pid, sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return nil, fmt.Errorf("pgtest: signal %v to process %d: %w", sig, pid, err)
		}
	}
	return children, nil
}

func (p *process) childrenOnceStopped() ([]int, error) {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		all, err := processes()
		if err != nil {
			return nil, err
		}
		if all[p.pid].state != 'T' {
			continue
		}
		var children []int
		for _, l := range all {
			if l.parent == p.pid && l.state != 'Z' {
				children = append(children, l.pid)
			}
		}
		return children, nil
	}
	return nil, fmt.Errorf("pgtest: process %d does not stop", p.pid)
}

// awaitEnd returns when none of the processes runs: while one does, it holds the server's shared memory, and no
// server starts.
func awaitEnd(pids []int) error {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		all, err := processes()
		if err != nil {
			return err
		}
		alive := 0
		for _, pid := range pids {
			if l, ok := all[pid]; ok && l.state != 'Z' {
				alive++
			}
		}
		if alive == 0 {
			return nil
		}
	}
	return fmt.Errorf("pgtest: killed processes %v do not end", pids)
}

// A guard is a process that removes a folder, and ends the server in it, when the tests' process is no more, however it
// ended: it reads from a pipe, and the pipe ends with the process.
type guard struct {
	process *process
	pipe    *os.File
}

const guardScript = `
trap '' INT TERM HUP QUIT
pid=
while read -r line; do pid=$line; done
if [ -n "$pid" ] && kill -QUIT "$pid" 2>/dev/null; then
	tries=0
	while kill -0 "$pid" 2>/dev/null && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries+1)); done
	kill -KILL "$pid" 2>/dev/null
fi
rm -rf -- "$1"
`

func setGuard(folder string) (*guard, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pgtest: guard %s: %w", folder, err)
	}
	defer r.Close()
	cmd := exec.Command("/bin/sh", "-c", guardScript, "sh", folder)
	cmd.Dir = "/"
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	p, err := launch(cmd)
	if err != nil {
		w.Close()
		return nil, err
	}
	return &guard{process: p, pipe: w}, nil
}

// watch has the guard end the process with this number, or none if it is 0.
func (g *guard) watch(pid int) error {
	line := "\n"
	if pid != 0 {
		line = strconv.Itoa(pid) + "\n"
	}
	if _, err := g.pipe.WriteString(line); err != nil {
		return fmt.Errorf("pgtest: guard: %w", err)
	}
	return nil
}

// release removes the folder.
func (g *guard) release(folder string) error {
	g.pipe.Close()
	<-g.process.done
	if _, err := os.Lstat(folder); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pgtest: %s was not removed: %w", folder, errors.Join(err, g.process.err))
	}
	return nil
}
