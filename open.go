package keystate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"example.com/keystate/internal/boltfile"
)

// The bbolt file as a file: made whole or not at all, checked before it is mapped, backed up, verified, compacted.

// openBolt opens the store at path, or makes a new one where there is nothing.
func openBolt(path string, o Options) (*boltStore, error) {
	for range 3 { // another process may make or move the file between two steps of ours
		f, err := openFile(path, os.O_RDWR, o.LockTimeout)
		if errors.Is(err, fs.ErrNotExist) {
			err = createBolt(path)
			if err == nil || errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist) && dirExists(path) {
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		db, whole, err := openChecked(f, o.VerifyLimit)
		if err != nil {
			return nil, err
		}
		if err := syncEntry(path); err != nil {
			return nil, errors.Join(err, closeBolt(db, f))
		}
		sweepDrafts(path)
		s := newBoltStore(db, path)
		s.file, s.whole = f, whole
		return s, nil
	}
	return nil, fmt.Errorf("%w: %s changes while it is being opened", ErrMoved, path)
}

// syncEntry makes durable that the path leads to the file. Whoever made the file may have died, or may still be, between
// linking it and that; what is promised in it from now on would be gone with its name. Where the process may not even read the
// directory, it has made nothing there.
func syncEntry(path string) error {
	if err := syncDir(filepath.Dir(path)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
	}
	return nil
}

func dirExists(path string) bool {
	info, err := os.Stat(filepath.Dir(path))
	return err == nil && info.IsDir()
}

// openFile opens and locks an existing file, and makes sure that it is still what the path leads to.
func openFile(path string, mode int, timeout time.Duration) (*os.File, error) {
	if info, err := os.Stat(path); err != nil {
		if _, there := os.Lstat(path); there == nil && errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %s is a link to nothing", ErrNotAStore, path)
		}
		return nil, fmt.Errorf("keystate: %w", err)
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is no regular file", ErrNotAStore, path)
	}
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, fmt.Errorf("keystate: %w", err)
	}
	if err := lockFile(f, timeout); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w (%s)", err, path)
	}
	mine, err1 := f.Stat()
	there, err2 := os.Stat(path)
	if err := errors.Join(err1, err2); err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.Close()
		return nil, fmt.Errorf("keystate: %w", err)
	} else if err != nil || !os.SameFile(mine, there) {
		f.Close()
		return nil, fmt.Errorf("keystate: %s was moved away while it was opened: %w", path, fs.ErrNotExist)
	}
	return f, nil
}

// lockFile waits until the file's lock is free and takes it.
func lockFile(f *os.File, timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; time.Sleep(5 * time.Millisecond) {
		switch free, err := tryLock(f); {
		case err != nil:
			return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		case free:
			return nil
		case !time.Now().Before(deadline):
			return ErrLocked
		}
	}
}

// openChecked checks the file's pages before bbolt maps them, and its records before anybody relies on them: the whole of
// a file up to the limit. When it fails, it lets go of the file.
func openChecked(f *os.File, verifyLimit int64) (db *bbolt.DB, whole bool, err error) {
	defer func() {
		if err != nil {
			letGo(f)
			err = fmt.Errorf("%w (%s)", err, f.Name())
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, false, fmt.Errorf("keystate: %w", err)
	}
	all := info.Size() <= verifyLimit
	if err := checkPages(f, info.Size(), all, true); err != nil {
		return nil, false, err
	}
	if db, err = openDB(f, false); err != nil {
		return nil, false, err
	}
	if err := checkDB(db, all); err != nil {
		closeBolt(db, f)
		return nil, false, err
	}
	return db, all, nil
}

// checkPages checks the file's structure: of every bucket, or of those that hold what is unfinished. When the file is about to
// be written, the meta pages are written and synced anew first: after a sync that failed, the kernel may
// take pages for clean that the disk has never seen.
func checkPages(f *os.File, size int64, all, write bool) error {
	header, err := boltfile.ReadHeader(f, size)
	if err == nil && write {
		if err := boltfile.SyncMetas(f, header); err != nil {
			return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
		}
	}
	if err == nil {
		visit := vital
		if all {
			visit = nil
		}
		err = boltfile.Check(f, size, header, visit)
	}
	return pageError(err)
}

// pageError names what is wrong with a file's pages.
func pageError(err error) error {
	switch {
	case errors.Is(err, boltfile.ErrForeign):
		return fmt.Errorf("%w: %w", ErrNotAStore, err)
	case errors.Is(err, boltfile.ErrLeaked): // bbolt leaks pages by itself; the records' digest tells whether any were ours
		return nil
	case errors.Is(err, boltfile.ErrDamaged):
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	case err != nil:
		return fmt.Errorf("keystate: %w", err)
	}
	return nil
}

// vital is how much of each bucket Open looks at however large the file is: all of what is unfinished; of what is finished, of its
// index, and of the program's buckets so much that no walk in them goes on for ever, and that none shares a page with another or with
// the free ones. Finished records bear checksums, and the index is looked through before a key is taken for new.
func vital(path [][]byte) boltfile.Extent {
	if bytes.Equal(path[0], bucketRoot) && (len(path) == 1 || bytes.Equal(path[1], bucketLive)) {
		return boltfile.Everything
	}
	return boltfile.Branches
}

// indexed is all of the index, and of the others nothing that Open has not looked at.
func indexed(path [][]byte) boltfile.Extent {
	if bytes.Equal(path[0], bucketRoot) && (len(path) == 1 || bytes.Equal(path[1], bucketIndex)) {
		return boltfile.Everything
	}
	return boltfile.Nothing
}

// survive turns every panic and fault in fn into ErrCorrupt: nothing but bbolt runs in it, on a file not trusted yet.
func survive(doing string, fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: %s it: %v", ErrCorrupt, doing, v)
		}
	}()
	return fn()
}

func checkDB(db *bbolt.DB, all bool) error {
	return survive("checking", func() error {
		return db.View(func(tx *bbolt.Tx) error {
			id, err := readIdentity(tx)
			if err != nil {
				return err
			}
			return checkRecords(tx, id, all)
		})
	})
}

// openDB opens bbolt on a file that is open and locked.
func openDB(f *os.File, readOnly bool) (db *bbolt.DB, err error) {
	err = survive("opening", func() error {
		db, err = bbolt.Open(f.Name(), 0o600, &bbolt.Options{
			Timeout:         time.Second, // for bbolt's own lock, which ours keeps free
			InitialMmapSize: initialMap,
			ReadOnly:        readOnly,
			OpenFile:        func(string, int, fs.FileMode) (*os.File, error) { return f, nil },
		})
		return err
	})
	var refused syscall.Errno
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, ErrLocked
	case errors.Is(err, ErrCorrupt):
		return nil, err
	case errors.As(err, &refused): // no memory to map it, for one: that is no damage
		return nil, fmt.Errorf("keystate: %w", err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	db.AllocSize = 1 << 20 // by which the file grows: with so large a map, bbolt would grow a small file by 16 MiB
	return db, nil
}

// createBolt makes an empty store at path.
func createBolt(path string) error {
	return createFile(path, func(db *bbolt.DB) error { return db.Update(initBuckets) })
}

// createFile makes a bbolt file at path. It is filled under another name and linked when it is whole and
// synced: after a crash there is a complete file or none. It never replaces one that is there.
func createFile(path string, fill func(*bbolt.DB) error) (err error) {
	defer func() {
		if err != nil && (isFull(err) || isFullText(err.Error())) { // bbolt formats some causes with %s
			err = fmt.Errorf("%w: %w", ErrStorageFull, err)
		}
	}()
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	draft, err := os.CreateTemp(dir, "."+base+draftSuffix+"*")
	if err != nil {
		return fmt.Errorf("keystate: %w", err)
	}
	defer os.Remove(draft.Name())
	if err := draft.Close(); err != nil {
		return fmt.Errorf("keystate: %w", err)
	}
	db, err := bbolt.Open(draft.Name(), 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return fmt.Errorf("keystate: create %s: %w", path, err)
	}
	if err := errors.Join(fill(db), db.Sync(), db.Close()); err != nil {
		return fmt.Errorf("keystate: create %s: %w", path, err)
	}
	if err := os.Link(draft.Name(), path); err != nil {
		return fmt.Errorf("keystate: %w", err)
	}
	if err := os.Remove(draft.Name()); err != nil {
		return fmt.Errorf("keystate: %w", err)
	}
	if err := syncDir(dir); err != nil {
		return fmt.Errorf("keystate: %w", err)
	}
	return nil
}

const draftSuffix = ".creating-"

// sweepDrafts removes what a crash during the making of the file at path has left beside it.
func sweepDrafts(path string) {
	const age = time.Hour // since its last write, after which nobody is making it any more
	dir, base := filepath.Split(path)
	drafts, _ := os.ReadDir(filepath.Clean(dir + "."))
	for _, d := range drafts {
		info, err := d.Info()
		if err == nil && strings.HasPrefix(d.Name(), "."+base+draftSuffix) && time.Since(info.ModTime()) > age {
			_ = os.Remove(filepath.Join(dir, d.Name()))
		}
	}
}

// Backup writes a copy of the store, as it is at this moment, to w, while the engine goes on. What is written is
// a bbolt file that [Open] opens. Commits go on meanwhile, but the file cannot reuse pages until Backup returns.
//
// A restored backup has forgotten what happened since: requests answered in between run again, under new tokens.
func Backup(ctx context.Context, e *Engine[*bbolt.Tx], w io.Writer) (written int64, err error) {
	err = e.View(ctx, func(tx *bbolt.Tx) error {
		written, err = tx.WriteTo(whileNotDone{ctx, w})
		return err
	})
	return written, err
}

// whileNotDone is a writer until its context ends.
type whileNotDone struct {
	ctx context.Context
	w   io.Writer
}

func (w whileNotDone) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(b)
}

// Verify checks all of a store's file: every page, every record, and that what it holds adds up to what was written. It returns nil, or
// [ErrCorrupt], [ErrNotAStore] or [ErrLocked] with what it found. It changes nothing, and its memory is bounded, however
// damaged the file is. No engine may have the file open: to verify a running one's, verify its [Backup].
func Verify(path string) error {
	f, err := openFile(path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("keystate: %w", err)
	}
	if err := checkPages(f, info.Size(), true, false); err != nil {
		return err
	}
	db, err := openDB(f, true)
	if err != nil {
		return err
	}
	return errors.Join(checkDB(db, true), closeBolt(db, f))
}

// Compact writes the store at path from into a new file at path to, without the free pages that deleting left behind. Programs' own buckets
// come along. The new file appears when it is whole and synced, and never replaces one that is there. No engine may have
// from open.
func Compact(from, to string) error {
	f, err := openFile(from, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	source, _, err := openChecked(f, math.MaxInt64)
	if err != nil {
		return err
	}
	defer closeBolt(source, f)
	const perTransaction = 16 << 20 // bytes
	return createFile(to, func(db *bbolt.DB) error { return bbolt.Compact(db, source, perTransaction) })
}

// Close ends the committer, and the database if the store opened it.
func (s *boltStore) Close() error {
	if !s.stop() {
		return nil
	}
	attached.Delete(s.db)
	if s.file == nil {
		return nil
	}
	s.closing.Store(true)
	if s.started {
		<-s.summed
	}
	closeFile := func() error {
		s.windows.shut()
		return closeBolt(s.db, s.file)
	}
	if errors.Is(s.failure(), ErrCorrupt) {
		return abandonBolt(closeFile, s.file)
	}
	return closeFile()
}

// abandonBolt closes a damaged database. Where bbolt has panicked over it, it may hold its own lock for ever, and its Close would wait for
// that: then the file is let go of without it, and its map, which is read only, stays.
func abandonBolt(closeFile func() error, file *os.File) error {
	const patience = time.Second
	closed := make(chan error, 1)
	go func() { closed <- closeFile() }()
	select {
	case err := <-closed:
		return err
	case <-time.After(patience):
		return errors.Join(fmt.Errorf("%w: bbolt does not let go of it, and its memory stays mapped", ErrCorrupt), letGo(file))
	}
}

// closeBolt closes a database even where bbolt panics over it, and never leaves the lock behind.
func closeBolt(db *bbolt.DB, file *os.File) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: closing it: %v", ErrCorrupt, v)
			letGo(file)
		}
	}()
	return db.Close()
}

// letGo closes a file without its lock, which a map that bbolt has left behind would keep.
func letGo(f *os.File) error {
	unlockFile(f)
	return f.Close()
}
