//go:build unix

package kill

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// The child: a program that moves money, as keystate's users write it, and is killed all the time.

const (
	pathVariable = "KEYSTATE_KILL_STORE" // makes a test binary the child on that store
	bugVariable  = "KEYSTATE_KILL_BUG"
)

const (
	accounts  = 8
	opening   = 10_000          // cents in each account
	inTransit = "in transit"    // the account of money that has left one and not reached another
	retention = 2 * time.Second // so that keys are reaped, and used again, while the test runs
)

var (
	bucketAccounts = []byte("accounts")
	bucketRows     = []byte("rows")
)

func account(n int) string { return fmt.Sprintf("account %d", n) }

// A child is the program: it lives until it is killed or told to close.
type child struct {
	bug       bug
	parent    *line
	engine    *keystate.Engine[*bbolt.Tx]
	transfers *keystate.Machine[transfer]
	receipts  *keystate.Machine[transfer]
	cached    map[string]int64 // of the bug that counts in memory

	mu       sync.Mutex
	calls    map[int]chan reply
	asked    map[string]int  // the last request's number, by its key
	stumbled map[string]bool // rows
}

// runChild is the child's main function.
func runChild(path string, b bug) {
	c := &child{
		bug: b, parent: newLine(os.Stdout),
		calls: map[int]chan reply{}, asked: map[string]int{}, stumbled: map[string]bool{},
	}
	c.parent.send(report{Hello: true})
	began := time.Now()
	if err := c.open(path); err != nil {
		c.parent.send(report{Broken: "open: " + err.Error()})
		return
	}
	took := time.Since(began)
	if err := c.prepare(); err != nil {
		c.parent.send(report{Broken: "prepare: " + err.Error()})
		return
	}
	c.parent.send(report{Ready: &opened{took.Microseconds()}})
	if err := c.listen(); err != nil {
		c.parent.send(report{Broken: "close: " + err.Error()})
		return
	}
	c.parent.send(report{Closed: true})
}

func (c *child) open(path string) (err error) {
	if c.bug == opensSlowly {
		time.Sleep(openWithin + 50*time.Millisecond)
	}
	o := &keystate.Options{
		Retention: retention,
		Observer:  &keystate.Observer{Retried: c.report},
		Logger:    slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	}
	switch c.bug {
	case twoTransactions:
		c.engine, err = openSplit(path, o)
	case neverSyncs:
		c.engine, err = openUnsynced(path, o)
	default:
		c.engine, err = keystate.Open(path, o)
	}
	return err
}

// report tells the parent of effects whose results are durable before their commits are.
func (c *child) report(e keystate.Event) {
	var owed *owedError
	if errors.As(e.Err, &owed) {
		c.parent.send(report{Owed: owed})
	}
}

// prepare registers the machines, and opens the accounts where there are none.
func (c *child) prepare() (err error) {
	if err = c.engine.Update(context.Background(), openAccounts); err != nil {
		return err
	}
	if c.cached, err = c.balances(); err != nil {
		return err
	}
	if c.bug == hoards {
		hoard = make([]byte, memoryLimit+memoryLimit/8)
		for i := 0; i < len(hoard); i += 4096 {
			hoard[i] = 1
		}
	}
	if c.receipts, err = keystate.Register(c.engine, "receipt", c.receiptPhases()); err != nil {
		return err
	}
	c.transfers, err = keystate.Register(c.engine, "transfer", c.transferPhases())
	return err
}

// hoard is the memory that one of the bugs does not let go of.
var hoard []byte

// listen serves the parent until it says that it is enough, or is gone.
func (c *child) listen() error {
	for in := gob.NewDecoder(os.Stdin); ; {
		var cmd command
		if err := in.Decode(&cmd); err != nil {
			return err
		}
		switch {
		case cmd.Request != nil:
			go c.serve(*cmd.Request)
		case cmd.Reply != nil:
			c.mu.Lock()
			waits := c.calls[cmd.Reply.Number]
			delete(c.calls, cmd.Reply.Number)
			c.mu.Unlock()
			waits <- *cmd.Reply
		case cmd.Finish:
			go c.finish()
		case cmd.Close:
			go c.drain(in)
			return c.engine.Close()
		}
	}
}

// drain takes what still comes in while the engine closes, and drops it, as a process that does not listen any more would.
func (c *child) drain(in *gob.Decoder) {
	for {
		var cmd command
		if in.Decode(&cmd) != nil {
			return
		}
		if cmd.Request != nil {
			c.parent.send(report{Answer: &answer{Number: cmd.Request.Number, Closed: true}})
		}
	}
}

// serve carries one request to its answer.
func (c *child) serve(r request) {
	c.mu.Lock()
	c.asked[r.Transfer.ID] = r.Number
	c.mu.Unlock()
	s, err := c.transfers.Do(context.Background(), keystate.Key{Scope: "client", ID: r.Transfer.ID}, r.Transfer)
	var refused *keystate.FinalError
	var stopped *keystate.PhaseError
	switch {
	case err == nil:
		c.parent.send(report{Answer: &answer{Number: r.Number, Text: textOf(s, "")}})
	case errors.As(err, &refused):
		c.parent.send(report{Answer: &answer{Number: r.Number, Text: textOf(s, refused.Error())}})
	case errors.Is(err, keystate.ErrClosed):
		c.parent.send(report{Answer: &answer{Number: r.Number, Closed: true}})
	case errors.As(err, &stopped) && errors.Is(err, errStumbled) && !errors.Is(err, keystate.ErrParked):
		c.parent.send(report{Answer: &answer{Number: r.Number}})
	default:
		c.parent.send(report{Broken: err.Error()})
	}
}

// finish waits until every key has ended, those that were staged and those that nobody asks for any more included.
func (c *child) finish() {
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	err := c.engine.Resume(ctx)
	n, err2 := c.engine.Stats(ctx)
	if err := cmp.Or(err, err2); err != nil {
		c.parent.send(report{Broken: "finish: " + err.Error()})
		return
	}
	c.parent.send(report{Counts: &counts{Unfinished: n.Running + n.Waiting + n.Parked, Finished: n.Finished}})
}

// A settlement is what a client is told.
type settlement struct {
	Transfer transfer
	Refusal  string `json:",omitempty"`
}

func textOf(s transfer, refusal string) string {
	b, err := json.Marshal(settlement{s, refusal})
	if err != nil {
		panic(err)
	}
	return string(b)
}

type phase = keystate.Phase[*bbolt.Tx, transfer]

// errStumbled is an obstacle: the same attempt will succeed the next time, or the one after.
var errStumbled = errors.New("stumbled")

// patient lets nothing park, however often the process dies in an attempt.
var patient = keystate.RetryPolicy{Attempts: -1, Initial: time.Millisecond, Max: 20 * time.Millisecond}

func (c *child) transferPhases() []phase {
	staging := patient
	if c.bug == givesUp {
		staging.Attempts = 1
	}
	return []phase{
		{To: "funds_reserved", Retry: patient, Commit: c.reserve},
		{To: "payout_sent", Retry: patient, Effect: c.sendPayout, Commit: c.arrive},
		{To: "receipt_staged", Retry: staging, Commit: c.stageReceipt},
		{To: keystate.Finished, Retry: patient, Commit: func(_ context.Context, tx *bbolt.Tx, s *transfer) error {
			return addRow(tx, "settled/"+s.Token)
		}},
	}
}

func (c *child) receiptPhases() []phase {
	return []phase{{
		To: keystate.Finished, Retry: patient,
		Effect: func(ctx context.Context, token string, s *transfer) (err error) {
			_, err = c.call(ctx, "receipt/"+s.Token, token)
			return err
		},
		Commit: func(_ context.Context, tx *bbolt.Tx, s *transfer) error { return addRow(tx, "receipt/"+s.Token) },
	}}
}

// reserve takes the money out of its account, or refuses.
func (c *child) reserve(_ context.Context, tx *bbolt.Tx, s *transfer) error {
	balance := balanceOf(tx, s.From)
	if c.bug == countsInMemory {
		balance = c.cached[s.From]
	}
	if balance < s.Cents {
		return keystate.Final(fmt.Errorf("%s holds %d", s.From, balance))
	}
	c.cached[s.From] = balance - s.Cents
	return errors.Join(
		setBalance(tx, s.From, balance-s.Cents),
		addBalance(tx, inTransit, s.Cents),
		addRow(tx, "reserved/"+s.ID),
	)
}

// arrive puts the money where it belongs.
func (c *child) arrive(_ context.Context, tx *bbolt.Tx, s *transfer) error {
	err := errors.Join(addBalance(tx, inTransit, -s.Cents), addBalance(tx, s.To, s.Cents), addRow(tx, "sent/"+s.Token))
	if err == nil && c.stumbles("sent/"+s.Token) {
		return &owedError{s.ID, s.Token}
	}
	return err
}

func (c *child) sendPayout(ctx context.Context, token string, s *transfer) (err error) {
	if c.bug == inventsTokens {
		token = keystate.NewID()
	}
	s.Token = token
	if s.Payout, err = c.call(ctx, s.ID, token); err == nil && c.bug == answersEarly {
		c.mu.Lock()
		number, asked := c.asked[s.ID]
		c.mu.Unlock()
		if asked { // by this child's clients
			c.parent.send(report{Answer: &answer{Number: number, Text: textOf(*s, "")}})
		}
	}
	return err
}

func (c *child) stageReceipt(_ context.Context, tx *bbolt.Tx, s *transfer) error {
	if err := addRow(tx, "staged/"+s.Token); err != nil {
		return err
	}
	if c.stumbles("staged/" + s.Token) {
		return errStumbled
	}
	return keystate.Stage(tx, c.receipts, keystate.Key{Scope: "receipt", ID: s.Token}, transfer{Token: s.Token})
}

// stumbles is true once in a process for every eighth row.
func (c *child) stumbles(row string) bool {
	h := fnv.New32a()
	h.Write([]byte(row))
	c.mu.Lock()
	defer c.mu.Unlock()
	first := !c.stumbled[row]
	c.stumbled[row] = true
	return first && h.Sum32()%8 == 0
}

// call is an effect: the outside world's answer to a token, or that none came.
func (c *child) call(ctx context.Context, book, token string) (payout string, err error) {
	answered, number := make(chan reply, 1), rand.Int()
	c.mu.Lock()
	c.calls[number] = answered
	c.mu.Unlock()
	c.parent.send(report{Call: &call{Number: number, Book: book, Token: token}})
	select {
	case r := <-answered:
		if r.Fault != "" {
			return "", fmt.Errorf("%w: %s", errStumbled, r.Fault)
		}
		return r.Payout, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func openAccounts(tx *bbolt.Tx) error {
	if tx.Bucket(bucketAccounts) != nil {
		return nil
	}
	_, err := tx.CreateBucket(bucketAccounts)
	_, err2 := tx.CreateBucket(bucketRows)
	for n := range accounts {
		err = cmp.Or(err, err2, setBalance(tx, account(n), opening))
	}
	return err
}

func (c *child) balances() (map[string]int64, error) {
	all := map[string]int64{}
	return all, c.engine.View(context.Background(), func(tx *bbolt.Tx) error {
		for n := range accounts {
			all[account(n)] = balanceOf(tx, account(n))
		}
		return nil
	})
}

func balanceOf(tx *bbolt.Tx, name string) int64 {
	return number(tx.Bucket(bucketAccounts).Get([]byte(name)))
}

func setBalance(tx *bbolt.Tx, name string, cents int64) error {
	return tx.Bucket(bucketAccounts).Put([]byte(name), binary.BigEndian.AppendUint64(nil, uint64(cents)))
}

func addBalance(tx *bbolt.Tx, name string, cents int64) error {
	return setBalance(tx, name, balanceOf(tx, name)+cents)
}

// addRow writes a row of the program's, and counts how often it was written: no phase that is carried out twice goes unseen.
func addRow(tx *bbolt.Tx, name string) error {
	rows := tx.Bucket(bucketRows)
	return rows.Put([]byte(name), binary.BigEndian.AppendUint64(nil, uint64(number(rows.Get([]byte(name)))+1)))
}

func number(b []byte) int64 {
	if b == nil {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b))
}
