package pgtest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

const logShown = 16 << 10 // bytes

// logSize is where in the log what comes from now on begins.
func (s *Server) logSize() int64 {
	info, err := os.Stat(s.logPath())
	if err != nil {
		return 0
	}
	return info.Size()
}

func (s *Server) lastLines() []byte {
	log, err := os.ReadFile(s.logPath())
	if err != nil {
		return []byte(err.Error())
	}
	return end(log)
}

func end(log []byte) []byte {
	if len(log) <= logShown {
		return log
	}
	log = log[len(log)-logShown:]
	return log[bytes.IndexByte(log, '\n')+1:]
}

// report shows the end of what the server logged since the log had a size, without what it says of other tests'
// databases. The whole goes to the test's artifacts, which go test -artifacts keeps.
func (s *Server) report(t testing.TB, since int64, database string) {
	t.Helper()
	log, err := os.ReadFile(s.logPath())
	if err != nil {
		t.Log(err)
		return
	}
	if err := os.WriteFile(filepath.Join(t.ArtifactDir(), "postgres.log"), log, 0o600); err != nil {
		t.Log(err)
	}
	t.Logf("the server's log:\n%s", end(withoutOthers(log[min(since, int64(len(log))):], database)))
}

// withoutOthers leaves out the lines that name a test's database other than this. A line that goes on, goes on after
// a tab.
func withoutOthers(log []byte, database string) []byte {
	var kept []byte
	others := false
	for line := range bytes.Lines(log) {
		if !bytes.HasPrefix(line, []byte("\t")) {
			others = database != "" && bytes.Contains(line, []byte(databasePrefix)) && !bytes.Contains(line, []byte(database))
		}
		if !others {
			kept = append(kept, line...)
		}
	}
	return kept
}
