//go:build linux || darwin

package damage

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/keystate"
)

// What else a path may lead to.

// A place is a path that leads to no store that can be opened.
type place struct {
	name string
	make func(dir string, store []byte) (path string, err error)
	want []error // one of these
	user bool    // the superuser would not be refused
}

var places = []place{
	{name: "a directory", want: []error{keystate.ErrNotAStore}, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, "d"), os.Mkdir(filepath.Join(dir, "d"), 0o700)
	}},
	{name: "a symbolic link to nothing", want: []error{keystate.ErrNotAStore}, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, "l"), os.Symlink(filepath.Join(dir, "nothing"), filepath.Join(dir, "l"))
	}},
	{name: "a symbolic link to itself", want: []error{syscall.ELOOP}, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, "l"), os.Symlink("l", filepath.Join(dir, "l"))
	}},
	{name: "a fifo", want: []error{keystate.ErrNotAStore}, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, "fifo"), syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600)
	}},
	{name: "a device", want: []error{keystate.ErrNotAStore}, make: func(string, []byte) (string, error) { return "/dev/null", nil }},
	{name: "under a directory that is missing", want: []error{fs.ErrNotExist}, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, "nowhere", "store"), nil
	}},
	{name: "under a file", want: []error{syscall.ENOTDIR}, make: func(dir string, store []byte) (string, error) {
		return filepath.Join(dir, "file", "store"), os.WriteFile(filepath.Join(dir, "file"), store, 0o600)
	}},
	{name: "a name too long", want: []error{syscall.ENAMETOOLONG}, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, strings.Repeat("n", 300)), nil
	}},
	{name: "an empty file", want: []error{keystate.ErrNotAStore}, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, "f"), os.WriteFile(filepath.Join(dir, "f"), nil, 0o600)
	}},
	{name: "a file that another has locked", want: []error{keystate.ErrLocked}, make: func(dir string, store []byte) (string, error) {
		path := filepath.Join(dir, "f")
		if err := os.WriteFile(path, store, 0o600); err != nil {
			return "", err
		}
		fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		return path, syscall.Flock(fd, syscall.LOCK_EX)
	}},
	{name: "a file that may not be read", want: []error{fs.ErrPermission}, user: true, make: func(dir string, store []byte) (string, error) {
		return filepath.Join(dir, "f"), os.WriteFile(filepath.Join(dir, "f"), store, 0)
	}},
	{name: "a file that may not be written", want: []error{fs.ErrPermission}, user: true, make: func(dir string, store []byte) (string, error) {
		return filepath.Join(dir, "f"), os.WriteFile(filepath.Join(dir, "f"), store, 0o400)
	}},
	{name: "nothing, where nothing may be made", want: []error{fs.ErrPermission}, user: true, make: func(dir string, _ []byte) (string, error) {
		return filepath.Join(dir, "d", "store"), os.Mkdir(filepath.Join(dir, "d"), 0o500)
	}},
}

// visit opens a place in dir, and says what is wrong about the answer.
func (p place) visit(dir string, store []byte) error {
	path, err := p.make(dir, store)
	if err != nil {
		return err
	}
	before, descriptors := listing(dir), openFiles()
	began := time.Now()
	o := whole.options()
	o.LockTimeout = 50 * time.Millisecond
	e, err := keystate.Open(path, o)
	if err == nil {
		return errors.Join(errors.New("it was opened"), e.Close())
	}
	if took := time.Since(began); took > openBound {
		return fmt.Errorf("open took %v", took)
	}
	named := false
	for _, want := range p.want {
		named = named || errors.Is(err, want)
	}
	if !named {
		return fmt.Errorf("got %w, want %v", err, p.want)
	}
	if after := listing(dir); after != before {
		return fmt.Errorf("the directory held\n%sand now holds\n%s", before, after)
	}
	if n := openFiles(); n > descriptors {
		return fmt.Errorf("%d descriptors are open, %d were", n, descriptors)
	}
	return nil
}

// listing tells what lies in a directory, and when it was written.
func listing(dir string) string {
	var b strings.Builder
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		info, statErr := os.Lstat(path)
		if err != nil || statErr != nil || d.IsDir() && path == dir {
			return nil // its own time changes with a draft that comes and goes
		}
		fmt.Fprintln(&b, path, info.Mode(), info.Size(), info.ModTime())
		return nil
	})
	return b.String()
}

const placeEnv = "KEYSTATE_DAMAGE_PLACE"

func TestAPathThatLeadsToNoStoreIsNamedAndLeftAsItIs(t *testing.T) {
	known, err := readStores(stores(t))
	must(t, err)
	store := known[0].images[known[0].last()]
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			if p.user && os.Getuid() == 0 {
				asNobody(t, p, store)
				return
			}
			dir := t.TempDir()
			t.Cleanup(func() { _ = os.Chmod(filepath.Join(dir, "d"), 0o700) })
			if err := p.visit(dir, store); err != nil {
				t.Error(err)
			}
		})
	}
}

// asNobody visits a place in a child process without the superuser's rights.
func asNobody(t *testing.T, p place, store []byte) {
	const nobody = 65534
	dir, err := os.MkdirTemp("", "damage")
	must(t, err)
	defer os.RemoveAll(dir)
	binary, err := os.ReadFile(os.Args[0])
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "test"), binary, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "store"), store, 0o644))
	must(t, os.Mkdir(filepath.Join(dir, "own"), 0o700))
	must(t, errors.Join(os.Chmod(dir, 0o755), os.Chown(filepath.Join(dir, "own"), nobody, nobody)))
	cmd := exec.Command(filepath.Join(dir, "test"))
	cmd.Dir = dir
	cmd.Env = []string{placeEnv + "=" + p.name}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("visited")) {
		t.Errorf("%v: %s", err, out)
	}
}

// visitAsChild is what that child does.
func visitAsChild(name string) error {
	store, err := os.ReadFile("store")
	if err != nil {
		return err
	}
	for _, p := range places {
		if p.name == name {
			fmt.Println("visited")
			return p.visit("own", store)
		}
	}
	return fmt.Errorf("no place %q", name)
}
