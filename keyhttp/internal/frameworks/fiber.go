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

// fiberHandler makes the route's parameters those of net/http.
func fiberHandler(h http.Handler) fiber.Handler {
	return func(c fiber.Ctx) error {
		return adaptor.HTTPHandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for _, name := range c.Route().Params {
				r.SetPathValue(name, strings.Clone(c.Params(name)))
			}
			h.ServeHTTP(w, r)
		})(c)
	}
}
