package keyhttp_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"example.com/keystate"
	"example.com/keystate/keyhttp"
	"github.com/google/uuid"
	"go.etcd.io/bbolt"
)

// An order is the state of the machine in these tests.
type order struct {
	Name   string // minted by Decode
	Item   string
	Cents  int
	Charge string // filled in by charged
}

// errSoldOut is a typed error of a phase.
type errSoldOut struct{ item string }

func (e errSoldOut) Error() string { return e.item + " is sold out" }

// A shop is a machine behind an endpoint, and what the tests change of it.
type shop struct {
	t       *testing.T
	path    string
	options keystate.Options
	engine  *keystate.Engine[*bbolt.Tx]
	handler *keyhttp.Handler[order]

	endpoint keyhttp.Endpoint[order]
	phases   []keystate.Phase[*bbolt.Tx, order]
	minted   int
	charges  atomic.Int32
	charge   func(ctx context.Context, o *order) error // what befalls the effect
}

func newShop(t *testing.T, o keyhttp.Options) *shop {
	t.Helper()
	s := &shop{t: t, path: filepath.Join(t.TempDir(), "shop.db")}
	s.options = keystate.Options{Logger: slog.New(slog.DiscardHandler), Headroom: -1}
	if o.Scope == nil {
		o.Scope = func(r *http.Request) (string, error) { return "customer/" + r.Header.Get("X-Customer"), nil }
	}
	o.Logger = slog.New(slog.DiscardHandler)
	s.endpoint = keyhttp.Endpoint[order]{Options: o, Decode: s.decode, Encode: encode}
	s.phases = s.newPhases()
	return s
}

func (s *shop) newPhases() []keystate.Phase[*bbolt.Tx, order] {
	return []keystate.Phase[*bbolt.Tx, order]{
		{To: "stock_taken", Commit: takeStock},
		{To: "charged", Effect: s.chargeOnce, Retry: keystate.RetryPolicy{Attempts: 3, InRun: -1, Initial: time.Hour, Max: time.Hour}},
		{To: keystate.Finished, Commit: writeOrder},
	}
}

func openShop(t *testing.T, o keyhttp.Options) *shop {
	t.Helper()
	s := newShop(t, o)
	s.open()
	t.Cleanup(func() { s.close() })
	return s
}

// open begins a process.
func (s *shop) open() {
	s.t.Helper()
	var err error
	if s.engine, err = keystate.Open(s.path, &s.options); err != nil {
		s.t.Fatal(err)
	}
	if s.handler, err = keyhttp.Handle(s.engine, "order", s.phases, s.endpoint); err != nil {
		s.t.Fatal(err)
	}
}

func (s *shop) close() {
	s.t.Helper()
	if err := s.engine.Close(); err != nil {
		s.t.Error(err)
	}
}

func (s *shop) reopen() {
	s.t.Helper()
	s.close()
	s.open()
}

func (s *shop) decode(r *http.Request) (o order, err error) {
	var asked struct {
		Item  string `json:"item"`
		Cents int    `json:"cents"`
	}
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		return o, err
	}
	s.minted++
	o = order{Name: fmt.Sprintf("order-%d", s.minted), Item: asked.Item, Cents: asked.Cents}
	if o.Cents <= 0 {
		return o, &keyhttp.Problem{Type: "cents-not-positive", Status: 422, Detail: "cents must be positive"}
	}
	return o, nil
}

func takeStock(_ context.Context, tx *bbolt.Tx, o *order) error {
	if o.Item == "unicorn" {
		return keystate.Final(errSoldOut{o.Item})
	}
	b, err := tx.CreateBucketIfNotExists([]byte("stock"))
	if err != nil {
		return err
	}
	return b.Put([]byte(o.Name), []byte(o.Item))
}

func (s *shop) chargeOnce(ctx context.Context, token string, o *order) error {
	s.charges.Add(1)
	if s.charge != nil {
		if err := s.charge(ctx, o); err != nil {
			return err
		}
	}
	o.Charge = "ch_" + token
	return nil
}

func writeOrder(_ context.Context, tx *bbolt.Tx, o *order) error {
	b, err := tx.CreateBucketIfNotExists([]byte("orders"))
	if err != nil {
		return err
	}
	return b.Put([]byte(o.Name), []byte(o.Charge))
}

func encode(w http.ResponseWriter, o order, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Set-Cookie", "session=secret")
	w.Header().Set("X-Trace", "1")
	var sold errSoldOut
	switch {
	case errors.As(err, &sold):
		w.WriteHeader(http.StatusGone)
		fmt.Fprintf(w, `{"sold_out":%q}`, sold.item)
	case err != nil:
		w.WriteHeader(http.StatusConflict)
		fmt.Fprintf(w, `{"refused":%q}`, err)
	default:
		w.Header().Set("Location", "/orders/"+o.Name)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"name":%q,"item":%q,"charge":%q}`, o.Name, o.Item, o.Charge)
	}
}

// orders counts what the commits have left: orders that are done.
func (s *shop) orders() (n int) {
	s.t.Helper()
	err := s.engine.View(context.Background(), func(tx *bbolt.Tx) error {
		if b := tx.Bucket([]byte("orders")); b != nil {
			n = b.Stats().KeyN
		}
		return nil
	})
	if err != nil {
		s.t.Error(err)
	}
	return n
}

// keys counts the keys in the store.
func (s *shop) keys() (n int) {
	s.t.Helper()
	for _, err := range s.engine.Keys(context.Background(), keystate.Filter{}) {
		if err != nil {
			s.t.Fatal(err)
		}
		n++
	}
	return n
}

const tea = `{"item":"tea","cents":250}`

// post makes a request of ada's. Header lines are "Name: value".
func post(key, body string, lines ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/orders", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("X-Customer", "ada")
	if key != "" {
		r.Header.Set("Idempotency-Key", key)
	}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Add(name, value)
	}
	return r
}

func do(h http.Handler, r *http.Request) *http.Response {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func (s *shop) do(r *http.Request) *http.Response { return do(s.handler, r) }

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wants checks an answer's status and, when it is one, its problem.
func wants(t *testing.T, r *http.Response, status int, problem string) {
	t.Helper()
	if r.StatusCode != status {
		t.Fatalf("the answer is %d %s, want %d %s", r.StatusCode, body(t, r), status, problem)
	}
	if problem == "" {
		return
	}
	if got := r.Header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("the problem's content type is %q", got)
	}
	var p keyhttp.Problem
	if err := json.Unmarshal([]byte(body(t, r)), &p); err != nil {
		t.Fatal(err)
	}
	if p.Type != "https://example.com/keystate/problems/"+problem || p.Status != status || p.Title == "" || p.Detail == "" {
		t.Errorf("the problem is %+v, want %d %s with a title and what to do", p, status, problem)
	}
	retry, after := r.Header.Get("Should-Retry"), r.Header.Get("Retry-After")
	if again := status == 409 || status == 503; retry != fmt.Sprint(again) || (after != "") != again {
		t.Errorf("%s: Should-Retry is %q and Retry-After %q", problem, retry, after)
	}
}

// same checks that an answer was given before, byte for byte.
func same(t *testing.T, first, again *http.Response) {
	t.Helper()
	if first.Header.Get("Idempotent-Replayed") != "" || again.Header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("Idempotent-Replayed is %q at first and then %q", first.Header.Get("Idempotent-Replayed"), again.Header.Get("Idempotent-Replayed"))
	}
	a, b := body(t, first), body(t, again)
	if first.StatusCode != again.StatusCode || a != b {
		t.Errorf("the answer was %d %s, and is %d %s", first.StatusCode, a, again.StatusCode, b)
	}
	for _, name := range []string{"Content-Type", "Location", "Content-Length"} {
		if first.Header.Get(name) != again.Header.Get(name) {
			t.Errorf("%s was %q and is %q", name, first.Header.Get(name), again.Header.Get(name))
		}
	}
}

func TestARetryGetsTheFirstAnswerByteForByte(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	first := s.do(post(`"k1"`, tea))
	wants(t, first, http.StatusCreated, "")
	if got := first.Header.Get("Idempotency-Key"); got != `"k1"` {
		t.Errorf("the key is echoed as %s", got)
	}
	if first.Header.Get("Location") != "/orders/order-1" {
		t.Errorf("headers: %v", first.Header)
	}
	same(t, first, s.do(post(`"k1"`, tea)))
	if s.charges.Load() != 1 || s.orders() != 1 {
		t.Errorf("%d charges, %d orders", s.charges.Load(), s.orders())
	}
}

func TestQuotedAndBareSpellTheSameKey(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	first := s.do(post(`"k1"`, tea))
	again := s.do(post(`k1`, tea))
	same(t, first, again)
	if got := again.Header.Get("Idempotency-Key"); got != "k1" {
		t.Errorf("the key is echoed as %s", got)
	}
}

func TestAReleaseDoesNotChangeAnswersThatWereGiven(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	paid, refused := s.do(post("k1", tea)), s.do(post("k2", `{"item":"unicorn","cents":1}`))
	wants(t, paid, http.StatusCreated, "")
	wants(t, refused, http.StatusGone, "")
	s.endpoint.Encode = func(w http.ResponseWriter, _ order, _ error) { w.WriteHeader(299) }
	s.endpoint.Decode = func(*http.Request) (order, error) { return order{}, errors.New("no longer taken") }
	s.reopen()
	same(t, paid, s.do(post("k1", tea)))
	same(t, refused, s.do(post("k2", `{"item":"unicorn","cents":1}`)))
}

func TestADefinitiveErrorIsAnAnswerThatKnowsItsType(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	first := s.do(post("k1", `{"item":"unicorn","cents":1}`))
	wants(t, first, http.StatusGone, "")
	again := s.do(post("k1", `{"item":"unicorn","cents":1}`))
	same(t, first, again)
	if s.charges.Load() != 0 {
		t.Error("it was charged")
	}
}

func TestAPolicyOfFailIsAnAnswerToo(t *testing.T) {
	s := newShop(t, keyhttp.Options{})
	s.phases[1].OnError = keystate.Fail
	s.charge = func(context.Context, *order) error { return errors.New("card declined") }
	s.open()
	defer s.close()
	first := s.do(post("k1", tea))
	wants(t, first, http.StatusConflict, "")
	same(t, first, s.do(post("k1", tea)))
}

func TestAnIgnoredErrorOfTheLastPhaseHasAnAnswer(t *testing.T) {
	s := newShop(t, keyhttp.Options{})
	s.phases[2].OnError = keystate.Ignore
	s.phases[2].Commit = func(context.Context, *bbolt.Tx, *order) error { return errors.New("no paper") }
	s.open()
	defer s.close()
	first := s.do(post("k1", tea))
	wants(t, first, http.StatusCreated, "")
	same(t, first, s.do(post("k1", tea)))
}

func TestWhatIsWrongWithAKeyIsTold(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	for _, c := range []struct {
		name    string
		request *http.Request
		problem string
	}{
		{"missing", post("", tea), keyhttp.KeyMissing},
		{"empty", post("", tea, "Idempotency-Key: "), keyhttp.KeyMalformed},
		{"two lines", post("k1", tea, "Idempotency-Key: k1"), keyhttp.KeyMalformed},
		{"not ASCII", post("schlüssel", tea), keyhttp.KeyMalformed},
		{"too long", post(strings.Repeat("k", 256), tea), keyhttp.KeyMalformed},
		{"half quoted", post(`"k1`, tea), keyhttp.KeyMalformed},
	} {
		t.Run(c.name, func(t *testing.T) { wants(t, s.do(c.request), http.StatusBadRequest, c.problem) })
	}
	if s.keys() != 0 || s.minted != 0 {
		t.Errorf("%d keys are stored and %d requests decoded", s.keys(), s.minted)
	}
}

func TestStrictTakesStructuredStringsOnly(t *testing.T) {
	s := openShop(t, keyhttp.Options{Strict: true})
	wants(t, s.do(post("k1", tea)), http.StatusBadRequest, keyhttp.KeyMalformed)
	wants(t, s.do(post(`"k1"`, tea)), http.StatusCreated, "")
}

func TestAKeyInTheURLIsReadOnlyOnRequest(t *testing.T) {
	inURL := func(key string) *http.Request {
		r := post(key, tea)
		r.URL.RawQuery = "idempotency_key=k1"
		return r
	}
	off := openShop(t, keyhttp.Options{})
	wants(t, off.do(inURL("")), http.StatusBadRequest, keyhttp.KeyMissing)
	on := openShop(t, keyhttp.Options{QueryParameter: "idempotency_key"})
	first := on.do(inURL(""))
	wants(t, first, http.StatusCreated, "")
	same(t, first, on.do(inURL("k1")))
	same(t, on.do(post("k2", tea)), on.do(post("k2", tea)))
	wants(t, on.do(inURL("k2")), http.StatusBadRequest, keyhttp.KeyAmbiguous)
}

func TestAKeyUsedForAnotherRequestIsRefused(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	inside, goOn := make(chan bool), make(chan bool)
	s.charge = func(context.Context, *order) error {
		inside <- true
		<-goOn
		return nil
	}
	first := make(chan *http.Response)
	go func() { first <- s.do(post("k1", tea)) }()
	<-inside
	const coffee = `{"item":"coffee","cents":300}`
	wants(t, s.do(post("k1", coffee)), http.StatusUnprocessableEntity, keyhttp.KeyReused) // in flight
	goOn <- true
	answer := <-first
	wants(t, s.do(post("k1", coffee)), http.StatusUnprocessableEntity, keyhttp.KeyReused) // finished
	elsewhere := post("k1", tea)
	elsewhere.URL.Path = "/refunds"
	wants(t, s.do(elsewhere), http.StatusUnprocessableEntity, keyhttp.KeyReused)
	same(t, answer, s.do(post("k1", tea)))
	if s.orders() != 1 {
		t.Errorf("%d orders", s.orders())
	}
}

func TestEachScopeHasItsOwnKeys(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	bobs := func() *http.Request {
		r := post("k1", tea)
		r.Header.Set("X-Customer", "bob")
		return r
	}
	adas := s.do(post("k1", tea))
	first := s.do(bobs())
	wants(t, first, http.StatusCreated, "")
	if body(t, adas) == body(t, first) {
		t.Error("bob got ada's answer")
	}
	if s.orders() != 2 {
		t.Errorf("%d orders", s.orders())
	}
}

func TestWithoutAScopeNobodyIsAnswered(t *testing.T) {
	for _, c := range []struct {
		name    string
		scope   func(*http.Request) (string, error)
		status  int
		problem string
	}{
		{"an error", func(*http.Request) (string, error) { return "ada", errors.New("token expired") }, 401, keyhttp.ScopeUnknown},
		{"an empty scope", func(*http.Request) (string, error) { return "", nil }, 401, keyhttp.ScopeUnknown},
		{"a problem", func(*http.Request) (string, error) {
			return "", &keyhttp.Problem{Type: "account-closed", Title: "closed", Status: 403, Detail: "ask us"}
		}, 403, "account-closed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := openShop(t, keyhttp.Options{Scope: c.scope})
			wants(t, s.do(post("k1", tea)), c.status, c.problem)
			if s.keys() != 0 {
				t.Error("a key is stored")
			}
		})
	}
}

func TestInFlightIsAConflict(t *testing.T) {
	s := openShop(t, keyhttp.Options{RetryAfter: 1500 * time.Millisecond})
	inside, goOn := make(chan bool), make(chan bool)
	s.charge = func(context.Context, *order) error {
		inside <- true
		<-goOn
		return nil
	}
	first := make(chan *http.Response)
	go func() { first <- s.do(post("k1", tea)) }()
	<-inside
	again := s.do(post("k1", tea))
	wants(t, again, http.StatusConflict, keyhttp.KeyInFlight)
	if got := again.Header.Get("Retry-After"); got != "2" {
		t.Errorf("Retry-After is %q: 1.5 s are not over before 2 s are", got)
	}
	goOn <- true
	same(t, <-first, s.do(post("k1", tea)))
}

func TestInFlightWaitsForTheAnswerAsLongAsItIsAllowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShop(t, keyhttp.Options{Wait: 2 * time.Second, MaxWaiters: 1})
		s.charge = func(context.Context, *order) error { time.Sleep(5 * time.Second); return nil }
		s.open()
		defer s.close()
		began := time.Now()
		first, late, one := make(chan *http.Response, 1), make(chan *http.Response, 1), make(chan *http.Response, 1)
		go func() { first <- s.do(post("k1", tea)) }()
		time.Sleep(time.Second)
		go func() { late <- s.do(post("k1", tea)) }()
		synctest.Wait()
		wants(t, s.do(post("k1", tea)), http.StatusConflict, keyhttp.KeyInFlight) // one waits, and no more may
		wants(t, <-late, http.StatusConflict, keyhttp.KeyInFlight)
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("the waiter was told after %s", took)
		}
		time.Sleep(time.Second)
		go func() { one <- s.do(post("k1", tea)) }()
		same(t, <-first, <-one)
		if s.charges.Load() != 1 {
			t.Errorf("%d charges", s.charges.Load())
		}
	})
}

func TestRejectionsAreNotStored(t *testing.T) {
	s := openShop(t, keyhttp.Options{MaxBody: 100})
	tooLong := `{"item":"` + strings.Repeat("t", 100) + `","cents":1}`
	brokenOff := post("k1", "")
	brokenOff.Body = io.NopCloser(iotest.ErrReader(io.ErrUnexpectedEOF))
	for _, c := range []struct {
		name    string
		request *http.Request
		status  int
		problem string
	}{
		{"no JSON", post("k1", "tea"), 400, keyhttp.RequestInvalid},
		{"the program's own problem", post("k1", `{"item":"tea"}`), 422, ""},
		{"a body too large", post("k1", tooLong), 413, keyhttp.RequestTooLarge},
		{"a body that breaks off", brokenOff, 400, keyhttp.RequestInvalid},
	} {
		t.Run(c.name, func(t *testing.T) { wants(t, s.do(c.request), c.status, c.problem) })
	}
	if s.keys() != 0 {
		t.Fatalf("%d keys are stored", s.keys())
	}
	wants(t, s.do(post("k1", tea)), http.StatusCreated, "") // the same key is as good as new
	wants(t, s.do(post("k2", tea+strings.Repeat(" ", 100-len(tea)))), http.StatusCreated, "")
}

func TestARequestThatIsKnownIsNotLookedAtAgain(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	first := s.do(post("k1", tea))
	same(t, first, s.do(post("k1", tea)))
	if s.minted != 1 {
		t.Errorf("it was decoded %d times", s.minted)
	}
}

func TestOtherMethodsAreNotAllowed(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete} {
		r := post("k1", tea)
		r.Method = method
		answer := s.do(r)
		wants(t, answer, http.StatusMethodNotAllowed, keyhttp.MethodNotAllowed)
		if got := answer.Header.Get("Allow"); got != "POST, PATCH" {
			t.Errorf("Allow is %q", got)
		}
	}
	put := openShop(t, keyhttp.Options{Methods: []string{http.MethodPut}})
	r := post("k1", tea)
	r.Method = http.MethodPut
	wants(t, put.do(r), http.StatusCreated, "")
}

func TestAnOptionalKeyIsMinted(t *testing.T) {
	s := openShop(t, keyhttp.Options{Optional: true, KeyLife: time.Hour})
	first := s.do(post("", tea))
	wants(t, first, http.StatusCreated, "")
	key := first.Header.Get("Idempotency-Key")
	again := s.do(post(key, tea))
	same(t, first, again)
	if other := s.do(post("", tea)).Header.Get("Idempotency-Key"); other == key {
		t.Error("two requests got one key")
	}
}

func TestAKeyThatIsTooOldIsRefusedUnlessItIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShop(t, keyhttp.Options{KeyLife: time.Hour})
		s.options.Retention = 3 * time.Hour
		s.open()
		defer s.close()
		used, unused := mintedNow(), mintedNow()
		first := s.do(post(used, tea))
		wants(t, first, http.StatusCreated, "")
		time.Sleep(2 * time.Hour)
		wants(t, s.do(post(unused, tea)), http.StatusBadRequest, keyhttp.KeyExpired)
		same(t, first, s.do(post(used, tea)))
		time.Sleep(2 * time.Hour) // the answer is reaped
		if s.keys() != 0 {
			t.Fatal("nothing was reaped")
		}
		wants(t, s.do(post(used, tea)), http.StatusBadRequest, keyhttp.KeyExpired) // a late retry is no new request
		if s.orders() != 1 {
			t.Errorf("%d orders", s.orders())
		}
	})
}

// mintedNow is a UUIDv7 by the virtual clock; the library's go by the latest time that the process has seen.
func mintedNow() string {
	u := uuid.Must(uuid.NewV7())
	ms := time.Now().UnixMilli()
	for i := range 6 {
		u[i] = byte(ms >> (8 * (5 - i)))
	}
	return u.String()
}

func TestMintedKeysAreToldOnceAndUnique(t *testing.T) {
	mint := func(life time.Duration) (key string, expires time.Time) {
		answer := do(keyhttp.Mint(life), httptest.NewRequest(http.MethodPost, "/idempotency-keys", nil))
		wants(t, answer, http.StatusCreated, "")
		var m struct {
			Key     string    `json:"idempotency_key"`
			Expires time.Time `json:"expires_at"`
		}
		if err := json.Unmarshal([]byte(body(t, answer)), &m); err != nil {
			t.Fatal(err)
		}
		if got := answer.Header.Get("Idempotency-Key"); got != `"`+m.Key+`"` || answer.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("headers: %v", answer.Header)
		}
		if u, err := uuid.Parse(m.Key); err != nil || u.Version() != 7 {
			t.Errorf("the key is %q", m.Key)
		}
		return m.Key, m.Expires
	}
	one, expires := mint(time.Hour)
	if left := time.Until(expires); left > time.Hour || left < time.Hour-time.Minute {
		t.Errorf("the key expires in %s", left)
	}
	other, expires := mint(0)
	if other == one || !expires.IsZero() {
		t.Errorf("%s, then %s that expires at %s", one, other, expires)
	}
}

func TestAnInterruptedRequestIsNotAnAnswer(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	s.charge = func(context.Context, *order) error { return errors.New("the bank is away") }
	refused := s.do(post("k1", tea))
	wants(t, refused, http.StatusServiceUnavailable, keyhttp.Interrupted)
	s.charge = nil
	first := s.do(post("k1", tea))
	wants(t, first, http.StatusCreated, "")
	same(t, first, s.do(post("k1", tea)))
	if s.charges.Load() != 2 || s.orders() != 1 || s.minted != 1 {
		t.Errorf("%d charges, %d orders, %d decoded", s.charges.Load(), s.orders(), s.minted)
	}
}

func TestWhatIsParkedSaysSo(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	s.charge = func(context.Context, *order) error { return errors.New("the bank is away: secret of ours") }
	for range 2 {
		wants(t, s.do(post("k1", tea)), http.StatusServiceUnavailable, keyhttp.Interrupted)
	}
	parked := s.do(post("k1", tea))
	if parked.Header.Get("Should-Retry") != "false" {
		t.Errorf("Should-Retry: %q", parked.Header.Get("Should-Retry"))
	}
	wants(t, parked, http.StatusInternalServerError, keyhttp.Parked)
	wants(t, s.do(post("k1", tea)), http.StatusInternalServerError, keyhttp.Parked)
	key := keystate.Key{Scope: "customer/ada", ID: "k1"}
	if err := s.engine.Abandon(context.Background(), key, "refunded by hand"); err != nil {
		t.Fatal(err)
	}
	again := s.do(post("k1", tea))
	wants(t, again, http.StatusConflict, "")
	if got := body(t, again); !strings.Contains(got, "refunded by hand") {
		t.Errorf("the answer is %s", got)
	}
}

// A problem tells clients what to do, and nothing of what went on inside.
func TestProblemsTellNothingOfTheInside(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	s.charge = func(context.Context, *order) error { return errors.New("password hunter2") }
	for range 3 {
		if got := body(t, s.do(post("k1", tea))); strings.Contains(got, "hunter2") || strings.Contains(got, "charged") {
			t.Errorf("the problem says %s", got)
		}
	}
}

func TestProblemsCanHaveTheAPIsOwnForm(t *testing.T) {
	s := openShop(t, keyhttp.Options{WriteProblem: func(w http.ResponseWriter, r *http.Request, p *keyhttp.Problem) {
		w.WriteHeader(p.Status)
		fmt.Fprintf(w, "%s %s: %s", r.Method, p.Type, p.Title)
	}})
	answer := s.do(post("", tea))
	want := "POST https://example.com/keystate/problems/key-missing: The request needs an idempotency key"
	if got := body(t, answer); answer.StatusCode != http.StatusBadRequest || got != want || answer.Header.Get("Should-Retry") != "false" {
		t.Errorf("%d %s, %v", answer.StatusCode, got, answer.Header)
	}
}

func TestAHandlerThatWasCutOffGoesOnByItself(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	inside := make(chan bool)
	s.charge = func(ctx context.Context, _ *order) error {
		close(inside)
		<-ctx.Done()
		return ctx.Err()
	}
	first := make(chan *http.Response)
	go func() { first <- s.do(post("k1", tea)) }()
	<-inside
	s.close()
	wants(t, <-first, http.StatusServiceUnavailable, keyhttp.Interrupted)
	s.charge = nil
	s.open()
	if err := s.engine.Resume(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s.orders() != 1 {
		t.Fatalf("%d orders", s.orders())
	}
	again := s.do(post("k1", tea))
	wants(t, again, http.StatusCreated, "")
	if again.Header.Get("Idempotent-Replayed") != "true" {
		t.Error("the answer was made without this request, and does not say so")
	}
	if s.minted != 1 {
		t.Errorf("decoded %d times", s.minted)
	}
}

func TestTheWorkGoesOnWhenTheClientIsGone(t *testing.T) {
	s := openShop(t, keyhttp.Options{Wait: time.Minute})
	inside, goOn := make(chan bool), make(chan bool)
	s.charge = func(context.Context, *order) error {
		inside <- true
		<-goOn
		return nil
	}
	ctx, hangUp := context.WithCancel(context.Background())
	gone := make(chan *http.Response)
	go func() { gone <- s.do(post("k1", tea).WithContext(ctx)) }()
	<-inside
	hangUp()
	<-gone
	close(goOn)
	again := s.do(post("k1", tea))
	wants(t, again, http.StatusCreated, "")
	if s.charges.Load() != 1 {
		t.Errorf("%d charges", s.charges.Load())
	}
}

func TestAnAnswerTooLargeToKeepIsGivenOnce(t *testing.T) {
	s := newShop(t, keyhttp.Options{MaxResponse: 1000})
	s.endpoint.Encode = func(w http.ResponseWriter, o order, _ error) {
		w.WriteHeader(http.StatusCreated)
		io.WriteString(w, strings.Repeat(o.Item, 1000))
	}
	s.open()
	defer s.close()
	first := s.do(post("k1", tea))
	wants(t, first, http.StatusCreated, "")
	if got := body(t, first); got != strings.Repeat("tea", 1000) {
		t.Errorf("the first answer has %d bytes", len(got))
	}
	for range 2 {
		again := s.do(post("k1", tea))
		if again.Header.Get("Idempotent-Replayed") != "true" {
			t.Error("the retry does not say that it was not done")
		}
		wants(t, again, http.StatusGone, keyhttp.AnswerNotKept)
	}
	if s.charges.Load() != 1 || s.orders() != 1 {
		t.Errorf("%d charges, %d orders", s.charges.Load(), s.orders())
	}
}

func TestAStoreThatIsDownRefusesEverything(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	s.engine.Close()
	wants(t, s.do(post("k1", tea)), http.StatusServiceUnavailable, keyhttp.Unavailable)
	if s.charges.Load() != 0 {
		t.Error("it was charged without protection")
	}
}

func TestAStoreThatIsFullRefusesNewKeys(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	first := s.do(post("k1", tea))
	wants(t, first, http.StatusCreated, "")
	s.options.MaxBytes = 1
	s.reopen()
	wants(t, s.do(post("k2", tea)), http.StatusServiceUnavailable, keyhttp.Unavailable)
	same(t, first, s.do(post("k1", tea)))
	if s.charges.Load() != 1 {
		t.Error("it was charged without protection")
	}
}

func TestOnlyNamedHeadersAreStored(t *testing.T) {
	s := openShop(t, keyhttp.Options{KeepHeaders: []string{"x-trace"}})
	first := s.do(post("k1", tea))
	again := s.do(post("k1", tea))
	for _, r := range []*http.Response{first, again} {
		if r.Header.Get("X-Trace") != "1" || r.Header.Get("Set-Cookie") != "" || r.Header.Get("Location") == "" {
			t.Errorf("headers: %v", r.Header)
		}
	}
	file, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(file, []byte("session=secret")) {
		t.Error("the cookie is in the store")
	}
}

func TestASealedAnswerIsNotReadableInTheStore(t *testing.T) {
	block, err := aes.NewCipher([]byte("0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	locked := false
	s := openShop(t, keyhttp.Options{
		Seal: func(r keyhttp.Response) (keyhttp.Response, error) {
			r.Body = aead.Seal(nil, nil, r.Body, nil)
			return r, nil
		},
		Open: func(r keyhttp.Response) (_ keyhttp.Response, err error) {
			if locked {
				return r, errors.New("the vault is locked")
			}
			r.Body, err = aead.Open(nil, nil, r.Body, nil)
			return r, err
		},
	})
	first := s.do(post("k1", tea))
	wants(t, first, http.StatusCreated, "")
	same(t, first, s.do(post("k1", tea)))
	file, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(file, []byte(`"charge":`)) {
		t.Error("the answer is in the store as it was sent")
	}
	locked = true
	wants(t, s.do(post("k1", tea)), http.StatusInternalServerError, keyhttp.Parked)
	wants(t, s.do(post("k2", tea)), http.StatusInternalServerError, keyhttp.Parked)
	locked = false
	again := s.do(post("k2", tea))
	wants(t, again, http.StatusCreated, "")
	if s.charges.Load() != 2 {
		t.Errorf("%d charges", s.charges.Load())
	}
}

// A fault in Encode comes after the work is done: it must neither undo the work nor end the key without an answer.
func TestAFaultInEncodeWaitsForARelease(t *testing.T) {
	s := newShop(t, keyhttp.Options{})
	s.endpoint.Encode = func(http.ResponseWriter, order, error) { panic("nil map") }
	s.phases[2].OnError = keystate.Fail // a fault of ours is none of the phase's
	s.open()
	t.Cleanup(func() { s.close() })
	wants(t, s.do(post("k1", tea)), http.StatusServiceUnavailable, keyhttp.Interrupted)
	if s.orders() != 1 {
		t.Errorf("%d orders", s.orders())
	}
	s.endpoint.Encode = encode
	s.reopen()
	wants(t, s.do(post("k1", tea)), http.StatusCreated, "")
	if s.charges.Load() != 1 || s.orders() != 1 {
		t.Errorf("%d charges, %d orders", s.charges.Load(), s.orders())
	}
}

func TestDecodeKnowsTheKey(t *testing.T) {
	s := newShop(t, keyhttp.Options{})
	var seen keystate.Key
	s.endpoint.Decode = func(r *http.Request) (order, error) {
		seen = keyhttp.KeyOf(r)
		return s.decode(r)
	}
	s.open()
	defer s.close()
	wants(t, s.do(post(`"k1"`, tea)), http.StatusCreated, "")
	if want := (keystate.Key{Scope: "customer/ada", ID: "k1"}); seen != want {
		t.Errorf("the key is %v", seen)
	}
	if none := keyhttp.KeyOf(post("k1", tea)); none != (keystate.Key{}) {
		t.Errorf("a request that was not let in has the key %v", none)
	}
}

func TestFaultsOfAnEndpointAreToldAtOnce(t *testing.T) {
	e, err := keystate.Open(filepath.Join(t.TempDir(), "s.db"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	_, err = keyhttp.Handle(e, "order", []keystate.Phase[*bbolt.Tx, order]{{To: keystate.Finished}}, keyhttp.Endpoint[order]{
		Options: keyhttp.Options{KeepHeaders: []string{"set-cookie"}, MaxBody: -1, Open: func(r keyhttp.Response) (keyhttp.Response, error) { return r, nil }},
	})
	for _, part := range []string{"Scope", "Set-Cookie", "MaxBody", "Open", "Decode"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s is not in %v", part, err)
		}
	}
	for name, phases := range map[string][]keystate.Phase[*bbolt.Tx, order]{
		"none":                  {},
		"one that does not end": {{To: "a"}},
		"our own point":         {{To: "work_done"}, {To: keystate.Finished}},
		"a former end":          {{To: keystate.Finished, Formerly: []keystate.RecoveryPoint{"a"}}},
	} {
		ep := keyhttp.Endpoint[order]{Options: keyhttp.Options{Scope: keyhttp.Public}, Decode: (&shop{}).decode, Encode: encode}
		if _, err := keyhttp.Handle(e, "order", phases, ep); err == nil {
			t.Errorf("phases %s are registered", name)
		}
	}
}

func TestTheMachineIsDrawnWithItsAnswer(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	if got := s.handler.Machine().String(); !strings.Contains(got, "charged --> work_done") || !strings.Contains(got, "work_done --> finished") {
		t.Error(got)
	}
	s.do(post("k1", tea))
	r, err := s.engine.Key(context.Background(), keystate.Key{Scope: "customer/ada", ID: "k1"})
	if err != nil {
		t.Fatal(err)
	}
	x, err := s.handler.Machine().DecodeState(r)
	if err != nil || x.State.Item != "tea" || x.Response == nil || x.Response.Status != http.StatusCreated {
		t.Errorf("the exchange is %+v, %v", x, err)
	}
}

func TestWhatAnotherCommitStagesCanBeAskedFor(t *testing.T) {
	s := openShop(t, keyhttp.Options{})
	err := s.engine.Update(context.Background(), func(tx *bbolt.Tx) error {
		return keystate.Stage(tx, s.handler.Machine(), keystate.Key{Scope: "customer/ada", ID: "staged"}, keyhttp.Exchange[order]{State: order{Name: "n", Item: "tea", Cents: 1}})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.engine.Resume(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s.orders() != 1 {
		t.Errorf("%d orders", s.orders())
	}
	wants(t, s.do(post("staged", tea)), http.StatusUnprocessableEntity, keyhttp.KeyReused)
}
