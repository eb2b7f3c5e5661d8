package keystate

import (
	"context"
	"runtime"
	"testing"

	"github.com/vmihailenco/msgpack/v5"
	"go.etcd.io/bbolt"
)

// A moody state is encoded and decoded by the program's own code, which does not always come back.
type moody struct{ Mood string }

func (m *moody) DecodeMsgpack(d *msgpack.Decoder) error {
	mood, err := d.DecodeString()
	switch mood {
	case "panic":
		panic("a decoder panics")
	case "goexit":
		runtime.Goexit()
	}
	m.Mood = mood
	return err
}

func (m *moody) EncodeMsgpack(e *msgpack.Encoder) error {
	switch m.Mood {
	case "panics":
		panic("an encoder panics")
	case "goes":
		runtime.Goexit()
	}
	return e.EncodeString(m.Mood)
}

func TestACodecThatDoesNotComeBackEndsItsRunAndNothingElse(t *testing.T) {
	e, err := Open(storePath(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	m, err := Register(e, "moody", []Phase[*bbolt.Tx, moody]{
		{To: Finished, Commit: func(_ context.Context, _ *bbolt.Tx, m *moody) error {
			if next, ends := map[string]string{"will panic": "panics", "will go": "goes"}[m.Mood]; ends {
				m.Mood = next
			}
			return nil
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Do(t.Context(), Key{ID: "sound before"}, moody{"calm"}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time in memory that the first has left
		for _, mood := range []string{"panic", "goexit", "will panic", "will go"} {
			if _, err := m.Do(t.Context(), Key{ID: mood}, moody{mood}); err == nil {
				t.Errorf("%s: no error", mood)
			}
		}
	}
	if _, err := m.Do(t.Context(), Key{ID: "sound after"}, moody{"calm"}); err != nil {
		t.Error(err)
	}
}
