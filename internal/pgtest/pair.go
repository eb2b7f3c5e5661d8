package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// A Pair is a primary and a standby without which it acknowledges nothing.
type Pair struct {
	Primary, Standby *Server

	hosts [2]*Server // as the DSN names them
}

// StartPair starts a pair that ends with the test. An acknowledged commit is on the disk of both, or, with
// [RemoteApply], can also be read on the standby.
func StartPair(t testing.TB, opts ...Option) *Pair {
	t.Helper()
	primary := Start(t, opts...)
	standby, err := startStandby(primary, opts)
	if err != nil {
		t.Fatal(err)
	}
	standby.endWith(t)
	p := &Pair{Primary: primary, Standby: standby, hosts: [2]*Server{primary, standby}}
	if err := p.synchronize(t.Context()); err != nil {
		t.Fatal(err)
	}
	return p
}

func startStandby(primary *Server, opts []Option) (*Server, error) {
	s, how, err := prepare(opts)
	if err != nil {
		return nil, err
	}
	if err = s.copyOf(primary); err == nil {
		err = s.launchFirst(how)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// copyOf fills the cluster's folder with a copy of a primary, which is a standby when it is started.
func (s *Server) copyOf(primary *Server) error {
	from := fmt.Sprintf("host=%s port=%d user=%s application_name=standby", primary.folder, primary.port, superuser)
	return s.run(s.programs.path("pg_basebackup"), "-D", s.clusterFolder(), "-R", "-X", "stream", "-c", "fast",
		"--no-sync", "-d", from)
}

// synchronize has the primary wait for the standby from now on. It does so after the standby was copied, which
// therefore waits for nobody once it is promoted.
func (p *Pair) synchronize(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := onConn(ctx, p.Primary.DSN("postgres"), func(conn *pgx.Conn) error {
		for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"} {
			if _, err := conn.Exec(ctx, sql); err != nil {
				return err
			}
		}
		for {
			var synchronous bool
			err := conn.QueryRow(ctx, "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync'").Scan(&synchronous)
			if err != nil || synchronous {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	if err != nil {
		return fmt.Errorf("pgtest: the standby does not become synchronous: %w", err)
	}
	return nil
}

// Promote makes the standby a primary, and returns when it takes writes. The old primary is to be killed before:
// pgtest does not keep two primaries from being written to.
func (p *Pair) Promote(ctx context.Context) error {
	var promoted bool
	err := onConn(ctx, p.Standby.DSN("postgres"), func(conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT pg_promote(true, $1)", int(patience.Seconds())).Scan(&promoted)
	})
	if err == nil && !promoted {
		err = errors.New("it takes too long")
	}
	if err != nil {
		return fmt.Errorf("pgtest: promote the standby: %w", err)
	}
	return nil
}

// Rejoin makes the killed primary a standby of the promoted one, and swaps the two: the pair is as it was at first, and
// its DSN stays the same.
func (p *Pair) Rejoin(ctx context.Context) error {
	p.Primary, p.Standby = p.Standby, p.Primary
	err := p.Standby.run("/bin/rm", "-r", p.Standby.clusterFolder())
	if err == nil {
		err = p.Standby.copyOf(p.Primary)
	}
	if err == nil {
		err = p.Standby.Restart()
	}
	if err != nil {
		return fmt.Errorf("pgtest: rejoin the old primary: %w", err)
	}
	return p.synchronize(ctx)
}

// DSN names a database on whichever of the two takes writes.
func (p *Pair) DSN(database string) string {
	return dsnOf(database, url.Values{
		"host":                 {p.hosts[0].folder + "," + p.hosts[1].folder},
		"port":                 {strconv.Itoa(p.hosts[0].port) + "," + strconv.Itoa(p.hosts[1].port)},
		"target_session_attrs": {"read-write"},
	})
}

// Database makes an empty database, and returns its DSN on whichever of the two takes writes.
func (p *Pair) Database(t testing.TB) string {
	t.Helper()
	return p.DSN(createDatabase(t, p.Primary.DSN("postgres"), nil))
}
