package main

import (
	"runtime"
	"time"
)

// usage is what was used up to a moment.
type usage struct {
	at            time.Time
	self, servers time.Duration // processor time of this process, and of PostgreSQL's
	busy, stolen  time.Duration // of the whole machine
	flushes       int64         // of the disk's cache, by everybody
	deviceBytes   int64         // written to the disk, by everybody
	onDevice      bool          // the two before are known
	written       int64         // handed to the disk by this process
	allocations   uint64
	allocated     uint64
}

func (u usage) since(earlier usage) usage {
	u.self -= earlier.self
	u.servers -= earlier.servers
	u.busy -= earlier.busy
	u.stolen -= earlier.stolen
	u.flushes -= earlier.flushes
	u.deviceBytes -= earlier.deviceBytes
	u.written -= earlier.written
	u.allocations -= earlier.allocations
	u.allocated -= earlier.allocated
	return u
}

func (b *bench) usage() usage {
	if b.server == nil {
		return takeUsage(b.dir, 0)
	}
	return takeUsage(b.dir, b.server.pid)
}

var numCPU = runtime.NumCPU()

// A turn in which others had more than this share of the machine is reported.
const tooMuch = 0.10

// disturbance is the share of the machine's processor time that neither this process nor PostgreSQL had, and that was not idle. The
// kernel's own work for them is part of it.
func (u usage) disturbance(took time.Duration) float64 {
	if u.busy == 0 {
		return 0
	}
	others := max(0, u.busy-u.self-u.servers) + u.stolen
	return others.Seconds() / (took.Seconds() * float64(numCPU))
}
