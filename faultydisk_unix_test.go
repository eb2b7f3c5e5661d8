//go:build linux || darwin

package keystate

import (
	"os"
	"syscall"
	"testing"
)

const fullDisk = syscall.ENOSPC

// unsyncable puts something that cannot be synced in the place of an open file.
func unsyncable(t *testing.T, f *os.File) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := syscall.Dup2(int(w.Fd()), int(f.Fd())); err != nil {
		t.Fatal(err)
	}
}
