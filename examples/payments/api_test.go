package main

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
	"example.com/keystate/keyhttp"
	"go.etcd.io/bbolt"
)

// A bench is a service without a network, and a processor without one.
type bench struct {
	*testing.T
	*service
	store  string
	ledger string
	calls  *processor.Client
	logs   bytes.Buffer
}

// openBench opens a service in a new directory. Its processor is reached through the door, if there is one.
func openBench(t *testing.T, door func(http.Handler) http.Handler) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{T: t, store: filepath.Join(dir, "payments.db"), ledger: filepath.Join(dir, "ledger")}
	p, err := processor.Open(b.ledger, processor.Faults{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	h := p.Handler()
	if door != nil {
		h = door(h)
	}
	b.calls = &processor.Client{URL: "http://processor", HTTP: http.Client{Transport: within{h}}}
	b.open()
	return b
}

func (b *bench) open() {
	b.Helper()
	s, err := openService(b.Context(), b.store, b.calls, time.Minute, slog.New(slog.NewJSONHandler(&b.logs, nil)))
	if err != nil {
		b.Fatal(err)
	}
	b.service = s
	b.Cleanup(func() { s.engine.Close() })
}

// payouts counts what the processor has paid.
func (b *bench) payouts() (n int) {
	entries, _, err := processor.ReadLedger(b.ledger)
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range entries {
		if e.Kind == processor.Payout {
			n++
		}
	}
	return n
}

// books reads what the service has written.
func (b *bench) books() (books money.Books) {
	b.Helper()
	err := b.engine.View(b.Context(), func(tx *bbolt.Tx) (err error) {
		books, err = money.ReadBooks(tx)
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return books
}

// within hands requests to a handler in this process.
type within struct{ to http.Handler }

func (h within) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	h.to.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

// A question is a request in short.
type question struct {
	method, path string
	as           string // the account; empty: nobody
	key          string
	body         string
	header       map[string]string
}

func pay(as, key, body string) question {
	return question{method: "POST", path: "/v1/transfers", as: as, key: key, body: body}
}

// ask gets an answer, and sees to it that the document knows such answers.
func (b *bench) ask(q question) *httptest.ResponseRecorder {
	b.Helper()
	r := httptest.NewRequest(q.method, q.path, strings.NewReader(q.body))
	if q.as != "" {
		r.Header.Set("Authorization", "Bearer "+q.as+"-secret")
	}
	if q.key != "" {
		r.Header.Set("Idempotency-Key", q.key)
	}
	if q.body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for name, value := range q.header {
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	b.handler().ServeHTTP(w, r)
	for _, fault := range undocumented(b.service, r, w) {
		b.Errorf("%s %s: %s", q.method, q.path, fault)
	}
	return w
}

const twenty = `{"from":"ada","to":"bob","cents":2000}`

// transfer is the transfer in an answer.
func (b *bench) transfer(w *httptest.ResponseRecorder) (t transferAnswer) {
	b.Helper()
	if err := json.Unmarshal(w.Body.Bytes(), &t); err != nil {
		b.Fatal(err, w.Body)
	}
	return t
}

func (b *bench) balance(account string) int64 {
	b.Helper()
	var a accountAnswer
	if err := json.Unmarshal(b.ask(question{method: "GET", path: "/v1/accounts/" + account, as: account}).Body.Bytes(), &a); err != nil {
		b.Fatal(err)
	}
	return a.Cents
}

func TestAnswers(t *testing.T) {
	b := openBench(t, nil)
	for _, c := range []struct {
		name   string
		ask    question
		status int
		says   string // a part of the body: for problems, of their type
	}{
		{"paid", pay("ada", "k1", twenty), 201, `"status":"paid"`},
		{"replayed", pay("ada", "k1", twenty), 201, `"status":"paid"`},
		{"replayed with other spaces and order", pay("ada", "k1", ` {"cents": 2000, "to": "bob", "from": "ada"}`), 201, `"status":"paid"`},
		{"the same key of another account", pay("bob", "k1", `{"from":"bob","to":"ada","cents":1}`), 201, `"cents":1`},
		{"a name that is not ASCII", pay("ada", "k2", `{"from":"ada","to":"Zoë","cents":1}`), 201, "Zoë"},
		{"another transfer under a used key", pay("ada", "k1", `{"from":"ada","to":"bob","cents":2001}`), 422, "/key-reused"},
		{"nobody", pay("", "k3", twenty), 401, "/unauthorized"},
		{"a stranger", pay("stranger", "k3", twenty), 401, "/unauthorized"},
		{"half a token", question{method: "POST", path: "/v1/transfers", key: "k3", body: twenty,
			header: map[string]string{"Authorization": "Bearer ada-secre"}}, 401, "/unauthorized"},
		{"more than a token", question{method: "POST", path: "/v1/transfers", key: "k3", body: twenty,
			header: map[string]string{"Authorization": "Bearer ada-secrets"}}, 401, "/unauthorized"},
		{"a scheme of another kind", question{method: "POST", path: "/v1/transfers", key: "k3", body: twenty,
			header: map[string]string{"Authorization": "Basic ada-secret"}}, 401, "/unauthorized"},
		{"no key", pay("ada", "", twenty), 400, "/key-missing"},
		{"a key in the URL", question{method: "POST", path: "/v1/transfers?idempotency_key=k9", as: "ada", body: twenty}, 400, "/key-missing"},
		{"a key that is half quoted", pay("ada", `"k4`, twenty), 400, "/key-malformed"},
		{"a minted key of long ago", pay("ada", "018f0000-0000-7000-8000-000000000000", twenty), 400, "/key-expired"},
		{"another's account", pay("bob", "k4", twenty), 403, "/not-your-account"},
		{"the key is free after that", pay("ada", "k4", twenty), 201, "paid"},
		{"no JSON", pay("ada", "k5", `from ada to bob`), 400, "/malformed"},
		{"two values", pay("ada", "k5", twenty+twenty), 400, "/malformed"},
		{"an unknown field", pay("ada", "k5", `{"from":"ada","to":"bob","cents":2000,"currency":"EUR"}`), 400, "/malformed"},
		{"half a cent", pay("ada", "k5", `{"from":"ada","to":"bob","cents":0.5}`), 400, "/malformed"},
		{"cents in words", pay("ada", "k5", `{"from":"ada","to":"bob","cents":"2000"}`), 400, "/malformed"},
		{"more cents than there are numbers", pay("ada", "k5", `{"from":"ada","to":"bob","cents":9223372036854775808}`), 400, "/malformed"},
		{"an empty body", question{method: "POST", path: "/v1/transfers", as: "ada", key: "k5", header: map[string]string{"Content-Type": "application/json"}}, 400, "/malformed"},
		{"nothing", pay("ada", "k5", `{"from":"ada","to":"bob","cents":0}`), 422, "/invalid-transfer"},
		{"less than nothing", pay("ada", "k5", `{"from":"ada","to":"bob","cents":-1}`), 422, "/invalid-transfer"},
		{"no payee", pay("ada", "k5", `{"from":"ada","cents":1}`), 422, "/invalid-transfer"},
		{"another type", question{method: "POST", path: "/v1/transfers", as: "ada", key: "k5", body: twenty,
			header: map[string]string{"Content-Type": "text/plain"}}, 415, "/not-json"},
		{"a type with a parameter", question{method: "POST", path: "/v1/transfers", as: "ada", key: "k6", body: twenty,
			header: map[string]string{"Content-Type": "application/json; charset=utf-8"}}, 201, "paid"},
		{"a book", pay("ada", "k7", `{"from":"`+strings.Repeat("a", 5000)+`"}`), 413, "/request-too-large"},
		{"to oneself", pay("ada", "k8", `{"from":"ada","to":"ada","cents":1}`), 422, "/invalid-transfer"},
		{"to nobody", pay("ada", "k9", `{"from":"ada","to":"nobody","cents":1}`), 404, "/unknown-payee"},
		{"more than there is", pay("ada", "k10", `{"from":"ada","to":"bob","cents":9000000000}`), 402, "/insufficient-funds"},
		{"declined", pay("ada", "k11", `{"from":"ada","to":"declined@closed.example","cents":1}`), 402, "/declined"},
		{"another's books", question{method: "GET", path: "/v1/accounts/bob", as: "ada"}, 403, "/not-your-account"},
		{"nobody's books", question{method: "GET", path: "/v1/accounts/nobody", as: "ada"}, 403, "/not-your-account"},
		{"books for nobody", question{method: "GET", path: "/v1/accounts/ada"}, 401, "/unauthorized"},
		{"a transfer for nobody", question{method: "GET", path: "/v1/transfers/x"}, 401, "/unauthorized"},
		{"no such transfer", question{method: "GET", path: "/v1/transfers/x", as: "ada"}, 404, "/not-found"},
		{"a new key", question{method: "POST", path: "/idempotency-keys"}, 201, "idempotency_key"},
		{"health", question{method: "GET", path: "/healthz"}, 200, `"parked":0`},
		{"the document", question{method: "GET", path: "/openapi.json"}, 200, `"3.1.0"`},
		{"another method", question{method: "DELETE", path: "/v1/transfers", as: "ada"}, 405, "/method-not-allowed"},
		{"another place", question{method: "GET", path: "/v2", as: "ada"}, 404, "/not-found"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := *b
			b.T = t
			w := b.ask(c.ask)
			if w.Code != c.status || !strings.Contains(w.Body.String(), c.says) {
				t.Errorf("%d %s, not %d with %q", w.Code, w.Body, c.status, c.says)
			}
		})
	}
	if n := b.payouts(); n != 5 {
		t.Errorf("there were %d payouts, not 5", n)
	}
}

func TestARetryGetsTheSameAnswerAndPaysOnce(t *testing.T) {
	b := openBench(t, nil)
	for name, q := range map[string]question{
		"paid":     pay("ada", "k1", twenty),
		"declined": pay("ada", "k2", `{"from":"ada","to":"declined@closed.example","cents":1}`),
		"refused":  pay("ada", "k3", `{"from":"ada","to":"ada","cents":1}`),
	} {
		first, second := b.ask(q), b.ask(q)
		if first.Code != second.Code || first.Body.String() != second.Body.String() || first.Header().Get("Location") != second.Header().Get("Location") {
			t.Errorf("%s: first %d %s, then %d %s", name, first.Code, first.Body, second.Code, second.Body)
		}
		if first.Header().Get("Idempotent-Replayed") != "" || second.Header().Get("Idempotent-Replayed") != "true" {
			t.Errorf("%s: the replay is %q, and the first answer %q", name, second.Header(), first.Header())
		}
	}
	if n := b.payouts(); n != 1 {
		t.Errorf("there were %d payouts", n)
	}
	if ada, bob := b.balance("ada"), b.balance("bob"); ada != 1_980_00 || bob != 1_520_00 {
		t.Errorf("ada has %d and bob %d", ada, bob)
	}
}

func TestATransferIsFoundByItsOwnerOnly(t *testing.T) {
	b := openBench(t, nil)
	paid := b.ask(pay("ada", "k1", twenty))
	at := question{method: "GET", path: paid.Header().Get("Location"), as: "ada"}
	if w := b.ask(at); w.Code != http.StatusOK || w.Body.String() != paid.Body.String() {
		t.Errorf("%d %s; it was made as %s", w.Code, w.Body, paid.Body)
	}
	at.as = "bob"
	if w := b.ask(at); w.Code != http.StatusNotFound {
		t.Errorf("another is told %d %s", w.Code, w.Body)
	}
	declined := b.ask(pay("ada", "k2", `{"from":"ada","to":"declined@closed.example","cents":1}`))
	var p keyhttp.Problem
	if err := json.Unmarshal(declined.Body.Bytes(), &p); err != nil {
		t.Fatal(err)
	}
	w := b.ask(question{method: "GET", path: p.Instance, as: "ada"})
	if got := b.transfer(w); w.Code != http.StatusOK || got.Status != "declined" || got.Reason == "" || got.Payout != "" {
		t.Errorf("the declined transfer is %d %s", w.Code, w.Body)
	}
}

func TestAMintedKeyIsTaken(t *testing.T) {
	b := openBench(t, nil)
	var minted struct {
		Key     string    `json:"idempotency_key"`
		Expires time.Time `json:"expires_at"`
	}
	w := b.ask(question{method: "POST", path: "/idempotency-keys"})
	if err := json.Unmarshal(w.Body.Bytes(), &minted); err != nil {
		t.Fatal(err)
	}
	if left := time.Until(minted.Expires); left > keyLife || left < keyLife-time.Minute {
		t.Errorf("it lives for another %v", left)
	}
	if w := b.ask(pay("ada", minted.Key, twenty)); w.Code != http.StatusCreated {
		t.Error(w.Code, w.Body)
	}
}

// A gate lets calls to the processor in, and holds them there until it is opened.
type gate struct {
	entered chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newGate() *gate { return &gate{entered: make(chan struct{}), open: make(chan struct{})} }

func (g *gate) door(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.once.Do(func() { close(g.entered) })
		select {
		case <-g.open:
			h.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	})
}

func TestInFlightIsToldApartFromDone(t *testing.T) {
	g := newGate()
	b := openBench(t, g.door)
	answered := make(chan *httptest.ResponseRecorder)
	go func() { answered <- b.ask(pay("ada", "k1", twenty)) }()
	<-g.entered
	w := b.ask(pay("ada", "k1", twenty))
	if w.Code != http.StatusConflict || w.Header().Get("Retry-After") == "" || w.Header().Get("Should-Retry") != "true" {
		t.Errorf("the second is told %d %s %v", w.Code, w.Body, w.Header())
	}
	if w := b.ask(pay("ada", "k1", `{"from":"ada","to":"bob","cents":1}`)); w.Code != http.StatusUnprocessableEntity {
		t.Errorf("another transfer under the key is told %d %s", w.Code, w.Body)
	}
	if n := b.balance("ada"); n != 1_980_00 {
		t.Errorf("meanwhile ada has %d", n)
	}
	for id := range b.books().Transfers {
		if w := b.ask(question{method: "GET", path: transfersPath + id, as: "ada"}); w.Code != http.StatusOK || b.transfer(w).Status != money.Pending {
			t.Errorf("meanwhile the transfer is %d %s", w.Code, w.Body)
		}
	}
	if n := len(b.books().Transfers); n != 1 {
		t.Errorf("meanwhile there are %d transfers", n)
	}
	close(g.open)
	first := <-answered
	if first.Code != http.StatusCreated {
		t.Fatal(first.Code, first.Body)
	}
	if w := b.ask(pay("ada", "k1", twenty)); w.Body.String() != first.Body.String() {
		t.Errorf("afterwards it is told %s", w.Body)
	}
}

func TestAnInterruptedTransferGoesOnAtTheNextStart(t *testing.T) {
	g := newGate()
	b := openBench(t, g.door)
	answered := make(chan *httptest.ResponseRecorder)
	go func() { answered <- b.ask(pay("ada", "k1", twenty)) }()
	<-g.entered
	if err := b.engine.Close(); err != nil {
		t.Fatal(err)
	}
	if w := <-answered; w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || w.Header().Get("Should-Retry") != "true" {
		t.Errorf("the interrupted request is told %d %s %v", w.Code, w.Body, w.Header())
	}
	if w := b.ask(pay("ada", "k2", twenty)); w.Code != http.StatusServiceUnavailable {
		t.Errorf("a new one is told %d %s", w.Code, w.Body)
	}
	close(g.open)
	b.open()
	if err := b.engine.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := b.ask(pay("ada", "k1", twenty))
	if w.Code != http.StatusCreated || w.Header().Get("Idempotent-Replayed") != "true" || b.payouts() != 1 {
		t.Errorf("%d %s %v, and %d payouts", w.Code, w.Body, w.Header(), b.payouts())
	}
	for _, line := range []string{
		`"msg":"interrupted keys resume","keys":1`, `"msg":"key resumes","key":"account/ada/k1"`, `"msg":"resumed key has its answer"`,
	} {
		if !strings.Contains(b.logs.String(), line) {
			t.Errorf("the log has no line with %s:\n%s", line, b.logs.String())
		}
	}
}

func TestAProcessorThatNeverAnswersEndsWithAnOperator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openBench(t, func(http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusBadGateway) })
		})
		defer b.engine.Close()
		if w := b.ask(pay("ada", "k1", twenty)); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
			t.Errorf("%d %s %v", w.Code, w.Body, w.Header())
		}
		if err := b.engine.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		w := b.ask(pay("ada", "k1", twenty))
		if w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), "/parked") || w.Header().Get("Should-Retry") != "false" {
			t.Errorf("%d %s %v", w.Code, w.Body, w.Header())
		}
		if w := b.ask(question{method: "GET", path: "/healthz"}); !strings.Contains(w.Body.String(), `"parked":1`) {
			t.Error(w.Body)
		}
		if err := b.engine.Abandon(t.Context(), keystate.Key{Scope: "account/ada", ID: "k1"}, "paid by hand"); err != nil {
			t.Fatal(err)
		}
		w = b.ask(pay("ada", "k1", twenty))
		if w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), "/abandoned") || !strings.Contains(w.Body.String(), "paid by hand") {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		if w.Header().Get("Idempotent-Replayed") != "true" {
			t.Errorf("the client does not learn that asking again is of no use: %v", w.Header())
		}
	})
}

func TestEachRequestIsOneLineInTheLog(t *testing.T) {
	b := openBench(t, nil)
	b.logs.Reset()
	b.ask(pay("ada", `"k1"`, twenty))
	b.ask(pay("ada", "k1", twenty))
	b.ask(question{method: "GET", path: "/nothing"})
	want := []string{`"POST","path":"/v1/transfers","status":201,"key":"k1","replayed":false,`,
		`"POST","path":"/v1/transfers","status":201,"key":"k1","replayed":true,`, `"GET","path":"/nothing","status":404,"key":"","replayed":false,`}
	var lines []string
	for line := range strings.Lines(b.logs.String()) {
		if strings.Contains(line, `"msg":"request"`) {
			lines = append(lines, line)
		}
	}
	if !slices.EqualFunc(lines, want, strings.Contains) {
		t.Errorf("%q", lines)
	}
}
