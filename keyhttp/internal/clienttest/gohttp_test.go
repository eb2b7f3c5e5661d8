package clienttest

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"example.com/keystate/keyhttp"
	"github.com/hashicorp/go-retryablehttp"
)

const (
	payments = "/v1/payment_intents"
	refunds  = "/v1/refunds"
)

// post makes a request for 20 euros, without a key.
func post(t *testing.T, address string) *http.Request {
	t.Helper()
	form := url.Values{"amount": {"2000"}, "currency": {"eur"}}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Authorization", "Bearer sk_test_ada")
	return r
}

// drain reads an answer to its end, so that its connection can be used again.
func drain(t *testing.T, r *http.Response) []byte {
	t.Helper()
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// keyed is a client that mints keys, with pauses too short to be noticed.
func keyed(t *testing.T, tr *keyhttp.Transport) *http.Client {
	tr.Base, tr.Initial, tr.Max = ownTransport(t), time.Millisecond, 10*time.Millisecond
	return &http.Client{Transport: tr}
}

// An answer that breaks off is no error of the round trip: the body's reader finds it. A transport hands it on.
func withoutMidway(series [][]fault) (out [][]fault) {
	for _, faults := range series {
		if !strings.Contains(fmt.Sprint(faults), lostMidway.String()) {
			out = append(out, faults)
		}
	}
	return out
}

func TestTransportChargesOnce(t *testing.T) {
	t.Parallel()
	for _, faults := range withoutMidway(calamities) {
		for _, bare := range []bool{false, true} {
			t.Run(fmt.Sprint(faults, " bare ", bare), func(t *testing.T) {
				t.Parallel()
				s := newShop(t, nil)
				s.breaks(faults...)
				r, err := keyed(t, &keyhttp.Transport{Bare: bare}).Do(post(t, s.URL+payments))
				if err != nil {
					t.Fatal(err)
				}
				drain(t, r)
				expect(t, r, http.StatusOK, replayed(faults))
				if quoted := strings.HasPrefix(s.lastKey(), `"`); quoted == bare {
					t.Errorf("the key came as %s", s.lastKey())
				}
				s.mustHaveCharged(t, 1)
			})
		}
	}
}

func TestTransportRunsAHandlerBehindTheMiddlewareOnce(t *testing.T) {
	t.Parallel()
	for _, faults := range withoutMidway(calamities) {
		t.Run(fmt.Sprint(faults), func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			s.breaks(faults...)
			r, err := keyed(t, &keyhttp.Transport{}).Do(post(t, s.URL+refunds))
			if err != nil {
				t.Fatal(err)
			}
			drain(t, r)
			expect(t, r, http.StatusOK, replayed(faults))
			s.mustHaveRefunded(t, 1)
		})
	}
}

func TestTwoRequestsThroughOneTransportAreTwoPayments(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	client := keyed(t, &keyhttp.Transport{})
	for range 2 {
		r, err := client.Do(post(t, s.URL+payments))
		if err != nil {
			t.Fatal(err)
		}
		drain(t, r)
		expect(t, r, http.StatusOK, "")
	}
	s.mustHaveCharged(t, 2)
}

func TestTransportWaitsForAKeyInFlight(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	answered := make(chan struct{})
	refusals, release := s.hold(answered)
	client := keyed(t, &keyhttp.Transport{})
	pay := func() (*http.Response, error) {
		r := post(t, s.URL+payments)
		r.Header.Set("Idempotency-Key", `"order-4711"`)
		return client.Do(r)
	}
	var firstErr error
	go func() {
		defer close(answered)
		r, err := pay()
		if err == nil {
			r.Body.Close()
		}
		firstErr = err
	}()
	<-s.charging
	second, err := pay()
	release()
	<-answered
	if err := errors.Join(firstErr, err); err != nil {
		t.Fatal(err)
	}
	drain(t, second)
	expect(t, second, http.StatusOK, "true")
	if n := refusals.Load(); n != 1 {
		t.Errorf("%d refusals", n)
	}
	s.mustHaveCharged(t, 1)
}

// net/http sends a request again by itself when the connection that it took from its pool turns out to be lost, and the
// request bears an Idempotency-Key: after the work was done as well as before.
func TestWhatNetHTTPSendsAgainByItselfIsDoneOnce(t *testing.T) {
	t.Parallel()
	for path, check := range map[string]func(*shop, *testing.T, int){
		payments: (*shop).mustHaveCharged, refunds: (*shop).mustHaveRefunded,
	} {
		for _, f := range []fault{lostBefore, lostAfter} {
			t.Run(fmt.Sprint(path, " ", f), func(t *testing.T) {
				t.Parallel()
				s := newShop(t, nil)
				client := &http.Client{Transport: ownTransport(t)}
				pay := func(key string) *http.Response {
					r := post(t, s.URL+path)
					r.Header.Set("Idempotency-Key", key)
					answer, err := client.Do(r)
					if err != nil {
						t.Fatal(err)
					}
					drain(t, answer)
					return answer
				}
				s.breaks(sound, f)
				expect(t, pay("warms-up-the-pool"), http.StatusOK, "")
				expect(t, pay("order-4711"), http.StatusOK, replayed([]fault{f}))
				if got := s.seen(); got != 3 {
					t.Errorf("%d requests: net/http did not send it again", got)
				}
				check(s, t, 2)
			})
		}
	}
}

func TestRetryableHTTPWithAKeySetByHandChargesOnce(t *testing.T) {
	t.Parallel()
	for _, faults := range withoutMidway(calamities) {
		t.Run(fmt.Sprint(faults), func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			s.breaks(faults...)
			r, err := retryable(t, s, "order-4711")
			if err != nil {
				t.Fatal(err)
			}
			drain(t, r)
			expect(t, r, http.StatusOK, replayed(faults))
			s.mustHaveCharged(t, 1)
		})
	}
}

func TestRetryableHTTPHandsOnTheRefusalOfAKeyInFlight(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	anyTime := make(chan struct{})
	close(anyTime)
	refusals, release := s.hold(anyTime)
	refused := make(chan struct{})
	go func() {
		defer close(refused)
		<-s.charging
		defer release()
		r, err := retryable(t, s, "order-4711")
		if err != nil {
			t.Error(err)
			return
		}
		defer r.Body.Close()
		expect(t, r, http.StatusConflict, "")
	}()
	r, err := retryable(t, s, "order-4711")
	<-refused
	if err != nil {
		t.Fatal(err)
	}
	drain(t, r)
	expect(t, r, http.StatusOK, "")
	if n := refusals.Load(); n != 1 {
		t.Errorf("%d refusals", n)
	}
	s.mustHaveCharged(t, 1)
}

func retryable(t *testing.T, s *shop, key string) (*http.Response, error) {
	client := retryablehttp.NewClient()
	client.HTTPClient.Transport = ownTransport(t)
	client.Logger, client.RetryMax = nil, 3
	client.RetryWaitMin, client.RetryWaitMax = time.Millisecond, 10*time.Millisecond
	r, err := retryablehttp.FromRequest(post(t, s.URL+payments))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Idempotency-Key", key)
	return client.Do(r)
}
