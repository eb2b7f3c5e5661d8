package keytest

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// A transfer is the state of the machines in these tests.
type transfer struct {
	From, To string
	Cents    int64
	Payout   string    // filled in by payout_sent
	Sent     time.Time // filled in by payout_sent

	note string // does not survive encoding
}

type (
	phase    = keystate.Phase[*bbolt.Tx, transfer]
	testCase = Case[*bbolt.Tx, transfer]
	engine   = keystate.Engine[*bbolt.Tx]
)

// move changes an account's balance.
func move(tx *bbolt.Tx, account string, cents int64) error {
	b, err := tx.CreateBucketIfNotExists([]byte("accounts"))
	if err != nil {
		return err
	}
	return b.Put([]byte(account), strconv.AppendInt(nil, balance(tx, account)+cents, 10))
}

func balance(tx *bbolt.Tx, account string) int64 {
	b := tx.Bucket([]byte("accounts"))
	if b == nil {
		return 0
	}
	cents, _ := strconv.ParseInt(string(b.Get([]byte(account))), 10, 64)
	return cents
}

func reserve(_ context.Context, tx *bbolt.Tx, s *transfer) error {
	return move(tx, s.From, -s.Cents)
}

func settle(_ context.Context, tx *bbolt.Tx, s *transfer) error {
	return move(tx, s.To, s.Cents)
}

func pay(w *World) func(ctx context.Context, token string, s *transfer) error {
	return func(ctx context.Context, token string, s *transfer) (err error) {
		s.Payout, err = w.Do(ctx, token, fmt.Sprintf("pay %s %d", s.To, s.Cents))
		s.Sent = time.Now()
		return err
	}
}

// sound are the phases that every fixture breaks in one way.
func sound(w *World) []phase {
	return []phase{
		{To: "funds_reserved", Commit: reserve},
		{To: "payout_sent", Effect: pay(w)},
		{To: keystate.Finished, Commit: settle},
	}
}

func opened(tx *bbolt.Tx) error { return move(tx, "ada", 1000) }

func conserved(tx *bbolt.Tx, _ transfer, _ error) error {
	if sum := balance(tx, "ada") + balance(tx, "bob"); sum != 1000 {
		return fmt.Errorf("there are %d cents, not 1000", sum)
	}
	return nil
}

// caseOf is a case with the given phases.
func caseOf(phases func(e *engine) []phase) testCase {
	return testCase{Phases: phases, Setup: opened, Check: conserved, Request: transfer{From: "ada", To: "bob", Cents: 500}}
}

func TestSoundPhasesSurviveEveryCrash(t *testing.T) {
	Crash(t, func(w *World) testCase {
		c := caseOf(func(*engine) []phase { return sound(w) })
		c.Pairs = true
		return c
	})
}

var allPairs = flag.Bool("all-pairs", false, "let every set of correct phases meet two faults in a row")

func TestNothingIsFoundInCorrectPhases(t *testing.T) {
	const between = 3 // of so many sets of phases, one meets two faults in a row, unless -all-pairs asks for all
	for i, correct := range []struct {
		name  string
		build func(w *World) testCase
	}{
		{"an effect that must not run twice", func(w *World) testCase {
			w.IgnoresTokens = true
			return caseOf(func(*engine) []phase { return with(w, 1, func(p *phase) { p.AtMostOnce = true }) })
		}},
		{"one that must not run twice, and can be asked about", func(w *World) testCase {
			w.IgnoresTokens = true
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) { p.AtMostOnce, p.Reconcile = true, asking(w) })
			})
		}},
		{"tokens that are forgotten, as the phase knows", func(w *World) testCase {
			w.TokenLife = 24 * time.Hour
			return caseOf(func(*engine) []phase { return with(w, 1, func(p *phase) { p.TokenLife = 24 * time.Hour }) })
		}},
		{"a world that takes its time", func(w *World) testCase {
			w.Delay = 10 * time.Second
			return caseOf(func(*engine) []phase { return with(w, 1, func(p *phase) { p.Timeout = 15 * time.Second }) })
		}},
		{"a world that fails and loses answers besides", func(w *World) testCase {
			w.FailNext(1)
			w.LoseNext(1)
			return caseOf(func(*engine) []phase { return sound(w) })
		}},
		{"one attempt only", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) { p.Retry = keystate.RetryPolicy{Attempts: 1} })
			})
		}},
		{"an error that does not matter", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return slices.Insert(sound(w), 2, phase{To: "bob_told", OnError: keystate.Ignore, Effect: func(ctx context.Context, token string, s *transfer) error {
					_, err := w.Do(ctx, token, "tell bob")
					return err
				}})
			})
		}},
		{"a refusal by the first phase", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 0, func(p *phase) {
					p.Commit = func(context.Context, *bbolt.Tx, *transfer) error { return keystate.Final(errFault) }
				})
			})
		}},
		{"a request that the first commit withdraws", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 0, func(p *phase) {
					p.Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						return errors.Join(reserve(ctx, tx, s), keystate.Withdraw(errFault))
					}
				})
			})
		}},
		{"a request that the first effect withdraws", func(w *World) testCase {
			c := caseOf(func(*engine) []phase {
				phases := sound(w)[1:]
				phases[0].Effect = func(context.Context, string, *transfer) error { return keystate.Withdraw(errFault) }
				return phases
			})
			c.Check = func(tx *bbolt.Tx, answer transfer, err error) error {
				if !errors.Is(err, keystate.ErrWithdrawn) || answer != (transfer{}) || balance(tx, "bob") != 0 {
					return fmt.Errorf("it ends with %+v, %v", answer, err)
				}
				return nil
			}
			return c
		}},
		{"a request that the first commit withdraws after its effect has found out that there is nothing to do", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return []phase{
					{To: "limits_checked", Effect: func(_ context.Context, _ string, s *transfer) error { s.Payout = "over the limit"; return nil },
						Commit: func(_ context.Context, _ *bbolt.Tx, s *transfer) error {
							return keystate.Withdraw(errors.New(s.Payout))
						}},
					{To: keystate.Finished, Commit: settle},
				}
			})
		}},
		{"a world that fails at first, and a request that is withdrawn until it does not", func(w *World) testCase {
			w.FailNext(2)
			return caseOf(func(*engine) []phase {
				return []phase{
					{To: "payout_sent", Effect: func(ctx context.Context, token string, s *transfer) error {
						if err := pay(w)(ctx, token, s); errors.Is(err, ErrFailed) {
							return keystate.Withdraw(err)
						} else {
							return err
						}
					}},
					{To: keystate.Finished, Commit: func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						return cmp.Or(reserve(ctx, tx, s), settle(ctx, tx, s))
					}},
				}
			})
		}},
		{"a refusal by the world, after which the money goes back", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				phases := sound(w)
				phases[1].Effect = func(ctx context.Context, token string, s *transfer) (err error) {
					s.Payout, err = w.Do(ctx, token, "decline")
					return err
				}
				phases[2].Commit = func(_ context.Context, tx *bbolt.Tx, s *transfer) error { return move(tx, s.From, s.Cents) }
				return phases
			})
		}},
		{"an effect that draws and dates what it answers", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, token string, s *transfer) error {
						err := pay(w)(ctx, token, s)
						s.Payout = keystate.NewID()
						return err
					}
				})
			})
		}},
		{"staged work", func(w *World) testCase {
			return caseOf(func(e *engine) []phase {
				receipts, err := keystate.Register(e, "receipt", []phase{{To: keystate.Finished, Effect: func(ctx context.Context, token string, s *transfer) error {
					_, err := w.Do(ctx, token, "receipt for "+s.From)
					return err
				}}})
				if err != nil {
					t.Fatal(err)
				}
				return with(w, 2, func(p *phase) {
					p.Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						return cmp.Or(settle(ctx, tx, s), keystate.Stage(tx, receipts, keystate.Key{ID: "receipt"}, *s))
					}
				})
			})
		}},
		{"a next release with new names and a phase more", func(w *World) testCase {
			c := caseOf(func(*engine) []phase { return sound(w) })
			c.Next = func(*engine) []phase {
				phases := sound(w)
				phases[0].To, phases[0].Formerly = "money_reserved", []keystate.RecoveryPoint{"funds_reserved"}
				return slices.Insert(phases, 2, phase{To: "books_kept", Commit: func(_ context.Context, tx *bbolt.Tx, s *transfer) error {
					return move(tx, "booked", s.Cents)
				}})
			}
			return c
		}},
		{"a store of one's own, and a world of one's own", func(w *World) testCase {
			paid := map[string]bool{}
			c := caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(_ context.Context, token string, _ *transfer) error {
						paid[token] = true
						return nil
					}
				})
			})
			c.Open, c.Outside = OpenBolt, func() any { return len(paid) }
			c.Contents = func(tx *bbolt.Tx) (any, error) { return balance(tx, "ada"), nil }
			return c
		}},
	} {
		t.Run(correct.name, func(t *testing.T) {
			for _, f := range findings(t, func(w *World) testCase {
				c := correct.build(w)
				c.Pairs = *allPairs || i%between == 0 && !testing.Short()
				return c
			}) {
				t.Error(f)
			}
		})
	}
}

// asking is a Reconcile that looks a token up.
func asking(w *World) func(context.Context, string, *transfer) (keystate.Outcome, error) {
	return func(_ context.Context, token string, s *transfer) (keystate.Outcome, error) {
		receipt, done := w.Find(token)
		if !done {
			return keystate.NotDone, nil
		}
		s.Payout, s.Sent = receipt, time.Now()
		return keystate.Done, nil
	}
}

// findings are all that the matrix of a case comes to.
func findings[Tx, S any](t *testing.T, build func(w *World) Case[Tx, S]) (all []finding) {
	m := &matrix[Tx, S]{build: build}
	if all = m.measure(t); len(all) > 0 {
		return all
	}
	for _, sc := range m.scenarios() {
		first := m.perform(t, sc)
		all = append(all, m.judge(first)...)
		for _, pair := range m.pairs(first) {
			all = append(all, m.judge(m.perform(t, pair))...)
		}
	}
	return all
}

// with changes one of the sound phases.
func with(w *World, n int, change func(*phase)) []phase {
	phases := sound(w)
	change(&phases[n])
	return phases
}

func TestBrokenPhasesAreFound(t *testing.T) {
	for _, broken := range []struct {
		name  string
		build func(w *World) testCase
		says  []string // each in some finding
	}{
		{"an effect makes a token of its own", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, _ string, s *transfer) error {
						return pay(w)(ctx, keystate.NewID(), s)
					}
				})
			})
		}, []string{`killed after the effect of payout_sent`, `has done "pay bob 500" twice`, "does not pass its token on"}},

		{"an effect withdraws a request of which it cannot know that nothing has come", func(w *World) testCase {
			w.LoseNext(1)
			return caseOf(func(*engine) []phase {
				return []phase{
					{To: "payout_sent", Effect: func(ctx context.Context, token string, s *transfer) error {
						return keystate.Withdraw(pay(w)(ctx, token, s))
					}},
					{To: keystate.Finished, Commit: func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						return cmp.Or(reserve(ctx, tx, s), settle(ctx, tx, s))
					}},
				}
			})
		}, []string{`the request is withdrawn, although the world has done it: "pay bob 500 #1"`, "a sure no"}},

		{"an effect sends something else with every attempt", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, token string, s *transfer) (err error) {
						s.Payout, err = w.Do(ctx, token, "pay at "+time.Now().String())
						return err
					}
				})
			})
		}, []string{"a token came with", "makes what it sends anew"}},

		{"a commit reads the clock", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 2, func(p *phase) {
					p.Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						b, err := tx.CreateBucketIfNotExists([]byte("times"))
						if err != nil {
							return err
						}
						return cmp.Or(settle(ctx, tx, s), b.Put([]byte(s.From), []byte(time.Now().String())))
					}
				})
			})
		}, []string{"the transaction of payout_sent and finished is undone and run again", "the store's times.ada", "a clock"}},

		{"a commit draws a random number", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 0, func(p *phase) {
					p.Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						s.Payout = keystate.NewID()
						return reserve(ctx, tx, s)
					}
				})
			})
		}, []string{"the state Payout", "a random number"}},

		{"a commit counts in memory", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				n := int64(0)
				return with(w, 0, func(p *phase) {
					p.Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						n++
						return cmp.Or(reserve(ctx, tx, s), move(tx, "count", n))
					}
				})
			})
		}, []string{"the store's accounts.count", "memory"}},

		{"a phase keeps in memory what a later one needs", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				phases, reserved := sound(w), int64(0)
				phases[0].Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
					reserved = s.Cents
					return reserve(ctx, tx, s)
				}
				phases[2].Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error { return move(tx, s.To, reserved) }
				return phases
			})
		}, []string{"killed before the effect of payout_sent", "there are 500 cents, not 1000", "keeps in memory"}},

		{"an effect hands its result to its commit in memory", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				receipt := ""
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, token string, s *transfer) (err error) {
						receipt, err = w.Do(ctx, token, "pay")
						return err
					}
					p.Commit = func(_ context.Context, _ *bbolt.Tx, s *transfer) error {
						s.Payout = receipt
						return nil
					}
				})
			})
		}, []string{"the commit of payout_sent fails once and the process is killed", `the answer Payout is empty; without a fault it is "pay #1"`}},

		{"a field does not survive encoding", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, token string, s *transfer) error {
						s.note = "paid"
						return pay(w)(ctx, token, s)
					}
				})
			})
		}, []string{`the effect of payout_sent leaves "paid" in the state's note`, "unexported"}},

		{"a commit acts on the world", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 0, func(p *phase) {
					p.Commit = func(ctx context.Context, tx *bbolt.Tx, s *transfer) error {
						_, err := w.Do(ctx, "fixed", "tell bob")
						return cmp.Or(err, reserve(ctx, tx, s))
					}
				})
			})
		}, []string{`the commit of funds_reserved acts on the world: "tell bob"`, "act in the Effect"}},

		{"an effect writes to the store by itself", func(w *World) testCase {
			return caseOf(func(e *engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, token string, s *transfer) error {
						return cmp.Or(e.Update(ctx, func(tx *bbolt.Tx) error { return move(tx, "fees", 7) }), pay(w)(ctx, token, s))
					}
				})
			})
		}, []string{"the store's accounts.fees", "writes to the store by itself"}},

		{"every error is passed to the user, also that of a lost answer", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) { p.OnError = keystate.Fail })
			})
		}, []string{"the request is refused, although the effect has happened", "there are 500 cents, not 1000"}},

		{"the other side ignores tokens, and the phase does not know", func(w *World) testCase {
			w.IgnoresTokens = true
			return caseOf(func(*engine) []phase { return sound(w) })
		}, []string{"twice", "AtMostOnce"}},

		{"the other side forgets tokens, and the phase does not know", func(w *World) testCase {
			w.TokenLife = 24 * time.Hour
			return caseOf(func(*engine) []phase { return sound(w) })
		}, []string{"away until its token is forgotten", "twice", "TokenLife"}},

		{"Reconcile says that nothing was done", func(w *World) testCase {
			w.IgnoresTokens = true
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Reconcile = func(context.Context, string, *transfer) (keystate.Outcome, error) { return keystate.NotDone, nil }
				})
			})
		}, []string{"twice"}},

		{"Reconcile says Done and does not fill in the state", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Reconcile = func(_ context.Context, token string, s *transfer) (keystate.Outcome, error) {
						if _, done := w.Find(token); !done {
							return keystate.NotDone, nil
						}
						return keystate.Done, nil
					}
				})
			})
		}, []string{"the answer Payout is empty"}},

		{"Reconcile says Done of what is not", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Reconcile = func(context.Context, string, *transfer) (keystate.Outcome, error) { return keystate.Done, nil }
				})
			})
		}, []string{`the world has not done "pay bob 500"`}},

		{"an effect does not end when its context does", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 1, func(p *phase) {
					p.Effect = func(ctx context.Context, token string, s *transfer) error {
						time.Sleep(20 * time.Second)
						return pay(w)(context.WithoutCancel(ctx), token, s)
					}
				})
			})
		}, []string{"shut down during the effect of payout_sent", "does not end when its context does"}},

		{"the next release forgets a point", func(w *World) testCase {
			c := caseOf(func(*engine) []phase { return sound(w) })
			c.Next = func(*engine) []phase {
				return with(w, 0, func(p *phase) { p.To = "money_reserved" })
			}
			return c
		}, []string{"the next release starts", "the program does not start", "Formerly"}},

		{"the next release pays again", func(w *World) testCase {
			c := caseOf(func(*engine) []phase { return sound(w) })
			c.Next = func(*engine) []phase {
				phases := sound(w)
				phases[1].To, phases[0].Formerly = "payout_made", []keystate.RecoveryPoint{"payout_sent"}
				return phases
			}
			return c
		}, []string{"the next release starts"}},

		{"a phase asks a bucket that is not there", func(w *World) testCase {
			return caseOf(func(*engine) []phase {
				return with(w, 0, func(p *phase) {
					p.Commit = func(_ context.Context, tx *bbolt.Tx, _ *transfer) error {
						return tx.Bucket([]byte("nowhere")).Put([]byte("k"), nil)
					}
				})
			})
		}, []string{"without a fault", "the request does not end", "panic: runtime error: invalid memory address"}},
	} {
		t.Run(broken.name, func(t *testing.T) {
			found := findings(t, broken.build)
			var all strings.Builder
			for _, f := range found {
				fmt.Fprintln(&all, f)
			}
			if len(found) == 0 {
				t.Fatal("nothing is found")
			}
			for _, says := range broken.says {
				if !strings.Contains(all.String(), says) {
					t.Errorf("no finding says %q", says)
				}
			}
			t.Logf("%d findings:\n%s", len(found), all.String())
		})
	}
}
