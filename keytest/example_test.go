package keytest_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"

	"example.com/keystate"
	"example.com/keystate/keytest"
)

// A Transfer moves money between two users.
type Transfer struct {
	From, To string
	Cents    int64
	Payout   string // filled in by payout_sent
}

type phase = keystate.Phase[*bbolt.Tx, Transfer]

// transferPhases are the program's, for whichever side of the effects it talks to.
func transferPhases(pay func(ctx context.Context, token string, to string, cents int64) (string, error)) []phase {
	return []phase{
		{To: "funds_reserved", Commit: func(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
			return moveMoney(tx, t.From, -t.Cents)
		}},
		{To: "payout_sent", Effect: func(ctx context.Context, token string, t *Transfer) (err error) {
			t.Payout, err = pay(ctx, token, t.To, t.Cents)
			return err
		}},
		{To: keystate.Finished, Commit: func(_ context.Context, tx *bbolt.Tx, t *Transfer) error {
			return moveMoney(tx, t.To, t.Cents)
		}},
	}
}

func moveMoney(tx *bbolt.Tx, account string, cents int64) error {
	accounts, err := tx.CreateBucketIfNotExists([]byte("accounts"))
	if err != nil {
		return err
	}
	balance, _ := strconv.ParseInt(string(accounts.Get([]byte(account))), 10, 64)
	if balance+cents < 0 {
		return keystate.Final(errors.New("insufficient funds"))
	}
	return accounts.Put([]byte(account), strconv.AppendInt(nil, balance+cents, 10))
}

// paying lets a World be the payment processor.
func paying(w *keytest.World) func(ctx context.Context, token string, to string, cents int64) (string, error) {
	return func(ctx context.Context, token string, to string, cents int64) (string, error) {
		return w.Do(ctx, token, fmt.Sprintf("pay %s %d", to, cents))
	}
}

func adaHasMoney(tx *bbolt.Tx) error { return moveMoney(tx, "ada", 100_00) }

// moneyIsConserved adds up all accounts.
func moneyIsConserved(tx *bbolt.Tx, _ Transfer, _ error) error {
	sum := int64(0)
	err := tx.Bucket([]byte("accounts")).ForEach(func(_, balance []byte) error {
		cents, err := strconv.ParseInt(string(balance), 10, 64)
		sum += cents
		return err
	})
	if err == nil && sum != 100_00 {
		err = fmt.Errorf("there are %d cents, not 10000", sum)
	}
	return err
}

// A test of the program's phases. Here t is the *testing.T of the test.
func ExampleCrash() {
	TestTransferSurvivesEveryCrash := func(t *testing.T) {
		keytest.Crash(t, func(w *keytest.World) keytest.Case[*bbolt.Tx, Transfer] {
			return keytest.Case[*bbolt.Tx, Transfer]{
				Phases:  func(*keystate.Engine[*bbolt.Tx]) []phase { return transferPhases(paying(w)) },
				Setup:   adaHasMoney,
				Request: Transfer{From: "ada", To: "bob", Cents: 20_00},
				Check:   moneyIsConserved,
			}
		})
	}
	_ = TestTransferSurvivesEveryCrash
}

// The same for requests that are drawn: larger ones than ada has money for, too.
func ExampleProperty() {
	requests := rapid.Custom(func(t *rapid.T) Transfer {
		return Transfer{From: "ada", To: "bob", Cents: rapid.Int64Range(1, 200_00).Draw(t, "cents")}
	})
	TestEveryTransferSurvivesEveryCrash := func(t *testing.T) {
		keytest.Property(t, requests, func(w *keytest.World, _ Transfer) keytest.Case[*bbolt.Tx, Transfer] {
			return keytest.Case[*bbolt.Tx, Transfer]{
				Phases: func(*keystate.Engine[*bbolt.Tx]) []phase { return transferPhases(paying(w)) },
				Setup:  adaHasMoney,
				Check:  moneyIsConserved,
			}
		})
	}
	_ = TestEveryTransferSurvivesEveryCrash
}

func TestTransferSurvivesEveryCrash(t *testing.T) {
	keytest.Crash(t, func(w *keytest.World) keytest.Case[*bbolt.Tx, Transfer] {
		return keytest.Case[*bbolt.Tx, Transfer]{
			Phases:  func(*keystate.Engine[*bbolt.Tx]) []phase { return transferPhases(paying(w)) },
			Setup:   adaHasMoney,
			Request: Transfer{From: "ada", To: "bob", Cents: 20_00},
			Check:   moneyIsConserved,
		}
	})
}

// A World does what it is asked to once per token, and can lose its answer.
func ExampleWorld() {
	var w keytest.World
	ctx := context.Background()
	w.LoseNext(1)
	_, err := w.Do(ctx, "token-1", "pay bob 500")
	fmt.Println(err)
	receipt, err := w.Do(ctx, "token-1", "pay bob 500")
	fmt.Println(receipt, err)
	for _, d := range w.Deeds() {
		fmt.Printf("%s, asked for %d times\n", d.Request, d.Asked)
	}
	// Output:
	// keytest: the answer was lost
	// pay bob 500 #1 <nil>
	// pay bob 500, asked for 2 times
}

// Work that a commit has staged is carried on by the engine alone: a test waits until it is done.
func ExampleIdle() {
	TestReceiptIsSent := func(t *testing.T) {
		dir := t.TempDir()
		engine, err := keystate.Open(filepath.Join(dir, "payments.db"), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer engine.Close()
		// … register machines, and carry out a request that stages a receipt …
		keytest.Idle(t, engine)
		// … the receipt is sent …
	}
	_ = TestReceiptIsSent
}

// A World can be the other side in a test, or in a program's trial run, without any crash.
func ExampleWorld_Do() {
	dir, err := os.MkdirTemp("", "keytest")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	engine, err := keystate.Open(filepath.Join(dir, "payments.db"), &keystate.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	if err := engine.Update(context.Background(), adaHasMoney); err != nil {
		log.Fatal(err)
	}
	var w keytest.World
	transfers, err := keystate.Register(engine, "transfer", transferPhases(paying(&w)))
	if err != nil {
		log.Fatal(err)
	}
	answer, err := transfers.Do(context.Background(), keystate.Key{ID: "1"}, Transfer{From: "ada", To: "bob", Cents: 20_00})
	fmt.Println(answer.Payout, err)
	// Output: pay bob 2000 #1 <nil>
}

// Whoever writes a store proves it so; here, the store that keystate brings.
func ExampleStore() {
	TestMyStoreKeepsItsPromises := func(t *testing.T) {
		keytest.Store(t, keytest.OpenBolt, keytest.BoltRows())
	}
	_ = TestMyStoreKeepsItsPromises
}
