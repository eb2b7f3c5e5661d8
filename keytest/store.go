package keytest

import (
	"testing"

	"go.etcd.io/bbolt"

	"example.com/keystate"
	"example.com/keystate/internal/conformance"
)

// Store checks that a store keeps what [keystate.Store] promises, with a subtest for each promise. open opens the
// store that lives in dir, and makes it when there is none; it does not boot it. It is called again for a dir whose
// store is closed, and once for one whose store is open: a store that several engines may share is then checked as
// such, any other refuses, by an error of Boot or by t.Fatal. How many random histories there are, -rapid.checks says.
//
// A store that passes also bears [Crash], with Case.Open.
func Store[Tx any](t *testing.T, open func(t testing.TB, dir string) keystate.Store[Tx], rows Rows[Tx]) {
	t.Helper()
	conformance.Store(t, open, conformance.Rows[Tx](rows))
}

// Rows are the program's own writes beside the records, in the same transaction.
type Rows[Tx any] struct {
	Put func(tx Tx, name, value string) error
	Get func(tx Tx, name string) (value string, found bool, err error)
}

// OpenBolt opens the bbolt file in dir and the store in it, and makes them when there are none. Closing the store closes the file. It does not sync:
// what it holds outlives the process, and not a power cut.
func OpenBolt(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
	t.Helper()
	return conformance.OpenBolt(t, dir)
}

// BoltRows are rows in a bucket of their own.
func BoltRows() Rows[*bbolt.Tx] { return Rows[*bbolt.Tx](conformance.BoltRows()) }
