package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	dsnVariable  = "KEYSTATE_POSTGRES_DSN"
	mustVariable = "KEYSTATE_MUST_POSTGRES"

	superuser = "postgres"

	// No step of a server's life takes this long on a machine that is alive.
	patience = 30 * time.Second

	// A socket's path has little more than a hundred bytes; what the server appends to the folder's is taken off.
	longestFolder = 80
)

// A Server is a PostgreSQL server of a test's own. Its methods may be called from any goroutine, one at a time each.
type Server struct {
	programs programs
	account  *account
	folder   string
	port     int
	settings []string
	guard    *guard

	mu      sync.Mutex
	process *process // nil while it does not run
}

// An Option says how a server is set up.
type Option func(*setup)

type setup struct {
	settings []string
	initdb   []string
	listen   string
}

// FsyncOff takes the waiting for the disk out of every commit. Killed servers lose nothing by it: only a machine that
// stops does.
func FsyncOff(s *setup) { Set("fsync", "off")(s) }

// TCP has the server listen on a loopback port too.
func TCP(s *setup) { s.listen = "127.0.0.1" }

// SmallWAL makes segments of the write-ahead log as small as they can be, so that files can be limited below the
// usual 16 MB.
func SmallWAL(s *setup) { s.initdb = append(s.initdb, "--wal-segsize=1") }

// RemoteApply has a commit wait until a synchronous standby shows it, not only until it has it on its disk.
func RemoteApply(s *setup) { Set("synchronous_commit", "remote_apply")(s) }

// Set puts a setting on the server's command line.
func Set(name, value string) Option {
	return func(s *setup) { s.settings = append(s.settings, "-c", name+"="+value) }
}

// Start starts a server that ends with the test.
func Start(t testing.TB, opts ...Option) *Server {
	t.Helper()
	if os.Getenv(dsnVariable) != "" {
		missing(t, "this test needs a server of its own, and "+dsnVariable+" names another")
	}
	s, err := start(opts)
	if err != nil {
		unavailable(t, err)
	}
	s.endWith(t)
	return s
}

func unavailable(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, errNoPrograms) {
		missing(t, err.Error())
	}
	t.Fatal(err)
}

func missing(t testing.TB, why string) {
	t.Helper()
	if os.Getenv(mustVariable) == "1" {
		t.Fatalf("%s=1, but %s", mustVariable, why)
	}
	t.Skip(why)
}

func (s *Server) endWith(t testing.TB) {
	t.Cleanup(func() {
		t.Helper()
		if t.Failed() {
			s.report(t, 0, "")
		}
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
}

func start(opts []Option) (*Server, error) {
	s, how, err := prepare(opts)
	if err != nil {
		return nil, err
	}
	seed, err := seedFor(how.initdb)
	if err == nil {
		err = s.run("/bin/cp", "-R", seed, s.clusterFolder())
	}
	if err == nil {
		err = s.launchFirst(how)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// Clusters that were made but never ran. To copy one takes a fifth of the time to make one.
var seeds = struct {
	sync.Mutex
	servers map[string]*Server // by what was asked of initdb
}{servers: map[string]*Server{}}

// seedFor returns the folder of a cluster that never ran, which stays until the tests of the package end.
func seedFor(options []string) (string, error) {
	seeds.Lock()
	defer seeds.Unlock()
	key := strings.Join(options, " ")
	if s, ok := seeds.servers[key]; ok {
		return s.clusterFolder(), nil
	}
	s, _, err := prepare(nil)
	if err != nil {
		return "", err
	}
	if err := s.run(s.programs.path("initdb"), append([]string{"-D", s.clusterFolder(), "-U", superuser, "--auth=trust",
		"--encoding=UTF8", "--locale=C", "--no-sync"}, options...)...); err != nil {
		return "", errors.Join(err, s.close())
	}
	seeds.servers[key] = s
	return s.clusterFolder(), nil
}

func dropSeeds() error {
	seeds.Lock()
	defer seeds.Unlock()
	var failed error
	for _, s := range seeds.servers {
		failed = errors.Join(failed, s.close())
	}
	clear(seeds.servers)
	return failed
}

// prepare makes the place for a server, and whatever may go wrong from here on, the guard removes it.
func prepare(opts []Option) (*Server, *setup, error) {
	account, err := serverAccount()
	if err != nil {
		return nil, nil, err
	}
	programs, err := findPrograms()
	if err != nil {
		return nil, nil, err
	}
	folder, err := makeFolder(account)
	if err != nil {
		return nil, nil, err
	}
	guard, err := setGuard(folder)
	if err != nil {
		return nil, nil, errors.Join(err, os.Remove(folder))
	}
	how := &setup{}
	for _, opt := range opts {
		opt(how)
	}
	return &Server{programs: programs, account: account, folder: folder, guard: guard, port: 5432}, how, nil
}

func makeFolder(a *account) (string, error) {
	parent := os.TempDir()
	if len(parent) > longestFolder || !a.reaches(parent) {
		parent = "/tmp"
	}
	folder, err := os.MkdirTemp(parent, "pgtest")
	if err != nil {
		return "", fmt.Errorf("pgtest: %w", err)
	}
	if err := a.own(folder); err != nil {
		return "", errors.Join(fmt.Errorf("pgtest: give %s to %s: %w", folder, a.name, err), os.Remove(folder))
	}
	return folder, nil
}

func (s *Server) clusterFolder() string { return filepath.Join(s.folder, "cluster") }
func (s *Server) logPath() string       { return filepath.Join(s.folder, "log") }

func (s *Server) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Dir = s.folder
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.folder, "LC_ALL=C", "TZ=UTC"}
	runAs(cmd, s.account)
	return cmd
}

// run runs a program that comes to an end by itself.
func (s *Server) run(program string, args ...string) error {
	said, err := s.command(program, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("pgtest: %s %q: %w\n%s", program, args, err, said)
	}
	return nil
}

// launchFirst decides what the server listens on, and starts it. Between the choice of a free port and its use
// another may take it, so several are tried.
func (s *Server) launchFirst(how *setup) error {
	s.settings = slices.Concat([]string{
		"-D", s.clusterFolder(),
		"-c", "unix_socket_directories=" + s.folder,
		"-c", "listen_addresses=" + how.listen,
		"-c", "max_connections=300",
		"-c", "log_line_prefix=%m [%p] %q%d %a ",
	}, how.settings)
	if how.listen == "" {
		return s.launch()
	}
	var failed error
	for range 3 {
		port, err := freePort()
		if err != nil {
			return err
		}
		s.port = port
		if err := s.launch(); err == nil {
			return nil
		} else {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("pgtest: find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func (s *Server) launch() error {
	log, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer log.Close()
	cmd := s.command(s.programs.path("postgres"), append(s.settings, "-c", "port="+strconv.Itoa(s.port))...)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := launch(cmd)
	if err != nil {
		return err
	}
	if err := s.guard.watch(p.pid); err != nil {
		return errors.Join(err, p.stop(immediate))
	}
	if err := s.awaitReady(p); err != nil {
		return errors.Join(err, p.stop(immediate))
	}
	s.process = p
	return nil
}

func (s *Server) awaitReady(p *process) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		conn, err := pgx.Connect(ctx, s.DSN("postgres"))
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-p.done:
			return fmt.Errorf("pgtest: the server ended as it started: %w\n%s", p.err, s.lastLines())
		case <-ctx.Done():
			return fmt.Errorf("pgtest: the server does not answer: %w\n%s", err, s.lastLines())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// DSN names a database of the server, over its Unix socket.
func (s *Server) DSN(database string) string {
	return dsnOf(database, url.Values{"host": {s.folder}, "port": {strconv.Itoa(s.port)}})
}

// TCPDSN names a database of a server that was started with [TCP], over its port.
func (s *Server) TCPDSN(database string) string {
	return dsnOf(database, url.Values{"host": {"127.0.0.1"}, "port": {strconv.Itoa(s.port)}, "sslmode": {"disable"}})
}

func dsnOf(database string, query url.Values) string {
	u := url.URL{Scheme: "postgres", User: url.User(superuser), Path: "/" + database, RawQuery: query.Encode()}
	return u.String()
}

var errNotRunning = errors.New("pgtest: the server does not run")

// Kill ends the server as a crash does: every process of it is killed at once. What the machine has in memory of its
// files stays: it is not a power cut.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process == nil {
		return errNotRunning
	}
	if err := s.process.killAll(); err != nil {
		return err
	}
	s.process = nil
	return s.guard.watch(0)
}

// Freeze stops every process of the server where it is, until [Server.Thaw]: whoever asks it something gets no answer, and no error either. What is sent
// to it meanwhile is done when it goes on. A frozen server can be killed, but not stopped.
func (s *Server) Freeze() error { return s.withProcess((*process).freezeAll) }

// Thaw lets a frozen server go on.
func (s *Server) Thaw() error { return s.withProcess((*process).thawAll) }

func (s *Server) withProcess(do func(*process) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process == nil {
		return errNotRunning
	}
	return do(s.process)
}

// Stop shuts the server down in good order, as an operator does.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stop()
}

func (s *Server) stop() error {
	if s.process == nil {
		return nil
	}
	if err := s.process.stop(fast, immediate, syscall.SIGKILL); err != nil {
		return err
	}
	s.process = nil
	return s.guard.watch(0)
}

// Restart starts the server again, after a Kill or a Stop, or after shutting it down. It returns when the server
// answers.
func (s *Server) Restart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stop(); err != nil {
		return err
	}
	return s.launch()
}

// close ends the server and removes all it had.
func (s *Server) close() error {
	return errors.Join(s.Stop(), s.guard.release(s.folder))
}

// Terminate ends the connections of an application, named by the application_name of its DSN, as an operator does:
// their clients get error 57P01. It returns how many there were, when they are gone.
func (s *Server) Terminate(ctx context.Context, application string) (int, error) {
	return Terminate(ctx, s.DSN("postgres"), application)
}

// Terminate is [Server.Terminate] for any server.
func Terminate(ctx context.Context, dsn, application string) (int, error) {
	var ended int
	err := onConn(ctx, dsn, func(conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, $2))
			FROM pg_stat_activity WHERE application_name = $1 AND pid <> pg_backend_pid()`,
			application, patience.Milliseconds()).Scan(&ended)
	})
	if err != nil {
		return 0, fmt.Errorf("pgtest: terminate %s: %w", application, err)
	}
	return ended, nil
}

func onConn(ctx context.Context, dsn string, do func(*pgx.Conn) error) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return do(conn)
}

const block = 8192 // the server writes its files by blocks of this size

// LimitFiles lets no file of the server grow beyond a size, until UnlimitFiles. A table that would is refused with
// error 53100, as on a full disk: the limit lies in the midst of a block, and PostgreSQL takes a block of which only
// a part could be written for the end of the disk. Below the size of a segment of the write-ahead log (16 MB, 1 MB
// with SmallWAL), the server fails as one whose log has no room: it crashes, and does not come up again while the
// limit stands. It takes the program prlimit, which Linux has: elsewhere the error is [errors.ErrUnsupported].
func (s *Server) LimitFiles(size uint64) error {
	return s.limitFiles(strconv.FormatUint(size/block*block+block/2, 10))
}

// UnlimitFiles takes away the limit that LimitFiles set.
func (s *Server) UnlimitFiles() error { return s.limitFiles("unlimited") }

func (s *Server) limitFiles(limit string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process == nil {
		return errNotRunning
	}
	all, err := processes()
	if err != nil {
		return err
	}
	if err := s.limitProcess(s.process.pid, limit); err != nil { // first, so that children who come meanwhile have it too
		return err
	}
	for _, l := range all {
		if l.parent == s.process.pid && l.state != 'Z' {
			if err := s.limitProcess(l.pid, limit); err != nil && signalProcess(l.pid, 0) == nil {
				return err
			}
		}
	}
	return nil
}

// limitProcess sets a limit by a program that runs as the server does: even root may need a privilege to do it to
// another's process.
func (s *Server) limitProcess(pid int, limit string) error {
	prlimit, err := exec.LookPath("prlimit")
	if err != nil {
		return fmt.Errorf("pgtest: limit the server's files: %w: %w", errors.ErrUnsupported, err)
	}
	return s.run(prlimit, "--pid", strconv.Itoa(pid), "--fsize="+limit+":")
}
