package frameworks

import (
	"net/http"
	"strings"

	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/adaptor"
	"github.com/gofiber/fiber/v3/middleware/recover"
)

// Fiber is fasthttp, so both go through its adaptor. What is behind the middleware is an app of its own: adaptor.HTTPMiddleware runs
// the next handler only when the middleware has ended, and then there is nothing to record.
func Fiber(s Shop) *fiber.App {
	protected := fiber.New()
	protected.Post("/accounts/:account/refunds", func(c fiber.Ctx) error {
		id, err := s.Refund(c.Params("account"))
		if err != nil {
			return fiber.NewError(http.StatusPaymentRequired, err.Error())
		}
		return c.JSON(map[string]string{"refund": id})
	})
	app := fiber.New()
	app.Use(recover.New())
	app.Post("/accounts/:account/payments", fiberHandler(s.Payments))
	app.Post("/accounts/:account/refunds", fiberHandler(s.Once(adaptor.FiberApp(protected))))
	return app
}

// fiberHandler makes the route's parameters those of net/http, and the request the handler's own.
func fiberHandler(h http.Handler) fiber.Handler {
	return func(c fiber.Ctx) error {
		return adaptor.HTTPHandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r = owned(r)
			for _, name := range c.Route().Params {
				r.SetPathValue(name, strings.Clone(c.Params(name)))
			}
			h.ServeHTTP(w, r)
		})(c)
	}
}

// owned copies the strings that the adaptor lends: fasthttp writes the next request over them, and a key may be known
// to the engine for longer than its request lasts.
func owned(r *http.Request) *http.Request {
	r = r.Clone(r.Context())
	header := make(http.Header, len(r.Header))
	for name, values := range r.Header {
		for _, v := range values {
			name := strings.Clone(name)
			header[name] = append(header[name], strings.Clone(v))
		}
	}
	r.Header, r.Method, r.Host, r.RequestURI = header, strings.Clone(r.Method), strings.Clone(r.Host), strings.Clone(r.RequestURI)
	if u, err := r.URL.Parse(r.RequestURI); err == nil {
		r.URL = u
	}
	return r
}
