package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"time"

	"example.com/keystate"
	"go.etcd.io/bbolt"
)

// Recovery is measured on real crashes: another process makes requests until all of them hang in their effects, and is killed. Then
// the contender is opened, and clients ask for all of them again.

// crashCommand has the program be the process that is killed.
const crashCommand = "crash"

// allHang is what it says when it may be killed.
const allHang = "all requests are in their effects"

// crash makes the requests whose IDs it reads, and hangs.
func crash(args []string) int {
	if len(args) != 4 {
		return 2
	}
	connections, _ := strconv.Atoi(args[3])
	c, _ := named(contenders, args[0])
	var ids []string
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		ids = append(ids, in.Text())
	}
	var hanging atomic.Int64
	payOut = func(string) string {
		if hanging.Add(1) == int64(len(ids)) {
			fmt.Println(allHang)
		}
		select {}
	}
	s, err := c.open(place{dir: args[1], dsn: args[2], connections: connections})
	if err == nil {
		_, err = race(s, len(ids), each(ids))
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// A resumption is how a contender took up what a killed process had left.
type resumption struct {
	contender
	keys   int
	took   time.Duration // from opening until all keys were answered
	failed error
}

const stagingLimit = time.Minute

func (b *bench) recovering() (steps []step) {
	for _, c := range b.field {
		if c.limit || c.hold > 0 {
			continue
		}
		steps = append(steps, step{"recovery, " + c.name, 10 * time.Second, func() {
			r := resumption{contender: c, keys: b.interrupted}
			r.took, r.failed = b.killAndResume(c)
			if r.failed != nil {
				b.fail(fmt.Errorf("recovery, %s: %w", c.name, r.failed))
			}
			b.resumed = append(b.resumed, r)
		}})
	}
	if c, ok := named(b.field, keystateOnBolt); ok {
		steps = append(steps, step{"recovery of many keys, " + c.name, time.Duration(b.staged/5) * time.Millisecond / 4, func() {
			b.staging = &staging{keys: b.staged}
			b.staging.failed = b.staging.measure(b, c)
			b.fail(b.staging.failed)
		}})
	}
	return steps
}

func (b *bench) killAndResume(c contender) (took time.Duration, err error) {
	p, err := b.newPlace(c)
	if err != nil {
		return 0, err
	}
	p.connections = b.pools[len(b.pools)-1]
	defer func() { err = errors.Join(err, b.remove(p)) }()
	ids := b.newIDs(b.interrupted)
	if err := leaveHanging(c, p, ids); err != nil {
		return 0, err
	}
	start := time.Now()
	s, err := c.open(p)
	if err != nil {
		return 0, err
	}
	defer func() { err = joinClose(err, s) }()
	if _, err := race(s, min(64, len(ids)), each(ids)); err != nil {
		return 0, err
	}
	took = time.Since(start)
	ctx := context.Background()
	return took, errors.Join(check(ctx, s, ids), checkCount(ctx, s, len(ids)))
}

// leaveHanging has a process make the requests, and kills it when all are in their effects.
func leaveHanging(c contender, p place, ids []string) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), stagingLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, crashCommand, c.name, p.dir, p.dsn, strconv.Itoa(p.connections))
	cmd.Env = append(os.Environ(), crashVariable+"=1")
	cmd.Stderr = os.Stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		return err
	}
	for _, id := range ids {
		fmt.Fprintln(in, id)
	}
	in.Close()
	said, _ := io.ReadAll(io.LimitReader(out, int64(len(allHang))))
	killed := cmd.Process.Kill()
	cmd.Wait()
	if string(said) != allHang {
		return fmt.Errorf("the process to be killed did not get its requests into their effects within %v", stagingLimit)
	}
	return killed
}

// crashVariable tells a test's program, too, that it is to be killed.
const crashVariable = "KEYSTATE_BENCH_CRASH"

// staging is how keystate on bbolt takes up very many keys, put into the store as a crash leaves them.
type staging struct {
	keys    int
	opening time.Duration // and registering
	resumed float64       // keys a second, with opening
	fresh   float64       // requests a second, at the same parallelism
	failed  error
}

const resumeParallelism = 64

func (s *staging) measure(b *bench, c contender) (err error) {
	p, err := b.newPlace(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove(p)) }()
	if err := stage(p, s.keys); err != nil {
		return err
	}
	o := forEver
	o.Parallelism = resumeParallelism
	start := time.Now()
	e, err := openBoltEngine(p, o)
	if err != nil {
		return err
	}
	defer func() { err = joinClose(err, e) }()
	s.opening = time.Since(start)
	if err := e.Resume(context.Background()); err != nil {
		return err
	}
	s.resumed = float64(s.keys) / time.Since(start).Seconds()
	stats, err := e.Stats(context.Background())
	if err == nil && stats.Finished != uint64(s.keys) {
		err = fmt.Errorf("%d keys are finished, not %d", stats.Finished, s.keys)
	}
	if err != nil {
		return err
	}
	fresh, err := race(e, resumeParallelism, during(max(b.slice, 10*b.slice), b.newID))
	s.fresh = fresh.rate()
	return err
}

// stage puts copies of a key into the store that was in its effect.
func stage(p place, keys int) (err error) {
	live, _, err := records(p.dir)
	if err != nil {
		return err
	}
	e, err := openBoltEngine(p, forEver)
	if err != nil {
		return err
	}
	if err := e.close(); err != nil {
		return err
	}
	db, err := bbolt.Open(boltPath(p), 0o600, nil)
	if err != nil {
		return err
	}
	store := keystate.Bolt(db)
	defer func() { err = errors.Join(err, store.Close(), db.Close()) }()
	if _, _, err := store.Boot(context.Background()); err != nil {
		return err
	}
	at := time.Now().Truncate(time.Microsecond)
	for ids := range batches(keys, mintedID) {
		if err := putCasts(store, mould{live}, ids, at); err != nil {
			return err
		}
	}
	return nil
}

func (t *text) recovery() {
	if len(t.b.resumed) > 0 {
		t.f("\n## Recovery\n\nA process was killed with %d requests in their effects. From opening the store until clients, 64 at a time, had all answers: asked again, each was right, and every business row was there once.", t.b.interrupted)
		t.table("", "seconds", "keys/s")
		for _, r := range t.b.resumed {
			if r.failed != nil {
				t.row(r.name, "failed", "")
				continue
			}
			t.row(r.name, number(r.took.Seconds()), number(float64(r.keys)/r.took.Seconds()))
		}
		for _, c := range t.b.field {
			if c.hold > 0 {
				t.row(c.name, fmt.Sprintf("not before %v have passed", c.hold), "")
			}
		}
	}
	if s := t.b.staging; s != nil && s.failed == nil {
		t.f("\nkeystate on bbolt, %s keys left in their effects, parallelism %d: %s keys/s, of which opening and registering took %s ms; fresh requests at the same parallelism: %s/s.",
			number(float64(s.keys)), resumeParallelism, number(s.resumed), number(s.opening.Seconds()*1e3), number(s.fresh))
	}
}
