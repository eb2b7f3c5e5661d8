package keyhttp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"

	"example.com/keystate"
	"example.com/keystate/keyhttp"
	"go.etcd.io/bbolt"
)

// A Booking is the state of a machine; a booking request is what clients send.
type Booking struct {
	ID, Guest, Room string
	Payment         string // filled in by paid
}

var errFullyBooked = errors.New("the room is taken")

var bookingPhases = []keystate.Phase[*bbolt.Tx, Booking]{
	{To: "room_held", Commit: func(_ context.Context, tx *bbolt.Tx, b *Booking) error {
		rooms, err := tx.CreateBucketIfNotExists([]byte("rooms"))
		if err != nil {
			return err
		}
		if rooms.Get([]byte(b.Room)) != nil {
			return keystate.Final(errFullyBooked) // the answer, now and at every retry
		}
		return rooms.Put([]byte(b.Room), []byte(b.Guest))
	}},
	{To: keystate.Finished, Effect: func(_ context.Context, token string, b *Booking) error {
		b.Payment = "charged once" // call the bank here, with token as its idempotency key
		return nil
	}},
}

func ExampleHandle() {
	dir, err := os.MkdirTemp("", "keyhttp-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	engine, err := keystate.Open(filepath.Join(dir, "bookings.db"), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()

	bookings, err := keyhttp.Handle(engine, "booking", bookingPhases, keyhttp.Endpoint[Booking]{
		Options: keyhttp.Options{
			Scope: func(r *http.Request) (string, error) { // whoever the login says it is
				guest, _, ok := r.BasicAuth()
				if !ok {
					return "", errors.New("no login")
				}
				return "guest/" + guest, nil
			},
			CanonicalJSON: true,
		},
		Decode: func(r *http.Request) (b Booking, err error) {
			guest, _, _ := r.BasicAuth()
			b = Booking{ID: keystate.NewID(), Guest: guest}
			return b, json.NewDecoder(r.Body).Decode(&struct{ Room *string }{&b.Room})
		},
		Encode: func(w http.ResponseWriter, b Booking, err error) {
			if errors.Is(err, errFullyBooked) {
				http.Error(w, err.Error(), http.StatusConflict)
				return
			}
			w.WriteHeader(http.StatusCreated)
			fmt.Fprintf(w, "room %s for %s, %s", b.Room, b.Guest, b.Payment)
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("POST /bookings", bookings)
	server := httptest.NewServer(mux)
	defer server.Close()

	book := func(guest, key, body string) {
		r, _ := http.NewRequest(http.MethodPost, server.URL+"/bookings", strings.NewReader(body))
		r.SetBasicAuth(guest, "")
		r.Header.Set("Idempotency-Key", key)
		r.Header.Set("Content-Type", "application/json")
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			log.Fatal(err)
		}
		defer answer.Body.Close()
		text, _ := io.ReadAll(answer.Body)
		if answer.Header.Get("Content-Type") == "application/problem+json" {
			var p keyhttp.Problem
			json.Unmarshal(text, &p)
			text = []byte(p.Title)
		}
		fmt.Printf("%d, replayed: %t: %s\n", answer.StatusCode, answer.Header.Get("Idempotent-Replayed") == "true", strings.TrimSpace(string(text)))
	}
	book("ada", `"8e03978e"`, `{"room": "7"}`)
	book("ada", `8e03978e`, `{ "room":"7" }`)
	book("ada", `"8e03978e"`, `{"room": "8"}`)
	book("bob", `"8e03978e"`, `{"room": "7"}`)
	book("bob", `"8e03978e"`, `{"room": "7"}`)

	// Output:
	// 201, replayed: false: room 7 for ada, charged once
	// 201, replayed: true: room 7 for ada, charged once
	// 422, replayed: false: The idempotency key was used for another request
	// 409, replayed: false: the room is taken
	// 409, replayed: true: the room is taken
}

func ExampleMiddleware() {
	dir, err := os.MkdirTemp("", "keyhttp-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	engine, err := keystate.Open(filepath.Join(dir, "keys.db"), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()

	protect, err := keyhttp.Middleware(engine, "http", keyhttp.Options{Scope: keyhttp.Public})
	if err != nil {
		log.Fatal(err)
	}
	letters := 0
	server := httptest.NewServer(protect(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		letters++
		fmt.Fprintf(w, "letter %d", letters)
	})))
	defer server.Close()

	client := &http.Client{Transport: &keyhttp.Transport{}} // mints a key for each request, and keeps it over retries
	for _, key := range []string{"", "", `"k1"`, `"k1"`} {
		r, _ := http.NewRequest(http.MethodPost, server.URL, nil)
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		answer, err := client.Do(r)
		if err != nil {
			log.Fatal(err)
		}
		text, _ := io.ReadAll(answer.Body)
		answer.Body.Close()
		fmt.Println(string(text))
	}

	// Output:
	// letter 1
	// letter 2
	// letter 3
	// letter 3
}
