package pgtest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = immediate }

// processes lists what runs on the machine.
func processes() (map[int]listed, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, fmt.Errorf("pgtest: list processes: %w", err)
	}
	all := make(map[int]listed, len(stats))
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it ended meanwhile
		}
		l, err := parseStat(stat)
		if err != nil {
			return nil, fmt.Errorf("pgtest: %s: %w", path, err)
		}
		all[l.pid] = l
	}
	return all, nil
}

// parseStat reads "pid (name) state parent …", where the name may hold anything, parentheses too.
func parseStat(stat []byte) (listed, error) {
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 1 || end < open {
		return listed{}, fmt.Errorf("no name in %q", stat)
	}
	fields := bytes.Fields(stat[end+1:])
	if len(fields) < 2 {
		return listed{}, fmt.Errorf("no parent in %q", stat)
	}
	pid, err := strconv.Atoi(string(stat[:open-1]))
	if err != nil {
		return listed{}, err
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return listed{}, err
	}
	return listed{pid: pid, parent: parent, state: fields[0][0]}, nil
}
