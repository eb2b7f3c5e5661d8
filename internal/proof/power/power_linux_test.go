package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/keystate/internal/proof/power/lossy"
)

// toolVariable makes the test binary the tool.
const toolVariable = "KEYSTATE_POWER_TOOL"

func TestMain(m *testing.M) {
	if os.Getenv(toolVariable) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	for _, device := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(device); err != nil {
			t.Skip("mounting takes " + device)
		}
	}
	t.Setenv(toolVariable, "1")
	t.Setenv("GORACE", "atexit_sleep_ms=0") // or each cut takes a second more under the race detector
}

// plug mounts a disk for a test. Its server is another process: a page fault in the one that has to answer it would
// never end.
func plug(t *testing.T, flags ...string) *run {
	t.Helper()
	needRoot(t)
	r, err := parse(append(flags, "-slow=0", "-spare=0", "--", "true"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.end(); err != nil {
			t.Error(err)
		}
	})
	if err := r.setUp(); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *run) cutIn(t *testing.T) {
	t.Helper()
	args := []string{r.socket()}
	if r.onExt4 {
		args = append(args, r.image(), r.ext4)
	}
	if err := cut(args); err != nil {
		t.Fatal(err)
	}
}

func (r *run) tally(t *testing.T) (n lossy.Tally) {
	t.Helper()
	text, err := ask(r.socket(), askTally)
	if err == nil {
		err = json.Unmarshal([]byte(text), &n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func syncFolder(t *testing.T, path string) {
	t.Helper()
	d := must(os.Open(path))(t)
	defer d.Close()
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestAMapShowsWhatIsWrittenAndAfterACutWhatTheDiskHas(t *testing.T) {
	r := plug(t)
	for round := range 30 { // how much a cut leaves is drawn anew each time
		path := filepath.Join(r.dir(), fmt.Sprint(round))
		f := open(t, path)
		must(f.WriteAt(bytes.Repeat([]byte{'a'}, 1<<16), 0))(t)
		seen := must(unix.Mmap(int(f.Fd()), 0, 1<<16, unix.PROT_READ, unix.MAP_SHARED))(t)
		defer unix.Munmap(seen)
		if seen[100] != 'a' {
			t.Fatal("the map does not show what was written before it")
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		syncFolder(t, r.dir())
		must(open(t, path).WriteAt(bytes.Repeat([]byte{'b'}, 1<<16), 0))(t)
		if !bytes.Equal(seen, bytes.Repeat([]byte{'b'}, 1<<16)) {
			t.Fatal("the map does not show what was written beside it")
		}
		r.cutIn(t)
		f = open(t, path)
		again := must(unix.Mmap(int(f.Fd()), 0, 1<<16, unix.PROT_READ, unix.MAP_SHARED))(t)
		defer unix.Munmap(again)
		text := must(os.ReadFile(path))(t)
		if !bytes.Equal(again, text) {
			t.Fatal("after a cut, a map and a read differ")
		}
		if bytes.Contains(text, []byte{'a'}) && bytes.Equal(seen, bytes.Repeat([]byte{'b'}, 1<<16)) {
			return // something was lost, and only the process from before the cut still has it
		}
	}
	t.Error("no cut lost anything")
}

func TestALockExcludesOthersUntilACut(t *testing.T) {
	r := plug(t)
	path := filepath.Join(r.dir(), "store")
	f, g := open(t, path), open(t, path)
	lock := func(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
	if err := lock(f); err != nil {
		t.Fatal(err)
	}
	if err := lock(g); !errors.Is(err, syscall.EWOULDBLOCK) {
		t.Errorf("a second lock: %v", err)
	}
	syncFolder(t, r.dir())
	r.cutIn(t)
	if err := lock(open(t, path)); err != nil {
		t.Errorf("a lock after a cut, while a process from before it still holds one: %v", err)
	}
}

func TestTheMountedFolderIsAnOrdinaryOne(t *testing.T) {
	r := plug(t)
	at := func(name string) string { return filepath.Join(r.dir(), name) }
	err := errors.Join(
		os.WriteFile(at("a"), []byte("a long text"), 0o600),
		os.WriteFile(at("a"), []byte("text"), 0o600), // which truncates
		os.Link(at("a"), at("b")),
		os.Mkdir(at("folder"), 0o755),
		os.Rename(at("b"), at("folder/c")),
		os.Chmod(at("a"), 0o640),
		os.Truncate(at("a"), 3),
	)
	if err != nil {
		t.Fatal(err)
	}
	f := must(os.OpenFile(at("folder/c"), os.O_WRONLY|os.O_APPEND, 0))(t)
	must(f.WriteString("!"))(t)
	f.Close()
	if text := string(must(os.ReadFile(at("a")))(t)); text != "tex!" {
		t.Errorf("the file has %q", text)
	}
	info := must(os.Stat(at("a")))(t)
	if info.Size() != 4 || info.Mode() != 0o640 || info.Sys().(*syscall.Stat_t).Nlink != 2 {
		t.Errorf("the file is %+v", info.Sys())
	}
	if err := os.Remove(at("folder")); !errors.Is(err, syscall.ENOTEMPTY) {
		t.Errorf("removing a full folder: %v", err)
	}
	var names []string
	err = filepath.WalkDir(r.dir(), func(path string, _ fs.DirEntry, err error) error {
		names = append(names, strings.TrimPrefix(path, r.dir()))
		return err
	})
	if want := []string{"", "/a", "/folder", "/folder/c"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("there are %q, %v", names, err)
	}
	if err := os.RemoveAll(at("folder")); err != nil {
		t.Error(err)
	}
}

func TestExt4KeepsWhatWasSyncedAndItsSyncsReachTheDisk(t *testing.T) {
	r := plug(t, "-ext4", "-size=32")
	path := filepath.Join(r.dir(), "store")
	lost := false
	for round := range 10 {
		f := open(t, path)
		text := bytes.Repeat([]byte{byte('a' + round)}, 10_000)
		must(f.WriteAt(text, 0))(t)
		before := r.tally(t).Syncs
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if n := r.tally(t).Syncs - before; n == 0 {
			t.Error("a sync did not reach the disk")
		}
		if err := os.WriteFile(filepath.Join(r.dir(), fmt.Sprint(round)), text, 0o600); err != nil {
			t.Fatal(err)
		}
		r.cutIn(t)
		if !bytes.Equal(must(os.ReadFile(path))(t), text) {
			t.Fatalf("after cut %d, what was synced is gone", round)
		}
		_, err := os.Stat(filepath.Join(r.dir(), fmt.Sprint(round)))
		lost = lost || err != nil
	}
	if !lost {
		t.Error("nothing that was not synced was ever lost")
	}
}

// start starts the tool with a script that tells, where it says so, that it runs, and waits for that.
func start(t *testing.T, flags []string, script string) (*exec.Cmd, site) {
	t.Helper()
	temp := t.TempDir()
	fifo := filepath.Join(temp, "running")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(flags), "--", "sh", "-c", strings.ReplaceAll(script, "{tell}", "echo {mount} >"+fifo))
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "TMPDIR="+temp)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	mount := strings.TrimSpace(string(must(os.ReadFile(fifo))(t)))
	work := filepath.Dir(strings.TrimSuffix(mount, "/"+diskName))
	s := site{work: work, fuse: filepath.Join(work, "mount")}
	if slices.Contains(flags, "-ext4") {
		s.fuse, s.ext4 = filepath.Join(work, "fuse"), s.fuse
	}
	if !s.mounted(s.fuse) || s.ext4 != "" && (!s.mounted(s.ext4) || len(s.loops()) == 0) {
		t.Fatalf("not mounted: %+v", s)
	}
	return c, s
}

func TestNothingIsLeftMounted(t *testing.T) {
	needRoot(t)
	signalled := func(s os.Signal) func(*testing.T, *exec.Cmd) {
		return func(t *testing.T, c *exec.Cmd) {
			if err := c.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name, script string
		end          func(*testing.T, *exec.Cmd)
	}{
		{"after a command that fails", "{tell}; {cut}; cd {mount}; sleep 100 & exit 7", func(*testing.T, *exec.Cmd) {}},
		{"after ^C", "{tell}; {cut}; cd {mount}; sleep 100", signalled(os.Interrupt)},
		{"after SIGTERM to one who does not care", "trap '' TERM; cd {mount}; {tell}; sleep 100", signalled(syscall.SIGTERM)},
		{"after the tool was killed", "{tell}; sleep 1", signalled(os.Kill)},
	} {
		for _, flags := range [][]string{nil, {"-ext4"}} {
			t.Run(strings.Join(append([]string{c.name}, flags...), " "), func(t *testing.T) {
				tool, s := start(t, flags, c.script)
				c.end(t, tool)
				if err := tool.Wait(); err == nil {
					t.Error("the tool says that all went well")
				}
				gone := func() bool { return len(s.leftovers()) == 0 }
				for deadline := time.Now().Add(patience); !gone() && time.Now().Before(deadline); {
					time.Sleep(10 * time.Millisecond) // for a killed tool's server
				}
				if !gone() {
					t.Errorf("still there: %v", s.leftovers())
				}
			})
		}
	}
}

func TestEvidenceOfAFailureIsKept(t *testing.T) {
	needRoot(t)
	temp := t.TempDir()
	c := exec.Command(os.Args[0], "-ext4", "-size=16", "--", "sh", "-c", "echo text >{mount}/store; exit 7")
	c.Env = append(os.Environ(), "TMPDIR="+temp)
	said, err := c.CombinedOutput()
	if c.ProcessState.ExitCode() != 7 {
		t.Errorf("the tool ended with %v: %s", err, said)
	}
	found := must(filepath.Glob(filepath.Join(temp, "power-*", "*")))(t)
	if len(found) != 2 || !bytes.Contains(said, []byte(filepath.Dir(found[0]))) {
		t.Errorf("there are %q; the tool said %s", found, said)
	}
}

// The kill test on a disk that is cut: sound on a sound one, and not on one that lies, nor with a store that never syncs.
func TestTheKillTestFindsLostSyncs(t *testing.T) {
	needRoot(t)
	if testing.Short() {
		t.Skip("it builds the kill test, and cuts the power for some seconds")
	}
	killTest := filepath.Join(t.TempDir(), "kill.test")
	build := exec.Command("go", "test", "-c", "-o", killTest, "./internal/proof/kill")
	build.Dir = "../../.."
	if said, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	for _, c := range []struct {
		name     string
		flags    []string
		test     string
		cycles   string
		verdict  int
		evidence string // in what the test says
	}{
		{"a sound disk", nil, "KillNine", "20", 0, "PASS"},
		{"a disk that lies", []string{"-lie"}, "KillNine", "300", 1, "cycle "},
		{"a store that never syncs", nil, "NeverSyncs", "300", 0, "found in cycle"},
	} {
		for _, stack := range [][]string{nil, {"-ext4"}} {
			t.Run(strings.Join(append([]string{c.name}, stack...), " "), func(t *testing.T) {
				args := slices.Concat(stack, c.flags, []string{"--", killTest, "-test.v", "-test.run", c.test,
					"-cycles", c.cycles, "-dir", "{mount}", "-after-kill={cut}", "-test.timeout=100s"})
				tool := exec.Command(os.Args[0], args...)
				tool.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
				said, err := tool.CombinedOutput()
				if tool.ProcessState.ExitCode() != c.verdict || !bytes.Contains(said, []byte(c.evidence)) {
					t.Errorf("the tool ended with %v: %s", err, said)
				}
			})
		}
	}
}
