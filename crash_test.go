package keystate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
)

// What a power cut can leave of the file: every write of a run is recorded, and from the record every state is built in which
// the disk may be found. What was synced is there; of what was not, any part may be, down to single sectors. Each such file
// must open, hold all that was acknowledged by then, and contradict itself nowhere.

var (
	crashStates = flag.Int("crash-states", 8000, "files to build in the test of power cuts")
	crashSeed   = flag.Uint64("crash-seed", 0, "which files the test of power cuts builds; the run before the cut is another each time")
)

const (
	sectorSize  = 512
	resumeEvery = 200 // files judged, until one is carried on with as well
)

// cuts is how many files to build.
func cuts() int {
	if testing.Short() {
		return *crashStates / 8
	}
	return *crashStates
}

func TestWhateverAPowerCutLeavesHoldsAllThatWasAcknowledged(t *testing.T) {
	rec := record48(t, false)
	began := time.Now()
	found := rec.explore(t, cuts(), rec.segments(true), rec.promises)
	t.Logf("%d writes in %d segments, %d promises; %d states judged and %d carried on with, in %v",
		len(rec.log), len(rec.segments(true)), len(rec.promises), found.states, found.resumed, time.Since(began).Round(time.Millisecond))
	if found.err != nil {
		t.Errorf("state %d: %v", found.states, found.err)
		found.save(t)
	}
	if want := cuts() / resumeEvery; found.states < cuts() || found.resumed < want {
		t.Errorf("only %d states, and %d carried on with", found.states, found.resumed)
	}
	if never := found.seen.missing(inFiles); len(never) > 0 {
		t.Errorf("in no file: %v", never)
	}
}

// A judge who has never found anything proves nothing: each of these makes some state a broken promise.
func TestTheJudgeOfPowerCutsFindsSeededBugs(t *testing.T) {
	for _, bug := range []struct {
		name         string
		split, early bool
		barrier      bool // between the data pages and the meta page
	}{
		{name: "an acknowledgement before the meta page is written", early: true, barrier: true},
		{name: "no sync between the data and the meta page"},
		{name: "a phase in two transactions", split: true, barrier: true},
	} {
		t.Run(bug.name, func(t *testing.T) {
			rec := record48(t, bug.split)
			promises := rec.promises
			if bug.early {
				promises = rec.madeEarly()
			}
			found := rec.explore(t, cuts(), rec.segments(bug.barrier), promises)
			if found.err == nil {
				t.Fatalf("not found in %d states", found.states)
			}
			t.Logf("found in state %d: %v", found.states, found.err)
		})
	}
}

// A write is one that bbolt made.
type write struct {
	at   int64
	b    []byte
	size int64 // of the file, when it was made: growth is synced before bbolt writes there
	meta bool
}

// A promise is what a caller, an observer or an effect was entitled to rely on from a moment on.
type promise struct {
	at   int // how many writes had been made
	key  Key
	what string
	kept func(c *cut, r *Record) bool

	answer bool // it is a caller's answer
}

// A sending is what the outside world saw first of a key's effect.
type sending struct {
	at    int
	token string
	times int
}

// A recording is all the writes of a run, and what happened between them.
type recording struct {
	base     []byte // the file before the first
	pageSize int64

	mu       sync.Mutex
	log      []write
	promises []promise
	asked    map[Key]int // since when there may be a record
	reaped   map[Key]int // since when there may be none any more
	freed    map[Key]int // since when it may not be parked any more
	sent     map[Key]sending
}

// fates are what becomes of a request, by whom the money is for.
var fates = []string{"bob", "flaky", "late", "stuck", "closed", "shut", "mute", "audited"}

// rowOf names the row that the phase writes which reaches a point.
var rowOf = map[RecoveryPoint]string{"funds_reserved": "reserved", "payout_sent": "sent", "receipt_sent": "receipt", Finished: "settled"}

// errands are the phases of a request whose fate is given by whom the money is for; effects and staged keys are told.
func errands(effect func(ctx context.Context, token string, s *transfer) error, m **Machine[transfer], staging func(Key)) []transferPhase {
	phases := three(effect)
	phases[1].Retry = RetryPolicy{Attempts: 5, InRun: 2, Initial: 100 * time.Millisecond, Max: time.Second}
	phases[2].Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		if err := note("settled")(ctx, tx, s); err != nil {
			return err
		}
		switch s.To {
		case "shut":
			return Final(errDown)
		case "audited":
			child := transfer{From: s.From + "/audit", To: "bob"}
			staging(Key{ID: child.From})
			return Stage(tx, *m, Key{ID: child.From}, child)
		}
		return nil
	}
	return slices.Insert(phases, 2, transferPhase{To: "receipt_sent", OnError: Ignore, Commit: func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		if err := note("receipt")(ctx, tx, s); err != nil || s.To != "mute" {
			return err
		}
		return errDown
	}})
}

// record48 records a run of 48 requests, with what they stage: by several callers at a time, who are answered, refused, kept
// waiting and parked, while an operator retries and abandons and old keys are reaped.
func record48(t *testing.T, split bool) *recording {
	rec := &recording{asked: map[Key]int{}, reaped: map[Key]int{}, freed: map[Key]int{}, sent: map[Key]sending{}}
	synctest.Test(t, func(t *testing.T) {
		e := rec.open(t, split)
		defer e.Close()
		var m *Machine[transfer]
		m = register(t, e, errands(rec.effect(t), &m, rec.ask)...)
		const rounds, callers = 3, 8
		for round := range rounds {
			var crowd sync.WaitGroup
			for caller := range callers {
				crowd.Go(func() {
					for n := range 2 {
						id := fmt.Sprintf("%d.%d.%d", round, caller, n)
						rec.call(t, m, transfer{From: id, To: fates[(caller+n*5)%len(fates)], Cents: int64(caller)})
					}
				})
				if caller%3 == 0 { // somebody is impatient and asks twice
					crowd.Go(func() {
						rec.call(t, m, transfer{From: fmt.Sprintf("%d.%d.0", round, caller), To: fates[caller], Cents: int64(caller)})
					})
				}
			}
			crowd.Wait()
			if err := e.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			rec.operate(t, e)
			time.Sleep(2 * time.Minute) // of the bubble's clock: the reaper comes
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	})
	slices.SortStableFunc(rec.promises, func(a, b promise) int { return cmp.Compare(a.at, b.at) })
	if len(rec.reaped) == 0 || len(rec.asked) < 48 || len(rec.log) < 200 {
		t.Fatalf("a run of little: %d writes, %d keys asked for, %d reaped", len(rec.log), len(rec.asked), len(rec.reaped))
	}
	return rec
}

// open opens a new store whose writes are recorded.
func (rec *recording) open(t *testing.T, split bool) *Engine[*bbolt.Tx] {
	path := storePath(t)
	opts := &Options{Logger: quiet, Retention: 3 * time.Minute, Observer: &Observer{
		Finished: func(ev Event) {
			rec.promise(ev.Key, "observed as finished", func(_ *cut, r *Record) bool { return r.Status == Answered })
		},
		Parked: func(ev Event) {
			rec.promise(ev.Key, "observed as parked", func(c *cut, r *Record) bool {
				freed, operated := c.freed[ev.Key]
				return r.Status == Parked && r.Attempts == ev.Attempt || operated && freed < c.at
			})
		},
	}}
	store, err := openBolt(path, opts.orDefault())
	if err != nil {
		t.Fatal(err)
	}
	if store.db.NoSync || store.db.NoGrowSync { // the syncs are not recorded but known to be where bbolt makes them
		t.Fatal("the store leaves syncs out")
	}
	if rec.base, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	rec.pageSize = int64(store.db.Info().PageSize)
	brokenDisk(&Engine[*bbolt.Tx]{store: store}, func(write func([]byte, int64) (int, error), b []byte, at int64) (int, error) {
		info, err := store.file.Stat()
		if err != nil {
			return 0, err
		}
		rec.wrote(b, at, info.Size())
		return write(b, at)
	})
	e, err := New[*bbolt.Tx](&witness{boltStore: store, rec: rec, split: split}, opts)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (rec *recording) wrote(b []byte, at, size int64) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.log = append(rec.log, write{at: at, b: bytes.Clone(b), size: size, meta: at < 2*rec.pageSize})
}

// promise notes that from now on something is relied on.
func (rec *recording) promise(key Key, what string, kept func(*cut, *Record) bool) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.promises = append(rec.promises, promise{at: len(rec.log), key: key, what: what, kept: kept, answer: strings.HasPrefix(what, "answered")})
}

func (rec *recording) ask(key Key) { rec.note(rec.asked, key) }

// note keeps when something was first about to happen to a key.
func (rec *recording) note(m map[Key]int, key Key) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if _, known := m[key]; !known {
		m[key] = len(rec.log)
	}
}

// effect is the outside world: an effect may rely on the key's being on disk, and on where it stands.
func (rec *recording) effect(t *testing.T) func(context.Context, string, *transfer) error {
	return func(_ context.Context, token string, s *transfer) error {
		n := rec.send(t, Key{ID: s.From}, token)
		switch {
		case s.To == "closed":
			return Final(errDown)
		case s.To == "flaky" && n < 2, s.To == "late" && n < 4, s.To == "stuck" && n <= 5:
			return errDown
		}
		s.Payout = "po_" + token[:8]
		return nil
	}
}

func (rec *recording) send(t *testing.T, key Key, token string) (times int) {
	rec.promise(key, "sent", func(_ *cut, r *Record) bool {
		return r.Begun == "payout_sent" && !r.FirstTried.IsZero() || r.Status == Answered || has(r, "payout_sent")
	})
	rec.mu.Lock()
	defer rec.mu.Unlock()
	s, known := rec.sent[key]
	if !known {
		s = sending{at: len(rec.log), token: token}
	} else if s.token != token {
		t.Errorf("%s: sent under %s, then under %s", key, s.token, token)
	}
	s.times++
	rec.sent[key] = s
	return s.times
}

func has(r *Record, point RecoveryPoint) bool {
	return slices.ContainsFunc(r.History, func(p Passage) bool { return p.Point == point })
}

// call makes a request and notes what it may rely on: first that the key is claimed, then its answer, to the last bit.
func (rec *recording) call(t *testing.T, m *Machine[transfer], request transfer) {
	key := Key{ID: request.From}
	rec.ask(key)
	run, err := m.Start(ctx, key, request)
	if err != nil {
		if !errors.Is(err, ErrParked) {
			t.Errorf("%s: %v", key, err)
		}
		return
	}
	rec.promise(key, "claimed", func(*cut, *Record) bool { return true })
	_, err = run.Wait(ctx)
	var stopped *PhaseError
	var final *FinalError
	if err != nil && !errors.As(err, &stopped) && !errors.As(err, &final) {
		t.Errorf("%s: %v", key, err)
		return
	}
	told := run.run.record
	told.Sequence = 0 // the store's own: the split store's engine does not learn it
	frame := appendRecord(nil, &told)
	rec.promise(key, fmt.Sprintf("answered as %s, %v", told.Status, err), func(_ *cut, r *Record) bool {
		if r.Version > told.Version && told.Status != Answered { // it has gone on
			return r.Incarnation == told.Incarnation
		}
		now := *r
		now.Sequence = 0
		return bytes.Equal(appendRecord(nil, &now), frame)
	})
}

// operate lets the first parked key go on, and abandons the others but one.
func (rec *recording) operate(t *testing.T, e *Engine[*bbolt.Tx]) {
	n := 0
	for r, err := range e.Keys(ctx, Filter{Status: Parked}) {
		n++
		rec.note(rec.freed, r.Key)
		switch {
		case err != nil:
			t.Fatal(err)
		case n == 1:
			err = e.Retry(ctx, r.Key)
			rec.promise(r.Key, "retried", func(_ *cut, now *Record) bool { return now.Version > r.Version })
		case n > 2:
			err = e.Abandon(ctx, r.Key, "by the test")
			rec.promise(r.Key, "abandoned", func(_ *cut, now *Record) bool { return now.Refusal != nil })
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Resume(ctx); err != nil {
		t.Fatal(err)
	}
}

// A witness is a store that tells of what is reaped, since no answer does. It may have a bug: split, it commits what a
// phase writes before what becomes of its key.
type witness struct {
	*boltStore
	rec   *recording
	split bool
	held  *[]Record // of the member that is running
}

func (w *witness) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if !w.split {
		return w.boltStore.Update(ctx, fn)
	}
	var records []Record
	err := w.boltStore.Update(ctx, func(tx *bbolt.Tx) error {
		records = nil
		w.held = &records
		defer func() { w.held = nil }()
		return fn(tx)
	})
	if err != nil || len(records) == 0 {
		return err
	}
	return w.boltStore.Update(ctx, func(tx *bbolt.Tx) error {
		for _, r := range records {
			if err := w.Keys(tx).Put(&r); err != nil {
				return err
			}
		}
		return nil
	})
}

func (w *witness) Keys(tx *bbolt.Tx) Keys {
	k := w.boltStore.Keys(tx)
	switch {
	case !tx.Writable():
		return k
	case w.held != nil:
		k = &heldBack{Keys: k, records: w.held}
	}
	return &witnessKeys{k, w.rec}
}

type witnessKeys struct {
	Keys
	rec *recording
}

func (k *witnessKeys) Delete(r Record) error {
	k.rec.note(k.rec.reaped, r.Key)
	return k.Keys.Delete(r)
}

// A segment is the writes between two syncs: from, up to but not including to.
type segment struct{ from, to int }

// segments are those of the recording. bbolt syncs before it writes a meta page, which is the barrier that a bug may lack,
// and after it.
func (rec *recording) segments(barrier bool) (all []segment) {
	from := 0
	for i, w := range rec.log {
		if w.meta && barrier && i > from {
			all = append(all, segment{from, i})
			from = i
		}
		if w.meta {
			all = append(all, segment{from, i + 1})
			from = i + 1
		}
	}
	return all
}

// madeEarly are the promises of an engine that answers before it writes the meta page.
func (rec *recording) madeEarly() []promise {
	early := slices.Clone(rec.promises)
	for i := range early {
		for at := early[i].at - 1; early[i].answer && at >= 0; at-- {
			if rec.log[at].meta {
				early[i].at = at
				break
			}
		}
	}
	slices.SortStableFunc(early, func(a, b promise) int { return cmp.Compare(a.at, b.at) })
	return early
}

// A disk is a file as a power cut may leave it. What is synced is kept in memory, to return to.
type disk struct {
	path   string
	f      *os.File
	synced []byte
	parts  []part // of the unsynced writes, that are in the file
}

type part struct{ at, end int64 }

func newDisk(t testing.TB, base []byte) *disk {
	d := &disk{path: filepath.Join(t.TempDir(), "cut.db"), synced: bytes.Clone(base)}
	if err := os.WriteFile(d.path, base, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	d.f = f
	return d
}

func (d *disk) grow(size int64) error {
	if more := size - int64(len(d.synced)); more > 0 {
		d.synced = append(d.synced, make([]byte, more)...)
		return d.f.Truncate(size)
	}
	return nil
}

// land puts a part of a write into the file, without a sync.
func (d *disk) land(w write, from, to int) error {
	p := part{w.at + int64(from), w.at + int64(to)}
	d.parts = append(d.parts, p)
	_, err := d.f.WriteAt(w.b[from:to], p.at)
	return err
}

// tear puts any part of a write into the file, down to single sectors.
func (d *disk) tear(w write, rng *rand.Rand) (err error) {
	const lost, whole, torn = 4, 4, 2 // of ten
	switch fate := rng.IntN(lost + whole + torn); {
	case fate < lost:
		return nil
	case fate < lost+whole:
		return d.land(w, 0, len(w.b))
	}
	for from := 0; from < len(w.b) && err == nil; from += sectorSize {
		if rng.IntN(2) == 0 {
			err = d.land(w, from, min(from+sectorSize, len(w.b)))
		}
	}
	return err
}

// restore takes back what was not synced.
func (d *disk) restore() (err error) {
	for _, p := range d.parts {
		_, failed := d.f.WriteAt(d.synced[p.at:p.end], p.at)
		err = errors.Join(err, failed)
	}
	d.parts = d.parts[:0]
	return err
}

// sync makes writes durable.
func (d *disk) sync(log []write) (err error) {
	for _, w := range log {
		copy(d.synced[w.at:], w.b)
		_, failed := d.f.WriteAt(w.b, w.at)
		err = errors.Join(err, failed)
	}
	return err
}

// Findings is what came of judging states, until the first that is wrong.
type findings struct {
	states, resumed int
	err             error
	image           []byte // that is wrong
	seen            sightings
}

// save keeps the file that is wrong: no seed brings it back, since the run before the cut is another each time.
func (found *findings) save(t *testing.T) {
	f, err := os.CreateTemp("", "keystate-cut-*.db")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(found.image)
	t.Logf("the file is kept as %s (%v)", f.Name(), errors.Join(err, f.Close()))
}

// A cut is one moment at which the power fails.
type cut struct {
	at    int       // how many writes had been made
	due   []promise // that had been given by then
	asked map[Key]int
	sent  map[Key]sending
	gone  map[Key]int
	freed map[Key]int
	seen  *sightings
}

// explore builds as many states or a few more, evenly over all segments, and judges each.
func (rec *recording) explore(t *testing.T, states int, segments []segment, promises []promise) *findings {
	found := new(findings)
	d := newDisk(t, rec.base)
	defer d.f.Close()
	rng := rand.New(rand.NewPCG(*crashSeed, 0))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	each := max(states/len(segments)+1, 4)
	for _, seg := range segments {
		for i := range each {
			at := seg.from
			switch i {
			case 0: // before anything, even growth
			case 1: // before anything but growth
				must(d.grow(rec.log[seg.from].size))
			case 2: // everything is written, and about to be synced
				at = seg.to
				for _, w := range rec.log[seg.from:at] {
					must(d.land(w, 0, len(w.b)))
				}
			default:
				at += 1 + rng.IntN(seg.to-seg.from)
				for _, w := range rec.log[seg.from:at] {
					must(d.tear(w, rng))
				}
			}
			found.states++
			c := cut{at: at, due: rec.due(promises, seg, at), asked: rec.asked, sent: rec.sent, gone: rec.reaped, freed: rec.freed, seen: &found.seen}
			err := c.judge(d.path)
			if err == nil && found.states%resumeEvery == 0 {
				found.resumed++
				err = c.carryOn(t, d.path)
			}
			if err != nil {
				found.err = fmt.Errorf("after %d of %d writes, %d of them synced: %w", at, len(rec.log), seg.from, err)
				image, err := os.ReadFile(d.path)
				must(err)
				found.image = image
				return found
			}
			must(d.restore())
		}
		must(d.sync(rec.log[seg.from:seg.to]))
	}
	return found
}

// due are the promises that hold after so many writes. One that was given when a meta page was the last write, was given after
// its sync; so it does not hold yet while that sync is under way.
func (rec *recording) due(promises []promise, seg segment, at int) []promise {
	if at > seg.from && rec.log[at-1].meta {
		at--
	}
	n, _ := slices.BinarySearchFunc(promises, at+1, func(p promise, at int) int { return cmp.Compare(p.at, at) })
	return promises[:n]
}

// Contents is what a program finds in its file.
type contents struct {
	records map[Key]Record
	rows    map[string]string
}

// judge opens a file as Open does, but for what writes and syncs, and judges what it holds.
func (c cut) judge(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		err = checkPages(f, info.Size(), true, false)
	}
	if err != nil {
		f.Close()
		return err
	}
	db, err := openDB(f, true)
	if err != nil {
		f.Close()
		return err
	}
	defer func() { err = errors.Join(err, closeBolt(db, f)) }()
	if err := checkDB(db, true); err != nil {
		return err
	}
	var found contents
	if err := db.View(found.read); err != nil {
		return err
	}
	return c.check(found)
}

func (found *contents) read(tx *bbolt.Tx) error {
	id, err := readIdentity(tx)
	if err != nil {
		return err
	}
	k, err := newBoltReader(tx, id)
	if err != nil {
		return err
	}
	const all = 1 << 20
	unfinished, err1 := k.Unfinished(Key{}, all)
	finished, err2 := k.Finished(0, all)
	found.records, found.rows = map[Key]Record{}, map[string]string{}
	for _, r := range append(unfinished, finished...) {
		if _, twice := found.records[r.Key]; twice {
			return fmt.Errorf("%s has two records", r.Key)
		}
		found.records[r.Key] = r
	}
	if b := tx.Bucket([]byte("notes")); b != nil {
		err = b.ForEach(func(name, count []byte) error {
			found.rows[string(name)] = string(count)
			return nil
		})
	}
	return errors.Join(err, err1, err2)
}

// check judges what a file holds.
func (c cut) check(found contents) error {
	for _, p := range c.due {
		r, there := found.records[p.key]
		if gone, reaped := c.gone[p.key]; !there && reaped && gone < c.at {
			c.seen.note("reaped")
			continue
		}
		if !there || !p.kept(&c, &r) {
			return fmt.Errorf("%s was %s after %d writes; there is %+v", p.key, p.what, p.at, r)
		}
	}
	expected := 0
	for key, r := range found.records {
		n, err := c.checkRecord(r, found.rows)
		if err != nil {
			return fmt.Errorf("%s, %s at %s: %w", key, r.Status, r.Point, err)
		}
		expected += n
	}
	for row := range found.rows { // without a record, there may be those that reaping has left behind
		key := Key{ID: row[:strings.LastIndexByte(row, '/')]}
		if _, there := found.records[key]; there {
			expected--
		} else if gone, reaped := c.gone[key]; !reaped || gone >= c.at {
			return fmt.Errorf("the row %s is nobody's", row)
		}
	}
	if expected != 0 {
		return fmt.Errorf("there are %d rows less than points that wrote one", expected)
	}
	return nil
}

// checkRecord judges a record against what was asked for and sent by then, and against the rows. It returns how many it has.
func (c cut) checkRecord(r Record, rows map[string]string) (n int, err error) {
	if asked, known := c.asked[r.Key]; !known || asked > c.at {
		return 0, errors.New("nobody has asked for it")
	}
	var s transfer
	if err := decodeState(r.State, &s); err != nil || s.From != r.Key.ID {
		return 0, fmt.Errorf("its state is %+v (%v)", s, err)
	}
	c.see(r)
	payout := ""
	if has(&r, "payout_sent") || r.Acted {
		sent, known := c.sent[r.Key]
		if !known || sent.at > c.at {
			return 0, errors.New("its payout was not sent")
		}
		payout = "po_" + sent.token[:8]
	}
	if s.Payout != payout {
		return 0, fmt.Errorf("its payout is %q, not %q", s.Payout, payout)
	}
	for point, name := range rowOf {
		i := slices.IndexFunc(r.History, func(p Passage) bool { return p.Point == point })
		want := i >= 0 && r.History[i].Ignored == "" && !(point == Finished && r.Refusal != nil)
		row, there := rows[r.Key.ID+"/"+name]
		if there != want || there && row != "|" {
			return 0, fmt.Errorf("the row %s is %q; its points are %v", name, row, r.History)
		}
		if there {
			n++
		}
	}
	return n, nil
}

// inFiles is what must have been found in some file, or the run was not worth cutting.
var inFiles = []string{"running", "waiting", "parked", "finished", "an effect under way", "refused", "ignored", "staged", "abandoned", "reaped"}

func (c cut) see(r Record) {
	c.seen.note(string(r.Status))
	when := func(is bool, what string) {
		if is {
			c.seen.note(what)
		}
	}
	when(!r.FirstTried.IsZero() && r.Status == Running, "an effect under way")
	when(r.Refusal != nil, "refused")
	when(r.Refusal != nil && strings.HasPrefix(r.Refusal.Reason, "abandoned"), "abandoned")
	when(slices.ContainsFunc(r.History, func(p Passage) bool { return p.Ignored != "" }), "ignored")
	when(strings.HasSuffix(r.Key.ID, "/audit"), "staged")
}

// carryOn opens a copy of a file and carries every key in it to its end. Whoever was sent to before is sent to under the
// same token, and not at all when its answer is saved.
func (c cut) carryOn(t *testing.T, path string) (err error) {
	image, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	path += ".resumed"
	defer os.Remove(path)
	if err := os.WriteFile(path, image, 0o600); err != nil {
		return err
	}
	e, err := Open(path, &Options{Logger: quiet, Retention: -1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	var before, after contents
	if err := e.View(ctx, before.read); err != nil {
		return err
	}
	first := c.sent
	c.asked, c.sent, c.freed = maps.Clone(c.asked), maps.Clone(c.sent), maps.Clone(c.freed)
	var mu sync.Mutex
	var wrong []error
	effect := func(_ context.Context, token string, s *transfer) error {
		key := Key{ID: s.From}
		r, there := before.records[key]
		mu.Lock()
		defer mu.Unlock()
		c.sent[key] = sending{token: token}
		if sent, known := first[key]; has(&r, "payout_sent") || there && known && sent.token != token {
			wrong = append(wrong, fmt.Errorf("%s: sent under %s again, first under %q; its points were %v", key, token, sent.token, r.History))
		}
		s.Payout = "po_" + token[:8]
		return nil
	}
	var m *Machine[transfer]
	m = register(t, e, errands(effect, &m, func(key Key) {
		mu.Lock()
		defer mu.Unlock()
		c.asked[key] = 0
	})...)
	if err := e.Resume(ctx); err != nil {
		return err
	}
	for r, err := range e.Keys(ctx, Filter{Status: Parked}) { // such as those cut off at their last attempt
		c.freed[r.Key] = -1
		if err := cmp.Or(err, e.Retry(ctx, r.Key)); err != nil {
			return err
		}
	}
	if err := e.Resume(ctx); err != nil {
		return err
	}
	if err := errors.Join(append(wrong, e.View(ctx, after.read))...); err != nil {
		return err
	}
	for key, r := range after.records {
		if r.Status != Answered {
			return fmt.Errorf("%s is %s in the end", key, r.Status)
		}
	}
	for key, r := range before.records {
		now := after.records[key]
		if now.Incarnation != r.Incarnation || r.Status == Answered && !bytes.Equal(appendRecord(nil, &r), appendRecord(nil, &now)) {
			return fmt.Errorf("%s was %+v, and is %+v in the end", key, r, now)
		}
	}
	if err := c.check(after); err != nil {
		return fmt.Errorf("in the end: %w", err)
	}
	return nil
}
