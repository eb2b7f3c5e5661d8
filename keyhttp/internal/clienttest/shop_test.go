package clienttest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/keystate"
	"example.com/keystate/keyhttp"
	"go.etcd.io/bbolt"
)

// A payment is the state of a request to POST /v1/payment_intents.
type payment struct {
	ID       string
	Amount   int64
	Currency string
	Charge   string
}

// A shop takes payments by a machine (POST /v1/payment_intents) and refunds by a handler behind the middleware
// (POST /v1/refunds), on a wire that breaks.
type shop struct {
	*wire
	URL string

	engine  *keystate.Engine[*bbolt.Tx]
	charges atomic.Int64 // effects that ran
	refunds atomic.Int64 // calls of the handler behind the middleware

	dialect func(http.Handler) http.Handler // what errors look like; nil: as keyhttp writes them

	mu        sync.Mutex
	keys      []string      // Idempotency-Key as it came, a line each
	open      chan struct{} // the first effect waits until it is closed
	charging  chan struct{} // receives when an effect begins
	onRefused func()        // runs before a 409 goes out
}

var bookings = []byte("bookings")

func newShop(t *testing.T, options func(*keyhttp.Options)) *shop {
	t.Helper()
	s := &shop{open: make(chan struct{}), charging: make(chan struct{}, 1), onRefused: func() {}}
	close(s.open)
	engine, err := keystate.Open(filepath.Join(t.TempDir(), "shop.db"), nil)
	if err != nil {
		t.Fatal(err)
	}
	s.engine = engine
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	shared := keyhttp.Options{Scope: account}
	if options != nil {
		options(&shared)
	}
	payments, err := keyhttp.Handle(engine, "payment", s.phases(), keyhttp.Endpoint[payment]{
		Options: shared, Decode: decodePayment, Encode: encodePayment,
	})
	if err != nil {
		t.Fatal(err)
	}
	once, err := keyhttp.Middleware(engine, "refund", shared)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("POST /v1/payment_intents", payments)
	mux.Handle("POST /v1/refunds", once(http.HandlerFunc(s.refund)))
	s.listen(t, gateway(s.watched(mux)))
	return s
}

func (s *shop) listen(t *testing.T, h http.Handler) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.wire, s.URL = &wire{Listener: l}, "http://"+l.Addr().String()
	server := &http.Server{Handler: h, ConnContext: withConn, ReadHeaderTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(s.wire) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
}

// account takes the login for the scope, as an API with secret keys does.
func account(r *http.Request) (string, error) {
	secret, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer sk_test_")
	if !ok {
		return "", errors.New("who asks?")
	}
	return secret, nil
}

func (s *shop) phases() []keystate.Phase[*bbolt.Tx, payment] {
	book := func(suffix string) func(context.Context, *bbolt.Tx, *payment) error {
		return func(_ context.Context, tx *bbolt.Tx, p *payment) error {
			b, err := tx.CreateBucketIfNotExists(bookings)
			if err != nil {
				return err
			}
			return b.Put([]byte(p.ID+suffix), strconv.AppendInt(nil, p.Amount, 10))
		}
	}
	return []keystate.Phase[*bbolt.Tx, payment]{
		{To: "reserved", Commit: book("/reserved")},
		{To: keystate.Finished, Effect: s.charge, Commit: book("/settled")},
	}
}

func (s *shop) charge(ctx context.Context, token string, p *payment) error {
	p.Charge = "ch_" + token
	if s.charges.Add(1) > 1 {
		return nil
	}
	s.mu.Lock()
	open := s.open
	s.mu.Unlock()
	s.charging <- struct{}{} // of which there is room for one
	select {
	case <-open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func decodePayment(r *http.Request) (payment, error) {
	if err := r.ParseForm(); err != nil {
		return payment{}, err
	}
	amount, err := strconv.ParseInt(r.PostForm.Get("amount"), 10, 64)
	if err != nil {
		return payment{}, fmt.Errorf("amount: %w", err)
	}
	return payment{ID: "pi_" + keystate.NewID(), Amount: amount, Currency: r.PostForm.Get("currency")}, nil
}

func encodePayment(w http.ResponseWriter, p payment, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusPaymentRequired)
		return
	}
	answer(w, map[string]any{
		"id": p.ID, "object": "payment_intent", "amount": p.Amount, "currency": p.Currency,
		"status": "succeeded", "latest_charge": p.Charge,
	})
}

func (s *shop) refund(w http.ResponseWriter, r *http.Request) {
	n := s.refunds.Add(1)
	answer(w, map[string]any{
		"id": fmt.Sprintf("re_%d", n), "object": "refund", "payment_intent": r.PostFormValue("payment_intent"), "status": "succeeded",
	})
}

func answer(w http.ResponseWriter, object map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(object)
}

// watched notes the keys as they come, and stops before an answer that refuses a key in flight.
func (s *shop) watched(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.keys = append(s.keys, strings.Join(r.Header.Values("Idempotency-Key"), "\n"))
		hook := s.onRefused
		s.mu.Unlock()
		if s.dialect != nil {
			s.dialect(h).ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(&refusalWatch{w, hook}, r)
	})
}

type refusalWatch struct {
	http.ResponseWriter
	hook func()
}

func (w *refusalWatch) WriteHeader(status int) {
	if status == http.StatusConflict {
		w.hook()
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *refusalWatch) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// hold keeps the first payment in flight until the first refusal is about to go out, or until release, and lets the refusal out when
// answered is closed. It returns how many refusals there were.
func (s *shop) hold(answered <-chan struct{}) (refusals *atomic.Int64, release func()) {
	refusals = new(atomic.Int64)
	open := make(chan struct{})
	release = sync.OnceFunc(func() { close(open) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = open
	s.onRefused = func() {
		refusals.Add(1)
		release()
		<-answered
	}
	return refusals, release
}

// lastKey is the Idempotency-Key of the last request that reached the server's handlers.
func (s *shop) lastKey() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.keys) == 0 {
		return ""
	}
	return s.keys[len(s.keys)-1]
}

// mustHaveCharged checks that so many payments were made: effects, and both bookings of each.
func (s *shop) mustHaveCharged(t *testing.T, want int) {
	t.Helper()
	booked := 0
	err := s.engine.View(t.Context(), func(tx *bbolt.Tx) error {
		if b := tx.Bucket(bookings); b != nil {
			return b.ForEach(func(_, _ []byte) error { booked++; return nil })
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := int(s.charges.Load()); got != want {
		t.Errorf("%d charges, want %d", got, want)
	}
	if booked != 2*want {
		t.Errorf("%d bookings, want %d", booked, 2*want)
	}
}

// mustHaveRefunded checks how often the handler behind the middleware ran.
func (s *shop) mustHaveRefunded(t *testing.T, want int) {
	t.Helper()
	if got := int(s.refunds.Load()); got != want {
		t.Errorf("%d refunds, want %d", got, want)
	}
}

// ownTransport has connections of its own, which end with the test.
func ownTransport(t *testing.T) *http.Transport {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}
