package pgtest

import (
	"bufio"
	"bytes"
	"io"
	"slices"
	"testing"
)

func TestMessagesOfAnImpossibleLengthAreRefused(t *testing.T) {
	for _, raw := range []string{"Q\x00\x00\x00\x03", "Q\xff\xff\xff\xff", "Q\x40\x00\x00\x01"} {
		_, err := readFrame(bufio.NewReader(bytes.NewReader([]byte(raw + "more"))))
		if err == nil || err == io.ErrUnexpectedEOF {
			t.Errorf("%q: %v", raw, err)
		}
	}
	if _, err := readStartup(bufio.NewReader(bytes.NewReader([]byte("\x00\x00\x00\x04")))); err == nil {
		t.Error("a startup message without a version")
	}
	f, err := readFrame(bufio.NewReader(bytes.NewReader([]byte("Q\x00\x00\x00\x08SQL\x00S"))))
	if err != nil || string(f.raw) != "Q\x00\x00\x00\x08SQL\x00" || f.last {
		t.Errorf("%+v: %v", f, err)
	}
}

func TestAnswersAreTakenForWhatTheyAnswer(t *testing.T) {
	for _, c := range []struct{ asked, answers, settled string }{
		{"Q", "TDDCZ", "Q"},
		{"Q", "CTDCIEZ", "Q"}, // several statements, and the last fails
		{"Q", "GCZ", "Q"},     // COPY
		{"PBDES", "12TDDCZ", "PBDES"},
		{"PDS", "1tTZ", "PDS"},
		{"PDS", "1tnZ", "PDS"},
		{"BEBES", "2DDsN2SAIZ", "BEBES"}, // a suspended portal, an empty statement, a notice, a parameter, a notification
		{"PBESPBES", "1EZ12CZ", "PBESPBES"},
		{"PBESPBES", "12CEZ12CZ", "PBESPBES"}, // it fails as it commits
		{"CSF", "3ZVZ", "CSF"},
		{"PHBHE", "12C", "PBE"},
		{"dcQ", "CZ", "Q"},
		{"PB", "1", "P"},
	} {
		var d debts
		for _, typ := range []byte(c.asked) {
			d.owe(typ, nil)
		}
		var got []byte
		for _, answer := range []byte(c.answers) {
			_, settled := d.pay(answer)
			for _, s := range settled {
				got = append(got, s.typ)
			}
		}
		if !slices.Equal(got, []byte(c.settled)) {
			t.Errorf("%s answered %s settles %s, not %s", c.asked, c.answers, got, c.settled)
		}
	}
}

func TestWhatComesAfterAFailureIsSkippedUpToTheNextSync(t *testing.T) {
	var d debts
	d.owe(parse, nil)
	d.pay(failure)
	for _, typ := range []byte("BEQSQ") {
		d.owe(typ, nil)
	}
	_, first := d.pay(readyForQuery)
	_, second := d.pay(readyForQuery)
	if len(first) != 1 || first[0].typ != sync_ || len(second) != 1 || second[0].typ != query || len(d.owed) != 0 {
		t.Errorf("%v, %v, and %v is left", first, second, d.owed)
	}
}
