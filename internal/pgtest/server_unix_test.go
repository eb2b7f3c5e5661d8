//go:build unix

package pgtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// asProcess names the test that this process, started by another test, is to run for it.
const asProcess = "PGTEST_PROCESS"

// inProcess tells whether a test that only makes sense in a process of its own runs in one.
func inProcess(t *testing.T) bool { return os.Getenv(asProcess) == t.Name() }

// processOf is a process that runs one test of this package.
func processOf(test string, env ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-test.run=^"+test+"$", "-test.v")
	cmd.Env = append(os.Environ(), append(env, asProcess+"="+test)...)
	return cmd
}

// lineAfter waits for a line that begins with a word, and returns the rest.
func lineAfter(t *testing.T, out io.Reader, word string) string {
	t.Helper()
	var all strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), word+" "); ok {
			return rest
		}
		fmt.Fprintln(&all, lines.Text())
	}
	t.Fatalf("no line %q in\n%s", word, &all)
	return ""
}

func gone(folder string) bool {
	_, err := os.Lstat(folder)
	return errors.Is(err, fs.ErrNotExist)
}

// family is a running server's processes.
func family(t *testing.T, pid int) []int {
	t.Helper()
	all, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	pids := []int{pid}
	for _, l := range all {
		if l.parent == pid {
			pids = append(pids, l.pid)
		}
	}
	if len(pids) < 3 {
		t.Fatalf("a server of %d processes", len(pids))
	}
	return pids
}

func anyRuns(t *testing.T, pids []int) bool {
	t.Helper()
	all, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if l, ok := all[pid]; ok && l.state != 'Z' {
			return true
		}
	}
	return false
}

func TestServerLeavesNothingBehind(t *testing.T) {
	for name, end := range map[string]func(*Server) error{
		"running": func(*Server) error { return nil },
		"stopped": (*Server).Stop,
		"killed":  (*Server).Kill,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var folder string
			var pids []int
			t.Run("server", func(t *testing.T) {
				s := Start(t, FsyncOff)
				folder, pids = s.folder, append(family(t, s.process.pid), s.guard.process.pid)
				if count(t, connect(t, s.Database(t)), "SELECT 1") != 1 || gone(folder) {
					t.Fatal("it never was")
				}
				if err := end(s); err != nil {
					t.Fatal(err)
				}
			})
			if t.Failed() || folder == "" {
				return
			}
			if !gone(folder) || anyRuns(t, pids) {
				t.Errorf("left: folder %t, processes %t", !gone(folder), anyRuns(t, pids))
			}
		})
	}
}

func TestServerEndsWithAProcessThatIsKilledOrPanics(t *testing.T) {
	for _, end := range []string{"is killed", "panics"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			cmd := processOf("TestServerOfAProcessThatEndsBadly")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			folder, pid, _ := strings.Cut(lineAfter(t, out, "server"), " ")
			if folder == "none" {
				t.Skip("no server programs")
			}
			postmaster, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			pids := family(t, postmaster)
			if end == "panics" {
				in.Close()
			} else if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "nothing of the server is left", func() bool { return gone(folder) && !anyRuns(t, pids) })
		})
	}
}

func TestGuardEndsWhatItWatchesLast(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "guarded")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	guard, err := setGuard(folder)
	if err != nil {
		t.Fatal(err)
	}
	var sleepers []*process
	for range 2 {
		sleep := exec.Command("/bin/sleep", "600")
		runAs(sleep, nil)
		p, err := launch(sleep)
		if err != nil {
			t.Fatal(err)
		}
		defer p.stop(syscall.SIGKILL)
		if err := guard.watch(p.pid); err != nil {
			t.Fatal(err)
		}
		sleepers = append(sleepers, p)
	}
	if err := guard.release(folder); err != nil {
		t.Error(err)
	}
	<-sleepers[1].done
	if err := sleepers[0].signal(0); err != nil {
		t.Errorf("what it watched before: %v", err)
	}
}

func TestServerOfAProcessThatEndsBadly(t *testing.T) {
	if !inProcess(t) {
		return
	}
	t.Cleanup(func() {
		if t.Skipped() {
			fmt.Println("\nserver none")
		}
	})
	s := Start(t, FsyncOff)
	fmt.Printf("\nserver %s %d\n", s.folder, s.process.pid)
	os.Stdin.Read(make([]byte, 1))
	panic("as it is meant to")
}

func TestWhatNoDatabaseCanTellSkipsTestsOrFailsThem(t *testing.T) {
	for must, word := range map[string]string{"": "--- SKIP", "1": "--- FAIL"} {
		for _, test := range []string{"TestServerWithoutPrograms", "TestDatabaseWithoutPrograms"} {
			cmd := processOf(test, mustVariable+"="+must, dsnVariable+"=", "PATH=")
			out, err := cmd.CombinedOutput()
			said := string(out)
			failed, howToGetThem := err != nil, strings.Contains(said, "apt-get install postgresql")
			if !strings.Contains(said, word) || !howToGetThem || failed != (must == "1") {
				t.Errorf("%s with %s=%q: %v\n%s", test, mustVariable, must, err, said)
			}
		}
	}
}

func TestServerWithoutPrograms(t *testing.T) {
	if !inProcess(t) {
		return
	}
	programFolders = nil
	Start(t)
}

func TestDatabaseWithoutPrograms(t *testing.T) {
	if !inProcess(t) {
		return
	}
	programFolders = nil
	Database(t)
}

func TestExistingServerIsUsedAndLeftAsItWas(t *testing.T) {
	s := Start(t, FsyncOff)
	conn := connect(t, s.DSN("postgres"))
	existing := dsnVariable + "=" + s.DSN("postgres")
	out, err := processOf("TestDatabasesOfAnExistingServer", existing, "PGTEST_FOLDER="+s.folder).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
	left := "SELECT count(*) FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1')"
	if n := count(t, conn, left); n != 0 {
		t.Errorf("%d databases are left", n)
	}
	out, _ = processOf("TestServerWithoutPrograms", existing).CombinedOutput()
	if !strings.Contains(string(out), "names another") {
		t.Errorf("no reason why:\n%s", out)
	}
}

func TestDatabasesOfAnExistingServer(t *testing.T) {
	if !inProcess(t) {
		return
	}
	filled := NewTemplate(func(ctx context.Context, dsn string) error {
		return onConn(ctx, dsn, func(conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, "CREATE TABLE t (n int)")
			return err
		})
	})
	for _, dsn := range []string{Database(t), filled.Database(t), filled.Database(t)} {
		var folder string
		if err := connect(t, dsn).QueryRow(t.Context(), "SHOW unix_socket_directories").Scan(&folder); err != nil {
			t.Fatal(err)
		}
		if folder != os.Getenv("PGTEST_FOLDER") {
			t.Errorf("%s is on the server in %s", dsn, folder)
		}
	}
}

func TestServerDoesNotRunAsRoot(t *testing.T) {
	s := Start(t, FsyncOff)
	info, err := os.Stat(s.clusterFolder())
	if err != nil {
		t.Fatal(err)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner == 0 {
		t.Error("it does")
	}
}

func TestKilledServerKeepsWhatWasCommittedAndNothingElse(t *testing.T) {
	t.Parallel()
	s := Start(t)
	dsn := s.Database(t)
	conn := connect(t, dsn)
	exec1(t, conn, "CREATE TABLE t (n int PRIMARY KEY)")
	exec1(t, conn, "INSERT INTO t VALUES (1)")
	exec1(t, conn, "BEGIN")
	exec1(t, conn, "INSERT INTO t VALUES (2)")
	busy := connect(t, With(dsn, "application_name", "busy"))
	go busy.Exec(context.Background(), "SELECT count(*) FROM generate_series(1, 1e12)") // never waits for anything
	other := connect(t, dsn)                                                            // in a transaction, what is active does not change
	eventually(t, "the server is busy", func() bool {
		return count(t, other, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'busy' AND state = 'active'") == 1
	})

	pids := family(t, s.process.pid)
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if anyRuns(t, pids) {
		t.Error("a process of it still runs")
	}
	if _, err := conn.Exec(t.Context(), "COMMIT"); err == nil {
		t.Error("a killed server commits")
	}
	if err := s.Kill(); !errors.Is(err, errNotRunning) {
		t.Errorf("killed twice: %v", err)
	}
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	conn = connect(t, dsn)
	committed := count(t, conn, "SELECT count(*) FROM t WHERE n = 1")
	uncommitted := count(t, conn, "SELECT count(*) FROM t WHERE n <> 1")
	if committed != 1 || uncommitted != 0 {
		t.Errorf("%d committed, %d uncommitted", committed, uncommitted)
	}
}

func TestRestartShutsDownInGoodOrder(t *testing.T) {
	t.Parallel()
	s := Start(t, FsyncOff)
	conn := connect(t, s.Database(t))
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Error("an old connection lives on")
	}
	log, err := os.ReadFile(s.logPath())
	if err != nil {
		t.Fatal(err)
	}
	crashed := strings.Contains(string(log), "not properly shut down")
	shut := strings.Contains(string(log), "database system is shut down")
	if crashed || !shut {
		t.Errorf("it was no shutdown:\n%s", log)
	}
}

func TestServerListensOnALoopbackPortWhereAskedTo(t *testing.T) {
	t.Parallel()
	s := Start(t, FsyncOff, TCP)
	byPort := "SELECT count(*) FROM pg_stat_activity WHERE pid = pg_backend_pid() AND client_addr = '127.0.0.1'"
	if n := count(t, connect(t, s.TCPDSN("postgres")), byPort); n != 1 {
		t.Error("it is not by the port that it is reached")
	}
}

func TestSettingsAreTheProductionOnesUnlessAskedForOthers(t *testing.T) {
	t.Parallel()
	setting := func(s *Server, name string) (value string) {
		if err := connect(t, s.DSN("postgres")).QueryRow(t.Context(), "SHOW "+name).Scan(&value); err != nil {
			t.Fatal(err)
		}
		return value
	}
	plain, asked := Start(t), Start(t, FsyncOff, Set("max_connections", "20"))
	for _, c := range []struct{ name, plain, asked string }{
		{"fsync", "on", "off"},
		{"synchronous_commit", "on", "on"},
		{"full_page_writes", "on", "on"},
		{"max_connections", "300", "20"},
		{"server_encoding", "UTF8", "UTF8"},
	} {
		if p, a := setting(plain, c.name), setting(asked, c.name); p != c.plain || a != c.asked {
			t.Errorf("%s: %s and %s, not %s and %s", c.name, p, a, c.plain, c.asked)
		}
	}
}

func TestFullDiskRefusesWhatGrowsAndHarmsNothing(t *testing.T) {
	t.Parallel()
	s := Start(t, FsyncOff, SmallWAL)
	dsn := s.Database(t)
	conn := connect(t, dsn)
	exec1(t, conn, "CREATE TABLE t (n int, ballast text)")
	exec1(t, conn, "INSERT INTO t VALUES (0, '')")
	if err := s.LimitFiles(2 << 20); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	grow := "INSERT INTO t SELECT 1, repeat('x', 1000) FROM generate_series(1, 10000)"
	for range 2 {
		if _, err := conn.Exec(t.Context(), grow); codeOf(err) != "53100" {
			t.Errorf("a table that grows over the limit: %v", err)
		}
	}
	exec1(t, conn, "UPDATE t SET ballast = 'y' WHERE n = 0")
	if _, err := connect(t, dsn).Exec(t.Context(), grow); codeOf(err) != "53100" {
		t.Errorf("on a connection made under the limit: %v", err)
	}
	if err := s.UnlimitFiles(); err != nil {
		t.Fatal(err)
	}
	exec1(t, conn, grow)
	if n := count(t, conn, "SELECT count(*) FROM t"); n != 10001 {
		t.Errorf("%d rows", n)
	}
}

func TestServerWhoseLogHasNoRoomCrashesAndKeepsWhatWasCommitted(t *testing.T) {
	t.Parallel()
	s := Start(t, FsyncOff, SmallWAL)
	dsn := s.Database(t)
	conn := connect(t, dsn)
	exec1(t, conn, "CREATE TABLE t (n int)")
	if err := s.LimitFiles(512 << 10); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; ; n++ {
		if n == 10000 {
			t.Fatal("there is always room")
		}
		if _, err := conn.Exec(t.Context(), "SELECT pg_logical_emit_message(true, '', repeat('x', 10000))"); err != nil {
			break
		}
		if _, err := conn.Exec(t.Context(), "INSERT INTO t VALUES ($1)", n); err != nil {
			break
		}
	}
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	if kept := count(t, connect(t, dsn), "SELECT count(*) FROM t WHERE n < $1", n); kept != n {
		t.Errorf("of %d rows, %d are there", n, kept)
	}
	log, err := os.ReadFile(s.logPath())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "PANIC") {
		t.Errorf("it did not crash:\n%s", end(log))
	}
}

func TestFrozenServerAnswersNothingAndDoesWhatWasAskedWhenItGoesOn(t *testing.T) {
	t.Parallel()
	s := Start(t, FsyncOff)
	conn := connect(t, s.Database(t))
	exec1(t, conn, "CREATE TABLE t (n int)")
	if err := s.Freeze(); err != nil {
		t.Fatal(err)
	}
	asked := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "INSERT INTO t VALUES (1)")
		asked <- err
	}()
	select {
	case err := <-asked:
		t.Errorf("it answers: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := s.Thaw(); err != nil {
		t.Fatal(err)
	}
	if err := <-asked; err != nil || rows(t, conn) != 1 {
		t.Errorf("it has not done what it was asked: %v", err)
	}
}
