package keystate

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/vmihailenco/msgpack/v5"
)

// The state is kept in msgpack, by field name: struct tags `msgpack`, or else `json`.

type stateEncoder struct {
	*msgpack.Encoder
	buf bytes.Buffer
}

var stateEncoders = sync.Pool{New: func() any {
	e := new(stateEncoder)
	e.Encoder = msgpack.NewEncoder(&e.buf)
	return e
}}

// encodeState returns s in msgpack, in memory of its own.
func encodeState(s any, limit int) ([]byte, error) {
	e := stateEncoders.Get().(*stateEncoder)
	defer stateEncoders.Put(e)
	b, err := e.encode(s, limit)
	if err != nil {
		return nil, err
	}
	return bytes.Clone(b), wellFormed(b)
}

// encode returns s in msgpack, in memory that is the encoder's until it encodes again. A type's own encoding may not be well-formed.
func (e *stateEncoder) encode(s any, limit int) ([]byte, error) {
	e.buf.Reset()
	e.Reset(&e.buf)
	e.SetCustomStructTag("json")
	e.SetSortMapKeys(true)
	e.UseCompactInts(true)
	if err := e.Encode(s); err != nil {
		return nil, fmt.Errorf("keystate: encode the state: %w", err)
	}
	n := e.buf.Len()
	if n > limit {
		if cap(e.buf.Bytes()) > 1<<20 {
			e.buf = bytes.Buffer{} // a giant would stay in the pool
		}
		return nil, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, n, limit)
	}
	return e.buf.Bytes(), nil
}

// wellFormed refuses what is not exactly one msgpack value, nested no deeper than we read.
func wellFormed(b []byte) error {
	w := walker{rest: b}
	if w.skip(0); w.failed || len(w.rest) != 0 {
		return errMalformed
	}
	return nil
}

var errMalformed = fmt.Errorf("keystate: the state is not one msgpack value of at most %d levels", maxNesting)

// decodeState fills s, which must be a pointer to a zero value, from what a store gave back. It refuses what is not
// exactly one well-formed value, before the decoder can allocate what a length claims.
func decodeState(b []byte, s any) error {
	if err := wellFormed(b); err != nil {
		return err
	}
	return decodeEncoded(b, s)
}

type stateDecoder struct {
	*msgpack.Decoder
	in bytes.Reader
}

var stateDecoders = sync.Pool{New: func() any { return &stateDecoder{Decoder: msgpack.NewDecoder(nil)} }}

// decodeEncoded fills s from what encodeState returned, or decodeState accepted.
func decodeEncoded(b []byte, s any) error {
	d := stateDecoders.Get().(*stateDecoder)
	defer stateDecoders.Put(d)
	d.in.Reset(b)
	d.Reset(&d.in)
	d.SetCustomStructTag("json")
	if err := d.Decode(s); err != nil {
		return fmt.Errorf("keystate: decode the state: %w", err)
	}
	return nil
}

// fingerprint tells a retry from another request under the same key. It is a digest of the machine's name and of the
// encoded request, reduced to what tells two requests apart: map and struct keys sorted, entries with a zero value left
// out (so that a field added in a release does not make a stranger of an honest retry). It refuses what is not well-formed.
func fingerprint(machine string, request []byte) (print [16]byte, err error) {
	m := canonicalMemory.Get().(*memory)
	defer canonicalMemory.Put(m)
	w := walker{rest: request, spare: m.spare}
	m.out = w.canonical(appendMachine(m.out[:0], machine), 0)
	m.spare = w.spare
	if w.failed || len(w.rest) != 0 {
		return print, errMalformed
	}
	return digest(m.out), nil
}

// ownFingerprint is the fingerprint of a request that says itself what tells it from another.
func ownFingerprint(machine string, own []byte) [16]byte {
	return digest(append(appendMachine(nil, machine), own...))
}

func appendMachine(out []byte, name string) []byte {
	return append(binary.LittleEndian.AppendUint32(out, uint32(len(name))), name...)
}

func digest(b []byte) [16]byte {
	sum := sha256.Sum256(b)
	return [16]byte(sum[:])
}

// memory is what making a canonical form needs for a moment.
type memory struct{ out, spare []byte }

var canonicalMemory = sync.Pool{New: func() any { return new(memory) }}

// A walker goes over encoded msgpack value by value (the format: github.com/msgpack/msgpack, spec.md).
type walker struct {
	rest   []byte
	failed bool
	spare  []byte // memory for the entries of a map, which are sorted when all are there
}

const maxNesting = 100 // deep enough for any request, and it bounds what canonical holds at a time

// The headers that a canonical array and a canonical map have, whatever their length.
const (
	array32 = 0xdd
	map32   = 0xdf
)

func (w *walker) take(n uint64) []byte {
	if n > uint64(len(w.rest)) {
		w.failed, w.rest = true, nil
		return nil
	}
	b := w.rest[:n]
	w.rest = w.rest[n:]
	return b
}

func (w *walker) uint(size uint64) (v uint64) {
	for _, b := range w.take(size) {
		v = v<<8 | uint64(b)
	}
	return v
}

// head reads a value's first bytes: what it is, and how many bytes of payload or elements follow.
func (w *walker) head() (kind kind, n uint64) {
	b := w.take(1)
	if w.failed {
		return scalar, 0
	}
	switch c := b[0]; {
	case c <= 0x7f || c >= 0xe0: // fixint
		return scalar, 0
	case c <= 0x8f:
		return mapping, uint64(c & 0x0f)
	case c <= 0x9f:
		return array, uint64(c & 0x0f)
	case c <= 0xbf:
		return text, uint64(c & 0x1f)
	case c == 0xc0, c == 0xc2, c == 0xc3: // nil, false, true
		return scalar, 0
	case c >= 0xc4 && c <= 0xc6: // bin 8, 16, 32
		return text, w.uint(1 << (c - 0xc4))
	case c >= 0xc7 && c <= 0xc9: // ext 8, 16, 32: a type byte and the payload
		return scalar, w.uint(1<<(c-0xc7)) + 1
	case c == 0xca: // float 32
		return scalar, 4
	case c == 0xcb: // float 64
		return scalar, 8
	case c >= 0xcc && c <= 0xcf: // uint 8 to 64
		return scalar, 1 << (c - 0xcc)
	case c >= 0xd0 && c <= 0xd3: // int 8 to 64
		return scalar, 1 << (c - 0xd0)
	case c >= 0xd4 && c <= 0xd8: // fixext 1 to 16
		return scalar, 1<<(c-0xd4) + 1
	case c >= 0xd9 && c <= 0xdb: // str 8, 16, 32
		return text, w.uint(1 << (c - 0xd9))
	case c == 0xdc, c == 0xdd:
		return array, w.uint(2 << (c - 0xdc))
	case c == 0xde, c == 0xdf:
		return mapping, w.uint(2 << (c - 0xde))
	}
	w.failed = true // 0xc1 is never used
	return scalar, 0
}

type kind int

const (
	scalar  kind = iota // numbers, booleans, nil, extensions; n bytes follow
	text                // strings and byte strings; n bytes follow
	array               // n elements follow
	mapping             // n pairs follow
)

// elements bounds a length by what can possibly follow.
func (w *walker) elements(n uint64, depth int) uint64 {
	if n > uint64(len(w.rest)) || depth > maxNesting {
		w.failed = true
		return 0
	}
	return n
}

func (w *walker) skip(depth int) {
	kind, n := w.head()
	switch kind {
	case scalar, text:
		w.take(n)
	case mapping:
		for range 2 * w.elements(n, depth) {
			w.skip(depth + 1)
		}
	case array:
		for range w.elements(n, depth) {
			w.skip(depth + 1)
		}
	}
}

// canonical appends the next value in canonical form.
func (w *walker) canonical(out []byte, depth int) []byte {
	whole := w.rest
	kind, n := w.head()
	switch kind {
	case mapping:
		return w.canonicalMap(out, w.elements(n, depth), depth)
	case array:
		out = binary.BigEndian.AppendUint32(append(out, array32), uint32(n))
		for range w.elements(n, depth) {
			out = w.canonical(out, depth+1)
		}
		return out
	}
	w.take(n)
	return append(out, whole[:len(whole)-len(w.rest)]...)
}

func (w *walker) canonicalMap(out []byte, n uint64, depth int) []byte {
	type entry struct{ start, middle, end int } // in scratch: the key, then the value
	var few [16]entry
	entries := few[:0]
	scratch := w.spare[:0]
	w.spare = nil
	for range n {
		e := entry{start: len(scratch)}
		scratch = w.canonical(scratch, depth+1)
		e.middle = len(scratch)
		scratch = w.canonical(scratch, depth+1)
		e.end = len(scratch)
		if !isZero(scratch[e.middle:e.end]) {
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return bytes.Compare(scratch[a.start:a.end], scratch[b.start:b.end]) })
	out = binary.BigEndian.AppendUint32(append(out, map32), uint32(len(entries)))
	for _, e := range entries {
		out = append(out, scratch[e.start:e.end]...)
	}
	w.spare = scratch
	return out
}

// zeroTime is how msgpack writes time.Time{}: timestamp 96, 0 ns and the seconds of the year 1.
const zeroTime = "\xc7\x0c\xff\x00\x00\x00\x00\xff\xff\xff\xf1\x88\x6e\x09\x00"

// isZero says whether a value in canonical form is its type's zero.
func isZero(v []byte) bool {
	if len(v) == 0 {
		return true
	}
	switch v[0] {
	case 0x00, 0xa0, 0xc0, 0xc2: // 0, "", nil, false
		return true
	case 0xc4, 0xd9: // an empty byte string or string
		return len(v) == 2
	case array32, map32:
		return len(v) == 5
	case 0xca, 0xcb: // 0.0 and -0.0
		return v[1]&0x7f == 0 && strings.Trim(string(v[2:]), "\x00") == ""
	}
	return string(v) == zeroTime
}
