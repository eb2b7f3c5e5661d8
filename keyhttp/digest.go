package keyhttp

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"
)

// digest is what tells a request from another one under the same key: method, path, query, the headers to compare, and the body. It
// is stored, so what goes into it, and in which order, stays as it is.
func (o *Options) digest(r *http.Request, body []byte) []byte {
	d := digested.Get().(*fields)
	defer digested.Put(d)
	*d = (*d)[:0]
	d.add("keyhttp request 1")
	d.add(r.Method)
	d.add(r.URL.EscapedPath())
	d.add(withoutParameter(r.URL.RawQuery, o.QueryParameter))
	d.count(len(o.CompareHeaders))
	for _, name := range o.CompareHeaders {
		values := r.Header.Values(name)
		d.add(name)
		d.count(len(values))
		for _, v := range values {
			d.add(v)
		}
	}
	form := "bytes"
	if o.CanonicalJSON && isJSON(r.Header.Get("Content-Type")) {
		if canonical, err := canonicalJSON(body); err == nil {
			form, body = "json", canonical
		}
	}
	d.add(form)
	d.count(len(body))
	h := sha256.New()
	h.Write(*d)
	h.Write(body)
	return h.Sum(nil)
}

// digested keeps the memory in which all of a request but its body is put together.
var digested = sync.Pool{New: func() any { return new(fields) }}

// fields are texts, each with its length before it, so that no two lists of them look alike.
type fields []byte

func (f *fields) count(n int) { *f = binary.BigEndian.AppendUint64(*f, uint64(n)) }

func (f *fields) add(s string) {
	f.count(len(s))
	*f = append(*f, s...)
}

// withoutParameter is a query without the parameter that carries the key; the rest stays byte for byte.
func withoutParameter(query, name string) string {
	if name == "" || query == "" {
		return query
	}
	parts := strings.Split(query, "&")
	return strings.Join(slices.DeleteFunc(parts, func(part string) bool {
		given, _, _ := strings.Cut(part, "=")
		given, err := url.QueryUnescape(given)
		return err == nil && given == name
	}), "&")
}

func isJSON(contentType string) bool {
	t, _, err := mime.ParseMediaType(contentType)
	return err == nil && (t == "application/json" || strings.HasSuffix(t, "+json"))
}

// canonicalJSON writes a JSON text (RFC 8259) without white space, names in order and strings in one spelling. Numbers stay as they
// are written: what a reader makes of 1.0 or of 9007199254740993 is not for us to say. It refuses what readers understand in different
// ways: names that occur twice, text that is not UTF-8, and nesting beyond reason.
func canonicalJSON(text []byte) ([]byte, error) {
	if !utf8.Valid(text) || !json.Valid(text) {
		return nil, errNotCanonical
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	return appendCanonical(make([]byte, 0, len(text)), d, 0)
}

var errNotCanonical = errors.New("keyhttp: the JSON text means different things to different readers")

const maxNesting = 100

func appendCanonical(out []byte, d *json.Decoder, depth int) ([]byte, error) {
	token, err := d.Token()
	if err != nil || depth > maxNesting {
		return nil, errNotCanonical
	}
	switch v := token.(type) {
	case json.Delim:
		if v == '{' {
			return appendObject(out, d, depth)
		}
		return appendArray(out, d, depth)
	case json.Number:
		return append(out, v...), nil
	case string:
		return appendString(out, v)
	case bool:
		if v {
			return append(out, "true"...), nil
		}
		return append(out, "false"...), nil
	}
	return append(out, "null"...), nil
}

func appendArray(out []byte, d *json.Decoder, depth int) (_ []byte, err error) {
	out = append(out, '[')
	for i := 0; d.More(); i++ {
		if i > 0 {
			out = append(out, ',')
		}
		if out, err = appendCanonical(out, d, depth+1); err != nil {
			return nil, err
		}
	}
	_, err = d.Token()
	return append(out, ']'), err
}

func appendObject(out []byte, d *json.Decoder, depth int) ([]byte, error) {
	type member struct {
		name  string
		value []byte
	}
	var members []member
	for d.More() {
		token, err := d.Token()
		name, isName := token.(string)
		if err != nil || !isName {
			return nil, errNotCanonical
		}
		value, err := appendCanonical(nil, d, depth+1)
		if err != nil {
			return nil, err
		}
		members = append(members, member{name, value})
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.name, b.name) })
	out = append(out, '{')
	for i, m := range members {
		if i > 0 {
			if m.name == members[i-1].name {
				return nil, errNotCanonical
			}
			out = append(out, ',')
		}
		var err error
		if out, err = appendString(out, m.name); err != nil {
			return nil, err
		}
		out = append(append(out, ':'), m.value...)
	}
	return append(out, '}'), nil
}

// appendString refuses the replacement character: encoding/json puts it in place of half a surrogate pair, so that different
// strings would look alike.
func appendString(out []byte, s string) ([]byte, error) {
	if strings.ContainsRune(s, utf8.RuneError) {
		return nil, errNotCanonical
	}
	quoted, err := json.Marshal(s)
	return append(out, quoted...), err
}
