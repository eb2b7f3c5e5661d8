package main

import (
	"context"
	"crypto/subtle"
	"net/http"
	"strings"

	"example.com/keystate/examples/internal/money"
	"example.com/keystate/keyhttp"
)

// This file is a toy: everybody's token is their name and "-secret". What is real is where it stands: who asks is settled before
// anything else, and the scope of an idempotency key comes from there, never from the request itself.

// account is where the context keeps who asks.
type account struct{}

// loggedIn lets only requests through that say who asks.
func loggedIn(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		name, ok := login(r.Header.Get("Authorization"))
		if !ok {
			w.Header().Set("WWW-Authenticate", `Bearer realm="payments"`)
			writeProblem(w, unauthorized())
			return
		}
		h(w, r.WithContext(context.WithValue(r.Context(), account{}, name)))
	}
}

func login(authorization string) (name string, ok bool) {
	scheme, token, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "", false
	}
	for name := range money.OpeningBalances {
		if subtle.ConstantTimeCompare([]byte(token), []byte(name+"-secret")) == 1 {
			return name, true
		}
	}
	return "", false
}

// caller is the account of a request that is logged in, or empty.
func caller(r *http.Request) string {
	name, _ := r.Context().Value(account{}).(string)
	return name
}

// scope keeps the keys of different accounts apart, and all of them from the receipts' keys in the same store.
func scope(r *http.Request) (string, error) {
	if caller(r) == "" {
		return "", unauthorized()
	}
	return "account/" + caller(r), nil
}

func unauthorized() *keyhttp.Problem {
	return problem(http.StatusUnauthorized, "unauthorized", "Send the header Authorization: Bearer with your account's token.")
}
