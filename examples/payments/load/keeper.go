package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/keystate/examples/internal/child"
)

// A keeper starts the service again and again on the same store, and ends it.
type keeper struct {
	settings
	processor string
	line      *line
	rng       *rand.Rand
	done      atomic.Int64  // tasks
	progress  chan struct{} // holds a token when done has grown

	killed, stopped int
}

// note counts a task that is done.
func (k *keeper) note() {
	k.done.Add(1)
	select {
	case k.progress <- struct{}{}:
	default:
	}
}

// Of the moments at which the service is ended.
const (
	earlyShare  = 8                     // one in so many is killed while it starts
	earlyFuse   = 40 * time.Millisecond // at the latest then, from its start
	fuse        = 30 * time.Millisecond // at the latest, from when as many tasks are done as were to be
	stopEvery   = 4                     // after so many kills there is a SIGTERM
	grace       = "50ms"                // that it gives its requests then
	patienceEnd = 15 * time.Second      // that a service has to end after SIGTERM
)

// lives lets the service live and die until it has been killed often enough and the callers have ended. The last one
// is up when it returns.
func (k *keeper) lives(ctx context.Context) (*server, error) {
	for {
		s, err := k.start()
		if err != nil {
			return nil, err
		}
		stop := k.stopped < k.killed/stopEvery
		last := k.killed == k.kills && !stop
		err = k.live(ctx, s, last, stop)
		switch {
		case err != nil:
			return nil, errors.Join(err, s.kill())
		case last:
			return s, nil
		case stop:
			k.stopped++
			err = s.stop()
		default:
			k.killed++
			err = s.kill()
		}
		if err != nil {
			return nil, err
		}
	}
}

// live waits until a service is to end: a random moment after a random number of tasks, spread over all of them. The
// last one lives until the callers have ended.
func (k *keeper) live(ctx context.Context, s *server, last, stop bool) error {
	var lit <-chan time.Time
	light := func(longest time.Duration) {
		if !last && lit == nil {
			lit = time.After(time.Duration(k.rng.Int64N(int64(longest))))
		}
	}
	if k.rng.IntN(earlyShare) == 0 && !stop { // SIGTERM before there is a handler for it would be a kill
		light(earlyFuse)
	}
	share := (int64(k.transfers) - k.done.Load()) / int64(k.kills-k.killed+1)
	enough := k.done.Load() + k.rng.Int64N(2*share+1)
	asked := ctx.Done()
	for {
		select {
		case text, ok := <-s.process.Lines:
			if !ok {
				return fmt.Errorf("the service ended by itself: see %s", k.logPath())
			}
			s.url = text
			k.line.leadTo(text)
		case <-k.progress:
		case <-lit:
			return nil
		case <-asked:
			if !errors.Is(context.Cause(ctx), errAsked) {
				return context.Cause(ctx)
			}
			asked = nil
		}
		switch {
		case s.url == "":
		case last && asked == nil:
			return nil
		case asked == nil || k.done.Load() >= enough:
			light(fuse)
		}
	}
}

// A server is one process of the service.
type server struct {
	process *child.Process
	url     string // when it is up
	log     *os.File
}

func (k *keeper) start() (*server, error) {
	log, err := os.OpenFile(k.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(k.settings.server, "-addr", "127.0.0.1:0", "-store", k.storePath(), "-processor", k.processor,
		"-payout-timeout", payoutTimeout.String(), "-grace", grace)
	cmd.Stderr = log
	p, err := child.Start(cmd)
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	return &server{process: p, log: log}, nil
}

func (s *server) kill() error {
	err := s.process.Kill()
	s.process.Wait()
	return errors.Join(err, s.log.Close())
}

// stop ends a server as an operator would.
func (s *server) stop() error {
	late := time.AfterFunc(patienceEnd, func() { s.process.Kill() })
	defer late.Stop()
	err := s.process.Signal(syscall.SIGTERM)
	return errors.Join(err, s.process.Wait(), s.log.Close())
}

// resumed adds up how many keys the services found interrupted, by their log.
func resumed(path string) (keys int, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for raw := range bytes.Lines(text) {
		var line struct {
			Msg  string `json:"msg"`
			Keys int    `json:"keys"`
		}
		if json.Unmarshal(raw, &line) == nil && line.Msg == "interrupted keys resume" { // what is no JSON, a kill has cut off
			keys += line.Keys
		}
	}
	return keys, nil
}
