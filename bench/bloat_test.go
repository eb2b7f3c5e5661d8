package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/internal/pgtest"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

var (
	flagRequests  = flag.Int("requests", 200_000, "requests of one measurement of bloat")
	flagRetention = flag.Duration("retention", 5*time.Second, "how long finished keys are kept in a measurement of bloat")
	flagIsolation = flag.String("isolation", string(pgx.Serializable), "the store's in a measurement of bloat")
	flagNaptime   = flag.String("naptime", "1min", "the server's autovacuum_naptime in a measurement of bloat")
	flagKeys      = flag.String("keys", "minted", "how keys are made in a measurement of bloat: minted (UUIDv7), or random (UUIDv4)")
)

// BenchmarkBloat makes many requests whose keys are reaped soon after, with autovacuum as PostgreSQL has it by default (-naptime changes how often it looks), and prints what the
// table of keys and its indexes have grown to, and how many updates touched no index (HOT), with different fillfactors. The three-phase
// request updates its row once, and that update finishes it; the request with three effects updates it three times.
//
//	go test -C bench -run '^$' -bench Bloat -benchtime 1x -timeout 60m .
func BenchmarkBloat(b *testing.B) {
	b.Run("three phases", func(b *testing.B) { bloat(b, phases(writeRow)) })
	b.Run("three effects", func(b *testing.B) { bloat(b, threeEffects()) })
}

func bloat(b *testing.B, phases []keystate.Phase[pgx.Tx, order]) {
	requests, retention := *flagRequests, *flagRetention
	if testing.Short() {
		requests, retention = 100, 50*time.Millisecond
	}
	server, err := startServer(pgtest.Set("autovacuum_naptime", *flagNaptime))
	if errors.Is(err, errNoServer) {
		b.Skip(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	defer server.stop()
	on, err := server.describe()
	if err != nil {
		b.Fatal(err)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s\n%d requests by 16 callers, %s, keys %s and kept for %v\n\n", on,
		requests, *flagIsolation, *flagKeys, retention)
	text.WriteString("| fillfactor | requests/s | inserted | updated | of them HOT | deleted | rows at the end | dead | table at its largest | at the end |" +
		" live rows of it | indexes at the end | autovacuums |\n|" + strings.Repeat("---:|", 13) + "\n")
	for _, fillfactor := range []int{100, 70, 50} {
		row := grow(b, server.Server.Database(b), phases, fillfactor, requests, retention)
		fmt.Printf("# %d: %s\n", fillfactor, row)
		fmt.Fprintf(&text, "| %d | %s |\n", fillfactor, row)
	}
	b.ReportMetric(0, "ns/op")
	fmt.Println(text.String())
}

func threeEffects() []keystate.Phase[pgx.Tx, order] {
	all := phases(writeRow)
	var three []keystate.Phase[pgx.Tx, order]
	for i := range 3 {
		three = append(three,
			keystate.Phase[pgx.Tx, order]{To: keystate.RecoveryPoint(fmt.Sprintf("noted_%d", i)), Commit: func(ctx context.Context, tx pgx.Tx, s *order) error {
				return writeRow(ctx, tx, fmt.Sprintf("%s/%d", s.Account, i))
			}},
			keystate.Phase[pgx.Tx, order]{To: keystate.RecoveryPoint(fmt.Sprintf("sent_%d", i)), Effect: all[1].Effect})
	}
	return append(three, all[2])
}

// makeSome has so many callers make so many requests between them.
func makeSome(b *testing.B, s station, callers, requests int) pace {
	b.Helper()
	newID := keystate.NewID
	if *flagKeys == "random" {
		newID = uuid.NewString
	}
	var begun atomic.Int64
	p, err := race(s, callers, func() (string, bool) { return newID(), begun.Add(1) <= int64(requests) })
	if err := joinClose(err, s); err != nil {
		b.Fatal(err)
	}
	return p
}

func opening(b *testing.B, dsn string, connections int, isolation pgx.TxIsoLevel, phases []keystate.Phase[pgx.Tx, order], o keystate.Options) station {
	b.Helper()
	e, err := openPGEngine(place{dsn: dsn, connections: connections}, isolation, phases, o)
	if err != nil {
		b.Fatal(err)
	}
	return e
}

// grow makes the requests, and describes what is left of them.
func grow(b *testing.B, dsn string, phases []keystate.Phase[pgx.Tx, order], fillfactor, requests int, retention time.Duration) string {
	b.Helper()
	// The first makes the tables, and a key: an engine that opens an empty store looks for what to reap after a minute.
	makeSome(b, opening(b, dsn, 4, pgx.Serializable, phases, keystate.Options{}), 1, 1)
	err := onServerConn(dsn, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, fmt.Sprintf("ALTER TABLE %s SET (fillfactor = %d)", keysTable, fillfactor))
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	largest := make(chan int64)
	ended := make(chan struct{})
	go func() { largest <- watchSize(b, dsn, ended) }()
	p := makeSome(b, opening(b, dsn, 16, pgx.TxIsoLevel(*flagIsolation), phases, keystate.Options{Retention: retention}), 16, requests)
	close(ended)
	peak := <-largest
	figures := pgtest.TakeFigures(b, dsn).Tables[keysTable]
	peak = max(peak, figures.TableBytes)

	var rows, live, vacuums int64
	var indexes string
	err = onServerConn(dsn, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT count(*), coalesce(sum(pg_column_size(k.*)), 0),
		(SELECT autovacuum_count FROM pg_stat_user_tables WHERE relid = $1::text::regclass),
		(SELECT string_agg(format('%s %s', (SELECT relname FROM pg_class WHERE oid = indexrelid), pg_size_pretty(pg_relation_size(indexrelid))), ', ' ORDER BY indexrelid) FROM pg_index WHERE indrelid = $1::text::regclass)
		FROM `+keysTable+` k`, keysTable).Scan(&rows, &live, &vacuums, &indexes)
	})
	if err != nil {
		b.Fatal(err)
	}
	return fmt.Sprintf("%.0f | %d | %d | %.0f %% | %d | %d | %d | %s | %s | %s | %s | %d",
		p.rate(), figures.Inserted, figures.Updated, 100*float64(figures.HotUpdated)/float64(max(1, figures.Updated)), figures.Deleted,
		rows, figures.Dead, megabytes(peak), megabytes(figures.TableBytes), megabytes(live), indexes, vacuums)
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/(1<<20)) }

// watchSize looks how large the table becomes.
func watchSize(b *testing.B, dsn string, ended <-chan struct{}) (largest int64) {
	conn, err := pgx.Connect(context.Background(), dsn)
	if err != nil {
		b.Error(err)
		return 0
	}
	defer conn.Close(context.Background())
	for {
		var size int64
		if err := conn.QueryRow(context.Background(), `SELECT pg_table_size($1)`, keysTable).Scan(&size); err != nil {
			b.Error(err)
			return largest
		}
		largest = max(largest, size)
		select {
		case <-ended:
			return largest
		case <-time.After(500 * time.Millisecond):
		}
	}
}
