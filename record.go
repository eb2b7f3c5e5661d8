package keystate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"
)

// A stored record is a frame around a body:
//
//	format   1 byte, 1
//	length   4 bytes little-endian, of the body
//	checksum 4 bytes little-endian, CRC-32C over format, length and body
//	body     the fields in the order of appendRecord
//
// Evolution rule: a format, once released, is never changed. A new field means a new format number whose decoder stands
// beside the old one's; every format ever written stays readable, and testdata holds a file of each. Statuses,
// points and reasons are stored by name, never by number.
const (
	recordFormat = 1
	frameSize    = 9
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// MarshalBinary returns the record as every store keeps it: framed, length-checked and checksummed.
func (r Record) MarshalBinary() ([]byte, error) {
	return appendRecord(nil, &r), nil
}

// UnmarshalBinary decodes what MarshalBinary wrote. It refuses anything else with [ErrCorrupt], and a later
// release's format with [ErrNotAStore].
func (r *Record) UnmarshalBinary(b []byte) error {
	decoded, err := decodeRecord(b)
	if err != nil {
		return err
	}
	*r = decoded
	return nil
}

func appendRecord(b []byte, r *Record) []byte {
	start := len(b)
	b = append(b, make([]byte, frameSize)...)
	b = append(binary.AppendUvarint(b, uint64(len(r.State))), r.State...)
	b = appendString(b, r.Key.Scope)
	b = appendString(b, r.Key.ID)
	b = appendString(b, r.Machine)
	b = appendString(b, string(r.Status))
	b = appendString(b, string(r.Point))
	b = append(b, r.Incarnation[:]...)
	b = append(b, r.Fingerprint[:]...)
	b = binary.AppendUvarint(b, r.Version)
	b = binary.AppendUvarint(b, r.Epoch)
	b = binary.AppendUvarint(b, r.Sequence)
	b = appendTime(b, r.Created)
	b = appendTime(b, r.Ended)
	b = appendString(b, string(r.Begun))
	b = binary.AppendUvarint(b, uint64(r.Attempts))
	b = appendTime(b, r.FirstTried)
	b = appendTime(b, r.Due)
	b = appendString(b, string(r.ParkReason))
	b = appendString(b, r.LastError)
	b = append(b, flags(r.Acted, r.Refusal != nil, r.Resend))
	if r.Refusal != nil {
		b = appendString(b, string(r.Refusal.Before))
		b = appendString(b, r.Refusal.Reason)
	}
	b = binary.AppendUvarint(b, uint64(len(r.History)))
	for _, p := range r.History {
		b = appendString(b, string(p.Point))
		b = appendTime(b, p.At)
		b = binary.AppendUvarint(b, uint64(p.Attempts))
		b = appendString(b, p.Ignored)
	}

	frame := b[start:]
	frame[0] = recordFormat
	binary.LittleEndian.PutUint32(frame[1:], uint32(len(frame)-frameSize))
	binary.LittleEndian.PutUint32(frame[5:], recordSum(frame))
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendTime stores microseconds since 1970, and 0 for the zero time.
func appendTime(b []byte, t time.Time) []byte {
	if t.IsZero() {
		return append(b, 0)
	}
	return binary.AppendVarint(b, t.UnixMicro())
}

const (
	flagActed = 1 << iota
	flagRefused
	flagResend
	flagsEnd
)

func flags(acted, refused, resend bool) (f byte) {
	if acted {
		f |= flagActed
	}
	if refused {
		f |= flagRefused
	}
	if resend {
		f |= flagResend
	}
	return f
}

// recordSum is the checksum of a framed record.
func recordSum(frame []byte) uint32 {
	return crc32.Update(crc32.Checksum(frame[:5], castagnoli), castagnoli, frame[frameSize:])
}

// storedSum is the checksum that a framed record bears.
func storedSum(frame []byte) uint32 { return binary.LittleEndian.Uint32(frame[5:]) }

// checkFrame verifies a stored record without decoding it.
func checkFrame(b []byte) error {
	switch {
	case len(b) < frameSize:
		return fmt.Errorf("%w: a record of %d bytes", ErrCorrupt, len(b))
	case b[0] > recordFormat:
		return fmt.Errorf("%w: a record of format %d, this release reads up to %d", ErrNotAStore, b[0], recordFormat)
	case b[0] != recordFormat:
		return fmt.Errorf("%w: a record of format %d", ErrCorrupt, b[0])
	case uint64(binary.LittleEndian.Uint32(b[1:])) != uint64(len(b)-frameSize):
		return fmt.Errorf("%w: a record's length does not match", ErrCorrupt)
	case storedSum(b) != recordSum(b):
		return fmt.Errorf("%w: a record's checksum does not match", ErrCorrupt)
	}
	return nil
}

func decodeRecord(b []byte) (Record, error) {
	if err := checkFrame(b); err != nil {
		return Record{}, err
	}
	return decodeBody(b)
}

// decodeBody decodes a record whose frame is verified.
func decodeBody(b []byte) (Record, error) {
	front := cursor[[]byte]{rest: b[frameSize:]}
	state := bytes.Clone(front.bytes())
	c := cursor[string]{rest: string(front.rest), failed: front.failed} // one copy, which all strings share
	r := Record{
		State:       state,
		Key:         Key{Scope: c.string(), ID: c.string()},
		Machine:     c.string(),
		Status:      Status(c.string()),
		Point:       RecoveryPoint(c.string()),
		Incarnation: c.id(),
		Fingerprint: c.id(),
		Version:     c.uint(),
		Epoch:       c.uint(),
		Sequence:    c.uint(),
		Created:     c.time(),
		Ended:       c.time(),
		Begun:       RecoveryPoint(c.string()),
		Attempts:    c.count(math.MaxInt32),
		FirstTried:  c.time(),
		Due:         c.time(),
		ParkReason:  ParkReason(c.string()),
		LastError:   c.string(),
	}
	marks := c.byte()
	r.Acted, r.Resend = marks&flagActed != 0, marks&flagResend != 0
	if marks&flagRefused != 0 {
		r.Refusal = &Refusal{Before: RecoveryPoint(c.string()), Reason: c.string()}
	}
	const smallestPassage = 4 // bytes: it bounds what a length can make us allocate
	r.History = make([]Passage, c.count(len(c.rest)/smallestPassage))
	for i := range r.History {
		r.History[i] = Passage{Point: RecoveryPoint(c.string()), At: c.time(), Attempts: c.count(math.MaxInt32), Ignored: c.string()}
	}
	if marks >= flagsEnd || len(c.rest) > 0 {
		c.failed = true
	}
	if c.failed {
		return Record{}, fmt.Errorf("%w: a record with a good checksum does not decode", ErrCorrupt)
	}
	return r, r.check()
}

// decodeAnswer decodes over r what a replay tells of a key's record, of which the frame is verified: whose it is, and the answer. A record
// without an answer it leaves to decodeBody, and says so.
func decodeAnswer(b []byte, key Key, r *Record) bool {
	c := cursor[[]byte]{rest: b[frameSize:]}
	state := c.bytes()
	c.bytes() // scope
	c.bytes() // ID
	machine := c.bytes()
	status, point := c.bytes(), c.bytes()
	c.id() // incarnation
	print := c.id()
	for range 5 { // version, epoch, sequence, created, ended
		c.uint()
	}
	c.bytes()     // begun
	for range 3 { // attempts, first tried, due
		c.uint()
	}
	c.bytes() // reason
	c.bytes() // last error
	if marks := c.byte(); c.failed || marks != 0 || string(status) != string(Answered) || string(point) != string(Finished) {
		return false
	}
	if r.Machine != string(machine) {
		r.Machine = string(machine)
	}
	*r = Record{Key: key, Machine: r.Machine, Status: Answered, Point: Finished, State: append(r.State[:0], state...), Fingerprint: print}
	return true
}

var errImpossible = errors.New("impossible record")

// check asserts what must hold of every record, after reading and before writing.
func (r *Record) check() error {
	switch r.Status {
	case Running, Waiting, Parked, Answered:
	default:
		return fmt.Errorf("%w: %w: status %q", ErrCorrupt, errImpossible, r.Status)
	}
	switch {
	case r.Key.validate() != nil,
		r.Machine == "", r.Point == "",
		(r.Status == Answered) != (r.Point == Finished),
		(r.Status == Answered) == r.Ended.IsZero(),
		(r.Status == Parked) != (r.ParkReason != ""),
		r.Refusal != nil && r.Status != Answered,
		r.Begun == "" && (r.Acted || !r.FirstTried.IsZero()),
		len(r.History) == 0 || r.History[len(r.History)-1].Point != r.Point:
		return fmt.Errorf("%w: %w: %s is %q at %q", ErrCorrupt, errImpossible, r.Key, r.Status, r.Point)
	}
	return nil
}

// A cursor reads fields off a body. After a fault it yields zero values and remembers it.
type cursor[T string | []byte] struct {
	rest   T
	failed bool
}

func (c *cursor[T]) take(n int) T {
	if n < 0 || n > len(c.rest) {
		c.failed, c.rest, n = true, c.rest[:0], 0
	}
	s := c.rest[:n]
	c.rest = c.rest[n:]
	return s
}

func (c *cursor[T]) uint() (v uint64) {
	for i := range min(len(c.rest), binary.MaxVarintLen64) {
		b := c.rest[i]
		v |= uint64(b&0x7f) << (7 * i)
		if b < 0x80 && (i < binary.MaxVarintLen64-1 || b <= 1) {
			c.rest = c.rest[i+1:]
			return v
		}
	}
	c.failed, c.rest = true, c.rest[:0]
	return 0
}

func (c *cursor[T]) count(limit int) int {
	v := c.uint()
	if v > uint64(limit) {
		c.failed = true
		return 0
	}
	return int(v)
}

func (c *cursor[T]) byte() byte {
	if s := c.take(1); len(s) > 0 {
		return s[0]
	}
	return 0
}

func (c *cursor[T]) bytes() T { return c.take(c.count(len(c.rest))) }

func (c *cursor[T]) string() string { return string(c.bytes()) }

func (c *cursor[T]) id() (id [16]byte) {
	copy(id[:], c.take(len(id)))
	return id
}

func (c *cursor[T]) time() time.Time {
	u := c.uint()
	v := int64(u>>1) ^ -int64(u&1) // zigzag, as binary.AppendVarint writes it
	if v == 0 {
		return time.Time{}
	}
	return time.UnixMicro(v).UTC()
}

// A head is what it takes to replace or index a record. Its bytes are the frame's own.
type head struct {
	scope, id   []byte
	status      Status
	incarnation [16]byte
	version     uint64
}

func (h *head) is(key Key) bool { return string(h.scope) == key.Scope && string(h.id) == key.ID }

func (h *head) key() Key { return Key{Scope: string(h.scope), ID: string(h.id)} }

// peek reads a record's head, and nothing else of it, after verifying the frame.
func peek(frame []byte) (h head, err error) {
	if err := checkFrame(frame); err != nil {
		return h, err
	}
	c := cursor[[]byte]{rest: frame[frameSize:]}
	c.bytes() // state
	h.scope, h.id = c.bytes(), c.bytes()
	c.bytes() // machine
	switch s := c.bytes(); string(s) {
	case string(Running):
		h.status = Running
	case string(Waiting):
		h.status = Waiting
	case string(Parked):
		h.status = Parked
	case string(Answered):
		h.status = Answered
	default:
		c.failed = true
	}
	c.bytes() // point
	h.incarnation = c.id()
	c.id() // fingerprint
	h.version = c.uint()
	if c.failed {
		err = fmt.Errorf("%w: a record with a good checksum does not decode", ErrCorrupt)
	}
	return h, err
}
