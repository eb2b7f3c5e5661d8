//go:build linux && amd64

package disk

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const sector = 512

// A tracer plays the disk to processes that it starts: it sees their system calls about one directory before the
// kernel does, has them carried out, refused or spoilt, and keeps a log of what the kernel was made to do. All its
// methods are called on the one thread that started it: ptrace belongs to threads.
type tracer struct {
	dir    string
	reads  bool // reading calls are shown, too
	exe    string
	null   *os.File
	errors *os.File // what the processes say before they die
	names  map[string]int
	inodes int
	log    []event
	procs  map[int]*process
	tids   map[int]*thread
	held   func() error // lets the call go on that was held up last
}

// A process is one that the tracer has started.
type process struct {
	pid    int
	files  map[int]*handle
	calls  int
	decide func(*call) action
	status unix.WaitStatus
	ended  bool
	hung   bool
}

type thread struct {
	proc *process
	call *call // from which it is about to return
}

// A handle is what a file descriptor stands for.
type handle struct {
	inode int // 0: the directory
	name  string
}

// A call is a system call about the directory or a file in it.
type call struct {
	n     int // 1 is the first of its process
	op    op
	fd    int
	inode int    // -1: not known yet, or none
	name  string // of the file, in the directory; empty: the directory itself
	to    string // of a link
	at    int64
	size  int64
	b     []byte
	flags int
	act   action
}

func (c *call) String() string {
	return fmt.Sprintf("call %d: %s(%s) at %d, %d bytes", c.n, c.op, c.name, c.at, c.size)
}

// meta says whether the call writes a meta page, and nothing else.
func (c *call) meta() bool { return c.op == opWrite && c.at < 2*pageSize && c.size == pageSize }

// metas says whether the call writes both meta pages anew, as Open does.
func (c *call) metas() bool { return c.op == opWrite && c.at == 0 && c.size == 2*pageSize }

type op string

const (
	opOpen        op = "openat"
	opWrite       op = "pwrite64"
	opSync        op = "fsync"
	opSyncContent op = "fdatasync"
	opTruncate    op = "ftruncate"
	opLink        op = "linkat"
	opUnlink      op = "unlinkat"
	opRename      op = "renameat"
	opLock        op = "flock"
	opClose       op = "close"
	opRead        op = "pread64"
	opStat        op = "fstat"
	opMap         op = "mmap"
	opList        op = "getdents64"
)

func (o op) syncs() bool { return o == opSync || o == opSyncContent }

// changes says whether the call, when it succeeds, leaves something that a power cut may take away, or keeps it from that.
func (o op) changes() bool {
	return o == opWrite || o == opTruncate || o == opLink || o == opUnlink || o == opRename || o.syncs()
}

// An action is what becomes of a call.
type action struct {
	kind  actionKind
	errno syscall.Errno
}

type actionKind string

const (
	carryOut actionKind = ""
	refuse   actionKind = "refused"                  // the kernel does not get to see it
	spoil    actionKind = "done, told otherwise"     // it takes effect, and its caller is told that it failed
	halve    actionKind = "half done"                // a write is cut short; the rest is up to the caller
	lie      actionKind = "not done, told it was"    // a disk that lies
	swallow  actionKind = "failed, told it was done" // of a sync: the kernel has dropped what it could not write, and nobody is told
	kill     actionKind = "killed before it"
	pause    actionKind = "held up before it" // until the tracer's held is called
)

func (a action) String() string {
	if a.errno == 0 {
		return string(a.kind)
	}
	return fmt.Sprintf("%s, %s", a.kind, unix.ErrnoName(a.errno))
}

// An event is what has happened to the disk, or what a process said.
type event struct {
	kind  eventKind
	inode int
	name  string
	at    int64 // of a write; of resizing, the size
	b     []byte
	tell  *tell
}

type eventKind int

const (
	told eventKind = iota
	written
	resized
	synced
	syncFailed
	entered // a name was given to an inode
	removed
)

func newTracer(dir string) (*tracer, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	said, err := os.CreateTemp("", "said")
	if err != nil {
		return nil, err
	}
	os.Remove(said.Name())
	return &tracer{dir: dir, exe: exe, null: null, errors: said, procs: map[int]*process{}, tids: map[int]*thread{}}, nil
}

func (t *tracer) close() error { return errors.Join(t.null.Close(), t.errors.Close()) }

// clear empties the directory and the log, and ends whatever process an error has left behind.
func (t *tracer) clear() error {
	for pid := range t.procs {
		unix.Kill(pid, unix.SIGKILL)
		delete(t.procs, pid)
	}
	for len(t.tids) > 0 {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
		if err == unix.ECHILD {
			clear(t.tids)
		} else if err == nil && !status.Stopped() {
			delete(t.tids, tid)
		}
	}
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(t.dir, e.Name())); err != nil {
			return err
		}
	}
	t.names, t.inodes, t.log, t.held = map[string]int{}, 0, nil, nil
	return nil
}

// hangs is when a process is taken to hang. What keystate promises is a second; the rest is for a busy machine.
const hangs = 5 * time.Second

// run starts a process in a role and sees it to its end.
func (t *tracer) run(role string, decide func(*call) action) (*process, error) {
	p, err := t.start(role, decide)
	if err != nil {
		return nil, err
	}
	return p, t.until(func() bool { return p.ended })
}

func (t *tracer) start(role string, decide func(*call) action) (*process, error) {
	pid, err := syscall.ForkExec(t.exe, []string{t.exe}, &syscall.ProcAttr{
		Env: []string{
			roleVariable + "=" + role, dirVariable + "=" + t.dir, readsVariable + "=" + strconv.FormatBool(t.reads),
			"GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1", "GORACE=atexit_sleep_ms=0",
		},
		Files: []uintptr{t.null.Fd(), t.null.Fd(), t.errors.Fd(), t.null.Fd()},
		Sys:   &syscall.SysProcAttr{Ptrace: true},
	})
	if err != nil {
		return nil, fmt.Errorf("start a process to trace: %w", err)
	}
	p := &process{pid: pid, files: map[int]*handle{}, decide: decide}
	t.procs[pid], t.tids[pid] = p, &thread{proc: p}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil || !status.Stopped() {
		return nil, fmt.Errorf("wait for the process to trace: %#x, %w", status, err)
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	return p, unix.PtraceCont(pid, 0)
}

// until serves the processes until done. A process that takes too long is killed.
func (t *tracer) until(done func() bool) error {
	pids := make([]int, 0, len(t.procs))
	for pid := range t.procs {
		pids = append(pids, pid)
	}
	late := make(chan struct{})
	timer := time.AfterFunc(hangs, func() {
		close(late)
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
	})
	defer timer.Stop()
	for !done() {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for traced processes: %w", err)
		}
		if err := t.stopped(tid, status); err != nil && !errors.Is(err, unix.ESRCH) { // ESRCH: it was killed meanwhile
			return err
		}
	}
	select {
	case <-late:
		for _, pid := range pids {
			if p := t.procs[pid]; p != nil {
				p.hung = true
			}
		}
	default:
	}
	return nil
}

// stopped deals with a thread that has stopped or ended.
func (t *tracer) stopped(tid int, status unix.WaitStatus) error {
	th := t.tids[tid]
	if th == nil {
		proc, err := t.processOf(tid)
		if err != nil {
			return err
		}
		th = &thread{proc: proc}
		t.tids[tid] = th
	}
	switch {
	case status.Exited() || status.Signaled():
		delete(t.tids, tid)
		if th.proc.pid == tid {
			th.proc.ended, th.proc.status = true, status
		}
		return nil
	case !status.Stopped():
		return nil
	case status.StopSignal() == unix.SIGTRAP|0x80:
		return t.returning(tid, th)
	case status.TrapCause() == unix.PTRACE_EVENT_SECCOMP:
		return t.calling(tid, th)
	case status.StopSignal() == unix.SIGTRAP || status.StopSignal() == unix.SIGSTOP: // a new thread, here and there
		return unix.PtraceCont(tid, 0)
	}
	return unix.PtraceCont(tid, int(status.StopSignal()))
}

// processOf finds whose a new thread is.
func (t *tracer) processOf(tid int) (*process, error) {
	for _, p := range t.procs {
		if len(t.procs) == 1 {
			return p, nil
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", p.pid, tid)); err == nil {
			return p, nil
		}
	}
	return nil, fmt.Errorf("thread %d is nobody's", tid)
}

// calling deals with a thread that is about to make a call.
func (t *tracer) calling(tid int, th *thread) error {
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return err
	}
	if regs.Orig_rax == unix.SYS_WRITE {
		if int(regs.Rdi) != tellFD {
			return unix.PtraceCont(tid, 0)
		}
		return t.listen(tid, th, regs)
	}
	c, err := t.decode(th.proc, regs)
	if err != nil {
		return err
	}
	if c == nil {
		return unix.PtraceCont(tid, 0)
	}
	th.proc.calls++
	c.n = th.proc.calls
	if th.proc.decide != nil {
		c.act = th.proc.decide(c)
	}
	switch c.act.kind {
	case kill:
		return unix.Kill(th.proc.pid, unix.SIGKILL)
	case refuse:
		t.failed(c)
		return skip(tid, regs, -int64(c.act.errno))
	case swallow:
		t.failed(c)
		return skip(tid, regs, 0)
	case pause:
		t.held = func() error {
			t.held, th.call = nil, c
			return unix.PtraceSyscall(tid, 0)
		}
		return nil
	case lie:
		return skip(tid, regs, int64(len(c.b)))
	case halve:
		c.b = c.b[:len(c.b)/2/sector*sector]
		regs.Rdx = uint64(len(c.b))
		if err := unix.PtraceSetRegs(tid, &regs); err != nil {
			return err
		}
	}
	if c.act.kind == carryOut && certain[c.op] {
		t.happened(th.proc, c, len(c.b))
		return unix.PtraceCont(tid, 0)
	}
	th.call = c
	return unix.PtraceSyscall(tid, 0)
}

// certain are calls whose outcome need not be waited for, which saves time. That each write was carried out to its end is
// seen when the log is compared with what is in the directory.
var certain = map[op]bool{
	opWrite: true, opSync: true, opSyncContent: true, opClose: true, opLock: true, opRead: true, opStat: true, opMap: true, opList: true,
}

// skip keeps the kernel from a call, and says what it returns.
func skip(tid int, regs unix.PtraceRegs, result int64) error {
	regs.Orig_rax, regs.Rax = ^uint64(0), uint64(result)
	if err := unix.PtraceSetRegs(tid, &regs); err != nil {
		return err
	}
	return unix.PtraceCont(tid, 0)
}

// listen takes what a process has to say.
func (t *tracer) listen(tid int, th *thread, regs unix.PtraceRegs) error {
	b, err := peek(th.proc.pid, uintptr(regs.Rsi), int(regs.Rdx))
	if err != nil {
		return err
	}
	said := new(tell)
	if err := json.Unmarshal(b, said); err != nil {
		return fmt.Errorf("%q: %w", b, err)
	}
	t.log = append(t.log, event{kind: told, tell: said})
	return skip(tid, regs, int64(len(b)))
}

// decode finds out whether a call is about the directory: nil if it is not.
func (t *tracer) decode(p *process, regs unix.PtraceRegs) (*call, error) {
	c := &call{inode: -1, fd: int(int32(regs.Rdi))}
	byPath := func(at uint64) (name string, inside bool, err error) {
		path, err := peekString(p.pid, uintptr(at))
		if err != nil {
			return "", false, err
		}
		path = filepath.Clean(path)
		if path == t.dir {
			return "", true, nil
		}
		name, inside = strings.CutPrefix(path, t.dir+"/")
		return name, inside, nil
	}
	var inside bool
	var err error
	switch regs.Orig_rax {
	case unix.SYS_OPENAT:
		c.op, c.flags = opOpen, int(regs.Rdx)
		c.name, inside, err = byPath(regs.Rsi)
	case unix.SYS_NEWFSTATAT:
		c.op = opStat
		c.name, inside, err = byPath(regs.Rsi)
	case unix.SYS_UNLINKAT:
		c.op, c.flags = opUnlink, int(regs.Rdx)
		c.name, inside, err = byPath(regs.Rsi)
	case unix.SYS_LINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		if c.op = opRename; regs.Orig_rax == unix.SYS_LINKAT {
			c.op = opLink
		}
		c.name, inside, err = byPath(regs.Rsi)
		if err == nil && inside {
			c.to, inside, err = byPath(regs.R10)
		}
	default:
		if c.op, inside = byDescriptor[regs.Orig_rax]; !inside {
			return nil, nil
		}
		if c.op == opMap {
			c.fd = int(int32(regs.R8))
		}
		f := p.files[c.fd]
		if f == nil {
			return nil, nil
		}
		c.inode, c.name = f.inode, f.name
	}
	if err != nil || !inside {
		return nil, err
	}
	switch c.op {
	case opWrite:
		c.at, c.size = int64(regs.R10), int64(regs.Rdx)
		c.b, err = peek(p.pid, uintptr(regs.Rsi), int(regs.Rdx))
	case opTruncate:
		c.size = int64(regs.Rsi)
	case opLock:
		c.flags = int(regs.Rsi)
	}
	return c, err
}

var byDescriptor = map[uint64]op{
	unix.SYS_PWRITE64: opWrite, unix.SYS_FSYNC: opSync, unix.SYS_FDATASYNC: opSyncContent, unix.SYS_FTRUNCATE: opTruncate,
	unix.SYS_FLOCK: opLock, unix.SYS_CLOSE: opClose, unix.SYS_PREAD64: opRead, unix.SYS_FSTAT: opStat, unix.SYS_MMAP: opMap,
	unix.SYS_GETDENTS64: opList,
}

// returning deals with a thread whose call has been carried out.
func (t *tracer) returning(tid int, th *thread) error {
	c := th.call
	if th.call = nil; c == nil {
		return unix.PtraceCont(tid, 0)
	}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return err
	}
	if result := int64(regs.Rax); result >= 0 {
		t.happened(th.proc, c, int(result))
	} else if c.op.syncs() {
		return fmt.Errorf("%s: the real disk failed: %w", c, syscall.Errno(-result))
	}
	if c.act.kind == spoil {
		regs.Rax = uint64(-int64(c.act.errno))
		if err := unix.PtraceSetRegs(tid, &regs); err != nil {
			return err
		}
	}
	return unix.PtraceCont(tid, 0)
}

// failed notes a call that was refused. A sync that fails leaves its mark all the same.
func (t *tracer) failed(c *call) {
	if c.op.syncs() {
		t.log = append(t.log, event{kind: syncFailed, inode: c.inode})
	}
}

// happened notes what a call did.
func (t *tracer) happened(p *process, c *call, result int) {
	note := func(e event) { t.log = append(t.log, e) }
	switch c.op {
	case opOpen:
		inode, there := 0, c.name == ""
		if !there {
			inode, there = t.names[c.name]
		}
		if !there {
			t.inodes++
			inode = t.inodes
			t.names[c.name] = inode
			note(event{kind: entered, inode: inode, name: c.name})
		}
		if c.act.kind != spoil {
			p.files[result] = &handle{inode: inode, name: c.name}
		}
	case opWrite:
		note(event{kind: written, inode: c.inode, at: c.at, b: bytes.Clone(c.b[:result])})
	case opTruncate:
		note(event{kind: resized, inode: c.inode, at: c.size})
	case opSync, opSyncContent:
		kind := synced
		if c.act.kind == spoil {
			kind = syncFailed
		}
		note(event{kind: kind, inode: c.inode})
	case opLink:
		t.names[c.to] = t.names[c.name]
		note(event{kind: entered, inode: t.names[c.name], name: c.to})
	case opUnlink:
		delete(t.names, c.name)
		note(event{kind: removed, name: c.name})
	case opRename:
		inode := t.names[c.name]
		delete(t.names, c.name)
		t.names[c.to] = inode
		note(event{kind: entered, inode: inode, name: c.to})
		note(event{kind: removed, name: c.name})
	case opClose:
		delete(p.files, c.fd)
	}
}

// peek reads a process's memory.
func peek(pid int, at uintptr, n int) ([]byte, error) {
	b := make([]byte, n)
	if n == 0 {
		return b, nil
	}
	local := []unix.Iovec{{Base: &b[0], Len: uint64(n)}}
	remote := []unix.RemoteIovec{{Base: at, Len: n}}
	got, err := unix.ProcessVMReadv(pid, local, remote, 0)
	if err != nil || got != n {
		return nil, fmt.Errorf("read %d bytes of process %d: %d, %w", n, pid, got, err)
	}
	return b, nil
}

// peekString reads a string that ends with a zero byte. It may lie at the end of what is mapped, so no page is read
// before the one before it has been found not to hold the end.
func peekString(pid int, at uintptr) (string, error) {
	var s []byte
	for len(s) < unix.PathMax {
		next := at + uintptr(len(s))
		b, err := peek(pid, next, int(4096-next%4096))
		if err != nil {
			return "", err
		}
		if end := bytes.IndexByte(b, 0); end >= 0 {
			return string(append(s, b[:end]...)), nil
		}
		s = append(s, b...)
	}
	return "", errors.New("a path without an end")
}

// said returns what the processes have written to their standard error, and forgets it.
func (t *tracer) said() string {
	b := make([]byte, 4<<10)
	n, _ := t.errors.ReadAt(b, 0)
	t.errors.Truncate(0)
	t.errors.Seek(0, 0)
	return string(b[:n])
}

// fate tells how a process ended, if it was not as it should.
func (t *tracer) fate(p *process) error {
	delete(t.procs, p.pid)
	switch said := t.said(); {
	case p.hung:
		return fmt.Errorf("hung for %v: %s", hangs, said)
	case p.status.Signaled():
		return fmt.Errorf("died of %v: %s", p.status.Signal(), said)
	case p.status.ExitStatus() != 0:
		return fmt.Errorf("exited with %s: %s", strconv.Itoa(p.status.ExitStatus()), said)
	}
	return nil
}

// showDisk makes the kernel show this process's calls that may be about a directory to its tracer.
func showDisk(reads bool) error {
	const (
		offsetNR, offsetArch   = 0, 4
		offsetArg0, offsetArg3 = 16, 16 + 3*8 // the low halves
		auditArch              = 0xC000003E   // x86-64
	)
	load := func(k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: k}
	}
	unless := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: skip}
	}
	leave := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	const show, pass = unix.SECCOMP_RET_TRACE, unix.SECCOMP_RET_ALLOW
	filter := []unix.SockFilter{
		load(offsetArch), unless(auditArch, 1), {Code: unix.BPF_JMP | unix.BPF_JA, K: 1}, leave(pass), load(offsetNR),
		unless(unix.SYS_WRITE, 4), load(offsetArg0), unless(tellFD, 1), leave(show), leave(pass),
	}
	shown := []uint32{
		unix.SYS_OPENAT, unix.SYS_UNLINKAT, unix.SYS_LINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_PWRITE64,
		unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_FLOCK, unix.SYS_CLOSE,
	}
	if reads {
		shown = append(shown, unix.SYS_NEWFSTATAT, unix.SYS_FSTAT, unix.SYS_PREAD64, unix.SYS_GETDENTS64)
		filter = append(filter,
			unless(unix.SYS_MMAP, 4), load(offsetArg3),
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.MAP_ANONYMOUS, Jf: 1}, leave(pass), leave(show))
	}
	for _, nr := range shown {
		filter = append(filter, unless(nr, 1), leave(show))
	}
	filter = append(filter, leave(pass))
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return errno
	}
	return nil
}
