//go:build !unix

package kill

import "testing"

func TestKillNineLosesNothingThatWasAcknowledged(t *testing.T) {
	t.Skip("a process is killed by SIGKILL here, which only Unix has")
}
