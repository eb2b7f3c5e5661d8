// Package boltfile checks the structure of a bbolt file before bbolt maps it.
//
// bbolt trusts its file. On a damaged one it panics, faults or loops, partly in goroutines
// of its own where nobody can recover, and it leaves the file locked. This package reads
// the file through an [io.ReaderAt] and believes nothing: whatever the bytes are, it
// returns, in time linear in the file's size and with little memory.
//
// It checks to the byte what bbolt's writer does, which is more than bbolt's reader needs.
// Values it neither reads nor knows: their owner must.
package boltfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"os"
)

var (
	// ErrForeign: the file is not a bbolt file: it is empty, or no meta page bears bbolt's magic.
	ErrForeign = errors.New("not a bbolt file")

	// ErrDamaged: the file is a bbolt file, but what it holds contradicts itself.
	ErrDamaged = errors.New("damaged bbolt file")

	// ErrLeaked: all that is used is sound, but some pages are neither used nor free. They
	// are lost until the file is compacted, no more: bbolt 1.5.0 itself leaks the buckets
	// nested in one that is deleted in the transaction that also wrote to it. But a bucket
	// or a freelist that has lost an entry looks the same.
	ErrLeaked = errors.New("bbolt file with leaked pages")
)

const (
	magic         = 0xED0CDAED
	formatVersion = 2
	metaSize      = 64
	minPageSize   = 1 << 10
	maxPageSize   = 64 << 10
	noFreelist    = math.MaxUint64 // in a meta page: written with NoFreelistSync
)

// bbolt writes in the machine's own order: a file from a machine of the other kind is foreign.
var native = binary.NativeEndian

// A Header is what the two meta pages say together: where the last committed transaction's
// pages are.
type Header struct {
	PageSize  int
	TxID      uint64
	Root      uint64 // page of the root bucket
	Freelist  uint64 // page of the freelist, or the highest uint64 if it was not written
	HighWater uint64 // the first page that was never used
}

// ReadHeader reads both meta pages and checks them against each other and the file's size.
// Its errors are ErrForeign, ErrDamaged, or the reader's.
//
// Where bbolt falls back to the older meta page when the newer one is damaged, ReadHeader
// refuses: falling back forgets a transaction that was acknowledged. No crash asks for it,
// since a meta page's bytes lie within one disk sector and are written whole or not at all.
func ReadHeader(r io.ReaderAt, size int64) (Header, error) {
	first, err := readMeta(r, size, 0)
	if err != nil {
		return Header{}, err
	}
	if !first.hasMagic {
		return Header{}, withoutFirstMeta(r, size)
	}
	if err := first.check(0, size); err != nil {
		return Header{}, err
	}
	second, err := readMeta(r, size, int64(first.PageSize))
	if err != nil {
		return Header{}, err
	}
	if err := second.check(1, size); err != nil {
		return Header{}, err
	}
	switch {
	case first.PageSize != second.PageSize:
		return Header{}, damaged(1, "pages of %d bytes, but page 0 says %d", second.PageSize, first.PageSize)
	case !consecutive(first.Header, second.Header):
		return Header{}, damaged(1, "transaction %d, but page 0 has %d", second.TxID, first.TxID)
	case first.TxID > second.TxID:
		return first.Header, nil
	}
	return second.Header, nil
}

// consecutive tells whether bbolt can have left these two meta pages side by side.
//
// A commit writes its meta to page txid%2, so that the two always differ by one. Tx.WriteTo
// does not keep to this: its copy has txid in page 0 and txid-1 in page 1, otherwise equal.
// If txid is odd then the first commit to the copy goes to page 0 too and leaves txid+1
// beside txid-1; the second is regular again.
func consecutive(first, second Header) bool {
	copied := first
	copied.TxID--
	switch first.TxID%2<<1 | second.TxID%2 {
	case 0b01: // as committed
		return first.TxID+1 == second.TxID || first.TxID-1 == second.TxID
	case 0b10: // as copied
		return second == copied
	case 0b00: // the first commit to a copy
		return first.TxID-2 == second.TxID
	}
	return false
}

// withoutFirstMeta tells damage from a foreign file when page 0 is not a meta page: page 1
// begins where the page size says, which is to be guessed.
func withoutFirstMeta(r io.ReaderAt, size int64) error {
	for pageSize := int64(minPageSize); pageSize <= maxPageSize; pageSize *= 2 {
		m, err := readMeta(r, size, pageSize)
		if err != nil {
			return err
		}
		if m.hasMagic {
			return damaged(0, "no meta page, but there is one at byte %d", pageSize)
		}
	}
	return fmt.Errorf("%w: %d bytes without its magic", ErrForeign, size)
}

type meta struct {
	Header
	id            uint64
	flags         uint16
	hasMagic      bool
	version       uint32
	sum, checksum uint64 // as it is, as it should be
}

// readMeta decodes what may be a meta page at offset; beyond the end of the file all is zero.
func readMeta(r io.ReaderAt, size, offset int64) (meta, error) {
	var page [pageHeaderSize + metaSize]byte
	if n := min(size-offset, int64(len(page))); n > 0 {
		if err := readFull(r, page[:n], offset); err != nil {
			return meta{}, err
		}
	}
	b := page[pageHeaderSize:]
	hash := fnv.New64a()
	hash.Write(b[:metaSize-8])
	return meta{
		id:       native.Uint64(page[:]),
		flags:    native.Uint16(page[8:]),
		hasMagic: native.Uint32(b) == magic,
		version:  native.Uint32(b[4:]),
		Header: Header{
			PageSize:  int(native.Uint32(b[8:])),
			Root:      native.Uint64(b[16:]),
			Freelist:  native.Uint64(b[32:]),
			HighWater: native.Uint64(b[40:]),
			TxID:      native.Uint64(b[48:]),
		},
		sum:      native.Uint64(b[56:]),
		checksum: hash.Sum64(),
	}, nil
}

// check checks everything that can be said about meta page id on its own.
func (m meta) check(id uint64, size int64) error {
	switch {
	case !m.hasMagic:
		return damaged(id, "no meta page")
	case m.sum != m.checksum:
		return damaged(id, "checksum %016x, want %016x", m.sum, m.checksum)
	case m.version != formatVersion:
		return damaged(id, "format version %d, want %d", m.version, formatVersion)
	case m.id != id || m.flags != metaFlag:
		return damaged(id, "meta page under the header of page %d with flags %#x", m.id, m.flags)
	}
	return m.Header.check(id, size)
}

// check checks that the pages named in meta page id exist.
func (h Header) check(id uint64, size int64) error {
	switch {
	case h.PageSize < minPageSize || h.PageSize > maxPageSize || h.PageSize&(h.PageSize-1) != 0:
		return damaged(id, "pages of %d bytes", h.PageSize)
	case h.HighWater > uint64(max(size, 0))/uint64(h.PageSize):
		return damaged(id, "%d pages of %d bytes in a file of %d", h.HighWater, h.PageSize, size)
	case h.Root < 2 || h.Root >= h.HighWater:
		return damaged(id, "root bucket on page %d of %d", h.Root, h.HighWater)
	case h.Freelist != noFreelist && (h.Freelist < 2 || h.Freelist >= h.HighWater):
		return damaged(id, "freelist on page %d of %d", h.Freelist, h.HighWater)
	}
	return nil
}

// SyncMetas writes both meta pages anew, byte for byte, and syncs the file.
//
// After a sync has failed, the kernel may hold as clean what the disk never got: a
// transaction would be seen, and be built upon, that a power cut then takes away. Written
// anew, the pages are dirty again, and the sync means what it says.
func SyncMetas(f *os.File, h Header) error {
	metas := make([]byte, 2*h.PageSize)
	if err := readFull(f, metas, 0); err != nil {
		return err
	}
	if _, err := f.WriteAt(metas, 0); err != nil {
		return err
	}
	return f.Sync()
}

func damaged(page uint64, format string, args ...any) error {
	return fmt.Errorf("%w: page %d: %s", ErrDamaged, page, fmt.Sprintf(format, args...))
}

// readFull fills b. A file shorter than expected is an error of its own, not damage: it was
// cut while being read.
func readFull(r io.ReaderAt, b []byte, offset int64) error {
	n, err := r.ReadAt(b, offset)
	switch {
	case n == len(b):
		return nil
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(b), offset, err)
}
