package keyhttp

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

// A posted is a request as the tests of its digest write it.
type posted struct {
	method, url, contentType, body string
	header                         http.Header
}

func (p posted) digest(t *testing.T, o Options) string {
	t.Helper()
	o.Scope = Public
	o, err := o.orDefault()
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequest(p.method, "http://example.com"+p.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", p.contentType)
	for name, values := range p.header {
		r.Header[name] = values
	}
	return hex.EncodeToString(o.digest(r, []byte(p.body)))
}

var order = posted{"POST", "/orders?a=1", "application/json", `{"item": "tea", "cents": 250}`, nil}

// The digest is stored for as long as keys are kept: a release that changes it takes honest retries for other requests.
func TestTheDigestStaysAsItIs(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{}, "a6290320da21ea2b16a4fbb25a31c2ff64a99e8b5024169e9e346f6783ad39fe"},
		{Options{CanonicalJSON: true}, "e082c8e8e2c41c4edd5bcbbcde09fc909f27c30a1e7375b909787539c459c8b5"},
		{Options{QueryParameter: "a", CompareHeaders: []string{"accept", "Content-Type"}}, "4fd0f0d24c2691177098de506d2fea60304d1939b21d2bb1dfcd406721fc4259"},
	} {
		if got := order.digest(t, c.o); got != c.want {
			t.Errorf("%+v: the digest is %s, and it was %s", c.o, got, c.want)
		}
	}
}

func TestWhatMakesAnotherRequest(t *testing.T) {
	with := func(change func(*posted)) posted {
		p := order
		change(&p)
		return p
	}
	for _, c := range []struct {
		name    string
		request posted
		options Options
		same    bool
	}{
		{"the same", order, Options{}, true},
		{"another method", with(func(p *posted) { p.method = "PATCH" }), Options{}, false},
		{"another path", with(func(p *posted) { p.url = "/order?a=1" }), Options{}, false},
		{"another query", with(func(p *posted) { p.url = "/orders?a=2" }), Options{}, false},
		{"no query", with(func(p *posted) { p.url = "/orders" }), Options{}, false},
		{"a path escaped in another way", with(func(p *posted) { p.url = "/%6frders?a=1" }), Options{}, false},
		{"an escaped slash", with(func(p *posted) { p.url = "/orders%2F?a=1" }), Options{}, false},
		{"another content type", with(func(p *posted) { p.contentType = "text/plain" }), Options{}, false},
		{"another header", with(func(p *posted) { p.header = http.Header{"Accept": {"text/plain"}} }), Options{}, true},
		{"a header to compare", with(func(p *posted) { p.header = http.Header{"Accept": {"text/plain"}} }), Options{CompareHeaders: []string{"accept"}}, false},
		{"the trace of a retry", with(func(p *posted) { p.header = http.Header{"Traceparent": {"00-1"}} }), Options{}, true},
		{"white space", with(func(p *posted) { p.body = `{"item":"tea","cents":250}` }), Options{}, false},
		{"white space in JSON", with(func(p *posted) { p.body = `{"item":"tea","cents":250}` }), Options{CanonicalJSON: true}, true},
		{"other order in JSON", with(func(p *posted) { p.body = `{"cents":250,"item":"tea"}` }), Options{CanonicalJSON: true}, true},
		{"another amount in JSON", with(func(p *posted) { p.body = `{"item": "tea", "cents": 251}` }), Options{CanonicalJSON: true}, false},
		{"another spelling of a number", with(func(p *posted) { p.body = `{"item": "tea", "cents": 250.0}` }), Options{CanonicalJSON: true}, false},
		{"the key in the query", with(func(p *posted) { p.url = "/orders?k=1&a=1" }), Options{QueryParameter: "k"}, true},
		{"the key in the query, escaped", with(func(p *posted) { p.url = "/orders?a=1&%6b=1" }), Options{QueryParameter: "k"}, true},
		{"a parameter of a name like the key's", with(func(p *posted) { p.url = "/orders?a=1&kk=1" }), Options{QueryParameter: "k"}, false},
	} {
		if got := c.request.digest(t, c.options) == order.digest(t, c.options); got != c.same {
			t.Errorf("%s: same %v", c.name, got)
		}
	}
}

// What one field ends with must not look like what the next begins with.
func TestFieldsOfADigestDoNotRunTogether(t *testing.T) {
	seen := map[string]posted{}
	for _, p := range []posted{
		{"POST", "/a", "b", "c", nil}, {"POST", "/a", "", "bc", nil}, {"POST", "/ab", "", "c", nil}, {"POST", "/a?b", "", "c", nil},
		{"POST", "/a", "bc", "", nil}, {"POSTA", "/", "b", "c", nil}, {"POST", "/", "", "", http.Header{"Content-Type": {"a", "b"}}},
		{"POST", "/", "ab", "", nil}, {"POST", "/", "", "", http.Header{"Content-Type": {"ab", ""}}},
		{"POST", "/", "", "", http.Header{"Content-Type": nil}}, {"POST", "/", "", "", http.Header{"Content-Type": {""}}},
	} {
		d := p.digest(t, Options{})
		if other, taken := seen[d]; taken {
			t.Errorf("%+v and %+v have one digest", p, other)
		}
		seen[d] = p
	}
}

func TestCanonicalJSON(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{`{"b":1,"a":[true , false,null ]}`, `{"a":[true,false,null],"b":1}`},
		{` "\u0041\/\n" `, `"A/\n"`},
		{`{"a":{"z":{},"y":[]},"A":""}`, `{"A":"","a":{"y":[],"z":{}}}`},
		{`[1, 1.0, 1e0, -0, 9007199254740993]`, `[1,1.0,1e0,-0,9007199254740993]`},
		{`"<&>"`, `"\u003c\u0026\u003e"`},
		{`"😀"`, `"😀"`},
		{`"\ud83d\ude00"`, `"😀"`},
		{`{"é":1,"e":2}`, `{"e":2,"é":1}`},
		{``, ""},
		{`{"a":1,"a":2}`, ""},
		{`{"a":1,"\u0061":2}`, ""},
		{`{"a":1} {}`, ""},
		{`{"a":1`, ""},
		{`[1,]`, ""},
		{"\"\xff\"", ""},
		{`"\ud83d"`, ""},
		{strings.Repeat("[", 101) + strings.Repeat("]", 101), strings.Repeat("[", 101) + strings.Repeat("]", 101)},
		{strings.Repeat("[", 102) + strings.Repeat("]", 102), ""},
	} {
		got, err := canonicalJSON([]byte(c.text))
		if string(got) != c.want && err == nil || (err == nil) != (c.want != "") {
			t.Errorf("%s is %s, %v; want %s", c.text, got, err, c.want)
		}
	}
}

// FuzzCanonicalJSON: the canonical form says the same as the text, is its own canonical form, and is the same for the text in another layout.
func FuzzCanonicalJSON(f *testing.F) {
	for _, seed := range []string{`{"b":1,"a":[true,null]}`, `"\u0041"`, `[1.0,1e400]`, `{"a":{"a":{}}}`, `{"a":1,"a":2}`, "\"\xff\""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		canonical, err := canonicalJSON(text)
		if err != nil {
			return
		}
		if !reflect.DeepEqual(meaning(t, text), meaning(t, canonical)) {
			t.Fatalf("%q and its canonical form %q say different things", text, canonical)
		}
		var indented bytes.Buffer
		if err := json.Indent(&indented, text, " ", "\t"); err != nil {
			t.Fatal(err)
		}
		for _, same := range [][]byte{canonical, indented.Bytes()} {
			again, err := canonicalJSON(same)
			if err != nil || !bytes.Equal(again, canonical) {
				t.Fatalf("%q gives %q, %v; and %q gives %q", same, again, err, text, canonical)
			}
		}
	})
}

func meaning(t *testing.T, text []byte) (v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return v
}
