package keystate

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAFileIsReadWithoutAnEngineAndStaysAsItIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	e, err := Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFile(path); !errors.Is(err, ErrLocked) {
		t.Errorf("while an engine has it: %v", err)
	}
	id, epoch := e.id, e.epoch
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if f.ID() != id || f.Epoch() != epoch {
		t.Errorf("it is %x at epoch %d, want %x at %d", f.ID(), f.Epoch(), id, epoch)
	}
	if _, err := Open(path, &Options{LockTimeout: time.Millisecond}); !errors.Is(err, ErrLocked) {
		t.Errorf("an engine opens it meanwhile: %v", err)
	}
	err = f.View(func(k Keys) error { return k.Put(&Record{Key: Key{ID: "k"}}) })
	if err == nil {
		t.Error("it can be written")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	after, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("it has changed: %v", err)
	}
	damaged := bytes.ReplaceAll(before, keyLedger, []byte("legder"))
	for want, content := range map[error][]byte{ErrNotAStore: []byte("a text"), ErrCorrupt: damaged} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 { // it lets go of what it refuses
			if _, err := OpenFile(path); !errors.Is(err, want) {
				t.Errorf("a file of another content: %v, want %v", err, want)
			}
		}
	}
	if _, err := OpenFile(path + ".none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("where nothing is: %v", err)
	}
}
