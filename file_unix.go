//go:build linux || darwin

package keystate

import (
	"errors"
	"os"
	"strings"
	"syscall"
)

// tryLock takes the lock that bbolt takes too, if it is free. A file description shares one lock, so bbolt's own call
// on the same *os.File succeeds at once.
func tryLock(f *os.File) (free bool, err error) {
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == syscall.EWOULDBLOCK || err == syscall.EINTR {
		return false, nil
	}
	return err == nil, err
}

func unlockFile(f *os.File) { _ = syscall.Flock(int(f.Fd()), syscall.LOCK_UN) }

// syncDir makes a directory's entries durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// diskFree says how many bytes a file in dir may still grow by.
func diskFree(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

// isFull says whether a write failed for want of room: a full disk, a used up quota, a limit on the file's size.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}

func isFullText(s string) bool {
	for _, e := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if strings.Contains(s, e.Error()) {
			return true
		}
	}
	return false
}

const initialMap = 1 << 30 // address space, not memory: the map need not be moved while readers hold it
