package keyhttp

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"example.com/keystate"
	"github.com/dunglas/httpsfv"
	"github.com/google/uuid"
)

func TestParseKey(t *testing.T) {
	const long = 255
	for _, c := range []struct {
		name, value   string
		lenient, want string // what each way of reading makes of it; "" is an error
	}{
		{"a structured string", `"8e03978e-40d5"`, "8e03978e-40d5", "8e03978e-40d5"},
		{"bare, as Stripe's clients send it", `8e03978e-40d5`, "8e03978e-40d5", ""},
		{"space around it", "\t \"abc\" ", "abc", "abc"},
		{"parameters", `"abc";a=1`, "abc", "abc"},
		{"escapes", `"a\"b\\c"`, `a"b\c`, `a"b\c`},
		{"spaces inside quotes", `"a b"`, "a b", "a b"},
		{"no visible characters inside quotes", `" "`, " ", " "},
		{"bare with punctuation", "a/b+c=d:e.f_g~h!(i)", "a/b+c=d:e.f_g~h!(i)", ""},
		{"empty", "", "", ""},
		{"white space", " \t ", "", ""},
		{"empty quotes", `""`, "", ""},
		{"quotes not closed", `"abc`, "", ""},
		{"something after the string", `"abc" def`, "", ""},
		{"two keys in one line", `"abc", "def"`, "", ""},
		{"two bare keys in one line", "abc, def", "", ""},
		{"two bare keys without space", "abc,def", "", ""},
		{"a quote inside", `ab"c`, "", ""},
		{"a quote at the end", `abc"`, "", ""},
		{"a backslash", `ab\c`, "", ""},
		{"bare parameters", "abc;a=1", "", ""},
		{"a space inside", "a b", "", ""},
		{"not ASCII", "schlüssel", "", ""},
		{"not ASCII in quotes", `"schlüssel"`, "", ""},
		{"a control character", "a\x01b", "", ""},
		{"DEL in quotes", "\"a\x7fb\"", "", ""},
		{"a number is bare", "42", "42", ""},
		{"a token is bare", "abc", "abc", ""},
		{"an inner list", `("abc")`, "", ""},
		{"as long as can be", strings.Repeat("k", long), strings.Repeat("k", long), ""},
		{"as long as can be, quoted", `"` + strings.Repeat("k", long) + `"`, strings.Repeat("k", long), strings.Repeat("k", long)},
		{"too long", strings.Repeat("k", long+1), "", ""},
		{"too long, quoted", `"` + strings.Repeat("k", long+1) + `"`, "", ""},
		{"escapes do not count", `"` + strings.Repeat(`\\`, long) + `"`, strings.Repeat(`\`, long), strings.Repeat(`\`, long)},
	} {
		for strict, want := range map[bool]string{false: c.lenient, true: c.want} {
			id, err := parseKey(c.value, strict)
			if id != want && err == nil || (err == nil) != (want != "") {
				t.Errorf("%s, strict %v: %q gives %q, %v; want %q", c.name, strict, c.value, id, err, want)
			}
		}
	}
}

func TestSpelledKeysAreReadAsTheyWere(t *testing.T) {
	for _, id := range []string{"abc", `a"b\c`, " ", keystate.NewID()} {
		for _, strict := range []bool{false, true} {
			if got, err := parseKey(spell(id), strict); got != id || err != nil {
				t.Errorf("%q is spelled %s and read as %q, %v", id, spell(id), got, err)
			}
		}
	}
}

// FuzzParseKey holds the reader against the library's own, and against what every key must be.
func FuzzParseKey(f *testing.F) {
	for _, seed := range []string{`"abc"`, "abc", `"a\"b"`, `"abc";a=1`, "a,b", "", `"`, "é"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		lenient, err := parseKey(value, false)
		strict, strictErr := parseKey(value, true)
		if strictErr == nil && (err != nil || lenient != strict) {
			t.Fatalf("%q is %q when read strictly, and %q, %v otherwise", value, strict, lenient, err)
		}
		if strictErr == nil {
			item, err := httpsfv.UnmarshalItem([]string{strings.Trim(value, " \t")})
			if err != nil || item.Value != strict {
				t.Fatalf("%q is no structured string %q: %v", value, strict, err)
			}
		}
		if err != nil {
			return
		}
		if lenient == "" || len(lenient) > maxKey {
			t.Fatalf("%q gives a key of %d bytes", value, len(lenient))
		}
		for _, c := range []byte(lenient) {
			if c < ' ' || c > '~' {
				t.Fatalf("%q gives a key with the byte %#x", value, c)
			}
		}
		if again, err := parseKey(spell(lenient), true); again != lenient || err != nil {
			t.Fatalf("%q gives %q, which is spelled %s and read as %q, %v", value, lenient, spell(lenient), again, err)
		}
	})
}

func TestKeysOfARequest(t *testing.T) {
	const parameter = "idempotency_key"
	for _, c := range []struct {
		name    string
		headers []string
		query   string
		off     bool // the parameter is not read
		want    string
		problem string
	}{
		{"none", nil, "", false, "", ""},
		{"header", []string{`"a"`}, "", false, "a", ""},
		{"parameter", nil, "idempotency_key=a", false, "a", ""},
		{"escaped parameter", nil, "x=1&idempotency_key=%22a%22", false, "a", ""},
		{"both alike", []string{"a"}, "idempotency_key=%22a%22", false, "a", ""},
		{"both and different", []string{"a"}, "idempotency_key=b", false, "", KeyAmbiguous},
		{"two header lines", []string{"a", "a"}, "", false, "", KeyMalformed},
		{"two parameters", nil, "idempotency_key=a&idempotency_key=a", false, "", KeyMalformed},
		{"an empty header is not none", []string{""}, "", false, "", KeyMalformed},
		{"an empty parameter is not none", []string{"a"}, "idempotency_key=", false, "", KeyMalformed},
		{"the parameter is off by default", nil, "idempotency_key=a", true, "", ""},
		{"the parameter is off by default, and the header wins", []string{"b"}, "idempotency_key=a", true, "b", ""},
	} {
		o := &Options{QueryParameter: parameter}
		if c.off {
			o.QueryParameter = ""
		}
		r, err := http.NewRequest(http.MethodPost, "http://example.com/?"+c.query, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header[keyHeader] = c.headers
		s, problem := o.spelledKey(r)
		switch {
		case problem != nil && problem.Type != c.problem:
			t.Errorf("%s: %v", c.name, problem)
		case problem == nil && c.problem != "":
			t.Errorf("%s: the key is %q, want %s", c.name, s.id, c.problem)
		case problem == nil && s.id != c.want:
			t.Errorf("%s: the key is %q, want %q", c.name, s.id, c.want)
		}
	}
}

func TestOnlyAUUIDv7TellsItsAge(t *testing.T) {
	at := func(age time.Duration) string {
		u := uuid.Must(uuid.NewV7())
		ms := time.Now().Add(-age).UnixMilli()
		for i := range 6 {
			u[i] = byte(ms >> (8 * (5 - i)))
		}
		return u.String()
	}
	for _, c := range []struct {
		name string
		id   string
		life time.Duration
		want bool
	}{
		{"a young one", at(time.Minute), time.Hour, false},
		{"an old one", at(2 * time.Hour), time.Hour, true},
		{"an old one, and any age will do", at(2 * time.Hour), 0, false},
		{"from the future", at(-time.Hour), time.Hour, false},
		{"a random UUID", uuid.NewString(), time.Nanosecond, false},
		{"a name", "order-17", time.Nanosecond, false},
	} {
		o := &Options{KeyLife: c.life}
		if got := o.tooOld(c.id); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
