package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const tick = 10 * time.Millisecond // what /proc counts processor time in

// takeUsage reads what has been used so far. Device figures are those of the disk that holds the folder; server is
// the first process of PostgreSQL, 0 without.
func takeUsage(dir string, server int) usage {
	u := usage{at: time.Now()}
	var r syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &r) == nil {
		u.self = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	u.servers = serverTime(server)
	u.busy, u.stolen = machineTime()
	u.flushes, u.deviceBytes, u.onDevice = deviceFigures(dir)
	u.written = writtenBytes()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u.allocations, u.allocated = m.Mallocs, m.TotalAlloc
	return u
}

// serverTime is what a process and its children have used, those that have ended included.
func serverTime(server int) (total time.Duration) {
	if server == 0 {
		return 0
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		number := func(i int) int64 {
			n, _ := strconv.ParseInt(fields[i], 10, 64)
			return n
		}
		if len(fields) < 15 {
			continue
		}
		switch {
		case path == fmt.Sprintf("/proc/%d/stat", server):
			total += time.Duration(number(11)+number(12)+number(13)+number(14)) * tick // its own and that of ended children, user and system
		case number(1) == int64(server):
			total += time.Duration(number(11)+number(12)) * tick
		}
	}
	return total
}

// machineTime is what all processors have been busy with, and what a hypervisor has kept from them.
func machineTime() (busy, stolen time.Duration) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	fields := strings.Fields(line)
	at := func(i int) time.Duration {
		if i >= len(fields) {
			return 0
		}
		n, _ := strconv.ParseInt(fields[i], 10, 64)
		return time.Duration(n) * tick
	}
	return at(1) + at(2) + at(3) + at(6) + at(7), at(8)
}

// deviceFigures are what a disk has done: flushes of its cache, and bytes written.
func deviceFigures(dir string) (flushes, written int64, ok bool) {
	var st syscall.Stat_t
	if syscall.Stat(dir, &st) != nil {
		return 0, 0, false
	}
	dev := uint64(st.Dev)
	folder := fmt.Sprintf("/sys/dev/block/%d:%d", dev>>8&0xfff, dev&0xff|dev>>12&^0xff)
	if _, err := os.Stat(folder + "/partition"); err == nil {
		if resolved, err := filepath.EvalSymlinks(folder); err == nil {
			folder = filepath.Dir(resolved)
		}
	}
	b, err := os.ReadFile(folder + "/stat")
	if err != nil {
		return 0, 0, false
	}
	fields := strings.Fields(string(b))
	if len(fields) < 17 {
		return 0, 0, false
	}
	sectors, _ := strconv.ParseInt(fields[6], 10, 64)
	flushes, _ = strconv.ParseInt(fields[15], 10, 64)
	return flushes, sectors * 512, true
}

func writtenBytes() int64 {
	f, err := os.Open("/proc/self/io")
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if text, ok := strings.CutPrefix(s.Text(), "write_bytes: "); ok {
			n, _ := strconv.ParseInt(text, 10, 64)
			return n
		}
	}
	return 0
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	fields := strings.Fields(string(b))
	return strings.Join(fields[:min(3, len(fields))], " ")
}

// describeMachine tells processor, memory, kernel and disk.
func describeMachine(dir string) string {
	model, memory := "an unknown processor", ""
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) == nil {
		memory = fmt.Sprintf(", %.0f GB of memory", float64(info.Totalram)*float64(info.Unit)/1e9)
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%s, %d processors%s, Linux %s, %s", model, runtime.NumCPU(), memory, strings.TrimSpace(string(kernel)), fileSystem(dir))
}

func fileSystem(dir string) string {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "an unknown file system"
	}
	longest, kind := "", "an unknown file system"
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || !strings.HasPrefix(dir+"/", strings.TrimSuffix(fields[1], "/")+"/") || len(fields[1]) < len(longest) {
			continue
		}
		longest, kind = fields[1], fields[2]
	}
	return kind
}
