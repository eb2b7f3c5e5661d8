package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"

	"example.com/keystate"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/keyhttp"
	"go.etcd.io/bbolt"
)

//go:embed openapi.json
var openAPI []byte

const transfersPath = "/v1/transfers/"

// A route is one operation of openapi.json.
type route struct {
	method, path string
	serve        http.HandlerFunc
}

func (s *service) routes() []route {
	return []route{
		{"POST", "/idempotency-keys", keyhttp.Mint(keyLife).ServeHTTP},
		{"POST", "/v1/transfers", loggedIn(s.transfers.ServeHTTP)},
		{"GET", "/v1/transfers/{id}", loggedIn(s.getTransfer)},
		{"GET", "/v1/accounts/{id}", loggedIn(s.getAccount)},
		{"GET", "/healthz", s.getHealth},
		{"GET", "/openapi.json", getOpenAPI},
	}
}

func (s *service) handler() http.Handler {
	mux := http.NewServeMux()
	for _, r := range s.routes() {
		mux.HandleFunc(r.method+" "+r.path, r.serve)
	}
	return logged(s.log, problemsOf(mux))
}

// problemsOf answers what is not routed with a problem, as everything else that is wrong.
func problemsOf(mux *http.ServeMux) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h, pattern := mux.Handler(r)
		if pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		unrouted := &statusWriter{ResponseWriter: headerOnly{w.Header()}}
		h.ServeHTTP(unrouted, r)
		if unrouted.status == http.StatusMethodNotAllowed {
			writeProblem(w, problem(unrouted.status, "method-not-allowed", "%s takes %s.", r.URL.Path, w.Header().Get("Allow")))
			return
		}
		writeProblem(w, problem(http.StatusNotFound, "not-found", "There is nothing at %s.", r.URL.Path))
	}
}

// headerOnly keeps of an answer what its headers say.
type headerOnly struct{ header http.Header }

func (h headerOnly) Header() http.Header         { return h.header }
func (h headerOnly) Write(b []byte) (int, error) { return len(b), nil }
func (h headerOnly) WriteHeader(int)             {}

// A transferRequest is the body of POST /v1/transfers.
type transferRequest struct {
	From  string `json:"from"`
	To    string `json:"to"`
	Cents int64  `json:"cents"`
}

// decodeTransfer reads a request that has not been seen before. What it refuses is not stored: the key is still free.
func decodeTransfer(r *http.Request) (t money.Transfer, err error) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return t, problem(http.StatusUnsupportedMediaType, "not-json", "Send the transfer as application/json.")
	}
	var asked transferRequest
	body := json.NewDecoder(r.Body)
	body.DisallowUnknownFields()
	err = body.Decode(&asked)
	if err == nil && !errors.Is(body.Decode(new(any)), io.EOF) {
		err = errors.New("there is more than one JSON value")
	}
	switch {
	case err != nil:
		return t, problem(http.StatusBadRequest, "malformed", "The body is not a transfer: %v.", err)
	case asked.From == "" || asked.To == "":
		return t, problem(http.StatusUnprocessableEntity, "invalid-transfer", "A transfer needs from and to.")
	case asked.Cents <= 0:
		return t, problem(http.StatusUnprocessableEntity, "invalid-transfer", "The amount must be positive: a whole number of cents.")
	case asked.From != caller(r):
		return t, problem(http.StatusForbidden, "not-your-account", "You can pay from the account %q only.", caller(r))
	}
	return money.Transfer{ID: keystate.NewID(), From: asked.From, To: asked.To, Cents: asked.Cents}, nil
}

// A transferAnswer is a transfer as clients see it.
type transferAnswer struct {
	ID     string `json:"id"`
	From   string `json:"from"`
	To     string `json:"to"`
	Cents  int64  `json:"cents"`
	Status string `json:"status"`
	Payout string `json:"payout,omitempty"`
	Reason string `json:"reason,omitempty"` // of a decline
}

func writeTransfer(w http.ResponseWriter, status int, t money.Transfer) {
	writeJSON(w, status, "application/json", transferAnswer{
		ID: t.ID, From: t.From, To: t.To, Cents: t.Cents, Status: t.Status, Payout: t.Payout, Reason: t.Declined,
	})
}

// encodeTransfer writes the answer to a transfer that has come to its end: 201 only if the payee has the money.
func encodeTransfer(w http.ResponseWriter, t money.Transfer, err error) {
	if err != nil || t.Declined != "" {
		writeProblem(w, refusal(t, err))
		return
	}
	w.Header().Set("Location", transfersPath+t.ID)
	writeTransfer(w, http.StatusCreated, t)
}

func (s *service) getTransfer(w http.ResponseWriter, r *http.Request) {
	var t money.Transfer
	var found bool
	err := s.engine.View(r.Context(), func(tx *bbolt.Tx) (err error) {
		t, found, err = money.Find(tx, r.PathValue("id"))
		return err
	})
	switch {
	case err != nil:
		s.writeFault(w, r, err)
	case !found || t.From != caller(r): // whose else it is, is nobody's business
		writeProblem(w, problem(http.StatusNotFound, "not-found", "You have no transfer %q.", r.PathValue("id")))
	default:
		writeTransfer(w, http.StatusOK, t)
	}
}

// An accountAnswer is an account as its owner sees it.
type accountAnswer struct {
	ID    string `json:"id"`
	Cents int64  `json:"cents"`
}

func (s *service) getAccount(w http.ResponseWriter, r *http.Request) {
	if r.PathValue("id") != caller(r) {
		writeProblem(w, problem(http.StatusForbidden, "not-your-account", "You can look into the account %q only.", caller(r)))
		return
	}
	a := accountAnswer{ID: caller(r)}
	err := s.engine.View(r.Context(), func(tx *bbolt.Tx) error {
		var found bool
		if a.Cents, found = money.Balance(tx, a.ID); !found {
			return fmt.Errorf("the books have no account %q", a.ID)
		}
		return nil
	})
	if err != nil {
		s.writeFault(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, "application/json", a)
}

// A healthAnswer says that the store answers, and what is left to do in it.
type healthAnswer struct {
	Status     string `json:"status"`
	Unfinished uint64 `json:"unfinished"`
	Parked     uint64 `json:"parked"`
}

func (s *service) getHealth(w http.ResponseWriter, r *http.Request) {
	stats, err := s.engine.Stats(r.Context())
	if err != nil {
		s.writeFault(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, "application/json", healthAnswer{"ok", stats.Running + stats.Waiting, stats.Parked})
}

func getOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	io.Copy(w, bytes.NewReader(openAPI))
}

// writeFault tells of an error that is not the client's. What it is, stands in the log.
func (s *service) writeFault(w http.ResponseWriter, r *http.Request, err error) {
	s.log.ErrorContext(r.Context(), "request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	writeProblem(w, problem(http.StatusServiceUnavailable, "unavailable", "The store does not answer. Ask again later."))
}
