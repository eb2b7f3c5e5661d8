package keystate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// What a power cut can leave of the file: every write of a run is recorded, and from the record every state is built in which
// the disk may be found. What was synced is there; of what was not, any part may be, down to single sectors. Each such file
// must open, hold all that was acknowledged by then, and contradict itself nowhere. Some are carried on with; the writes of
// that are recorded too, and the power is cut in them again.

var (
	crashStates = flag.Int("crash-states", 100_000, "files to build in the test of power cuts; a run is recorded for every 20,000")
	crashSeed   = flag.Uint64("crash-seed", 0, "what the test of power cuts draws; runs differ by their goroutines' order as well")
)

const (
	sectorSize  = 512
	perRun      = 20_000 // files built from one run, before another is recorded
	resumeEvery = 100    // files judged, until one is carried on with as well
	recuts      = 16     // second power cuts, in the writes of one that is carried on with
	reopenEvery = 8      // of these, until one is carried on with again
)

// cuts is how many files to build.
func cuts() int {
	if testing.Short() {
		return *crashStates / 10
	}
	return *crashStates
}

func TestWhateverAPowerCutLeavesHoldsAllThatWasAcknowledged(t *testing.T) {
	crew, found := newCrew(t), newFindings()
	stop := found.tellProgress(cuts())
	defer stop()
	for run := uint64(0); found.states.Load() < int64(cuts()) && !found.failed(); run++ {
		rec := recordRun(t, run, sound)
		crew.explore(rec, min(perRun, cuts()-int(found.states.Load())), run, found)
		if run == 0 || found.failed() {
			t.Logf("run %d: %v", run, rec)
		}
	}
	t.Log(found)
	if found.failed() {
		t.Errorf("-crash-seed=%d: %v", *crashSeed, found.err)
		found.save(t)
		return
	}
	states := found.states.Load()
	if states < int64(cuts()) || found.resumed.Load() < states/resumeEvery || found.second.Load() < recuts*(states/resumeEvery) {
		t.Errorf("only %v", found)
	}
	if never := found.seen.missing(inFiles); len(never) > 0 {
		t.Errorf("in no file: %v", never)
	}
}

// A judge who has never found anything proves nothing: each of these makes some state a broken promise.
func TestTheJudgeOfPowerCutsFindsSeededBugs(t *testing.T) {
	crew := newCrew(t)
	find := func(name, where string, rec func(t *testing.T) *recording) {
		t.Run(name, func(t *testing.T) {
			found := newFindings()
			crew.explore(rec(t), 4000, 0, found)
			if found.err == nil || !strings.Contains(found.err.Error(), where) {
				t.Fatalf("not found %s: %v, %v", where, found, found.err)
			}
			t.Logf("found in state %d: %.300v", found.states.Load(), found.err)
		})
	}
	for _, bug := range []struct {
		name  string
		store func(*witness) Store[*bbolt.Tx]
	}{
		{"a phase in two transactions", func(w *witness) Store[*bbolt.Tx] { return &splitStore{witness: w} }},
		{"a reaping in two transactions, the index entry and then the record", func(w *witness) Store[*bbolt.Tx] {
			return &twoStepReaper{witness: w}
		}},
		{"a group's answers between the data's sync and the meta page", func(w *witness) Store[*bbolt.Tx] {
			w.rec.beforeMeta = answerEarly
			return w
		}},
	} {
		find(bug.name, "", func(t *testing.T) *recording { return recordRun(t, 0, bug.store) })
	}
	rec := recordRun(t, 0, sound)
	for _, bug := range []struct {
		name, where string
		do          func(*recording)
	}{
		{"an acknowledgement before the meta page is written", "was answered", (*recording).answerEarly},
		{"no sync between the data and the meta page", "", (*recording).dropBarriers},
		{"the meta page before the data", "", (*recording).putMetasFirst},
		{"no sync after the file has grown", "in a file of", (*recording).dropGrowthSyncs},
		{"a ledger that is one transaction behind", "the ledger", (*recording).delayLedgers},
		{"a phase in two transactions, but only after a power cut", "in what followed", (*recording).splitAfterCut},
	} {
		find(bug.name, bug.where, func(t *testing.T) *recording {
			flawed := rec.clone()
			bug.do(flawed)
			return flawed
		})
	}
}

// A segment is the writes between two syncs: from, up to but not including to.
type segment struct{ from, to int }

func (rec *recording) segments() (all []segment) {
	from := 0
	for i := 1; i <= len(rec.log); i++ {
		if i == len(rec.log) || rec.log[i].synced || rec.log[i-1].commit {
			all = append(all, segment{from, i})
			from = i
		}
	}
	return all
}

// A disk is a file as a power cut may leave it. What is synced is kept in memory, to return to.
type disk struct {
	path   string
	f      *os.File
	synced []byte
	writes int    // of a recording, that are synced
	parts  []part // of the unsynced writes, that are in the file
}

type part struct{ at, end int64 }

// dirInMemory is a directory whose files are kept in memory, where there is such a thing.
func dirInMemory(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "keystate-cut-*")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newDisk makes an empty disk, whose file is in a directory.
func newDisk(t testing.TB, dir string) *disk {
	f, err := os.CreateTemp(dir, "cut-*.db")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &disk{path: f.Name(), f: f}
}

// load makes the disk a copy of an image.
func (d *disk) load(image []byte) error {
	d.synced, d.writes, d.parts = append(d.synced[:0], image...), 0, d.parts[:0]
	err := d.f.Truncate(int64(len(image)))
	if err == nil {
		_, err = d.f.WriteAt(image, 0)
	}
	return err
}

func (d *disk) grow(size int64) error {
	if more := size - int64(len(d.synced)); more > 0 {
		d.synced = append(d.synced, make([]byte, more)...)
		return d.f.Truncate(size)
	}
	return nil
}

// sync makes a recording's writes durable up to but not including one.
func (d *disk) sync(log []write, to int) (err error) {
	for _, w := range log[d.writes:to] {
		err = errors.Join(err, d.grow(w.size))
		copy(d.synced[w.at:], w.b)
		_, failed := d.f.WriteAt(w.b, w.at)
		err = errors.Join(err, failed)
	}
	d.writes = to
	return err
}

// land puts a part of a write into the file, without a sync.
func (d *disk) land(w write, from, to int) error {
	p := part{w.at + int64(from), w.at + int64(to)}
	d.parts = append(d.parts, p)
	_, err := d.f.WriteAt(w.b[from:to], p.at)
	return err
}

// shrink takes back a growth that was not synced.
func (d *disk) shrink(size int64) error {
	d.parts = append(d.parts, part{size, int64(len(d.synced))})
	return d.f.Truncate(size)
}

// Odds are how likely it is that a page which was not synced is lost, is there, or is torn.
type odds struct{ lost, whole, torn int }

// weather is how a disk may treat what was not synced: it has written whole pages, in any order, or also parts of them.
var weather = []odds{{1, 1, 0}, {2, 2, 1}, {1, 6, 2}, {0, 1, 1}, {0, 0, 1}, {1, 1, 4}}

// tear puts any part of a write into the file, down to single sectors.
func (d *disk) tear(w write, o odds, pageSize int, rng *rand.Rand) (err error) {
	for page := 0; page < len(w.b) && err == nil; page += pageSize {
		end := min(page+pageSize, len(w.b))
		fate := rng.IntN(o.lost + o.whole + o.torn)
		switch {
		case fate < o.lost:
			continue
		case fate < o.lost+o.whole:
			err = d.land(w, page, end)
			continue
		}
		for from := page; from < end && err == nil; from += sectorSize {
			if rng.IntN(2) == 0 {
				err = d.land(w, from, min(from+sectorSize, end))
			}
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

// The first states of every segment are the same ones: before anything is written; when the file has grown; then after each
// write, when all so far are on the disk. The others are drawn.
const (
	beforeAnything = iota
	grown
)

// least is how many states are not drawn.
func (seg segment) least() int { return grown + 1 + seg.to - seg.from }

// cut fails the power in a segment. It says how many writes had been made by then.
func (d *disk) cut(rec *recording, seg segment, state int, rng *rand.Rand) (at int, err error) {
	if err := d.sync(rec.log, seg.from); err != nil {
		return 0, err
	}
	last := rec.log[seg.to-1]
	if state != beforeAnything {
		err = d.grow(last.size)
	}
	o := odds{whole: 1}
	switch {
	case state <= grown:
		at = seg.from
	case state < seg.least():
		at = seg.from + state - grown
	default: // rather late than early, when more may happen
		n := seg.to - seg.from
		at = seg.from + 1 + max(rng.IntN(n), rng.IntN(n))
		o = weather[rng.IntN(len(weather))]
	}
	for _, w := range rec.log[seg.from:at] {
		err = errors.Join(err, d.tear(w, o, int(rec.pageSize), rng))
	}
	if last.safe < last.size && rng.IntN(2) == 0 {
		err = errors.Join(err, d.shrink(last.safe))
	}
	return at, err
}

// Findings is what came of judging states, until the first that is wrong.
type findings struct {
	states, resumed, second atomic.Int64
	began                   time.Time
	seen                    sightings

	mu    sync.Mutex
	err   error
	image []byte // that is wrong
}

func newFindings() *findings { return &findings{began: time.Now()} }

func (found *findings) String() string {
	took := time.Since(found.began)
	states := found.states.Load()
	return fmt.Sprintf("%d states judged, %d of them carried on with, and %d states of a second cut in that, in %v: %.0f/s",
		states, found.resumed.Load(), found.second.Load(), took.Round(time.Millisecond), float64(states)/took.Seconds())
}

func (found *findings) failed() bool {
	found.mu.Lock()
	defer found.mu.Unlock()
	return found.err != nil
}

func (found *findings) fail(err error) {
	found.mu.Lock()
	defer found.mu.Unlock()
	if found.err != nil {
		return
	}
	found.err = err
	if f := new(wrongFile); errors.As(err, &f) {
		found.image = f.image
	}
}

// A wrongFile is what is wrong with a file, with the file.
type wrongFile struct {
	error
	image []byte
}

func (f *wrongFile) Unwrap() error { return f.error }

// save keeps the file that is wrong: no seed brings it back, since the run before the cut is another each time.
func (found *findings) save(t *testing.T) {
	f, err := os.CreateTemp("", "keystate-cut-*.db")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(found.image)
	t.Logf("the file is kept as %s (%v)", f.Name(), errors.Join(err, f.Close()))
}

// tellProgress says every ten seconds how far the test is, until it is stopped.
func (found *findings) tellProgress(of int) (stop func()) {
	done := make(chan struct{})
	var teller sync.WaitGroup
	teller.Go(func() {
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				states := max(1, found.states.Load())
				left := time.Duration(float64(time.Since(found.began)) * float64(int64(of)-states) / float64(states))
				fmt.Fprintf(os.Stderr, "of %d: %v, %v left\n", of, found, left.Round(time.Second))
			case <-done:
				return
			}
		}
	})
	return func() {
		close(done)
		teller.Wait()
	}
}

// A crew is as many examiners as there are cores; beyond some, they would wait for each other, since a process has one map of
// its memory.
type crew []*examiner

func newCrew(t testing.TB) crew {
	var c crew
	dir := dirInMemory(t)
	const most = 16
	for range min(runtime.GOMAXPROCS(0), most) {
		x := &examiner{memo: map[string]*filed{}, rows: map[string]*row{}}
		for i := range x.benches {
			x.benches[i] = &bench{disk: newDisk(t, dir)}
		}
		c = append(c, x)
	}
	return c
}

// explore builds as many states or a few more, and judges each: those that are not drawn, and others the more the more is
// written.
func (c crew) explore(rec *recording, states int, run uint64, found *findings) {
	const drawn = 2 // in every segment
	segments := rec.segments()
	least, writes := 0, 0
	for _, seg := range segments {
		least += seg.least() + drawn
		writes += seg.to - seg.from - 1
	}
	each := float64(max(0, states-least)) / float64(writes) // of the others, by what there is to be lost
	var next atomic.Int64
	var all sync.WaitGroup
	for _, x := range c {
		x.found = found
		all.Go(func() {
			if err := x.benches[0].disk.load(rec.base); err != nil {
				found.fail(err)
			}
			for i := int(next.Add(1)) - 1; i < len(segments) && !found.failed(); i = int(next.Add(1)) - 1 {
				seg := segments[i]
				rng := rand.New(rand.NewPCG(*crashSeed, run<<32|uint64(seg.from)))
				share := seg.least() + drawn + int(math.Ceil(each*float64(seg.to-seg.from-1)))
				for state := 0; state < share && !found.failed(); state++ {
					if err := x.examine(0, rec, seg, state, rng); err != nil {
						found.fail(fmt.Errorf("run %d, state %d: %w", run, found.states.Load(), err))
					}
				}
			}
		})
	}
	all.Wait()
}

// An examiner builds states and judges them, on disks of its own: those that a first power cut leaves, those that a second one
// leaves, and what came in the end of the last.
type examiner struct {
	benches [3]*bench
	memo    map[string]*filed // by their bytes
	rows    map[string]*row   // by their names
	found   *findings

	readings int
	reaped   bool // it has seen a key that was
}

type bench struct {
	disk *disk
	contents
}

// examine judges one state after so many cuts before. Some are carried on with.
func (x *examiner) examine(before int, rec *recording, seg segment, state int, rng *rand.Rand) error {
	b := x.benches[before]
	at, err := b.disk.cut(rec, seg, state, rng)
	if err != nil {
		return err
	}
	c := cut{rec: rec, at: at, due: rec.due(seg, at)}
	if err = x.judge(b, c); err == nil && x.goesOn(before) {
		err = x.carryOn(before, c, rng)
	}
	if err == nil {
		return b.disk.restore()
	}
	if f := new(wrongFile); !errors.As(err, &f) { // else it was wrong after one more cut
		image, failed := os.ReadFile(b.disk.path)
		err = &wrongFile{errors.Join(err, failed), image}
	}
	return fmt.Errorf("after %d of %d writes, %d of them synced: %w", at, len(rec.log), seg.from, err)
}

// goesOn counts a state and says whether it is carried on with.
func (x *examiner) goesOn(before int) bool {
	if before > 0 {
		return x.found.second.Add(1)%reopenEvery == 0
	}
	return x.found.states.Add(1)%resumeEvery == 0
}

// due is when the last promise was given that holds after so many writes. One that was given when a transaction's last write
// was the last, was given after its sync; so it does not hold yet while that sync is under way.
func (rec *recording) due(seg segment, at int) int {
	if at > seg.from && rec.log[at-1].commit {
		at--
	}
	return at
}

// A cut is one moment at which the power fails, or the end.
type cut struct {
	rec *recording
	at  int // how many writes had been made
	due int // promises hold that were given by then
}

// Contents is what a program finds in its file.
type contents struct {
	reading  int // which it was of the examiner's
	records  map[Key]*filed
	rows     []*row
	from, to int    // the program's own rows
	epoch    uint64 // of the last boot
}

// A filed record is one as it was found, with what follows from its bytes alone.
type filed struct {
	Record
	bare  []byte // the record without its sequence
	state transfer
	rows  []phaseRow
}

// A phaseRow is one that a phase writes for a record: wanted if it has.
type phaseRow struct {
	*row
	wanted bool
}

func (f *filed) String() string {
	if f == nil {
		return "nothing"
	}
	return fmt.Sprintf("%+v", f.Record)
}

// A row is one of the program's, by its name the same in every file.
type row struct {
	name   string
	owner  Key
	read   int    // the last reading that has found it
	count  string // what it has found: a stroke for each time that the row was written
	linked int    // the last reading that has found its owner's record
}

func (x *examiner) row(name []byte) *row {
	r := x.rows[string(name)]
	if r == nil {
		r = &row{name: string(name), owner: Key{ID: string(name[:bytes.LastIndexByte(name, '/')])}}
		x.rows[r.name] = r
	}
	return r
}

// file decodes a stored record. The same bytes are decoded once.
func (x *examiner) file(frame []byte) (*filed, error) {
	if f := x.memo[string(frame)]; f != nil {
		return f, nil
	}
	r, err := decodeRecord(frame)
	if err != nil {
		return nil, err
	}
	f := &filed{Record: r}
	if err := decodeState(r.State, &f.state); err != nil || f.state.From != r.Key.ID {
		return nil, fmt.Errorf("%s: its state is %+v (%v)", r.Key, f.state, err)
	}
	for point, name := range rowOf {
		i := slices.IndexFunc(r.History, func(p Passage) bool { return p.Point == point })
		wanted := i >= 0 && r.History[i].Ignored == "" && !(point == Finished && r.Refusal != nil)
		f.rows = append(f.rows, phaseRow{x.row([]byte(r.Key.ID + "/" + name)), wanted})
	}
	r.Sequence = 0
	f.bare = appendRecord(nil, &r)
	x.see(&r)
	const most = 1 << 14
	if len(x.memo) >= most {
		clear(x.memo)
	}
	x.memo[string(frame)] = f
	return f, nil
}

// inFiles is what must have been found in some file, or the run was not worth cutting.
var inFiles = []string{
	"running", "waiting", "parked", "finished", "an effect under way", "refused", "ignored", "staged", "abandoned", "reaped", "moved",
}

func (x *examiner) see(r *Record) {
	x.found.seen.note(string(r.Status))
	for what, is := range map[string]bool{
		"an effect under way": !r.FirstTried.IsZero() && r.Status == Running,
		"refused":             r.Refusal != nil,
		"abandoned":           r.Refusal != nil && strings.HasPrefix(r.Refusal.Reason, "abandoned"),
		"ignored":             slices.ContainsFunc(r.History, func(p Passage) bool { return p.Ignored != "" }),
		"staged":              strings.HasSuffix(r.Key.ID, "/audit"),
		"moved":               isMove(r.Key),
	} {
		if is {
			x.found.seen.note(what)
		}
	}
}

// judge opens a file as Open does, but for what writes and syncs, and judges what it holds.
func (x *examiner) judge(b *bench, c cut) (err error) {
	f, err := os.Open(b.disk.path)
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
	if err := db.View(func(tx *bbolt.Tx) error { return x.read(tx, &b.contents) }); err != nil {
		return err
	}
	return x.check(c, &b.contents)
}

func (x *examiner) read(tx *bbolt.Tx, found *contents) error {
	id, err := readIdentity(tx)
	if err != nil {
		return err
	}
	k, err := newBoltKeys(tx, id)
	if err != nil {
		return err
	}
	found.epoch = k.ledger.epoch
	if found.records == nil {
		found.records = map[Key]*filed{}
	}
	clear(found.records)
	found.rows = found.rows[:0]
	x.readings++
	found.reading = x.readings
	each := func(_, frame []byte) error {
		r, err := x.file(frame)
		if err != nil {
			return err
		}
		if _, twice := found.records[r.Key]; twice {
			return fmt.Errorf("%s has two records", r.Key)
		}
		found.records[r.Key] = r
		for _, row := range r.rows {
			row.linked = found.reading
		}
		return nil
	}
	err = errors.Join(k.live.ForEach(each), k.done.ForEach(each))
	if b := tx.Bucket([]byte("notes")); b != nil {
		err = errors.Join(err, b.ForEach(func(name, count []byte) error {
			row := x.row(name)
			row.read = found.reading
			if row.count != string(count) {
				row.count = string(count)
			}
			found.rows = append(found.rows, row)
			return nil
		}))
	}
	found.from, found.to = 0, 0
	if b := tx.Bucket(coins); b != nil {
		found.from, _ = strconv.Atoi(string(b.Get([]byte("from"))))
		found.to, _ = strconv.Atoi(string(b.Get([]byte("to"))))
	}
	return err
}

// gone says whether a key may have been reaped by then.
func (c cut) gone(key Key) bool {
	at, reaped := c.rec.reaped[key]
	return reaped && at < c.at
}

// check judges what a file holds.
func (x *examiner) check(c cut, found *contents) error {
	for key, given := range c.rec.promises {
		r := found.records[key]
		if r == nil && given[0].at <= c.due && c.gone(key) {
			x.sawReaped()
			continue
		}
		for i := range given {
			p := &given[i]
			if p.at > c.due {
				break
			}
			if r == nil || !p.kept(&c, r) {
				return fmt.Errorf("%s was %s after %d writes; there is %v", key, p.what, p.at, r)
			}
		}
	}
	for _, b := range c.rec.boots {
		if b.at <= c.due && b.epoch > found.epoch {
			return fmt.Errorf("epoch %d was begun after %d writes; there is epoch %d", b.epoch, b.at, found.epoch)
		}
	}
	return c.checkRecords(found)
}

func (x *examiner) sawReaped() {
	if !x.reaped {
		x.reaped = true
		x.found.seen.note("reaped")
	}
}

// checkRecords judges the records against each other and against the program's rows.
func (c cut) checkRecords(found *contents) error {
	expected, moved := 0, 0
	for key, r := range found.records {
		n, err := c.checkRecord(r, found.reading)
		if r.Epoch > found.epoch {
			err = fmt.Errorf("it was claimed in epoch %d, in a store of epoch %d", r.Epoch, found.epoch)
		}
		if err != nil {
			return fmt.Errorf("%s, %s at %s: %w", key, r.Status, r.Point, err)
		}
		expected += n
		if isMove(key) {
			moved++
		}
	}
	for _, row := range found.rows { // without a record, there may be those that reaping has left behind
		if row.linked == found.reading {
			expected--
		} else if !c.gone(row.owner) {
			return fmt.Errorf("the row %s is nobody's", row.name)
		}
	}
	if expected != 0 {
		return fmt.Errorf("there are %d rows less than points that wrote one", expected)
	}
	for key := range c.rec.reaped {
		if _, there := found.records[key]; isMove(key) && !there && c.gone(key) {
			moved++
		}
	}
	if found.from != -moved || found.to != moved {
		return fmt.Errorf("%d and %d coins for %d keys that were staged with one each", found.from, found.to, moved)
	}
	return nil
}

// checkRecord judges a record against what was asked for and sent by then, and against the rows. It returns how many it has.
func (c cut) checkRecord(r *filed, reading int) (n int, err error) {
	if asked, known := c.rec.asked[r.Key]; !known || asked >= c.at {
		return 0, errors.New("nobody has asked for it")
	}
	payout := ""
	if r.Acted || has(&r.Record, "payout_sent") {
		sent, known := c.rec.sent[r.Key]
		if !known || sent.at >= c.at {
			return 0, errors.New("its payout was not sent")
		}
		payout = "po_" + sent.token[:8]
	}
	if r.state.Payout != payout {
		return 0, fmt.Errorf("its payout is %q, not %q", r.state.Payout, payout)
	}
	for _, row := range r.rows {
		there := row.read == reading
		if there != row.wanted || there && row.count != "|" {
			return 0, fmt.Errorf("the row %s is %q (there: %v); its points are %v", row.name, row.count, there, r.History)
		}
		if there {
			n++
		}
	}
	return n, nil
}

// carryOn opens a copy of a file and carries every key in it to its end. Whoever was sent to before is sent to under the
// same token, and not at all when its answer is saved. Then it fails the power again, at some moments of that.
func (x *examiner) carryOn(cutsBefore int, c cut, rng *rand.Rand) error {
	b, next := x.benches[cutsBefore], x.benches[cutsBefore+1]
	image, err := os.ReadFile(b.disk.path)
	if err != nil {
		return err
	}
	if err := next.disk.load(image); err != nil {
		return err
	}
	rec, err := c.resume(next.disk.path, image, &b.contents)
	if err != nil {
		return fmt.Errorf("carrying on: %w", err)
	}
	x.found.resumed.Add(1)
	if err := x.judge(next, cut{rec: rec, at: math.MaxInt, due: math.MaxInt}); err != nil {
		return fmt.Errorf("in the end: %w", err)
	}
	if err := compare(b.records, next.records); err != nil {
		return err
	}
	if cutsBefore+2 == len(x.benches) {
		return nil
	}
	return x.cutAgain(cutsBefore+1, rec, rng)
}

// cutAgain judges what a second power cut can leave.
func (x *examiner) cutAgain(cutsBefore int, rec *recording, rng *rand.Rand) error {
	if err := x.benches[cutsBefore].disk.load(rec.base); err != nil {
		return err
	}
	segments := rec.segments()
	moments := make([]int, recuts)
	for i := range moments {
		moments[i] = rng.IntN(len(segments))
	}
	slices.Sort(moments)
	for _, i := range moments {
		if err := x.examine(cutsBefore, rec, segments[i], rng.IntN(2*segments[i].least()), rng); err != nil {
			return fmt.Errorf("in what followed: %w", err)
		}
	}
	return nil
}

// compare judges what has become of the records of a file that was carried on with.
func compare(before, after map[Key]*filed) error {
	for key, r := range after {
		if r.Status != Answered {
			return fmt.Errorf("%s is %s in the end", key, r.Status)
		}
	}
	for key, r := range before {
		now := after[key]
		same := now != nil && now.Incarnation == r.Incarnation
		if r.Status == Answered {
			same = same && now.Sequence == r.Sequence && bytes.Equal(now.bare, r.bare)
		}
		if !same {
			return fmt.Errorf("%s was %v, and is %v in the end", key, r, now)
		}
	}
	return nil
}

// since is a recording that goes on from a cut: all that had happened by then, has.
func (c cut) since(image []byte) *recording {
	by := func(notes map[Key]int) map[Key]int {
		happened := map[Key]int{}
		for key, at := range notes {
			if at < c.at {
				happened[key] = -1
			}
		}
		return happened
	}
	rec := newRecording()
	rec.base, rec.resumed = image, c.rec.resumed
	rec.asked, rec.reaped, rec.freed = by(c.rec.asked), by(c.rec.reaped), by(c.rec.freed)
	for key, s := range c.rec.sent {
		if s.at < c.at {
			rec.sent[key] = sending{at: -1, token: s.token, times: s.times}
		}
	}
	for key, given := range c.rec.promises {
		for _, p := range given {
			if p.at <= c.due {
				p.at = 0
				rec.promises[key] = append(rec.promises[key], p)
			}
		}
	}
	for _, b := range c.rec.boots {
		if b.at <= c.due {
			rec.boots = append(rec.boots, boot{0, b.epoch})
		}
	}
	return rec
}

// resume opens a file and carries every key in it to its end, and records that.
func (c cut) resume(path string, image []byte, before *contents) (*recording, error) {
	rec := c.since(image)
	opts := &Options{Logger: quiet, Retention: -1, Headroom: -1, Observer: rec.observer()}
	store, err := openBolt(path, opts.orDefault())
	if err != nil {
		return nil, err
	}
	if err := rec.watch(store, image); err != nil {
		return nil, errors.Join(err, closeBolt(store.db, store.file))
	}
	e, err := New(rec.resumed(&witness{store, rec}), opts)
	if err != nil {
		return nil, errors.Join(err, closeBolt(store.db, store.file))
	}
	err = rec.carryOn(e, c, before)
	closed := e.Close()
	return rec, errors.Join(append(rec.wrong, err, closed)...)
}

// carryOn carries every key in a store to its end that a cut has left.
func (rec *recording) carryOn(e *Engine[*bbolt.Tx], c cut, before *contents) error {
	if rec.booted(e.epoch); e.epoch <= before.epoch {
		return fmt.Errorf("epoch %d again, after epoch %d", e.epoch, before.epoch)
	}
	effect := func(_ context.Context, token string, s *transfer) error {
		key := Key{ID: s.From}
		rec.send(key, token)
		if r := before.records[key]; r != nil {
			if sent, known := c.rec.sent[key]; has(&r.Record, "payout_sent") || known && sent.token != token {
				rec.fault("%s: sent under %s again, first under %q; its points were %v", key, token, sent.token, r.History)
			}
		}
		s.Payout = "po_" + token[:8]
		return nil
	}
	if _, err := enlist(e, effect, rec.ask); err != nil {
		return err
	}
	if err := e.Resume(ctx); err != nil {
		return err
	}
	for r, err := range e.Keys(ctx, Filter{Status: Parked}) { // such as those cut off at their last attempt
		rec.note(rec.freed, r.Key)
		if err := cmp.Or(err, e.Retry(ctx, r.Key)); err != nil {
			return err
		}
	}
	return e.Resume(ctx)
}
