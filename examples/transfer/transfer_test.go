package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate/examples/internal/show"
)

// TestMain lets the test's own binary be the processor and the workers of the shows in the tests.
func TestMain(m *testing.M) {
	if show.IsChild(os.Args[1:]) {
		if err := run(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// someTransfers writes the first n lines of the file that comes with the program.
func someTransfers(t *testing.T, n int) string {
	t.Helper()
	lines := slices.Collect(bytes.Lines(transfersFile))[:n]
	path := filepath.Join(t.TempDir(), "some.jsonl")
	if err := os.WriteFile(path, bytes.Join(lines, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// mustPerform runs a show in which nothing may be wrong.
func mustPerform(t *testing.T, s show.Settings) *show.Tally {
	t.Helper()
	s.Workers, s.Faults = 1, show.UsualFaults
	result, err := program.Perform(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	result.Print(&table)
	t.Logf("seed %d\n%s", s.Seed, table.String())
	for _, w := range result.Wrong {
		t.Error(w)
	}
	return result
}

func TestKilledWorkersPayOnceAndASecondRunCallsNobody(t *testing.T) {
	dir := t.TempDir()
	s := show.Settings{
		File: someTransfers(t, 100), Store: filepath.Join(dir, "kept.db"), Out: filepath.Join(dir, "first"), Keep: true,
		Kills: 5, Concurrency: 8, Seed: time.Now().UnixNano(),
	}
	first := mustPerform(t, s)
	if first.Requests != 100 || first.Killed != 5 || len(first.Answers) != 100 || first.Payouts.Entries == 0 || first.Calls.Calls < first.Payouts.Entries {
		t.Errorf("the show was not a show: %d requests, %d kills, %d answers, %d payouts, %d calls",
			first.Requests, first.Killed, len(first.Answers), first.Payouts.Entries, first.Calls.Calls)
	}
	s.Out = filepath.Join(dir, "second")
	second := mustPerform(t, s)
	if second.Calls.Calls != 0 {
		t.Errorf("the second run called the processor %d times", second.Calls.Calls)
	}
	a, errA := os.ReadFile(filepath.Join(dir, "first"))
	b, errB := os.ReadFile(filepath.Join(dir, "second"))
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("the answers of the second run differ (%v, %v)", errA, errB)
	}
}

func TestAShowLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	mustPerform(t, show.Settings{File: someTransfers(t, 10), Store: filepath.Join(dir, "gone.db"), Kills: 1, Concurrency: 2, Seed: 1})
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("there is %v (%v)", left, err)
	}
}

func TestAShowTouchesNoStoreThatItWasNotTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mine.db")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := program.Perform(t.Context(), show.Settings{Store: path, Workers: 1, Concurrency: 1}); err == nil {
		t.Error("it went on")
	}
	if text, err := os.ReadFile(path); string(text) != "mine" {
		t.Errorf("the file holds %q (%v)", text, err)
	}
}

func TestAnInterruptedShowEndsItsProcesses(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("that will do")
	time.AfterFunc(100*time.Millisecond, func() { cancel(enough) })
	_, err := program.Perform(ctx, show.Settings{Kills: 1000, Workers: 1, Concurrency: 4, Seed: 1, Faults: show.UsualFaults}) // it waits for each process
	if !errors.Is(err, enough) {
		t.Errorf("it ended with %v", err)
	}
}

func TestTheFileIsTheGeneratedOne(t *testing.T) {
	if !bytes.Equal(show.Transfers(), transfersFile) {
		t.Error("transfers.jsonl is stale: go generate ./examples/transfer")
	}
	if n := bytes.Count(transfersFile, []byte("\n")); n != 1000 {
		t.Errorf("it has %d lines", n)
	}
}

func TestADatabaseIsNoFile(t *testing.T) {
	for _, dsn := range []string{"postgres://host/name", "postgresql://host/name"} {
		if err := run([]string{"-store", dsn}); err == nil || !strings.Contains(err.Error(), "-C examples/transfer/postgres") {
			t.Errorf("%s: %v", dsn, err)
		}
	}
}
