package keystate

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"time"
)

// bbolt locks the file itself when it opens it; a second lock of the same handle would get in its way.
func lockFile(*os.File, time.Duration) error { return nil }
func unlockFile(*os.File)                    {}

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
