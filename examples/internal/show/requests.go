package show

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"

	"example.com/keystate/examples/internal/money"
)

// A request is one line of the file.
type request struct {
	Key   string `json:"key"`
	From  string `json:"from"`
	To    string `json:"to"`
	Cents int64  `json:"cents"`
}

func (r request) transfer() money.Transfer {
	return money.Transfer{ID: r.Key, From: r.From, To: r.To, Cents: r.Cents}
}

// What an answer's status says.
const (
	paid     = money.Paid
	declined = money.Declined // by the processor
	refused  = "refused"      // by reserveFunds
	mismatch = "mismatch"     // the key belongs to another request
	invalid  = "invalid"      // the line is no request
	parked   = "parked"       // an operator has to look; no answer yet
	open     = "open"         // it did not end in as many tries as were made; no answer yet
)

// An answer is one line of the output.
type answer struct {
	Line int `json:"line"` // of the file, from 1
	request
	Status string `json:"status"`
	Payout string `json:"payout,omitempty"`
	Error  string `json:"error,omitempty"`
}

func (a answer) definite() bool { return a.Status != parked && a.Status != open }

// A report is one line from a worker to the show.
type report struct {
	Ready       bool     `json:"ready,omitempty"`
	Interrupted []string `json:"interrupted,omitempty"` // with Ready: the keys that an earlier process left unfinished
	Claimed     string   `json:"claimed,omitempty"`     // a key that the worker begins, or takes up
	Answer      *answer  `json:"answer,omitempty"`
	Done        bool     `json:"done,omitempty"` // its lines are worked through and nothing is left to resume
}

// A line is one line of the file, read.
type line struct {
	number int
	request
	err error
}

var errNoRequest = errors.New("the line is not a transfer in JSON that has a key")

// readLines reads requests; what is none has an error instead.
func readLines(path string) (lines []line, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	number := 0
	for raw := range bytes.Lines(text) {
		number++
		if raw = bytes.TrimSpace(raw); len(raw) == 0 {
			continue
		}
		l := line{number: number}
		if json.Unmarshal(raw, &l.request) != nil || l.Key == "" {
			l.request, l.err = request{}, errNoRequest
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// deal gives a worker the lines that are dealt to its desk. Each line goes to two neighbours, so that of several workers two are asked
// for the same key at the same time.
func deal(lines []line, desk, desks int) (dealt []line) {
	for i, l := range lines {
		if i%desks == desk || (i+1)%desks == desk {
			dealt = append(dealt, l)
		}
	}
	return dealt
}
