package conformance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"testing"

	"example.com/keystate"
)

func (s *storeTrial[Tx]) bootKeepsIdentity() error {
	id, epoch := s.id, s.epoch
	if id == [16]byte{} {
		return errors.New("the identity is zero")
	}
	for range 3 {
		if err := s.reopen(); err != nil {
			return err
		}
		if s.id != id {
			return fmt.Errorf("the identity was %x, and is %x after reopening", id, s.id)
		}
		if s.epoch <= epoch {
			return fmt.Errorf("the epoch was %d, and is %d after reopening", epoch, s.epoch)
		}
		epoch = s.epoch
	}
	return s.afresh(func(other *storeTrial[Tx]) error {
		if other.id == id {
			return fmt.Errorf("two stores have the identity %x", id)
		}
		return nil
	})
}

// An openingTB is the test that open is given where it may fail.
type openingTB struct {
	testing.TB
	refusal string
}

func (o *openingTB) Error(args ...any)                 { o.refusal += fmt.Sprintln(args...) }
func (o *openingTB) Errorf(format string, args ...any) { o.Error(fmt.Sprintf(format, args...)) }
func (o *openingTB) Fail()                             { o.Error("it fails") }
func (o *openingTB) FailNow()                          { o.Fail(); runtime.Goexit() }
func (o *openingTB) Fatal(args ...any)                 { o.Error(args...); runtime.Goexit() }
func (o *openingTB) Fatalf(format string, args ...any) { o.Fatal(fmt.Sprintf(format, args...)) }
func (o *openingTB) Skip(args ...any)                  { o.Fatal(args...) }
func (o *openingTB) Skipf(format string, args ...any)  { o.Fatalf(format, args...) }
func (o *openingTB) SkipNow()                          { o.FailNow() }
func (o *openingTB) Failed() bool                      { return o.refusal != "" }

// another opens the trial's store once more, or tells why it cannot be.
func (s *storeTrial[Tx]) another() (second *storeTrial[Tx], refusal error) {
	second = &storeTrial[Tx]{rows: s.rows}
	opening := &openingTB{TB: s.tb}
	err := ending(func() error {
		second.store = s.open(opening, s.dir)
		return nil
	})
	if opening.Failed() {
		return nil, errors.New(opening.refusal)
	}
	if err != nil {
		return nil, err
	}
	if second.id, second.epoch, err = second.store.Boot(context.Background()); err != nil {
		return nil, errors.Join(err, second.close())
	}
	return second, nil
}

func (s *storeTrial[Tx]) twoOpenings() error {
	r, err := s.put(claimed(orderKey(1), "first"))
	if err != nil {
		return err
	}
	second, refusal := s.another()
	if refusal != nil {
		s.tb.Logf("the second opening is refused: %v", refusal)
		_, err := s.put(moved(r, keystate.Waiting))
		return err
	}
	defer second.close()
	if second.id != s.id || second.epoch <= s.epoch {
		return fmt.Errorf("opened twice, it has the identities %x and %x, the epochs %d and %d",
			s.id, second.id, s.epoch, second.epoch)
	}
	if err := cmp.Or(s.holds(r), second.holds(r)); err != nil {
		return fmt.Errorf("what the first opening wrote: %w", err)
	}
	taken, err := second.put(moved(r, keystate.Waiting))
	if err := cmp.Or(err, s.holds(taken), second.holds(taken)); err != nil {
		return fmt.Errorf("what the second opening wrote: %w", err)
	}
	if _, err := s.put(moved(r, keystate.Parked)); !errors.Is(err, keystate.ErrFenced) {
		return fmt.Errorf("what the second opening took over, the first wrote: %v, want ErrFenced", err)
	}
	const each = 50
	err = atOnce(4, func(i int) error {
		for range each {
			err := []*storeTrial[Tx]{s, second}[i%2].update(func(tx recordTx[Tx]) error {
				_, err := tx.add("n")
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return cmp.Or(err, second.close(), s.holds(taken), s.rowIs("n", strconv.Itoa(4*each)))
}
