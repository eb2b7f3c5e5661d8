package clienttest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"example.com/keystate/keyhttp"
)

// needsCurl skips a test on machines without the program, unless KEYSTATE_MUST_CURL=1 says that it must be there.
func needsCurl(t *testing.T) {
	t.Helper()
	_, err := exec.LookPath("curl")
	switch {
	case err == nil:
	case os.Getenv("KEYSTATE_MUST_CURL") == "1":
		t.Fatal(err)
	default:
		t.Skip("curl is not installed")
	}
}

// curl runs the program curl, in the way that a shell script would, and reads the last answer that it got.
func curl(t *testing.T, args ...string) *http.Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
	defer cancel()
	body := filepath.Join(t.TempDir(), "body")
	c := exec.CommandContext(ctx, "curl", append([]string{
		"--silent", "--show-error", "--include", "--output", body, "--noproxy", "*", "-H", "Authorization: Bearer sk_test_ada",
	}, args...)...)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("curl: %v: %s", err, out)
	}
	raw, err := os.ReadFile(body)
	if err != nil {
		t.Fatal(err)
	}
	raw = raw[max(0, bytes.LastIndex(raw, []byte("HTTP/1.1 "))):] // --fail leaves the heads of earlier answers before it
	r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(raw)), nil)
	if err != nil {
		t.Fatalf("%v: %q", err, raw)
	}
	t.Cleanup(func() { r.Body.Close() })
	return r
}

func payByCurl(s *shop, args ...string) []string {
	return append([]string{"-d", "amount=2000", "-d", "currency=eur", s.URL + "/v1/payment_intents"}, args...)
}

// expect checks an answer's status and whether it is a replay.
func expect(t *testing.T, r *http.Response, status int, replayed string) {
	t.Helper()
	if r.StatusCode != status {
		t.Errorf("%s, want %d", r.Status, status)
	}
	if got := r.Header.Get("Idempotent-Replayed"); got != replayed {
		t.Errorf("Idempotent-Replayed: %q, want %q", got, replayed)
	}
}

func TestCurlsRetriesChargeOnce(t *testing.T) {
	t.Parallel()
	needsCurl(t)
	for _, faults := range [][]fault{{lostBefore}, {lostAfter}, {lostMidway}, {busyBefore}, {busyAfter, lostAfter}} {
		t.Run(fmt.Sprint(faults), func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			s.breaks(faults...)
			r := curl(t, payByCurl(s, "--retry", "3", "--retry-all-errors", "-H", "Idempotency-Key: order-4711")...)
			expect(t, r, http.StatusOK, replayed(faults))
			s.mustHaveCharged(t, 1)
		})
	}
}

func TestCurlRetriesAKeyInFlightWhenAskedToFailOnErrors(t *testing.T) {
	t.Parallel()
	needsCurl(t)
	s := newShop(t, nil)
	answered := make(chan struct{})
	refusals, release := s.hold(answered)
	go func() {
		defer close(answered)
		expect(t, curl(t, payByCurl(s, "-H", "Idempotency-Key: order-4711")...), http.StatusOK, "")
	}()
	<-s.charging
	r := curl(t, payByCurl(s, "--fail", "--retry", "3", "--retry-all-errors", "-H", "Idempotency-Key: order-4711")...)
	release()
	<-answered
	expect(t, r, http.StatusOK, "true")
	if n := refusals.Load(); n != 1 {
		t.Errorf("%d refusals", n)
	}
	s.mustHaveCharged(t, 1)
}

func TestCurlsKeyIsTheSameBareAndQuoted(t *testing.T) {
	t.Parallel()
	needsCurl(t)
	s := newShop(t, nil)
	expect(t, curl(t, payByCurl(s, "-H", "Idempotency-Key: 8e03978e-40d5-43e8-bc93-6894a57f9324")...), http.StatusOK, "")
	expect(t, curl(t, payByCurl(s, "-H", `Idempotency-Key: "8e03978e-40d5-43e8-bc93-6894a57f9324"`)...), http.StatusOK, "true")
	s.mustHaveCharged(t, 1)
}

func TestWhatCurlSendsAsKeyIsTakenOrRefused(t *testing.T) {
	t.Parallel()
	needsCurl(t)
	strict := func(o *keyhttp.Options) { o.Strict = true }
	query := func(o *keyhttp.Options) { o.QueryParameter = "idempotency_key" }
	for _, c := range []struct {
		name    string
		options func(*keyhttp.Options)
		query   string
		args    []string
		status  int
	}{
		{"a bare key", nil, "", []string{"-H", "Idempotency-Key: a-1"}, 200},
		{"a quoted key", nil, "", []string{"-H", `Idempotency-Key: "a-1"`}, 200},
		{"two lines", nil, "", []string{"-H", "Idempotency-Key: a-1", "-H", "Idempotency-Key: a-2"}, 400},
		{"no key", nil, "", nil, 400},
		{"an empty key", nil, "", []string{"-H", "Idempotency-Key;"}, 400},
		{"a quote that does not end", nil, "", []string{"-H", `Idempotency-Key: "a-1`}, 400},
		{"a bare key, strictly", strict, "", []string{"-H", "Idempotency-Key: a-1"}, 400},
		{"a quoted key, strictly", strict, "", []string{"-H", `Idempotency-Key: "a-1"`}, 200},
		{"the query parameter", query, "?idempotency_key=a-1", nil, 200},
		{"the query parameter and another key in the header", query, "?idempotency_key=a-1", []string{"-H", "Idempotency-Key: a-2"}, 400},
		{"a query parameter that nobody asked for", nil, "?idempotency_key=a-1", nil, 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, c.options)
			args := append([]string{"-d", "amount=2000", "-d", "currency=eur", s.URL + "/v1/payment_intents" + c.query}, c.args...)
			expect(t, curl(t, args...), c.status, "")
			if c.status != http.StatusOK {
				s.mustHaveCharged(t, 0)
				return
			}
			expect(t, curl(t, args...), c.status, "true")
			s.mustHaveCharged(t, 1)
		})
	}
}
