//go:build linux || darwin

package damage

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
	"example.com/keystate/internal/boltfile"
)

// products are what is shown the files: keystate, and openers that are wrong on purpose, each in one way.
var products = map[string]product{
	"keystate": sound,

	"maps-what-it-has-not-checked": {open: openUnchecked, frame: frameSound},
	"checks-only-a-part":           {open: openPart, frame: frameSound},
	"ignores-checksums":            {open: openUnread, frame: frameRaw},
	"falls-back-to-the-older-meta": {open: openOlder, frame: frameSound},
	"grows-what-it-refuses":        {open: before(roundUp), frame: frameSound},
	"takes-empty-for-new":          {open: before(removeEmpty), frame: frameSound},
	"keeps-the-lock":               {open: onRefusal(keepLocked), frame: frameSound},
	"keeps-a-goroutine":            {open: onRefusal(keepRunning), frame: frameSound, bound: time.Second / 2},
	"leaves-a-copy":                {open: onRefusal(leaveCopy), frame: frameSound},
	"names-no-error":               {open: onRefusal(unname), frame: frameSound},
	"is-hungry":                    {open: onRefusal(devour), frame: frameSound},
	"is-slow":                      {open: onRefusal(dawdle), frame: frameSound, bound: 200 * time.Millisecond},
	"forgets-a-key":                {open: openSound, frame: frameForgetful},
}

type openFunc = func(string, *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error)

// before opens after doing something that must not be done.
func before(do func(path string)) openFunc {
	return func(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
		do(path)
		return openSound(path, o)
	}
}

// onRefusal does something that must not be done when a file is refused; an error of its own replaces the refusal's.
func onRefusal(do func(path string, err error) error) openFunc {
	return func(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
		e, done, err := openSound(path, o)
		if err != nil {
			if other := do(path, err); other != nil {
				err = other
			}
		}
		return e, done, err
	}
}

// openUnchecked has bbolt map the file as it is.
func openUnchecked(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", keystate.ErrCorrupt, err)
	}
	return attach(db, o)
}

func attach(db *bbolt.DB, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
	e, err := keystate.New(keystate.Bolt(db), o)
	if err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	return e, func() error { return errors.Join(e.Close(), db.Close()) }, nil
}

// openPart promises of a part what it promises of the whole.
func openPart(path string, _ *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
	return openSound(path, limited.options())
}

// openUnread checks the pages, and of the finished records nothing.
func openUnread(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	h, err := boltfile.ReadHeader(f, info.Size())
	if err == nil {
		err = boltfile.Check(f, info.Size(), h, nil)
	}
	if err != nil && !errors.Is(err, boltfile.ErrLeaked) {
		return nil, nil, fmt.Errorf("%w: %w", keystate.ErrCorrupt, err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", keystate.ErrCorrupt, err)
	}
	err = db.View(func(tx *bbolt.Tx) error {
		if tx.Bucket([]byte("keystate")) == nil {
			return keystate.ErrNotAStore
		}
		return nil
	})
	if err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	return attach(db, o)
}

// frameRaw takes finished records as they lie there, without a look at their checksums.
func frameRaw(e *keystate.Engine[*bbolt.Tx], path string, key keystate.Key) (frame []byte, err error) {
	needle := []byte(key.ID)
	err = e.View(ctx, func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("keystate")).Bucket([]byte("done")).ForEach(func(_, v []byte) error {
			if at := bytes.Index(v, append([]byte{byte(len(needle))}, needle...)); at >= 0 {
				frame = bytes.Clone(v)
			}
			return nil
		})
	})
	if frame == nil && err == nil {
		return frameSound(e, path, key)
	}
	return frame, err
}

// frameForgetful does not know a key whose record is damaged.
func frameForgetful(e *keystate.Engine[*bbolt.Tx], path string, key keystate.Key) ([]byte, error) {
	frame, err := frameSound(e, path, key)
	if err == nil && bytes.Contains(frame, []byte("order 17")) {
		return nil, keystate.ErrNotFound
	}
	return frame, err
}

// openOlder falls back to the older meta page, and where that does not help, it leaves the file as it was.
func openOlder(path string, o *keystate.Options) (*keystate.Engine[*bbolt.Tx], func() error, error) {
	image, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	restoreMeta(path)
	e, done, err := openSound(path, o)
	if err != nil {
		err = errors.Join(err, os.WriteFile(path, image, 0o600))
	}
	return e, done, err
}

// restoreMeta makes the older meta page the only one that counts when the newer is damaged, as bbolt does.
func restoreMeta(path string) {
	image, err := os.ReadFile(path)
	if err != nil || len(image) < 4*pageHeader {
		return
	}
	size := int(native.Uint32(image[pageHeader+8:]))
	if size != 1024 && size != 4096 || len(image) < 2*size {
		return
	}
	damagedID := newest(image, size)
	m := metaOf(image, size, damagedID)
	was := native.Uint64(m[56:])
	if reseal(m); was == native.Uint64(m[56:]) {
		return
	}
	older := metaOf(image, size, 1-damagedID)
	copy(m, older)
	native.PutUint64(m[48:], native.Uint64(older[48:])-1)
	reseal(m)
	_ = os.WriteFile(path, image, 0o600)
}

func roundUp(path string) {
	if info, err := os.Stat(path); err == nil && info.Size()%512 != 0 {
		_ = os.Truncate(path, info.Size()|511+1)
	}
}

func removeEmpty(path string) {
	if info, err := os.Stat(path); err == nil && info.Size() == 0 {
		_ = os.Remove(path)
	}
}

var (
	locked *os.File
	hungry []byte
)

func unname(_ string, err error) error { return errors.New(err.Error()) }

func keepRunning(string, error) error {
	go func() { select {} }()
	return nil
}

func devour(string, error) error {
	hungry = bytes.Repeat([]byte{1}, 256<<20)
	return nil
}

func dawdle(string, error) error {
	for began := time.Now(); time.Since(began) < time.Second/2; {
	}
	return nil
}

func keepLocked(path string, _ error) error {
	locked, _ = os.Open(path)
	_ = syscall.Flock(int(locked.Fd()), syscall.LOCK_EX)
	return nil
}

func leaveCopy(path string, _ error) error {
	_ = os.WriteFile(path+".damaged", nil, 0o600)
	return nil
}
