package clienttest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"example.com/keystate/keyhttp"
	"github.com/stripe/stripe-go/v85"
)

// stripeClient is Stripe's library, talking to the shop as it talks to Stripe.
func stripeClient(t *testing.T, s *shop) *stripe.Client {
	t.Helper()
	return stripeClientOf(t, s.URL)
}

// stripeClientOf makes three retries, with no pauses between them.
func stripeClientOf(t *testing.T, address string) *stripe.Client {
	t.Helper()
	backend := stripe.GetBackendWithConfig(stripe.APIBackend, &stripe.BackendConfig{
		URL:               stripe.String(address),
		HTTPClient:        &http.Client{Transport: ownTransport(t)},
		MaxNetworkRetries: stripe.Int64(3),
		LeveledLogger:     &stripe.LeveledLogger{Level: stripe.LevelNull},
	})
	backend.(*stripe.BackendImplementation).SetNetworkRetriesSleep(false)
	return stripe.NewClient("sk_test_ada", stripe.WithBackends(&stripe.Backends{API: backend}))
}

func euros(amount int64) *stripe.PaymentIntentCreateParams {
	return &stripe.PaymentIntentCreateParams{Amount: stripe.Int64(amount), Currency: stripe.String("eur")}
}

// calamities are series of faults that three retries get over, and whether the work was done before the last of them.
var calamities = [][]fault{
	{},
	{lostBefore},
	{lostAfter},
	{lostMidway},
	{busyBefore},
	{busyAfter},
	{lostBefore, lostAfter},
	{lostAfter, lostBefore},
	{busyBefore, lostBefore, lostMidway},
	{busyAfter, lostMidway, lostAfter},
}

// replayed is what the answer after the faults must say.
func replayed(faults []fault) string {
	for _, f := range faults {
		if f.worked() {
			return "true"
		}
	}
	return ""
}

func TestStripesOwnRetriesChargeOnce(t *testing.T) {
	t.Parallel()
	for _, faults := range calamities {
		t.Run(fmt.Sprint(faults), func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			s.breaks(faults...)
			p, err := stripeClient(t, s).V1PaymentIntents.Create(t.Context(), euros(20_00))
			if err != nil {
				t.Fatal(err)
			}
			if p.Amount != 20_00 || p.Currency != "eur" || p.Status != stripe.PaymentIntentStatusSucceeded || !strings.HasPrefix(p.ID, "pi_") {
				t.Errorf("answered %s", p.LastResponse.RawJSON)
			}
			if got, want := p.LastResponse.Header.Get("Idempotent-Replayed"), replayed(faults); got != want {
				t.Errorf("Idempotent-Replayed: %q, want %q", got, want)
			}
			if got, want := s.seen(), 1+len(faults); got != want {
				t.Errorf("%d requests, want %d", got, want)
			}
			s.mustHaveCharged(t, 1)
		})
	}
}

func TestStripesOwnRetriesRefundOnceBehindTheMiddleware(t *testing.T) {
	t.Parallel()
	for _, faults := range calamities {
		t.Run(fmt.Sprint(faults), func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			s.breaks(faults...)
			r, err := stripeClient(t, s).V1Refunds.Create(t.Context(), &stripe.RefundCreateParams{PaymentIntent: stripe.String("pi_1")})
			if err != nil {
				t.Fatal(err)
			}
			if r.ID != "re_1" || r.PaymentIntent.ID != "pi_1" {
				t.Errorf("answered %s", r.LastResponse.RawJSON)
			}
			if got, want := r.LastResponse.Header.Get("Idempotent-Replayed"), replayed(faults); got != want {
				t.Errorf("Idempotent-Replayed: %q, want %q", got, want)
			}
			s.mustHaveRefunded(t, 1)
		})
	}
}

func TestStripesMintedKeyIsTakenBareAndEchoed(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	p, err := stripeClient(t, s).V1PaymentIntents.Create(t.Context(), euros(20_00))
	if err != nil {
		t.Fatal(err)
	}
	sent := s.lastKey()
	if sent == "" || strings.Contains(sent, `"`) {
		t.Fatalf("the library sent the key %q, and this test is about bare ones", sent)
	}
	if got := p.LastResponse.IdempotencyKey; got != sent {
		t.Errorf("the key %q was echoed as %q", sent, got)
	}
}

func TestStripesOwnKeyIsAnsweredFromThenOnByReplay(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	client := stripeClient(t, s)
	pay := func() *stripe.PaymentIntent {
		params := euros(20_00)
		params.SetIdempotencyKey("order-4711")
		p, err := client.V1PaymentIntents.Create(t.Context(), params)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	first, second := pay(), pay()
	if first.ID != second.ID || first.LatestCharge.ID != second.LatestCharge.ID {
		t.Errorf("first %s, then %s", first.LastResponse.RawJSON, second.LastResponse.RawJSON)
	}
	if got := second.LastResponse.Header.Get("Idempotent-Replayed"); got != "true" {
		t.Errorf("Idempotent-Replayed: %q", got)
	}
	s.mustHaveCharged(t, 1)
}

func TestStripeShowsReuseOfAKeyAsAnError(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	client := stripeClient(t, s)
	pay := func(amount int64) (*stripe.PaymentIntent, error) {
		params := euros(amount)
		params.SetIdempotencyKey("order-4711")
		return client.V1PaymentIntents.Create(t.Context(), params)
	}
	if _, err := pay(20_00); err != nil {
		t.Fatal(err)
	}
	_, err := pay(30_00)
	if err == nil || !strings.Contains(err.Error(), "key-reused") || !strings.Contains(err.Error(), "422") {
		t.Errorf("another amount under the same key: %v", err)
	}
	s.mustHaveCharged(t, 1)
}

// What Stripe's library sends again is decided by the form of an error's body, before it looks at any header: an error in Stripe's
// own form is final, save 429 with the code lock_timeout; any other body, a problem too, is retried whatever its status says.
func TestStripesLibraryRetriesErrorsByTheFormOfTheirBody(t *testing.T) {
	t.Parallel()
	const (
		problem = `{"type":"https://example.com/keystate/problems/key-reused","title":"reused","status":422}`
		own     = `{"error":{"type":"idempotency_error","message":"reused"}}`
		locked  = `{"error":{"type":"invalid_request_error","code":"lock_timeout","message":"in flight"}}`
	)
	for _, c := range []struct {
		status      int
		body        string
		shouldRetry string
		requests    int64
	}{
		{422, problem, "", 4},
		{422, problem, "false", 4},
		{409, problem, "", 4},
		{503, problem, "", 4},
		{422, own, "", 1},
		{422, own, "true", 1},
		{409, own, "", 1},
		{409, own, "true", 1},
		{503, own, "true", 1},
		{429, locked, "", 4},
		{429, locked, "false", 4},
	} {
		t.Run(fmt.Sprint(c.status, c.body, c.shouldRetry), func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				if c.shouldRetry != "" {
					w.Header().Set("Stripe-Should-Retry", c.shouldRetry)
				}
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			}))
			defer server.Close()
			if _, err := stripeClientOf(t, server.URL).V1PaymentIntents.Create(t.Context(), euros(20_00)); err == nil {
				t.Error("no error")
			}
			if got := requests.Load(); got != c.requests {
				t.Errorf("%d requests, want %d", got, c.requests)
			}
		})
	}
}

// stripeDialect puts problems into the form in which Stripe's library takes them for final, except those that ask for a retry.
func stripeDialect(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		var p keyhttp.Problem
		body := rec.Body.Bytes()
		if rec.Header().Get("Should-Retry") == "false" && json.Unmarshal(body, &p) == nil {
			kind := stripe.ErrorTypeInvalidRequest
			if strings.HasSuffix(p.Type, keyhttp.KeyReused) {
				kind = stripe.ErrorTypeIdempotency
			}
			body, _ = json.Marshal(map[string]any{"error": map[string]any{"type": kind, "message": p.Detail, "doc_url": p.Type}})
			rec.Header().Set("Content-Type", "application/json")
			rec.Header().Del("Content-Length")
		}
		maps.Copy(w.Header(), rec.Header())
		w.WriteHeader(rec.Code)
		w.Write(body)
	})
}

func TestStripeShowsReuseOfAKeyInItsOwnFormAsAnIdempotencyErrorAtOnce(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.dialect = stripeDialect
	client := stripeClient(t, s)
	pay := func(amount int64) (*stripe.PaymentIntent, error) {
		params := euros(amount)
		params.SetIdempotencyKey("order-4711")
		return client.V1PaymentIntents.Create(t.Context(), params)
	}
	if _, err := pay(20_00); err != nil {
		t.Fatal(err)
	}
	_, err := pay(30_00)
	var shown *stripe.Error
	var reuse *stripe.IdempotencyError
	if !errors.As(err, &shown) || shown.HTTPStatusCode != http.StatusUnprocessableEntity || !errors.As(err, &reuse) {
		t.Errorf("another amount under the same key: %v", err)
	}
	if got := s.seen(); got != 2 {
		t.Errorf("%d requests for two payments", got)
	}
	s.mustHaveCharged(t, 1)
}

func TestStripeRetriesAKeyInFlightUntilItIsAnswered(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	answered := make(chan struct{})
	refusals, release := s.hold(answered)
	pay := func() (*stripe.PaymentIntent, error) {
		params := euros(20_00)
		params.SetIdempotencyKey("order-4711")
		return stripeClient(t, s).V1PaymentIntents.Create(t.Context(), params)
	}
	var first *stripe.PaymentIntent
	var firstErr error
	go func() {
		defer close(answered)
		first, firstErr = pay()
	}()
	<-s.charging
	second, err := pay()
	release()
	<-answered
	if err := errors.Join(firstErr, err); err != nil {
		t.Fatal(err)
	}
	if first.ID != second.ID || second.LastResponse.Header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("first %s, then %s with %v", first.LastResponse.RawJSON, second.LastResponse.RawJSON, second.LastResponse.Header)
	}
	if n := refusals.Load(); n != 1 {
		t.Errorf("%d refusals", n)
	}
	s.mustHaveCharged(t, 1)
}
