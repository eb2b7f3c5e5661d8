//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "power: needs Linux, for FUSE and loop devices")
	os.Exit(2)
}
