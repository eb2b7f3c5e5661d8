package keytest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// A hub lets several processes have one bbolt file, with leases by the bubble's clock: a server, as far as keytest can tell.
type hub struct {
	lease   time.Duration
	unfence bool // who has lost a key writes it all the same
	abandon bool // nobody takes over what a process has left that is gone

	mu     sync.Mutex
	files  map[string]*hubFile
	killed int
}

type hubFile struct {
	keystate.Store[*bbolt.Tx]
	id     [16]byte
	epochs uint64
	until  map[uint64]time.Time
}

func newHub() *hub { return &hub{lease: time.Minute, files: map[string]*hubFile{}} }

// A seat is what a process has of a hub.
type seat struct {
	*hubFile
	hub   *hub
	epoch uint64
	gone  bool
	puts  map[keystate.Key]keystate.Record // by this process, where it is not fenced
}

func (h *hub) open(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := h.files[dir]
	if f == nil {
		f = &hubFile{Store: OpenBolt(t, dir), until: map[uint64]time.Time{}}
		var err error
		if f.id, f.epochs, err = f.Boot(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.files[dir] = f
		t.Cleanup(func() {
			if err := f.Store.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return &seat{hubFile: f, hub: h, puts: map[keystate.Key]keystate.Record{}}
}

func (s *seat) Boot(ctx context.Context) (id [16]byte, epoch uint64, err error) {
	s.hub.mu.Lock()
	s.epochs++
	s.epoch = s.epochs
	s.hub.mu.Unlock()
	_, err = s.Renew(ctx)
	return s.id, s.epoch, err
}

func (s *seat) Renew(context.Context) (time.Duration, error) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.until[s.epoch] = time.Now().Add(s.hub.lease)
	return s.hub.lease, nil
}

func (s *seat) Alive(_ *bbolt.Tx, epoch uint64) (bool, error) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	return time.Now().Before(s.until[epoch]), nil
}

func (s *seat) Adopt(ctx context.Context, _ []string, limit int) (adopted []keystate.Record, err error) {
	err = s.Update(ctx, func(tx *bbolt.Tx) error {
		adopted = nil
		all, err := s.Keys(tx).Unfinished(keystate.Key{}, 1000)
		if err != nil {
			return err
		}
		for _, r := range all {
			if alive, _ := s.Alive(tx, r.Epoch); alive || r.Status == keystate.Parked || s.hub.abandon || len(adopted) == limit {
				continue
			}
			r.Epoch = s.epoch
			if err := s.Keys(tx).Put(&r); err != nil {
				return err
			}
			adopted = append(adopted, r)
		}
		return nil
	})
	return adopted, err
}

func (s *seat) Keys(tx *bbolt.Tx) keystate.Keys {
	if s.hub.unfence {
		return unfenced{s.hubFile.Keys(tx), s}
	}
	return s.hubFile.Keys(tx)
}

// Kill leaves the lease as it is.
func (s *seat) Kill() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.gone = true
	s.hub.killed++
}

func (s *seat) Close() error {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if !s.gone {
		delete(s.until, s.epoch)
	}
	return nil
}

// unfenced keys are to a process what it has put last itself, and take what it puts next.
type unfenced struct {
	keystate.Keys
	seat *seat
}

func (u unfenced) Get(key keystate.Key) (keystate.Record, error) {
	if r, own := u.seat.puts[key]; own {
		return r, nil
	}
	return u.Keys.Get(key)
}

func (u unfenced) Put(r *keystate.Record) error {
	if stored, err := u.Keys.Get(r.Key); err == nil {
		r.Version, r.Incarnation = stored.Version, stored.Incarnation
	}
	err := u.Keys.Put(r)
	if err == nil {
		u.seat.puts[r.Key] = *r
	}
	return err
}

// onHub lets a case's processes share.
func onHub(h *hub, build func(w *World) testCase) func(w *World) testCase {
	return func(w *World) testCase {
		c := build(w)
		c.Open = h.open
		return c
	}
}

func soundCase(w *World) testCase { return caseOf(func(*engine) []phase { return sound(w) }) }

func TestSoundPhasesSurviveEveryCrashOnASharedStore(t *testing.T) {
	for _, lease := range []time.Duration{5 * time.Second, time.Minute} { // over when the next process starts, and not
		t.Run(lease.String(), func(t *testing.T) {
			h := newHub()
			h.lease = lease
			Crash(t, onHub(h, func(w *World) testCase {
				c := soundCase(w)
				c.Pairs = !testing.Short()
				return c
			}))
			if h.killed == 0 {
				t.Error("nobody was killed")
			}
		})
	}
}

// stagingCase leaves a receipt behind.
func stagingCase(w *World) testCase {
	return caseOf(func(e *engine) []phase {
		receipts, err := keystate.Register(e, "receipt", []phase{{To: keystate.Finished, Effect: func(ctx context.Context, token string, s *transfer) error {
			_, err := w.Do(ctx, token, "receipt for "+s.From)
			return err
		}}})
		if err != nil {
			panic(err)
		}
		return with(w, 2, func(p *phase) {
			p.Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
				return errors.Join(settle(ctx, tx, s), keystate.Stage(tx, receipts, keystate.Key{ID: "receipt"}, *s))
			}
		})
	})
}

func TestWhatADeadProcessHasStagedIsWaitedFor(t *testing.T) {
	for _, f := range findings(t, onHub(newHub(), stagingCase)) {
		t.Error(f)
	}
}

func TestAStoreThatSharesWronglyIsFound(t *testing.T) {
	for _, wrong := range []struct {
		name  string
		seed  func(h *hub)
		build func(w *World) testCase
		where string
		says  string
	}{
		{"who has lost a key writes it all the same", func(h *hub) { h.unfence = true }, soundCase,
			"stands still after the effect of payout_sent", "is finished"},
		{"nobody takes over what a process has left that is gone", func(h *hub) { h.abandon = true }, stagingCase,
			"killed when the transaction of payout_sent and finished is durable", "nobody takes up receipt"},
		{"leases do not end", func(h *hub) { h.lease = 1000 * time.Hour }, soundCase,
			"killed before the effect of payout_sent", "nobody takes up keytest/request"},
	} {
		t.Run(wrong.name, func(t *testing.T) {
			h := newHub()
			wrong.seed(h)
			m := &matrix[*bbolt.Tx, transfer]{build: onHub(h, wrong.build)}
			if found := m.measure(t); len(found) > 0 {
				t.Fatal(found)
			}
			var all strings.Builder
			for _, sc := range m.scenarios() {
				if strings.HasPrefix(sc.String(), wrong.where) {
					fmt.Fprintln(&all, m.judge(m.perform(t, sc)))
				}
			}
			t.Log(all.String())
			if !strings.Contains(all.String(), wrong.says) {
				t.Errorf("no finding says %q", wrong.says)
			}
		})
	}
}

// goodbye hides that a seat is Killable.
type goodbye struct {
	keystate.SharedStore[*bbolt.Tx]
}

func TestAStoreThatCannotDieSilentlyIsNoSharedOne(t *testing.T) {
	h := newHub()
	found := findings(t, func(w *World) testCase {
		c := soundCase(w)
		c.Open = func(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
			return goodbye{h.open(t, dir).(keystate.SharedStore[*bbolt.Tx])}
		}
		return c
	})
	if len(found) == 0 || !strings.Contains(found[0].String(), "must be Killable") {
		t.Errorf("%v", found)
	}
}
