package keystate

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"math/bits"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// The bbolt store. docs/format.md describes every bucket and byte; in short, in one bucket "keystate":
//
//	identity        what this store is
//	ledger          the epoch, and count and digest of what the buckets hold
//	live/<key>      unfinished records: few, hot, small
//	done/<sequence> finished records, appended in the order of finishing, which is the order of reaping
//	index/<place><sequence>  from a key to its finished record
var (
	bucketRoot  = []byte("keystate")
	bucketLive  = []byte("live")
	bucketDone  = []byte("done")
	bucketIndex = []byte("index")
	keyIdentity = []byte("identity")
	keyLedger   = []byte("ledger")
)

const storeFormat = 1

// boltStore is a Store in a bbolt file.
type boltStore struct {
	committer
	db      *bbolt.DB
	file    *os.File // nil when the program opened the database
	path    string
	whole   bool          // Open has checked all of the file
	summed  chan struct{} // closed when the index adds up, or the store has stopped because it does not
	closing atomic.Bool
	windows spareWindows
	info    fs.FileInfo // what the path led to when the store was opened: begin looks whether it still does
	id      [16]byte
	most    int64 // soft limit of the file's size, for new keys
	spare   int64 // disk space to keep for unfinished keys
	room    struct {
		sync.Mutex
		checked time.Time
		err     error
	}
}

// Bolt is the store in a database that the program has open already: the keys live in one bucket, "keystate",
// beside the program's own. Closing the engine leaves the database open. A database carries one engine at a time.
func Bolt(db *bbolt.DB) Store[*bbolt.Tx] {
	return newBoltStore(db, db.Path())
}

// attached are the databases that carry an engine.
var attached sync.Map // *bbolt.DB → struct{}

func newBoltStore(db *bbolt.DB, path string) *boltStore {
	s := &boltStore{db: db, path: path, summed: make(chan struct{})}
	s.committer.init(s)
	return s
}

// Boot prepares the bucket where it is missing, checks what is there, and counts the epoch up.
func (s *boltStore) Boot(ctx context.Context) (id [16]byte, epoch uint64, err error) {
	if _, taken := attached.LoadOrStore(s.db, struct{}{}); taken {
		return id, 0, fmt.Errorf("%w: the database carries an engine already", ErrLocked)
	}
	defer func() {
		if err != nil {
			attached.Delete(s.db)
		}
	}()
	if s.path, err = filepath.Abs(s.path); err != nil {
		return id, 0, fmt.Errorf("keystate: %w", err)
	}
	if s.info, err = os.Stat(s.path); err != nil {
		return id, 0, fmt.Errorf("keystate: %w", err)
	}
	err = s.guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			if tx.Bucket(bucketRoot) == nil {
				if err := initBuckets(tx); err != nil {
					return err
				}
			}
			if id, err = readIdentity(tx); err != nil {
				return err
			}
			if s.file == nil { // else Open has checked them
				if err := checkRecords(tx, id, false); err != nil {
					return err
				}
			}
			k, err := newBoltKeys(tx, id)
			if err != nil {
				return err
			}
			k.ledger.epoch++
			epoch = k.ledger.epoch
			return k.flush()
		})
	})
	if err != nil {
		return id, 0, commitError(err)
	}
	s.id = id
	if s.file == nil || s.whole {
		close(s.summed)
	} else if err := s.beginAudit(); err != nil {
		return id, 0, err
	}
	if s.file != nil {
		s.windows.keep()
	}
	s.start()
	return id, epoch, nil
}

// initBuckets makes the buckets of a new store.
func initBuckets(tx *bbolt.Tx) error {
	root, err := tx.CreateBucket(bucketRoot)
	if err != nil {
		return err
	}
	for _, name := range [][]byte{bucketLive, bucketDone, bucketIndex} {
		if _, err := root.CreateBucket(name); err != nil {
			return err
		}
	}
	identity := make([]byte, 1, 21)
	identity[0] = storeFormat
	identity = append(identity, make([]byte, 16)...)
	rand.Read(identity[1:]) // never fails: crypto/rand
	if err := root.Put(keyIdentity, sealed(identity)); err != nil {
		return err
	}
	return root.Put(keyLedger, ledger{next: 1}.encode())
}

func readIdentity(tx *bbolt.Tx) (id [16]byte, err error) {
	root := tx.Bucket(bucketRoot)
	if root == nil {
		return id, fmt.Errorf("%w: it is a bbolt file without a bucket %q; New(Bolt(db), …) would add one", ErrNotAStore, bucketRoot)
	}
	b, err := unsealed(root.Get(keyIdentity), "identity", 17)
	if err != nil {
		return id, err
	}
	return [16]byte(b[1:]), nil
}

// sealed appends a checksum; unsealed verifies it, the length and the format.
func sealed(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func unsealed(b []byte, what string, size int) ([]byte, error) {
	switch {
	case len(b) < 5 || binary.LittleEndian.Uint32(b[len(b)-4:]) != crc32.Checksum(b[:len(b)-4], castagnoli):
		return nil, fmt.Errorf("%w: the %s is missing or its checksum does not match", ErrCorrupt, what)
	case b[0] > storeFormat:
		return nil, fmt.Errorf("%w: the store has format %d, this release reads up to %d", ErrNotAStore, b[0], storeFormat)
	case b[0] != storeFormat || len(b) != size+4:
		return nil, fmt.Errorf("%w: the %s has %d bytes in format %d", ErrCorrupt, what, len(b), b[0])
	}
	return b[:size], nil
}

// The ledger counts and digests the store's records in the same transaction that changes them. A page that is
// lost, stale or swapped shows as a sum that does not match: no key goes missing silently.
type ledger struct {
	epoch                      uint64
	next                       uint64 // the next finished record's sequence
	counts                     Counts
	liveSum, doneSum, indexSum uint64
}

const ledgerSize = 1 + 9*8

func (l ledger) encode() []byte {
	b := make([]byte, 1, ledgerSize+4)
	b[0] = storeFormat
	for _, v := range l.fields() {
		b = binary.LittleEndian.AppendUint64(b, *v)
	}
	return sealed(b)
}

func (l *ledger) decode(b []byte) error {
	b, err := unsealed(b, "ledger", ledgerSize)
	if err != nil {
		return err
	}
	for i, v := range l.fields() {
		*v = binary.LittleEndian.Uint64(b[1+8*i:])
	}
	return nil
}

func (l *ledger) fields() [9]*uint64 {
	c := &l.counts
	return [9]*uint64{&l.epoch, &l.next, &c.Running, &c.Waiting, &c.Parked, &c.Finished, &l.liveSum, &l.doneSum, &l.indexSum}
}

// What one entry adds to its bucket's sum. The sums are modulo 2^64, so that taking out is subtraction.
func liveDigest(frame []byte) uint64 { return mix(uint64(storedSum(frame))<<32 | uint64(len(frame))) }

func doneDigest(sequence uint64, frame []byte) uint64 {
	return mix(liveDigest(frame) ^ mix(sequence))
}

func indexDigest(place, sequence uint64) uint64 {
	return mix(bits.RotateLeft64(place, 32) ^ mix(sequence))
}

// mix is the finalizer of SplitMix64: it spreads every bit of v over all of the result.
func mix(v uint64) uint64 {
	v += 0x9e3779b97f4a7c15
	v = (v ^ v>>30) * 0xbf58476d1ce4e5b9
	v = (v ^ v>>27) * 0x94d049bb133111eb
	return v ^ v>>31
}

// boltKeys are the records inside one bbolt transaction.
type boltKeys struct {
	id                      [16]byte
	root, live, done, index *bbolt.Bucket
	inLive, inDone, inIndex *bbolt.Cursor // for lookups, each of which begins anew
	ledger                  ledger
	reading                 bool // in a read transaction
	changed                 bool
	scratch                 []byte // for keys; at first it is short
	short                   [128]byte
	arena                   []byte // what Put hands to bbolt, which keeps it until the commit
	last                    *found // memo of the last lookup: a Put mostly follows its Get
	memo                    found
}

// found is where a lookup led.
type found struct {
	key   Key
	frame []byte // nil: there is no record
	head
	sequence uint64 // of a finished record
}

// newBoltKeys gives access for writing.
func newBoltKeys(tx *bbolt.Tx, id [16]byte) (*boltKeys, error) {
	k, err := newBoltReader(tx, id)
	if err == nil {
		err = errors.Join(k.openLive(), k.openDone())
	}
	if err != nil {
		return nil, err
	}
	k.reading = false
	k.done.FillPercent = 0.95 // it is only ever appended to
	return k, k.ledger.decode(k.root.Get(keyLedger))
}

// newBoltReader gives access for reading; it opens what it is asked for.
func newBoltReader(tx *bbolt.Tx, id [16]byte) (*boltKeys, error) {
	k := &boltKeys{id: id, root: tx.Bucket(bucketRoot), reading: true}
	k.scratch = k.short[:0]
	if k.root == nil {
		return nil, missing(bucketRoot)
	}
	return k, nil
}

func (k *boltKeys) openLive() error {
	if k.live == nil {
		if k.live = k.root.Bucket(bucketLive); k.live == nil {
			return missing(bucketLive)
		}
		k.inLive = k.live.Cursor()
	}
	return nil
}

func (k *boltKeys) openDone() error {
	if k.done == nil {
		k.done, k.index = k.root.Bucket(bucketDone), k.root.Bucket(bucketIndex)
		if k.done == nil || k.index == nil {
			return missing(bucketDone)
		}
		k.inDone, k.inIndex = k.done.Cursor(), k.index.Cursor()
	}
	return nil
}

func missing(bucket []byte) error {
	return fmt.Errorf("%w: the bucket %q, or one beside it, is gone", ErrCorrupt, bucket)
}

// Keys returns the records in tx: those of the group that is being committed, or a reader's own.
func (s *boltStore) Keys(tx *bbolt.Tx) Keys {
	if g := s.current(); tx.Writable() && g != nil && g.tx == tx {
		return g.keys
	}
	k, err := newBoltReader(tx, s.id)
	if err != nil {
		return brokenKeys{err}
	}
	return k
}

// flush writes the ledger, once for all the changes in the transaction.
func (k *boltKeys) flush() error {
	return k.root.Put(keyLedger, k.ledger.encode())
}

func (k *boltKeys) liveKey(key Key) []byte {
	k.scratch = append(append(append(k.scratch[:0], byte(len(key.Scope))), key.Scope...), key.ID...)
	return k.scratch
}

// place is where a key lies in the index. Keys that are UUIDv7 lie by their time, so that those finished together lie
// together, and bbolt rewrites few pages for them; all others lie by a hash. The store's identity keeps the hash from being
// guessed. Keys that collide are told apart by comparing them in full; of those that a client gives one and the same
// time, one in 65,536 does.
func (k *boltKeys) place(key Key) uint64 {
	b := append(k.scratch[:0], k.id[:]...)
	b = append(append(append(b, byte(len(key.Scope))), key.Scope...), key.ID...)
	k.scratch = b
	sum := sha256.Sum256(b)
	hash := binary.BigEndian.Uint64(sum[:])
	if id, err := uuid.Parse(key.ID); err == nil && id.Version() == 7 {
		const timeBits = 48
		return binary.BigEndian.Uint64(id[:])&^(1<<(64-timeBits)-1) | hash>>timeBits
	}
	return hash
}

func indexEntry(place, sequence uint64) []byte {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 16), place)
	return binary.BigEndian.AppendUint64(b, sequence)
}

func sequenceKey(sequence uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 0, 8), sequence)
}

// find looks a key up, without decoding what it finds.
func (k *boltKeys) find(key Key) (*found, error) {
	if k.last != nil && k.last.key == key {
		return k.last, nil
	}
	f := &k.memo
	k.last, *f = nil, found{key: key}
	var err error
	if k.reading { // mostly for replays, so the finished ones come first
		err = k.findDone(f)
	}
	if err == nil && f.frame == nil {
		err = k.findLive(f)
	}
	if err == nil && f.frame == nil && !k.reading {
		err = k.findDone(f)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	k.last = f
	return f, nil
}

// findLive looks a key up among the unfinished.
func (k *boltKeys) findLive(f *found) error {
	if err := k.openLive(); err != nil {
		return err
	}
	if f.frame = at(k.inLive, k.liveKey(f.key)); f.frame == nil {
		return nil
	}
	return f.verify()
}

// at returns what lies under a name, or nil.
func at(c *bbolt.Cursor, name []byte) []byte {
	if there, v := c.Seek(name); bytes.Equal(there, name) {
		return v
	}
	return nil
}

// verify checks that the frame is sound and the key's own, and reads its head.
func (f *found) verify() error {
	h, err := peek(f.frame)
	if err == nil && !h.is(f.key) {
		err = fmt.Errorf("%w: the record of %s lies in its place", ErrCorrupt, h.key())
	}
	f.head = h
	return err
}

// findDone looks a key up among the finished.
func (k *boltKeys) findDone(f *found) error {
	if err := k.openDone(); err != nil {
		return err
	}
	var prefix [8]byte
	binary.BigEndian.PutUint64(prefix[:], k.place(f.key))
	for entry, _ := k.inIndex.Seek(prefix[:]); bytes.HasPrefix(entry, prefix[:]); entry, _ = k.inIndex.Next() {
		if len(entry) != 16 {
			return fmt.Errorf("%w: an index entry of %d bytes", ErrCorrupt, len(entry))
		}
		frame := at(k.inDone, entry[8:])
		if frame == nil {
			return fmt.Errorf("%w: the index names a finished record that is not there", ErrCorrupt)
		}
		if h, err := peek(frame); err != nil {
			return err
		} else if h.is(f.key) {
			f.frame, f.head, f.sequence = frame, h, binary.BigEndian.Uint64(entry[8:])
			return nil
		}
	}
	return nil
}

func (k *boltKeys) Get(key Key) (Record, error) {
	frame, err := k.frame(key)
	if err != nil {
		return Record{}, err
	}
	return decodeBody(frame)
}

// recall is Get over another record, and of one with an answer what a replay tells of it.
func (k *boltKeys) recall(key Key, r *Record) error {
	frame, err := k.frame(key)
	if err == nil && !decodeAnswer(frame, key, r) {
		*r, err = decodeBody(frame)
	}
	return err
}

// frame is a key's record as it is stored, verified; or ErrNotFound.
func (k *boltKeys) frame(key Key) ([]byte, error) {
	f, err := k.find(key)
	switch {
	case err != nil:
		return nil, err
	case f.frame == nil:
		return nil, ErrNotFound
	}
	return f.frame, nil
}

func (k *boltKeys) Put(r *Record) error {
	if k.reading {
		return fmt.Errorf("keystate: %w", berrors.ErrTxNotWritable)
	}
	old, err := k.held(r)
	if err != nil {
		return err
	}
	if old.sequence != 0 {
		return fmt.Errorf("%w: %s is finished", errIllegal, r.Key)
	}
	next := *r
	next.Version++
	if next.Status == Answered {
		next.Sequence = k.ledger.next
	}
	if err := next.check(); err != nil {
		return err
	}
	frame := k.encode(&next)
	if old.frame != nil {
		k.remove(k.ledger.counts.of(old.status), &k.ledger.liveSum, liveDigest(old.frame))
	}
	if next.Status == Answered {
		if old.frame != nil {
			if err := k.live.Delete(k.liveKey(r.Key)); err != nil {
				return err
			}
		}
		if err := k.append(r.Key, next.Sequence, frame); err != nil {
			return err
		}
	} else {
		if err := k.live.Put(k.liveKey(r.Key), frame); err != nil {
			return err
		}
		k.add(k.ledger.counts.of(next.Status), &k.ledger.liveSum, liveDigest(frame))
	}
	*r = next
	return nil
}

// held returns what is stored under a key if it is what the caller holds: of the same life of the key, and unchanged.
func (k *boltKeys) held(r *Record) (*found, error) {
	f, err := k.find(r.Key)
	if err != nil {
		return nil, err
	}
	if f.version != r.Version || f.frame != nil && f.incarnation != r.Incarnation {
		return nil, fmt.Errorf("%w: %s has version %d of %x, not %d of %x", ErrFenced, r.Key, f.version, f.incarnation, r.Version, r.Incarnation)
	}
	k.last = nil // what follows changes it
	return f, nil
}

// append adds a finished record and its index entry.
func (k *boltKeys) append(key Key, sequence uint64, frame []byte) error {
	place := k.place(key)
	if err := k.done.Put(sequenceKey(sequence), frame); err != nil {
		return err
	}
	if err := k.index.Put(indexEntry(place, sequence), nil); err != nil {
		return err
	}
	k.ledger.next++
	k.add(&k.ledger.counts.Finished, &k.ledger.doneSum, doneDigest(sequence, frame))
	k.ledger.indexSum += indexDigest(place, sequence)
	return nil
}

func (k *boltKeys) Delete(r Record) error {
	if k.reading {
		return fmt.Errorf("keystate: %w", berrors.ErrTxNotWritable)
	}
	old, err := k.held(&r)
	if err != nil {
		return err
	}
	if old.sequence == 0 {
		return fmt.Errorf("%w: %s is not finished", errIllegal, r.Key)
	}
	place := k.place(r.Key)
	k.remove(&k.ledger.counts.Finished, &k.ledger.doneSum, doneDigest(old.sequence, old.frame))
	k.ledger.indexSum -= indexDigest(place, old.sequence)
	if err := k.index.Delete(indexEntry(place, old.sequence)); err != nil {
		return err
	}
	return k.done.Delete(sequenceKey(old.sequence))
}

func (k *boltKeys) add(count, sum *uint64, digest uint64) {
	*count++
	*sum += digest
	k.changed = true
}

func (k *boltKeys) remove(count, sum *uint64, digest uint64) {
	*count--
	*sum -= digest
	k.changed = true
}

// encode frames a record in memory that stays as it is until the transaction ends.
func (k *boltKeys) encode(r *Record) []byte {
	start := len(k.arena)
	k.arena = appendRecord(k.arena, r)
	return k.arena[start:len(k.arena):len(k.arena)]
}

func (k *boltKeys) Unfinished(after Key, limit int) ([]Record, error) {
	if err := k.openLive(); err != nil {
		return nil, err
	}
	c := k.live.Cursor()
	name, frame := c.First()
	if after != (Key{}) {
		if name, frame = c.Seek(k.liveKey(after)); bytes.Equal(name, k.liveKey(after)) {
			name, frame = c.Next()
		}
	}
	return page(c, name, frame, limit)
}

func (k *boltKeys) Finished(after uint64, limit int) ([]Record, error) {
	if err := k.openDone(); err != nil {
		return nil, err
	}
	if after == math.MaxUint64 {
		return nil, nil
	}
	c := k.done.Cursor()
	name, frame := c.Seek(sequenceKey(after + 1))
	records, err := page(c, name, frame, limit)
	if err != nil {
		return nil, err
	}
	index := k.index.Cursor()
	for _, r := range records { // a page of another time or place may hold what was reaped since, or belongs elsewhere
		want := indexEntry(k.place(r.Key), r.Sequence)
		if entry, _ := index.Seek(want); r.Sequence <= after || !bytes.Equal(entry, want) {
			return nil, fmt.Errorf("%w: the finished record of %s is out of order, or the index does not name it", ErrCorrupt, r.Key)
		}
		after = r.Sequence
	}
	return records, nil
}

// page decodes up to limit records from a cursor's position on.
func page(c *bbolt.Cursor, name, frame []byte, limit int) ([]Record, error) {
	var records []Record
	for ; name != nil && len(records) < limit; name, frame = c.Next() {
		r, err := decodeRecord(frame)
		if err != nil {
			return nil, err
		}
		records = append(records, r)
	}
	return records, nil
}

func (k *boltKeys) Counts() (Counts, error) {
	if k.changed {
		return k.ledger.counts, nil
	}
	var stored ledger
	err := stored.decode(k.root.Get(keyLedger))
	return stored.counts, err
}

// brokenKeys are the records of a store that lost its buckets.
type brokenKeys struct{ err error }

func (b brokenKeys) Get(Key) (Record, error)                { return Record{}, b.err }
func (b brokenKeys) Put(*Record) error                      { return b.err }
func (b brokenKeys) Delete(Record) error                    { return b.err }
func (b brokenKeys) Unfinished(Key, int) ([]Record, error)  { return nil, b.err }
func (b brokenKeys) Finished(uint64, int) ([]Record, error) { return nil, b.err }
func (b brokenKeys) Counts() (Counts, error)                { return Counts{}, b.err }

func (s *boltStore) View(_ context.Context, fn func(tx *bbolt.Tx) error) error {
	if err := s.failure(); err != nil {
		return err
	}
	return readError(s.guard(func() error { return s.db.View(fn) }))
}

// readError names what a failed look means.
func readError(err error) error {
	if errors.Is(err, berrors.ErrDatabaseNotOpen) { // the engine was closed between its look at that and ours
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return err
}

// commitError names what a failed bbolt commit means. Only errors known to have written nothing that counts
// leave the store usable; all others may or may not be on disk.
func commitError(err error) error {
	var path *fs.PathError
	switch {
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrNotAStore):
		return err
	case errors.Is(err, berrors.ErrDatabaseReadOnly):
		return fmt.Errorf("keystate: %w", err)
	case errors.Is(err, berrors.ErrDatabaseNotOpen):
		return fmt.Errorf("%w: %w", ErrClosed, err)
	case errors.Is(err, berrors.ErrMaxSizeReached),
		errors.As(err, &path) && path.Op == "write" && isFull(path.Err),
		strings.HasPrefix(err.Error(), "file resize error: ") && isFullText(err.Error()): // bbolt formats the cause with %s
		return fmt.Errorf("%w: %w", ErrStorageFull, err)
	}
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}

// size says how many bytes of the file hold something, and how many are free to be used again.
func (s *boltStore) size() (used, free int64) {
	if s.failure() != nil {
		return 0, 0
	}
	_ = s.db.View(func(tx *bbolt.Tx) error {
		stats := s.db.Stats()
		free = int64(stats.FreePageN+stats.PendingPageN) * int64(s.db.Info().PageSize)
		used = tx.Size() - free
		return nil
	})
	return used, free
}

func (s *boltStore) limit(maxBytes, headroom int64) { s.most, s.spare = maxBytes, headroom }

// admit says whether there is room for a new key: unfinished ones must be able to end.
func (s *boltStore) admit() error {
	s.room.Lock()
	defer s.room.Unlock()
	const pause = time.Second // between two looks at the disk
	if s.room.checked.IsZero() || time.Since(s.room.checked) >= pause || time.Since(s.room.checked) < 0 {
		s.room.checked, s.room.err = time.Now(), s.checkRoom()
	}
	return s.room.err
}

func (s *boltStore) checkRoom() error {
	if used, free := s.size(); s.most > 0 && used > s.most {
		return fmt.Errorf("%w: the store holds %d bytes, new keys are accepted up to %d", ErrStorageFull, used, s.most)
	} else if s.spare > 0 && free < s.spare {
		if disk, err := diskFree(filepath.Dir(s.path)); err == nil && disk+free < s.spare {
			return fmt.Errorf("%w: %d bytes are left on the disk, new keys are accepted from %d", ErrStorageFull, disk+free, s.spare)
		}
	}
	return nil
}
