package keystate

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/vmihailenco/msgpack/v5"
	"go.etcd.io/bbolt"
)

// The request that all benchmarks make: a local write of 200 bytes; an effect that does nothing; a local write
// and an answer of 300 bytes. Full fsync. docs/bench.md has the commands and what they gave.

type order struct {
	Account string
	Cents   int64
	Payout  string
	Receipt []byte
}

var (
	benchBucket = []byte("orders")
	localWrite  = make([]byte, 200)
	receipt     = make([]byte, 260) // with the other fields, an answer of 300 bytes
)

var orderPhases = []Phase[*bbolt.Tx, order]{
	{To: "funds_reserved", Commit: func(_ context.Context, tx *bbolt.Tx, s *order) error {
		return tx.Bucket(benchBucket).Put([]byte(s.Account+"/reserved"), localWrite)
	}},
	{To: "payout_sent", Effect: func(_ context.Context, token string, s *order) error {
		s.Payout = token[:8]
		return nil
	}},
	{To: Finished, Commit: func(_ context.Context, tx *bbolt.Tx, s *order) error {
		s.Receipt = receipt
		return tx.Bucket(benchBucket).Put([]byte(s.Account+"/settled"), localWrite)
	}},
}

// A contender makes the request in its own way, each time with a new key.
type contender interface {
	request(id string) error
	close() error
}

// throughput is how many requests a second so many callers get done.
func throughput(tb testing.TB, c contender, callers int, d time.Duration) float64 {
	tb.Helper()
	var done atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range callers {
		wg.Go(func() {
			for time.Since(start) < d {
				if err := c.request(NewID()); err != nil {
					tb.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(done.Load()) / time.Since(start).Seconds()
}

// engineContender is this package.
type engineContender struct {
	engine          *Engine[*bbolt.Tx]
	orders          *Machine[order]
	groups, members atomic.Int64
}

func newEngineContender(tb testing.TB, path string, opts Options) *engineContender {
	tb.Helper()
	c := new(engineContender)
	opts.Observer = &Observer{Grouped: func(ev Event) {
		c.groups.Add(1)
		c.members.Add(int64(ev.Size))
	}}
	var err error
	if c.engine, err = Open(path, &opts); err != nil {
		tb.Fatal(err)
	}
	err = c.engine.Update(context.Background(), func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(benchBucket)
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	if c.orders, err = Register(c.engine, "order", orderPhases); err != nil {
		tb.Fatal(err)
	}
	return c
}

func (c *engineContender) request(id string) error {
	_, err := c.orders.Do(context.Background(), Key{Scope: "bench", ID: id}, order{Account: id, Cents: 500})
	return err
}

func (c *engineContender) close() error { return c.engine.Close() }

// byHand is the request as one would write it with bbolt alone: one transaction per step, by Update or by Batch.
type byHand struct {
	db     *bbolt.DB
	commit func(func(tx *bbolt.Tx) error) error
}

var keysBucket = []byte("keys")

func newByHand(tb testing.TB, path string, batch bool) *byHand {
	tb.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		tb.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{keysBucket, benchBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	if batch {
		return &byHand{db, db.Batch}
	}
	return &byHand{db, db.Update}
}

type handRecord struct {
	Point   string
	Request order
	Answer  *order
}

func (h *byHand) request(id string) error {
	key := []byte(id)
	save := func(tx *bbolt.Tx, r handRecord) error {
		b, err := msgpack.Marshal(r)
		if err != nil {
			return err
		}
		return tx.Bucket(keysBucket).Put(key, b)
	}
	r := handRecord{Point: "started", Request: order{Account: id, Cents: 500}}
	err := h.commit(func(tx *bbolt.Tx) error { // claim
		if tx.Bucket(keysBucket).Get(key) != nil {
			return fmt.Errorf("key %s exists", id)
		}
		return save(tx, r)
	})
	if err != nil {
		return err
	}
	r.Point = "funds_reserved"
	err = h.commit(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(benchBucket).Put([]byte(id+"/reserved"), localWrite); err != nil {
			return err
		}
		return save(tx, r)
	})
	if err != nil {
		return err
	}
	r.Point, r.Request.Payout = "payout_sent", "12345678"
	if err := h.commit(func(tx *bbolt.Tx) error { return save(tx, r) }); err != nil {
		return err
	}
	answer := r.Request
	answer.Receipt = receipt
	r.Point, r.Answer = "finished", &answer
	return h.commit(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(benchBucket).Put([]byte(id+"/settled"), localWrite); err != nil {
			return err
		}
		return save(tx, r)
	})
}

func (h *byHand) close() error { return h.db.Close() }

// ceiling writes with raw bbolt what the engine writes, in groups of the size that the engine reached, and does nothing
// else: no decision, no encoding, no waiting for anybody.
type ceiling struct {
	db    *bbolt.DB
	group int
	live  []byte // frame of an unfinished record
	done  []byte // frame of a finished one
	open  []string
	n     uint64
}

func newCeiling(tb testing.TB, path string, group int) *ceiling {
	tb.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{InitialMmapSize: initialMap})
	if err != nil {
		tb.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		if _, err := tx.CreateBucket(benchBucket); err != nil {
			return err
		}
		return initBuckets(tx)
	})
	if err != nil {
		tb.Fatal(err)
	}
	c := &ceiling{db: db, group: max(1, group)}
	c.live, c.done = benchFrames(tb)
	return c
}

// benchFrames are the two records that the engine writes for one request.
func benchFrames(tb testing.TB) (live, done []byte) {
	tb.Helper()
	state := func(s order) []byte {
		b, err := encodeState(&s, 1<<20)
		if err != nil {
			tb.Fatal(err)
		}
		return b
	}
	id := NewID()
	at := time.Now()
	r, err := Record{}.next(
		event{kind: begin, at: at, key: Key{Scope: "bench", ID: id}, machine: "order", epoch: 1},
		event{kind: reach, at: at, point: "funds_reserved", state: state(order{Account: id, Cents: 500})},
		event{kind: try, at: at})
	if err != nil {
		tb.Fatal(err)
	}
	r.Version = 1
	live = appendRecord(nil, &r)
	r, err = r.next(
		event{kind: reach, at: at, point: "payout_sent"},
		event{kind: reach, at: at, point: Finished, state: state(order{Account: id, Cents: 500, Payout: "12345678", Receipt: receipt})})
	if err != nil {
		tb.Fatal(err)
	}
	r.Version, r.Sequence = 2, 1_000_000
	return live, appendRecord(nil, &r)
}

// commit is one transaction: half of its members claim a key, the other half finish one.
func (c *ceiling) commit() (finished int, err error) {
	err = c.db.Update(func(tx *bbolt.Tx) error {
		root, orders := tx.Bucket(bucketRoot), tx.Bucket(benchBucket)
		live, done, index := root.Bucket(bucketLive), root.Bucket(bucketDone), root.Bucket(bucketIndex)
		done.FillPercent = 0.95
		half := (c.group + 1) / 2
		closing := c.open[:min(half, len(c.open))]
		for _, id := range closing {
			if err := orders.Put([]byte(id+"/settled"), localWrite); err != nil {
				return err
			}
			if err := live.Delete([]byte("\x05bench" + id)); err != nil {
				return err
			}
			c.n++
			var entry [16]byte
			binary.BigEndian.PutUint64(entry[:], c.n<<16|mix(c.n)>>48) // minted keys lie by their time
			binary.BigEndian.PutUint64(entry[8:], c.n)
			if err := done.Put(sequenceKey(c.n), c.done); err != nil {
				return err
			}
			if err := index.Put(entry[:], nil); err != nil {
				return err
			}
		}
		c.open = c.open[len(closing):]
		for range half {
			id := NewID()
			if err := orders.Put([]byte(id+"/reserved"), localWrite); err != nil {
				return err
			}
			if err := live.Put([]byte("\x05bench"+id), c.live); err != nil {
				return err
			}
			c.open = append(c.open, id)
		}
		finished = len(closing)
		return root.Put(keyLedger, ledger{next: c.n}.encode())
	})
	return finished, err
}

func (c *ceiling) throughput(tb testing.TB, d time.Duration) float64 {
	tb.Helper()
	start, total := time.Now(), 0
	for time.Since(start) < d {
		n, err := c.commit()
		if err != nil {
			tb.Fatal(err)
		}
		total += n
	}
	return float64(total) / time.Since(start).Seconds()
}

func median(v []float64) float64 {
	slices.SortFunc(v, cmp.Compare[float64])
	return v[len(v)/2]
}

// BenchmarkAgainstByHand measures the engine, the two ways to write the request by hand, and the ceiling in turns, and
// reports the medians of the ratios.
//
//	go test -run '^$' -bench AgainstByHand -benchtime 1x .
func BenchmarkAgainstByHand(b *testing.B) {
	const slice = 700 * time.Millisecond
	for _, callers := range []int{1, 16, 64, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			dir := benchDir(b)
			engine := newEngineContender(b, filepath.Join(dir, "engine.db"), Options{})
			update := newByHand(b, filepath.Join(dir, "update.db"), false)
			batch := newByHand(b, filepath.Join(dir, "batch.db"), true)
			throughput(b, engine, callers, slice/2) // warm up, and learn the size of groups
			group := engine.members.Load() / max(1, engine.groups.Load())
			top := newCeiling(b, filepath.Join(dir, "ceiling.db"), int(group))
			var rate, overUpdate, overBatch, ofCeiling []float64
			var commits []float64
			for range 5 * b.N {
				g0, m0 := engine.groups.Load(), engine.members.Load()
				e := throughput(b, engine, callers, slice)
				groups, members := engine.groups.Load()-g0, engine.members.Load()-m0
				top.group = int(members / max(1, groups))
				u := throughput(b, update, callers, slice)
				t := throughput(b, batch, callers, slice)
				c := top.throughput(b, slice)
				rate = append(rate, e)
				overUpdate = append(overUpdate, e/u)
				overBatch = append(overBatch, e/t)
				ofCeiling = append(ofCeiling, 100*e/c)
				commits = append(commits, float64(groups)/(e*slice.Seconds()))
			}
			for _, c := range []contender{engine, update, batch} {
				if err := c.close(); err != nil {
					b.Fatal(err)
				}
			}
			top.db.Close()
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(rate), "req/s")
			b.ReportMetric(median(overUpdate), "x-Update")
			b.ReportMetric(median(overBatch), "x-Batch")
			b.ReportMetric(median(ofCeiling), "%-of-ceiling")
			b.ReportMetric(median(commits), "commits/req")
		})
	}
}

// benchDir is on the disk that KEYSTATE_BENCH_DIR names, or that holds temporary files.
func benchDir(b *testing.B) string {
	b.Helper()
	if dir := os.Getenv("KEYSTATE_BENCH_DIR"); dir != "" {
		d, err := os.MkdirTemp(dir, "bench")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { os.RemoveAll(d) })
		return d
	}
	return b.TempDir()
}

// BenchmarkFailingMembers measures what it costs a group that one in ten of its members fails its commit, against none failing.
//
//	go test -run '^$' -bench FailingMembers -benchtime 1x .
func BenchmarkFailingMembers(b *testing.B) {
	const callers, slice = 64, 700 * time.Millisecond
	refuse := errors.New("refused")
	phases := slices.Clone(orderPhases)
	commit := phases[2].Commit
	var n atomic.Int64
	failing := atomic.Bool{}
	phases[2].OnError = Fail
	phases[2].Commit = func(ctx context.Context, tx *bbolt.Tx, s *order) error {
		if failing.Load() && s.Cents%10 == 0 {
			return refuse
		}
		return commit(ctx, tx, s)
	}
	e := newEngineContender(b, filepath.Join(benchDir(b), "engine.db"), Options{})
	defer e.close()
	m, err := Register(e.engine, "failing", phases)
	if err != nil {
		b.Fatal(err)
	}
	c := contenderFunc(func(id string) error {
		_, err := m.Do(context.Background(), Key{Scope: "bench", ID: id}, order{Account: id, Cents: n.Add(1)})
		var final *FinalError
		if errors.As(err, &final) {
			return nil
		}
		return err
	})
	throughput(b, c, callers, slice)
	var ratio []float64
	for range 5 * b.N {
		failing.Store(false)
		sound := throughput(b, c, callers, slice)
		failing.Store(true)
		ratio = append(ratio, 100*throughput(b, c, callers, slice)/sound)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(ratio), "%-of-none-failing")
}

type contenderFunc func(id string) error

func (f contenderFunc) request(id string) error { return f(id) }
func (f contenderFunc) close() error            { return nil }

// BenchmarkReplay measures the replay of a finished key beside a bare View and Get of the same bytes.
//
//	go test -run '^$' -bench Replay -benchtime 2s .
func BenchmarkReplay(b *testing.B) {
	const keys = 10_000
	path := filepath.Join(benchDir(b), "engine.db")
	e := newEngineContender(b, path, Options{})
	ids := fill(b, e, keys)
	sequences := make([][]byte, keys)
	for i, id := range ids {
		r, err := e.engine.Key(context.Background(), Key{Scope: "bench", ID: id})
		if err != nil {
			b.Fatal(err)
		}
		sequences[i] = sequenceKey(r.Sequence)
	}
	b.Run("bare", func(b *testing.B) {
		b.ReportAllocs()
		db := e.engine.store.(*boltStore).db
		for i := 0; b.Loop(); i++ {
			err := db.View(func(tx *bbolt.Tx) error {
				if v := tx.Bucket(bucketRoot).Bucket(bucketDone).Get(sequences[(i*7919)%keys]); len(v) == 0 {
					return errors.New("not there")
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("replay", func(b *testing.B) {
		b.ReportAllocs()
		groups := e.groups.Load()
		for i := 0; b.Loop(); i++ {
			if err := e.request(ids[(i*7919)%keys]); err != nil {
				b.Fatal(err)
			}
		}
		if e.groups.Load() != groups {
			b.Error("a replay wrote")
		}
	})
	e.close()
}

// fill finishes so many keys, and returns their IDs.
func fill(tb testing.TB, e *engineContender, keys int) []string {
	tb.Helper()
	ids := make([]string, keys)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 256 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(keys); i = next.Add(1) - 1 {
				ids[i] = NewID()
				if err := e.request(ids[i]); err != nil {
					tb.Error(err)
				}
			}
		})
	}
	wg.Wait()
	return ids
}

// BenchmarkRecovery measures how fast interrupted keys resume, against fresh requests at the same parallelism.
//
//	go test -run '^$' -bench Recovery -benchtime 1x -timeout 30m .
func BenchmarkRecovery(b *testing.B) {
	keys := 100_000
	if testing.Short() {
		keys = 2_000
	}
	const parallelism = 64
	dir := benchDir(b)
	path := filepath.Join(dir, "engine.db")
	e := newEngineContender(b, path, Options{Parallelism: parallelism})
	stageInterrupted(b, e.engine, keys)
	if err := e.close(); err != nil {
		b.Fatal(err)
	}
	before := time.Now()
	e = newEngineContender(b, path, Options{Parallelism: parallelism})
	opening := time.Since(before)
	if err := e.engine.Resume(context.Background()); err != nil {
		b.Fatal(err)
	}
	resumed := float64(keys) / time.Since(before).Seconds()
	stats, err := e.engine.Stats(context.Background())
	if err != nil || stats.Finished != uint64(keys) {
		b.Fatalf("%+v, %v", stats, err)
	}
	fresh := throughput(b, e, parallelism, max(time.Second, time.Duration(float64(keys)/resumed/2*float64(time.Second))))
	e.close()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(stats.Finished), "resumed")
	b.ReportMetric(resumed, "resumed/s")
	b.ReportMetric(fresh/resumed, "fresh/resumed")
	b.ReportMetric(opening.Seconds()*1000, "ms-Open+Register")
}

// stageInterrupted puts keys into the store as a crash leaves them whose effect was under way.
func stageInterrupted(tb testing.TB, e *Engine[*bbolt.Tx], keys int) {
	tb.Helper()
	putRecords(tb, e, keys, 5000, func() (Record, error) {
		id := NewID()
		s, err := encodeState(&order{Account: id, Cents: 500}, 1<<20)
		if err != nil {
			return Record{}, err
		}
		print, err := fingerprint("order", s)
		if err != nil {
			return Record{}, err
		}
		return Record{}.next(
			event{kind: begin, at: recorded(time.Now()), key: Key{Scope: "bench", ID: id}, machine: "order", epoch: e.epoch, state: s,
				fingerprint: print, incarnation: newIncarnation()},
			event{kind: reach, at: recorded(time.Now()), point: "funds_reserved", state: s},
			event{kind: try, at: recorded(time.Now()), point: "payout_sent", sent: true})
	})
}

// putRecords puts as many records as make gives, so many in a transaction.
func putRecords(tb testing.TB, e *Engine[*bbolt.Tx], keys, perTransaction int, make func() (Record, error)) {
	tb.Helper()
	for from := 0; from < keys; from += perTransaction {
		err := e.store.Update(context.Background(), func(tx *bbolt.Tx) error {
			records := e.store.Keys(tx)
			for range min(perTransaction, keys-from) {
				r, err := make()
				if err != nil {
					return err
				}
				if err := records.Put(&r); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
}

// BenchmarkMillion measures an engine with a million finished keys in its file, whose IDs the clients drew at random, against one with an
// empty file: its throughput under random IDs, the time to open it, and the memory it takes.
//
//	go test -run '^$' -bench Million -benchtime 1x -timeout 60m .
func BenchmarkMillion(b *testing.B) {
	keys := 1_000_000
	if testing.Short() {
		keys = 5_000
	}
	const callers, slice = 64, time.Second
	dir := benchDir(b)
	full := newEngineContender(b, filepath.Join(dir, "full.db"), Options{})
	finishRandom(b, full.engine, keys)
	opening, first := func() (opening, first float64) {
		path := full.engine.store.(*boltStore).path
		if err := full.close(); err != nil {
			b.Fatal(err)
		}
		before := time.Now()
		full = newEngineContender(b, path, Options{})
		opening = time.Since(before).Seconds() * 1000
		if err := full.request(uuid.NewString()); err != nil { // which waits until the index is summed
			b.Fatal(err)
		}
		return opening, time.Since(before).Seconds() * 1000
	}()
	var rate, ratio []float64
	for i := range 5 * b.N {
		empty := newEngineContender(b, filepath.Join(dir, fmt.Sprintf("empty%d.db", i)), Options{})
		one := throughput(b, randomIDs{empty}, callers, slice)
		if err := empty.close(); err != nil {
			b.Fatal(err)
		}
		many := throughput(b, randomIDs{full}, callers, slice)
		rate, ratio = append(rate, many), append(ratio, 100*many/one)
	}
	runtime.GC()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	stats, err := full.engine.Stats(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(rate), "req/s")
	b.ReportMetric(median(ratio), "%-of-empty")
	b.ReportMetric(opening, "ms-Open+Register")
	b.ReportMetric(first, "ms-to-first-new-key")
	b.ReportMetric(float64(mem.HeapInuse)/(1<<20), "MiB-heap")
	b.ReportMetric(float64(stats.Bytes)/float64(stats.Finished), "bytes/key")
	full.close()
}

// randomIDs makes requests as clients do that draw their keys at random: UUIDv4.
type randomIDs struct{ *engineContender }

func (c randomIDs) request(string) error { return c.engineContender.request(uuid.NewString()) }

// finishRandom puts finished keys with random IDs into the store.
func finishRandom(tb testing.TB, e *Engine[*bbolt.Tx], keys int) {
	tb.Helper()
	putRecords(tb, e, keys, 20_000, func() (Record, error) {
		id := uuid.NewString()
		s, err := encodeState(&order{Account: id, Cents: 500, Payout: "12345678", Receipt: receipt}, 1<<20)
		if err != nil {
			return Record{}, err
		}
		at := recorded(time.Now())
		return Record{}.next(
			event{kind: begin, at: at, key: Key{Scope: "bench", ID: id}, machine: "order", epoch: e.epoch, state: s, incarnation: newIncarnation()},
			event{kind: reach, at: at, point: "funds_reserved", state: s},
			event{kind: reach, at: at, point: "payout_sent", state: s},
			event{kind: reach, at: at, point: Finished, state: s})
	})
}
