// Package conformance holds what every [keystate.Store] must pass: package keytest shows it to the authors of stores.
//
//	conformance.go  the list of promises, and how they are checked
//	trial.go        one check's store, and the shorthands to work on it
//	boot.go         opening, and opening twice
//	records.go      records come back whole, and only their holder moves them on
//	last.go         records that go with the commit
//	reap.go         deleting what has had its time
//	lists.go        sequences, counts, pages
//	updates.go      failures leave no trace; races have one winner
//	views.go        readers see what is committed
//	close.go        what was acknowledged stays
//	model.go        random histories against a model
//	bolt.go         the bbolt store as a test opens it
package conformance

import (
	"testing"

	"example.com/keystate"
)

// Store checks that a store keeps what [keystate.Store] promises, with a subtest for each promise. open opens the
// store that lives in dir, and makes it when there is none; it does not boot it. It is called again for a dir whose
// store is closed, and once for one whose store is open: a store that several engines may share is then checked as
// such, any other refuses, by an error of Boot or by t.Fatal. How many random histories there are, -rapid.checks says.
func Store[Tx any](t *testing.T, open func(t testing.TB, dir string) keystate.Store[Tx], rows Rows[Tx]) {
	for _, c := range storeChecks[Tx]() {
		t.Run(c.says, func(t *testing.T) {
			if err := c.against(t, open, rows); err != nil {
				t.Error(err)
			}
		})
	}
}

// Rows are the program's own writes beside the records, in the same transaction.
type Rows[Tx any] struct {
	Put func(tx Tx, name, value string) error
	Get func(tx Tx, name string) (value string, found bool, err error)
}

// A storeCheck is one promise.
type storeCheck[Tx any] struct {
	says string
	run  func(*storeTrial[Tx]) error
}

func storeChecks[Tx any]() []storeCheck[Tx] {
	type trial = *storeTrial[Tx]
	return []storeCheck[Tx]{
		{"Boot keeps the identity and raises the epoch", trial.bootKeepsIdentity},
		{"two openings share the store, or the second is refused", trial.twoOpenings},

		{"a key that was never put is not found", trial.absentIsNotFound},
		{"every field of a record comes back", trial.fieldsComeBack},
		{"the largest record comes back", trial.largestRecord},
		{"keys that look alike when joined are different", trial.keysLookAlike},
		{"a record that was put or read is the caller's own", trial.recordsAreCopies},

		{"Put counts versions", trial.putCountsVersions},
		{"Put fences whoever does not hold the record", trial.putFences},
		{"Delete takes a finished record from its holder only", trial.deleteFences},
		{"a record that ends and is deleted in one transaction leaves nothing", trial.endedAndDeleted},
		{"a record that is put last is stored as Put does", trial.lastIsStored},
		{"a record that is put last goes with the rest of its transaction", trial.lastGoesWithTheRest},
		{"a record that is put last by whoever does not hold it undoes its transaction", trial.lastFences},
		{"one of many puts a record last", trial.oneOfManyIsLast},
		{"a record that is put last in a View is refused", trial.lastInViewIsRefused},
		{"a store that reaps by itself takes what is due, once", trial.reaps},
		{"finished records are numbered in order, and no number is used twice", trial.sequencesGrow},
		{"Counts equal a recount", trial.countsEqualRecount},
		{"Unfinished lists every key once, in pages of any size", trial.unfinishedPages},
		{"Unfinished misses no key while others change between pages", trial.unfinishedBetweenChanges},
		{"Finished lists in the order of finishing", trial.finishedOrder},
		{"thousands of keys are listed in pages", trial.thousands},
		{"a transaction sees its own writes", trial.ownWrites},

		{"an error in Update comes back and leaves no trace", trial.errorRollsBack},
		{"a panic in Update becomes an error and leaves no trace", trial.panicRollsBack},
		{"runtime.Goexit in Update leaves no trace", trial.goexitRollsBack},
		{"who fails harms nobody who commits at the same time", trial.failuresHarmNobody},
		{"a function that is run again takes effect once", trial.rerunsTakeEffectOnce},
		{"one of many claims a new key", trial.oneClaims},
		{"one of many moves a key on", trial.oneMovesOn},
		{"no increment is lost", trial.noLostIncrement},
		{"an Update whose context ends takes effect wholly or not at all", trial.contextEnds},

		{"View sees what was committed before it", trial.viewSeesCommitted},
		{"View sees one consistent state while updates go on", trial.viewIsConsistent},
		{"View cannot write", trial.viewCannotWrite},
		{"a View that fails harms nobody", trial.viewFails},

		{"what Update acknowledged outlives Close", trial.acknowledgedOutlivesClose},
		{"after Close everything fails, and Close is harmless", trial.closedFails},
		{"any history leaves what the model says", trial.modelAgrees},
	}
}

// against runs the check on a new store.
func (c storeCheck[Tx]) against(tb testing.TB, open func(testing.TB, string) keystate.Store[Tx], rows Rows[Tx]) error {
	base := &storeTrial[Tx]{tb: tb, open: open, rows: rows, root: tb.TempDir(), stores: new(int)}
	return base.afresh(c.run)
}
