package keytest

import "testing"

func TestTheBoltStoreConforms(t *testing.T) {
	Store(t, OpenBolt, BoltRows())
}
