//go:build linux || darwin

package damage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// The stores whose files are damaged. Each is made with the exported API, under a fake clock and seeded randomness so that a
// file's seed means the same in every run, but for the pages that bbolt chooses, and is copied after every commit.

type transfer struct {
	Name, From, To string
	Cents          int64
	Memo           string
	Payout         string
}

type phase = keystate.Phase[*bbolt.Tx, transfer]

// An effect is what all machines' effects do.
type effect func(ctx context.Context, token string, s *transfer) error

var (
	ctx     = context.Background()
	quiet   = slog.New(slog.DiscardHandler)
	errDown = errors.New("processor is down")
)

const century = 100 * 365 * 24 * time.Hour

// requestOf is the request that a key is used for. Bulk's are of 20 KiB.
func requestOf(key keystate.Key) transfer {
	r := transfer{Name: key.String(), From: key.Scope, To: "shop " + key.ID, Cents: int64(len(key.ID)) * 1999}
	if key.Scope == "bulk" {
		r.Memo = strings.Repeat("the goods as ordered, "+key.ID+"; ", 20<<10/28)
	}
	return r
}

// A shop is an engine with the three machines that the stores' keys belong to.
type shop struct {
	engine                     *keystate.Engine[*bbolt.Tx]
	transfers, charges, notice *keystate.Machine[transfer]
}

func (s *shop) machine(name string) *keystate.Machine[transfer] {
	switch name {
	case "charge":
		return s.charges
	case "notice":
		return s.notice
	}
	return s.transfers
}

// openShop registers the machines: transfers wait for long when their effect fails, charges park, and a transfer to a shop
// whose number ends in 7 stages a notice.
func openShop(e *keystate.Engine[*bbolt.Tx], act effect) (*shop, error) {
	s := &shop{engine: e}
	patient := keystate.RetryPolicy{InRun: -1, Initial: century, Max: century}
	var err1, err2, err3 error
	s.notice, err1 = keystate.Register(e, "notice", []phase{
		{To: keystate.Finished, Effect: act, Retry: patient, Commit: enter("notices")},
	})
	s.charges, err2 = keystate.Register(e, "charge", []phase{
		{To: "charged", Effect: act, AtMostOnce: true},
		{To: keystate.Finished, Commit: enter("charges")},
	})
	s.transfers, err3 = keystate.Register(e, "transfer", []phase{
		{To: "funds_reserved", Commit: enter("accounts")},
		{To: "payout_sent", Effect: act, Retry: patient, Commit: enter("payouts")},
		{To: keystate.Finished, Commit: func(_ context.Context, tx *bbolt.Tx, t *transfer) error {
			if !strings.HasSuffix(t.To, "7") {
				return nil
			}
			key := keystate.Key{Scope: "notice", ID: t.Name}
			return keystate.Stage(tx, s.notice, key, requestOf(key))
		}},
	})
	return s, errors.Join(err1, err2, err3)
}

// enter writes a row of the program's.
func enter(bucket string) func(context.Context, *bbolt.Tx, *transfer) error {
	return func(_ context.Context, tx *bbolt.Tx, t *transfer) error {
		b, err := tx.CreateBucketIfNotExists([]byte(bucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(t.Name), fmt.Appendf(nil, "%s pays %s %d cents", t.From, t.To, t.Cents))
	}
}

// past are the effects as they went when the stores were made.
func past(ctx context.Context, token string, s *transfer) error {
	switch s.From {
	case "eve", "mallory", "notice":
		return errDown
	case "slow":
		<-ctx.Done()
		return ctx.Err()
	case "zed":
		return keystate.Final(errors.New("card declined"))
	}
	s.Payout = "po_" + token[:8]
	return nil
}

// A recorder copies a store's file after every commit. It keeps all of a few commits, and of many the latest and
// some of those before.
type recorder struct {
	path   string
	n      int
	images [][]byte
}

const (
	latest = 7
	all    = 40 // of so few commits, each is kept
)

func (r *recorder) commit(keystate.Event) {
	image, err := os.ReadFile(r.path)
	if err != nil {
		panic(err)
	}
	if r.images = append(r.images, image); r.n == all {
		r.images = slices.Clone(r.images[len(r.images)-latest:])
	} else if i := len(r.images) - 1 - latest; r.n > all && (r.n-latest)%64 != 0 {
		r.images = append(r.images[:i], r.images[i+1:]...)
	}
	r.n++
}

// A plan says what a store is filled with.
type plan struct {
	name     string
	scope    string // of the ordinary keys
	finished int
	reaped   int // finished before, and reaped
	others   int // of every other fate
	pageSize int // 0: the file is opened by path
	copied   bool
}

var plans = []plan{
	{name: "mixed", scope: "ada", finished: 260, others: 3},
	{name: "large states", scope: "bulk", finished: 12, others: 2},
	{name: "reaped", scope: "ada", finished: 50, reaped: 250, others: 3},
	{name: "copied", scope: "ada", finished: 80, others: 2, copied: true},
	{name: "tiny", scope: "ada", finished: 2, others: 1},
	{name: "small pages", scope: "ada", finished: 150, others: 3, pageSize: 1024},
}

// record makes a store by its plan and returns its file as every kept commit left it, the last one last.
func (p plan) record(t *testing.T, dir string) (images [][]byte) {
	synctest.Test(t, func(t *testing.T) {
		rec := &recorder{path: filepath.Join(dir, "store")}
		defer os.Remove(rec.path)
		var last, recorded atomic.Bool // one more commit is kept; it was
		opts := keystate.Options{Logger: quiet, Retention: time.Hour, Headroom: -1, Observer: &keystate.Observer{
			Grouped: func(e keystate.Event) {
				if !recorded.Load() {
					recorded.Store(last.Load())
					rec.commit(e)
				}
			},
		}}
		e, close, err := p.open(rec.path, &opts)
		must(t, err)
		s, err := openShop(e, past)
		must(t, err)
		p.fill(t, s, 0, p.reaped)
		if p.reaped > 0 {
			time.Sleep(2 * time.Hour)
			synctest.Wait()
		}
		p.fill(t, s, p.reaped, p.reaped+p.finished-p.others)
		p.strange(t, s)
		p.fill(t, s, p.reaped+p.finished-p.others, p.reaped+p.finished)
		last.Store(true)
		must(t, e.Update(ctx, func(tx *bbolt.Tx) error {
			for i := range p.others {
				key := keystate.Key{Scope: "ida", ID: fmt.Sprint("staged ", i)}
				if err := keystate.Stage(tx, s.transfers, key, requestOf(key)); err != nil {
					return err
				}
			}
			return nil
		}))
		if p.copied {
			rec.backup(t, e)
		}
		must(t, e.Close())
		must(t, close())
		for _, image := range rec.images { // without the room that the file has grown by in advance
			l := takeApart(image)
			images = append(images, image[:int(l.high)*l.pageSize])
		}
	})
	return images
}

// open opens the store, in a file with the plan's own size of pages if it names one.
func (p plan) open(path string, o *keystate.Options) (e *keystate.Engine[*bbolt.Tx], close func() error, err error) {
	if p.pageSize == 0 {
		e, err = keystate.Open(path, o)
		return e, func() error { return nil }, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{PageSize: p.pageSize, Timeout: time.Second})
	if err != nil {
		return nil, nil, err
	}
	e, err = keystate.New(keystate.Bolt(db), o)
	return e, db.Close, err
}

// fill carries ordinary keys to their end; one in eleven is refused.
func (p plan) fill(t *testing.T, s *shop, from, to int) {
	for i := from; i < to; i++ {
		key := keystate.Key{Scope: p.scope, ID: fmt.Sprintf("order %d", i)}
		if i%11 == 10 {
			key.Scope = "zed"
		}
		m := s.transfers
		if i%5 == 0 {
			m = s.charges
		}
		_, err := m.Do(ctx, key, requestOf(key))
		if refused := new(keystate.FinalError); err != nil && !errors.As(err, &refused) {
			t.Fatal(err)
		}
		synctest.Wait() // till a notice has been tried: every commit is alone, and a file's seed means the same each time
	}
}

// strange leaves keys waiting, parked and running.
func (p plan) strange(t *testing.T, s *shop) {
	for i := range p.others {
		eve := keystate.Key{Scope: "eve", ID: fmt.Sprint("waiting ", i)}
		if _, err := s.transfers.Do(ctx, eve, requestOf(eve)); !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		mallory := keystate.Key{Scope: "mallory", ID: fmt.Sprint("parked ", i)}
		if _, err := s.charges.Do(ctx, mallory, requestOf(mallory)); !errors.Is(err, keystate.ErrParked) {
			t.Fatal(err)
		}
		slow := keystate.Key{Scope: "slow", ID: fmt.Sprint("running ", i)}
		_, err := s.transfers.Start(ctx, slow, requestOf(slow))
		must(t, err)
		synctest.Wait()
	}
}

// backup adds a copy as Backup writes it as the store's last file.
func (r *recorder) backup(t *testing.T, e *keystate.Engine[*bbolt.Tx]) {
	var b bytes.Buffer
	_, err := keystate.Backup(ctx, e, &b)
	must(t, err)
	r.images = append(r.images, b.Bytes())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// writeStores records all stores into files that the child processes read.
func writeStores(t *testing.T, dir string) {
	t.Helper()
	cryptotest.SetGlobalRandom(t, 1)
	must(t, writeForeign(dir))
	for i, p := range plans {
		images := p.record(t, dir)
		for n, image := range images {
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%02d.%03d", i, n)), image, 0o600))
		}
		last := takeApart(images[len(images)-1])
		t.Logf("%-12s %3d generations, the last of %d KiB: transaction %d, %d pages of %d, %d rows",
			p.name, len(images), len(images[len(images)-1])>>10, last.txid, last.high, last.pageSize, len(last.rows))
	}
}

// foreignFiles are bbolt files that are no stores.
var foreignFiles = map[string]func(tx *bbolt.Tx) error{
	"empty": func(*bbolt.Tx) error { return nil },
	"no bucket": func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte("sessions"))
		for i := range 300 {
			err = errors.Join(err, b.Put(fmt.Append(nil, i), []byte("a session")))
		}
		return err
	},
	"other bucket": func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte("keystate"))
		if err != nil {
			return err
		}
		return errors.Join(b.Put([]byte("identity"), []byte("Ada")), b.Put([]byte("shift"), []byte("pressed")))
	},
	"half a store": func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte("keystate"))
		if err != nil {
			return err
		}
		_, err = b.CreateBucket([]byte("live"))
		return err
	},
}

// foreignBolt is their content.
var foreignBolt = map[string][]byte{}

func writeForeign(dir string) error {
	for name, fill := range foreignFiles {
		db, err := bbolt.Open(filepath.Join(dir, "foreign "+name), 0o600, &bbolt.Options{Timeout: time.Second})
		if err != nil {
			return err
		}
		if err := errors.Join(db.Update(fill), db.Close()); err != nil {
			return err
		}
	}
	return nil
}

// A store is one recorded store: its file as it was after a number of commits.
type store struct {
	plan
	images  [][]byte
	layouts []*layout // of the images, made when asked for
	truths  []*truth
}

func readStores(dir string) (stores []*store, err error) {
	for name := range foreignFiles {
		if foreignBolt[name], err = os.ReadFile(filepath.Join(dir, "foreign "+name)); err != nil {
			return nil, err
		}
	}
	for i, p := range plans {
		names, err := filepath.Glob(filepath.Join(dir, fmt.Sprintf("%02d.*", i)))
		if err != nil || len(names) < 2 {
			return nil, fmt.Errorf("%d files of the store %q: %w", len(names), p.name, err)
		}
		s := &store{plan: p, layouts: make([]*layout, len(names)), truths: make([]*truth, len(names))}
		for _, name := range names {
			image, err := os.ReadFile(name)
			if err != nil {
				return nil, err
			}
			s.images = append(s.images, image)
		}
		stores = append(stores, s)
	}
	return stores, nil
}

func (s *store) last() int { return len(s.images) - 1 }

func (s *store) layout(generation int) *layout {
	if s.layouts[generation] == nil {
		s.layouts[generation] = takeApart(s.images[generation])
	}
	return s.layouts[generation]
}
