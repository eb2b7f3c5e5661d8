package keystate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
)

// The run whose writes are recorded, before the power is cut in it: what is asked for, what happens to it, and what anybody may
// rely on from then on; and the bugs that are put into it to try those who judge.

// A write is one that bbolt made, or Open.
type write struct {
	at     int64
	b      []byte
	size   int64 // of the file, when it was made
	safe   int64 // what no power cut takes back of the size: growth is synced before bbolt writes there
	synced bool  // everything before it is: bbolt syncs before it writes a meta page, and after it
	commit bool  // it is the last of a transaction, which holds once it is synced
}

// A promise is what a caller, an observer or an effect was entitled to rely on from a moment on.
type promise struct {
	at   int // how many writes had been made
	what string
	kept func(c *cut, r *filed) bool

	answer bool // it is a caller's answer
}

// A sending is what the outside world saw first of a key's effect, and how often it has since.
type sending struct {
	at    int
	token string
	times int

	era   era
	tries int // in the era
}

// An era is a time in which the attempts at an effect are counted on.
type era struct {
	epoch    uint64
	operated bool // an operator has let the key go on
}

// A boot is an engine's start: from then on it claims keys under its epoch, and no other may.
type boot struct {
	at    int
	epoch uint64
}

// A recording is all the writes of a run, and what happened between them.
type recording struct {
	base     []byte // the file before the first
	pageSize int64

	mu       sync.Mutex
	log      []write
	promises map[Key][]promise // in the order in which they were given
	asked    map[Key]int       // since when there may be a record
	reaped   map[Key]int       // since when there may be none any more
	freed    map[Key]int       // since when it may not be parked any more
	sent     map[Key]sending
	boots    []boot
	wrong    []error // what should not have happened even without a power cut

	beforeMeta func(*boltStore)                // a bug's, if not nil
	resumed    func(*witness) Store[*bbolt.Tx] // the store that carries a file on
	grouped    bool                            // members have shared a commit
}

func newRecording() *recording {
	return &recording{
		promises: map[Key][]promise{}, sent: map[Key]sending{}, resumed: sound,
		asked: map[Key]int{}, reaped: map[Key]int{}, freed: map[Key]int{},
	}
}

// clone is a copy whose writes and promises may be changed.
func (rec *recording) clone() *recording {
	promises := map[Key][]promise{}
	for key, given := range rec.promises {
		promises[key] = slices.Clone(given)
	}
	return &recording{
		base: rec.base, pageSize: rec.pageSize, log: slices.Clone(rec.log), promises: promises,
		asked: rec.asked, reaped: rec.reaped, freed: rec.freed, sent: rec.sent, boots: rec.boots, resumed: rec.resumed,
	}
}

func (rec *recording) String() string {
	given := 0
	for _, promises := range rec.promises {
		given += len(promises)
	}
	return fmt.Sprintf("%d writes in %d segments, %d promises on %d keys", len(rec.log), len(rec.segments()), given, len(rec.promises))
}

// fates are what becomes of a request, by whom the money is for.
var fates = []string{"bob", "flaky", "late", "stuck", "closed", "shut", "mute", "audited", long}

// long makes a record of more than a page.
var long = strings.Repeat("a long name ", 400)

// rowOf names the row that the phase writes which reaches a point.
var rowOf = map[RecoveryPoint]string{"funds_reserved": "reserved", "payout_sent": "sent", "receipt_sent": "receipt", Finished: "settled"}

// A payout is the effect of the errands.
type payout func(ctx context.Context, token string, s *transfer) error

// enlist registers the errands, which stage keys of their own machine: they wait for it, since kept keys go on before it
// is there.
func enlist(e *Engine[*bbolt.Tx], effect payout, staging func(Key)) (m *Machine[transfer], err error) {
	there := make(chan struct{})
	defer close(there)
	m, err = Register(e, "transfer", errands(effect, func(tx *bbolt.Tx, child transfer) error {
		<-there
		staging(Key{ID: child.From})
		return Stage(tx, m, Key{ID: child.From}, child)
	}))
	return m, err
}

// errands are the phases of a request whose fate is given by whom the money is for.
func errands(effect payout, stage func(*bbolt.Tx, transfer) error) []transferPhase {
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
			return stage(tx, transfer{From: s.From + "/audit", To: "bob"})
		}
		return nil
	}
	receipt := func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
		if err := note("receipt")(ctx, tx, s); err != nil || s.To != "mute" {
			return err
		}
		return errDown
	}
	return slices.Insert(phases, 2, transferPhase{To: "receipt_sent", OnError: Ignore, Commit: receipt})
}

// recordRun records a run of 58 requests, with what they stage: by several callers at a time, who are answered, refused, kept
// waiting and parked, while the program writes rows of its own, an operator retries and abandons, old keys are reaped, and
// the file grows. In the middle, the engine is shut down and opened again, and the clients repeat what it did not answer.
func recordRun(t *testing.T, run uint64, store func(*witness) Store[*bbolt.Tx]) *recording {
	t.Helper()
	rec := newRecording()
	dir := t.TempDir()
	defer os.RemoveAll(dir)
	rng := rand.New(rand.NewPCG(*crashSeed, run))
	synctest.Test(t, func(t *testing.T) {
		s := rec.open(t, filepath.Join(dir, "keys.db"), store)
		defer func() { s.e.Close() }()
		const rounds, interrupted = 3, 1
		for round := range rounds {
			clients := draw(rng, round)
			if round == interrupted {
				for n := range 4 {
					clients = append(clients, []transfer{{From: fmt.Sprintf("slow.%d", n), To: "slow"}})
				}
			}
			crowd := s.serve(t, clients)
			if round == interrupted {
				time.Sleep(150 * time.Millisecond) // of the bubble's clock: some are in an effect, some wait for their next attempt
				if err := s.e.Close(); err != nil {
					t.Fatal(err)
				}
				crowd.Wait()
				s = rec.open(t, filepath.Join(dir, "keys.db"), store)
				crowd = s.serve(t, clients)
			}
			crowd.Wait()
			if err := s.e.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			s.operate(t)
			time.Sleep(2 * time.Minute) // the reaper comes
		}
		if err := s.e.Close(); err != nil {
			t.Fatal(err)
		}
	})
	for _, err := range rec.wrong {
		t.Error(err)
	}
	first, last := rec.log[0].size, rec.log[len(rec.log)-1].size
	again := rec.sent[Key{ID: "slow.0"}].times
	if len(rec.reaped) == 0 || len(rec.asked) < 58 || len(rec.log) < 200 || last < 2*first || again < 2 || !rec.grouped {
		t.Fatalf("a run of little: %d writes, %d keys asked for, %d reaped, a file of %d bytes, an interrupted effect sent %d times, groups: %v",
			len(rec.log), len(rec.asked), len(rec.reaped), last, again, rec.grouped)
	}
	return rec
}

// draw draws what the clients of a round ask for: every fate twice.
func draw(rng *rand.Rand, round int) (clients [][]transfer) {
	for i, n := range rng.Perm(2 * len(fates)) {
		if i%2 == 0 {
			clients = append(clients, nil)
		}
		last := &clients[len(clients)-1]
		*last = append(*last, transfer{From: fmt.Sprintf("%d.%d", round, i), To: fates[n%len(fates)], Cents: rng.Int64N(1000)})
	}
	return clients
}

// A served store is open, and its writes are recorded.
type served struct {
	rec *recording
	e   *Engine[*bbolt.Tx]
	m   *Machine[transfer]
}

// open opens the store at path, and makes it if it is not there. Of what Open writes, only the making of a new file is not
// recorded.
func (rec *recording) open(t *testing.T, path string, around func(*witness) Store[*bbolt.Tx]) *served {
	before, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	opts := &Options{Logger: quiet, Retention: 3 * time.Minute, Observer: rec.observer()}
	store, err := openBolt(path, opts.orDefault())
	if err != nil {
		t.Fatal(err)
	}
	opened, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if before == nil {
		rec.base = opened
	} else if !bytes.Equal(before, opened) {
		t.Fatal("Open has changed the file")
	}
	if err := rec.watch(store, opened); err != nil {
		t.Fatal(err)
	}
	s := &served{rec: rec}
	if s.e, err = New(around(&witness{store, rec}), opts); err != nil {
		t.Fatal(err)
	}
	rec.booted(s.e.epoch)
	if s.m, err = enlist(s.e, rec.effect, rec.ask); err != nil {
		t.Fatal(err)
	}
	return s
}

// observer is told what is durable.
func (rec *recording) observer() *Observer {
	return &Observer{
		Grouped: func(ev Event) { rec.grouped = rec.grouped || ev.Size > 1 },
		Committed: func(ev Event) {
			rec.promise(ev.Key, "observed at "+string(ev.Point), func(_ *cut, r *filed) bool { return has(&r.Record, ev.Point) })
		},
		Finished: func(ev Event) {
			rec.promise(ev.Key, "observed as finished", func(_ *cut, r *filed) bool { return r.Status == Answered })
		},
		Parked: func(ev Event) {
			rec.promise(ev.Key, "observed as parked", func(c *cut, r *filed) bool {
				freed, operated := c.rec.freed[ev.Key]
				return r.Status == Parked && r.Attempts == ev.Attempt || operated && freed < c.at
			})
		},
	}
}

// watch records what is written to a store that has just been opened on an image, from the meta pages on that Open has written
// anew. The syncs are not recorded but known to be where bbolt and Open make them.
func (rec *recording) watch(store *boltStore, image []byte) error {
	if store.db.NoSync || store.db.NoGrowSync {
		return errors.New("the store leaves syncs out")
	}
	store.db.AllocSize = 32 << 10 // else the file would grow but once
	rec.pageSize = int64(store.db.Info().PageSize)
	rec.wrote(image[:2*rec.pageSize], 0, int64(len(image)))
	brokenDisk(&Engine[*bbolt.Tx]{store: store}, func(write func([]byte, int64) (int, error), b []byte, at int64) (int, error) {
		info, err := store.file.Stat()
		if err != nil {
			return 0, err
		}
		if rec.beforeMeta != nil && at < 2*rec.pageSize {
			rec.beforeMeta(store)
		}
		rec.wrote(b, at, info.Size())
		return write(b, at)
	})
	return nil
}

func (rec *recording) wrote(b []byte, at, size int64) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	size = max(size, at+int64(len(b))) // on Windows, the file grows by being written
	meta := at < 2*rec.pageSize
	rec.log = append(rec.log, write{
		at: at, b: bytes.Clone(b), size: size, safe: size, commit: meta,
		synced: meta || len(rec.log) == 0 || rec.log[len(rec.log)-1].commit,
	})
}

// promise notes that from now on something is relied on.
func (rec *recording) promise(key Key, what string, kept func(*cut, *filed) bool) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.promiseLocked(key, what, kept)
}

func (rec *recording) promiseLocked(key Key, what string, kept func(*cut, *filed) bool) {
	given := promise{at: len(rec.log), what: what, kept: kept, answer: strings.HasPrefix(what, "answered")}
	rec.promises[key] = append(rec.promises[key], given)
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

func (rec *recording) booted(epoch uint64) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.boots = append(rec.boots, boot{len(rec.log), epoch})
}

func (rec *recording) fault(format string, args ...any) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.wrong = append(rec.wrong, fmt.Errorf(format, args...))
}

// effect is the outside world: an effect may rely on the key's being on disk, and on where it stands.
func (rec *recording) effect(ctx context.Context, token string, s *transfer) error {
	n := rec.send(Key{ID: s.From}, token)
	switch {
	case s.To == "closed":
		return Final(errDown)
	case s.To == "slow" && n < 2:
		<-ctx.Done()
		return ctx.Err()
	case s.To == "flaky" && n < 2, s.To == "late" && n < 4, s.To == "stuck" && n <= 5:
		return errDown
	}
	s.Payout = "po_" + token[:8]
	return nil
}

func (rec *recording) send(key Key, token string) (times int) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	s, known := rec.sent[key]
	if !known {
		s = sending{at: len(rec.log), token: token}
	}
	_, operated := rec.freed[key]
	if now := (era{rec.boots[len(rec.boots)-1].epoch, operated}); s.era != now {
		s.era, s.tries = now, 0
	}
	s.times++
	s.tries++
	rec.sent[key] = s
	rec.promiseLocked(key, fmt.Sprintf("sent, %d times in %+v", s.tries, s.era), s.kept)
	if s.token != token {
		rec.wrong = append(rec.wrong, fmt.Errorf("%s: sent under %s, then under %s", key, s.token, token))
	}
	return s.times
}

// kept says whether a record shows that its effect may have been sent so often.
func (s sending) kept(c *cut, r *filed) bool {
	switch freed, operated := c.rec.freed[r.Key]; {
	case r.Status == Answered || has(&r.Record, "payout_sent"):
		return true
	case r.Begun != "payout_sent" || r.FirstTried.IsZero() || r.Epoch < s.era.epoch:
		return false
	case r.Epoch > s.era.epoch || r.Status != Running: // counted anew, or not any more
		return true
	case !s.era.operated && operated && freed < c.at: // perhaps counted anew
		return true
	}
	return r.Attempts >= s.tries
}

func has(r *Record, point RecoveryPoint) bool {
	return slices.ContainsFunc(r.History, func(p Passage) bool { return p.Point == point })
}

// serve lets clients come, one request of each after the other, and the program do something of its own meanwhile.
func (s *served) serve(t *testing.T, clients [][]transfer) *sync.WaitGroup {
	var crowd sync.WaitGroup
	for n, requests := range clients {
		crowd.Go(func() {
			for _, request := range requests {
				s.call(t, request)
			}
		})
		if n%3 == 0 { // somebody is impatient and asks twice
			crowd.Go(func() { s.call(t, requests[0]) })
		}
		if n%4 == 0 {
			crowd.Go(func() { s.move(t, Key{ID: "moved/" + requests[0].From}) })
		}
	}
	return &crowd
}

// call makes a request and notes what it may rely on: first that the key is claimed, then its answer, to the last bit.
func (s *served) call(t *testing.T, request transfer) {
	key := Key{ID: request.From}
	s.rec.ask(key)
	run, err := s.m.Start(ctx, key, request)
	if err != nil {
		if !errors.Is(err, ErrParked) && !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v", key, err)
		}
		return
	}
	s.rec.promise(key, "claimed", func(*cut, *filed) bool { return true })
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
	s.rec.promise(key, fmt.Sprintf("answered as %s, %v", told.Status, err), func(_ *cut, r *filed) bool {
		if r.Version > told.Version && told.Status != Answered { // it has gone on
			return r.Incarnation == told.Incarnation
		}
		if run.Replayed() { // of the record it knows the answer alone
			return r.Machine == told.Machine && r.Status == told.Status && r.Point == told.Point && r.Fingerprint == told.Fingerprint &&
				bytes.Equal(r.State, told.State) && reflect.DeepEqual(r.Refusal, told.Refusal)
		}
		return bytes.Equal(r.bare, frame)
	})
}

// coins are the program's own two rows, which always add up to nothing.
var coins = []byte("coins")

func isMove(key Key) bool { return strings.HasPrefix(key.ID, "moved/") }

// move moves a coin from one of the program's rows to the other and stages a key, all in one transaction.
func (s *served) move(t *testing.T, key Key) {
	s.rec.ask(key)
	err := s.e.Update(ctx, func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(coins)
		if err != nil || s.moved(tx, key) {
			return err
		}
		for row, by := range map[string]int{"from": -1, "to": 1} {
			n, _ := strconv.Atoi(string(b.Get([]byte(row))))
			err = errors.Join(err, b.Put([]byte(row), []byte(strconv.Itoa(n+by))))
		}
		return errors.Join(err, Stage(tx, s.m, key, transfer{From: key.ID, To: "bob"}))
	})
	switch {
	case err == nil:
		s.rec.promise(key, "staged", func(*cut, *filed) bool { return true })
	case !errors.Is(err, ErrClosed):
		t.Errorf("%s: %v", key, err)
	}
}

// moved says whether a coin was moved under a key before.
func (s *served) moved(tx *bbolt.Tx, key Key) bool {
	_, err := s.e.store.Keys(tx).Get(key)
	return err == nil
}

// operate lets the first parked key go on, and abandons the others but one.
func (s *served) operate(t *testing.T) {
	n := 0
	for r, err := range s.e.Keys(ctx, Filter{Status: Parked}) {
		n++
		s.rec.note(s.rec.freed, r.Key)
		switch {
		case err != nil:
			t.Fatal(err)
		case n == 1:
			err = s.e.Retry(ctx, r.Key)
			s.rec.promise(r.Key, "retried", func(_ *cut, now *filed) bool { return now.Version > r.Version })
		case n > 2:
			err = s.e.Abandon(ctx, r.Key, "by the test")
			s.rec.promise(r.Key, "abandoned", func(_ *cut, now *filed) bool { return now.Refusal != nil })
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := s.e.Resume(ctx); err != nil {
		t.Fatal(err)
	}
}

// A witness is a store that tells of what is reaped, since no answer does.
type witness struct {
	*boltStore
	rec *recording
}

func sound(w *witness) Store[*bbolt.Tx] { return w }

func (w *witness) Keys(tx *bbolt.Tx) Keys {
	k := w.boltStore.Keys(tx)
	if tx.Writable() {
		return &witnessKeys{k, w.rec}
	}
	return k
}

type witnessKeys struct {
	Keys
	rec *recording
}

func (k *witnessKeys) Delete(r Record) error {
	k.rec.note(k.rec.reaped, r.Key)
	return k.Keys.Delete(r)
}

// A splitStore has a bug: it commits what a phase writes before what becomes of its key.
type splitStore struct {
	*witness
	held *[]Record // of the member that is running
}

func (s *splitStore) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	var records []Record
	err := s.witness.Update(ctx, func(tx *bbolt.Tx) error {
		records = nil
		s.held = &records
		defer func() { s.held = nil }()
		return fn(tx)
	})
	if err != nil || len(records) == 0 {
		return err
	}
	return s.witness.Update(ctx, func(tx *bbolt.Tx) error {
		for _, r := range records {
			if err := s.Keys(tx).Put(&r); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *splitStore) Keys(tx *bbolt.Tx) Keys {
	k := s.witness.Keys(tx)
	if tx.Writable() && s.held != nil {
		return &heldBack{Keys: k, records: s.held}
	}
	return k
}

// A twoStepReaper has a bug: it commits the deletion of a key's index entry before that of its record.
type twoStepReaper struct {
	*witness
	unnamed *[]Record // by the member that is running
}

func (s *twoStepReaper) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	var unnamed []Record
	err := s.witness.Update(ctx, func(tx *bbolt.Tx) error {
		unnamed = nil
		s.unnamed = &unnamed
		defer func() { s.unnamed = nil }()
		return fn(tx)
	})
	if err != nil || len(unnamed) == 0 {
		return err
	}
	return s.witness.Update(ctx, func(*bbolt.Tx) error {
		k := s.current().keys
		err := k.openDone()
		for _, r := range unnamed {
			name := sequenceKey(r.Sequence)
			k.remove(&k.ledger.counts.Finished, &k.ledger.doneSum, doneDigest(r.Sequence, k.done.Get(name)))
			err = errors.Join(err, k.done.Delete(name))
		}
		return err
	})
}

func (s *twoStepReaper) Keys(tx *bbolt.Tx) Keys {
	k := s.witness.Keys(tx)
	if tx.Writable() && s.unnamed != nil {
		return &unnamingKeys{k, s}
	}
	return k
}

type unnamingKeys struct {
	Keys
	store *twoStepReaper
}

func (u *unnamingKeys) Delete(r Record) error {
	k := u.store.current().keys
	place := k.place(r.Key)
	k.ledger.indexSum -= indexDigest(place, r.Sequence)
	k.changed = true
	u.store.rec.note(u.store.rec.reaped, r.Key)
	*u.store.unnamed = append(*u.store.unnamed, r)
	return errors.Join(k.openDone(), k.index.Delete(indexEntry(place, r.Sequence)))
}

// answerEarly is a bug: the members of a group are answered before its meta page is written.
func answerEarly(store *boltStore) {
	g := store.current()
	if g == nil || len(g.members) < 2 {
		return
	}
	for i, m := range g.members {
		g.members[i] = &member{done: make(chan error, 1)} // for the answer that is yet to come: m may be another call's by then
		m.done <- nil
	}
	for range 1000 { // they go on
		runtime.Gosched()
	}
}

// answerEarly makes the promises those of an engine that answers before it writes the meta page.
func (rec *recording) answerEarly() {
	for _, given := range rec.promises {
		for i := range given {
			for at := given[i].at - 1; given[i].answer && at >= 0; at-- {
				if rec.log[at].commit {
					given[i].at = at
					break
				}
			}
		}
		slices.SortStableFunc(given, func(a, b promise) int { return cmp.Compare(a.at, b.at) })
	}
}

// dropBarriers leaves out the sync between the data and the meta page.
func (rec *recording) dropBarriers() {
	for i := range rec.log {
		rec.log[i].synced = i == 0 || rec.log[i-1].commit
	}
}

// putMetasFirst lets every transaction write and sync its meta page before its data.
func (rec *recording) putMetasFirst() {
	from := 0
	for i, w := range rec.log {
		if !w.commit {
			continue
		}
		ordered := append([]write{w}, rec.log[from:i]...)
		for n := range ordered {
			ordered[n].synced, ordered[n].commit = n < 2, n == len(ordered)-1
		}
		copy(rec.log[from:], ordered)
		from = i + 1
	}
}

// dropGrowthSyncs leaves out the sync after the file has grown. No later one need make up for it: fdatasync has been known to
// leave a file's size behind, which is why bbolt makes that sync.
func (rec *recording) dropGrowthSyncs() {
	safe := int64(len(rec.base))
	for i := range rec.log {
		w := &rec.log[i]
		if i > 0 && w.size > rec.log[i-1].size {
			safe = rec.log[i-1].size
		}
		w.safe = min(w.size, safe)
	}
}

// splitAfterCut gives what carries a file on a bug, that shows only if the power is cut again.
func (rec *recording) splitAfterCut() {
	rec.resumed = func(w *witness) Store[*bbolt.Tx] { return &splitStore{witness: w} }
}

// delayLedgers lets every transaction write the ledger of the one before.
func (rec *recording) delayLedgers() {
	var previous []byte
	for i := range rec.log {
		w := &rec.log[i]
		at := bytes.Index(w.b, append(bytes.Clone(keyLedger), storeFormat))
		if at < 0 || w.commit {
			continue
		}
		w.b = bytes.Clone(w.b)
		stored := w.b[at+len(keyLedger):][:ledgerSize+4]
		present := bytes.Clone(stored)
		if previous != nil {
			copy(stored, previous)
		}
		previous = present
	}
}
