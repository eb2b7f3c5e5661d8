package pgbench

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/keystate"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// BenchmarkFinishedKeys makes the three-phase request on a database with ten million finished keys, in turns with one that has none, on
// the same server: with keys that clients drew at random (UUIDv4), and with keys in the order of time (UUIDv7). It takes some 15 GB of
// disk while it runs.
//
//	go test -run '^$' -bench FinishedKeys -benchtime 1x -timeout 60m .
func BenchmarkFinishedKeys(b *testing.B) {
	b.Run("random", func(b *testing.B) { besideNone(b, uuid.NewString, randomID) })
	b.Run("ordered", func(b *testing.B) { besideNone(b, keystate.NewID, orderedID) })
}

func besideNone(b *testing.B, newID func() string, pastID func(time.Time) string) {
	turns, slice, keys, callers := *flagTurns, *flagSlice, *flagFinished, []int{1, 64}
	if testing.Short() {
		turns, slice, keys, callers = 1, 30*time.Millisecond, 2_000, []int{1, 16}
	}
	server := startServer(b)
	none, full := server.Database(b), server.Database(b)
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s%s\n", describe(b, server.DSN("postgres")), load(b, full, keys, pastID))
	fmt.Fprintf(&text, "\n| | callers | requests/s, none | requests/s, full | share | WAL bytes, none | full | rollbacks, none | full |\n|---|%s\n", strings.Repeat("---:|", 8))
	for _, c := range contenders[:2] { // this store, in two isolations
		for _, n := range callers {
			connections := min(flagPools[len(flagPools)-1], max(flagPools[0], n/2))
			pair := []*runner{{contender: c, dsn: none, connections: connections}, {contender: c, dsn: full, connections: connections}}
			for turn := range turns {
				for i := range pair {
					pair[(turn+i)%2].takeTurnWith(b, n, slice, newID)
				}
			}
			var shares []float64
			for turn, rate := range pair[1].rates {
				shares = append(shares, 100*rate/pair[0].rates[turn])
			}
			each := func(n int64, r *runner) float64 { return float64(n) / float64(r.requests) }
			fmt.Fprintf(&text, "| %s | %d | %.0f | %.0f | %.0f %% | %.0f | %.0f | %.2f | %.2f |\n", c.name, n, median(pair[0].rates), median(pair[1].rates), median(shares),
				each(pair[0].counted.WALBytes, pair[0]), each(pair[1].counted.WALBytes, pair[1]),
				each(pair[0].counted.Rollbacks, pair[0]), each(pair[1].counted.Rollbacks, pair[1]))
			b.ReportMetric(median(shares), fmt.Sprintf("%%-of-none-%s-%d", strings.ReplaceAll(c.name, " ", "-"), n))
		}
	}
	b.ReportMetric(0, "ns/op")
	fmt.Println(text.String())
}

func randomID(time.Time) string { return uuid.NewString() }

// orderedID is a UUIDv7 as it was made then.
func orderedID(at time.Time) string {
	id := uuid.New()
	ms := at.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	id[6] = id[6]&0x0f | 0x70
	return id.String()
}

const keysTable = "keystate.keys"

// load fills a database with finished keys, as if they had finished within the last two days at an even pace, and says what that took. The engine makes the first; the
// others are copies of its row and its record, each with an ID, a state, an incarnation and a number of its own.
func load(b *testing.B, dsn string, keys int, newID func(time.Time) string) string {
	b.Helper()
	began := time.Now()
	e := newEngine(b, dsn, 4, pgx.Serializable, threePhases, keystate.Options{})
	first := keystate.NewID()
	if _, err := e.request(b.Context(), first); err != nil {
		b.Fatal(err)
	}
	record, err := e.engine.Key(b.Context(), keystate.Key{Scope: "bench", ID: first})
	if err != nil {
		b.Fatal(err)
	}
	e.close()
	columns, row := firstRow(b, dsn)
	execute(b, dsn, "ALTER TABLE "+keysTable+" SET (autovacuum_enabled = false)")
	indexes := dropIndexes(b, dsn)
	copyKeys(b, dsn, columns, row, record, keys, newID)
	copied := time.Since(began)
	execute(b, dsn, indexes...)
	execute(b, dsn, "ALTER TABLE "+keysTable+" RESET (autovacuum_enabled)", "VACUUM ANALYZE "+keysTable, "CHECKPOINT")
	took := time.Since(began)
	readSome(b, dsn, keys)

	conn := connect(b, dsn)
	defer conn.Close(context.Background())
	var found, table, index int64
	err = conn.QueryRow(b.Context(), `SELECT (SELECT count(*) FROM `+keysTable+` WHERE finished IS NOT NULL), pg_table_size($1), pg_indexes_size($1)`, keysTable).Scan(&found, &table, &index)
	if err != nil || found != int64(keys)+1 {
		b.Fatalf("%d finished keys, want %d: %v", found, keys+1, err)
	}
	return fmt.Sprintf("%d finished keys: copied in %.0f s, indexed and vacuumed in %.0f s more; table %d MB, indexes %d MB, %d bytes for a key; %d turns of %v",
		found, copied.Seconds(), (took - copied).Seconds(), table>>20, index>>20, (table+index)/found, *flagTurns, *flagSlice)
}

func firstRow(b *testing.B, dsn string) (columns []string, values []any) {
	b.Helper()
	conn := connect(b, dsn)
	defer conn.Close(context.Background())
	rows, err := conn.Query(b.Context(), "SELECT * FROM "+keysTable)
	if err != nil {
		b.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		if values, err = rows.Values(); err != nil {
			b.Fatal(err)
		}
	}
	for _, field := range rows.FieldDescriptions() {
		columns = append(columns, field.Name)
	}
	return columns, values
}

// dropIndexes returns the statements that make them again: that is faster than to keep them while rows come.
func dropIndexes(b *testing.B, dsn string) (again []string) {
	b.Helper()
	conn := connect(b, dsn)
	defer conn.Close(context.Background())
	rows, err := conn.Query(b.Context(), `
		SELECT 'ALTER TABLE `+keysTable+` DROP CONSTRAINT ' || quote_ident(conname),
			'ALTER TABLE `+keysTable+` ADD CONSTRAINT ' || quote_ident(conname) || ' ' || pg_get_constraintdef(oid)
		FROM pg_constraint WHERE conrelid = $1::text::regclass AND contype = 'p'
		UNION ALL
		SELECT 'DROP INDEX ' || indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = $1::text::regclass AND NOT indisprimary`, keysTable)
	if err != nil {
		b.Fatal(err)
	}
	type index struct{ Drop, Again string }
	indexes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[index])
	if err != nil {
		b.Fatal(err)
	}
	for _, i := range indexes {
		execute(b, dsn, i.Drop)
		again = append(again, i.Again)
	}
	return again
}

const copiers = 2

func copyKeys(b *testing.B, dsn string, columns []string, row []any, record keystate.Record, keys int, newID func(time.Time) string) {
	b.Helper()
	until := time.Now()
	since := until.Add(-48 * time.Hour)
	var copied atomic.Int64
	done := make(chan struct{})
	go tellProgress(&copied, keys, done)
	defer close(done)
	var wg sync.WaitGroup
	for part := range copiers {
		conn := connect(b, dsn)
		wg.Go(func() {
			defer conn.Close(context.Background())
			i := part - copiers
			rows := pgx.CopyFromFunc(func() ([]any, error) {
				if i += copiers; i >= keys {
					return nil, nil
				}
				copied.Add(1)
				return pastRow(columns, row, record, since.Add(until.Sub(since)/time.Duration(keys)*time.Duration(i)), newID)
			})
			if _, err := conn.CopyFrom(context.Background(), pgx.Identifier(strings.Split(keysTable, ".")), columns, rows); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	if b.Failed() {
		b.FailNow()
	}
}

// pastRow is the first key's row, as that of another key that finished then.
func pastRow(columns []string, row []any, r keystate.Record, at time.Time, newID func(time.Time) string) ([]any, error) {
	id := newID(at)
	if len(id) != len(r.Key.ID) {
		return nil, errors.New("an ID of another length")
	}
	r.State = bytes.ReplaceAll(r.State, []byte(r.Key.ID), []byte(id))
	r.Key.ID = id
	r.Created, r.Ended, r.Sequence = at, at, 0
	r.History = slices.Clone(r.History)
	for i := range r.History {
		r.History[i].At = at
	}
	var drawn [48]byte
	rand.Read(drawn[:])
	copy(r.Incarnation[:], drawn[:16])
	copy(r.Fingerprint[:], drawn[16:32])
	frame, err := r.MarshalBinary()
	if err != nil {
		return nil, err
	}
	values := slices.Clone(row)
	for i, column := range columns {
		switch column {
		case "id":
			values[i] = []byte(id)
		case "incarnation":
			values[i] = drawn[:16]
		case "nonce":
			values[i] = drawn[32:]
		case "finished":
			values[i] = at.UnixMicro()*1024 + int64(drawn[47])
		case "record":
			values[i] = frame
		}
	}
	return values, nil
}

func tellProgress(copied *atomic.Int64, keys int, done <-chan struct{}) {
	start := time.Now()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			n := copied.Load()
			fmt.Printf("# %d of %d keys copied, %.0f/s\n", n, keys, float64(n)/time.Since(start).Seconds())
		}
	}
}

// readSome has the engine answer keys that were copied: they must be as good as its own.
func readSome(b *testing.B, dsn string, keys int) {
	b.Helper()
	conn := connect(b, dsn)
	defer conn.Close(context.Background())
	rows, err := conn.Query(b.Context(), `SELECT id FROM `+keysTable+` ORDER BY finished DESC LIMIT 20`)
	if err != nil {
		b.Fatal(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
	if err != nil {
		b.Fatal(err)
	}
	e := newEngine(b, dsn, 4, pgx.Serializable, threePhases, keystate.Options{})
	defer e.close()
	for _, id := range ids {
		r, err := e.engine.Key(b.Context(), keystate.Key{Scope: "bench", ID: string(id)})
		if err != nil || r.Status != keystate.Answered || r.Key.ID != string(id) || !bytes.Contains(r.State, id) {
			b.Fatalf("%q: %+v, %v", id, r, err)
		}
	}
	stats, err := e.engine.Stats(b.Context())
	if err != nil || stats.Finished != uint64(keys)+1 {
		b.Fatalf("%+v, %v", stats, err)
	}
}
