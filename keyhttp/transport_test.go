package keyhttp_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"example.com/keystate"
	"example.com/keystate/keyhttp"
	"github.com/google/uuid"
)

var errLost = errors.New("connection lost")

// A wire is a Base that answers from a script, the last line again and again, and remembers what it was sent and when.
type wire struct {
	script []func(*http.Request) (*http.Response, error)

	mu     sync.Mutex
	sent   []*http.Request
	bodies []string
	times  []time.Time
}

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		body, _ = io.ReadAll(r.Body)
		r.Body.Close()
	}
	w.mu.Lock()
	n := len(w.sent)
	w.sent, w.bodies, w.times = append(w.sent, r), append(w.bodies, string(body)), append(w.times, time.Now())
	w.mu.Unlock()
	return w.script[min(n, len(w.script)-1)](r)
}

func (w *wire) keys() []string {
	var keys []string
	for _, r := range w.sent {
		keys = append(keys, strings.Join(r.Header.Values("Idempotency-Key"), ","))
	}
	return keys
}

// pauses are the times between the attempts.
func (w *wire) pauses() []time.Duration {
	var pauses []time.Duration
	for i := 1; i < len(w.times); i++ {
		pauses = append(pauses, w.times[i].Sub(w.times[i-1]))
	}
	return pauses
}

// answer is a response of one status; headers are "Name: value".
func answer(status int, headers ...string) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		h := make(http.Header)
		for _, line := range headers {
			name, value, _ := strings.Cut(line, ": ")
			h.Add(name, value)
		}
		return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(strings.NewReader("answer")), Request: r}, nil
	}
}

func lost(*http.Request) (*http.Response, error) { return nil, errLost }

func wired(script ...func(*http.Request) (*http.Response, error)) *wire { return &wire{script: script} }

// A watchedBody counts how often it is closed, and has neither GetBody nor a length that http.NewRequest would know.
type watchedBody struct {
	io.Reader
	closed atomic.Int32
}

func (b *watchedBody) Close() error {
	b.closed.Add(1)
	return nil
}

func postTo(t testing.TB, target string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, target, body)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func status(resp *http.Response) int {
	if resp == nil {
		return 0
	}
	return resp.StatusCode
}

func TestEveryUnsafeRequestCarriesAUUIDv7OfItsOwn(t *testing.T) {
	for _, c := range []struct {
		bare    bool
		pattern string
	}{{false, `^"(.*)"$`}, {true, `^(.*)$`}} {
		w := wired(answer(200))
		tr := &keyhttp.Transport{Base: w, Bare: c.bare}
		for _, method := range []string{"POST", "PATCH"} {
			r := postTo(t, "http://bank.test/", nil)
			r.Method = method
			if _, err := tr.RoundTrip(r); err != nil {
				t.Fatal(err)
			}
		}
		keys := w.keys()
		if len(keys) != 2 || keys[0] == keys[1] {
			t.Fatalf("keys of two requests: %q", keys)
		}
		for _, key := range keys {
			inner := regexp.MustCompile(c.pattern).FindStringSubmatch(key)
			if inner == nil {
				t.Fatalf("key %s does not match %s", key, c.pattern)
			}
			if id, err := uuid.Parse(inner[1]); err != nil || id.Version() != 7 || len(inner[1]) != 36 {
				t.Errorf("key %s is no UUIDv7: %v", key, err)
			}
		}
	}
}

func TestOtherMethodsGoToBaseUntouchedAndOnce(t *testing.T) {
	for _, method := range []string{"", "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "post"} {
		w := wired(answer(503, "Retry-After: 1", "Should-Retry: true"))
		r := postTo(t, "http://bank.test/", strings.NewReader("x"))
		r.Method = method
		resp, err := (&keyhttp.Transport{Base: w}).RoundTrip(r)
		if err != nil || resp.StatusCode != 503 {
			t.Fatalf("%q: %v, %v", method, resp, err)
		}
		if len(w.sent) != 1 || w.sent[0] != r || len(r.Header) != 0 {
			t.Errorf("%q: sent %d times, header %v, the caller's request: %v", method, len(w.sent), r.Header, w.sent[0] == r)
		}
	}
}

func TestMethodsDecidesWhichRequestsAreKeyed(t *testing.T) {
	w := wired(answer(200))
	tr := &keyhttp.Transport{Base: w, Methods: []string{"DELETE", "GET"}}
	for _, method := range []string{"DELETE", "", "POST"} {
		r := postTo(t, "http://bank.test/", nil)
		r.Method = method
		if _, err := tr.RoundTrip(r); err != nil {
			t.Fatal(err)
		}
	}
	if keys := w.keys(); keys[0] == "" || keys[1] == "" || keys[2] != "" {
		t.Errorf("keys of DELETE, GET and POST: %q", keys)
	}
}

func TestAllAttemptsCarryOneKeyAndOneBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(lost, answer(503), answer(409, "Retry-After: 1"), answer(201))
		resp, err := (&keyhttp.Transport{Base: w}).RoundTrip(postTo(t, "http://bank.test/", strings.NewReader("pay 10")))
		if err != nil || resp.StatusCode != 201 {
			t.Fatal(resp, err)
		}
		keys := w.keys()
		if len(keys) != 4 || keys[0] == "" || len(slices.Compact(keys)) != 1 {
			t.Errorf("keys: %q", w.keys())
		}
		if want := slices.Repeat([]string{"pay 10"}, 4); !slices.Equal(w.bodies, want) {
			t.Errorf("bodies: %q", w.bodies)
		}
	})
}

func TestTheCallersOwnKeyIsKeptAndRetriedLikewise(t *testing.T) {
	for _, name := range []string{"Idempotency-Key", "idempotency-key", "IDEMPOTENCY-KEY"} {
		synctest.Test(t, func(t *testing.T) {
			w := wired(lost, answer(503), answer(200))
			r := postTo(t, "http://bank.test/", strings.NewReader("x"))
			r.Header[name] = []string{"order-17"}
			if _, err := (&keyhttp.Transport{Base: w}).RoundTrip(r); err != nil {
				t.Fatal(err)
			}
			if len(w.sent) != 3 {
				t.Errorf("%s: %d attempts", name, len(w.sent))
			}
			for _, sent := range w.sent {
				if !maps.EqualFunc(sent.Header, http.Header{name: {"order-17"}}, slices.Equal) {
					t.Errorf("%s: sent %v", name, sent.Header)
				}
			}
		})
	}
}

func TestAZeroLengthKeyMeansIdempotentWithoutAKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(lost, answer(200))
		r := postTo(t, "http://bank.test/", nil)
		r.Header["Idempotency-Key"] = nil
		if _, err := (&keyhttp.Transport{Base: w}).RoundTrip(r); err != nil {
			t.Fatal(err)
		}
		if keys := w.keys(); !slices.Equal(keys, []string{"", ""}) {
			t.Errorf("keys: %q", keys)
		}
	})
}

func TestTheCallersRequestIsNeverModified(t *testing.T) {
	for name, header := range map[string]http.Header{
		"no header map": nil, "headers": {"Authorization": {"Bearer x"}}, "its own key": {"Idempotency-Key": {"k"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			meddle := func(r *http.Request) (*http.Response, error) {
				r.Header.Set("Authorization", "other")
				r.URL.Path = "/other"
				return lost(r)
			}
			w := wired(meddle, meddle, answer(200))
			r := postTo(t, "http://bank.test/pay", &watchedBody{Reader: strings.NewReader("x")})
			r.Header = header.Clone()
			before := *r
			if _, err := (&keyhttp.Transport{Base: w}).RoundTrip(r); err != nil {
				t.Fatal(err)
			}
			if !maps.EqualFunc(r.Header, header, slices.Equal) || (r.Header == nil) != (header == nil) {
				t.Errorf("%s: header is now %v", name, r.Header)
			}
			if r.URL.Path != "/pay" || r.Body != before.Body || r.GetBody != nil || r.ContentLength != before.ContentLength {
				t.Errorf("%s: request is now %+v", name, r)
			}
			if last := w.sent[2]; last.URL.Path != "/pay" || last.Header.Get("Authorization") != header.Get("Authorization") {
				t.Errorf("%s: the last attempt has what Base did to an earlier one: %+v", name, last)
			}
		})
	}
}

func TestTheTransportIsNeverModified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(lost, answer(200))
		tr := &keyhttp.Transport{Base: w}
		if _, err := tr.RoundTrip(postTo(t, "http://bank.test/", strings.NewReader("x"))); err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprintf("%#v", *tr), fmt.Sprintf("%#v", keyhttp.Transport{Base: w}); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	})
}

func TestWhichAnswersAreSentAgainFor(t *testing.T) {
	cases := []struct {
		name    string
		status  int
		headers []string
		again   bool
	}{
		{"created", 201, nil, false},
		{"redirect", 307, nil, false},
		{"bad request", 400, nil, false},
		{"unauthorized with a Retry-After", 401, []string{"Retry-After: 1"}, false},
		{"request timeout", 408, nil, false},
		{"the application's conflict", 409, nil, false},
		{"key in flight", 409, []string{"Retry-After: 1"}, true},
		{"key in flight, again at once", 409, []string{"Retry-After: 0"}, true},
		{"conflict with a Retry-After that says nothing", 409, []string{"Retry-After: soon"}, false},
		{"conflict with a hint", 409, []string{"Should-Retry: true"}, true},
		{"key in flight with a hint against", 409, []string{"Retry-After: 1", "Should-Retry: false"}, false},
		{"key reused", 422, nil, false},
		{"too early", 425, nil, true},
		{"too many requests", 429, nil, true},
		{"internal error", 500, nil, true},
		{"not implemented", 501, nil, false},
		{"bad gateway", 502, nil, true},
		{"unavailable", 503, nil, true},
		{"gateway timeout", 504, nil, true},
		{"version not supported", 505, nil, false},
		{"parked", 500, []string{"Should-Retry: false"}, false},
		{"Stripe knows better: no", 500, []string{"Stripe-Should-Retry: false"}, false},
		{"Stripe knows better: yes", 400, []string{"Stripe-Should-Retry: true"}, true},
		{"spelled otherwise", 503, []string{"Should-Retry: False"}, false},
		{"both hints", 400, []string{"Stripe-Should-Retry: false", "Should-Retry: true"}, true},
		{"a hint that says nothing, and one that does", 503, []string{"Should-Retry: maybe", "Stripe-Should-Retry: false"}, false},
		{"a hint that says nothing", 503, []string{"Should-Retry: maybe"}, true},
		{"a saved failure", 500, []string{"Idempotent-Replayed: true"}, false},
		{"a saved failure with a hint", 503, []string{"Idempotent-Replayed: true", "Should-Retry: true", "Retry-After: 1"}, false},
		{"a failure that is not saved", 500, []string{"Idempotent-Replayed: false"}, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := wired(answer(c.status, c.headers...))
				resp, err := (&keyhttp.Transport{Base: w}).RoundTrip(postTo(t, "http://bank.test/", nil))
				if err != nil || resp.StatusCode != c.status {
					t.Fatalf("%d, %v", status(resp), err)
				}
				if want := map[bool]int{true: 5, false: 1}[c.again]; len(w.sent) != want {
					t.Errorf("sent %d times, not %d", len(w.sent), want)
				}
			})
		})
	}
}

func TestTheLastAnswerComesBackUntouchedWithItsBodyOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var made []*http.Response
		var bodies []*watchedBody
		w := wired(func(r *http.Request) (*http.Response, error) {
			resp, _ := answer(503, "X-Cause: storm")(r)
			bodies = append(bodies, &watchedBody{Reader: strings.NewReader("the store is closed")})
			resp.Body = bodies[len(bodies)-1]
			made = append(made, resp)
			return resp, nil
		})
		resp, err := (&keyhttp.Transport{Base: w, Attempts: 3}).RoundTrip(postTo(t, "http://bank.test/", nil))
		if err != nil || len(made) != 3 || resp != made[2] || resp.Body != bodies[2] {
			t.Fatalf("%v, %v after %d attempts", resp, err, len(made))
		}
		for i, b := range bodies[:2] {
			rest, _ := io.ReadAll(b)
			if b.closed.Load() != 1 || len(rest) > 0 {
				t.Errorf("attempt %d: closed %d times, %d bytes not drained", i+1, b.closed.Load(), len(rest))
			}
		}
		closed := bodies[2].closed.Load()
		if text, err := io.ReadAll(resp.Body); err != nil || string(text) != "the store is closed" || closed != 0 {
			t.Errorf("%q, %v, closed %d times", text, err, closed)
		}
		if key := resp.Request.Header.Get("Idempotency-Key"); key == "" || key != w.keys()[0] {
			t.Errorf("the response's request has key %q", key)
		}
	})
}

func TestAttemptsLimitsWhatIsSent(t *testing.T) {
	for attempts, want := range map[int]int{0: 5, 1: 1, 2: 2, 7: 7, -1: 1} {
		synctest.Test(t, func(t *testing.T) {
			w := wired(lost)
			_, err := (&keyhttp.Transport{Base: w, Attempts: attempts}).RoundTrip(postTo(t, "http://bank.test/", nil))
			var unanswered *keyhttp.UnansweredError
			if !errors.Is(err, errLost) || !errors.As(err, &unanswered) {
				t.Fatal(err)
			}
			if len(w.sent) != want || unanswered.Attempts != want {
				t.Errorf("Attempts %d: sent %d times, the error says %d", attempts, len(w.sent), unanswered.Attempts)
			}
		})
	}
}

func TestWithoutAnAnswerTheErrorHasTheKeyToAskAgainWith(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(lost)
		client := &http.Client{Transport: &keyhttp.Transport{Base: w}}
		_, err := client.Do(postTo(t, "http://bank.test/", nil))
		var unanswered *keyhttp.UnansweredError
		if !errors.As(err, &unanswered) || unanswered.Key != w.keys()[0] || !strings.Contains(err.Error(), unanswered.Key) {
			t.Fatalf("%v; sent %q", err, w.keys())
		}
		again := postTo(t, "http://bank.test/", nil)
		again.Header.Set("Idempotency-Key", unanswered.Key)
		client.Do(again)
		if keys := slices.Compact(w.keys()); len(keys) != 1 || len(w.sent) != 10 {
			t.Errorf("%d attempts with keys %q", len(w.sent), keys)
		}
	})
}

func TestPausesGrowAreJitteredAndCapped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := make(map[time.Duration]bool)
		for range 20 {
			w := wired(answer(503))
			tr := &keyhttp.Transport{Base: w, Attempts: 10}
			if _, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil)); err != nil {
				t.Fatal(err)
			}
			for i, pause := range w.pauses() {
				middle := min(200*time.Millisecond<<i, 10*time.Second)
				if pause < middle/2 || pause > min(middle*3/2+1, 10*time.Second) {
					t.Errorf("pause %d is %v, around %v was due", i+1, pause, middle)
				}
				seen[pause] = true
			}
		}
		if len(seen) < 50 {
			t.Errorf("180 pauses, only %d different ones", len(seen))
		}
	})
}

func TestRetryAfterIsWaitedFor(t *testing.T) {
	ahead := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	const none = -1
	cases := []struct {
		name  string
		value func() string
		date  func() string // the response's Date
		wait  time.Duration // none: the backoff's alone
	}{
		{"seconds", func() string { return "7" }, nil, 7 * time.Second},
		{"leading zeros", func() string { return "007" }, nil, 7 * time.Second},
		{"spaces around", func() string { return " 7\t" }, nil, 7 * time.Second},
		{"zero", func() string { return "0" }, nil, none},
		{"date", func() string { return ahead(9 * time.Second) }, nil, 9 * time.Second},
		{"date as RFC 850 wrote it", func() string {
			return time.Now().Add(9 * time.Second).UTC().Format("Monday, 02-Jan-06 15:04:05 GMT")
		}, nil, 9 * time.Second},
		{"date as asctime writes it", func() string {
			return time.Now().Add(9 * time.Second).UTC().Format(time.ANSIC)
		}, nil, 9 * time.Second},
		{"date in the past", func() string { return ahead(-time.Hour) }, nil, none},
		{"date by a server whose clock is ahead", func() string { return ahead(time.Hour + 5*time.Second) },
			func() string { return ahead(time.Hour) }, 5 * time.Second},
		{"date by a server whose clock is behind", func() string { return ahead(5*time.Second - time.Hour) },
			func() string { return ahead(-time.Hour) }, 5 * time.Second},
		{"date with a Date that is none", func() string { return ahead(5 * time.Second) },
			func() string { return "today" }, 5 * time.Second},
		{"negative", func() string { return "-7" }, nil, none},
		{"signed", func() string { return "+7" }, nil, none},
		{"fraction", func() string { return "7.5" }, nil, none},
		{"hexadecimal", func() string { return "0x7" }, nil, none},
		{"grouped", func() string { return "1_0" }, nil, none},
		{"words", func() string { return "in a while" }, nil, none},
		{"empty", func() string { return "" }, nil, none},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := wired(func(r *http.Request) (*http.Response, error) {
					resp, _ := answer(503, "Retry-After: "+c.value())(r)
					if c.date != nil {
						resp.Header.Set("Date", c.date())
					}
					return resp, nil
				}, answer(200))
				resp, err := (&keyhttp.Transport{Base: w, Initial: time.Millisecond}).RoundTrip(postTo(t, "http://bank.test/", nil))
				if err != nil || resp.StatusCode != 200 {
					t.Fatal(resp, err)
				}
				pause := w.pauses()[0]
				if c.wait != none && pause != c.wait || c.wait == none && (pause > 2*time.Millisecond || pause < time.Millisecond/2) {
					t.Errorf("Retry-After %q: waited %v", c.value(), pause)
				}
			})
		})
	}
}

func TestTheBackoffIsWaitedForEvenIfRetryAfterIsShorter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(answer(503, "Retry-After: 1"), answer(200))
		tr := &keyhttp.Transport{Base: w, Initial: 8 * time.Second}
		if _, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil)); err != nil {
			t.Fatal(err)
		}
		if pause := w.pauses()[0]; pause < 4*time.Second {
			t.Errorf("waited %v", pause)
		}
	})
}

func TestARetryAfterBeyondPatienceIsReturnedAtOnce(t *testing.T) {
	for _, c := range []struct {
		patience time.Duration
		value    string
		again    bool
	}{
		{0, "60", true},
		{0, "61", false},
		{time.Hour, "3600", true},
		{time.Hour, "3601", false},
		{-1, "1", false},
		{-1, "0", true},
		{-1, "later", true},
		{0, "9223372037", false}, // more seconds than a Duration has
		{0, "18446744073709551615", false},
		{0, "18446744073709551616", false}, // more than 64 bits
		{0, strings.Repeat("9", 100), false},
		{0, "Fri, 31 Dec 9999 23:59:59 GMT", false},
	} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			w := wired(answer(503, "Retry-After: "+c.value))
			tr := &keyhttp.Transport{Base: w, Attempts: 2, Patience: c.patience}
			resp, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil))
			if err != nil || resp.StatusCode != 503 {
				t.Fatal(resp, err)
			}
			if again := len(w.sent) == 2; again != c.again {
				t.Errorf("patience %v, Retry-After %s: sent %d times", c.patience, c.value, len(w.sent))
			}
			if !c.again && time.Since(start) > 0 {
				t.Errorf("patience %v, Retry-After %s: waited %v for nothing", c.patience, c.value, time.Since(start))
			}
		})
	}
}

func TestThePauseEndsAtOnceWithTheContext(t *testing.T) {
	for name, c := range map[string]struct {
		first func(*http.Request) (*http.Response, error)
		says  string
	}{
		"after an error":  {lost, errLost.Error()},
		"after an answer": {answer(503, "Retry-After: 30"), "503 Service Unavailable"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				start := time.Now()
				time.AfterFunc(time.Second, cancel)
				w := wired(c.first)
				tr := &keyhttp.Transport{Base: w, Initial: 20 * time.Second, Max: 20 * time.Second}
				resp, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil).WithContext(ctx))
				if resp != nil || !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%v, %v", resp, err)
				}
				var unanswered *keyhttp.UnansweredError
				if !errors.As(err, &unanswered) || unanswered.Key != w.keys()[0] {
					t.Errorf("the error has not the key: %v", err)
				}
				if took := time.Since(start); took != time.Second || len(w.sent) != 1 {
					t.Errorf("sent %d times, returned after %v", len(w.sent), took)
				}
			})
		})
	}
}

func TestAPauseThatOutlastsTheDeadlineIsNotWaitedFor(t *testing.T) {
	deadlined := func(t *testing.T, w *wire) (*http.Response, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		t.Cleanup(cancel)
		start := time.Now()
		tr := &keyhttp.Transport{Base: w, Initial: time.Second / 8}
		resp, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil).WithContext(ctx))
		if took := time.Since(start); took >= time.Second {
			t.Errorf("returned after %v", took)
		}
		return resp, err
	}
	t.Run("the last answer is returned", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := wired(answer(503), answer(503, "Retry-After: 30"))
			resp, err := deadlined(t, w)
			if err != nil || resp.Header.Get("Retry-After") != "30" || len(w.sent) != 2 {
				t.Fatalf("%v, %v, sent %d times", resp, err, len(w.sent))
			}
			if text, err := io.ReadAll(resp.Body); string(text) != "answer" || err != nil {
				t.Errorf("its body: %q, %v", text, err)
			}
		})
	})
	t.Run("the last error is returned", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := wired(answer(503), lost)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			tr := &keyhttp.Transport{Base: w, Initial: 3 * time.Second, Max: 6 * time.Second}
			_, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil).WithContext(ctx))
			if !errors.Is(err, errLost) || errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
				t.Errorf("%v", err)
			}
		})
	})
}

func TestAnErrorIsFinalOnceTheContextHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		w := wired(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, context.Cause(r.Context())
		})
		start := time.Now()
		_, err := (&http.Client{Transport: &keyhttp.Transport{Base: w}}).Do(postTo(t, "http://bank.test/", nil).WithContext(ctx))
		if !errors.Is(err, context.DeadlineExceeded) || len(w.sent) != 1 || time.Since(start) != time.Second {
			t.Errorf("%v, sent %d times, after %v", err, len(w.sent), time.Since(start))
		}
		if wrapped := new(url.Error); !errors.As(err, &wrapped) || !wrapped.Timeout() {
			t.Errorf("no timeout: %v", err)
		}
	})
}

func TestAnAnswerThatComesAsTheContextEndsIsReturned(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	body := &watchedBody{Reader: strings.NewReader("the store is closed")}
	w := wired(func(r *http.Request) (*http.Response, error) {
		cancel()
		resp, _ := answer(503)(r)
		resp.Body = body
		return resp, nil
	})
	tr := &keyhttp.Transport{Base: w, Retrying: func(*http.Request, *http.Response, error, time.Duration) {
		t.Error("a pause was announced")
	}}
	resp, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil).WithContext(ctx))
	if err != nil || resp.StatusCode != 503 || body.closed.Load() != 0 || len(w.sent) != 1 {
		t.Errorf("%v, %v, body closed %d times, sent %d times", resp, err, body.closed.Load(), len(w.sent))
	}
}

func TestAClientsTimeoutIsForAllAttemptsTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(lost)
		client := &http.Client{Transport: &keyhttp.Transport{Base: w, Attempts: 1000}, Timeout: time.Minute}
		start := time.Now()
		_, err := client.Do(postTo(t, "http://bank.test/", nil))
		if took := time.Since(start); !errors.Is(err, errLost) || took < 45*time.Second || took > time.Minute {
			t.Errorf("%v after %v", err, took)
		}
	})
}

func TestEveryKindOfBodyIsSentWholeAndClosedOnce(t *testing.T) {
	const text = "0123456789"
	cases := []struct {
		name     string
		maxBody  int64
		length   int64 // declared
		reader   io.Reader
		attempts int
	}{
		{"held", 0, 0, strings.NewReader(text), 3},
		{"held, its length declared", 0, 10, strings.NewReader(text), 3},
		{"held, read in small pieces", 0, 0, iotest.OneByteReader(strings.NewReader(text)), 3},
		{"exactly MaxBody", 10, 0, strings.NewReader(text), 3},
		{"exactly MaxBody, its end told with its last byte", 10, 0, iotest.DataErrReader(strings.NewReader(text)), 3},
		{"one more than MaxBody", 9, 0, strings.NewReader(text), 1},
		{"far more than MaxBody", 1, 0, strings.NewReader(text), 1},
		{"declared to be more than MaxBody", 9, 10, strings.NewReader(text), 1},
		{"no bodies held", -1, 0, strings.NewReader(text), 1},
		{"no limit", math.MaxInt64, 0, strings.NewReader(text), 3},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				body := &watchedBody{Reader: c.reader}
				r := postTo(t, "http://bank.test/", body)
				r.ContentLength = c.length
				w := wired(answer(503))
				resp, err := (&keyhttp.Transport{Base: w, MaxBody: c.maxBody, Attempts: 3}).RoundTrip(r)
				if err != nil || resp.StatusCode != 503 {
					t.Fatal(resp, err)
				}
				if want := slices.Repeat([]string{text}, c.attempts); !slices.Equal(w.bodies, want) {
					t.Errorf("sent %q", w.bodies)
				}
				if n := body.closed.Load(); n != 1 {
					t.Errorf("closed %d times", n)
				}
				for _, sent := range w.sent {
					if sent.ContentLength != c.length || (sent.GetBody != nil) != (c.attempts > 1) {
						t.Errorf("sent with length %d, GetBody: %v", sent.ContentLength, sent.GetBody != nil)
					}
				}
			})
		})
	}
}

func TestABodyOverMaxBodyIsStreamedWithAKeyAndNotRetriedAfterAnError(t *testing.T) {
	w := wired(lost)
	body := &watchedBody{Reader: strings.NewReader("0123456789")}
	_, err := (&keyhttp.Transport{Base: w, MaxBody: 4}).RoundTrip(postTo(t, "http://bank.test/", body))
	if !errors.Is(err, errLost) || len(w.sent) != 1 || w.keys()[0] == "" || body.closed.Load() != 1 {
		t.Errorf("%v, keys %q, closed %d times", err, w.keys(), body.closed.Load())
	}
}

func TestABodyDeclaredOverMaxBodyOrWithNoneHeldIsNotReadAhead(t *testing.T) {
	for _, c := range []struct{ maxBody, length int64 }{{4, 10}, {-1, 0}} {
		sending := false
		w := wired(answer(200))
		base := roundTripper(func(r *http.Request) (*http.Response, error) {
			sending = true
			return w.RoundTrip(r)
		})
		text := strings.NewReader("0123456789")
		r := postTo(t, "http://bank.test/", io.NopCloser(readerFunc(func(p []byte) (int, error) {
			if !sending {
				t.Errorf("MaxBody %d, length %d: read before it is sent", c.maxBody, c.length)
			}
			return text.Read(p)
		})))
		r.ContentLength = c.length
		if _, err := (&keyhttp.Transport{Base: base, MaxBody: c.maxBody}).RoundTrip(r); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(w.bodies, []string{"0123456789"}) {
			t.Errorf("sent %q", w.bodies)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestGetBodyIsUsedWhateverTheSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(lost, answer(503), answer(200))
		r := postTo(t, "http://bank.test/", strings.NewReader("0123456789"))
		var got atomic.Int32
		getBody, closed := r.GetBody, make([]*watchedBody, 0, 3)
		watch := func(b io.Reader) *watchedBody {
			closed = append(closed, &watchedBody{Reader: b})
			return closed[len(closed)-1]
		}
		r.Body = watch(r.Body)
		r.GetBody = func() (io.ReadCloser, error) {
			got.Add(1)
			b, err := getBody()
			return watch(b), err
		}
		resp, err := (&keyhttp.Transport{Base: w, MaxBody: 1}).RoundTrip(r)
		if err != nil || resp.StatusCode != 200 || !slices.Equal(w.bodies, slices.Repeat([]string{"0123456789"}, 3)) {
			t.Fatalf("%v, %v, sent %q", resp, err, w.bodies)
		}
		if got.Load() != 2 || len(closed) != 3 {
			t.Errorf("GetBody was called %d times", got.Load())
		}
		for i, b := range closed {
			if b.closed.Load() != 1 {
				t.Errorf("body %d closed %d times", i+1, b.closed.Load())
			}
		}
	})
}

func TestABodyThatCannotBeHadAgainEndsTheRetrying(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		errGone := errors.New("file is gone")
		w := wired(lost)
		r := postTo(t, "http://bank.test/", strings.NewReader("x"))
		r.GetBody = func() (io.ReadCloser, error) { return nil, errGone }
		_, err := (&keyhttp.Transport{Base: w}).RoundTrip(r)
		var unanswered *keyhttp.UnansweredError
		if !errors.Is(err, errGone) || !errors.Is(err, errLost) || !errors.As(err, &unanswered) || len(w.sent) != 1 {
			t.Errorf("%v, sent %d times", err, len(w.sent))
		}
	})
}

func TestNoBodyIsRetriedAsNone(t *testing.T) {
	for _, body := range []io.ReadCloser{nil, http.NoBody} {
		synctest.Test(t, func(t *testing.T) {
			w := wired(lost, answer(200))
			r := postTo(t, "http://bank.test/", nil)
			r.Body = body
			if _, err := (&keyhttp.Transport{Base: w}).RoundTrip(r); err != nil {
				t.Fatal(err)
			}
			for _, sent := range w.sent {
				if sent.Body != body {
					t.Errorf("body %v was sent as %v", body, sent.Body)
				}
			}
			if len(w.sent) != 2 {
				t.Errorf("sent %d times", len(w.sent))
			}
		})
	}
}

func TestABodyThatFailsIsClosedAndNothingIsSent(t *testing.T) {
	errDisk := errors.New("disk")
	w := wired(answer(200))
	body := &watchedBody{Reader: io.MultiReader(strings.NewReader("half"), iotest.ErrReader(errDisk))}
	_, err := (&keyhttp.Transport{Base: w}).RoundTrip(postTo(t, "http://bank.test/", body))
	if !errors.Is(err, errDisk) || len(w.sent) != 0 || body.closed.Load() != 1 {
		t.Errorf("%v, sent %d times, closed %d times", err, len(w.sent), body.closed.Load())
	}
}

func TestABodyThatGivesNothingMoreIsNotWaitedForBeyondTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		w := wired(answer(200))
		body, writer := io.Pipe()
		start := time.Now()
		_, err := (&keyhttp.Transport{Base: w}).RoundTrip(postTo(t, "http://bank.test/", body).WithContext(ctx))
		if !errors.Is(err, context.DeadlineExceeded) || len(w.sent) != 0 || time.Since(start) != time.Second {
			t.Errorf("%v, sent %d times, after %v", err, len(w.sent), time.Since(start))
		}
		if _, err := writer.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the body is not closed: %v", err)
		}
	})
}

func TestTrailersThatTheBodyFillsInAreSent(t *testing.T) {
	digests := make(chan string, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		digests <- r.Trailer.Get("Digest")
	}))
	defer server.Close()
	r := postTo(t, server.URL, nil)
	r.ContentLength, r.Trailer = -1, http.Header{"Digest": nil}
	r.Body = io.NopCloser(readerFunc(func([]byte) (int, error) {
		r.Trailer.Set("Digest", "sha-256=:x:")
		return 0, io.EOF
	}))
	resp, err := (&keyhttp.Transport{Base: server.Client().Transport, MaxBody: -1}).RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if digest := <-digests; digest != "sha-256=:x:" {
		t.Errorf("the trailer came as %q", digest)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestADroppedBodyIsReadUpToABound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var read int64
		body := &watchedBody{Reader: readerFunc(func(p []byte) (int, error) {
			read += int64(len(p))
			return len(p), nil
		})}
		w := wired(func(r *http.Request) (*http.Response, error) {
			resp, _ := answer(503)(r)
			resp.Body = body
			return resp, nil
		}, answer(200))
		resp, err := (&keyhttp.Transport{Base: w}).RoundTrip(postTo(t, "http://bank.test/", nil))
		if err != nil || resp.StatusCode != 200 || body.closed.Load() != 1 || read == 0 || read > 1<<20 {
			t.Errorf("%v, %v, read %d bytes, closed %d times", resp, err, read, body.closed.Load())
		}
	})
}

func TestADroppedBodyThatDoesNotEndDelaysNothing(t *testing.T) {
	for name, endure := range map[string]time.Duration{"the pause is over": time.Hour, "the context ends": time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer time.AfterFunc(endure, cancel).Stop()
				body, writer := io.Pipe() // of which nothing ever comes
				defer writer.Close()
				w := wired(func(r *http.Request) (*http.Response, error) {
					resp, _ := answer(503, "Retry-After: 10")(r)
					resp.Body = body
					return resp, nil
				}, answer(200))
				start := time.Now()
				resp, err := (&keyhttp.Transport{Base: w}).RoundTrip(postTo(t, "http://bank.test/", nil).WithContext(ctx))
				want := min(endure, 10*time.Second)
				if took := time.Since(start); took != want || (err == nil) != (endure == time.Hour) {
					t.Errorf("%v, %v after %v", resp, err, took)
				}
				cancel()
			})
		})
	}
}

func TestRetryingIsToldOfEachPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wired(lost, answer(503, "Retry-After: 3"), answer(200))
		var told []string
		tr := &keyhttp.Transport{Base: w, Initial: time.Millisecond,
			Retrying: func(sent *http.Request, resp *http.Response, err error, pause time.Duration) {
				text := ""
				if resp != nil {
					b, _ := io.ReadAll(resp.Body)
					text = string(b)
				}
				told = append(told, fmt.Sprintln(sent == w.sent[len(w.sent)-1], status(resp), text, err, pause.Round(time.Second)))
			}}
		if _, err := tr.RoundTrip(postTo(t, "http://bank.test/", nil)); err != nil {
			t.Fatal(err)
		}
		if want := []string{"true 0  connection lost 0s\n", "true 503 answer <nil> 3s\n"}; !slices.Equal(told, want) {
			t.Errorf("told %q", told)
		}
	})
}

func TestANilResponseOfAFaultyBaseIsHandedOn(t *testing.T) {
	w := wired(func(*http.Request) (*http.Response, error) { return nil, nil })
	if resp, err := (&keyhttp.Transport{Base: w}).RoundTrip(postTo(t, "http://bank.test/", nil)); resp != nil || err != nil {
		t.Errorf("%v, %v", resp, err)
	}
}

type idleCloser struct {
	wire
	closed int
}

func (c *idleCloser) CloseIdleConnections() { c.closed++ }

func TestIdleConnectionsAreClosedInBase(t *testing.T) {
	base := &idleCloser{}
	(&http.Client{Transport: &keyhttp.Transport{Base: base}}).CloseIdleConnections()
	if base.closed != 1 {
		t.Errorf("passed on %d times", base.closed)
	}
	(&http.Client{Transport: &keyhttp.Transport{Base: wired(lost)}}).CloseIdleConnections()
}

// A bank does the work of a key once, as often as it is asked. Its connections break: cut says what happens to the n-th
// request that arrives.
type bank struct {
	cut func(n int) cutting

	mu       sync.Mutex
	arrivals []string       // keys
	bodies   map[string]int // by body
	works    map[string]int // by key
}

type cutting int

const (
	intact cutting = iota
	beforeWork
	afterWork
)

func (b *bank) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	key := r.Header.Get("Idempotency-Key")
	b.mu.Lock()
	b.arrivals = append(b.arrivals, key)
	b.bodies[string(body)]++
	cut := b.cut(len(b.arrivals))
	replayed := b.works[key] > 0
	if cut != beforeWork && !replayed {
		b.works[key]++
	}
	b.mu.Unlock()
	if cut == intact {
		w.Header().Set("Idempotent-Replayed", fmt.Sprint(replayed))
		w.WriteHeader(http.StatusCreated)
		io.WriteString(w, "paid "+key)
		return
	}
	if r.ProtoMajor == 2 {
		panic(http.ErrAbortHandler) // resets the stream
	}
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	conn.Close()
}

func openBank(t *testing.T, protocol string, cut func(n int) cutting) (*bank, *httptest.Server) {
	b := &bank{cut: cut, bodies: make(map[string]int), works: make(map[string]int)}
	return b, serve(t, protocol, b.ServeHTTP)
}

var protocols = []string{"HTTP/1.1", "HTTP/2.0"}

func serve(t *testing.T, protocol string, handler http.HandlerFunc) *httptest.Server {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Proto != protocol {
			t.Errorf("served over %s, not %s", r.Proto, protocol)
		}
		handler(w, r)
	}))
	if protocol == "HTTP/2.0" {
		server.EnableHTTP2 = true
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	return server
}

func TestWorkIsDoneOnceAndAnsweredOverConnectionsThatBreak(t *testing.T) {
	bodies := map[string]func() io.Reader{
		"a body with GetBody": func() io.Reader { return strings.NewReader("pay 10") },
		"a body without":      func() io.Reader { return &watchedBody{Reader: strings.NewReader("pay 10")} },
	}
	cuts := map[string][]cutting{
		"before the work":           {beforeWork, beforeWork},
		"after the work":            {afterWork, afterWork},
		"before and after the work": {beforeWork, afterWork, afterWork},
	}
	for _, protocol := range protocols {
		for name, body := range bodies {
			for when, cuts := range cuts {
				t.Run(fmt.Sprintf("%s, %s, cut %s", protocol, name, when), func(t *testing.T) {
					b, server := openBank(t, protocol, func(n int) cutting {
						if n <= len(cuts) {
							return cuts[n-1]
						}
						return intact
					})
					client := &http.Client{Transport: &keyhttp.Transport{Base: server.Client().Transport, Initial: time.Millisecond}}
					resp, err := client.Do(postTo(t, server.URL, body()))
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					text, err := io.ReadAll(resp.Body)
					key := b.arrivals[0]
					if err != nil || resp.StatusCode != 201 || string(text) != "paid "+key {
						t.Errorf("%d %q, %v", resp.StatusCode, text, err)
					}
					if len(b.works) != 1 || b.works[key] != 1 {
						t.Errorf("works %v", b.works)
					}
					if len(b.arrivals) != len(cuts)+1 || b.bodies["pay 10"] != len(b.arrivals) {
						t.Errorf("arrivals %v, bodies %v", b.arrivals, b.bodies)
					}
				})
			}
		}
	}
}

func TestAReplayByNetHTTPOnADeadConnectionHasTheSameKey(t *testing.T) {
	// The first request leaves a connection behind. The second is sent on it and finds it cut.
	b, server := openBank(t, "HTTP/1.1", func(n int) cutting {
		if n == 2 {
			return afterWork
		}
		return intact
	})
	var retries atomic.Int32
	client := &http.Client{Transport: &keyhttp.Transport{Base: server.Client().Transport, Initial: time.Millisecond,
		Retrying: func(*http.Request, *http.Response, error, time.Duration) { retries.Add(1) }}}
	for range 2 {
		resp, err := client.Do(postTo(t, server.URL, &watchedBody{Reader: strings.NewReader("pay 10")}))
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	if len(b.arrivals) != 3 || b.arrivals[1] != b.arrivals[2] || b.works[b.arrivals[1]] != 1 || b.bodies["pay 10"] != 3 {
		t.Errorf("arrivals %v, works %v, bodies %v", b.arrivals, b.works, b.bodies)
	}
	if retries.Load() != 0 {
		t.Errorf("net/http did not replay by itself: %d retries here", retries.Load())
	}
}

func TestManyClientsAtOnceOverConnectionsThatBreakAreEachServedOnce(t *testing.T) {
	b, server := openBank(t, "HTTP/1.1", func(n int) cutting {
		return []cutting{intact, beforeWork, afterWork}[n%3]
	})
	const short = time.Millisecond
	tr := &keyhttp.Transport{Base: server.Client().Transport, Attempts: 50, Initial: short, Max: 5 * short}
	client := &http.Client{Transport: tr}
	const clients, requests = 8, 25
	var answers sync.Map
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := range requests {
				var body io.Reader = strings.NewReader("pay 10")
				if i%2 == 0 {
					body = &watchedBody{Reader: body}
				}
				resp, err := client.Do(postTo(t, server.URL, body))
				if err != nil {
					t.Errorf("client %d: %v", c, err)
					return
				}
				text, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if _, twice := answers.LoadOrStore(string(text), true); twice || err != nil {
					t.Errorf("client %d: answer %q, %v, had before: %v", c, text, err, twice)
				}
			}
		})
	}
	wg.Wait()
	if len(b.works) != clients*requests || len(b.bodies) != 1 {
		t.Errorf("%d works for %d requests, bodies %v", len(b.works), clients*requests, b.bodies)
	}
	for key, n := range b.works {
		if n != 1 {
			t.Errorf("key %s: done %d times", key, n)
		}
	}
}

func TestARetryUsesTheConnectionOfTheDroppedAnswer(t *testing.T) {
	var mu sync.Mutex
	var from []string // one entry for each attempt: the client's end of the connection
	server := serve(t, "HTTP/1.1", func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		mu.Lock()
		defer mu.Unlock()
		from = append(from, r.RemoteAddr)
		if len(from) < 4 {
			w.WriteHeader(http.StatusServiceUnavailable)
			w.Write(bytes.Repeat([]byte("x"), 20<<10))
			return
		}
		w.WriteHeader(http.StatusCreated)
	})
	tr := &keyhttp.Transport{Base: server.Client().Transport, Initial: time.Millisecond}
	resp, err := tr.RoundTrip(postTo(t, server.URL, strings.NewReader("x")))
	if err != nil || resp.StatusCode != 201 {
		t.Fatal(resp, err)
	}
	resp.Body.Close()
	if len(from) != 4 || len(slices.Compact(from)) != 1 {
		t.Errorf("connections of the attempts: %v", from)
	}
}

func TestAServerThatNeverEndsItsRefusalIsAskedAgain(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			var arrivals atomic.Int32
			server := serve(t, protocol, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if arrivals.Add(1) > 1 {
					return
				}
				w.WriteHeader(http.StatusServiceUnavailable)
				w.(http.Flusher).Flush()
				<-r.Context().Done() // until the client lets go
			})
			tr := &keyhttp.Transport{Base: server.Client().Transport, Initial: time.Millisecond}
			resp, err := tr.RoundTrip(postTo(t, server.URL, strings.NewReader("x")))
			if err != nil || resp.StatusCode != 200 || arrivals.Load() != 2 {
				t.Fatal(resp, err, arrivals.Load())
			}
			resp.Body.Close()
		})
	}
}

func TestAnAnswerBeforeTheWholeBodyIsReadIsRetriedWithTheWholeBody(t *testing.T) {
	large := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // 4 MiB
	bodies := map[string]func() io.Reader{
		"a body with GetBody": func() io.Reader { return bytes.NewReader(large) },
		"a body without":      func() io.Reader { return &watchedBody{Reader: bytes.NewReader(large)} },
	}
	for _, protocol := range protocols {
		for name, body := range bodies {
			t.Run(protocol+", "+name, func(t *testing.T) {
				var arrivals atomic.Int32
				got := make(chan []byte, 1)
				server := serve(t, protocol, func(w http.ResponseWriter, r *http.Request) {
					if arrivals.Add(1) <= 2 {
						w.WriteHeader(http.StatusServiceUnavailable)
						return
					}
					body, _ := io.ReadAll(r.Body)
					got <- body
				})
				tr := &keyhttp.Transport{Base: server.Client().Transport, Initial: time.Millisecond, MaxBody: 8 << 20}
				resp, err := tr.RoundTrip(postTo(t, server.URL, body()))
				if err != nil || resp.StatusCode != 200 {
					t.Fatal(resp, err)
				}
				resp.Body.Close()
				if body := <-got; !bytes.Equal(body, large) {
					t.Errorf("the last attempt had %d bytes of %d", len(body), len(large))
				}
			})
		}
	}
}

func TestABodyThatBreaksOffIsAskedForAgainWithTheResponsesKey(t *testing.T) {
	var arrivals atomic.Int32
	server := serve(t, "HTTP/1.1", func(w http.ResponseWriter, r *http.Request) {
		if arrivals.Add(1) == 1 {
			w.Header().Set("Content-Length", "1000")
		}
		io.WriteString(w, "paid "+r.Header.Get("Idempotency-Key"))
	})
	client := &http.Client{Transport: &keyhttp.Transport{Base: server.Client().Transport}}
	resp, err := client.Do(postTo(t, server.URL, strings.NewReader("pay 10")))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("the body does not break off: %v", err)
	}
	key := resp.Request.Header.Get("Idempotency-Key")
	again := postTo(t, server.URL, strings.NewReader("pay 10"))
	again.Header.Set("Idempotency-Key", key)
	if resp, err = client.Do(again); err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err != nil || key == "" || string(text) != "paid "+key {
		t.Errorf("%q, %v, key %s", text, err, key)
	}
}

func TestARedirectKeepsTheKeyIfItKeepsTheMethod(t *testing.T) {
	type arrival struct{ method, path, key, body string }
	for _, code := range []int{301, 302, 303, 307, 308} {
		for _, own := range []string{"", "order-17"} {
			t.Run(fmt.Sprint(code, cmp.Or(own, "minted")), func(t *testing.T) {
				var mu sync.Mutex
				var seen []arrival
				server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					mu.Lock()
					defer mu.Unlock()
					seen = append(seen, arrival{r.Method, r.URL.Path, r.Header.Get("Idempotency-Key"), string(body)})
					switch {
					case len(seen) == 1 || len(seen) == 4:
						w.WriteHeader(http.StatusServiceUnavailable)
					case r.URL.Path == "/a":
						http.Redirect(w, r, "/b", code)
					case r.URL.Path == "/b":
						http.Redirect(w, r, "/c", code)
					}
				}))
				defer server.Close()
				client := &http.Client{Transport: &keyhttp.Transport{Base: server.Client().Transport, Initial: time.Millisecond}}
				r := postTo(t, server.URL+"/a", strings.NewReader("pay 10"))
				if own != "" {
					r.Header.Set("Idempotency-Key", own)
				}
				resp, err := client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				key := cmp.Or(own, seen[0].key)
				keyed := func(path string) arrival { return arrival{"POST", path, key, "pay 10"} }
				want := []arrival{keyed("/a"), keyed("/a"), keyed("/b"), keyed("/c"), keyed("/c")}
				if code < 307 { // a GET, which is neither keyed here nor retried
					want = []arrival{keyed("/a"), keyed("/a"), {"GET", "/b", own, ""}, {"GET", "/c", own, ""}}
				}
				if key == "" || !slices.Equal(seen, want) {
					t.Errorf("the server saw %v\nnot %v", seen, want)
				}
			})
		}
	}
}

func TestTheZeroValueWorks(t *testing.T) {
	_, server := openBank(t, "HTTP/1.1", func(int) cutting { return intact })
	resp, err := (&http.Client{Transport: new(keyhttp.Transport)}).Post(server.URL, "text/plain", strings.NewReader("pay 10"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err != nil || !regexp.MustCompile(`^paid "[0-9a-f-]{36}"$`).Match(text) {
		t.Errorf("%q, %v", text, err)
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

// FuzzRetryAfter compares what is waited for with the grammar of RFC 9110, read in another way: a 409 is sent again only
// for a valid Retry-After, and Retrying tells the pause.
func FuzzRetryAfter(f *testing.F) {
	const sent = "Sun, 06 Nov 1994 08:49:37 GMT"
	for _, value := range []string{
		"0", "1", "120", "-1", "+1", "1.5", "", " ", "9223372036", "9223372037", "18446744073709551616", "1e3", "٣",
		sent, "Sun, 06 Nov 1994 08:49:36 GMT", "Sunday, 06-Nov-94 08:49:38 GMT", "Sun Nov  6 09:49:37 1994",
		"Fri, 31 Dec 9999 23:59:59 GMT", "Sun, 06 Nov 1994 08:49:37 CET", "Mon, 01 Jan 0001 00:00:00 GMT", "120, 130",
	} {
		f.Add(value, sent)
	}
	f.Fuzz(func(t *testing.T, value, date string) {
		now, err := http.ParseTime(date)
		if err != nil {
			t.Skip("the clock decides")
		}
		var want *time.Duration
		trimmed := strings.Trim(value, " \t")
		if regexp.MustCompile(`^[0-9]+$`).MatchString(trimmed) {
			n, _ := new(big.Int).SetString(trimmed, 10)
			n.Mul(n, big.NewInt(int64(time.Second)))
			if want = new(time.Duration); n.IsInt64() {
				*want = time.Duration(n.Int64())
			} else {
				*want = math.MaxInt64
			}
		} else if at, err := http.ParseTime(trimmed); err == nil {
			want = new(time.Duration)
			*want = max(at.Sub(now), 0)
		}

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var got *time.Duration
		tr := &keyhttp.Transport{
			Base: wired(func(r *http.Request) (*http.Response, error) {
				resp, _ := answer(409)(r)
				resp.Header["Retry-After"], resp.Header["Date"] = []string{value}, []string{date}
				return resp, nil
			}),
			Initial: 1, Max: 1, Patience: math.MaxInt64,
			Retrying: func(_ *http.Request, _ *http.Response, _ error, pause time.Duration) {
				got = &pause
				cancel()
			},
		}
		r := postTo(t, "http://bank.test/", nil).WithContext(ctx)
		r.Header.Set("Idempotency-Key", keystate.NewID())
		tr.RoundTrip(r)
		if (got == nil) != (want == nil) {
			t.Fatalf("Retry-After %q, Date %q: valid: %v, taken for valid: %v", value, date, want != nil, got != nil)
		}
		if got != nil && max(*got, 1) != max(*want, 1) { // the backoff's own pause is at most 1 ns
			t.Errorf("Retry-After %q, Date %q: waits %v, not %v", value, date, *got, *want)
		}
	})
}
