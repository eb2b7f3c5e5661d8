package httpbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"example.com/keystate"
	"example.com/keystate/keyhttp"
	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/idempotency"
	"go.etcd.io/bbolt"
)

// The request that all of them answer: two local writes of 200 bytes with an effect between them that does nothing, full fsync, and an
// answer of some 300 bytes. The handler behind a middleware does nothing but answer.

type order struct {
	Account string
	Cents   int64
	Payout  string
}

var (
	orders     = []byte("orders")
	localWrite = make([]byte, 200)
	receipt    = strings.Repeat("r", 200)
)

var phases = []keystate.Phase[*bbolt.Tx, order]{
	{To: "funds_reserved", Commit: write("/reserved")},
	{To: "payout_sent", Effect: func(_ context.Context, token string, s *order) error {
		s.Payout = token[:8]
		return nil
	}},
	{To: keystate.Finished, Commit: write("/settled")},
}

func write(suffix string) func(context.Context, *bbolt.Tx, *order) error {
	return func(ctx context.Context, tx *bbolt.Tx, _ *order) error {
		return tx.Bucket(orders).Put([]byte(keystate.KeyOf(ctx).ID+suffix), localWrite)
	}
}

// answer is what a request is answered with.
func answer(s order) []byte {
	b, err := json.Marshal(map[string]any{"account": s.Account, "cents": s.Cents, "payout": s.Payout, "receipt": receipt})
	if err != nil {
		panic(err)
	}
	return b
}

var fixedAnswer = answer(order{"ada", 500, "12345678"})

func sendAnswer(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	w.Write(body)
}

// plain is the handler without keys: it reads its request and answers from memory.
func plain(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	sendAnswer(w, fixedAnswer)
}

func account(r *http.Request) (string, error) {
	name, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return "", errors.New("who asks?")
	}
	return name, nil
}

func open(tb testing.TB, name string) *keystate.Engine[*bbolt.Tx] {
	tb.Helper()
	engine, err := keystate.Open(filepath.Join(directory(tb), name), nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := engine.Close(); err != nil {
			tb.Error(err)
		}
	})
	err = engine.Update(context.Background(), func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket(orders)
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return engine
}

// directory is on the disk that KEYSTATE_BENCH_DIR names, or that holds temporary files.
func directory(tb testing.TB) string {
	tb.Helper()
	at := os.Getenv("KEYSTATE_BENCH_DIR")
	if at == "" {
		return tb.TempDir()
	}
	d, err := os.MkdirTemp(at, "httpbench")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(d) })
	return d
}

func handler(tb testing.TB) http.Handler {
	tb.Helper()
	h, err := keyhttp.Handle(open(tb, "handle.db"), "order", phases, keyhttp.Endpoint[order]{
		Options: keyhttp.Options{Scope: account},
		Decode: func(r *http.Request) (s order, err error) {
			err = json.NewDecoder(r.Body).Decode(&s)
			return s, err
		},
		Encode: func(w http.ResponseWriter, s order, err error) {
			if err != nil {
				http.Error(w, err.Error(), http.StatusPaymentRequired)
				return
			}
			sendAnswer(w, answer(s))
		},
	})
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

func protected(tb testing.TB) http.Handler {
	tb.Helper()
	once, err := keyhttp.Middleware(open(tb, "middleware.db"), "order", keyhttp.Options{Scope: account})
	if err != nil {
		tb.Fatal(err)
	}
	return once(http.HandlerFunc(plain))
}

// serve listens on a loopback and returns the address.
func serve(tb testing.TB, h http.Handler) string {
	tb.Helper()
	l := listen(tb)
	server := &http.Server{Handler: h}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	tb.Cleanup(func() {
		server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			tb.Error(err)
		}
	})
	return l.Addr().String()
}

func listen(tb testing.TB) net.Listener {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

// serveFiber is fiber with its own middleware, as it comes: its storage is this process's memory.
func serveFiber(tb testing.TB) string {
	tb.Helper()
	app := fiber.New()
	app.Post("/orders", idempotency.New(), func(c fiber.Ctx) error {
		c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
		return c.Status(http.StatusCreated).Send(fixedAnswer)
	})
	l := listen(tb)
	served := make(chan error, 1)
	go func() { served <- app.Listener(l, fiber.ListenConfig{DisableStartupMessage: true}) }()
	tb.Cleanup(func() {
		if err := errors.Join(app.Shutdown(), <-served); err != nil {
			tb.Error(err)
		}
	})
	return l.Addr().String()
}

const body = `{"Account":"ada","Cents":500}`

// request appends a request under the key.
func request(out []byte, keyName, key string) []byte {
	return fmt.Appendf(out, "POST /orders HTTP/1.1\r\nHost: shop\r\nAuthorization: Bearer ada\r\n"+
		"Content-Type: application/json\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", keyName, key, len(body), body)
}

const (
	keyName      = "Idempotency-Key"
	keyNameFiber = "X-Idempotency-Key"
)

// fresh asks under a new key each time.
func fresh(name, address, keyName string) contender {
	return contender{name, func(tb testing.TB) caller {
		return dial(tb, address, http.StatusCreated, false, func(out []byte) []byte { return request(out, keyName, keystate.NewID()) })
	}}
}

// again asks under keys that are finished.
func again(tb testing.TB, name, address, keyName string, replayed bool) contender {
	const keys = 1000
	requests := make([][]byte, keys)
	var wg sync.WaitGroup
	for part := range 50 {
		wg.Go(func() {
			var next []byte
			l := dial(tb, address, http.StatusCreated, false, func(out []byte) []byte { return append(out, next...) })
			defer l.hangUp()
			for i := part; i < keys; i += 50 {
				requests[i] = request(nil, keyName, keystate.NewID())
				next = requests[i]
				if err := l.ask(); err != nil {
					tb.Error(err)
				}
			}
		})
	}
	wg.Wait()
	return contender{name, func(tb testing.TB) caller {
		i := 0
		return dial(tb, address, http.StatusCreated, replayed, func(out []byte) []byte {
			i++
			return append(out, requests[(i*619)%keys]...)
		})
	}}
}

// bare is the machine without HTTP, in this process.
func bare(tb testing.TB) contender {
	tb.Helper()
	m, err := keystate.Register(open(tb, "bare.db"), "order", phases)
	if err != nil {
		tb.Fatal(err)
	}
	return contender{"the bare machine, in process", func(testing.TB) caller { return inProcess{m} }}
}

type inProcess struct{ m *keystate.Machine[order] }

func (c inProcess) ask() error {
	s, err := c.m.Do(context.Background(), keystate.Key{Scope: "ada", ID: keystate.NewID()}, order{Account: "ada", Cents: 500})
	if err == nil && s.Payout == "" {
		return errors.New("the machine is finished without its payout")
	}
	return err
}

func (inProcess) hangUp() {}
