package keystate

import (
	"os"
	"testing"
)

const fullDisk = diskFull

func unsyncable(t *testing.T, _ *os.File) {
	t.Skip("Windows has no way to make an open file fail to sync")
}
