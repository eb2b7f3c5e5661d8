package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"example.com/keystate/internal/proof/power/lossy"
)

// The process that serves the losing file system.

// What the server is asked over its socket, in a line each, and answers in one.
const (
	askCut   = "cut"   // cut the power; answered with done or spared
	askLie   = "lie"   // lie about syncs from now on; answered with done
	askTally = "tally" // answered with a tally as JSON

	done   = "done"
	spared = "spared" // the process was killed, and nothing else happened
	ready  = "ready"  // what the server says when the file system is mounted
)

type server struct {
	disk *lossy.FS

	mu    sync.Mutex
	rand  *rand.Rand
	spare float64 // the share of kills that no power cut follows
}

// serve mounts the file system and serves it until its standard input ends, with whoever holds the other end.
func serve(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	s := site{}
	flags.StringVar(&s.work, "work", "", "")
	flags.StringVar(&s.fuse, "fuse", "", "")
	flags.StringVar(&s.ext4, "ext4", "", "")
	seed := flags.Uint64("seed", 0, "")
	slow := flags.Duration("slow", 0, "")
	spare := flags.Float64("spare", 0, "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	v := &server{disk: lossy.New(*seed, *slow), rand: rand.New(rand.NewPCG(*seed, 1)), spare: *spare}
	if _, err := mountLossy(v.disk, s.fuse); err != nil {
		return fmt.Errorf("mount the losing file system: %w", err)
	}
	socket, err := net.Listen("unix", s.socket())
	if err != nil {
		return err
	}
	go v.listen(socket)
	fmt.Println(ready)
	_, _ = io.Copy(io.Discard, os.Stdin)
	return s.takeDown()
}

func (v *server) listen(socket net.Listener) {
	for {
		c, err := socket.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if line, err := bufio.NewReader(c).ReadString('\n'); err == nil {
				fmt.Fprintln(c, v.answer(strings.TrimSpace(line)))
			}
		}()
	}
}

func (v *server) answer(line string) string {
	switch line {
	case askCut:
		if v.spares() {
			return spared
		}
		v.disk.Cut()
		return done
	case askLie:
		v.disk.Lie()
		return done
	case askTally:
		b, _ := json.Marshal(v.disk.Tally()) // of integers: it cannot fail
		return string(b)
	}
	return "unknown: " + line
}

func (v *server) spares() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rand.Float64() < v.spare
}

// ask asks the server behind a socket.
func ask(socket, line string) (string, error) {
	c, err := net.DialTimeout("unix", socket, patience)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(answer), err
}
