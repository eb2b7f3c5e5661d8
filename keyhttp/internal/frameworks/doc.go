// Package frameworks mounts keyhttp under the routers and frameworks that Go programs use. Each file is what a program
// needs of its own: a machine at POST /accounts/{account}/payments, and a handler of the framework's own kind, protected,
// at POST /accounts/{account}/refunds.
package frameworks

import (
	"errors"
	"net/http"
)

// A Shop is what the routes lead to.
type Shop struct {
	Payments http.Handler                    // a [keyhttp.Handler], whose Decode asks for r.PathValue("account")
	Once     func(http.Handler) http.Handler // made by [keyhttp.Middleware]
	Refund   func(account string) (id string, err error)
}

// ErrDeclined is a refund that is not to be had: status 402.
var ErrDeclined = errors.New("the refund is declined")
