package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"example.com/keystate/examples/internal/audit"
	"example.com/keystate/examples/internal/money"
	"example.com/keystate/examples/internal/processor"
)

// TestMain lets the test's own binary be the processor.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "processor" {
		if err := run(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "processor:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func TestAKilledServicePaysEachTransferOnce(t *testing.T) {
	s := settings{transfers: 60, kills: 4, callers: 16, seed: time.Now().UnixNano(), dir: t.TempDir()}
	v, err := perform(t.Context(), s)
	if err != nil {
		log, _ := os.ReadFile(s.logPath())
		t.Fatalf("seed %d: %v\n%s", s.seed, err, log)
	}
	var table strings.Builder
	v.print(&table)
	t.Logf("seed %d\n%s", s.seed, table.String())
	for _, fault := range v.Wrong {
		t.Error(fault)
	}
	if v.killed != 4 || v.stopped != 1 || len(v.answers) < 60 || v.Payouts.Entries == 0 || v.line.met[requestDropped]+v.line.met[answerDropped] == 0 {
		t.Errorf("it was no torture:\n%s", table.String())
	}
}

func TestAServiceThatEndsByItselfIsAFault(t *testing.T) {
	program, err := os.Executable() // which, with the service's flags, is a test that ends at once
	if err != nil {
		t.Fatal(err)
	}
	s := settings{transfers: 1, callers: 1, seed: 1, server: program, dir: t.TempDir()}
	if _, err := perform(t.Context(), s); err == nil || !strings.Contains(err.Error(), "ended by itself") {
		t.Error(err)
	}
}

func TestADirectoryWithSomethingInItIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "payments.db"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := perform(t.Context(), settings{transfers: 1, callers: 1, seed: 1, dir: dir}); err == nil {
		t.Error("it went on")
	}
	if text, err := os.ReadFile(filepath.Join(dir, "payments.db")); string(text) != "mine" {
		t.Errorf("the file holds %q (%v)", text, err)
	}
}

func TestThePlanIsTheSameForTheSameSeed(t *testing.T) {
	a, b := plan(7, 500), plan(7, 500)
	if !reflect.DeepEqual(a, b) || reflect.DeepEqual(a, plan(8, 500)) {
		t.Error("it is not")
	}
	var has struct{ copies, rivals, late, clashes, unkeyed, minted int }
	keys := map[string]bool{}
	for _, task := range a {
		if keys[task.key] && task.key != "" {
			t.Errorf("the key %s is there twice", task.key)
		}
		keys[task.key] = true
		for count, is := range map[*int]bool{
			&has.copies: task.copies > 1, &has.rivals: task.rival != nil, &has.late: task.late > 0, &has.clashes: task.clash != nil,
			&has.unkeyed: task.key == "" && !task.minted, &has.minted: task.minted,
		} {
			if is {
				*count++
			}
		}
	}
	if has.copies < 50 || has.rivals < 10 || has.late < 25 || has.clashes < 10 || has.unkeyed < 25 || has.minted < 10 {
		t.Errorf("of 500 it has %+v", has)
	}
}

func TestWhatMayBeAnswered(t *testing.T) {
	for _, c := range []struct {
		order order
		may   []string
	}{
		{order{"ada", "bob", 1}, []string{"201 ", "402 insufficient-funds"}},
		{order{"ada", "ada", 1}, []string{"422 invalid-transfer"}},
		{order{"ada", nobody, 1}, []string{"404 unknown-payee"}},
		{order{"ada", "declined@closed.example", 1}, []string{"402 declined", "402 insufficient-funds"}},
		{order{"grace", "bob", processor.PayoutLimit}, []string{"201 ", "402 insufficient-funds"}},
		{order{"grace", "bob", processor.PayoutLimit + 1}, []string{"402 declined", "402 insufficient-funds"}},
		{order{"grace", "bob", 1}, []string{"201 "}},
	} {
		var may []string
		for _, answer := range []struct {
			status int
			kind   string
		}{
			{201, ""}, {402, "declined"}, {402, "insufficient-funds"}, {404, "unknown-payee"}, {422, "invalid-transfer"},
			{422, "key-reused"}, {400, "malformed"}, {500, "parked"}, {410, "answer-not-kept"},
		} {
			if c.order.may(answer.status, answer.kind) {
				may = append(may, fmt.Sprintf("%d %s", answer.status, answer.kind))
			}
		}
		if !reflect.DeepEqual(may, c.may) {
			t.Errorf("%s may get %q, not %q", c.order.body(), may, c.may)
		}
	}
}

// fateOf finds a key that meets a fate at once.
func fateOf(t *testing.T, l *line, want fate) *http.Request {
	t.Helper()
	for i := range 10_000 {
		r := httptest.NewRequest("POST", "/v1/transfers?x=1", strings.NewReader("body"))
		r.Header.Set("Idempotency-Key", fmt.Sprint(i))
		if f, _, _ := l.draw(r, []byte("body")); f == want {
			l.seen = map[string]int{}
			return r
		}
	}
	t.Fatalf("no request meets the fate %d", want)
	return nil
}

func TestTheLine(t *testing.T) {
	for _, c := range []struct {
		name            string
		fate            fate
		served, arrived int
		answer          string
	}{
		{"carries", carried, 1, 1, "answer to body"},
		{"delays", delayed, 1, 1, "answer to body"},
		{"doubles", doubled, 2, 1, "answer to body"},
		{"drops requests", requestDropped, 0, 0, ""},
		{"drops answers", answerDropped, 1, 0, ""},
		{"cuts answers short", cutShort, 1, 0, "answer "},
	} {
		t.Run(c.name, func(t *testing.T) {
			served := make(chan string, 2)
			service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				served <- r.URL.RequestURI()
				w.Header().Set("Idempotent-Replayed", "true")
				fmt.Fprintf(w, "answer to %s", body)
			}))
			defer service.Close()
			l, err := listen(1)
			if err != nil {
				t.Fatal(err)
			}
			defer l.close()
			r := fateOf(t, l, c.fate)
			l.count = lineCounts{met: map[fate]int{}, statuses: map[int]int{}}
			l.leadTo(service.URL)
			sent, err := http.NewRequest("POST", l.url+r.URL.RequestURI(), io.NopCloser(strings.NewReader("body"))) // that net/http cannot send again
			if err != nil {
				t.Fatal(err)
			}
			sent.Header.Set("Idempotency-Key", r.Header.Get("Idempotency-Key"))
			var text []byte
			arrived := 0
			if resp, err := http.DefaultClient.Do(sent); err == nil {
				defer resp.Body.Close()
				if text, err = io.ReadAll(resp.Body); err == nil {
					arrived = 1
				}
			}
			if arrived != c.arrived || string(text) != c.answer {
				t.Errorf("%d answers arrived: %q", arrived, text)
			}
			if len(served) != c.served {
				t.Errorf("the service was asked %d times", len(served))
			}
			counts := l.counts()
			if counts.attempts != 1 || counts.met[c.fate] != 1 || counts.statuses[200] != c.served || counts.replays != c.served {
				t.Errorf("it counted %+v", counts)
			}
			for range c.served {
				if uri := <-served; uri != "/v1/transfers?x=1" {
					t.Errorf("it led to %s", uri)
				}
			}
		})
	}
}

func TestALineToNowhereIsCut(t *testing.T) {
	l, err := listen(1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if resp, err := http.Get(l.url); err == nil {
		t.Error(resp.Status)
	}
	if c := l.counts(); c.unreachable == 0 && c.met[requestDropped] == 0 {
		t.Errorf("it counted %+v", c)
	}
}

// sound is a torture in which ada paid bob, was asked for it again, and nothing else happened.
func sound() *verdict {
	paid := order{"ada", "bob", 20_00}
	text := `{"id":"1","from":"ada","to":"bob","cents":2000,"status":"paid","payout":"payout-1"}`
	accounts := maps.Clone(money.OpeningBalances)
	accounts["ada"] -= 20_00
	accounts["bob"] += 20_00
	declined := `{"type":"https://example.com/payments/problems/declined","status":402,"instance":"/v1/transfers/2"}`
	other := order{"ada", "bob", 20_01}
	closed := order{"ada", "declined@closed.example", 1}
	v := &verdict{
		answers: []answer{
			{key: "a", order: paid, status: 201, location: "/v1/transfers/1", text: text},
			{key: "a", order: paid, status: 201, location: "/v1/transfers/1", text: text, replayed: true},
			{key: "a", order: other, status: 422, kind: "key-reused"},
			{key: "b", order: closed, status: 402, kind: "declined", text: declined},
		},
		balances: maps.Clone(accounts),
		told: map[string]string{
			"/v1/transfers/1": text,
			"/v1/transfers/2": `{"id":"2","from":"ada","to":"declined@closed.example","cents":1,"status":"declined"}`,
		},
	}
	v.Count = audit.Count{
		Before: audit.Books{Books: money.Books{Accounts: money.OpeningBalances}},
		After: audit.Books{Books: money.Books{
			Accounts: accounts,
			Transfers: map[string]money.Transfer{
				"1": {ID: "1", From: "ada", To: "bob", Cents: 20_00, Status: money.Paid, Payout: "payout-1"},
				"2": {ID: "2", From: "ada", To: "declined@closed.example", Cents: 1, Status: money.Declined},
			},
			Receipts: map[string]string{"1": "receipt-1"},
		}},
		Ledger: []processor.Entry{
			{Kind: processor.Payout, ID: "payout-1", Token: "a", Order: processor.Order{Reference: "1", From: "ada", To: "bob", Cents: 20_00}},
			{Kind: processor.Receipt, ID: "receipt-1", Token: "b", Order: processor.Order{Reference: "1", From: "ada", To: "bob", Cents: 20_00, Payout: "payout-1"}},
		},
	}
	return v
}

func TestTheJudgeSeesEachFault(t *testing.T) {
	v := sound()
	if v.judge(); len(v.Wrong) > 0 {
		t.Fatal(v.Wrong)
	}
	for name, spoil := range map[string]func(*verdict){
		"another body":   func(v *verdict) { v.answers[1].text += " " },
		"another status": func(v *verdict) { v.answers[1].status = 200 },
		"another place":  func(v *verdict) { v.answers[1].location += "0" },
		"two causes":     func(v *verdict) { v.answers[1].replayed = false },
		"two orders, one key": func(v *verdict) {
			v.answers[2] = v.answers[0]
			v.answers[2].order.Cents++
			v.answers[2].replayed = true
		},
		"its own key refused":   func(v *verdict) { v.answers[1] = v.answers[2]; v.answers[1].order = v.answers[0].order },
		"nobody's key":          func(v *verdict) { v.answers = v.answers[2:] },
		"one transfer, two key": func(v *verdict) { v.answers = append(v.answers, v.answers[0]); v.answers[4].key = "c" },
		"an answer of 500":      func(v *verdict) { v.answers[3].status, v.answers[3].kind = 500, "parked" },
		"declined for nothing":  func(v *verdict) { v.answers[0].status, v.answers[0].kind = 402, "declined"; v.answers = v.answers[:1] },
		"a payout twice":        func(v *verdict) { v.Ledger = append(v.Ledger, v.Ledger[0]) },
		"a payout missing":      func(v *verdict) { v.Ledger = v.Ledger[1:] },
		"a payout unasked":      func(v *verdict) { v.answers = v.answers[3:] },
		"a receipt missing":     func(v *verdict) { v.Ledger = v.Ledger[:1] },
		"a cent gone":           func(v *verdict) { v.After.Accounts["carol"]--; v.balances["carol"]-- },
		"a balance told wrong":  func(v *verdict) { v.balances["carol"]-- },
		"a transfer told wrong": func(v *verdict) {
			v.told["/v1/transfers/1"] = strings.Replace(v.told["/v1/transfers/1"], "payout-1", "payout-2", 1)
		},
		"another's transfer": func(v *verdict) { v.told["/v1/transfers/1"] = v.told["/v1/transfers/2"] },
		"a transfer gone":    func(v *verdict) { delete(v.told, "/v1/transfers/1") },
		"paid, not declined": func(v *verdict) {
			v.told["/v1/transfers/2"] = strings.Replace(v.told["/v1/transfers/2"], "declined\"", "paid\"", 1)
		},
		"pending for ever":  func(v *verdict) { v.After.Transfers["3"] = money.Transfer{ID: "3", Status: money.Pending} },
		"a key left over":   func(v *verdict) { v.After.Unfinished = 1 },
		"a key parked":      func(v *verdict) { v.After.Parked = 1 },
		"a token used anew": func(v *verdict) { v.calls.Refused = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			v := sound()
			spoil(v)
			if v.judge(); len(v.Wrong) == 0 {
				t.Error("it saw nothing")
			}
		})
	}
}

func TestResumedKeysAreCountedInALogThatAKillCutOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	text := `{"msg":"interrupted keys resume","keys":3}
{"msg":"request","keys":9}
{"msg":"requ
{"msg":"interrupted keys resume","keys":4}
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if keys, err := resumed(path); err != nil || keys != 7 {
		t.Error(keys, err)
	}
}
