// Payments is an HTTP service that moves money: keystate's machine of examples/internal/money behind keyhttp.Handle.
//
//	go run ./examples/payments
//
// serves it, with its store in payments.db and a payment processor of its own beside it. docs/http.md walks through it with curl.
//
//	main.go       the process: flags, signals, the server
//	service.go    the store, the machine, and what an earlier process left unfinished
//	api.go        the endpoints
//	problems.go   what clients are told when there is no transfer
//	login.go      who asks; a toy
//	log.go        a line for each request
//	openapi.json  the interface, as the service hands it out; a test holds it against the routes
//	load/         its torture
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"example.com/keystate/examples/internal/processor"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "payments:", err)
		os.Exit(1)
	}
}

// settings are the flags.
type settings struct {
	address   string
	store     string
	processor string
	slow      time.Duration
	timeout   time.Duration
	grace     time.Duration
}

func parse(args []string) (s settings, err error) {
	flags := flag.NewFlagSet("payments", flag.ContinueOnError)
	flags.StringVar(&s.address, "addr", "127.0.0.1:8080", "the `address` to serve at; its URL goes to standard output")
	flags.StringVar(&s.store, "store", "payments.db", "the bbolt `file`")
	flags.StringVar(&s.processor, "processor", "", "the payment processor's `URL` (default: one in this process, with its ledger beside the store)")
	flags.DurationVar(&s.slow, "slow", 0, "how long that processor in this process takes to answer")
	flags.DurationVar(&s.timeout, "payout-timeout", 30*time.Second, "how long a processor may take to answer")
	flags.DurationVar(&s.grace, "grace", 5*time.Second, "how long requests under way have at SIGTERM until they are told to ask again")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	switch {
	case flags.NArg() > 0:
		return s, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case s.slow > 0 && s.processor != "":
		return s, errors.New("-slow is about the processor in this process, and -processor names another")
	}
	return s, nil
}

// run serves until ctx ends.
func run(ctx context.Context, args []string, out, logs io.Writer) (err error) {
	set, err := parse(args)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(logs, nil))
	if set.processor == "" {
		p, err := startProcessor(set)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.stop()) }()
		set.processor = p.url
	}
	s, err := openService(ctx, set.store, &processor.Client{URL: set.processor}, set.timeout, log)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", set.address)
	if err != nil {
		return errors.Join(err, s.engine.Close())
	}
	url := "http://" + listener.Addr().String()
	log.Info("serving", "url", url, "store", set.store, "processor", set.processor, "pid", os.Getpid())
	fmt.Fprintln(out, url)
	return serve(ctx, listener, s, set.grace)
}

// How long requests may take, and how long they have for their goodbye when the server ends.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 15 * time.Second
	idleTimeout   = 2 * time.Minute
	parting       = time.Second
)

// serve answers requests until ctx ends, and then lets those that are under way end.
func serve(ctx context.Context, listener net.Listener, s *service, grace time.Duration) error {
	server := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      readTimeout + s.slowestAnswer(),
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return errors.Join(err, s.engine.Close())
	case <-ctx.Done():
	}
	s.log.Info("shutting down", "grace", grace.String())
	late := shutdown(server, grace)
	// Who still waits for a payment is told to ask again with the same key: it goes on at the next start.
	err := s.engine.Close()
	if late != nil {
		shutdown(server, parting)
	}
	err = errors.Join(err, server.Close())
	if fault := <-served; !errors.Is(fault, http.ErrServerClosed) {
		err = errors.Join(err, fault)
	}
	s.log.Info("shut down", "in_time", late == nil)
	return err
}

func shutdown(server *http.Server, within time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	return server.Shutdown(ctx)
}

// A localProcessor spares whoever tries the service a second command. It shares the service's process, not its store: to the
// service it is the world outside, and what it has paid stands in its own ledger.
type localProcessor struct {
	url       string
	processor *processor.Processor
	server    *http.Server
}

func startProcessor(set settings) (*localProcessor, error) {
	p, err := processor.Open(set.store+".ledger.jsonl", processor.Faults{Pause: set.slow})
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	l := &localProcessor{"http://" + listener.Addr().String(), p, &http.Server{Handler: p.Handler(), ReadHeaderTimeout: headerTimeout}}
	go l.server.Serve(listener)
	return l, nil
}

func (l *localProcessor) stop() error { return errors.Join(l.server.Close(), l.processor.Close()) }
