//go:build linux || darwin

package damage

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// What must hold of a damaged file.

const (
	openBound   = 5 * time.Second          // of one call; the promise is a second on a quiet machine
	memoryBound = memoryFactor * 256 << 20 // of a child process
)

// A truth is what a store held at one generation.
type truth struct {
	identity [16]byte
	ledger   []byte
	frames   map[keystate.Key][]byte
	records  map[keystate.Key]keystate.Record
	keys     []keystate.Key            // all of them, in a fixed order
	rows     map[string]map[string]row // the program's, by bucket and key
}

func (s *store) truth(generation int) (*truth, error) {
	if s.truths[generation] != nil {
		return s.truths[generation], nil
	}
	tr, err := truthOf(s.layout(generation))
	if err != nil {
		return nil, fmt.Errorf("%s, generation %d, healthy: %w", s.name, generation, err)
	}
	s.truths[generation] = tr
	return tr, nil
}

func truthOf(l *layout) (*truth, error) {
	tr := &truth{
		frames: map[keystate.Key][]byte{}, records: map[keystate.Key]keystate.Record{}, rows: map[string]map[string]row{},
	}
	for _, r := range l.rows {
		switch r.bucket {
		case "keystate/live", "keystate/done":
			var record keystate.Record
			if err := record.UnmarshalBinary(r.value); err != nil {
				return nil, err
			}
			tr.frames[record.Key], tr.records[record.Key] = r.value, record
			tr.keys = append(tr.keys, record.Key)
		case "keystate":
			if r.key == "identity" {
				copy(tr.identity[:], r.value[1:])
			} else {
				tr.ledger = r.value
			}
		case "keystate/index":
		default:
			if tr.rows[r.bucket] == nil {
				tr.rows[r.bucket] = map[string]row{}
			}
			tr.rows[r.bucket][r.key] = r
		}
	}
	return tr, nil
}

// tokenOf is the token of a key's effect, as docs/format.md derives it.
func (tr *truth) tokenOf(r keystate.Record) string {
	point := map[string]string{"transfer": "payout_sent", "charge": "charged", "notice": "finished"}[r.Machine]
	b := append([]byte("keystate token 1\x00"), tr.identity[:]...)
	b = append(append(b, r.Incarnation[:]...), point...)
	sum := sha256.Sum256(b)
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}

// A mode is how Open is asked to look at a file.
type mode string

const (
	whole   mode = "whole"   // as files up to VerifyLimit
	limited mode = "limited" // as larger ones
)

func (m mode) options() *keystate.Options {
	o := &keystate.Options{Logger: quiet, Retention: -1, Headroom: -1}
	if m == limited {
		o.VerifyLimit = -1
	}
	return o
}

// A specimen is one damaged file.
type specimen struct {
	seed       uint64
	store      *store
	kind, what string
	mode       mode
	image      []byte
	*rand.Rand
}

func (s *specimen) String() string {
	return fmt.Sprintf("%d: %s in %q, %s, %s", s.seed, s.kind, s.store.name, s.mode, s.what)
}

// specimenOf makes the file that a seed means.
func specimenOf(seed uint64, m mode, stores []*store) *specimen {
	rng := rand.New(rand.NewPCG(seed, 0x6b657973))
	st := stores[rng.IntN(len(stores))]
	k := kinds[seed%uint64(len(kinds))]
	v := &victim{Rand: rng, layout: st.layout(st.last()), store: st, image: bytes.Clone(st.images[st.last()])}
	for _, other := range stores {
		if other != st {
			v.others = append(v.others, other)
		}
	}
	s := &specimen{seed: seed, store: st, kind: k.name, mode: m, Rand: rng}
	s.what = k.do(v)
	s.image = v.image
	return s
}

// rolledBack says whether a file's metas are those of an older generation, both of them. Then it may hold one, and nobody can
// tell; a file whose metas are the last generation's, or nobody's, must hold the last.
func (s *store) rolledBack(image []byte) bool {
	size := s.layout(s.last()).pageSize
	same := func(g int) bool {
		return len(image) >= 2*size && bytes.Equal(metaOf(image, size, 0), metaOf(s.images[g], size, 0)) &&
			bytes.Equal(metaOf(image, size, 1), metaOf(s.images[g], size, 1))
	}
	return !same(s.last()) && slices.ContainsFunc(s.generations(), same)
}

func (s *store) generations() (all []int) {
	for g := range s.images {
		all = append(all, g)
	}
	return all
}

// claimed is the generation that the ledger of an opened file is from.
func (s *store) claimed(ledger []byte) (generation int, err error) {
	for g := s.last(); g >= 0; g-- {
		tr, err := s.truth(g)
		if err != nil || len(ledger) == len(tr.ledger) && bytes.Equal(ledger[9:73], tr.ledger[9:73]) { // but for the epoch
			return g, err
		}
	}
	return -1, nil
}

func touched(image, healthy []byte, size int) map[uint64]bool {
	pages := map[uint64]bool{}
	for at := 0; at < len(healthy); at += size {
		if at+size > len(image) || !bytes.Equal(image[at:at+size], healthy[at:at+size]) {
			pages[uint64(at/size)] = true
		}
	}
	return pages
}

// A product is what is judged: keystate, or something wrong on purpose.
type product struct {
	open  func(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error)
	frame func(e *keystate.Engine[*bbolt.Tx], path string, key keystate.Key) ([]byte, error)
	bound time.Duration // in place of openBound
}

var sound = product{open: openSound, frame: frameSound}

func openSound(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
	e, err := keystate.Open(path, o)
	if err != nil {
		return nil, nil, err
	}
	return e, e.Close, nil
}

func frameSound(e *keystate.Engine[*bbolt.Tx], _ string, key keystate.Key) ([]byte, error) {
	r, err := e.Key(ctx, key)
	if err != nil {
		return nil, err
	}
	return r.MarshalBinary()
}

// A judge shows files to a product, in a directory of its own.
type judge struct {
	product
	stores     []*store
	dir, path  string
	buffer     []byte
	goroutines int
	files      int
	peak       int64 // of the process's memory
	spares     bool  // whether memory is bounded
	held       bool  // bbolt once did not let go of a file
}

// A verdict is what became of one file.
type verdict struct {
	outcome string // how Open answered
	open    time.Duration
	found   []string // in limited mode: what reading met later
	err     error    // what must not be
}

func newJudge(p product, stores []*store, dir string) (*judge, error) {
	p.bound = cmp.Or(p.bound, openBound)
	j := &judge{product: p, stores: stores, dir: dir, path: filepath.Join(dir, "keys")}
	if err := j.put(stores[0].images[stores[0].last()]); err != nil {
		return nil, err
	}
	if err := j.healthy(stores[0]); err != nil {
		return nil, err
	}
	j.goroutines, j.files = runtime.NumGoroutine(), openFiles()
	return j, nil
}

// put makes b the content of the file, which stays the same file: a lock that was left on it stays, too.
func (j *judge) put(b []byte) error { return os.WriteFile(j.path, b, 0o600) }

func (j *judge) content() ([]byte, error) {
	f, err := os.Open(j.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	j.buffer = slices.Grow(j.buffer[:0], int(info.Size()))[:info.Size()]
	_, err = io.ReadFull(f, j.buffer)
	return j.buffer, err
}

func (j *judge) judge(s *specimen) (v verdict) {
	j.spares = s.mode == whole // in a file that Open has not looked through, a length may claim what it likes
	if err := j.put(s.image); err != nil {
		return verdict{err: err}
	}
	verified, sampled := error(nil), s.mode == limited || s.IntN(8) == 0
	if sampled {
		verified = keystate.Verify(j.path)
		if err := j.untouched(s, verified); err != nil {
			return verdict{err: fmt.Errorf("verify: %w", err)}
		}
	}
	if s.IntN(8) == 0 {
		if err := j.compact(s); err != nil {
			return verdict{err: err}
		}
	}
	began := time.Now()
	e, done, err := j.open(j.path, s.mode.options())
	v.open = time.Since(began)
	switch {
	case err != nil:
		v.outcome, v.err = nameOf(err), j.refused(s, err)
		if sampled && verified == nil {
			v.err = errors.Join(v.err, fmt.Errorf("open: %w, but Verify found nothing", err))
		}
	default:
		v.outcome = "opened"
		in := &inspection{judge: j, specimen: s, store: s.store, engine: e, strict: s.mode == whole || verified == nil}
		v.err = in.inspect()
		v.found = in.found
		v.err = errors.Join(v.err, in.close(done))
		if sampled && verified != nil && s.mode == whole {
			v.err = errors.Join(v.err, fmt.Errorf("opened, but Verify found %w", verified))
		}
	}
	return v.after(j, s)
}

// after looks at what is left behind.
func (v verdict) after(j *judge, s *specimen) verdict {
	if v.open > j.bound {
		v.err = errors.Join(v.err, fmt.Errorf("open took %v", v.open))
	}
	v.err = errors.Join(v.err, j.leftBehind())
	if v.err == nil && s.IntN(16) == 0 {
		if err := errors.Join(j.put(s.store.images[s.store.last()]), j.healthy(s.store)); err != nil {
			v.err = fmt.Errorf("afterwards, at the same path, the healthy file: %w", err)
		}
	}
	return v
}

// named is the error that Open may give for a file's content.
func named(err error) bool {
	return errors.Is(err, keystate.ErrCorrupt) || errors.Is(err, keystate.ErrNotAStore)
}

func nameOf(err error) string {
	for name, sentinel := range map[string]error{
		"ErrCorrupt": keystate.ErrCorrupt, "ErrNotAStore": keystate.ErrNotAStore, "ErrLocked": keystate.ErrLocked,
		"ErrOutcomeUnknown": keystate.ErrOutcomeUnknown, "ErrFenced": keystate.ErrFenced, "ErrNotFound": keystate.ErrNotFound, "ErrMoved": keystate.ErrMoved,
	} {
		if errors.Is(err, sentinel) {
			return name
		}
	}
	return "unnamed"
}

// refused checks a refusal.
func (j *judge) refused(s *specimen, err error) error {
	if bytes.Equal(s.image, s.store.images[s.store.last()]) {
		return fmt.Errorf("a healthy file is refused: %w", err)
	}
	return j.untouched(s, err)
}

func (j *judge) untouched(s *specimen, err error) error {
	if err != nil && !named(err) {
		return fmt.Errorf("an error without a name: %w", err)
	}
	after, err := j.content()
	if err == nil && !bytes.Equal(after, s.image) {
		err = fmt.Errorf("the file was changed, from %d bytes to %d", len(s.image), len(after))
	}
	return err
}

// leftBehind finds files, descriptors, locks, maps and goroutines that nobody needs any more.
func (j *judge) leftBehind() error {
	entries, err := os.ReadDir(j.dir)
	if err != nil || len(entries) != 1 {
		return fmt.Errorf("in the directory lie %v (%v)", entries, err)
	}
	if n := openFiles(); n > j.files {
		err = errors.Join(err, fmt.Errorf("%d descriptors are open, %d were", n, j.files))
		j.files = n
	}
	if mapped(j.path) && !j.held {
		err = errors.Join(err, errors.New("the file is still mapped"))
	}
	if !j.unlocked() {
		err = errors.Join(err, errors.New("the file is still locked"))
	}
	for deadline := time.Now().Add(j.bound); runtime.NumGoroutine() > j.goroutines; runtime.Gosched() {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<16)
			stacks = stacks[:runtime.Stack(stacks, true)]
			return errors.Join(err, fmt.Errorf("%d goroutines run, %d did:\n%s", runtime.NumGoroutine(), j.goroutines, stacks))
		}
	}
	if j.peak = peakMemory(); j.peak > memoryBound && j.spares {
		err = errors.Join(err, fmt.Errorf("the process held up to %d MiB", j.peak>>20))
	}
	return err
}

func (j *judge) unlocked() bool {
	f, err := os.Open(j.path)
	if err != nil {
		return false
	}
	defer f.Close()
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil
}

// healthy opens the healthy file that lies at the path.
func (j *judge) healthy(s *store) error {
	tr, err := s.truth(s.last())
	if err != nil {
		return err
	}
	e, err := keystate.Open(j.path, whole.options())
	if err != nil {
		return err
	}
	counts, err := e.Stats(ctx)
	if held := counts.Running + counts.Waiting + counts.Parked + counts.Finished; err == nil && held != uint64(len(tr.keys)) {
		err = fmt.Errorf("it holds %d keys of %d", held, len(tr.keys))
	}
	return errors.Join(err, e.Close())
}

// compact has Compact read the damaged file: it refuses and leaves nothing, or it writes a sound one.
func (j *judge) compact(s *specimen) error {
	target := j.path + ".compact"
	defer os.Remove(target)
	err := keystate.Compact(j.path, target)
	if err == nil {
		if err := keystate.Verify(target); err != nil {
			return fmt.Errorf("what Compact wrote: %w", err)
		}
		return j.put(s.image) // Compact may write the metas anew
	}
	if err := j.untouched(s, err); err != nil {
		return fmt.Errorf("compact: %w", err)
	}
	if _, err := os.Lstat(target); err == nil {
		return errors.New("compact failed and left its target")
	}
	return j.leftBehind()
}

// An inspection looks at all that an opened file shows.
type inspection struct {
	*judge
	*specimen
	*store
	truth   *truth          // what the file must hold
	touched map[uint64]bool // pages that are not as they were when it was committed
	engine  *keystate.Engine[*bbolt.Tx]
	strict  bool     // nothing may be wrong; else a damaged part may be refused by name
	found   []string // what was met instead
	lost    map[keystate.Key]bool
	mu      sync.Mutex
	acts    map[string][]string // tokens of the effects that ran, by key
}

func (in *inspection) inspect() error {
	in.lost, in.acts = map[keystate.Key]bool{}, map[string][]string{}
	for _, look := range []func() error{in.identify, in.keys, in.listing, in.rows, in.backup, in.goOn} {
		if err := look(); err != nil {
			return err
		}
	}
	return nil
}

// tolerate turns an error that damage may cause into something noted.
func (in *inspection) tolerate(doing string, err error) error {
	if err == nil {
		return nil
	}
	if !in.strict && (named(err) || errors.Is(err, keystate.ErrOutcomeUnknown) || errors.Is(err, keystate.ErrFenced)) {
		in.found = append(in.found, doing+": "+nameOf(err))
		return nil
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// mayRollBack says whether the file may hold an older generation, whole, without anybody being able to tell: its metas are an
// older generation's, or bear lies under right checksums; or the page of the ledger is another, and with it all that goes by
// the ledger: where all that a commit changed lies on that page, the page's older content is as sound as the newer. Where
// not all of a file was checked, any page above the ledger's may be another, too.
func (in *inspection) mayRollBack() bool {
	if !in.strict || in.rolledBack(in.image) || in.kind == sealedMetas {
		return true
	}
	healthy := in.layout(in.last())
	changed := touched(in.image, in.images[in.last()], healthy.pageSize)
	return slices.ContainsFunc(healthy.rows, func(r row) bool {
		return r.bucket == "keystate" && r.key == "ledger" && slices.ContainsFunc(r.pages, func(id uint64) bool { return changed[id] })
	})
}

// identify finds out which generation the file must hold: the last; or, of a file that was rolled back, any.
func (in *inspection) identify() (err error) {
	var ledger []byte
	if in.mayRollBack() {
		err = in.engine.View(ctx, func(tx *bbolt.Tx) error {
			ledger = bytes.Clone(tx.Bucket([]byte("keystate")).Get([]byte("ledger")))
			return nil
		})
		if err := in.tolerate("ledger", err); err != nil {
			return err
		}
	}
	g := in.last()
	if ledger != nil {
		if g, err = in.claimed(ledger); err != nil {
			return err
		}
	}
	if g < 0 { // a commit that was not recorded
		in.found = append(in.found, "rolled back, to a commit not recorded")
		in.truth, err = unrecorded(in.image)
		return err
	}
	if g != in.last() {
		in.found = append(in.found, "rolled back")
	}
	in.touched = touched(in.image, in.images[g], in.layout(g).pageSize)
	in.truth, err = in.store.truth(g)
	return err
}

// unrecorded is what a file holds by its own account.
func unrecorded(image []byte) (tr *truth, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("opened, and shows what its file does not hold: %v", v)
		}
	}()
	return truthOf(takeApart(image))
}

// keys looks every key up.
func (in *inspection) keys() error {
	for _, key := range in.truth.keys {
		frame, err := in.frame(in.engine, in.path, key)
		finished := in.truth.records[key].Status == keystate.Answered
		switch {
		case err == nil && !in.strict && finished && in.kind == sealedRecord: // whoever forges a checksum is noticed by Verify
			in.lost[key] = true
		case err == nil && !bytes.Equal(frame, in.truth.frames[key]):
			return fmt.Errorf("the record of %s is another", key)
		case err == nil:
		case finished && in.mayForget() && errors.Is(err, keystate.ErrNotFound):
			in.found = append(in.found, "forgotten")
			in.lost[key] = true
		case in.tolerate("lookup", err) != nil:
			return fmt.Errorf("look up %s: %w", key, err)
		default:
			in.lost[key] = true
		}
	}
	return nil
}

// mayForget says whether a finished key may be unknown to a store that was opened without being checked as a whole: where checksums
// are forged, or several pages are of one older time, so that they may agree with each other.
func (in *inspection) mayForget() bool {
	return !in.strict && slices.Contains([]string{"stale pages", "stale bucket", "lost commit", sealedRecord}, in.kind)
}

// listing lists all keys, and counts them.
func (in *inspection) listing() error {
	left := maps.Clone(in.truth.frames)
	for r, err := range in.engine.Keys(ctx, keystate.Filter{}) {
		if err != nil {
			return in.tolerate("list", err)
		}
		frame, _ := r.MarshalBinary()
		if !in.strict && in.kind == sealedRecord && r.Status == keystate.Answered {
			delete(left, r.Key)
			continue
		}
		if !bytes.Equal(frame, in.truth.frames[r.Key]) {
			return fmt.Errorf("%s is listed, and is another", r.Key)
		}
		if left[r.Key] == nil {
			if in.strict {
				return fmt.Errorf("%s is listed twice", r.Key)
			}
			in.found = append(in.found, "listed twice")
		}
		delete(left, r.Key)
	}
	for key := range left {
		if in.strict || in.truth.records[key].Status != keystate.Answered {
			return fmt.Errorf("%s is not listed", key)
		}
		in.found = append(in.found, "not listed")
		in.lost[key] = true
	}
	return nil
}

// rows reads the program's rows. They bear no checksum: those above which a page is damaged may be anything.
func (in *inspection) rows() error {
	err := in.engine.View(ctx, func(tx *bbolt.Tx) error {
		for bucket, rows := range in.truth.rows {
			b := tx.Bucket([]byte(bucket))
			for key, r := range rows {
				if slices.ContainsFunc(r.pages, func(id uint64) bool { return in.touched[id] }) {
					continue
				}
				if b == nil || !bytes.Equal(b.Get([]byte(key)), r.value) {
					return fmt.Errorf("row %q of %q is another", key, bucket)
				}
			}
		}
		return nil
	})
	return in.tolerate("rows", err)
}

// backup copies what was opened: whoever verifies the copy finds what Verify finds in the file.
func (in *inspection) backup() error {
	if in.IntN(8) > 0 {
		return nil
	}
	target := in.path + ".backup"
	f, err := os.Create(target)
	if err != nil {
		return err
	}
	defer os.Remove(target)
	defer f.Close()
	if _, err := keystate.Backup(ctx, in.engine, f); err != nil {
		return in.tolerate("backup", err)
	}
	if err := keystate.Verify(target); (err == nil) != in.strict || err != nil && !named(err) {
		return fmt.Errorf("verify the backup: %w", err)
	}
	return nil
}

// goOn resumes every key, replays some, and begins a new one.
func (in *inspection) goOn() error {
	s, err := openShop(in.engine, in.act)
	if err != nil {
		return in.tolerate("register", err)
	}
	var finished []keystate.Key
	for _, key := range in.truth.keys {
		switch in.truth.records[key].Status {
		case keystate.Answered:
			finished = append(finished, key)
		default:
			if err := in.resume(s, in.truth.records[key]); err != nil {
				return err
			}
		}
	}
	for range min(5, len(finished)) {
		if err := in.replay(s, in.truth.records[finished[in.IntN(len(finished))]]); err != nil {
			return err
		}
	}
	key := keystate.Key{Scope: "ada", ID: "a new order"}
	ctx, cancel := in.patience()
	defer cancel()
	_, err = s.transfers.Do(ctx, key, requestOf(key))
	if err := in.tolerate("new", err); err != nil {
		return err
	}
	return in.effects(key, err == nil)
}

// mustPark says whether a key stands still: it is parked, or its effect may have happened and must not happen twice.
func mustPark(r keystate.Record) bool {
	return r.Status == keystate.Parked || r.Machine == "charge" && !r.FirstTried.IsZero() && !r.Acted
}

// patience is how long one request may take.
func (in *inspection) patience() (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, in.bound)
}

func (in *inspection) resume(s *shop, r keystate.Record) error {
	ctx, cancel := in.patience()
	defer cancel()
	_, err := s.machine(r.Machine).Do(ctx, r.Key, requestOf(r.Key))
	if mustPark(r) {
		if errors.Is(err, keystate.ErrParked) {
			return nil
		}
		if err == nil {
			return fmt.Errorf("%s went on, and should stay parked", r.Key)
		}
	}
	if err == nil {
		return nil
	}
	return in.tolerate("resume", fmt.Errorf("%s: %w", r.Key, err))
}

func (in *inspection) replay(s *shop, r keystate.Record) error {
	ctx, cancel := in.patience()
	defer cancel()
	if in.lost[r.Key] {
		return nil
	}
	m := s.machine(r.Machine)
	want, err := m.DecodeState(r)
	if err != nil {
		return err
	}
	got, err := m.Do(ctx, r.Key, requestOf(r.Key))
	if final := new(keystate.FinalError); r.Refusal != nil && errors.As(err, &final) && final.Reason == r.Refusal.Reason {
		err = nil
	}
	if err == nil && got != want {
		err = fmt.Errorf("another answer: %+v, not %+v", got, want)
		return err
	}
	if err != nil {
		return in.tolerate("replay", fmt.Errorf("%s: %w", r.Key, err))
	}
	return nil
}

// act is what effects do now: they succeed, and are counted.
func (in *inspection) act(_ context.Context, token string, s *transfer) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.acts[s.Name] = append(in.acts[s.Name], token)
	s.Payout = "po_" + token[:8]
	return nil
}

// effects checks which effects ran: none of a finished or parked key, each of the others once and under its token.
func (in *inspection) effects(fresh keystate.Key, freshDone bool) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, key := range in.truth.keys {
		r, tokens := in.truth.records[key], in.acts[key.String()]
		switch {
		case r.Status == keystate.Answered || r.Acted || mustPark(r):
			if len(tokens) > 0 {
				return fmt.Errorf("%s is %s, and its effect ran again", key, r.Status)
			}
		case len(tokens) != 1 && in.strict: // where a commit may fail, the effect runs again
			return fmt.Errorf("the effect of %s ran %d times", key, len(tokens))
		case slices.ContainsFunc(tokens, func(token string) bool { return token != in.truth.tokenOf(r) }):
			return fmt.Errorf("the effect of %s ran under the tokens %s, not %s", key, tokens, in.truth.tokenOf(r))
		}
	}
	if n := len(in.acts[fresh.String()]); freshDone && n != 1 {
		return fmt.Errorf("the effect of the new key ran %d times", n)
	}
	return nil
}

// close closes the store, which must then be sound, or damaged where it was.
func (in *inspection) close(done func() error) error {
	err := done()
	if !in.strict && err != nil && strings.Contains(err.Error(), "does not let go") {
		in.files, in.goroutines, in.held = openFiles(), runtime.NumGoroutine(), true
	}
	if err := in.tolerate("close", err); err != nil {
		return err
	}
	err = keystate.Verify(in.path)
	if in.strict && err != nil {
		return fmt.Errorf("verify after closing: %w", err)
	}
	if err != nil && !named(err) {
		return fmt.Errorf("verify after closing what was damaged: %w", err)
	}
	return nil
}
