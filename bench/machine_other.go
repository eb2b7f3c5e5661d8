//go:build !linux

package main

import (
	"runtime"
	"strconv"
	"time"
)

// takeUsage knows of this process's memory alone: the rest is read from /proc and /sys, which only Linux has.
func takeUsage(string, int) usage {
	u := usage{at: time.Now()}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u.allocations, u.allocated = m.Mallocs, m.TotalAlloc
	return u
}

func loadAverage() string { return "unknown" }

func describeMachine(string) string {
	return runtime.GOOS + "/" + runtime.GOARCH + ", " + strconv.Itoa(runtime.NumCPU()) + " processors"
}
