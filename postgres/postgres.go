package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"example.com/keystate"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Options tune a store. The zero value, and nil, mean the defaults.
type Options struct {
	// Schema is where the tables are. Default: "keystate".
	Schema string

	// Prefix stands before the names of the tables. Default: none.
	Prefix string

	// Isolation is that of the transactions of commits and updates. Below Serializable, what a phase reads may have changed by the time
	// it commits, unless it locks it. Default: pgx.Serializable.
	Isolation pgx.TxIsoLevel

	// Lease is how long an engine counts as alive after it last said so, by the server's clock: how long it takes until another one
	// takes over the keys of one that died. Default: 10 s.
	Lease time.Duration

	// RetryTimeout is how long a transaction is run again and again, from its first failure, that the server ends because of others (40001,
	// 40P01), or whose connection is lost: how long the server may be away, for a restart or a failover, before callers hear of it. Default: 30 s;
	// negative: it is not run again.
	RetryTimeout time.Duration

	// TransactionTimeout is how long one run of a transaction may take, and how long a connection is waited for. Then the connection is given up as a lost
	// one is: a server that is frozen, or a network that swallows what is sent, never says that it is. A phase's Commit that takes
	// longer never takes effect. It must be enough to connect by way of hosts that do not answer. Default: 30 s; negative: for ever.
	TransactionTimeout time.Duration

	// NoMigration leaves the tables to the program's own migrations, see [Schema]. Default: the store makes them.
	NoMigration bool

	// Logger gets what an operator should know. Default: slog.Default().
	Logger *slog.Logger
}

func (o *Options) orDefault() (Options, error) {
	if o == nil {
		o = new(Options)
	}
	d := *o
	d.Schema = cmp.Or(d.Schema, "keystate")
	d.Isolation = cmp.Or(d.Isolation, pgx.Serializable)
	d.Lease = cmp.Or(d.Lease, 10*time.Second)
	d.RetryTimeout = cmp.Or(d.RetryTimeout, 30*time.Second)
	d.TransactionTimeout = cmp.Or(d.TransactionTimeout, 30*time.Second)
	d.Logger = cmp.Or(d.Logger, slog.Default())
	var faults []error
	if d.Lease < 0 {
		faults = append(faults, errors.New("keystate/postgres: Options.Lease must not be negative"))
	}
	switch d.Isolation {
	case pgx.Serializable, pgx.RepeatableRead, pgx.ReadCommitted:
	default:
		faults = append(faults, fmt.Errorf("keystate/postgres: Options.Isolation is %q", d.Isolation))
	}
	return d, errors.Join(faults...)
}

// A Store keeps keys in PostgreSQL. It is a [keystate.SharedStore]: any number of engines may have the same tables open. It is safe for
// concurrent use.
type Store struct {
	pool    *pgxpool.Pool
	owned   bool // Close closes the pool
	options Options
	sql     statements
	epoch   uint64

	mu     sync.Mutex
	closed bool
	ctx    context.Context // ends at Close
	cancel context.CancelFunc
}

// Open connects to a database and makes the tables if they are not there. The connection string is pgx's: a URL or key=value pairs, with pool_max_conns
// and the like, several hosts and target_session_attrs=read-write for a primary that moves.
func Open(ctx context.Context, dsn string, opts *Options) (*Store, error) {
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("keystate/postgres: %w", err)
	}
	config.ConnConfig.ConnectTimeout = cmp.Or(config.ConnConfig.ConnectTimeout, greeting)
	config.PingTimeout = cmp.Or(config.PingTimeout, greeting)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("keystate/postgres: %w", err)
	}
	s, err := New(ctx, pool, opts)
	if err != nil {
		pool.Close()
		return nil, err
	}
	s.owned = true
	return s, nil
}

// greeting is how long a host may take to answer, unless the connection string has a connect_timeout: then the next host is asked.
const greeting = 10 * time.Second

// New is Open on a pool that the program has. Closing the store leaves it open. Its connections should have a connect_timeout, or a host that is frozen is
// asked for two minutes before the next one, and a PingTimeout.
func New(ctx context.Context, pool *pgxpool.Pool, opts *Options) (*Store, error) {
	o, err := opts.orDefault()
	if err != nil {
		return nil, err
	}
	s := &Store{pool: pool, options: o, sql: statementsFor(o)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if !o.NoMigration {
		if err := Migrate(ctx, pool, &o); err != nil {
			return nil, err
		}
	}
	return s, s.warn(ctx)
}

// warn tells of settings with which an acknowledged answer may be lost.
func (s *Store) warn(ctx context.Context) error {
	var commit, names string
	var standbys int
	err := s.pool.QueryRow(ctx, `SELECT current_setting('synchronous_commit'), current_setting('synchronous_standby_names'), (SELECT count(*) FROM pg_stat_replication)`).
		Scan(&commit, &names, &standbys)
	if err != nil {
		return s.meaning(err)
	}
	if commit == "off" {
		s.options.Logger.Warn("keystate/postgres: synchronous_commit is off: a crash of the server can lose answers that were given")
	}
	if standbys > 0 && (names == "" || commit == "local") {
		s.options.Logger.Warn("keystate/postgres: the standby is asynchronous: a failover can lose answers that were given")
	}
	return nil
}

// Close says goodbye, so that others take over at once what this boot holds, and ends the connections that Open made.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	err := s.leave()
	if s.owned {
		err = errors.Join(err, s.closePool())
	}
	return err
}

// closePool waits for connections that are out, but not for ever: a commit that does not end has one.
func (s *Store) closePool() error {
	closed := make(chan struct{})
	go func() {
		s.pool.Close()
		close(closed)
	}()
	select {
	case <-closed:
		return nil
	case <-time.After(farewell):
		return fmt.Errorf("keystate/postgres: closed although %d connections are in use", s.pool.Stat().AcquiredConns())
	}
}

// open says whether the store is.
func (s *Store) open() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return keystate.ErrClosed
	}
	return nil
}
