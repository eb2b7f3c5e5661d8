package keyhttp

import (
	"encoding/json"
	"net/http"
	"time"

	"example.com/keystate"
)

// A minted key is what [Mint] answers with.
type minted struct {
	Key     string    `json:"idempotency_key"`
	Expires time.Time `json:"expires_at,omitzero"` // when it can no longer be used for the first time
}

// Mint hands out keys: mounted at POST /idempotency-keys it answers 201 with a UUIDv7 (RFC 9562), in the body and in the header
// Idempotency-Key. Life is to be the Options.KeyLife of the endpoints where the keys are used: they refuse a key that was not used
// by then. Nothing is stored: a key says itself when it was minted. Nor is it signed, for it gives no rights. The scope comes from
// the login of whoever uses it, and who makes up a time of its own for it delays nobody's expiry but its own.
func Mint(life time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m := minted{Key: keystate.NewID()}
		if life > 0 {
			m.Expires = time.Now().Add(life).UTC().Truncate(time.Second)
		}
		body, err := json.Marshal(m)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("Cache-Control", "no-store")
		h.Set(keyHeader, spell(m.Key))
		w.WriteHeader(http.StatusCreated)
		w.Write(append(body, '\n'))
	})
}
