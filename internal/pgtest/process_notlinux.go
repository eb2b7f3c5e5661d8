//go:build unix && !linux

package pgtest

import (
	"bufio"
	"bytes"
	"fmt"
	"os/exec"
	"syscall"
)

func dieWithParent(*syscall.SysProcAttr) {} // only Linux has it; the guard does the same a moment later

// processes lists what runs on the machine.
func processes() (map[int]listed, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat=").Output()
	if err != nil {
		return nil, fmt.Errorf("pgtest: list processes: %w", err)
	}
	all := map[int]listed{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		var l listed
		var state string
		if _, err := fmt.Sscan(lines.Text(), &l.pid, &l.parent, &state); err != nil {
			return nil, fmt.Errorf("pgtest: ps said %q: %w", lines.Text(), err)
		}
		l.state = state[0]
		all[l.pid] = l
	}
	return all, nil
}
