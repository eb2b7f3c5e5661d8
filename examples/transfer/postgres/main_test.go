package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/keystate/examples/internal/show"
	"example.com/keystate/internal/pgtest"
)

// TestMain lets the test's own binary be the processor and the workers of the shows in the tests.
func TestMain(m *testing.M) {
	if show.IsChild(os.Args[1:]) {
		if err := program.Run(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		return
	}
	pgtest.Main(m)
}

// How much there is to do for the killed workers.
var (
	transfers = flag.Int("transfers", 120, "lines of the file, up to 1000")
	kills     = flag.Int("kills", 12, "how often a worker is killed")
)

// settings are those of a show on a database.
func settings(t *testing.T, dsn string) show.Settings {
	lines := slices.Collect(bytes.Lines(show.Transfers()))[:*transfers]
	path := filepath.Join(t.TempDir(), "some.jsonl")
	if err := os.WriteFile(path, bytes.Join(lines, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	return show.Settings{
		File: path, Store: dsn, Kills: *kills, Workers: 3, Concurrency: 8, Seed: time.Now().UnixNano(), Faults: show.UsualFaults,
	}
}

// mustPerform runs a show in which nothing may be wrong.
func mustPerform(t *testing.T, s show.Settings) *show.Tally {
	t.Helper()
	result, err := program.Perform(t.Context(), s)
	if err != nil {
		t.Fatalf("seed %d: %v", s.Seed, err)
	}
	var table strings.Builder
	result.Print(&table)
	t.Logf("seed %d\n%s", s.Seed, table.String())
	for _, w := range result.Wrong {
		t.Error(w)
	}
	return result
}

func TestKilledWorkersOnOneDatabasePayOnceAndASecondRunCallsNobody(t *testing.T) {
	dir, s := t.TempDir(), settings(t, pgtest.Database(t))
	s.Keep, s.Dir, s.Out = true, filepath.Join(dir, "kept"), filepath.Join(dir, "first")
	first := mustPerform(t, s)
	if first.Requests != *transfers || first.Killed != *kills || first.Dismissed != *kills/4 || first.Suspended != *kills/12 || len(first.Answers) != *transfers || first.Payouts.Entries == 0 {
		t.Errorf("the show was not a show: %d requests, %d kills, %d goodbyes, %d suspended, %d answers, %d payouts",
			first.Requests, first.Killed, first.Dismissed, first.Suspended, len(first.Answers), first.Payouts.Entries)
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
	s.Keep, s.Dir = false, ""
	if _, err := program.Perform(t.Context(), s); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("a show that was not told to go on with the store: %v", err)
	}
	if found, err := program.Find(t.Context(), s.Store); err != nil || found == "" {
		t.Errorf("it left %q (%v)", found, err)
	}
}

func TestAShowLeavesNothingInTheDatabase(t *testing.T) {
	s := settings(t, pgtest.Database(t))
	s.Kills = 1
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	mustPerform(t, s)
	if found, err := program.Find(ctx, s.Store); err != nil || found != "" {
		t.Errorf("there is %s (%v)", found, err)
	}
	time.AfterFunc(200*time.Millisecond, cancel)
	s.Kills = 1000
	if _, err := program.Perform(ctx, s); err == nil { // it waits for each process
		t.Error("an interrupted show says that all is well")
	}
	if found, err := program.Find(t.Context(), s.Store); err != nil || found != "" {
		t.Errorf("interrupted, it left %s (%v)", found, err)
	}
}

func TestAStoreMustBeNamed(t *testing.T) {
	for args, want := range map[string]string{
		"":                             "-store is needed",
		"-store some.db":               "cannot parse",
		"-store postgres:///x -keep":   "-dir",
		"-store postgres:///x -dir /x": "-keep",
	} {
		if err := program.Run(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", args, err)
		}
	}
}
