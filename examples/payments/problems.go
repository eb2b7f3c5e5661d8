package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/keyhttp"
)

// problemBase is where the types of this service's own problems would be explained. Those of keyhttp have a base of their own.
const problemBase = "https://example.com/payments/problems/"

var titles = map[string]string{
	"unauthorized":       "It is not known who asks",
	"not-your-account":   "The account is not yours",
	"not-json":           "The body is not JSON",
	"malformed":          "The body is not a transfer",
	"invalid-transfer":   "The transfer makes no sense",
	"insufficient-funds": "There is not enough money in the account",
	"declined":           "The processor declines the payout",
	"unknown-payee":      "There is no such payee",
	"abandoned":          "An operator has ended the transfer",
	"not-found":          "There is nothing here",
	"method-not-allowed": "The method is not allowed here",
	"unavailable":        "The service is not available",
	"internal":           "The service has a fault",
}

func problem(status int, kind, format string, args ...any) *keyhttp.Problem {
	return &keyhttp.Problem{Type: problemBase + kind, Title: titles[kind], Status: status, Detail: fmt.Sprintf(format, args...)}
}

func writeProblem(w http.ResponseWriter, p *keyhttp.Problem) {
	writeJSON(w, p.Status, "application/problem+json", p)
}

func writeJSON(w http.ResponseWriter, status int, contentType string, v any) {
	text, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(append(text, '\n'))
}

// refusal is the answer to a transfer that ended without a payout. It is stored like any other.
func refusal(t money.Transfer, err error) *keyhttp.Problem {
	var unknown *money.UnknownAccountError
	var abandoned *keystate.FinalError
	switch {
	case errors.As(err, &unknown):
		return problem(http.StatusNotFound, "unknown-payee", "There is no account %q.", unknown.Name)
	case errors.Is(err, money.ErrInsufficientFunds):
		return problem(http.StatusPaymentRequired, "insufficient-funds", "The account holds less than %s.", money.Text(t.Cents))
	case errors.Is(err, money.ErrSamePayee), errors.Is(err, money.ErrAmount):
		return problem(http.StatusUnprocessableEntity, "invalid-transfer", "The transfer is refused: %v.", err)
	case errors.As(err, &abandoned):
		return problem(http.StatusInternalServerError, "abandoned", "%s", abandoned.Reason)
	case err != nil:
		return problem(http.StatusInternalServerError, "internal", "The transfer ended with a fault.")
	}
	p := problem(http.StatusPaymentRequired, "declined", "The processor declines: %s. The money is back in the account.", t.Declined)
	p.Instance = transfersPath + t.ID
	return p
}
