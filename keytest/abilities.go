package keytest

import (
	"context"

	"example.com/keystate"
)

// A getter reads a record without a transaction around it.
type getter interface {
	Get(ctx context.Context, key keystate.Key) (keystate.Record, error)
}

// asStore is what the engine sees of its store: all that it can do and no more, since the engine goes another way where a store can do
// less; and the process before it.
func (p *process[Tx, S]) asStore() keystate.Store[Tx] {
	reading, gets := p.Store.(getter)
	switch shares := p.shared() != nil; {
	case shares && gets:
		return struct {
			keystate.SharedStore[Tx]
			getter
		}{sharedProcess[Tx, S]{p}, gate[Tx, S]{p, reading}}
	case shares:
		return sharedProcess[Tx, S]{p}
	case gets:
		return struct {
			keystate.Store[Tx]
			getter
		}{p, gate[Tx, S]{p, reading}}
	}
	return p
}

// A gate lets a process read, unless it is dead.
type gate[Tx, S any] struct {
	process *process[Tx, S]
	getter
}

func (g gate[Tx, S]) Get(ctx context.Context, key keystate.Key) (keystate.Record, error) {
	if g.process.gone() {
		return keystate.Record{}, errKilled
	}
	return g.getter.Get(ctx, key)
}
