package show

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
)

// people are who pays and gets paid in the generated file; grace and declined@closed.example have parts of their own.
var people = []string{
	"ada", "bob", "carol", "dan", "erin", "frank", "heidi", "ivan", "judy", "mallory",
	"Zoë", "Ólafur", "李雷", "محمد", "Søren Å.", "🦊 fox",
}

const generated = 1000 // lines

// Transfers are the file that comes with the programs, made anew. It is the same every time.
func Transfers() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	var lines []string
	var asked []request
	add := func(r request) {
		text, _ := json.Marshal(r)
		lines = append(lines, string(text))
	}
	fresh := func(i int) request {
		from := rng.IntN(len(people))
		to := (from + 1 + rng.IntN(len(people)-1)) % len(people)
		return request{Key: fmt.Sprintf("order-%04d", i), From: people[from], To: people[to], Cents: 1 + rng.Int64N(120_00)}
	}
	raw := []string{`{"key":"cut off","from":"ada","to":`, `not JSON at all`, `{"from":"ada","to":"bob","cents":100}`,
		`{"key":"half a cent","from":"ada","to":"bob","cents":0.5}`}
	for i := range generated {
		r := fresh(i)
		switch kind := rng.IntN(1000); {
		case i%250 == 249:
			lines = append(lines, raw[i/250])
			continue
		case i < 20 || kind < 750:
		case kind < 790: // a client that retries, now or much later
			lines = append(lines, lines[max(0, len(lines)-1-rng.IntN(200))])
			continue
		case kind < 800: // the same at once: both in flight
			lines = append(lines, lines[len(lines)-1])
			continue
		case kind < 830: // a client that uses a key twice, at once or later
			r = asked[max(0, len(asked)-1-rng.IntN(4)*rng.IntN(50))]
			r.Cents++
			add(r)
			continue
		case kind < 850:
			r.From = "nobody"
		case kind < 870:
			r.To = "nobody"
		case kind < 895:
			r.Cents = 9_000_000_00
		case kind < 925:
			r.To = "declined@closed.example"
		case kind < 940:
			r.From, r.Cents = "grace", 5_000_01 // over the processor's limit
		case kind < 950:
			r.From, r.Cents = "grace", 5_000_00
		case kind < 960:
			r.Cents = 0
		case kind < 970:
			r.Cents = -r.Cents
		case kind < 980:
			r.To = r.From
		case kind < 995:
			r.Key = fmt.Sprintf("заказ №%d ✓", i)
		default:
			r.Key = strings.Repeat("k", 256)
		}
		add(r)
		asked = append(asked, r)
	}
	return []byte(strings.Join(lines, "\n") + "\n")
}
