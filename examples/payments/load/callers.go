package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"sync"
	"time"

	"example.com/keystate/keyhttp"
)

// An answer is what an order got in the end.
type answer struct {
	key      string
	order    order
	status   int
	location string
	text     string
	kind     string // of a problem: the end of its type
	replayed bool
}

// callers ask, and remember what they were told.
type callers struct {
	url    string
	client *http.Client
	ended  func() // is told when a task is done

	mu      sync.Mutex
	answers []answer
}

// patient is a client that asks again, in the way a program would that uses keyhttp, only sooner.
func patient() *http.Client {
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.MaxIdleConnsPerHost = 256
	return &http.Client{Transport: &keyhttp.Transport{Base: base, Initial: 10 * time.Millisecond, Max: 300 * time.Millisecond}}
}

// errAsked is how the callers end when every task has its answers.
var errAsked = errors.New("every task has its answers")

// askAll works through the tasks, so many at a time.
func (c *callers) askAll(ctx context.Context, tasks []task, atOnce int) error {
	defer c.client.CloseIdleConnections()
	next := make(chan task)
	faults := make(chan error, atOnce)
	var group sync.WaitGroup
	for range atOnce {
		group.Go(func() {
			for t := range next {
				if err := c.do(ctx, t); err != nil {
					faults <- err
					return
				}
				c.ended()
			}
		})
	}
	var err error
	for i := 0; i < len(tasks) && err == nil; i++ {
		select {
		case next <- tasks[i]:
		case err = <-faults:
		}
	}
	close(next)
	group.Wait()
	select {
	case fault := <-faults: // one is as good as all
		err = cmp.Or(err, fault)
	default:
	}
	return cmp.Or(err, errAsked)
}

// do is one task, from the first request to the last retry.
func (c *callers) do(ctx context.Context, t task) (err error) {
	if t.minted {
		if t.key, err = c.mint(ctx); err != nil {
			return err
		}
	}
	orders := []order{}
	for range t.copies {
		orders = append(orders, t.order)
	}
	if t.rival != nil {
		orders = append(orders, *t.rival)
	}
	faults := make([]error, len(orders))
	var group sync.WaitGroup
	for i, o := range orders {
		group.Go(func() { faults[i] = c.ask(ctx, t.key, o) })
	}
	group.Wait()
	if err := errors.Join(faults...); err != nil {
		return err
	}
	for range t.late {
		if err := c.ask(ctx, t.key, t.order); err != nil {
			return err
		}
	}
	if t.clash != nil {
		return c.ask(ctx, t.key, *t.clash)
	}
	return nil
}

// ask sends an order until it has its answer. Keyhttp.Transport does most of it; but it, too, gives up when the service is away for
// long, and what it has got may be cut short.
func (c *callers) ask(ctx context.Context, key string, o order) error {
	for {
		a, err := c.once(ctx, &key, o)
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("the order %s under %s got no answer: %w", o.body(), key, errors.Join(context.Cause(ctx), err))
		case err == nil && a.definite():
			c.mu.Lock()
			c.answers = append(c.answers, a)
			c.mu.Unlock()
			return nil
		}
	}
}

// definite says whether an answer is one. The others say that there is none yet.
func (a answer) definite() bool {
	return a.status != http.StatusConflict && a.status != http.StatusServiceUnavailable
}

// once is one call to keyhttp.Transport. A key that it has minted goes into key.
func (c *callers) once(ctx context.Context, key *string, o order) (a answer, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+"/v1/transfers", strings.NewReader(o.body()))
	if err != nil {
		return a, err
	}
	r.Header.Set("Authorization", "Bearer "+o.From+"-secret")
	r.Header.Set("Content-Type", "application/json")
	if *key != "" {
		r.Header.Set("Idempotency-Key", *key)
	}
	resp, err := c.client.Do(r)
	var unanswered *keyhttp.UnansweredError
	if errors.As(err, &unanswered) {
		*key = unanswered.Key
	}
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	*key = resp.Request.Header.Get("Idempotency-Key")
	text, err := io.ReadAll(resp.Body)
	a = answer{
		key: *key, order: o, status: resp.StatusCode, text: string(text), location: resp.Header.Get("Location"),
		replayed: resp.Header.Get("Idempotent-Replayed") == "true",
	}
	if resp.Header.Get("Content-Type") == "application/problem+json" {
		a.kind = problemKind(text)
	}
	return a, err
}

// problemKind is the last part of a problem's type.
func problemKind(text []byte) string {
	var p keyhttp.Problem
	if json.Unmarshal(text, &p) != nil {
		return "unreadable"
	}
	return path.Base(p.Type)
}

// mint gets a key from the service.
func (c *callers) mint(ctx context.Context) (string, error) {
	for {
		key, err := c.mintOnce(ctx)
		switch {
		case ctx.Err() != nil:
			return "", fmt.Errorf("no key was minted: %w", errors.Join(context.Cause(ctx), err))
		case err == nil:
			return key, nil
		}
	}
}

func (c *callers) mintOnce(ctx context.Context) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+"/idempotency-keys", nil)
	if err != nil {
		return "", err
	}
	resp, err := c.client.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var minted struct {
		Key string `json:"idempotency_key"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&minted); err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusCreated || minted.Key == "" {
		return "", fmt.Errorf("%s", resp.Status)
	}
	return fmt.Sprintf("%q", minted.Key), nil
}
