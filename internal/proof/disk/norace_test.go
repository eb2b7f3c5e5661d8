//go:build linux && amd64 && !race

package disk

const raced = false // the race detector makes every process several times slower
