package frameworks

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"example.com/keystate"
	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/adaptor"
	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"
)

// What is in this file is what goes wrong without the adapters of this package, which is why there are any.

func serve(t *testing.T, h http.Handler) (refunds string) {
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL + "/accounts/ada/refunds"
}

func TestEchosOwnWrapMiddlewareRecordsAnErrorAsAnEmptySuccess(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	e := echo.New()
	e.POST("/accounts/:account/refunds", func(echo.Context) error {
		return echo.NewHTTPError(http.StatusPaymentRequired, "declined")
	}, echo.WrapMiddleware(b.Once))
	address := serve(t, e)
	ask(t, address, "order-4711")
	if retry := ask(t, address, "order-4711"); retry.status != http.StatusOK || retry.body != "" {
		t.Errorf("%+v: the trap is gone, and so may be its adapter", retry)
	}
}

func TestEchosOwnWrapMiddlewareAnswersAPanicWithAnEmptySuccess(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	e := echo.New()
	e.Logger.SetOutput(new(strings.Builder))
	e.Use(middleware.Recover())
	e.POST("/accounts/:account/refunds", func(echo.Context) error { panic("no paper") }, echo.WrapMiddleware(b.Once))
	if got := ask(t, serve(t, e), "order-4711"); got.status != http.StatusOK || got.body != "" {
		t.Errorf("%+v: the trap is gone, and so may be its adapter", got)
	}
}

func TestGinGoesOnToTheHandlerAfterAReplayUnlessItsChainIsEnded(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	e := gin.New()
	ran := 0
	e.POST("/accounts/:account/refunds", func(c *gin.Context) {
		b.Once(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { c.Next() })).ServeHTTP(c.Writer, c.Request)
	}, func(c *gin.Context) {
		ran++
		c.Status(http.StatusNoContent)
	})
	address := serve(t, e)
	for range 2 {
		ask(t, address, "order-4711")
	}
	if ran != 2 {
		t.Errorf("the handler ran %d times: the trap is gone, and so may be its adapter", ran)
	}
}

func TestGinsStatusWithoutABodyIsRecorded(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	e := gin.New()
	e.POST("/accounts/:account/refunds", ginMiddleware(b.Once), func(c *gin.Context) { c.Status(http.StatusAccepted) })
	twice(t, serve(t, e), http.StatusAccepted, "")
}

func TestFibersOwnHTTPMiddlewareRecordsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	app := fiber.New()
	app.Post("/accounts/:account/refunds", adaptor.HTTPMiddleware(b.Once), func(c fiber.Ctx) error {
		return c.Status(http.StatusPaymentRequired).SendString("declined")
	})
	address := listen(t, app) + "/accounts/ada/refunds"
	ask(t, address, "order-4711")
	if retry := ask(t, address, "order-4711"); retry.status != http.StatusOK || retry.body != "" {
		t.Errorf("%+v: the trap is gone, and so may be the app of its own", retry)
	}
}

func TestFiberKeepsOnlyTheLastOfTwoKeys(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	raw := "POST /accounts/ada/payments HTTP/1.1\r\nHost: shop\r\nAuthorization: Bearer shop-1\r\n" +
		"Idempotency-Key: a-1\r\nIdempotency-Key: a-2\r\nContent-Length: 0\r\n\r\n"
	c := dial(t, listen(t, Fiber(b.Shop)))
	if got := c.ask(t, raw); got.StatusCode != http.StatusCreated || got.Header.Get("Idempotency-Key") != "a-2" {
		t.Errorf("%s, key %s: the trap is gone", got.Status, got.Header.Get("Idempotency-Key"))
	}
}

// The engine remembers a key that is to be tried again, and fasthttp writes the next request of the connection over the memory in
// which the key came.
func TestAKeyThatFiberLentIsStillTheSameAfterTheNextRequest(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.charge = func(context.Context, string) error {
		if b.charges.Load() == 1 {
			return errors.New("the processor is busy")
		}
		return nil
	}
	request := func(path, key string) string {
		return fmt.Sprintf("POST /accounts/ada/%s HTTP/1.1\r\nHost: shop\r\nAuthorization: Bearer %s\r\n"+
			"Idempotency-Key: %s\r\nContent-Length: 0\r\n\r\n", path, key[:6], key)
	}
	c := dial(t, listen(t, Fiber(b.Shop)))
	if got := c.ask(t, request("payments", "aaaaaaaa-1111")); got.StatusCode != http.StatusServiceUnavailable {
		t.Fatalf("a payment that is to be tried again: %s", got.Status)
	}
	for range 3 {
		c.ask(t, request("nowhere!", "bbbbbbbb-2222"))
	}
	if err := b.engine.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	record, err := b.engine.Key(t.Context(), keystate.Key{Scope: "aaaaaa", ID: "aaaaaaaa-1111"})
	if err != nil || record.Point != keystate.Finished {
		t.Errorf("the payment that was to be tried again: %v, %v", record.Point, err)
	}
}

// What a handler flushes goes out while it is still running, through the adapters too.
func TestAFlushReachesTheClientBeforeTheHandlerEnds(t *testing.T) {
	t.Parallel()
	type flushing func(w http.ResponseWriter, flush func())
	for name, mount := range map[string]func(*testing.T, *bench, flushing) (address string){
		"chi": func(t *testing.T, b *bench, h flushing) string {
			r := chi.NewRouter()
			r.With(b.Once).Post("/accounts/{account}/refunds", func(w http.ResponseWriter, _ *http.Request) {
				h(w, func() { http.NewResponseController(w).Flush() })
			})
			return serve(t, r)
		},
		"echo": func(t *testing.T, b *bench, h flushing) string {
			e := echo.New()
			e.POST("/accounts/:account/refunds", func(c echo.Context) error {
				h(c.Response(), c.Response().Flush)
				return nil
			}, echoMiddleware(b.Once))
			return serve(t, e)
		},
		"fiber": func(t *testing.T, b *bench, h flushing) string {
			app := fiber.New()
			app.Post("/accounts/:account/refunds", fiberHandler(b.Once(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				h(w, func() { http.NewResponseController(w).Flush() })
			}))))
			return listen(t, app) + "/accounts/ada/refunds"
		},
		"gin": func(t *testing.T, b *bench, h flushing) string {
			e := gin.New()
			e.POST("/accounts/:account/refunds", ginMiddleware(b.Once), func(c *gin.Context) { h(c.Writer, c.Writer.Flush) })
			return serve(t, e)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, heard := newBench(t), make(chan struct{})
			address := mount(t, b, func(w http.ResponseWriter, flush func()) {
				io.WriteString(w, "first, ")
				flush()
				<-heard
				io.WriteString(w, "then")
			})
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", "Bearer shop-1")
			r.Header.Set("Idempotency-Key", "order-4711")
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			first := make([]byte, len("first, "))
			_, err = io.ReadFull(resp.Body, first)
			close(heard)
			rest, restErr := io.ReadAll(resp.Body)
			if err := errors.Join(err, restErr); err != nil || string(first) != "first, " || string(rest) != "then" {
				t.Errorf("%q, then %q, %v", first, rest, err)
			}
		})
	}
}

// A conn is a client with one connection.
type conn struct {
	net.Conn
	in *bufio.Reader
}

func dial(t *testing.T, address string) *conn {
	c, err := net.Dial("tcp", strings.TrimPrefix(address, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &conn{c, bufio.NewReader(c)}
}

func (c *conn) ask(t *testing.T, raw string) *http.Response {
	t.Helper()
	if _, err := c.Write([]byte(raw)); err != nil {
		t.Fatal(err)
	}
	r, err := http.ReadResponse(c.in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Body.Close(); err != nil {
		t.Fatal(err)
	}
	return r
}
