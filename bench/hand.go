package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmihailenco/msgpack/v5"
)

// By hand means as https://brandur.org/idempotency-keys has it: a row for each key with a recovery point; one transaction that claims
// the key; one for each atomic phase that follows, which moves the recovery point together with the business write; the last one writes
// the answer. A retry goes on from the recovery point, a finished key is answered from its row.
//
// It spares itself, and keystate does not: to tell one process from another that took its key over; to take over keys whose process
// died, before a client asks again; to let a second caller wait for the answer of the first; to find out what became of a commit
// whose outcome is unknown; tokens for effects; attempts, pauses between them and errors, kept; history; checksums; an index by
// which finished keys are deleted.

const (
	started  = "started"
	reserved = "funds_reserved"
	sent     = "payout_sent"
	finished = "finished"

	handScope = "bench"
)

var (
	errUnderWay  = errors.New("the key is under way")
	errOther     = errors.New("the key was used for another request")
	errOvertaken = errors.New("another has taken the key over")
)

// A way is how the steps reach a store.
type way interface {
	// claim makes the key's row, or reads it.
	claim(ctx context.Context, r *handRecord) error
	// move is one step: from the record's point to another, with the state or the answer, and a business write if one is named.
	move(ctx context.Context, r *handRecord, to string, contents []byte, business string) error

	business(ctx context.Context, name string) ([]byte, error)
	rows(ctx context.Context) (int, error)
	close() error
}

// hand makes the request by hand.
type hand struct{ way }

// handRecord is a key's row.
type handRecord struct {
	id       string
	point    string
	lockedAt time.Time // in PostgreSQL, where others may be at work on the key
	request  []byte
	state    []byte
	response []byte
}

func (h hand) commits() (int64, error) {
	if c, ok := h.way.(committer); ok {
		return c.commits()
	}
	return 0, nil
}

func (h hand) request(ctx context.Context, id string) (answer order, err error) {
	o := asked(id)
	r := &handRecord{id: id}
	if r.request, err = msgpack.Marshal(o); err != nil {
		return answer, err
	}
	if err := h.claim(ctx, r); err != nil {
		return answer, err
	}
	for r.point != finished {
		if err := h.step(ctx, r, o); err != nil {
			return answer, fmt.Errorf("key %s after %s: %w", id, r.point, err)
		}
	}
	return answer, msgpack.Unmarshal(r.response, &answer)
}

// step goes on from a recovery point to the next.
func (h hand) step(ctx context.Context, r *handRecord, o order) error {
	switch r.point {
	case started:
		return h.move(ctx, r, reserved, nil, reservedRow(r.id))
	case reserved:
		o.Payout = payOut(r.id)
		state, err := msgpack.Marshal(o)
		if err != nil {
			return err
		}
		r.state = state
		return h.move(ctx, r, sent, state, "")
	case sent:
		if err := msgpack.Unmarshal(r.state, &o); err != nil {
			return err
		}
		o.Receipt = receipt
		response, err := msgpack.Marshal(o)
		if err != nil {
			return err
		}
		r.response = response
		return h.move(ctx, r, finished, response, settledRow(r.id))
	}
	return errors.New("an unknown recovery point")
}
