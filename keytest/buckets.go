package keytest

import "go.etcd.io/bbolt"

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
