package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"example.com/keystate/internal/proof/power/lossy"
)

func main() {
	modes := map[string]func([]string) error{
		"serve": serve,
		"cut":   cut,
		"mount": func(args []string) error { return mountImage(args[0], args[1]) },
	}
	if len(os.Args) > 1 && modes[os.Args[1]] != nil {
		if err := modes[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "power %s: %v\n", os.Args[1], err)
			os.Exit(1)
		}
		return
	}
	r, err := parse(os.Args[1:])
	if err == nil {
		err = r.all()
	}
	var failed *exec.ExitError
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "power:", err)
		os.Exit(1)
	case errors.As(r.verdict, &failed):
		os.Exit(max(1, failed.ExitCode()))
	case r.verdict != nil:
		fmt.Fprintln(os.Stderr, "power:", r.verdict)
		os.Exit(1)
	}
}

// A run is one of the tool's, from the mounting to the unmounting.
type run struct {
	site
	self    string // the program's own file
	onExt4  bool
	lie     bool
	seed    uint64
	slow    time.Duration
	spare   float64
	size    int64 // of the image, in MiB
	command []string

	server  *exec.Cmd
	stdin   io.Closer // the server lives as long as it is open
	signals chan os.Signal
	verdict error // of the command
}

func parse(args []string) (*run, error) {
	r := &run{signals: make(chan os.Signal, 8)}
	flags := flag.NewFlagSet("power", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "power [flags] -- command args…: run a command on a disk whose power it can cut")
		flags.PrintDefaults()
	}
	at := flags.String("mount", "", "an empty `folder` to mount on; default: a new one")
	flags.BoolVar(&r.onExt4, "ext4", false, "put ext4 on a loop device on a disk image between the command and the disk")
	flags.Int64Var(&r.size, "size", 128, "the disk image's size in `MiB`")
	flags.BoolVar(&r.lie, "lie", false, "answer each sync with success, and do nothing")
	flags.Uint64Var(&r.seed, "seed", rand.Uint64(), "of what is lost")
	flags.DurationVar(&r.slow, "slow", 12*time.Millisecond, "the longest `time` that a sync takes")
	flags.Float64Var(&r.spare, "spare", 0.1, "the `share` of kills that no power cut follows")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if r.command = flags.Args(); len(r.command) == 0 {
		flags.Usage()
		return nil, errors.New("there is no command")
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("mounting takes root")
	}
	var err error
	if r.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if r.work, err = os.MkdirTemp("", "power-"); err != nil {
		return nil, err
	}
	return r, r.choose(*at)
}

// choose picks the folders to mount on.
func (r *run) choose(at string) (err error) {
	if at == "" {
		at = filepath.Join(r.work, "mount")
		err = os.Mkdir(at, 0o755)
	} else if at, err = filepath.Abs(at); err == nil {
		at, err = filepath.EvalSymlinks(at)
	}
	if r.fuse = at; err == nil && r.onExt4 {
		r.ext4, r.fuse = at, filepath.Join(r.work, "fuse")
		err = os.Mkdir(r.fuse, 0o755)
	}
	return err
}

// all mounts, runs the command, and takes down again, whatever happens.
func (r *run) all() (err error) {
	signal.Notify(r.signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	fmt.Printf("power: seed %d\n", r.seed)
	if err = r.setUp(); err == nil {
		r.verdict = r.execute()
		r.tell()
		if r.verdict != nil && !errors.Is(r.verdict, errInterrupted) {
			r.keepEvidence()
		}
	}
	return errors.Join(err, r.end())
}

func (r *run) setUp() error {
	r.server = exec.Command(r.self, "serve", "-work", r.work, "-fuse", r.fuse, "-ext4", r.ext4,
		"-seed", fmt.Sprint(r.seed), "-slow", r.slow.String(), "-spare", fmt.Sprint(r.spare))
	r.server.Stderr = os.Stderr
	r.server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a ^C is the tool's to deal with
	stdin, err := r.server.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := r.server.StdoutPipe()
	if err != nil {
		return err
	}
	r.stdin = stdin
	if err := r.server.Start(); err != nil {
		return err
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || strings.TrimSpace(line) != ready {
		return fmt.Errorf("the server did not start: %w", err)
	}
	if r.onExt4 {
		if err := r.makeExt4(); err != nil {
			return err
		}
	}
	if r.lie {
		_, err = ask(r.socket(), askLie)
	}
	return err
}

// makeExt4 makes the image and mounts what is in it. Nothing of it may be lost in the first cut.
func (r *run) makeExt4() error {
	f, err := os.OpenFile(r.image(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(r.size << 20); err != nil {
		return err
	}
	if err := r.try("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-J", "size=4", "-E", "nodiscard", r.image()); err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(r.image()))
	if err != nil {
		return err
	}
	defer folder.Close()
	if err := errors.Join(f.Sync(), folder.Sync()); err != nil {
		return err
	}
	return r.try(r.self, "mount", r.image(), r.ext4)
}

// try runs a command that touches the mounted file systems, and gives it up when it hangs.
func (r *run) try(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var said bytes.Buffer
	c := exec.CommandContext(ctx, name, args...)
	c.Stdout, c.Stderr, c.WaitDelay = &said, &said, time.Second
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}

// grace is what an interrupted command has to end by itself.
const grace = 2 * time.Second

var errInterrupted = errors.New("interrupted")

// execute runs the command in a process group of its own, and lets nothing of it outlive the run.
func (r *run) execute() error {
	words := []string{r.self, "cut", r.socket()}
	if r.onExt4 {
		words = append(words, r.image(), r.ext4)
	}
	for i, w := range words {
		words[i] = quoted(w)
	}
	places := strings.NewReplacer("{mount}", r.dir(), "{cut}", strings.Join(words, " "))
	var args []string
	for _, a := range r.command {
		args = append(args, places.Replace(a))
	}
	c := exec.Command(args[0], args[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		return err
	}
	group := -c.Process.Pid
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	defer syscall.Kill(group, syscall.SIGKILL)
	select {
	case err := <-ended:
		return err
	case s := <-r.signals:
		_ = syscall.Kill(group, s.(syscall.Signal))
		select {
		case <-ended:
		case <-time.After(grace):
			_ = syscall.Kill(group, syscall.SIGKILL)
		}
		return fmt.Errorf("%w: %v", errInterrupted, s)
	}
}

// quoted is a word as a shell takes it for itself.
func quoted(word string) string {
	if strings.Trim(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=:,@%") == "" {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// tell prints what has happened to the disk.
func (r *run) tell() {
	text, err := ask(r.socket(), askTally)
	var t lossy.Tally
	if err == nil {
		err = json.Unmarshal([]byte(text), &t)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "power: the server does not tell what it has done:", err)
		return
	}
	fmt.Printf("power: seed %d: %d cuts, %d of them during a sync; %d writes, %d syncs; "+
		"of the unsynced writes %d landed, %d were lost, %d torn; of the unsynced names %d landed, %d were lost\n",
		r.seed, t.Cuts, t.MidSync, t.Writes, t.Syncs, t.Landed, t.Lost, t.Torn, t.NamesLanded, t.NamesLost)
}

// keepEvidence copies what the command has left when it failed.
func (r *run) keepEvidence() {
	to, err := os.MkdirTemp("", "power-evidence-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "power: no evidence kept:", err)
		return
	}
	err = r.try("cp", "-a", "--sparse=always", r.dir(), to+"/files")
	if r.onExt4 {
		err = errors.Join(err, r.try("cp", "--sparse=always", r.image(), to+"/image"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "power: not all evidence kept:", err)
	}
	fmt.Printf("power: seed %d: what the command left is in %s\n", r.seed, to)
}

// end takes everything down, and makes sure of it.
func (r *run) end() error {
	if r.server != nil && r.server.Process != nil {
		r.stdin.Close()
		hung := time.AfterFunc(patience, func() { _ = r.server.Process.Kill() }) // which frees whatever waits for it
		if err := r.server.Wait(); err != nil {
			fmt.Fprintln(os.Stderr, "power: the server ended with", err)
		}
		hung.Stop()
	}
	err := r.takeDown() // what the server did not come to
	if left := r.leftovers(); len(left) > 0 {
		return errors.Join(err, fmt.Errorf("still there: %s", strings.Join(left, ", ")))
	}
	return errors.Join(err, os.RemoveAll(r.work))
}
