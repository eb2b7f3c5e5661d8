package conformance

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// OpenBolt opens the bbolt file in dir and the store in it. Closing the store closes the file. It does not sync: what
// it holds outlives the process, and not a power cut.
func OpenBolt(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
	t.Helper()
	options := &bbolt.Options{Timeout: 100 * time.Millisecond, NoSync: true, NoGrowSync: true}
	db, err := bbolt.Open(filepath.Join(dir, "store.db"), 0o600, options)
	if err != nil {
		t.Fatalf("opening the store in %s: %v", dir, err)
	}
	return &ownedBolt{keystate.Bolt(db), db}
}

// An ownedBolt closes the database with the store.
type ownedBolt struct {
	keystate.Store[*bbolt.Tx]
	db *bbolt.DB
}

func (s *ownedBolt) Close() error { return errors.Join(s.Store.Close(), s.db.Close()) }

var boltRows = []byte("conformance rows")

// BoltRows are rows in a bucket of their own.
func BoltRows() Rows[*bbolt.Tx] {
	return Rows[*bbolt.Tx]{
		Put: func(tx *bbolt.Tx, name, value string) error {
			b, err := tx.CreateBucketIfNotExists(boltRows)
			if err != nil {
				return err
			}
			return b.Put([]byte(name), []byte(value))
		},
		Get: func(tx *bbolt.Tx, name string) (string, bool, error) {
			b := tx.Bucket(boltRows)
			if b == nil {
				return "", false, nil
			}
			value := b.Get([]byte(name))
			return string(value), value != nil, nil
		},
	}
}
