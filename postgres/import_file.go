package postgres

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// What remains where a file was whose keys have moved. An engine makes a new store where there is nothing, so something must be there that it refuses.

// sign is how the text at a path begins whose file is put aside.
const sign = "keystate: the keys of this store have moved to PostgreSQL."

const signText = sign + `
The file, with the program's own buckets, has the name %q now. No engine must open it: the keys go on in PostgreSQL,
and here they would do everything a second time.
`

// A place is where a file was, and where it is.
type place struct{ path, file string }

// placeOf finds the file of a path, also if it is put aside.
func placeOf(path string) (place, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return place{}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return place{}, err
	}
	defer f.Close()
	begins := make([]byte, len(sign))
	if _, err := io.ReadFull(f, begins); err == nil && bytes.Equal(begins, []byte(sign)) {
		return place{path: path, file: aside(path)}, nil
	}
	return place{path: path, file: path}, nil
}

func aside(path string) string { return path + ".imported" }

// putAside gives the file its other name and puts the sign in its place, at no moment nothing. Whoever waits for the file's lock finds it moved.
func (p place) putAside() error {
	if p.file != p.path {
		return nil
	}
	if err := os.Link(p.path, aside(p.path)); err != nil && !sameFile(p.path, aside(p.path)) {
		return fmt.Errorf("put the file aside: %w", err)
	}
	if err := syncFolder(p.path); err != nil { // before its only other name goes
		return err
	}
	draft, err := os.CreateTemp(filepath.Dir(p.path), "."+filepath.Base(p.path)+".moved-*")
	if err != nil {
		return fmt.Errorf("put the file aside: %w", err)
	}
	_, err = fmt.Fprintf(draft, signText, filepath.Base(aside(p.path)))
	if err := errors.Join(err, draft.Sync(), draft.Close()); err != nil {
		return errors.Join(fmt.Errorf("put the file aside: %w", err), os.Remove(draft.Name()))
	}
	if err := os.Rename(draft.Name(), p.path); err != nil {
		return errors.Join(fmt.Errorf("put the file aside: %w", err), os.Remove(draft.Name()))
	}
	return syncFolder(p.path)
}

func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// syncFolder makes the names in a file's directory durable.
func syncFolder(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("put the file aside: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}
