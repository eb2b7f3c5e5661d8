//go:build unix

package kill

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// What a killed child has left in its file, read by the parent.

// A ledger is what the program has written.
type ledger struct {
	balances map[string]int64
	rows     map[string]int64 // how often each was written
}

// readLedger verifies the file and reads what the program has in it; nil when there is no file, or no accounts in it, yet.
func readLedger(path string) (l *ledger, err error) {
	if err := keystate.Verify(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	return l, db.View(func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketAccounts) == nil {
			return nil
		}
		l = &ledger{balances: map[string]int64{}, rows: map[string]int64{}}
		return errors.Join(
			tx.Bucket(bucketAccounts).ForEach(func(k, v []byte) error { l.balances[string(k)] = number(v); return nil }),
			tx.Bucket(bucketRows).ForEach(func(k, v []byte) error { l.rows[string(k)] = number(v); return nil }),
		)
	})
}

// look judges what a killed child has left.
func (w *world) look(path string) {
	l, err := readLedger(path)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.wrong("the file after a kill: %w", err)
		return
	}
	w.seen["a file looked into"]++
	if l == nil {
		l = &ledger{}
	} else {
		w.judgeMoney(l)
	}
	for name, n := range l.rows {
		if id, ok := strings.CutPrefix(name, "reserved/"); ok {
			if b := w.books[id]; b == nil || n > int64(len(b.lives)+1) {
				w.wrong("the row %s was written %d times; known: %s", name, n, b)
			}
		} else if n != 1 {
			w.wrong("the row %s was written %d times", name, n)
		}
	}
	for name, b := range w.books {
		w.judgeLives(name, b, l)
	}
}

// judgeMoney makes sure that money is neither made nor lost.
func (w *world) judgeMoney(l *ledger) {
	var sum int64
	for name, cents := range l.balances {
		if sum += cents; cents < 0 {
			w.wrong("%s holds %d", name, cents)
		}
	}
	if sum != accounts*opening {
		w.wrong("all accounts hold %d together, not %d: %v", sum, accounts*opening, l.balances)
	}
}

// judgeLives makes sure that what was acknowledged is in the file, and notes which results of effects are.
func (w *world) judgeLives(name string, b *book, l *ledger) {
	receipt := strings.HasPrefix(name, "receipt/")
	for _, life := range b.lives {
		switch {
		case receipt:
			life.recorded = life.recorded || l.rows[name] > 0
		case life.token != "":
			life.recorded = life.recorded || l.rows["sent/"+life.token] > 0
			if life.answer != "" && l.rows["settled/"+life.token] == 0 {
				w.wrong("%s: answered %s, and there is no row of it", name, life.answer)
			}
		}
	}
}

// settle judges what there is in the end, when every key has ended.
func (w *world) settle(path string, n *counts) {
	w.look(path)
	l, err := readLedger(path)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil || l == nil {
		w.wrong("the file in the end: %v, %w", l, err)
		return
	}
	if n.Unfinished > 0 {
		w.wrong("%d keys have not ended", n.Unfinished)
	}
	want := map[string]int64{inTransit: 0}
	for n := range accounts {
		want[account(n)] = opening
	}
	lives, rows := 0, 0
	for name, b := range w.books {
		if lives += len(b.lives); !strings.HasPrefix(name, "receipt/") {
			rows += w.settleBook(b, l, want)
		}
	}
	if rows != len(l.rows) {
		w.wrong("there are %d rows, and there should be %d", len(l.rows), rows)
	}
	for name, cents := range want {
		if l.balances[name] != cents {
			w.wrong("%s holds %d, not %d", name, l.balances[name], cents)
		}
	}
	w.seen["a key reaped"] += lives - int(n.Finished)
}

// settleBook judges one transfer in the end, adds what it moves, and returns how many rows it has.
func (w *world) settleBook(b *book, l *ledger, balances map[string]int64) (rows int) {
	var paid int64
	for i, life := range b.lives {
		reaped := i < len(b.lives)-1 // perhaps before its client came to hear the answer
		if life.answer == "" && (!reaped || l.rows["settled/"+life.token] != 1) {
			w.wrong("%s did not end: %s", b.transfer.ID, b)
		}
		if life.token == "" {
			continue
		}
		paid++
		for _, row := range []string{"sent/", "staged/", "settled/", "receipt/"} {
			if rows++; l.rows[row+life.token] != 1 {
				w.wrong("%s: the row %s is there %d times", b.transfer.ID, row+life.token, l.rows[row+life.token])
			}
		}
		if r := w.books["receipt/"+life.token]; r == nil || len(r.lives) != 1 {
			w.wrong("%s: its receipts are %s", b.transfer.ID, fmt.Sprint(r))
		}
	}
	if reserved := l.rows["reserved/"+b.transfer.ID]; reserved != paid {
		w.wrong("%s: reserved %d times, paid %d times", b.transfer.ID, reserved, paid)
	}
	if paid > 0 {
		rows++
	}
	balances[b.transfer.From] -= paid * b.transfer.Cents
	balances[b.transfer.To] += paid * b.transfer.Cents
	return rows
}
