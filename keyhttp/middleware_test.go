package keyhttp_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
	"example.com/keystate/keyhttp"
	"example.com/keystate/keytest"
)

// An mwHouse is a handler behind a middleware, with its engine, on a server.
type mwHouse struct {
	t      *testing.T
	engine *keystate.Engine[*bbolt.Tx]
	door   http.Handler // the middleware around the handler
	server *httptest.Server
}

func mwEngine(t *testing.T, path string, o keystate.Options) *keystate.Engine[*bbolt.Tx] {
	t.Helper()
	o.Logger = slog.New(slog.DiscardHandler)
	e, err := keystate.Open(path, &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func mwDoor(t *testing.T, e *keystate.Engine[*bbolt.Tx], o keyhttp.Options, h http.HandlerFunc) http.Handler {
	t.Helper()
	if o.Scope == nil {
		o.Scope = keyhttp.Public
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	protect, err := keyhttp.Middleware(e, "test", o)
	if err != nil {
		t.Fatal(err)
	}
	return protect(h)
}

func mwOn(t *testing.T, e *keystate.Engine[*bbolt.Tx], o keyhttp.Options, h http.HandlerFunc) *mwHouse {
	t.Helper()
	house := &mwHouse{t: t, engine: e, door: mwDoor(t, e, o, h)}
	house.server = mwServer(t, house.door)
	return house
}

func mwServer(t *testing.T, h http.Handler) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func mwNew(t *testing.T, o keyhttp.Options, h http.HandlerFunc) *mwHouse {
	t.Helper()
	return mwOn(t, mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{}), o, h)
}

// An mwAnswer is what a client got.
type mwAnswer struct {
	status        int
	header        http.Header
	trailer       http.Header
	body          string
	contentLength int64
	err           error // of the exchange, or of reading the body
}

// mwClient opens a connection for each request: net/http repeats requests with a key by itself on connections that it has used before.
var mwClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func mwRequest(url, key, body string) *http.Request {
	r, err := http.NewRequest("POST", url, strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	r.Header.Set("Content-Type", "text/plain")
	if key != "" {
		r.Header.Set("Idempotency-Key", key)
	}
	return r
}

func mwDo(c *http.Client, r *http.Request) (a mwAnswer) {
	resp, err := c.Do(r)
	if err != nil {
		return mwAnswer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return mwAnswer{resp.StatusCode, resp.Header, resp.Trailer, string(body), resp.ContentLength, err}
}

func (h *mwHouse) post(key, body string) mwAnswer {
	return mwDo(mwClient, mwRequest(h.server.URL, key, body))
}

// want fails unless the answer has the status and, if it is a problem, the type.
func (a mwAnswer) want(t *testing.T, status int, problem string) mwAnswer {
	t.Helper()
	if a.err != nil || a.status != status {
		t.Fatalf("status %d, error %v, want %d: %.300s", a.status, a.err, status, a.body)
	}
	if problem != "" && !strings.Contains(a.body, `/problems/`+problem+`"`) {
		t.Fatalf("not of the type %s: %s", problem, a.body)
	}
	return a
}

func (a mwAnswer) replayed() bool { return a.header.Get("Idempotent-Replayed") == "true" }

// wantReplay fails unless again is what first was, given once more.
func (a mwAnswer) wantReplay(t *testing.T, first mwAnswer) {
	t.Helper()
	a.want(t, first.status, "")
	if !a.replayed() || first.replayed() {
		t.Errorf("replayed: first %t, then %t", first.replayed(), a.replayed())
	}
	if a.body != first.body {
		t.Errorf("the body was %.80q, then %.80q", first.body, a.body)
	}
	for _, name := range []string{"Content-Type", "Content-Encoding", "Location", "Etag"} {
		if a.header.Get(name) != first.header.Get(name) {
			t.Errorf("%s was %q, then %q", name, first.header.Get(name), a.header.Get(name))
		}
	}
}

// forgotten fails unless nothing is stored for the key.
func (h *mwHouse) forgotten(key string) {
	h.t.Helper()
	_, err := h.engine.Key(context.Background(), keystate.Key{Scope: "public", ID: key})
	if !errors.Is(err, keystate.ErrNotFound) {
		h.t.Errorf("key %s: %v, want ErrNotFound", key, err)
	}
}

const mwPatience = 20 * time.Second // until a test is taken to hang

func mwAwait[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(mwPatience):
		t.Fatalf("waited in vain: %s", what)
		panic("unreachable")
	}
}

func TestMiddlewareGivesARetryTheFirstAnswerByteForByte(t *testing.T) {
	secret := make([]byte, 100<<10) // more than any buffer of net/http
	rand.Read(secret)
	var runs atomic.Int32
	h := mwNew(t, keyhttp.Options{KeepHeaders: []string{"x-cost"}}, func(w http.ResponseWriter, r *http.Request) {
		n := runs.Add(1)
		w.Header().Set("Content-Type", "application/x-noise")
		w.Header().Set("Location", "/orders/7")
		w.Header().Set("X-Cost", "12")
		w.Header().Set("X-Other", "13")
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "s"})
		w.WriteHeader(http.StatusCreated)
		fmt.Fprint(w, n)
		w.Write(secret)
	})
	secure := httptest.NewUnstartedServer(h.door)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	for _, c := range []struct {
		name, url string
		client    *http.Client
		proto     string
	}{{"HTTP/1.1", h.server.URL, h.server.Client(), "HTTP/1.1"}, {"HTTP/2", secure.URL, secure.Client(), "HTTP/2.0"}} {
		t.Run(c.name, func(t *testing.T) {
			if resp, err := c.client.Get(c.url); err != nil || resp.Proto != c.proto {
				t.Fatal(resp, err)
			} else {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			runs.Store(0)
			first := mwDo(c.client, mwRequest(c.url, c.name[5:], "order"))
			first.want(t, 201, "")
			if first.header.Get("Set-Cookie") == "" || first.header.Get("X-Other") == "" || first.header.Get("X-Cost") == "" {
				t.Errorf("the first answer lacks headers: %v", first.header)
			}
			if first.body != "1"+string(secret) {
				t.Error("the first answer is not what the handler wrote")
			}
			for range 3 { // on the same connection
				again := mwDo(c.client, mwRequest(c.url, c.name[5:], "order"))
				again.wantReplay(t, first)
				if again.header.Get("Set-Cookie") != "" || again.header.Get("X-Other") != "" || again.header.Get("X-Cost") != "12" {
					t.Errorf("the retry's headers: %v", again.header)
				}
			}
			mwDo(c.client, mwRequest(c.url, c.name[5:], "another order")).want(t, 422, keyhttp.KeyReused)
			if n := runs.Load(); n != 1 {
				t.Errorf("the handler ran %d times", n)
			}
		})
	}
}

// An mwUntouched is a request body that nobody must read.
type mwUntouched struct{ t *testing.T }

func (b mwUntouched) Read([]byte) (int, error) { b.t.Error("the body was read"); return 0, io.EOF }
func (b mwUntouched) Close() error             { return nil }

func TestMiddlewareLetsThroughWhatNeedsNoKey(t *testing.T) {
	nobody := func(*http.Request) (string, error) { return "", errors.New("who is it") }
	for _, c := range []struct {
		name, method, key string
		o                 keyhttp.Options
	}{
		{"GET", "GET", "k", keyhttp.Options{}},
		{"HEAD", "HEAD", "k", keyhttp.Options{}},
		{"PUT", "PUT", "k", keyhttp.Options{}},
		{"another method by choice", "POST", "k", keyhttp.Options{Methods: []string{"PUT"}}},
		{"a POST without a key, where it is optional", "POST", "", keyhttp.Options{Optional: true}},
		{"a POST without a key of nobody known", "POST", "", keyhttp.Options{Optional: true, Scope: nobody}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			r := httptest.NewRequest(c.method, "/", mwUntouched{t})
			if c.key != "" {
				r.Header.Set("Idempotency-Key", c.key)
			}
			ran := false
			e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{})
			mwDoor(t, e, c.o, func(got http.ResponseWriter, req *http.Request) {
				ran = true
				if got != w || req != r || len(w.Header()) != 0 {
					t.Errorf("not untouched: %T, %p for %p, %v", got, req, r, w.Header())
				}
			}).ServeHTTP(w, r)
			if !ran {
				t.Errorf("did not get through: %d %s", w.Code, w.Body)
			}
		})
	}
}

func TestHandlersSeeWhatTheyWouldSeeWithoutTheMiddleware(t *testing.T) {
	type outer struct{}
	type sight struct {
		token, scope, path, form, part string
		whole                          bool
	}
	sights := make(chan sight, 1)
	e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{})
	scope := func(*http.Request) (string, error) { return "ada", nil }
	inner := mwDoor(t, e, keyhttp.Options{Scope: scope}, func(w http.ResponseWriter, r *http.Request) {
		s := sight{token: keyhttp.Token(r.Context()), scope: keyhttp.KeyOf(r).Scope, path: r.PathValue("id"), part: r.FormValue("q")}
		s.form = r.PostFormValue("name")
		_, isServer := r.Context().Value(http.ServerContextKey).(*http.Server)
		s.whole = isServer && r.Context().Value(outer{}) == "seen" && keystate.KeyOf(r.Context()) == keyhttp.KeyOf(r) &&
			keyhttp.KeyOf(r).ID == r.Header.Get("X-Key") && r.ContentLength == int64(len("name=ada+l"))
		sights <- s
		w.WriteHeader(http.StatusTeapot)
	})
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), outer{}, "seen")))
	})
	server := mwServer(t, mux)
	tokens := map[string]bool{}
	for _, key := range []string{"one", "two"} {
		for _, chunked := range []bool{false, true} {
			r := mwRequest(server.URL+"/orders/7?q=x", key+fmt.Sprint(chunked), "name=ada+l")
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			r.Header.Set("X-Key", key+fmt.Sprint(chunked))
			if chunked {
				r.ContentLength = -1
			}
			mwDo(mwClient, r).want(t, 418, "")
			s := <-sights
			if !s.whole || s.scope != "ada" || s.path != "7" || s.form != "ada l" || s.part != "x" || s.token == "" {
				t.Errorf("%+v", s)
			}
			tokens[s.token] = true
		}
	}
	if len(tokens) != 4 {
		t.Errorf("%d tokens for 4 keys", len(tokens))
	}
	if keyhttp.Token(context.Background()) != "" || keyhttp.KeyOf(httptest.NewRequest("POST", "/", nil)) != (keystate.Key{}) {
		t.Error("a token or a key where there is none")
	}
}

// A request whose body somebody has read already looks like every other one under its key.
func TestARequestWhoseBodyIsGoneIsNotTakenForAnother(t *testing.T) {
	for name, read := range map[string]func(*http.Request){
		"a form":          func(r *http.Request) { r.ParseForm() },
		"everything":      func(r *http.Request) { io.Copy(io.Discard, r.Body) },
		"a chunked form":  func(r *http.Request) { r.ContentLength = -1; r.ParseForm() },
		"nothing of JSON": func(r *http.Request) { r.Header.Set("Content-Type", "application/json"); r.ParseForm() },
	} {
		t.Run(name, func(t *testing.T) {
			var runs atomic.Int32
			e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{})
			door := mwDoor(t, e, keyhttp.Options{}, func(http.ResponseWriter, *http.Request) { runs.Add(1) })
			send := func(body string) int {
				w, r := httptest.NewRecorder(), httptest.NewRequest("POST", "/", strings.NewReader(body))
				r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
				r.Header.Set("Idempotency-Key", "k")
				read(r)
				door.ServeHTTP(w, r)
				return w.Code
			}
			first, other := send("cents=1"), send("cents=2")
			if name == "nothing of JSON" {
				if first != 200 || other != 422 {
					t.Errorf("%d, %d", first, other)
				}
				return
			}
			if first != 503 || other != 503 || runs.Load() != 0 {
				t.Errorf("%d, then %d for another body, after %d runs", first, other, runs.Load())
			}
		})
	}
}

func TestFilesOfAFormAreRemovedAfterTheHandler(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	t.Setenv("TMP", dir)
	during := make(chan int, 1)
	h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseMultipartForm(1); err != nil {
			t.Error(err)
		}
		files, _ := os.ReadDir(dir)
		during <- len(files)
	})
	upload := "--b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"f\"\r\n\r\n" + strings.Repeat("x", 100<<10) + "\r\n--b--\r\n"
	r := mwRequest(h.server.URL, "k", upload)
	r.Header.Set("Content-Type", "multipart/form-data; boundary=b")
	mwDo(mwClient, r).want(t, 200, "")
	if n := <-during; n != 1 {
		t.Fatalf("%d files while the handler ran", n)
	}
	if files, _ := os.ReadDir(dir); len(files) != 0 {
		t.Errorf("%d files are left", len(files))
	}
}

func TestServerSentEventsComeAsTheyAreFlushedAndARetryGetsAll(t *testing.T) {
	next := make(chan struct{})
	h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			if i > 0 {
				<-next
			}
			fmt.Fprintf(w, "data: %d\n\n", i)
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
		}
	})
	resp, err := mwClient.Do(mwRequest(h.server.URL, "k", ""))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got := make(chan string)
	go func() {
		s := bufio.NewScanner(resp.Body)
		for s.Scan() {
			if s.Text() != "" {
				got <- s.Text()
			}
		}
		close(got)
	}()
	for i := range 3 {
		if i > 0 {
			next <- struct{}{}
		}
		if line := mwAwait(t, got, "an event that was flushed"); line != fmt.Sprint("data: ", i) {
			t.Errorf("event %d: %q", i, line)
		}
	}
	mwAwait(t, got, "the end")
	again := h.post("k", "").want(t, 200, "")
	if again.body != "data: 0\n\ndata: 1\n\ndata: 2\n\n" || !again.replayed() || again.header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("the retry got %q, %v", again.body, again.header)
	}
}

func TestAStreamWhoseClientIsGoneIsRecordedToItsEnd(t *testing.T) {
	gone := make(chan struct{})
	h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		for i := range 50 { // like most, it ends when its client is gone
			if _, err := fmt.Fprintln(w, i, strings.Repeat("x", 10_000)); err != nil {
				return
			}
			if err := rc.Flush(); err != nil {
				return
			}
			if i == 0 {
				<-gone
			}
		}
		io.WriteString(w, "end")
	})
	ctx, cancel := context.WithCancel(t.Context())
	resp, err := mwClient.Do(mwRequest(h.server.URL, "k", "").WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	resp.Body.Close()
	close(gone)
	if again := h.untilAnswered("k", ""); again.status != 200 || !strings.HasSuffix(again.body, "end") {
		t.Errorf("%d, and %d bytes: a piece of the answer was taken for all of it", again.status, len(again.body))
	}
}

// untilAnswered repeats a request until it is no longer in flight.
func (h *mwHouse) untilAnswered(key, body string) mwAnswer {
	h.t.Helper()
	if err := h.engine.Resume(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	return h.post(key, body)
}

func TestALargeAnswerGoesOutOnceAndWhole(t *testing.T) {
	var runs atomic.Int32
	for _, size := range []int{999, 1000, 1001, 50_000, 5_000_000} {
		h := mwNew(t, keyhttp.Options{MaxResponse: 1000}, func(w http.ResponseWriter, r *http.Request) {
			runs.Add(1)
			w.Header()["Content-Type"] = nil // so that it is only the body that counts
			for n := size; n > 0; n -= 700 {
				w.Write(bytes.Repeat([]byte{'x'}, min(n, 700)))
			}
		})
		runs.Store(0)
		first := h.post("k", "").want(t, 200, "")
		if len(first.body) != size {
			t.Errorf("%d bytes of %d", len(first.body), size)
		}
		if again := h.post("k", ""); size <= 1000 {
			again.wantReplay(t, first)
		} else {
			again.want(t, 410, keyhttp.AnswerNotKept)
			if again.header.Get("Should-Retry") != "false" || !again.replayed() {
				t.Errorf("%v", again.header)
			}
		}
		if n := runs.Load(); n != 1 {
			t.Errorf("ran %d times", n)
		}
	}
}

func TestAnAnswerThatTheEngineCannotStoreIsNotASecondRun(t *testing.T) {
	var runs atomic.Int32
	e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{MaxState: 1000})
	h := mwOn(t, e, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		w.Write(make([]byte, 5000))
	})
	if first := h.post("k", "").want(t, 200, ""); len(first.body) != 5000 {
		t.Errorf("%d bytes", len(first.body))
	}
	h.post("k", "").want(t, 410, keyhttp.AnswerNotKept)
	if n := runs.Load(); n != 1 {
		t.Errorf("ran %d times", n)
	}
}

func TestTheHandlerGoesOnWhenTheClientIsGone(t *testing.T) {
	var runs atomic.Int32
	running, goOn := make(chan context.Context, 1), make(chan struct{})
	h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		running <- r.Context()
		<-goOn
		w.WriteHeader(http.StatusAccepted)
	})
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan mwAnswer, 1)
	go func() { asked <- mwDo(mwClient, mwRequest(h.server.URL, "k", "").WithContext(ctx)) }()
	inside := mwAwait(t, running, "the handler")
	cancel()
	if a := mwAwait(t, asked, "the client to be gone"); !errors.Is(a.err, context.Canceled) {
		t.Fatal(a)
	}
	h.post("k", "").want(t, 409, keyhttp.KeyInFlight)
	shut := make(chan error, 1)
	go func() { shut <- h.server.Config.Shutdown(t.Context()) }()
	if inside.Err() != nil {
		t.Error("the handler's context has ended")
	}
	select {
	case <-shut:
		t.Error("Shutdown did not wait for the handler")
	default:
	}
	close(goOn)
	if err := mwAwait(t, shut, "Shutdown"); err != nil {
		t.Error(err)
	}
	w := httptest.NewRecorder()
	h.door.ServeHTTP(w, mwRequest("/", "k", "")) // its server is down
	if w.Code != 202 || w.Header().Get("Idempotent-Replayed") != "true" || runs.Load() != 1 {
		t.Errorf("%d after %d runs: %s", w.Code, runs.Load(), w.Body)
	}
}

func TestAServersTimeoutDoesNotLoseTheAnswer(t *testing.T) {
	goOn := make(chan struct{})
	var runs atomic.Int32
	h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		<-goOn
		if r.Context().Err() != nil {
			t.Error("the handler's context has ended")
		}
		io.WriteString(w, "charged")
	})
	impatient := mwServer(t, http.TimeoutHandler(h.door, time.Millisecond, "too slow"))
	for runs.Load() == 0 { // the claim may take longer than that, and so may the way from the claim to the handler
		a := mwDo(mwClient, mwRequest(impatient.URL, "k", ""))
		if inFlight := a.status == 409; !inFlight && a.want(t, 503, "").body != "too slow" {
			t.Fatalf("%q", a.body)
		}
	}
	close(goOn)
	if a := h.untilAnswered("k", "").want(t, 200, ""); a.body != "charged" || !a.replayed() || runs.Load() != 1 {
		t.Errorf("%q, %d runs", a.body, runs.Load())
	}
}

func TestAProxyStreamsThroughTheMiddleware(t *testing.T) {
	next := make(chan struct{})
	upstream := mwServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Trailer", "X-Sum")
		io.WriteString(w, "data: 1\n\n")
		http.NewResponseController(w).Flush()
		<-next
		w.Write(body)
		w.Header().Set("X-Sum", "2")
	}))
	to, err := url.Parse(upstream.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	h := mwNew(t, keyhttp.Options{}, proxy.ServeHTTP)
	resp, err := mwClient.Do(mwRequest(h.server.URL, "k", "data: 2\n\n"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	if line, err := in.ReadString('\n'); line != "data: 1\n" || err != nil {
		t.Errorf("%q, %v", line, err)
	}
	close(next)
	if rest, err := io.ReadAll(in); string(rest) != "\ndata: 2\n\n" || err != nil || resp.Trailer.Get("X-Sum") != "2" {
		t.Errorf("%q, %v, %v", rest, err, resp.Trailer)
	}
	if again := h.post("k", "data: 2\n\n").want(t, 200, ""); again.body != "data: 1\n\ndata: 2\n\n" || !again.replayed() {
		t.Errorf("%q", again.body)
	}
}

func TestTheEnginesEndIsTheHandlersEnd(t *testing.T) {
	running := make(chan struct{})
	path := filepath.Join(t.TempDir(), "store.db")
	h := mwOn(t, mwEngine(t, path, keystate.Options{}), keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		close(running)
		<-r.Context().Done()
		io.WriteString(w, "cut short, and said so")
	})
	asked := make(chan mwAnswer, 1)
	go func() { asked <- h.post("k", "") }()
	mwAwait(t, running, "the handler")
	if err := h.engine.Close(); err != nil {
		t.Fatal(err)
	}
	first := mwAwait(t, asked, "the answer").want(t, 200, "")
	again := mwOn(t, mwEngine(t, path, keystate.Options{}), keyhttp.Options{}, nil).post("k", "")
	again.wantReplay(t, first)
}

func TestAHandlerThatOutlivesTheEngineHarmsNobody(t *testing.T) {
	running, goOn := make(chan struct{}), make(chan struct{})
	path := filepath.Join(t.TempDir(), "store.db")
	e := mwEngine(t, path, keystate.Options{CloseTimeout: time.Millisecond})
	h := mwOn(t, e, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		close(running)
		<-goOn
		io.WriteString(w, "late")
	})
	asked := make(chan mwAnswer, 1)
	go func() { asked <- h.post("k", "") }()
	mwAwait(t, running, "the handler")
	if err := e.Close(); err == nil {
		t.Error("Close waited for ever, or did not say that it did not")
	}
	h.post("other", "").want(t, 503, keyhttp.Unavailable)
	close(goOn)
	a := mwAwait(t, asked, "the answer").want(t, 503, "")
	if strings.Contains(a.body, "late") || a.header.Get("Retry-After") == "" {
		t.Errorf("%v %s", a.header, a.body)
	}
}

func TestAPanicIsPassedOnAndTheKeyForgotten(t *testing.T) {
	type reason struct{ n int }
	for _, c := range []struct {
		name       string
		atMostOnce bool
	}{{"run again", false}, {"at most once", true}} {
		t.Run(c.name, func(t *testing.T) {
			var runs atomic.Int32
			value := &reason{7}
			e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{})
			door := mwDoor(t, e, keyhttp.Options{AtMostOnce: c.atMostOnce}, func(w http.ResponseWriter, r *http.Request) {
				if runs.Add(1) == 1 {
					w.WriteHeader(http.StatusCreated)
					panic(value)
				}
			})
			seen := make(chan any, 1)
			server := mwServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				defer func() {
					if v := recover(); v != nil {
						seen <- v
						w.WriteHeader(http.StatusInternalServerError)
					}
				}()
				door.ServeHTTP(w, r)
			}))
			mwDo(mwClient, mwRequest(server.URL, "k", "")).want(t, 500, "")
			if v := mwAwait(t, seen, "the panic"); v != value {
				t.Errorf("recovered %v", v)
			}
			again := mwDo(mwClient, mwRequest(server.URL, "k", ""))
			if !c.atMostOnce {
				again.want(t, 200, "")
				return
			}
			again.want(t, 500, keyhttp.Parked)
			if again.header.Get("Should-Retry") != "false" || runs.Load() != 1 {
				t.Errorf("%d runs, %v", runs.Load(), again.header)
			}
		})
	}
}

func TestAHandlerThatAbortsCutsTheConnection(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		for _, atMostOnce := range []bool{false, true} {
			t.Run(fmt.Sprintf("flushed %t, at most once %t", flushed, atMostOnce), func(t *testing.T) {
				var runs atomic.Int32
				h := mwNew(t, keyhttp.Options{AtMostOnce: atMostOnce}, func(w http.ResponseWriter, r *http.Request) {
					if runs.Add(1) > 1 {
						io.WriteString(w, "whole")
						return
					}
					io.WriteString(w, "half")
					if flushed {
						w.(http.Flusher).Flush()
					}
					panic(http.ErrAbortHandler)
				})
				if a := h.post("k", ""); a.err == nil {
					t.Errorf("%d %q", a.status, a.body)
				}
				if again := h.post("k", ""); atMostOnce {
					again.want(t, 500, keyhttp.Parked)
				} else if again.want(t, 200, "").body != "whole" {
					t.Errorf("%q", again.body)
				}
			})
		}
	}
}

func TestAHandlerThatEndsItsGoroutineIsAsAfterACrash(t *testing.T) {
	for _, atMostOnce := range []bool{false, true} {
		var runs atomic.Int32
		h := mwNew(t, keyhttp.Options{AtMostOnce: atMostOnce}, func(w http.ResponseWriter, r *http.Request) {
			if runs.Add(1) == 1 {
				io.WriteString(w, "half")
				runtime.Goexit()
			}
			io.WriteString(w, "whole")
		})
		if a := h.post("k", ""); a.err != nil || a.status < 500 || strings.Contains(a.body, "half") {
			t.Errorf("%+v", a)
		}
		if again := h.post("k", ""); atMostOnce {
			again.want(t, 500, keyhttp.Parked)
		} else if again.want(t, 200, "").body != "whole" {
			t.Errorf("%q", again.body)
		}
	}
}

func TestWhichAnswersAreSaved(t *testing.T) {
	rejected := []int{307, 308, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 425, 429}
	broken := []int{500, 501, 502, 503, 504, 507, 599}
	done := []int{200, 201, 202, 203, 204, 205, 206, 299, 300, 301, 302, 303, 304, 402, 406, 410, 411, 412, 414, 416, 417, 418, 423, 424, 426, 428, 431, 451, 499}
	list := func(saved bool, statuses []int, into map[int]bool) {
		for _, s := range statuses {
			into[s] = saved
		}
	}
	for _, c := range []struct {
		name string
		o    keyhttp.Options
		want func(map[int]bool)
	}{
		{"by default", keyhttp.Options{}, func(m map[int]bool) { list(false, rejected, m); list(false, broken, m); list(true, done, m) }},
		{"at most once", keyhttp.Options{AtMostOnce: true}, func(m map[int]bool) { list(false, rejected, m); list(true, broken, m); list(true, done, m) }},
		{"of one's own", keyhttp.Options{Save: func(s int) bool { return s == 404 || s == 500 }}, func(m map[int]bool) {
			list(false, rejected, m)
			list(false, broken, m)
			list(false, done, m)
			list(true, []int{404, 500}, m)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var runs atomic.Int32
			h := mwNew(t, c.o, func(w http.ResponseWriter, r *http.Request) {
				runs.Add(1)
				var status int
				fmt.Sscan(r.Header.Get("X-Status"), &status)
				w.WriteHeader(status)
				io.Copy(w, r.Body)
			})
			want := map[int]bool{}
			c.want(want)
			for status, saved := range want {
				key := fmt.Sprint("s", status)
				send := func(body string) (w *httptest.ResponseRecorder) {
					r := mwRequest("/", key, body)
					r.Header.Set("X-Status", fmt.Sprint(status))
					w = httptest.NewRecorder()
					h.door.ServeHTTP(w, r)
					return w
				}
				runs.Store(0)
				first, again := send("a"), send("a")
				other := send("b")
				if first.Code != status || again.Code != status || !bytes.Equal(first.Body.Bytes(), again.Body.Bytes()) {
					t.Errorf("%d: %d %q, then %d %q", status, first.Code, first.Body, again.Code, again.Body)
				}
				switch n := runs.Load(); {
				case saved && (n != 1 || other.Code != 422):
					t.Errorf("%d: %d runs and %d for another body, although it is to be saved", status, n, other.Code)
				case !saved && (n != 3 || other.Code != status):
					t.Errorf("%d: %d runs and %d for another body, although it is not to be saved", status, n, other.Code)
				case !saved:
					h.forgotten(key)
				}
			}
		})
	}
}

// snapshot is the store as a crash at this moment would leave it.
func (h *mwHouse) snapshot() string {
	h.t.Helper()
	path := filepath.Join(h.t.TempDir(), "store.db")
	f, err := os.Create(path)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if _, err := keystate.Backup(h.t.Context(), h.engine, f); err != nil {
		h.t.Fatal(err)
	}
	return path
}

func TestAfterACrashTheRetryRunsTheHandlerAgain(t *testing.T) {
	running, goOn := make(chan string, 1), make(chan struct{})
	h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		running <- keyhttp.Token(r.Context())
		<-goOn
	})
	asked := make(chan mwAnswer, 1)
	go func() { asked <- h.post("k", "") }()
	mwAwait(t, running, "the handler")
	path := h.snapshot()
	close(goOn)
	mwAwait(t, asked, "the end").want(t, 200, "")

	var runs atomic.Int32
	after := mwOn(t, mwEngine(t, path, keystate.Options{}), keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		w.WriteHeader(http.StatusCreated)
	})
	after.untilAnswered("k", "").want(t, 201, "")
	if again := after.post("k", "").want(t, 201, ""); !again.replayed() || runs.Load() != 1 {
		t.Errorf("%d runs", runs.Load())
	}
}

func TestTheKeyOfACrashIsForgottenWithoutARetry(t *testing.T) {
	running, goOn := make(chan struct{}, 1), make(chan struct{})
	h := mwNew(t, keyhttp.Options{}, func(http.ResponseWriter, *http.Request) { running <- struct{}{}; <-goOn })
	go h.post("k", "")
	mwAwait(t, running, "the handler")
	path := h.snapshot()
	close(goOn)
	after := mwOn(t, mwEngine(t, path, keystate.Options{}), keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, r.Body)
	})
	if err := after.engine.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	after.forgotten("k")
	if a := after.post("k", "another body").want(t, 200, ""); a.body != "another body" || a.replayed() {
		t.Errorf("%q", a.body)
	}
}

func TestAtMostOnceParksWhatACrashCutOff(t *testing.T) {
	running, goOn := make(chan struct{}, 1), make(chan struct{})
	o := keyhttp.Options{AtMostOnce: true}
	h := mwNew(t, o, func(http.ResponseWriter, *http.Request) { running <- struct{}{}; <-goOn })
	go h.post("k", "")
	mwAwait(t, running, "the handler")
	path := h.snapshot()
	close(goOn)
	key := keystate.Key{Scope: "public", ID: "k"}
	for _, c := range []struct {
		name   string
		decide func(e *keystate.Engine[*bbolt.Tx]) error
		status int
		kind   string
		runs   int32
	}{
		{"retried", func(e *keystate.Engine[*bbolt.Tx]) error { return e.Retry(t.Context(), key) }, 201, "", 1},
		{"abandoned", func(e *keystate.Engine[*bbolt.Tx]) error { return e.Abandon(t.Context(), key, "it was charged") }, 410, keyhttp.AnswerNotKept, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var runs atomic.Int32
			copied := filepath.Join(t.TempDir(), "store.db")
			if b, err := os.ReadFile(path); err != nil || os.WriteFile(copied, b, 0o600) != nil {
				t.Fatal(err)
			}
			after := mwOn(t, mwEngine(t, copied, keystate.Options{}), o, func(w http.ResponseWriter, r *http.Request) {
				runs.Add(1)
				w.WriteHeader(http.StatusCreated)
			})
			if a := after.untilAnswered("k", "").want(t, 500, keyhttp.Parked); a.header.Get("Should-Retry") != "false" || a.header.Get("Retry-After") != "" {
				t.Errorf("%v", a.header)
			}
			if r, err := after.engine.Key(t.Context(), key); err != nil || r.ParkReason != keystate.Indeterminate {
				t.Errorf("%v, %v", r.ParkReason, err)
			}
			if err := c.decide(after.engine); err != nil {
				t.Fatal(err)
			}
			a := after.untilAnswered("k", "").want(t, c.status, c.kind)
			if c.status == 410 && (!strings.Contains(a.body, "it was charged") || a.header.Get("Should-Retry") != "false") {
				t.Errorf("%v %s", a.header, a.body)
			}
			if n := runs.Load(); n != c.runs {
				t.Errorf("%d runs", n)
			}
		})
	}
}

// mwChildStore makes the test that has it in its environment the process that is killed.
const mwChildStore = "KEYHTTP_TEST_STORE"

func TestAKilledProcessLeavesItsKeyToTheNext(t *testing.T) {
	atMostOnce := os.Getenv(mwChildStore+"_ONCE") != ""
	if path := os.Getenv(mwChildStore); path != "" {
		h := mwOn(t, mwEngine(t, path, keystate.Options{}), keyhttp.Options{AtMostOnce: atMostOnce}, func(http.ResponseWriter, *http.Request) {
			fmt.Println("running")
			select {}
		})
		fmt.Println("at", h.server.URL)
		io.Copy(io.Discard, os.Stdin) // until the parent is gone
		os.Exit(0)
	}
	for _, once := range []string{"", "yes"} {
		path := filepath.Join(t.TempDir(), "store.db")
		child := exec.Command(os.Args[0], "-test.run=^TestAKilledProcessLeavesItsKeyToTheNext$")
		child.Env = append(os.Environ(), mwChildStore+"="+path, mwChildStore+"_ONCE="+once)
		stdin, err := child.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		stdout, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(stdout)
		url := ""
		for lines.Scan() && lines.Text() != "running" {
			if at, found := strings.CutPrefix(lines.Text(), "at "); found {
				url = at
				go mwDo(mwClient, mwRequest(url, "k", ""))
			}
		}
		if err := errors.Join(child.Process.Kill(), lines.Err()); err != nil || url == "" {
			t.Fatal(url, err)
		}
		child.Wait()
		after := mwOn(t, mwEngine(t, path, keystate.Options{}), keyhttp.Options{AtMostOnce: once != ""}, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusCreated)
		})
		if a := after.untilAnswered("k", ""); once != "" {
			a.want(t, 500, keyhttp.Parked)
		} else {
			a.want(t, 201, "")
		}
	}
}

// An mwStore is a store whose disk can fail.
type mwStore struct {
	keystate.Store[*bbolt.Tx]
	broken atomic.Bool
}

var errMwDisk = errors.New("the disk is gone")

func (s *mwStore) Update(ctx context.Context, fn func(*bbolt.Tx) error) error {
	if s.broken.Load() {
		return errMwDisk
	}
	return s.Store.Update(ctx, fn)
}

func mwOnBrokenDisk(t *testing.T) (*mwStore, *keystate.Engine[*bbolt.Tx]) {
	t.Helper()
	store := &mwStore{Store: keytest.OpenBolt(t, t.TempDir())}
	e, err := keystate.New[*bbolt.Tx](store, &keystate.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return store, e
}

func TestWithoutAStoreTheHandlerDoesNotRun(t *testing.T) {
	never := func(http.ResponseWriter, *http.Request) { t.Error("the handler ran") }
	full := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{MaxBytes: 1})
	closed := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{})
	store, failing := mwOnBrokenDisk(t)
	for _, c := range []struct {
		name   string
		engine *keystate.Engine[*bbolt.Tx]
		spoil  func()
	}{
		{"closed", closed, func() { closed.Close() }},
		{"full", full, func() {}},
		{"on a failing disk", failing, func() { store.broken.Store(true) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := mwOn(t, c.engine, keyhttp.Options{}, never)
			c.spoil()
			a := h.post("k", "").want(t, 503, keyhttp.Unavailable)
			if a.header.Get("Retry-After") != "1" || a.header.Get("Should-Retry") != "true" {
				t.Errorf("%v", a.header)
			}
		})
	}
}

func TestAnAnswerThatIsNotOnDiskIsNotSent(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		for _, atMostOnce := range []bool{false, true} {
			t.Run(fmt.Sprintf("flushed %t, at most once %t", flushed, atMostOnce), func(t *testing.T) {
				t.Parallel()
				var runs atomic.Int32
				store, e := mwOnBrokenDisk(t)
				h := mwOn(t, e, keyhttp.Options{AtMostOnce: atMostOnce}, func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Set-Cookie", "a=b")
					io.WriteString(w, "charged")
					if flushed {
						w.(http.Flusher).Flush()
					}
					store.broken.Store(runs.Add(1) == 1)
				})
				a := h.post("k", "")
				switch {
				case flushed && a.err == nil:
					t.Errorf("the client takes %q for an answer", a.body)
				case !flushed && (a.err != nil || a.status != 503 || strings.Contains(a.body, "charged") || a.header.Get("Set-Cookie") != ""):
					t.Errorf("%+v", a)
				}
				store.broken.Store(false)
				if again := h.untilAnswered("k", ""); atMostOnce { // as after a crash
					again.want(t, 500, keyhttp.Parked)
				} else if again.want(t, 200, ""); again.replayed() || runs.Load() != 2 {
					t.Errorf("%d runs", runs.Load())
				}
			})
		}
	}
}

func TestIdenticalRequestsAtOnceRunTheHandlerOnce(t *testing.T) {
	const clients = 30
	for _, wait := range []time.Duration{0, mwPatience} {
		t.Run(fmt.Sprint("waiting ", wait), func(t *testing.T) {
			var runs atomic.Int32
			h := mwNew(t, keyhttp.Options{Wait: wait}, func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprint(w, "run ", runs.Add(1))
			})
			var all sync.WaitGroup
			var caused atomic.Int32
			for range clients {
				all.Go(func() {
					a := h.post("k", "")
					switch {
					case a.status == 200 && a.body == "run 1":
						if !a.replayed() {
							caused.Add(1)
						}
					case wait == 0 && a.status == 409 && a.header.Get("Retry-After") == "1":
					default:
						t.Errorf("%+v", a)
					}
				})
			}
			all.Wait()
			if runs.Load() != 1 || caused.Load() != 1 {
				t.Errorf("%d runs, %d answers that are not replays", runs.Load(), caused.Load())
			}
		})
	}
}

func TestOneKeyForDifferentRequestsAtOnceIsOneRun(t *testing.T) {
	var runs atomic.Int32
	h := mwNew(t, keyhttp.Options{Wait: mwPatience}, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		io.Copy(w, r.Body)
	})
	var all sync.WaitGroup
	var mu sync.Mutex
	bodies := map[string]bool{}
	for i := range 20 {
		all.Go(func() {
			body := fmt.Sprint(i % 4)
			switch a := h.post("k", body); {
			case a.status == 422:
			case a.status == 200 && a.body == body:
				mu.Lock()
				bodies[body] = true
				mu.Unlock()
			default:
				t.Errorf("asked for %s, got %+v", body, a)
			}
		})
	}
	all.Wait()
	if runs.Load() != 1 || len(bodies) != 1 {
		t.Errorf("%d runs, answers to %v", runs.Load(), bodies)
	}
}

func TestIdenticalRequestsWhoseAnswerIsNotSavedEachGetAnAnswer(t *testing.T) {
	e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{MaxRuns: 1}) // they wait in line for their run
	var runs atomic.Int32
	h := mwOn(t, e, keyhttp.Options{Wait: mwPatience}, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, "overloaded")
	})
	var all sync.WaitGroup
	var given atomic.Int32
	for range 40 {
		all.Go(func() {
			switch a := h.post("k", ""); {
			case a.status == 503 && a.body == "overloaded":
				given.Add(1)
			case a.status == 409:
			default:
				t.Errorf("%+v", a)
			}
		})
	}
	all.Wait()
	if runs.Load() == 0 || runs.Load() != given.Load() {
		t.Errorf("%d runs, %d answers", runs.Load(), given.Load())
	}
	h.forgotten("k")
}

func TestHowLongAndHowManyWaitForTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{})
		defer e.Close()
		goOn := make(chan struct{})
		door := mwDoor(t, e, keyhttp.Options{Wait: 3 * time.Second, MaxWaiters: 2}, func(w http.ResponseWriter, r *http.Request) {
			<-goOn
			io.WriteString(w, "done")
		})
		ask := func() <-chan *httptest.ResponseRecorder {
			got := make(chan *httptest.ResponseRecorder, 1)
			go func() {
				w := httptest.NewRecorder()
				door.ServeHTTP(w, mwRequest("/", "k", ""))
				got <- w
			}()
			synctest.Wait()
			return got
		}
		first := ask()
		began := time.Now()
		waiting := ask()
		if w := <-waiting; w.Code != 409 || time.Since(began) != 3*time.Second {
			t.Errorf("%d after %s", w.Code, time.Since(began))
		}
		one, two := ask(), ask()
		began = time.Now()
		if w := <-ask(); w.Code != 409 || time.Since(began) != 0 {
			t.Errorf("the third got %d after %s", w.Code, time.Since(began))
		}
		close(goOn)
		if w := <-first; w.Body.String() != "done" || w.Header().Get("Idempotent-Replayed") != "" {
			t.Errorf("%d %v", w.Code, w.Header())
		}
		for _, c := range []<-chan *httptest.ResponseRecorder{one, two} {
			if w := <-c; w.Body.String() != "done" || w.Header().Get("Idempotent-Replayed") != "true" {
				t.Errorf("%d %v", w.Code, w.Header())
			}
		}
	})
}

// mwMinted is a UUIDv7 of now by the bubble's clock: package uuid never goes back to it.
func mwMinted(last string) string {
	ms := fmt.Sprintf("%012x", time.Now().UnixMilli())
	return ms[:8] + "-" + ms[8:] + "-7000-8000-00000000000" + last
}

func TestAnOldKeyIsRefusedUnlessItIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := mwEngine(t, filepath.Join(t.TempDir(), "store.db"), keystate.Options{})
		defer e.Close()
		runs := 0
		door := mwDoor(t, e, keyhttp.Options{KeyLife: time.Hour}, func(http.ResponseWriter, *http.Request) { runs++ })
		ask := func(key string) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			door.ServeHTTP(w, mwRequest("/", key, ""))
			return w
		}
		used, unused := mwMinted("1"), mwMinted("2")
		if w := ask(used); w.Code != 200 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		time.Sleep(time.Hour + time.Second) // of the bubble's clock
		if w := ask(used); w.Code != 200 || w.Header().Get("Idempotent-Replayed") != "true" {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		if w := ask(unused); w.Code != 400 || !strings.Contains(w.Body.String(), keyhttp.KeyExpired) || runs != 1 {
			t.Errorf("%d %s, %d runs", w.Code, w.Body, runs)
		}
	})
}

func TestAnAnswerIsSealedInTheStoreAndOpenedForTheRetry(t *testing.T) {
	block, err := aes.NewCipher(make([]byte, 16))
	if err != nil {
		t.Fatal(err)
	}
	// In place, as crypto/cipher has it: what was sealed must not be what the first client gets.
	crypt := func(r keyhttp.Response) (keyhttp.Response, error) {
		cipher.NewCTR(block, make([]byte, 16)).XORKeyStream(r.Body, r.Body)
		for name, values := range r.Header {
			values[0] = fmt.Sprintf("%x", name)
		}
		r.Header = http.Header{"Content-Type": {"text/plain"}}
		return r, nil
	}
	path := filepath.Join(t.TempDir(), "store.db")
	h := mwOn(t, mwEngine(t, path, keystate.Options{}), keyhttp.Options{Seal: crypt, Open: crypt}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("Location", "/pans/4111111111111111")
		io.WriteString(w, "PAN 4111111111111111")
	})
	first := h.post("k", "").want(t, 200, "")
	if first.body != "PAN 4111111111111111" || first.header.Get("Location") != "/pans/4111111111111111" {
		t.Errorf("the first answer: %q %v", first.body, first.header)
	}
	if again := h.post("k", "").want(t, 200, ""); again.body != first.body || again.header.Get("Location") != "" {
		t.Errorf("the retry's: %q %v", again.body, again.header)
	}
	h.engine.Close()
	if file, err := os.ReadFile(path); err != nil || bytes.Contains(file, []byte("4111111111111111")) {
		t.Errorf("it can be read in the store (%v)", err)
	}
}

func TestAnAnswerIsRedactedForTheRetry(t *testing.T) {
	redact := func(r keyhttp.Response) (keyhttp.Response, error) {
		r.Body = []byte("it was done")
		return r, nil
	}
	h := mwNew(t, keyhttp.Options{Seal: redact}, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "a secret") })
	if first := h.post("k", "").want(t, 200, ""); first.body != "a secret" {
		t.Errorf("%q", first.body)
	}
	if again := h.post("k", "").want(t, 200, ""); again.body != "it was done" || !again.replayed() {
		t.Errorf("%q", again.body)
	}
}

// When the handler has run, nothing that fails in what follows may let it run again.
func TestWhatFailsAfterTheHandlerIsNotASecondRun(t *testing.T) {
	for _, c := range []struct {
		name string
		o    keyhttp.Options
	}{
		{"Seal fails", keyhttp.Options{Seal: func(r keyhttp.Response) (keyhttp.Response, error) { return r, errors.New("no key") }}},
		{"Seal panics", keyhttp.Options{Seal: func(r keyhttp.Response) (keyhttp.Response, error) { panic("no key") }}},
		{"Seal ends the goroutine", keyhttp.Options{Seal: func(r keyhttp.Response) (keyhttp.Response, error) { runtime.Goexit(); return r, nil }}},
		{"Save panics", keyhttp.Options{Save: func(int) bool { panic("no idea") }}},
	} {
		for _, atMostOnce := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, at most once %t", c.name, atMostOnce), func(t *testing.T) {
				var runs atomic.Int32
				o := c.o
				o.AtMostOnce = atMostOnce
				h := mwNew(t, o, func(w http.ResponseWriter, r *http.Request) {
					runs.Add(1)
					io.WriteString(w, "charged")
				})
				ends := strings.Contains(c.name, "goroutine")
				if first := h.post("k", ""); !ends || !atMostOnce {
					if first.want(t, 200, ""); first.body != "charged" {
						t.Errorf("%q", first.body)
					}
					h.post("k", "").want(t, 410, keyhttp.AnswerNotKept)
				} else {
					h.post("k", "").want(t, 500, keyhttp.Parked)
				}
				if runs.Load() != 1 {
					t.Errorf("%d runs", runs.Load())
				}
			})
		}
	}
}

func TestAnAnswerThatCannotBeOpenedIsAProblem(t *testing.T) {
	same := func(r keyhttp.Response) (keyhttp.Response, error) { return r, nil }
	fails := func(r keyhttp.Response) (keyhttp.Response, error) { return r, errors.New("no key") }
	h := mwNew(t, keyhttp.Options{Seal: same, Open: fails}, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "done") })
	if first := h.post("k", "").want(t, 200, ""); first.body != "done" {
		t.Errorf("%q", first.body)
	}
	if a := h.post("k", "").want(t, 500, keyhttp.Parked); a.header.Get("Should-Retry") != "false" {
		t.Errorf("%v", a.header)
	}
}

func mwDial(t *testing.T, s *httptest.Server) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(mwPatience))
	return conn
}

func TestARequestThatBreaksOffIsNone(t *testing.T) {
	var runs atomic.Int32
	h := mwNew(t, keyhttp.Options{}, func(http.ResponseWriter, *http.Request) { runs.Add(1) })
	for _, head := range []string{"Content-Length: 100\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "Transfer-Encoding: chunked\r\n\r\nzz\r\n"} {
		conn := mwDial(t, h.server)
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\n%s", head)
		conn.(*net.TCPConn).CloseWrite()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil && resp.StatusCode != 400 {
			t.Errorf("%s: %s", head, resp.Status)
		}
	}
	if runs.Load() != 0 {
		t.Errorf("the handler ran %d times", runs.Load())
	}
	h.forgotten("k")
	h.post("k", "whole").want(t, 200, "")
}

func TestABodyIsAskedForWhenTheKeyIsThere(t *testing.T) {
	h := mwNew(t, keyhttp.Options{MaxBody: 10}, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	for _, c := range []struct {
		key, length string
		status      int
	}{{"", "4", 400}, {"k", "11", 413}, {"k", "4", 100}} {
		conn := mwDial(t, h.server)
		in := bufio.NewReader(conn)
		key := ""
		if c.key != "" {
			key = "Idempotency-Key: " + c.key + "\r\n"
		}
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n%sContent-Length: %s\r\n\r\n", key, c.length)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != c.status {
			t.Errorf("key %q, length %s: %s", c.key, c.length, resp.Status)
		}
		if resp.StatusCode != 100 {
			continue
		}
		io.WriteString(conn, "body")
		if resp, err = http.ReadResponse(in, nil); err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		if b, err := io.ReadAll(resp.Body); string(b) != "body" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	}
}

func TestABodyOfUnknownLengthIsReadNoFurtherThanAllowed(t *testing.T) {
	var runs atomic.Int32
	h := mwNew(t, keyhttp.Options{MaxBody: 10}, func(http.ResponseWriter, *http.Request) { runs.Add(1) })
	for length, status := range map[int]int{10: 200, 11: 413, 5 << 20: 413} {
		r := mwRequest(h.server.URL, fmt.Sprint("k", length), strings.Repeat("x", length))
		r.ContentLength = -1
		a := mwDo(mwClient, r)
		if length > 1<<20 && a.err != nil {
			continue // the server hangs up on who goes on sending
		}
		a.want(t, status, "")
	}
	if runs.Load() != 1 {
		t.Errorf("%d runs", runs.Load())
	}
}

func TestALostAnswerOnAKeptConnectionIsReplayedToNetHTTPsOwnRetry(t *testing.T) {
	var runs atomic.Int32
	h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		io.WriteString(w, "charged")
	})
	var cut atomic.Bool
	lossy := mwServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" && cut.CompareAndSwap(false, true) {
			h.door.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler) // the answer does not arrive
		}
		h.door.ServeHTTP(w, r)
	}))
	client := lossy.Client()
	if resp, err := client.Get(lossy.URL); err != nil {
		t.Fatal(err)
	} else {
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	runs.Store(0)
	a := mwDo(client, mwRequest(lossy.URL, "k", "order")).want(t, 200, "")
	if a.body != "charged" || !a.replayed() || runs.Load() != 1 {
		t.Errorf("%q, %d runs", a.body, runs.Load())
	}
}

func TestTrailersReachTheFirstClient(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		h := mwNew(t, keyhttp.Options{}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "X-Sum")
			io.WriteString(w, "body")
			if flushed {
				w.(http.Flusher).Flush()
			}
			w.Header().Set("X-Sum", "4")
			w.Header().Set("X-Late", "no trailer")
			w.Header().Set(http.TrailerPrefix+"X-Unannounced", "5")
		})
		first := h.post("k", "").want(t, 200, "")
		want := http.Header{"X-Sum": {"4"}, "X-Unannounced": {"5"}}
		if !maps.EqualFunc(first.trailer, want, func(a, b []string) bool { return a[0] == b[0] }) || first.header.Get("X-Late") != "" {
			t.Errorf("flushed %t: %v, %v", flushed, first.trailer, first.header)
		}
		if again := h.post("k", "").want(t, 200, ""); again.body != "body" || len(again.trailer) > 0 {
			t.Errorf("%q %v", again.body, again.trailer)
		}
	}
}
