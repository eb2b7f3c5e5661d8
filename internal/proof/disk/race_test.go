//go:build linux && amd64 && race

package disk

const raced = true
