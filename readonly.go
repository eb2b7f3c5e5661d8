package keystate

import (
	"context"
	"errors"
	"fmt"
	"os"

	"go.etcd.io/bbolt"
)

// A File is the store in a bbolt file as it lies there, to be read while no engine has it open: by what moves it to another store.
type File struct {
	store *boltStore
	epoch uint64
}

// OpenFile opens a store's file for reading, and checks all of it as [Verify] does. Nothing in it changes, and until it is closed
// no engine can open it.
func OpenFile(path string) (*File, error) {
	f, err := openFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = checkPages(f, info.Size(), true, false)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w (%s)", err, path), letGo(f))
	}
	db, err := openDB(f, true)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w (%s)", err, path), letGo(f))
	}
	file := &File{store: newBoltStore(db, path)}
	file.store.file = f
	if err := errors.Join(checkDB(db, true), file.readIdentity()); err != nil {
		return nil, errors.Join(fmt.Errorf("%w (%s)", err, path), closeBolt(db, f))
	}
	return file, nil
}

func (f *File) readIdentity() error {
	return f.store.View(context.Background(), func(tx *bbolt.Tx) (err error) {
		if f.store.id, err = readIdentity(tx); err != nil {
			return err
		}
		var l ledger
		err = l.decode(tx.Bucket(bucketRoot).Get(keyLedger))
		f.epoch = l.epoch
		return err
	})
}

// ID is the store's identity: with a key's incarnation, the root of its tokens.
func (f *File) ID() [16]byte { return f.store.id }

// Epoch is that of the last engine that had the file. As long as it is the same, so are the records.
func (f *File) Epoch() uint64 { return f.epoch }

// View gives access to the records, which cannot be written.
func (f *File) View(fn func(Keys) error) error {
	return f.store.View(context.Background(), func(tx *bbolt.Tx) error { return fn(f.store.Keys(tx)) })
}

// Close lets go of the file.
func (f *File) Close() error { return closeBolt(f.store.db, f.store.file) }
