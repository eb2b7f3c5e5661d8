package keytest

import (
	"context"
	"fmt"
	"time"

	"example.com/keystate"
)

// A Killable store learns that the process has died that has it open. Kill ends what the operating system ends then, as it does: connections
// break, in the middle of a transaction too, and nobody says goodbye. Whatever is called afterwards fails; Close still is, to let go of the rest.
//
// A store that is not Killable is closed after its process has died, as a file is, and a transaction that was under way is undone. That is a crash for
// a store that nobody else knows of; where others have to notice that one is gone, as with [keystate.SharedStore], it is none.
type Killable interface {
	Kill()
}

// A sharedProcess is a process whose store others may have open, too.
type sharedProcess[Tx, S any] struct{ *process[Tx, S] }

// shared is the process's store if others may have it open, or nil.
func (p *process[Tx, S]) shared() keystate.SharedStore[Tx] {
	s, _ := p.Store.(keystate.SharedStore[Tx])
	return s
}

// Renew renews the lease, unless the process is dead.
func (p sharedProcess[Tx, S]) Renew(ctx context.Context) (time.Duration, error) {
	if p.gone() {
		return 0, errKilled
	}
	return p.shared().Renew(ctx)
}

// Alive says whether a boot's lease holds.
func (p sharedProcess[Tx, S]) Alive(tx Tx, epoch uint64) (bool, error) {
	return p.shared().Alive(tx, epoch)
}

// Adopt takes keys over, unless the process is dead.
func (p sharedProcess[Tx, S]) Adopt(ctx context.Context, machines []string, limit int) ([]keystate.Record, error) {
	if p.gone() {
		return nil, errKilled
	}
	return p.shared().Adopt(ctx, machines, limit)
}

// canDie says what keeps a store from dying as a process does.
func (p *play[Tx, S]) canDie(s keystate.Store[Tx]) error {
	if _, killable := s.(Killable); killable || !p.outcome.shared {
		return nil
	}
	return fmt.Errorf("keytest: a store that several engines may share must be Killable: %T would say goodbye when its process is killed", s)
}

// enter is the process of a life. That of the second may have been there from the beginning.
func (p *play[Tx, S]) enter(life int) (*process[Tx, S], error) {
	if life == 1 && p.beside != nil {
		return p.beside, nil
	}
	proc, err := p.boot(life)
	if err == nil && life == 0 && p.scenario.beside {
		p.beside, err = p.boot(1)
	}
	return proc, err
}

// leaveBeside ends the process that was there all the time, unless it has ended.
func (p *play[Tx, S]) leaveBeside() {
	if p.beside == nil {
		return
	}
	if err := p.beside.close(); err != nil {
		p.find(fmt.Sprintf("the engine does not close: %v", err), "an effect does not end when its context does")
	}
}

// standStill keeps the process from its store until a client has got an answer from the other one: its lease ends meanwhile.
func (p *process[Tx, S]) standStill() {
	p.mu.Lock()
	p.still = make(chan struct{})
	p.mu.Unlock()
	p.play.beside.serve()
	close(p.still)
}

// whileLeasesMayHold bounds how long a client waits: who is taken for alive for ever is waited for as long.
func (p *process[Tx, S]) whileLeasesMayHold() (context.Context, context.CancelFunc) {
	const longest = 2 * time.Hour
	if p.shared() == nil {
		return context.Background(), func() {}
	}
	return context.WithTimeout(context.Background(), longest)
}

// finish lets the engine carry on whatever there is, such as staged keys: also what a process has left that is dead and counts as alive for
// as long as its lease says.
func (p *process[Tx, S]) finish() {
	const patience, glance = time.Hour, time.Second
	ctx, cancel := p.whileLeasesMayHold()
	defer cancel()
	var left keystate.Key
	for range patience / glance {
		_ = p.engine.Resume(ctx)
		if p.shared() == nil || p.over() {
			return
		}
		var err error
		if left, err = p.leftByOthers(); err != nil || left == (keystate.Key{}) {
			return
		}
		time.Sleep(glance)
	}
	p.play.find(fmt.Sprintf("nobody takes up %s, which a process has left that is gone", left),
		"the store's leases do not end, or not by the clock of the bubble; or the machine is not registered any more")
}

// leftByOthers is a key that should go on and is another boot's, or the empty key.
func (p *process[Tx, S]) leftByOthers() (key keystate.Key, err error) {
	const enough = 1000
	err = p.View(context.Background(), func(tx Tx) error {
		records, err := p.Keys(tx).Unfinished(keystate.Key{}, enough)
		for _, r := range records {
			if r.Epoch != p.epoch && r.Status != keystate.Parked {
				key = r.Key
			}
		}
		return err
	})
	return key, err
}
