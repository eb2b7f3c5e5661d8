package keyhttp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// taped lets a handler write to a tape, and sends what it recorded as Middleware does.
func taped(limit int, h http.HandlerFunc, look func(*tape)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tape := newTape(w, limit)
		h(tape.writer(), r)
		tape.finish()
		if look != nil {
			look(tape)
		}
		tape.send()
	})
}

// mwServers are a server of HTTP/1.1 and one of HTTP/2.
func mwServers(t *testing.T, h http.Handler) map[string]*httptest.Server {
	t.Helper()
	plain, secure := httptest.NewUnstartedServer(h), httptest.NewUnstartedServer(h)
	secure.EnableHTTP2 = true
	for _, s := range []*httptest.Server{plain, secure} {
		s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	}
	plain.Start()
	secure.StartTLS()
	t.Cleanup(plain.Close)
	t.Cleanup(secure.Close)
	return map[string]*httptest.Server{"HTTP/1.1": plain, "HTTP/2": secure}
}

type mwGot struct {
	status  int
	header  http.Header
	trailer http.Header
	body    string
	err     error
}

func mwGet(s *httptest.Server) (g mwGot) {
	resp, err := s.Client().Post(s.URL, "text/plain", strings.NewReader("x"))
	if err != nil {
		return mwGot{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return mwGot{resp.StatusCode, resp.Header, resp.Trailer, string(body), err}
}

// mwAbilities are what a ResponseWriter can do, by itself and by way of a ResponseController.
func mwAbilities(w http.ResponseWriter) []string {
	var found []string
	note := func(name string, can bool) {
		if can {
			found = append(found, name)
		}
	}
	_, is := w.(http.Flusher)
	note("Flusher", is)
	_, is = w.(interface{ FlushError() error })
	note("FlushError", is)
	_, is = w.(http.Hijacker)
	note("Hijacker", is)
	_, is = w.(http.Pusher)
	note("Pusher", is)
	_, is = w.(interface{ CloseNotify() <-chan bool })
	note("CloseNotifier", is)
	_, is = w.(io.ReaderFrom)
	note("ReaderFrom", is)
	_, is = w.(io.StringWriter)
	note("StringWriter", is)
	rc := http.NewResponseController(w)
	for _, c := range []struct {
		name string
		err  error
	}{
		{"SetReadDeadline", rc.SetReadDeadline(time.Time{})},
		{"SetWriteDeadline", rc.SetWriteDeadline(time.Time{})},
		{"EnableFullDuplex", rc.EnableFullDuplex()},
		{"Flush", rc.Flush()},
	} {
		note(c.name, !errors.Is(c.err, http.ErrNotSupported))
	}
	return found
}

// An mwPlain hides what a ResponseWriter can do; an mwWrapped lets a ResponseController find it.
type mwPlain struct{ http.ResponseWriter }

type mwWrapped struct{ http.ResponseWriter }

func (w mwWrapped) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// An mwStreaming is a wrapper that passes Flush on, as most do.
type mwStreaming struct{ mwWrapped }

func (w mwStreaming) Flush() { w.ResponseWriter.(http.Flusher).Flush() }

// An mwFlushError has the newer of the two methods only.
type mwFlushError struct{ mwPlain }

func (w mwFlushError) FlushError() error { return http.NewResponseController(w.ResponseWriter).Flush() }

var mwWrappers = map[string]func(http.ResponseWriter) http.ResponseWriter{
	"the server's own":          func(w http.ResponseWriter) http.ResponseWriter { return w },
	"one that hides everything": func(w http.ResponseWriter) http.ResponseWriter { return mwPlain{w} },
	"one before one that hides": func(w http.ResponseWriter) http.ResponseWriter { return mwWrapped{mwPlain{w}} },
	"one that is unwrapped":     func(w http.ResponseWriter) http.ResponseWriter { return mwWrapped{w} },
	"one that streams":          func(w http.ResponseWriter) http.ResponseWriter { return mwStreaming{mwWrapped{w}} },
	"two that are unwrapped":    func(w http.ResponseWriter) http.ResponseWriter { return mwWrapped{mwWrapped{w}} },
	"one with FlushError":       func(w http.ResponseWriter) http.ResponseWriter { return mwFlushError{mwPlain{w}} },
}

func TestATapeCanDoWhatTheServersWriterCan(t *testing.T) {
	for name, wrap := range mwWrappers {
		abilities := make(chan []string, 1)
		look := func(w http.ResponseWriter, r *http.Request) { abilities <- mwAbilities(w) }
		h := func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/without" {
				look(wrap(w), r)
				return
			}
			taped(100, look, nil).ServeHTTP(wrap(w), r)
		}
		for proto, s := range mwServers(t, http.HandlerFunc(h)) {
			ask := func(path string) []string {
				resp, err := s.Client().Get(s.URL + path)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				return <-abilities
			}
			without, with := ask("/without"), ask("/with")
			if len(without) == 0 && !strings.Contains(name, "hides") || !slices.Equal(without, with) {
				t.Errorf("%s, %s: without %v, with %v", proto, name, without, with)
			}
		}
	}
}

func TestWhateverWrapsTheWriterAFlushLetsTheWholeAnswerThrough(t *testing.T) {
	for name, wrap := range mwWrappers {
		live := make(chan bool, 1)
		inner := taped(100, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Set", "yes")
			w.WriteHeader(http.StatusCreated)
			io.WriteString(w, "one ")
			http.NewResponseController(w).Flush()
			io.WriteString(w, "two")
		}, func(tape *tape) { live <- tape.live() })
		for proto, s := range mwServers(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { inner.ServeHTTP(wrap(w), r) })) {
			g := mwGet(s)
			if g.err != nil || g.status != 201 || g.body != "one two" || g.header.Get("X-Set") != "yes" {
				t.Errorf("%s, %s: %+v", proto, name, g)
			}
			if live := <-live; live == strings.Contains(name, "hides") {
				t.Errorf("%s, %s: live %t", proto, name, live)
			}
		}
	}
}

func TestWhateverWrapsTheWriterAHijackIsKnown(t *testing.T) {
	for name, wrap := range mwWrappers {
		type seen struct {
			live   bool
			status int
		}
		recorded := make(chan seen, 1)
		inner := taped(100, func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 299 Mine\r\nContent-Length: 4\r\n\r\nmine")
			if _, err := w.Write([]byte("x")); !errors.Is(err, http.ErrHijacked) {
				t.Errorf("%s: %v", name, err)
			}
		}, func(tape *tape) {
			status, _, _, _ := tape.recorded()
			recorded <- seen{tape.live(), status}
		})
		s := mwServers(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { inner.ServeHTTP(wrap(w), r) }))["HTTP/1.1"]
		g, tape := mwGet(s), <-recorded
		if strings.Contains(name, "hides") || strings.Contains(name, "FlushError") {
			if g.status != 200 || tape.live {
				t.Errorf("%s: %+v, %+v", name, g, tape)
			}
			continue
		}
		if g.status != 299 || g.body != "mine" || tape != (seen{true, http.StatusSwitchingProtocols}) {
			t.Errorf("%s: %+v, %+v", name, g, tape)
		}
	}
}

// What net/http does with an answer, it does with one from a tape: the same handlers, with and without.
func TestAnAnswerFromATapeIsWhatNetHTTPMakesOfIt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte(strings.Repeat("<html>", 10_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		h    http.HandlerFunc
	}{
		{"nothing", func(w http.ResponseWriter, r *http.Request) {}},
		{"a status only", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(202) }},
		{"204", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) }},
		{"304 with a body", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(304)
			if _, err := io.WriteString(w, "x"); !errors.Is(err, http.ErrBodyNotAllowed) {
				t.Error(err)
			}
		}},
		{"204 with an empty body", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(204)
			w.Write(nil)
		}},
		{"a type that is sniffed", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }},
		{"no type", func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Content-Type"] = nil
			io.WriteString(w, "<html>")
		}},
		{"no type of what is encoded", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "br")
			io.WriteString(w, "<html>")
		}},
		{"no type of what is flushed before it is known", func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			io.WriteString(w, "<html>")
		}},
		{"WriteHeader twice", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(201)
			w.Header().Set("X-Late", "yes")
			w.WriteHeader(500)
			io.WriteString(w, "x")
		}},
		{"WriteHeader after Write", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "x")
			w.WriteHeader(500)
		}},
		{"a file", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) }},
		{"a file by io.Copy", func(w http.ResponseWriter, r *http.Request) {
			f, err := os.Open(file)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			if n, err := io.Copy(w, f); n != 60_000 || err != nil {
				t.Error(n, err)
			}
		}},
		{"a string", func(w http.ResponseWriter, r *http.Request) { w.(io.StringWriter).WriteString("text") }},
		{"Content-Length", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "4")
			io.WriteString(w, "abcd")
		}},
		{"Content-Length too large", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "4")
			io.WriteString(w, "ab")
		}},
		{"Content-Length that is none", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "many")
			io.WriteString(w, "ab")
		}},
		{"an outer header taken away", func(w http.ResponseWriter, r *http.Request) { w.Header().Del("X-Outer") }},
		{"a body beyond the limit", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/x")
			for range 100 {
				io.WriteString(w, strings.Repeat("y", 1000))
			}
		}},
		{"a body beyond the limit at once", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, strings.Repeat("y", 100_000)) }},
		{"trailers", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "X-A, x-b")
			io.WriteString(w, "x")
			w.Header().Set("X-A", "a")
			w.Header().Set("X-B", "b")
			w.Header().Set("X-C", "c")
			w.Header().Set(http.TrailerPrefix+"X-D", "d")
		}},
		{"103 after the status", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(201)
			w.Header().Set("Link", "</a>")
			w.WriteHeader(103)
		}},
		{"103 and a header less", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</a>")
			w.WriteHeader(103)
			w.Header().Del("Link")
		}},
	} {
		outer := func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Outer", "yes")
				h.ServeHTTP(w, r)
			})
		}
		without, with := mwServers(t, outer(c.h)), mwServers(t, outer(taped(70_000, c.h, nil)))
		for proto := range without {
			a, b := mwGet(without[proto]), mwGet(with[proto])
			for _, g := range []mwGot{a, b} {
				g.header.Del("Date")
			}
			if a.status != b.status || a.body != b.body || (a.err == nil) != (b.err == nil) ||
				fmt.Sprint(a.header, a.trailer) != fmt.Sprint(b.header, b.trailer) {
				t.Errorf("%s, %s:\nwithout %d %v %v %.50q %v\nwith    %d %v %v %.50q %v", c.name, proto,
					a.status, a.header, a.trailer, a.body, a.err, b.status, b.header, b.trailer, b.body, b.err)
			}
		}
	}
}

func TestABodyEndsWhereItsLengthSays(t *testing.T) {
	h := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "4")
		if n, err := io.WriteString(w, "ab"); n != 2 || err != nil {
			t.Error(n, err)
		}
		if n, err := io.WriteString(w, "cdef"); n != 0 || !errors.Is(err, http.ErrContentLength) {
			t.Error(n, err)
		}
	}
	without := mwGet(mwServers(t, http.HandlerFunc(h))["HTTP/1.1"]) // HTTP/2's sends what is too much
	with := mwGet(mwServers(t, taped(100, h, nil))["HTTP/1.1"])
	if without.body != with.body || without.err == nil || with.err == nil {
		t.Errorf("%+v, %+v", without, with)
	}
}

func TestAnAnswerThatIsShorterThanItSaysIsNotKept(t *testing.T) {
	whole := make(chan bool, 1)
	s := mwServers(t, taped(100, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "10")
		io.WriteString(w, "ab") // such as when it copies from somebody who breaks off
	}, func(tape *tape) {
		_, _, _, all := tape.recorded()
		whole <- all
	}))["HTTP/1.1"]
	if g := mwGet(s); g.err == nil || <-whole {
		t.Errorf("%+v", g)
	}
}

func TestAStatusThatIsNonePanicsInTheHandler(t *testing.T) {
	for _, status := range []int{-1, 0, 99, 1000} {
		for name, w := range map[string]http.ResponseWriter{
			"tape": newTape(httptest.NewRecorder(), 10).writer(), "recorder": newRecorder(),
		} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%s took %d", name, status)
					}
				}()
				w.WriteHeader(status)
			}()
		}
	}
}

func TestEarlyHintsGoOutAtOnce(t *testing.T) {
	for proto, s := range mwServers(t, taped(100, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("X-Final", "yes")
		w.WriteHeader(http.StatusAccepted)
		w.WriteHeader(http.StatusEarlyHints) // too late
	}, nil)) {
		var hints []textproto.MIMEHeader
		r, err := http.NewRequest("POST", s.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		r = r.WithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			if code == http.StatusEarlyHints {
				hints = append(hints, h)
			}
			return nil
		}}))
		resp, err := s.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if len(hints) != 1 || hints[0].Get("Link") == "" || hints[0].Get("X-Final") != "" || resp.StatusCode != 202 || resp.Header.Get("X-Final") != "yes" {
			t.Errorf("%s: %v, %d %v", proto, hints, resp.StatusCode, resp.Header)
		}
	}
}

func TestWhatWasHintedIsNoPartOfAnotherAnswer(t *testing.T) {
	w := httptest.NewRecorder()
	tape := newTape(w, 100)
	tape.writer().Header().Set("Link", "</style.css>; rel=preload")
	tape.writer().WriteHeader(http.StatusEarlyHints)
	if len(w.Header()) != 0 {
		t.Errorf("%v", w.Header())
	}
}

func TestUpgradesAreAnswersThatAreNotKept(t *testing.T) {
	recorded := make(chan string, 1)
	s := mwServers(t, taped(100, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Upgrade", "mine")
		w.Header().Set("Connection", "Upgrade")
		w.WriteHeader(http.StatusSwitchingProtocols)
	}, func(tape *tape) {
		status, _, _, whole := tape.recorded()
		recorded <- fmt.Sprint(status, " ", whole)
	}))["HTTP/1.1"]
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: Upgrade\r\nUpgrade: mine\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "mine" {
		t.Errorf("%+v, %v", resp, err)
	}
	if r := <-recorded; r != "101 false" {
		t.Errorf("recorded as %s", r)
	}
}

func TestAReplayHasTheTypeThatTheFirstAnswerHad(t *testing.T) {
	for _, h := range []http.Header{nil, {"Content-Type": {"text/x"}}, {"Content-Encoding": {"br"}}} {
		stored := Response{Status: 200, Header: h, Body: []byte("<html>")}
		for proto, s := range mwServers(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { stored.send(w) })) {
			g := mwGet(s)
			if got, want := g.header.Get("Content-Type"), h.Get("Content-Type"); g.err != nil || got != want {
				t.Errorf("%s: type %q, want %q (%v)", proto, got, want, g.err)
			}
		}
	}
}

func TestATapeSendsNoEmptyWrites(t *testing.T) {
	w := &mwCounting{ResponseWriter: httptest.NewRecorder()}
	tape := newTape(w, 10)
	tape.writer().WriteHeader(http.StatusNoContent)
	tape.finish()
	tape.send()
	if w.writes != 0 {
		t.Errorf("%d writes for an answer without a body", w.writes)
	}
}

type mwCounting struct {
	http.ResponseWriter
	writes int
}

func (w *mwCounting) Write(b []byte) (int, error) { w.writes++; return w.ResponseWriter.Write(b) }

// A compressing writer, for example, writes its header late, and changes it then: what the handler has set after its
// own header was written must not come back.
func TestNothingButTrailersIsChangedAfterTheHeader(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		w := httptest.NewRecorder()
		tape := newTape(w, 100)
		h := tape.writer()
		h.Header().Set("Content-Length", "4")
		io.WriteString(h, "body")
		if flushed {
			h.(http.Flusher).Flush()
			w.Header().Del("Content-Length") // by what stands in between
		}
		h.Header().Set("X-Late", "yes")
		tape.finish()
		tape.send()
		if w.Header().Get("X-Late") != "" || flushed && w.Header().Get("Content-Length") != "" {
			t.Errorf("flushed %t: %v", flushed, w.Header())
		}
	}
}

// A mwSlowContext has ended, and says so when it is let.
type mwSlowContext struct {
	context.Context
	let chan struct{}
}

func (c mwSlowContext) Err() error {
	<-c.let
	return context.Canceled
}

// The run of another request may call a request's handler while that one has not begun its own, and then fails to.
func TestARequestIsNotLeftWhileItsHandlerRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := keystate.Open(filepath.Join(t.TempDir(), "store.db"), &keystate.Options{Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		g := mwGuard(t, e)
		ask := func(ctx context.Context, h http.HandlerFunc) <-chan *httptest.ResponseRecorder {
			got := make(chan *httptest.ResponseRecorder, 1)
			go func() {
				r := httptest.NewRequestWithContext(ctx, "POST", "/", strings.NewReader("x"))
				r.Header.Set("Idempotency-Key", "k")
				w := httptest.NewRecorder()
				g.serve(w, r, h)
				got <- w
			}()
			synctest.Wait()
			return got
		}
		ctx, goOn := mwSlowContext{t.Context(), make(chan struct{})}, make(chan struct{})
		slow := ask(ctx, func(w http.ResponseWriter, r *http.Request) {
			<-goOn
			io.WriteString(w, "done")
		})
		quick := ask(t.Context(), func(http.ResponseWriter, *http.Request) { t.Error("two handlers ran") })
		close(ctx.let)
		synctest.Wait()
		select {
		case w := <-slow:
			t.Errorf("its writer was taken from the handler: %d", w.Code)
		default:
		}
		close(goOn)
		if w := <-quick; w.Code != 200 || w.Body.String() != "done" {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		<-slow
	})
}

// Whatever comes in and however it ends, no request stays on offer.
func TestNoOfferIsLeftBehind(t *testing.T) {
	e, err := keystate.Open(filepath.Join(t.TempDir(), "store.db"), &keystate.Options{Logger: slog.New(slog.DiscardHandler), MaxRuns: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	g := mwGuard(t, e)
	var all sync.WaitGroup
	var answers atomic.Int32
	for i := range 200 {
		all.Go(func() {
			defer func() { _ = recover() }()
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%5)*time.Millisecond)
			defer cancel()
			if i%2 == 0 {
				ctx = t.Context()
			}
			r := httptest.NewRequestWithContext(ctx, "POST", "/", strings.NewReader("x"))
			r.Header.Set("Idempotency-Key", fmt.Sprint("k", i%4))
			w := httptest.NewRecorder()
			g.serve(w, r, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch i % 7 {
				case 0, 1, 2:
					w.WriteHeader(http.StatusTooManyRequests)
				case 3, 4:
					panic("boom")
				default:
					http.Error(w, "no", http.StatusBadGateway)
				}
			}))
			answers.Add(1)
		})
	}
	all.Wait()
	if answers.Load() == 0 {
		t.Error("no answers")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.offers) != 0 || len(g.taken) != 0 {
		t.Errorf("%d offers are left, and %d that were taken up", len(g.offers), len(g.taken))
	}
}

func mwGuard(t *testing.T, e *keystate.Engine[*bbolt.Tx]) *guard {
	t.Helper()
	g, err := newGuard(e, "test", Options{Scope: Public, Wait: time.Second, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return g
}
