package keystate_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

type Transfer struct {
	From, To string
	Cents    int64
	Payout   string // filled in by payout_sent
}

type phase = keystate.Phase[*bbolt.Tx, Transfer]

// moveMoney changes an account's balance.
func moveMoney(tx *bbolt.Tx, account string, cents int64) error {
	accounts, err := tx.CreateBucketIfNotExists([]byte("accounts"))
	if err != nil {
		return err
	}
	balance, _ := strconv.ParseInt(string(accounts.Get([]byte(account))), 10, 64)
	return accounts.Put([]byte(account), strconv.AppendInt(nil, balance+cents, 10))
}

func reserveFunds(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
	return moveMoney(tx, t.From, -t.Cents)
}

// sendPayout calls the payment processor, which takes the token as its idempotency key.
func sendPayout(_ context.Context, token string, t *Transfer) error {
	t.Payout = "po_1"
	return nil
}

func settle(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
	return moveMoney(tx, t.To, t.Cents)
}

var transferPhases = []phase{
	{To: "funds_reserved", Commit: reserveFunds},
	{To: "payout_sent", Effect: sendPayout},
	{To: keystate.Finished, Commit: settle},
}

// tempStore is a path in a folder that the example removes.
func tempStore() (path string, remove func()) {
	dir, err := os.MkdirTemp("", "keystate")
	if err != nil {
		log.Fatal(err)
	}
	return filepath.Join(dir, "payments.db"), func() { os.RemoveAll(dir) }
}

// openTransfers opens a store with the machine of these examples.
func openTransfers(path string, phases []phase) (*keystate.Engine[*bbolt.Tx], *keystate.Machine[Transfer]) {
	engine, err := keystate.Open(path, &keystate.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		log.Fatal(err)
	}
	transfers, err := keystate.Register(engine, "transfer", phases)
	if err != nil {
		log.Fatal(err)
	}
	return engine, transfers
}

// A request is carried through its phases once; the same key gets the same answer again.
func Example() {
	path, remove := tempStore()
	defer remove()

	engine, err := keystate.Open(path, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	transfers, err := keystate.Register(engine, "transfer", transferPhases)
	if err != nil {
		log.Fatal(err)
	}

	key := keystate.Key{Scope: "ada", ID: "8e03c978"}
	for range 2 {
		answer, err := transfers.Do(context.Background(), key, Transfer{From: "ada", To: "bob", Cents: 20_00})
		fmt.Println(answer.Payout, err)
	}
	// Output:
	// po_1 <nil>
	// po_1 <nil>
}

// The same key for another request is refused.
func ExampleMachine_Do() {
	path, remove := tempStore()
	defer remove()
	engine, transfers := openTransfers(path, transferPhases)
	defer engine.Close()

	ctx, key := context.Background(), keystate.Key{Scope: "ada", ID: "8e03c978"}
	_, err := transfers.Do(ctx, key, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(err)
	_, err = transfers.Do(ctx, key, Transfer{From: "ada", To: "bob", Cents: 90_00})
	fmt.Println(errors.Is(err, keystate.ErrMismatch))
	// Output:
	// <nil>
	// true
}

// Start returns as soon as the request cannot be lost any more, which is when to answer 202 Accepted.
func ExampleMachine_Start() {
	path, remove := tempStore()
	defer remove()
	engine, transfers := openTransfers(path, transferPhases)
	defer engine.Close()

	run, err := transfers.Start(context.Background(), keystate.Key{ID: keystate.NewID()}, Transfer{From: "ada", To: "bob", Cents: 20_00})
	if err != nil {
		log.Fatal(err)
	}
	<-run.Done()
	answer, err := run.Wait(context.Background())
	fmt.Println(run.Replayed(), answer.Payout, err)
	// Output: false po_1 <nil>
}

// An engine that is closed while an effect is under way goes on when it is opened again.
func ExampleEngine_Resume() {
	path, remove := tempStore()
	defer remove()
	ctx, key := context.Background(), keystate.Key{Scope: "ada", ID: "8e03c978"}

	hanging := []phase{transferPhases[0], transferPhases[1], transferPhases[2]}
	hanging[1].Effect = func(ctx context.Context, _ string, _ *Transfer) error {
		<-ctx.Done() // the processor does not answer
		return ctx.Err()
	}
	engine, transfers := openTransfers(path, hanging)
	if _, err := transfers.Start(ctx, key, Transfer{From: "ada", To: "bob", Cents: 20_00}); err != nil {
		log.Fatal(err)
	}
	engine.Close()

	engine, _ = openTransfers(path, transferPhases)
	defer engine.Close()
	if err := engine.Resume(ctx); err != nil {
		log.Fatal(err)
	}
	record, err := engine.Key(ctx, key)
	if err != nil {
		log.Fatal(err)
	}
	for _, passage := range record.History {
		fmt.Println(passage.Point)
	}
	// Output:
	// started
	// funds_reserved
	// payout_sent
	// finished
}

// Final makes an error the answer; what the phase left in the state is returned beside it.
func ExampleFinal() {
	path, remove := tempStore()
	defer remove()
	declining := []phase{transferPhases[0], transferPhases[1], transferPhases[2]}
	declining[1].Effect = func(_ context.Context, _ string, t *Transfer) error {
		t.Payout = "none"
		return keystate.Final(errors.New("account closed"))
	}
	engine, transfers := openTransfers(path, declining)
	defer engine.Close()

	for range 2 {
		answer, err := transfers.Do(context.Background(), keystate.Key{Scope: "ada", ID: "8e03"}, Transfer{From: "ada", To: "bob", Cents: 20_00})
		var final *keystate.FinalError
		fmt.Println(errors.As(err, &final), answer.Payout, err)
	}
	// Output:
	// true none keystate: ada/8e03 ended before "payout_sent": account closed
	// true none keystate: ada/8e03 ended before "payout_sent": account closed
}

// What must not be saved as the answer is withdrawn: the key may be used again, as if nothing had been.
func ExampleWithdraw() {
	path, remove := tempStore()
	defer remove()
	busy := true
	engine, transfers := openTransfers(path, []phase{
		{To: "funds_reserved", Commit: func(ctx context.Context, tx *bbolt.Tx, t *Transfer) error {
			if busy {
				return keystate.Withdraw(errors.New("too many requests"))
			}
			return reserveFunds(ctx, tx, t)
		}},
		{To: keystate.Finished, Effect: sendPayout},
	})
	defer engine.Close()

	ctx, key := context.Background(), keystate.Key{Scope: "ada", ID: "8e03c978"}
	_, err := transfers.Do(ctx, key, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(errors.Is(err, keystate.ErrWithdrawn), err)
	busy = false
	answer, err := transfers.Do(ctx, key, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(answer.Payout, err)
	// Output:
	// true keystate: ada/8e03c978 withdrawn before "funds_reserved": too many requests
	// po_1 <nil>
}

// The three answers to a failure: ignore it, pass it to the user, or try again.
func ExampleErrorPolicy() {
	path, remove := tempStore()
	defer remove()
	tries := 0
	engine, transfers := openTransfers(path, []phase{
		{To: "payer_notified", OnError: keystate.Ignore, Effect: func(context.Context, string, *Transfer) error {
			return errors.New("mail server is down") // that is no reason to stop
		}},
		{To: "payout_sent", OnError: keystate.Retry, Retry: keystate.RetryPolicy{Initial: time.Millisecond}, Effect: func(context.Context, string, *Transfer) error {
			if tries++; tries == 1 {
				return errors.New("connection reset") // the next attempt may succeed
			}
			return nil
		}},
		{To: keystate.Finished, OnError: keystate.Fail, Commit: func(context.Context, *bbolt.Tx, *Transfer) error {
			return errors.New("no such account") // trying again would not help
		}},
	})
	defer engine.Close()
	_, err := transfers.Do(context.Background(), keystate.Key{Scope: "ada", ID: "8e03"}, Transfer{From: "ada", To: "nobody", Cents: 20_00})
	fmt.Println(err)
	// Output: keystate: ada/8e03 ended before "finished": no such account
}

// Stage starts another key with this one's commit: the receipt is written exactly if the money has moved.
func ExampleStage() {
	path, remove := tempStore()
	defer remove()
	engine, err := keystate.Open(path, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()

	receipts, err := keystate.Register(engine, "receipt", []phase{
		{To: keystate.Finished, Effect: func(_ context.Context, token string, t *Transfer) error {
			fmt.Println("receipt for", t.From)
			return nil
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	transfers, err := keystate.Register(engine, "transfer", []phase{
		{To: keystate.Finished, Commit: func(ctx context.Context, tx *bbolt.Tx, t *Transfer) error {
			if err := settle(ctx, tx, t); err != nil {
				return err
			}
			return keystate.Stage(tx, receipts, keystate.Key{Scope: "receipt", ID: "8e03"}, *t)
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	if _, err := transfers.Do(ctx, keystate.Key{Scope: "ada", ID: "8e03"}, Transfer{From: "ada", To: "bob", Cents: 20_00}); err != nil {
		log.Fatal(err)
	}
	if err := engine.Resume(ctx); err != nil {
		log.Fatal(err)
	}
	// Output: receipt for ada
}

// With AtMostOnce and Reconcile, an effect that the other side would repeat is never sent blindly.
func ExamplePhase_reconcile() {
	path, remove := tempStore()
	defer remove()
	sent := 0
	engine, transfers := openTransfers(path, []phase{{
		To:         keystate.Finished,
		AtMostOnce: true,
		Retry:      keystate.RetryPolicy{Initial: time.Millisecond},
		Effect: func(_ context.Context, token string, t *Transfer) error {
			sent++
			return errors.New("connection reset after the request was sent")
		},
		Reconcile: func(_ context.Context, token string, t *Transfer) (keystate.Outcome, error) {
			t.Payout = "po_1" // the other side's list of payments has it
			return keystate.Done, nil
		},
	}})
	defer engine.Close()
	answer, err := transfers.Do(context.Background(), keystate.Key{ID: "8e03"}, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(sent, answer.Payout, err)
	// Output: 1 po_1 <nil>
}

// A key that cannot go on by itself is parked; an operator finds it, and retries or abandons it.
func ExampleEngine_Keys() {
	path, remove := tempStore()
	defer remove()
	ctx := context.Background()
	down := []phase{transferPhases[0], transferPhases[1], transferPhases[2]}
	down[1].Retry = keystate.RetryPolicy{Attempts: 1}
	down[1].Effect = func(context.Context, string, *Transfer) error { return errors.New("processor is down") }
	engine, transfers := openTransfers(path, down)
	defer engine.Close()
	_, err := transfers.Do(ctx, keystate.Key{Scope: "ada", ID: "8e03"}, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(errors.Is(err, keystate.ErrParked))

	for record, err := range engine.Keys(ctx, keystate.Filter{Status: keystate.Parked}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(record.Key, "rests on", record.Point, "because", record.ParkReason, "by", record.LastError)
		if err := engine.Abandon(ctx, record.Key, "refunded by hand"); err != nil {
			log.Fatal(err)
		}
	}
	_, err = transfers.Do(ctx, keystate.Key{Scope: "ada", ID: "8e03"}, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(err)
	// Output:
	// true
	// ada/8e03 rests on funds_reserved because attempts used up by processor is down
	// keystate: ada/8e03 ended before "payout_sent": abandoned: refunded by hand
}

func ExampleEngine_Retry() {
	path, remove := tempStore()
	defer remove()
	ctx, key := context.Background(), keystate.Key{Scope: "ada", ID: "8e03"}
	up := false
	phases := []phase{transferPhases[0], transferPhases[1], transferPhases[2]}
	phases[1].Retry = keystate.RetryPolicy{Attempts: 1}
	phases[1].Effect = func(ctx context.Context, token string, t *Transfer) error {
		if !up {
			return errors.New("processor is down")
		}
		return sendPayout(ctx, token, t)
	}
	engine, transfers := openTransfers(path, phases)
	defer engine.Close()
	_, err := transfers.Do(ctx, key, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(err)

	up = true
	if err := engine.Retry(ctx, key); err != nil {
		log.Fatal(err)
	}
	answer, err := transfers.Do(ctx, key, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(answer.Payout, err)
	// Output:
	// keystate: ada/8e03 stopped before "payout_sent" (parked: attempts used up): processor is down
	// po_1 <nil>
}

// The keys may live in a database that the program has open already, beside its own buckets.
func ExampleBolt() {
	path, remove := tempStore()
	defer remove()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
	engine, err := keystate.New(keystate.Bolt(db), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	transfers, err := keystate.Register(engine, "transfer", transferPhases)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := transfers.Do(context.Background(), keystate.Key{ID: "8e03"}, Transfer{From: "ada", To: "bob", Cents: 20_00}); err != nil {
		log.Fatal(err)
	}
	err = db.View(func(tx *bbolt.Tx) error {
		fmt.Printf("bob has %s\n", tx.Bucket([]byte("accounts")).Get([]byte("bob")))
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: bob has 2000
}

// Update and View reach the program's own buckets in the engine's file.
func ExampleEngine_Update() {
	path, remove := tempStore()
	defer remove()
	engine, _ := openTransfers(path, transferPhases)
	defer engine.Close()
	ctx := context.Background()
	if err := engine.Update(ctx, func(tx *bbolt.Tx) error { return moveMoney(tx, "ada", 100_00) }); err != nil {
		log.Fatal(err)
	}
	err := engine.View(ctx, func(tx *bbolt.Tx) error {
		fmt.Printf("ada has %s\n", tx.Bucket([]byte("accounts")).Get([]byte("ada")))
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: ada has 10000
}

// A machine draws itself, for documents that cannot be stale.
func ExampleMachine_String() {
	path, remove := tempStore()
	defer remove()
	engine, transfers := openTransfers(path, transferPhases)
	defer engine.Close()
	fmt.Print(transfers)
	// Output:
	// ---
	// title: transfer
	// ---
	// stateDiagram-v2
	//     direction LR
	//     [*] --> started
	//     started --> funds_reserved : commit
	//     funds_reserved --> payout_sent : effect
	//     payout_sent --> finished : commit
	//     finished --> [*]
}

// An observer feeds metrics and traces.
func ExampleObserver() {
	path, remove := tempStore()
	defer remove()
	engine, err := keystate.Open(path, &keystate.Options{Observer: &keystate.Observer{
		Committed: func(ev keystate.Event) { fmt.Println("reached", ev.Point, "at attempt", ev.Attempt) },
	}})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	transfers, err := keystate.Register(engine, "transfer", transferPhases)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := transfers.Do(context.Background(), keystate.Key{ID: "8e03"}, Transfer{From: "ada", To: "bob", Cents: 20_00}); err != nil {
		log.Fatal(err)
	}
	// Output:
	// reached funds_reserved at attempt 1
	// reached payout_sent at attempt 1
	// reached finished at attempt 1
}

// A backup is taken while the engine works; it is verified, and compacted for the archive.
func ExampleBackup() {
	path, remove := tempStore()
	defer remove()
	engine, _ := openTransfers(path, transferPhases)
	defer engine.Close()

	backup, err := os.Create(path + ".backup")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := keystate.Backup(context.Background(), engine, io.Writer(backup)); err != nil {
		log.Fatal(err)
	}
	if err := backup.Close(); err != nil {
		log.Fatal(err)
	}
	fmt.Println(keystate.Verify(backup.Name()), keystate.Compact(backup.Name(), path+".archive"))
	// Output: <nil> <nil>
}
