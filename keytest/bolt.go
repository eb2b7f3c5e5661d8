package keytest

import (
	"errors"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// OpenBolt opens the bbolt store in a folder, and makes it when there is none. It leaves the syncs out: what is tested is
// the death of processes, which the operating system's memory survives.
func OpenBolt(t testing.TB, dir string) keystate.Store[*bbolt.Tx] {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(dir, "keys.db"), 0o600, &bbolt.Options{NoSync: true, NoGrowSync: true, NoFreelistSync: true})
	if err != nil {
		t.Fatalf("keytest: %v", err)
	}
	db.NoSync = true
	return &boltFile{keystate.Bolt(db), db}
}

// A boltFile is a store that closes its database.
type boltFile struct {
	keystate.Store[*bbolt.Tx]
	db *bbolt.DB
}

func (s *boltFile) Close() error { return errors.Join(s.Store.Close(), s.db.Close()) }

// own is the bucket that is keystate's.
const own = "keystate"

// buckets reads all of a program's buckets.
func buckets(tx *bbolt.Tx) (map[string]any, error) {
	all := map[string]any{}
	err := tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
		if string(name) == own {
			return nil
		}
		inside, err := bucket(b)
		all[string(name)] = inside
		return err
	})
	return all, err
}

func bucket(b *bbolt.Bucket) (map[string]any, error) {
	all := map[string]any{}
	err := b.ForEach(func(name, value []byte) error {
		switch {
		case len(value) > 0:
			all[string(name)] = string(value)
			return nil
		case value != nil:
			all[string(name)] = struct{ Empty bool }{true}
			return nil
		}
		inside, err := bucket(b.Bucket(name))
		all[string(name)] = inside
		return err
	})
	return all, err
}
