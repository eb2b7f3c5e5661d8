package main

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"example.com/keystate"
	"go.etcd.io/bbolt"
)

// logged writes a line for each request.
func logged(log *slog.Logger, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		seen := &statusWriter{ResponseWriter: w}
		defer func() {
			log.LogAttrs(r.Context(), slog.LevelInfo, "request",
				slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", seen.status),
				slog.String("key", strings.Trim(w.Header().Get("Idempotency-Key"), `"`)),
				slog.Bool("replayed", w.Header().Get("Idempotent-Replayed") == "true"),
				slog.String("took", time.Since(began).String()))
		}()
		h.ServeHTTP(seen, r)
	})
}

// A statusWriter remembers the status; 0: the request was not answered.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// leftovers are the keys that an earlier process left unfinished.
type leftovers struct {
	log *slog.Logger

	mu   sync.Mutex
	keys map[keystate.Key]bool
}

// find lists them. It is called before the machines are registered, since from then on they go on.
func (l *leftovers) find(ctx context.Context, e *keystate.Engine[*bbolt.Tx]) error {
	found := map[keystate.Key]bool{}
	for _, status := range []keystate.Status{keystate.Running, keystate.Waiting} {
		for r, err := range e.Keys(ctx, keystate.Filter{Status: status}) {
			if err != nil {
				return err
			}
			found[r.Key] = true
		}
	}
	l.mu.Lock()
	l.keys = found
	l.mu.Unlock()
	l.log.Info("interrupted keys resume", "keys", len(found))
	return nil
}

// observer logs how they go on.
func (l *leftovers) observer() *keystate.Observer {
	return &keystate.Observer{
		Claimed:  func(e keystate.Event) { l.tell("key resumes", e) },
		Parked:   l.end("resumed key is parked"),
		Finished: l.end("resumed key has its answer"),
	}
}

func (l *leftovers) end(what string) func(keystate.Event) {
	return func(e keystate.Event) {
		l.tell(what, e)
		l.mu.Lock()
		delete(l.keys, e.Key)
		l.mu.Unlock()
	}
}

func (l *leftovers) tell(what string, e keystate.Event) {
	l.mu.Lock()
	mine := l.keys[e.Key]
	l.mu.Unlock()
	if mine {
		l.log.Info(what, "key", e.Key, "machine", e.Machine, "point", e.Point, "attempt", e.Attempt)
	}
}
