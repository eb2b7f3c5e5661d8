// The property: whatever happens to the processes behind two kinds of endpoints, clients find what the documentation of
// Handle and Middleware promises. Scenarios are data: requests, and what happens to the processes that answer them. rapid
// draws and shrinks them; propPlay carries one out, in a bubble of testing/synctest; model_test.go judges; propFaults make
// sure that it can.
//
// A soak, until something breaks:
//
//	go test -run TestRandomClientsGetWhatIsPromised -rapid.checks=100000 -timeout=0 ./keyhttp
package keyhttp

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/bbolt"
	"pgregory.net/rapid"

	"example.com/keystate"
	"example.com/keystate/keytest"
)

const (
	propRetention   = time.Hour
	propKeyLife     = 20 * time.Minute
	propMaxResponse = 2000
	propMaxBody     = 500
	propRefused     = "amount-refused" // the type of what Decode turns down
)

// propRounds is how many times rapid.checks scenarios are played, and propMoreRounds how many more there are at most while
// something rare has not happened yet.
const (
	propRounds     = 5
	propMoreRounds = 60
)

// TestRandomClientsGetWhatIsPromised plays random scenarios, and in the end makes sure that everything that the promises are about has happened.
func TestRandomClientsGetWhatIsPromised(t *testing.T) {
	seen := &propSightings{}
	began, played := time.Now(), 0
	told := began
	round := func(t *testing.T) {
		rapid.Check(t, func(rt *rapid.T) {
			sc := propScenarios.Draw(rt, "scenario")
			if err := propPlay(t, sc, propFault{}, seen); err != nil {
				rt.Fatalf("%v", err)
			}
			if played++; time.Since(told) > 10*time.Second {
				told = time.Now()
				fmt.Printf("%d scenarios, %.0f/s\n", played, float64(played)/time.Since(began).Seconds())
			}
		})
	}
	t.Run("stories", func(t *testing.T) {
		for _, s := range propStories {
			t.Run(s.name, func(t *testing.T) {
				if err := propPlay(t, s.scenario(), propFault{}, seen); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
	if t.Failed() {
		return
	}
	for range propRounds {
		round(t)
	}
	for more := 0; more < propMoreRounds && len(seen.missing(propSights)) > 0 && !t.Failed(); more++ {
		round(t)
	}
	for _, what := range seen.missing(propSights) {
		t.Errorf("never seen: %s", what)
	}
	if testing.Verbose() {
		t.Logf("%d scenarios, seen:\n%s", played, seen)
	}
}

// propSights are what must have happened while TestRandomClientsGetWhatIsPromised played, or it has proved less than it says.
var propSights = []string{
	"answer: 201", "answer: 402", "answer: 424", "answer: 204", "answer: 500", "a replay", "an answer waited for",
	"a replay by another release", "a retry before there is an answer",
	"problem: key-reused", "problem: key-in-flight", "problem: request-invalid", "problem: amount-refused", "problem: key-expired",
	"problem: answer-not-kept", "problem: interrupted", "problem: unavailable", "problem: parked",
	"an answer that is not saved: 429 of endpoint 0", "an answer that is not saved: 422 of endpoint 1",
	"an answer that is not saved: 500 of endpoint 1",
	"an answer that is not saved: 422 of endpoint 2",
	"wrong: without a key", "wrong: malformed key", "wrong: two keys",
	"wrong: ambiguous key", "wrong: nobody's", "wrong: oversized", "wrong: plain",
	"death before commit", "death after commit", "death before acting", "death after acting", "killed", "closed", "a new release",
	"a full store", "a write refused", "an effect sent again", "a handler that was cut off runs again",
	"a client that has gone away", "a panic passed on",
	"in flight longer than anybody waits", "a key reaped", "parked", "a parked key revived",
	"a parked key abandoned", "spelled as parameter",
}

// A propStory is what random scenarios tell rarely, and went wrong once or nearly did.
type propStory struct {
	name    string
	change  func(*propScenario)
	strokes []propStroke
}

var propStories = []propStory{
	{"a handler is cut off and its client asks again", nil, []propStroke{
		{do: propArms, boundary: propAfterActing, after: 1}, propAsks(propVisit{key: 1}), propAsks(propVisit{key: 1}),
	}},
	{"a handler that may run at most once is cut off", nil, []propStroke{
		{do: propArms, boundary: propBeforeCommit, after: 2}, propAsks(propVisit{key: 2}), propAsks(propVisit{key: 2}),
	}},
	{"a handler has run and its answer cannot be written", nil, []propStroke{
		{do: propArms, boundary: propAtWrite, after: 2}, propAsks(propVisit{key: 1}), propAsks(propVisit{key: 1}),
	}},
	{"a handler is called by a run that fails, while its request waits for one of its own", func(sc *propScenario) {
		sc.maxRuns, sc.fates[4].handle = 1, []propTurnout{slow}
	}, []propStroke{
		{do: propArms, boundary: propAtWrite, after: 2}, propAsks(propVisit{key: 1}),
		{do: propSendsOff, visits: []propVisit{{key: 4}}}, {do: propSendsOff, visits: []propVisit{{key: 1}}},
		{do: propArms, boundary: propAtWrite, after: 2}, {do: propSleeps, pause: time.Minute}, propAsks(propVisit{key: 1}),
	}},
	{"a retry waits for the answer", func(sc *propScenario) {
		sc.wait, sc.fates[0].pay = 2*time.Second, []propTurnout{fails}
	}, []propStroke{
		propAsks(propVisit{key: 0}, propVisit{key: 0}), propAsks(propVisit{key: 0}),
	}},
	{"a retry waits for the answer in vain", func(sc *propScenario) {
		sc.wait, sc.fates[0].pay = 2*time.Second, []propTurnout{slow}
	}, []propStroke{
		propAsks(propVisit{key: 0}, propVisit{key: 0}), propAsks(propVisit{key: 0}),
	}},
	{"a refusal is too large to be kept", func(sc *propScenario) {
		sc.fates[0].huge, sc.fates[0].pay = true, []propTurnout{declines}
	}, []propStroke{
		propAsks(propVisit{key: 0}), propAsks(propVisit{key: 0}),
	}},
	{"a panic is the answer", func(sc *propScenario) { sc.failFast, sc.fates[0].pay = true, []propTurnout{panics} }, []propStroke{
		propAsks(propVisit{key: 0}), {do: propKills, deploy: true}, propAsks(propVisit{key: 0}),
	}},
	{"a transfer is abandoned", func(sc *propScenario) { sc.fates[0].pay = []propTurnout{lost, lost, fails} }, []propStroke{
		propAsks(propVisit{key: 0}), {do: propSleeps, pause: time.Minute}, {do: propAbandons},
		propAsks(propVisit{key: 0}), propAsks(propVisit{key: 0}),
	}},
	{"a letter is abandoned", func(sc *propScenario) { sc.fates[2].handle = []propTurnout{panics} }, []propStroke{
		propAsks(propVisit{key: 2}), propAsks(propVisit{key: 2}), {do: propAbandons},
		propAsks(propVisit{key: 2}), propAsks(propVisit{key: 2}),
	}},
	{"a known request is one that Decode no longer takes", nil, []propStroke{
		propAsks(propVisit{key: 0, variant: propOtherBody}), {do: propKills, deploy: true},
		propAsks(propVisit{key: 0, variant: propOtherBody}), propAsks(propVisit{key: 3, variant: propOtherBody}),
	}},
	{"a key is used, forgotten, and too old to be used again", func(sc *propScenario) { sc.keyLife = propKeyLife }, []propStroke{
		propAsks(propVisit{key: 0}, propVisit{key: 3}), {do: propSleeps, pause: 25 * time.Minute}, propAsks(propVisit{key: 0}),
		{do: propSleeps, pause: 2 * time.Hour}, propAsks(propVisit{key: 0}, propVisit{key: 3}),
	}},
}

func propAsks(visits ...propVisit) propStroke { return propStroke{do: propSends, visits: visits} }

func (s propStory) scenario() *propScenario {
	sc := &propScenario{fates: make([]propFate, propKeys), canonical: true, maxRuns: 100, strokes: s.strokes}
	if s.change != nil {
		s.change(sc)
	}
	return sc
}

// A propScenario is a service, and what happens to it.
type propScenario struct {
	fates     []propFate // by key
	wait      time.Duration
	keyLife   time.Duration
	canonical bool
	maxRuns   int
	abandons  bool // in the end, operators give up what is parked
	failFast  bool // the transfer's obstacles are answers, from the effect on
	strokes   []propStroke
}

// A propFate is how attempts at a key's request go, one after another; later ones work.
type propFate struct {
	reserve, pay, settle, handle []propTurnout
	huge                         bool // its answer
}

func (f propFate) at(place string) []propTurnout {
	return map[string][]propTurnout{"reserve": f.reserve, "pay": f.pay, "settle": f.settle, "handle": f.handle}[place]
}

type propTurnout string

const (
	works     propTurnout = "works"
	fails     propTurnout = "fails"
	lost      propTurnout = "answer lost" // it happens, and fails
	slow      propTurnout = "slow"
	hangs     propTurnout = "hangs" // until its context ends
	panics    propTurnout = "panics"
	declines  propTurnout = "declines"
	withdraws propTurnout = "withdraws"
	empty     propTurnout = "empty"   // 204
	streams   propTurnout = "streams" // it flushes in the middle
)

// propKeys are the keys that requests use, at the endpoints that are their own: 0 is Handle, 1 Middleware, 2 Middleware with AtMostOnce.
const propKeys = 5

func propHome(key int) int { return []int{0, 1, 2, 0, 1}[key] }

// propID spells the key: a UUIDv7 minted when the scenario begins, one that can only be sent quoted, and plain ones.
func propID(key int, began time.Time) string {
	switch key {
	case 0, 1:
		u := uuid.UUID{6: 0x70, 8: 0x80, 15: byte(key)}
		binary.BigEndian.PutUint64(u[:], uint64(began.UnixMilli())<<16|0x7000)
		return u.String()
	case 2:
		return `say "hi", twice; a\b`
	}
	return fmt.Sprintf("%d/+=%%20", key)
}

// expiry is when a key can no longer be used for the first time.
func (sc *propScenario) expiry(began time.Time, key keystate.Key) (time.Time, bool) {
	u, err := uuid.Parse(key.ID)
	if err != nil || u.Version() != 7 {
		return time.Time{}, false
	}
	return began.Add(sc.keyLife), sc.keyLife > 0
}

func (sc *propScenario) fate(key keystate.Key) propFate {
	for i := range propKeys {
		if propID(i, propEpoch) == key.ID {
			return sc.fates[i]
		}
	}
	return propFate{}
}

// propEpoch is when every bubble begins.
var propEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

type propStroke struct {
	do       propDeedKind
	visits   []propVisit // of sends, sendsOff and restarts
	pause    time.Duration
	boundary propBoundary // of arms
	after    int
	deploy   bool // of kills and restarts: the next process is of another release
}

type propDeedKind string

const (
	propSends    propDeedKind = "sends" // requests, all at once, and waits for the answers
	propSendsOff propDeedKind = "sends off"
	propSleeps   propDeedKind = "sleeps"
	propArms     propDeedKind = "arms"     // the process will die at a boundary
	propKills    propDeedKind = "kills"    // it dies now
	propRestarts propDeedKind = "restarts" // it is shut down; requests arrive; it is started anew
	propFills    propDeedKind = "fills"    // the disk is full while requests arrive
	propRevives  propDeedKind = "revives"  // an operator retries what is parked
	propAbandons propDeedKind = "abandons"
)

type propBoundary string

const (
	propBeforeCommit propBoundary = "before commit"
	propAfterCommit  propBoundary = "after commit"
	propBeforeActing propBoundary = "before acting"
	propAfterActing  propBoundary = "after acting"
	propAtWrite      propBoundary = "at a write" // the store has no room for one transaction, and nobody dies
)

// A propVisit is one request.
type propVisit struct {
	key, scope int
	variant    int // what it says
	spelling   int // what may differ in a retry
	wrong      propWrongness
	patience   time.Duration // 0: for ever
}

func (v propVisit) String() string {
	return fmt.Sprintf("key %d of %d variant %d spelled %d %s", v.key, v.scope, v.variant, v.spelling, v.wrong)
}

// endpoint is where the request goes: to the key's own, or to another.
func (v propVisit) endpoint() int {
	if v.variant == propElsewhere {
		return (propHome(v.key) + 1) % 3
	}
	return propHome(v.key)
}

const (
	propSame = iota
	propOtherBody
	propOtherQuery
	propOtherHeader
	propOtherMethod
	propOtherPath
	propElsewhere
	propInvalid
	propVariants
)

type propWrongness string

const (
	propKeyless   propWrongness = "without a key"
	propMalformed propWrongness = "malformed key"
	propTwoKeys   propWrongness = "two keys"
	propAmbiguous propWrongness = "ambiguous key"
	propNobody    propWrongness = "nobody's"
	propOversized propWrongness = "oversized"
	propPlain     propWrongness = "plain" // a method that has no key
)

type propWrong struct {
	status  int
	problem string
}

var propWrongs = map[propWrongness]propWrong{
	propKeyless: {400, KeyMissing}, propMalformed: {400, KeyMalformed}, propTwoKeys: {400, KeyMalformed},
	propAmbiguous: {400, KeyAmbiguous},
	propNobody:    {401, ScopeUnknown}, propOversized: {413, RequestTooLarge}, propPlain: {405, MethodNotAllowed},
}

func (sc *propScenario) GoString() string {
	var b strings.Builder
	fmt.Fprintf(&b, "wait %s, key life %s, canonical %t, abandons %t, fail fast %t, at most %d runs\n",
		sc.wait, sc.keyLife, sc.canonical, sc.abandons, sc.failFast, sc.maxRuns)
	for i, f := range sc.fates {
		fmt.Fprintf(&b, "key %d: reserve %q, pay %q, settle %q, handle %q, huge %t\n", i, f.reserve, f.pay, f.settle, f.handle, f.huge)
	}
	for _, s := range sc.strokes {
		fmt.Fprintf(&b, "%s\n", s)
	}
	return b.String()
}

func (s propStroke) String() string {
	return fmt.Sprintf("%s %v, pause %s, %s %d, deploy %t", s.do, s.visits, s.pause, s.boundary, s.after, s.deploy)
}

// propScenarios draws whole scenarios: few keys, few requests, so that everything meets everything.
var propScenarios = rapid.Custom(func(t *rapid.T) *propScenario {
	sc := &propScenario{
		wait:      rapid.SampledFrom([]time.Duration{0, 2 * time.Second}).Draw(t, "wait"),
		keyLife:   rapid.SampledFrom([]time.Duration{0, propKeyLife}).Draw(t, "key life"),
		canonical: rapid.Bool().Draw(t, "canonical"),
		maxRuns:   rapid.SampledFrom([]int{100, 1}).Draw(t, "runs"),
		abandons:  rapid.Bool().Draw(t, "abandons"),
		failFast:  rapid.IntRange(0, 4).Draw(t, "fail fast") == 4,
	}
	turnouts := func(label string, most int, of ...propTurnout) []propTurnout {
		return rapid.SliceOfN(rapid.SampledFrom(of), 0, most).Draw(t, label)
	}
	for i := range propKeys {
		f := propFate{huge: rapid.IntRange(0, 7).Draw(t, "huge") == 7}
		if propHome(i) == 0 {
			f.reserve = turnouts("reserve", 2, works, fails, withdraws, declines)
			f.pay = turnouts("pay", 4, works, fails, lost, slow, hangs, panics, declines, lost)
			f.settle = turnouts("settle", 2, works, fails, declines)
		}
		f.handle = turnouts("handle", 3, works, fails, slow, hangs, panics, declines, empty, streams)
		sc.fates = append(sc.fates, f)
	}
	sc.strokes = rapid.SliceOfN(rapid.Custom(drawPropStroke), 1, 12).Draw(t, "strokes")
	return sc
})

func drawPropStroke(t *rapid.T) propStroke {
	s := propStroke{do: rapid.SampledFrom([]propDeedKind{
		propSends, propSends, propSends, propSendsOff, propSleeps, propArms, propArms,
		propKills, propRestarts, propFills, propRevives, propAbandons,
	}).Draw(t, "stroke")}
	switch s.do {
	case propSends, propSendsOff, propFills, propRestarts:
		s.visits = rapid.SliceOfN(rapid.Custom(drawPropVisit), 1, 5).Draw(t, "visits")
		if rapid.Bool().Draw(t, "one key") {
			for i := range s.visits {
				s.visits[i].key, s.visits[i].scope = s.visits[0].key, s.visits[0].scope
			}
		}
	case propSleeps:
		s.pause = rapid.SampledFrom([]time.Duration{
			500 * time.Millisecond, 5 * time.Second, time.Minute, 25 * time.Minute, 2 * time.Hour,
		}).Draw(t, "pause")
	case propArms:
		s.boundary = rapid.SampledFrom([]propBoundary{
			propAfterActing, propBeforeCommit, propAfterCommit, propBeforeActing, propAtWrite,
		}).Draw(t, "boundary")
		s.after = rapid.IntRange(1, 3).Draw(t, "after")
	}
	s.deploy = rapid.Bool().Draw(t, "deploy")
	return s
}

func drawPropVisit(t *rapid.T) propVisit {
	v := propVisit{
		key:      rapid.SampledFrom([]int{0, 1, 2, 0, 1, 2, 3, 4}).Draw(t, "key"),
		scope:    max(0, rapid.IntRange(-5, 1).Draw(t, "scope")),
		variant:  max(0, rapid.IntRange(-12, propVariants-1).Draw(t, "variant")),
		spelling: rapid.IntRange(0, 7).Draw(t, "spelling"),
		patience: rapid.SampledFrom([]time.Duration{0, 0, 0, 0, time.Second}).Draw(t, "patience"),
	}
	if rapid.IntRange(0, 11).Draw(t, "wrong") == 11 {
		v.wrong = rapid.SampledFrom([]propWrongness{
			propKeyless, propMalformed, propTwoKeys, propAmbiguous, propNobody, propOversized, propPlain,
		}).Draw(t, "wrongness")
	}
	return v
}

// A propCall is a request on its way.
type propCall struct {
	visit   propVisit
	key     keystate.Key
	raw     string // how the key is spelled
	content string
	r       *http.Request
	cancel  context.CancelFunc
	p       *propProcess
	began   time.Time
	life    *propLife
	known   *propAnswer // what was heard before it was sent
	company bool        // others with the key are open, or were
}

// claims says whether the request might claim its key.
func (q *propCall) claims() bool { return q.visit.wrong == "" }

// saves says whether the endpoint stores an answer of such a status.
func (q *propCall) saves(status int) bool {
	switch q.visit.endpoint() {
	case 0:
		return status != http.StatusTooManyRequests
	case 1:
		return status < 300
	}
	return status != http.StatusUnprocessableEntity
}

var propPaths = []string{"/transfers/", "/notes/", "/letters/"}

// request makes a visit's request. What may not differ in a retry is its content; the rest depends on the spelling.
func (pl *propPlaying) request(v propVisit) *propCall {
	id := propID(v.key, propEpoch)
	q := &propCall{visit: v, key: keystate.Key{Scope: []string{"ada", "bob"}[v.scope], ID: id}, p: pl.p, began: time.Now()}
	method, path, query, compared, body := http.MethodPost, propPaths[v.endpoint()]+"a", "", "1", `{"amount":1,"to":"x"}`
	switch v.variant {
	case propOtherBody:
		body = `{"amount":2,"to":"x"}`
	case propOtherQuery:
		query = "dry=1"
	case propOtherHeader:
		compared = "2"
	case propOtherMethod:
		method = http.MethodPatch
	case propOtherPath:
		path = propPaths[v.endpoint()] + "b"
	case propInvalid:
		body = `{"amount":-1,"to":"x"}`
	}
	if v.wrong == propPlain {
		method = http.MethodGet
	}
	if v.spelling&4 != 0 && pl.sc.canonical {
		body = strings.Replace(body, `,"to":"x"}`, ` , "to": "x" }`, 1)
	}
	if v.wrong == propOversized {
		body = `{"pad":"` + strings.Repeat("x", propMaxBody) + `"}`
	}
	q.raw = strconv.Quote(id)
	if v.spelling&1 != 0 && !strings.ContainsAny(id, ` ",;\`) {
		q.raw = id
	}
	header := http.Header{
		keyHeader: {q.raw}, "Content-Type": {"application/json"}, "X-Account": {q.key.Scope},
		"X-Compare": {compared}, "User-Agent": {strconv.Itoa(v.spelling)},
	}
	if v.spelling&2 != 0 {
		parameter := "key=" + url.QueryEscape(q.raw)
		if v.spelling&1 == 0 {
			delete(header, keyHeader)
			q.raw = strconv.Quote(id)
			pl.w.seen.note("spelled as parameter")
		}
		query = strings.Trim(query+"&"+parameter, "&")
	}
	switch v.wrong {
	case propKeyless:
		delete(header, keyHeader)
		query = ""
	case propMalformed:
		header[keyHeader], query = []string{`"half`}, ""
	case propTwoKeys:
		header[keyHeader], query = []string{"one", "two"}, ""
	case propAmbiguous:
		header[keyHeader], query = []string{"one"}, "key=two"
	case propNobody:
		delete(header, "X-Account")
	}
	ctx, cancel := context.WithCancel(context.Background())
	if v.patience > 0 {
		ctx, cancel = context.WithTimeout(context.Background(), v.patience)
	}
	q.cancel = cancel
	q.r = httptest.NewRequestWithContext(ctx, method, path+"?"+query, strings.NewReader(body))
	q.r.Header = header
	q.content = propContent(q.r, []byte(body))
	q.r = q.r.WithContext(context.WithValue(ctx, propOriginal{}, q.r))
	return q
}

// propOriginal leads to a request as it was sent, whatever a fault has made of it.
type propOriginal struct{}

// propContent is what a request says, as the program behind the endpoint understands it.
func propContent(r *http.Request, body []byte) string {
	query := r.URL.Query()
	query.Del("key")
	var said struct{ Amount int }
	_ = json.Unmarshal(body, &said)
	return fmt.Sprintf("%s %s?%s compare %s amount %d", r.Method, r.URL.Path, query.Encode(), r.Header.Get("X-Compare"), said.Amount)
}

func propContentOf(r *http.Request) string {
	body, _ := io.ReadAll(r.Body)
	if original, ok := r.Context().Value(propOriginal{}).(*http.Request); ok {
		if kept, ok := r.Context().Value(propOriginalBody{}).([]byte); ok {
			body = kept
		}
		r = original
	}
	return propContent(r, body)
}

type propOriginalBody struct{}

// propRefuses says what a release's Decode turns down: odd releases know a lower limit.
func propRefuses(release int, content string) bool {
	return strings.HasSuffix(content, "amount -1") || strings.HasSuffix(content, "amount 2") && release%2 == 1
}

// A propHeard is what came back.
type propHeard struct {
	status        int
	problem       string
	replayed      bool
	dropped       bool // a header that is not kept
	deed          int
	echo          string
	kept          http.Header
	body          []byte
	aborted       bool
	rows          map[string]int  // on disk when it was heard
	before, after keystate.Record // the key's, when the request was sent and when it was heard
}

func (h *propHeard) String() string {
	return fmt.Sprintf("%d %s replayed %t deed %d %.100q", h.status, h.problem, h.replayed, h.deed, h.body)
}

// A propProcess is an engine with its endpoints, from its start to its end.
type propProcess struct {
	keystate.Store[*bbolt.Tx]
	number, release     int
	w                   *propWorld
	sc                  *propScenario
	engine              *keystate.Engine[*bbolt.Tx]
	front               http.Handler
	crowd               sync.WaitGroup
	early               sync.Map // of the fault that answers early: who is to be answered
	dead, closing, full atomic.Bool
	refusals            atomic.Int64 // of the store, for want of room

	mu    sync.Mutex
	death propBoundary
	after int
}

// crosses says whether the process is dead when it crosses a boundary, or dies there.
func (p *propProcess) crosses(b propBoundary) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.death == b {
		if p.after--; p.after == 0 && !p.dead.Swap(true) {
			p.w.seen.note("death " + string(b))
			p.w.log("process %d dies %s", p.number, b)
		}
	}
	return p.dead.Load()
}

// refuses says whether there is no room for the transaction.
func (p *propProcess) refuses() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.death != propAtWrite {
		return false
	}
	p.after--
	if p.after == 0 {
		p.refusals.Add(1)
		p.w.seen.note("a write refused")
	}
	return p.after == 0
}

// Update is the store's, until the process is dead: then nothing reaches it.
func (p *propProcess) Update(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if p.dead.Load() {
		return errPropDead
	}
	if p.full.Load() {
		p.refusals.Add(1)
		return keystate.ErrStorageFull
	}
	err := p.Store.Update(ctx, func(tx *bbolt.Tx) error {
		if err := fn(tx); err != nil {
			return err
		}
		if p.refuses() {
			return keystate.ErrStorageFull
		}
		if p.crosses(propBeforeCommit) {
			return errPropDead
		}
		return nil
	})
	if err == nil && p.crosses(propAfterCommit) {
		return errPropDead
	}
	return err
}

func (p *propProcess) View(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if p.dead.Load() {
		return errPropDead
	}
	return p.Store.View(ctx, fn)
}

// record is the key's on disk, or an empty one.
func (p *propProcess) record(key keystate.Key) keystate.Record {
	r, err := p.engine.Key(context.Background(), key)
	if err != nil {
		return keystate.Record{}
	}
	return r
}

var propBucket = []byte("rows")

var propPoints = []string{"reserved", "paid", "settled"}

func propRow(deed int, point string) string { return fmt.Sprintf("%d %s", deed, point) }

// rows counts what the commits have written, or is nil when nothing can be read.
func (p *propProcess) rows() map[string]int {
	rows := map[string]int{}
	err := p.engine.View(context.Background(), func(tx *bbolt.Tx) error {
		return tx.Bucket(propBucket).ForEach(func(k, v []byte) error {
			rows[string(k)] = int(v[0])
			return nil
		})
	})
	if err != nil {
		return nil
	}
	return rows
}

// A propTransfer is the state behind the endpoint of Handle.
type propTransfer struct {
	Deed    int
	Content string
	Reached []string
}

func (p *propProcess) decode(r *http.Request) (propTransfer, error) {
	content := propContentOf(r)
	if propRefuses(p.release, content) {
		if strings.HasSuffix(content, "amount 2") {
			return propTransfer{}, &Problem{Type: propRefused, Title: "the limit is lower now"}
		}
		return propTransfer{}, errors.New("the amount is negative")
	}
	return propTransfer{Deed: p.w.make(p, KeyOf(r), content).number, Content: content}, nil
}

func (p *propProcess) encode(w http.ResponseWriter, s propTransfer, err error) {
	var declined *propDeclined
	var final *keystate.FinalError
	status := http.StatusCreated
	switch {
	case errors.Is(err, keystate.ErrWithdrawn):
		status = http.StatusTooManyRequests
	case errors.As(err, &declined), p.sc.failFast && err != nil && !errors.As(err, &final):
		status = http.StatusPaymentRequired
	case errors.As(err, &final):
		status = http.StatusFailedDependency
	case err != nil:
		p.w.violated("an error that is no answer is encoded: %v", err)
	}
	p.answer(w, status, s.Deed, p.w.account(p, s.Deed, s.Content, s.Reached, err))
}

func (p *propProcess) answer(w http.ResponseWriter, status, deed int, body []byte) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Deed", strconv.Itoa(deed))
	h.Set("X-Dropped", "yes")
	h.Add("Link", "<a>")
	h.Add("Link", "<b>")
	w.WriteHeader(status)
	w.Write(body)
}

// phases are the machine's: a commit, an effect with a commit, and a commit.
func (p *propProcess) phases() []keystate.Phase[*bbolt.Tx, propTransfer] {
	retry := keystate.RetryPolicy{Attempts: 3, InRun: 2, Initial: 100 * time.Millisecond, Max: time.Second}
	write := func(place, point string) func(context.Context, *bbolt.Tx, *propTransfer) error {
		return func(ctx context.Context, tx *bbolt.Tx, s *propTransfer) error {
			return p.write(ctx, tx, s, place, point)
		}
	}
	policy := keystate.Retry
	if p.sc.failFast {
		policy = keystate.Fail
	}
	return []keystate.Phase[*bbolt.Tx, propTransfer]{
		{To: "reserved", Commit: write("reserve", "reserved"), Retry: retry},
		{To: "paid", Effect: p.pay, Commit: write("", "paid"), Retry: retry, Timeout: 4 * time.Second, OnError: policy},
		{To: keystate.Finished, Commit: write("settle", "settled"), Retry: retry, OnError: policy},
	}
}

func (p *propProcess) write(ctx context.Context, tx *bbolt.Tx, s *propTransfer, place, point string) error {
	b, row := tx.Bucket(propBucket), []byte(propRow(s.Deed, point))
	n := byte(0)
	if v := b.Get(row); v != nil {
		n = v[0]
	}
	if err := b.Put(row, []byte{n + 1}); err != nil {
		return err
	}
	switch p.w.turnout(keystate.KeyOf(ctx), place) {
	case fails:
		return errPropObstacle
	case withdraws:
		p.w.mu.Lock()
		defer p.w.mu.Unlock()
		p.w.deeds[s.Deed-1].life.released++
		return keystate.Withdraw(errPropObstacle)
	case declines:
		return keystate.Final(&propDeclined{point})
	}
	s.Reached = append(s.Reached, point)
	return nil
}

func (p *propProcess) pay(ctx context.Context, token string, s *propTransfer) error {
	turnout := p.w.turnout(keystate.KeyOf(ctx), "pay")
	switch turnout {
	case fails:
		return errPropObstacle
	case declines:
		return fmt.Errorf("wrapped: %w", keystate.Final(&propDeclined{"paid"}))
	case panics:
		panic("by design")
	case hangs:
		<-ctx.Done()
		return ctx.Err()
	case slow:
		time.Sleep(3 * time.Second)
	}
	if p.crosses(propBeforeActing) {
		return errPropDead
	}
	p.w.act(p, s.Deed, token)
	if p.crosses(propAfterActing) {
		return errPropDead
	}
	if turnout == lost {
		return errPropObstacle
	}
	return nil
}

// handler is what is behind Middleware.
func (p *propProcess) handler(endpoint int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.WriteHeader(http.StatusOK)
			return
		}
		content, key := propContentOf(r), KeyOf(r)
		if p.crosses(propBeforeActing) { // it is not there any more to be called
			panic(http.ErrAbortHandler)
		}
		d := p.w.enter(p, key, content, Token(r.Context()), endpoint == 2)
		status := p.handle(w, r, d, key)
		p.w.leave(d, true, (&propCall{visit: propVisit{key: endpoint}}).saves(status))
		p.crosses(propAfterActing)
	})
}

func (p *propProcess) handle(w http.ResponseWriter, r *http.Request, d *propDeed, key keystate.Key) (status int) {
	turnout, status := p.w.turnout(key, "handle"), http.StatusCreated
	switch turnout {
	case panics:
		p.w.leave(d, false, false)
		panic(http.ErrAbortHandler)
	case slow:
		time.Sleep(3 * time.Second)
		if err := r.Context().Err(); err != nil && !p.closing.Load() && !p.dead.Load() {
			p.w.violated("%s: the handler's context ends while the engine is open", key)
		}
	case hangs:
		select {
		case <-r.Context().Done():
		case <-time.After(time.Minute):
		}
		status = http.StatusInternalServerError
	case fails:
		status = http.StatusInternalServerError
	case declines:
		status = http.StatusUnprocessableEntity
	case empty:
		status = http.StatusNoContent
	}
	if strings.HasSuffix(d.content, "amount -1") {
		status = http.StatusUnprocessableEntity
	}
	body := p.w.account(p, d.number, d.content, nil, nil)
	if status == http.StatusNoContent {
		d.huge, body = false, nil
	}
	if turnout == streams {
		p.w.mu.Lock()
		d.streams = true
		p.w.mu.Unlock()
		p.answer(w, status, d.number, body[:5])
		http.NewResponseController(w).Flush()
		w.Write(body[5:])
		return status
	}
	p.answer(w, status, d.number, body)
	return status
}

// A propPlaying is a scenario on its way.
type propPlaying struct {
	t       *testing.T
	dir     string
	sc      *propScenario
	fault   propFault
	w       *propWorld
	p       *propProcess
	booted  int
	release int
}

// propPlay carries a scenario out, and returns the first promise that was broken.
func propPlay(t *testing.T, sc *propScenario, f propFault, seen *propSightings) (err error) {
	defer func() {
		if v := recover(); v != nil { // synctest panics when goroutines wait for each other for ever
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	dir := t.TempDir()
	path := filepath.Join(dir, "store.db")
	if err := os.WriteFile(path, propEmptyStore(), 0o600); err != nil {
		return err
	}
	defer os.Remove(path)
	synctest.Test(t, func(t *testing.T) {
		pl := &propPlaying{t: t, dir: dir, sc: sc, fault: f, w: newPropWorld(sc, seen)}
		pl.play()
		err = pl.w.verdict()
	})
	return err
}

// propEmptyStore is a bbolt file with the program's bucket.
var propEmptyStore = sync.OnceValue(func() []byte {
	dir, err := os.MkdirTemp("", "keyhttp")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "empty.db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		panic(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket(propBucket)
		return err
	})
	if err := errors.Join(err, db.Close()); err != nil {
		panic(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	return b
})

func (pl *propPlaying) play() {
	pl.boot()
	for _, s := range pl.sc.strokes {
		if pl.w.verdict() != nil {
			break
		}
		pl.w.log("— %s", s.do)
		pl.stroke(s)
		if pl.p.dead.Load() {
			pl.bury()
			pl.boot()
		}
		pl.audit()
	}
	if pl.w.verdict() == nil {
		pl.end()
	}
	pl.p.dead.Store(true)
	pl.bury()
}

func (pl *propPlaying) stroke(s propStroke) {
	switch s.do {
	case propSends:
		pl.send(s.visits).Wait()
	case propSendsOff:
		pl.send(s.visits)
	case propSleeps:
		time.Sleep(s.pause)
	case propArms:
		pl.p.mu.Lock()
		pl.p.death, pl.p.after = s.boundary, s.after
		pl.p.mu.Unlock()
	case propKills:
		pl.p.dead.Store(true)
		pl.w.seen.note("killed")
		pl.bury()
		pl.deploy(s.deploy)
		pl.boot()
	case propRestarts:
		pl.close()
		pl.send(s.visits).Wait()
		pl.deploy(s.deploy)
		pl.boot()
	case propFills:
		pl.p.full.Store(true)
		pl.send(s.visits).Wait()
		pl.p.full.Store(false)
		pl.w.seen.note("a full store")
	case propRevives, propAbandons:
		pl.operate(s.do)
	}
}

func (pl *propPlaying) deploy(yes bool) {
	if yes {
		pl.release++
		pl.w.seen.note("a new release")
	}
}

// boot starts a process.
func (pl *propPlaying) boot() {
	pl.booted++
	p := &propProcess{Store: keytest.OpenBolt(pl.t, pl.dir), number: pl.booted, release: pl.release, w: pl.w, sc: pl.sc}
	pl.p = p
	pl.w.log("process %d of release %d", p.number, p.release)
	var err error
	p.engine, err = keystate.New[*bbolt.Tx](p, &keystate.Options{
		Retention: propRetention, MaxRuns: pl.sc.maxRuns, Headroom: -1, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		pl.t.Fatalf("the engine does not start: %v", err)
	}
	if p.front, err = p.mount(pl.fault); err != nil {
		pl.t.Fatalf("the endpoints are refused: %v", err)
	}
}

// options are those of an endpoint.
func (p *propProcess) options(f propFault) Options {
	o := Options{
		Scope: func(r *http.Request) (string, error) {
			if account := r.Header.Get("X-Account"); account != "" {
				return account, nil
			}
			return "", errors.New("no account")
		},
		QueryParameter: "key", KeyLife: p.sc.keyLife, CompareHeaders: []string{"content-type", "x-compare"},
		CanonicalJSON: p.sc.canonical,
		MaxBody:       propMaxBody, MaxResponse: propMaxResponse, KeepHeaders: []string{"X-Deed"}, Wait: p.sc.wait,
		Logger: slog.New(slog.DiscardHandler),
	}
	if f.options != nil {
		f.options(p, &o)
	}
	return o
}

// mount puts the three endpoints into one mux.
func (p *propProcess) mount(f propFault) (http.Handler, error) {
	mux := http.NewServeMux()
	transfers, err := p.mountMachine(f)
	if err != nil {
		return nil, err
	}
	mux.Handle(propPaths[0], transfers)
	for endpoint, name := range []string{1: "note", 2: "letter"} {
		if endpoint == 0 {
			continue
		}
		o := p.options(f)
		o.AtMostOnce = endpoint == 2
		protect, err := p.mountGuard(f, name, o)
		if err != nil {
			return nil, err
		}
		mux.Handle(propPaths[endpoint], protect(p.handler(endpoint)))
	}
	if f.front != nil {
		return f.front(p, mux), nil
	}
	return mux, nil
}

// mountMachine is Handle, or what a fault has made of it.
func (p *propProcess) mountMachine(f propFault) (http.Handler, error) {
	ep := Endpoint[propTransfer]{Options: p.options(f), Decode: p.decode, Encode: p.encode}
	if f.lift == nil {
		h, err := Handle(p.engine, "transfer", p.phases(), ep)
		if err == nil && f.handler != nil {
			f.handler(p, h)
		}
		return h, err
	}
	in, err := newIntake(ep.Options)
	if err != nil {
		return nil, err
	}
	h := &Handler[propTransfer]{intake: in, decode: ep.Decode, answers: newAnswers(&in.Options, ep.Encode)}
	if f.handler != nil {
		f.handler(p, h)
	}
	h.machine, err = keystate.Register(p.engine, "transfer", f.lift(answering(p.phases(), h.answers)))
	return h, err
}

// mountGuard is Middleware, or what a fault has made of it.
func (p *propProcess) mountGuard(f propFault, name string, o Options) (func(http.Handler) http.Handler, error) {
	if f.effect == nil {
		return Middleware(p.engine, name, o)
	}
	in, err := newIntake(o)
	if err != nil {
		return nil, err
	}
	g := &guard{intake: in, offers: map[identity][]*attempt{}, taken: map[string]*attempt{}}
	phase := keystate.Phase[*bbolt.Tx, recording]{To: keystate.Finished, AtMostOnce: in.AtMostOnce, Timeout: -1}
	f.effect(g, &phase)
	g.machine, err = keystate.Register(p.engine, name, []keystate.Phase[*bbolt.Tx, recording]{phase})
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, next) })
	}, err
}

// send lets clients ask, all at once.
func (pl *propPlaying) send(visits []propVisit) *sync.WaitGroup {
	var crowd sync.WaitGroup
	for _, v := range visits {
		q := pl.request(v)
		before := pl.p.record(q.key)
		pl.w.send(q)
		crowd.Add(1)
		pl.p.crowd.Go(func() {
			defer crowd.Done()
			heard := q.ask()
			heard.before, heard.after = before, q.p.record(q.key)
			pl.w.hear(q, heard)
			q.cancel()
		})
	}
	return &crowd
}

// ask sends the request and reads the answer.
func (q *propCall) ask() (heard *propHeard) {
	heard = &propHeard{}
	rec := httptest.NewRecorder()
	defer func() {
		if v := recover(); v != nil {
			if heard.aborted = true; v != http.ErrAbortHandler {
				q.p.w.violated("%s: a panic: %v\n%s", q.key, v, debug.Stack())
			}
		}
	}()
	q.p.front.ServeHTTP(rec, q.r)
	res := rec.Result()
	heard.status, heard.body = res.StatusCode, rec.Body.Bytes()
	heard.replayed = res.Header.Get(replayedHeader) == "true"
	heard.dropped = res.Header.Get("X-Dropped") != ""
	heard.echo = res.Header.Get(keyHeader)
	heard.deed, _ = strconv.Atoi(res.Header.Get("X-Deed"))
	heard.kept = http.Header{}
	for _, name := range []string{"Content-Type", "Link", "X-Deed", "Etag", "Location", "Cache-Control"} {
		if values := res.Header.Values(name); len(values) > 0 {
			heard.kept[name] = values
		}
	}
	var problem Problem
	if res.Header.Get("Content-Type") == "application/problem+json" {
		if err := json.Unmarshal(heard.body, &problem); err != nil || problem.Status != heard.status {
			q.p.w.violated("%s: a problem that does not say so: %d %q %v", q.key, heard.status, heard.body, err)
		}
		heard.problem = problem.Type[strings.LastIndex(problem.Type, "/")+1:]
	}
	heard.rows = q.p.rows()
	return heard
}

// audit looks at what is on disk when nothing moves.
func (pl *propPlaying) audit() {
	synctest.Wait()
	rows := pl.p.rows()
	if rows == nil {
		return
	}
	pl.w.mu.Lock()
	keys := slices.Collect(maps.Keys(pl.w.lives))
	pl.w.mu.Unlock()
	records := map[keystate.Key]keystate.Record{}
	for r, err := range pl.p.engine.Keys(context.Background(), keystate.Filter{}) {
		if err != nil {
			return // the process is on its way down
		}
		records[r.Key] = r
		if !slices.Contains(keys, r.Key) {
			pl.w.violated("%s: a record of what nobody has asked for", r.Key)
		}
	}
	pl.w.audit(records, rows)
}

// bury closes the engine of a process that is dead.
func (pl *propPlaying) bury() {
	_ = pl.p.engine.Close()
	pl.p.crowd.Wait()
}

// close shuts the process down in good order.
func (pl *propPlaying) close() {
	synctest.Wait()
	pl.p.closing.Store(true)
	pl.w.log("process %d closes", pl.p.number)
	if err := pl.p.engine.Close(); err != nil && !pl.p.dead.Load() {
		pl.w.violated("closing: %v", err)
	}
	pl.p.crowd.Wait()
	pl.w.seen.note("closed")
}

// operate lets an operator do something about all that is parked.
func (pl *propPlaying) operate(do propDeedKind) (parked int) {
	for r, err := range pl.p.engine.Keys(context.Background(), keystate.Filter{}) {
		if err != nil || r.Status != keystate.Parked {
			continue
		}
		parked++
		pl.w.mu.Lock()
		l := pl.w.life(r.Key)
		l.revived = l.revived || do == propRevives
		l.given = l.given || do == propAbandons
		pl.w.mu.Unlock()
		if do == propRevives {
			err = pl.p.engine.Retry(context.Background(), r.Key)
			pl.w.seen.note("a parked key revived")
		} else {
			err = pl.p.engine.Abandon(context.Background(), r.Key, "lost in the post")
			pl.w.seen.note("a parked key abandoned")
		}
		if err != nil && !pl.p.dead.Load() && !errors.Is(err, keystate.ErrStorageFull) {
			pl.w.violated("%s: the operator's %s: %v", r.Key, do, err)
		}
	}
	return parked
}

// end lets everything come to its end: the world is healed, operators take what is parked in hand, every client gets its
// answer, and gets it again; after retention nothing is left.
func (pl *propPlaying) end() {
	pl.w.log("— the end")
	pl.p.mu.Lock()
	pl.p.death = ""
	pl.p.mu.Unlock()
	pl.close()
	pl.w.mu.Lock()
	pl.w.healed = true
	pl.w.mu.Unlock()
	pl.boot()
	operate := propRevives
	if pl.sc.abandons {
		operate = propAbandons
	}
	keytest.Idle(pl.t, pl.p.engine)
	pl.operate(operate)
	keytest.Idle(pl.t, pl.p.engine)
	pl.audit()
	for range 2 {
		for key := range propKeys {
			for scope := range 2 {
				pl.insist(propVisit{key: key, scope: scope, spelling: 1})
			}
		}
	}
	for key := range propKeys {
		pl.send([]propVisit{{key: key, variant: propOtherQuery}}).Wait()
	}
	pl.audit()
	time.Sleep(propRetention + 5*time.Minute)
	stats, err := pl.p.engine.Stats(context.Background())
	if err != nil || stats.Counts != (keystate.Counts{}) {
		pl.w.violated("after retention there are still %+v, %v", stats.Counts, err)
	}
}

// insist asks in all the ways that the key may have been used until one of them gets its answer, or the key is free and no
// longer to be had.
func (pl *propPlaying) insist(v propVisit) {
	if pl.w.verdict() != nil {
		return
	}
	q := pl.request(v)
	q.cancel()
	for v.variant = range propVariants {
		pl.send([]propVisit{v}).Wait()
		pl.w.mu.Lock()
		settled := pl.w.life(q.key).owner != ""
		pl.w.mu.Unlock()
		if settled {
			return
		}
	}
	if expiry, expires := pl.sc.expiry(pl.w.began, q.key); !expires || !time.Now().After(expiry) {
		pl.w.violated("%s: nobody gets an answer", q.key)
	}
}
