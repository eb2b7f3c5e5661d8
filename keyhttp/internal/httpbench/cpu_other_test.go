//go:build !unix

package httpbench

import "time"

func cpuTime() time.Duration { return 0 }
