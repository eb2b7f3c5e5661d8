package keystate

import (
	"errors"
	"math"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/windows"
)

// tryLock takes a lock of our own, on the byte before the one that bbolt locks: a second lock on that one would get
// in bbolt's way, and before bbolt has its lock we read the file and write its meta pages anew.
func tryLock(f *os.File) (free bool, err error) {
	err = windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, lockedByte())
	if err == windows.ERROR_LOCK_VIOLATION {
		return false, nil
	}
	return err == nil, err
}

func unlockFile(f *os.File) {
	_ = windows.UnlockFileEx(windows.Handle(f.Fd()), 0, 1, 0, lockedByte())
}

func lockedByte() *windows.Overlapped {
	return &windows.Overlapped{Offset: math.MaxUint32 - 1, OffsetHigh: math.MaxUint32}
}

// syncDir does nothing: NTFS journals its directories.
func syncDir(string) error { return nil }

func diskFree(string) (int64, error) { return 0, errors.ErrUnsupported }

const (
	handleDiskFull = syscall.Errno(39)  // ERROR_HANDLE_DISK_FULL
	diskFull       = syscall.Errno(112) // ERROR_DISK_FULL
)

// isFull says whether a write failed for want of room.
func isFull(err error) bool {
	return errors.Is(err, handleDiskFull) || errors.Is(err, diskFull)
}

func isFullText(s string) bool {
	return strings.Contains(s, handleDiskFull.Error()) || strings.Contains(s, diskFull.Error())
}

const initialMap = 0 // Windows would make the file as large as its map
