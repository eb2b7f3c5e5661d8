package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"

	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
)

// An order is the body of POST /v1/transfers.
type order struct {
	From  string `json:"from"`
	To    string `json:"to"`
	Cents int64  `json:"cents"`
}

// A task is what one key is used for.
type task struct {
	key    string // as the header has it; empty: keyhttp.Transport mints it
	minted bool   // the service mints it
	order  order
	copies int    // how often the order is sent at once
	rival  *order // another one under the same key, sent at once with it: either may get the key, but only one
	late   int    // how often it is sent again after the answer
	clash  *order // another one under the same key, after the answer
}

const (
	nobody  = "nobody"
	most    = 20_00   // of what is not to be refused
	wealthy = "grace" // whose money lasts for all that she pays
)

// plan is the same for the same seed.
func plan(seed int64, n int) []task {
	rng := rand.New(rand.NewPCG(uint64(seed), 0))
	people := slices.Sorted(maps.Keys(money.OpeningBalances))
	tasks := make([]task, n)
	for i := range tasks {
		from := people[rng.IntN(len(people))]
		to := people[rng.IntN(len(people))]
		t := task{key: fmt.Sprintf("%q", fmt.Sprintf("%016x-%d", rng.Uint64(), i)), order: order{from, to, 1 + rng.Int64N(most)}, copies: 1}
		switch kind := rng.IntN(100); {
		case kind < 3:
			t.order.To = nobody
		case kind < 6:
			t.order.Cents = 9_000_000_00
		case kind < 10:
			t.order.From, t.order.Cents = wealthy, processor.PayoutLimit+1+rng.Int64N(100)
		case kind < 14:
			t.order.To = t.order.From
		}
		other := t.order
		other.Cents++
		switch kind := rng.IntN(100); {
		case kind < 12:
			t.copies = 2 + rng.IntN(4)
		case kind < 20:
			t.rival = &other
		case kind < 30:
			t.late = 1 + rng.IntN(3)
		case kind < 35:
			t.clash = &other
		case kind < 38:
			t.copies, t.late, t.clash = 3, 2, &other
		case kind < 50:
			t.key = ""
		case kind < 55:
			t.key, t.minted = "", true
		}
		tasks[i] = t
	}
	return tasks
}

func (o order) body() string {
	text, err := json.Marshal(o)
	if err != nil {
		panic(err) // there is nothing in it that JSON cannot say
	}
	return string(text)
}

// may says whether an answer is one that an order can get: a status and the end of a problem's type.
func (o order) may(status int, kind string) bool {
	switch {
	case o.From == o.To:
		return status == 422 && kind == "invalid-transfer"
	case o.To == nobody:
		return status == 404 && kind == "unknown-payee"
	case status == 402 && kind == "insufficient-funds":
		return o.Cents > most || o.From != wealthy
	case processor.Decline(processor.Payout, processor.Order{To: o.To, Cents: o.Cents}) != "":
		return status == 402 && kind == "declined"
	}
	return status == 201 && kind == ""
}
