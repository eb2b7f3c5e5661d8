//go:build linux && amd64

package disk

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/vmihailenco/msgpack/v5"
	"go.etcd.io/bbolt"

	"example.com/keystate"
)

// Knowledge is what the world outside was told, and so is entitled to rely on.
type knowledge struct {
	open   [2]bool // whether the store must be there
	asked  map[string]bool
	tokens [2]map[string]string // a copy's keys are its own from then on
	keys   [2]map[string]promise
	reaped map[string]bool // they may be gone
	reaper bool            // at work: whatever finishes may be gone
	seen   *sightings
}

// A promise is what is known of a key in one store.
type promise struct {
	claimed bool
	sent    bool
	paid    bool // the effect's result is durable
	parked  bool
	least   uint64 // the version
	record  []byte // as it was then; it may have gone on unless it is final
	final   bool
	answer  string
	refusal string
}

func newKnowledge() *knowledge {
	return &knowledge{
		asked: map[string]bool{}, tokens: [2]map[string]string{{}, {}}, reaped: map[string]bool{},
		keys: [2]map[string]promise{{}, {}},
	}
}

// hear takes in what a process told. It objects to what contradicts what was told before.
func (k *knowledge) hear(t *tell) error {
	p := k.keys[t.Store][t.Key]
	var err error
	switch t.What {
	case opened, compacted:
		k.open[t.Store] = true
	case closed:
		k.reaper = false
	case asked, staging:
		k.asked[t.Key] = true
	case compacting:
		k.keys[1], k.tokens[1] = maps.Clone(k.keys[0]), maps.Clone(k.tokens[0])
	case reaping:
		k.reaper = true
	case claimed:
		p.claimed = true
	case sending:
		tokens := k.tokens[t.Store]
		if known := tokens[t.Key]; known != "" && known != t.Token && !k.reaped[t.Key] {
			err = fmt.Errorf("%s was sent under %s, and is under %s", t.Key, known, t.Token)
		}
		if p.paid {
			err = fmt.Errorf("%s was sent again after its result was durable", t.Key)
		}
		tokens[t.Key] = t.Token
		p.claimed, p.sent = true, true
	case found:
		r, e := decode(t.Record) // before anything else happens: what Open has found is durable
		p.claimed, p.least, p.record, err = true, r.Version, t.Record, e
		p.paid = p.paid || r.Status == keystate.Answered || has(r, points[1])
	case answered:
		err = p.answered(t)
	case operating:
		p.parked = false
	case retried:
		r, e := decode(t.Record)
		p.least, p.record, p.parked, err = r.Version+1, nil, false, e
	case abandoned:
		p.record, p.final, p.answer, p.refusal = nil, true, "", "abandoned: it is hopeless"
	}
	if t.Key != "" {
		if k.reaper && !p.parked {
			k.reaped[t.Key] = true
		}
		k.keys[t.Store][t.Key] = p
	}
	if t.What == reaping {
		for key, p := range k.keys[0] {
			k.reaped[key] = k.reaped[key] || !p.parked
		}
	}
	return err
}

// answered takes in an answer, or that the key is parked.
func (p *promise) answered(t *tell) error {
	p.claimed = true
	if t.Record != nil {
		r, err := decode(t.Record)
		if err != nil {
			return err
		}
		if p.final && p.record != nil && !bytes.Equal(p.record, t.Record) {
			return fmt.Errorf("the record of %s has changed", t.Key)
		}
		p.least, p.record = r.Version, t.Record
	}
	if t.Answer == "" {
		p.parked = true
		return nil
	}
	if p.final && p.answer != "" && (p.answer != t.Answer || p.refusal != t.Refusal) {
		return fmt.Errorf("%s was answered %s (%s), and now %s (%s)", t.Key, p.answer, p.refusal, t.Answer, t.Refusal)
	}
	if !p.final && t.Record == nil {
		p.record = nil // it was of an unfinished key
	}
	p.final, p.paid, p.parked, p.answer, p.refusal = true, true, false, t.Answer, t.Refusal
	return nil
}

// honest says whether an error may be told when a call fails and nothing is damaged or moved, and nobody else is there. The first
// that is told must say so when there was no room.
func honest(t *tell, first bool, act action, on op) error {
	bad := func(why string) error {
		return fmt.Errorf("%s: %s: %v, %s", t.Doing, why, t.Names, t.Err)
	}
	for _, name := range t.Names {
		switch name {
		case "corrupt", "not a store":
			return bad("nothing is damaged")
		case "moved":
			if on != opStat {
				return bad("nothing was moved")
			}
		case "exists":
			if t.Doing != "Compact again" {
				return bad("nobody else makes it")
			}
		case "not exist":
			if on != opStat && on != opUnlink {
				return bad("it is there")
			}
		case "locked":
			return bad("nobody has the store open")
		case "mismatch", "fenced", "not found":
			return bad("nobody else is there")
		}
	}
	making := t.Doing == "Open" || strings.HasPrefix(t.Doing, "Compact")
	switch full := slices.Contains(t.Names, "storage full") || slices.Contains(t.Names, "outcome unknown"); {
	case strings.Contains(t.Err, "have not ended"):
		return bad("nothing may take that long")
	case first && act.errno == syscall.ENOSPC && !full:
		return bad("there was no room")
	case len(t.Names) == 0 && !(making && strings.Contains(t.Err, act.errno.Error())): // bbolt formats some causes with %s
		return bad("it has no name")
	}
	if act.errno == 0 {
		return bad("nothing has failed")
	}
	return nil
}

func decode(b []byte) (r keystate.Record, err error) {
	return r, r.UnmarshalBinary(b)
}

func has(r keystate.Record, point keystate.RecoveryPoint) bool {
	return slices.ContainsFunc(r.History, func(p keystate.Passage) bool { return p.Point == point })
}

// A holding is what a store holds.
type holding struct {
	records map[string]keystate.Record
	rows    map[string]string
}

func hold(e *keystate.Engine[*bbolt.Tx]) (h holding, err error) {
	h = holding{map[string]keystate.Record{}, map[string]string{}}
	for r, err := range e.Keys(background, keystate.Filter{}) {
		if err != nil {
			return h, err
		}
		if _, twice := h.records[r.Key.ID]; twice {
			return h, fmt.Errorf("%s has two records", r.Key)
		}
		h.records[r.Key.ID] = r
	}
	return h, e.View(background, func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("rows"))
		if b == nil {
			return nil
		}
		return b.ForEach(func(name, count []byte) error {
			h.rows[string(name)] = string(count)
			return nil
		})
	})
}

// judge opens what a power cut left, in a directory of its own, and compares it with what is known.
func (k *knowledge) judge(left directory, dir string) error {
	for i, name := range stores {
		path := filepath.Join(dir, name)
		if left[name] == nil {
			if k.open[i] {
				return fmt.Errorf("%s is gone", name)
			}
			os.Remove(path)
			continue
		}
		if err := left[name].write(path); err != nil {
			return err
		}
		if err := k.judgeStore(i, path); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (k *knowledge) judgeStore(store int, path string) error {
	e, err := keystate.Open(path, options(-1))
	if err != nil {
		return err
	}
	h, err := hold(e)
	return errors.Join(err, e.Close(), k.check(store, h))
}

// check compares what a store holds with what is known, and with itself.
func (k *knowledge) check(store int, h holding) error {
	for key, p := range k.keys[store] {
		r, there := h.records[key]
		if !there && (k.reaped[key] || !p.claimed) {
			if k.reaped[key] && p.final {
				k.seen.note("reaped")
			}
			continue
		}
		if err := p.kept(r, there); err != nil {
			return fmt.Errorf("%s, %s at %s: %w", key, r.Status, r.Point, err)
		}
	}
	rows := 0
	for key, r := range h.records {
		n, err := k.checkRecord(store, r, h.rows)
		if err != nil {
			return fmt.Errorf("%s, %s at %s: %w", key, r.Status, r.Point, err)
		}
		rows += n
	}
	for row := range h.rows {
		key := row[:strings.LastIndexByte(row, '/')]
		if _, there := h.records[key]; there {
			rows--
		} else if !k.reaped[key] {
			return fmt.Errorf("the row %s is nobody's", row)
		}
	}
	if rows != 0 {
		return fmt.Errorf("%d rows are missing", rows)
	}
	return nil
}

// kept says whether a record keeps what was promised of its key.
func (p promise) kept(r keystate.Record, there bool) error {
	switch {
	case !there:
		return fmt.Errorf("there is no record, and what was promised is %+v", p)
	case r.Version < p.least:
		return fmt.Errorf("its version is %d; %d was seen", r.Version, p.least)
	case p.sent && !(r.Begun == points[1] && !r.FirstTried.IsZero() || r.Status == keystate.Answered || has(r, points[1])):
		return errors.New("it does not know that it was sent")
	case p.paid && !(r.Status == keystate.Answered || has(r, points[1])):
		return errors.New("it does not know that its effect was done")
	case p.record != nil && (p.final || r.Version == p.least) && !bytes.Equal(p.record, frame(r)):
		return errors.New("its record is another")
	case !p.final:
		return nil
	case r.Status != keystate.Answered:
		return errors.New("it was answered")
	}
	refusal := ""
	if r.Refusal != nil {
		refusal = r.Refusal.Reason
	}
	answer, err := json.Marshal(state(r))
	if err != nil || refusal != p.refusal || p.answer != "" && string(answer) != p.answer {
		return fmt.Errorf("its answer is %s (%s), and was %s (%s)", answer, refusal, p.answer, p.refusal)
	}
	return nil
}

func state(r keystate.Record) (o order) {
	if err := msgpack.Unmarshal(r.State, &o); err != nil {
		panic(err)
	}
	return o
}

// checkRecord compares a record with what was asked for and sent, and with the rows of its commits. It returns how many it has.
func (k *knowledge) checkRecord(store int, r keystate.Record, rows map[string]string) (n int, err error) {
	key := r.Key.ID
	token := k.tokens[store][key]
	k.see(r)
	if o := state(r); !k.asked[key] || o.ID != key {
		return 0, fmt.Errorf("nobody has asked for it: %+v", o)
	} else if paid := has(r, points[1]) || r.Acted; paid && (token == "" || o.Payout != payout(token)) || !paid && o.Payout != "" {
		return 0, fmt.Errorf("its payout is %q, its token %q", o.Payout, token)
	}
	for _, point := range points {
		want := has(r, point) && !(point == keystate.Finished && r.Refusal != nil)
		row, there := rows[key+"/"+string(point)]
		if there != want || there && row != "|" {
			return 0, fmt.Errorf("the row %s is %q; its points are %v", point, row, r.History)
		}
		if there {
			n++
		}
	}
	return n, nil
}

// inStates is what must have been in some state, or the script is not worth its calls.
var inStates = []string{"running", "parked", "finished", "an effect under way", "refused", "abandoned", "staged", "reaped", "compacted"}

func (k *knowledge) see(r keystate.Record) {
	k.seen.note(string(r.Status))
	switch {
	case !r.FirstTried.IsZero() && r.Status == keystate.Running:
		k.seen.note("an effect under way")
	case r.Refusal != nil && strings.HasPrefix(r.Refusal.Reason, "abandoned"):
		k.seen.note("abandoned")
	case r.Refusal != nil:
		k.seen.note("refused")
	case r.Key.ID == audit(order{ID: "audited"}).ID:
		k.seen.note("staged")
	case r.Key.ID == "after compaction":
		k.seen.note("compacted")
	}
}

// carryOn lets a successor in this process have what the power cut left: it must bring everything to its end.
func (k *knowledge) carryOn(left directory, dir string) error {
	for _, name := range stores {
		if left[name] == nil {
			os.Remove(filepath.Join(dir, name))
		} else if err := left[name].write(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	k = k.clone()
	var objections []error
	listen := func(t tell) {
		if t.What == failed {
			objections = append(objections, fmt.Errorf("%s failed: %s", t.Doing, t.Err))
		}
		if err := k.hear(&t); err != nil {
			objections = append(objections, err)
		}
	}
	var mu sync.Mutex
	p := &player{dir: dir, role: "after a power cut", tries: map[string]int{}, listen: func(t tell) {
		mu.Lock()
		defer mu.Unlock()
		listen(t)
	}}
	p.succeed()
	for i, name := range stores {
		if left[name] == nil && i > 0 {
			continue
		}
		if err := k.ended(i, filepath.Join(dir, name)); err != nil {
			objections = append(objections, err)
		}
	}
	return errors.Join(objections...)
}

// ended says whether everything in a store is finished, and as was promised.
func (k *knowledge) ended(store int, path string) error {
	if err := keystate.Verify(path); err != nil {
		return err
	}
	e, err := keystate.Open(path, options(-1))
	if err != nil {
		return err
	}
	h, err := hold(e)
	if err = errors.Join(err, e.Close(), k.check(store, h)); err != nil {
		return err
	}
	for key, r := range h.records {
		if r.Status != keystate.Answered {
			return fmt.Errorf("%s is %s in the end", key, r.Status)
		}
	}
	return nil
}

func (k *knowledge) clone() *knowledge {
	c := *k
	c.asked, c.reaped = maps.Clone(k.asked), maps.Clone(k.reaped)
	c.tokens = [2]map[string]string{maps.Clone(k.tokens[0]), maps.Clone(k.tokens[1])}
	c.keys = [2]map[string]promise{maps.Clone(k.keys[0]), maps.Clone(k.keys[1])}
	return &c
}
