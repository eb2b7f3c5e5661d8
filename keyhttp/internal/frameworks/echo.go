package frameworks

import (
	"net/http"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"
)

// Echo needs an adapter for each: echo.WrapHandler keeps the parameters to itself, and echo.WrapMiddleware the errors.
func Echo(s Shop) http.Handler {
	e := echo.New()
	e.Use(middleware.Recover())
	e.POST("/accounts/:account/payments", echoHandler(s.Payments))
	e.POST("/accounts/:account/refunds", func(c echo.Context) error {
		id, err := s.Refund(c.Param("account"))
		if err != nil {
			return echo.NewHTTPError(http.StatusPaymentRequired, err.Error())
		}
		return c.JSON(http.StatusOK, map[string]string{"refund": id})
	}, echoMiddleware(s.Once))
	return e
}

// echoHandler makes the route's parameters those of net/http.
func echoHandler(h http.Handler) echo.HandlerFunc {
	return func(c echo.Context) error {
		for _, name := range c.ParamNames() {
			c.Request().SetPathValue(name, c.Param(name))
		}
		h.ServeHTTP(c.Response(), c.Request())
		return nil
	}
}

// echoMiddleware answers an error while the answer is being recorded, and not after it has been taken for an empty 200;
// and it gives the context its own response back, so that a panic can be answered.
func echoMiddleware(once func(http.Handler) http.Handler) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			request, response := c.Request(), c.Response()
			defer func() {
				c.SetRequest(request)
				c.SetResponse(response)
			}()
			once(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c.SetRequest(r)
				c.SetResponse(echo.NewResponse(w, c.Echo()))
				if err := next(c); err != nil {
					c.Error(err)
				}
			})).ServeHTTP(response, request)
			return nil
		}
	}
}
