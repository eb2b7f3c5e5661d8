package frameworks

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"example.com/keystate"
	"example.com/keystate/keyhttp"
	"github.com/gin-gonic/gin"
	"github.com/gofiber/fiber/v3"
	"go.etcd.io/bbolt"
)

func init() { gin.SetMode(gin.ReleaseMode) }

// serving starts a server for each framework.
var serving = map[string]func(*testing.T, Shop) (address string){
	"chi":   netHTTP(Chi),
	"echo":  netHTTP(Echo),
	"fiber": fasthttp(Fiber),
	"gin":   netHTTP(Gin),
	"mux":   netHTTP(Mux),
}

func netHTTP(mount func(Shop) http.Handler) func(*testing.T, Shop) string {
	return func(t *testing.T, s Shop) string {
		server := httptest.NewUnstartedServer(mount(s))
		server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
		server.Start()
		t.Cleanup(server.Close)
		return server.URL
	}
}

func fasthttp(mount func(Shop) *fiber.App) func(*testing.T, Shop) string {
	return func(t *testing.T, s Shop) string {
		return listen(t, mount(s))
	}
}

func listen(t *testing.T, app *fiber.App) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- app.Listener(l, fiber.ListenConfig{DisableStartupMessage: true}) }()
	t.Cleanup(func() {
		if err := app.Shutdown(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

// A payment is the state behind POST /accounts/{account}/payments.
type payment struct{ ID, Account string }

// A bench is a shop with its counts.
type bench struct {
	Shop
	engine           *keystate.Engine[*bbolt.Tx]
	charges, refunds atomic.Int64
	mu               sync.Mutex
	refund           func(account string) (string, error)          // nil: granted
	charge           func(ctx context.Context, token string) error // nil: done
}

func newBench(t *testing.T) *bench {
	t.Helper()
	engine, err := keystate.Open(filepath.Join(t.TempDir(), "shop.db"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	b := &bench{engine: engine}
	options := keyhttp.Options{Scope: scope, Logger: slog.New(slog.DiscardHandler)}
	b.Payments, err = keyhttp.Handle(engine, "payment", b.phases(), keyhttp.Endpoint[payment]{
		Options: options,
		Decode: func(r *http.Request) (payment, error) {
			return payment{ID: keystate.NewID(), Account: r.PathValue("account")}, nil
		},
		Encode: func(w http.ResponseWriter, p payment, err error) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusCreated)
			json.NewEncoder(w).Encode(p)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if b.Once, err = keyhttp.Middleware(engine, "refund", options); err != nil {
		t.Fatal(err)
	}
	b.Refund = func(account string) (string, error) {
		n := b.refunds.Add(1)
		b.mu.Lock()
		refund := b.refund
		b.mu.Unlock()
		if refund != nil {
			return refund(account)
		}
		return strings.Repeat("r", int(n)) + " to " + account, nil
	}
	return b
}

// scope is what a request says of itself, cut out of its header as logins are.
func scope(r *http.Request) (string, error) {
	return strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "), nil
}

func (b *bench) phases() []keystate.Phase[*bbolt.Tx, payment] {
	return []keystate.Phase[*bbolt.Tx, payment]{
		{To: "reserved", Commit: func(context.Context, *bbolt.Tx, *payment) error { return nil }},
		{To: keystate.Finished, Effect: func(ctx context.Context, token string, _ *payment) error {
			b.charges.Add(1)
			if b.charge != nil {
				return b.charge(ctx, token)
			}
			return nil
		}, Retry: keystate.RetryPolicy{InRun: -1}},
	}
}

// An answer is what a test looks at.
type answer struct {
	status                 int
	body, replayed, format string
}

func ask(t *testing.T, address, key string) answer {
	t.Helper()
	got, err := tryToAsk(t, address, key)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// tryToAsk has a connection of its own, so that nobody asks again in its place when it breaks.
func tryToAsk(t *testing.T, address, key string) (answer, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, strings.NewReader(`{"cents":2000}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer shop-1")
	if key != "" {
		r.Header.Set("Idempotency-Key", key)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	format, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return answer{resp.StatusCode, string(body), resp.Header.Get("Idempotent-Replayed"), format}, nil
}

// each runs a test under every framework.
func each(t *testing.T, test func(t *testing.T, b *bench, address string)) {
	t.Parallel()
	for name, serve := range serving {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			test(t, b, serve(t, b.Shop))
		})
	}
}

// twice asks twice, and expects the first answer, and the same as a replay.
func twice(t *testing.T, address string, status int, containing string) {
	t.Helper()
	first, second := ask(t, address, "order-4711"), ask(t, address, "order-4711")
	if first.status != status || !strings.Contains(first.body, containing) || first.replayed != "" {
		t.Errorf("first: %+v", first)
	}
	first.replayed = "true"
	if second != first {
		t.Errorf("first %+v, then %+v", first, second)
	}
}

func TestARetriedPaymentIsReplayedUnderEveryFramework(t *testing.T) {
	each(t, func(t *testing.T, b *bench, address string) {
		twice(t, address+"/accounts/ada/payments", http.StatusCreated, `"Account":"ada"`)
		if n := b.charges.Load(); n != 1 {
			t.Errorf("%d charges", n)
		}
	})
}

func TestARetriedRefundIsReplayedUnderEveryFramework(t *testing.T) {
	each(t, func(t *testing.T, b *bench, address string) {
		twice(t, address+"/accounts/ada/refunds", http.StatusOK, `"r to ada"`)
		if n := b.refunds.Load(); n != 1 {
			t.Errorf("%d refunds", n)
		}
	})
}

func TestAnErrorInAFrameworksOwnWayIsAnAnswerLikeAnyOther(t *testing.T) {
	each(t, func(t *testing.T, b *bench, address string) {
		b.refund = func(string) (string, error) { return "", ErrDeclined }
		twice(t, address+"/accounts/ada/refunds", http.StatusPaymentRequired, ErrDeclined.Error())
		if n := b.refunds.Load(); n != 1 {
			t.Errorf("%d refunds", n)
		}
	})
}

func TestTheRouteIsPartOfTheRequestUnderEveryFramework(t *testing.T) {
	each(t, func(t *testing.T, b *bench, address string) {
		for _, path := range []string{"/payments", "/refunds"} {
			if first := ask(t, address+"/accounts/ada"+path, "order-"+path); first.status >= 300 {
				t.Errorf("%s: first: %+v", path, first)
			}
			if reuse := ask(t, address+"/accounts/bob"+path, "order-"+path); reuse.status != http.StatusUnprocessableEntity {
				t.Errorf("%s: the key of another route's request: %+v", path, reuse)
			}
		}
	})
}

func TestARequestWithoutAKeyIsRefusedUnderEveryFramework(t *testing.T) {
	each(t, func(t *testing.T, b *bench, address string) {
		for _, path := range []string{"/payments", "/refunds"} {
			got := ask(t, address+"/accounts/ada"+path, "")
			missing := got.format == "application/problem+json" && strings.Contains(got.body, keyhttp.KeyMissing)
			if got.status != http.StatusBadRequest || !missing {
				t.Errorf("%s: %+v", path, got)
			}
		}
		if n := b.charges.Load() + b.refunds.Load(); n != 0 {
			t.Errorf("it was done %d times", n)
		}
	})
}

// A framework's Recover stands before keyhttp and answers 500; gorilla/mux has none, and the client loses its connection.
func TestAPanicIsNoAnswerAndTheRetryRunsTheHandlerAgain(t *testing.T) {
	each(t, func(t *testing.T, b *bench, address string) {
		b.refund = func(string) (string, error) { panic("no paper") }
		first, err := tryToAsk(t, address+"/accounts/ada/refunds", "order-4711")
		if cut := strings.HasSuffix(t.Name(), "/mux"); cut != (err != nil) {
			t.Errorf("a panic: %+v, %v", first, err)
		} else if !cut && (first.status != http.StatusInternalServerError || first.replayed != "") {
			t.Errorf("a panic was answered with %+v", first)
		}
		b.mu.Lock()
		b.refund = nil
		b.mu.Unlock()
		if second := ask(t, address+"/accounts/ada/refunds", "order-4711"); second.status != http.StatusOK || second.replayed != "" {
			t.Errorf("after a panic: %+v", second)
		}
	})
}
