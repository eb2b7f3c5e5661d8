package lossy

const (
	// Sector is what a disk writes whole or not at all.
	Sector = 512
	chunk  = 4096
)

// content is what a file holds. Its chunks are never changed, only replaced, so that copies share them.
type content struct {
	size   int64
	chunks map[int64]*[chunk]byte // by their place; a missing one is all zeros
}

func newContent() *content { return &content{chunks: map[int64]*[chunk]byte{}} }

func (c *content) clone() *content {
	d := &content{size: c.size, chunks: make(map[int64]*[chunk]byte, len(c.chunks))}
	for at, b := range c.chunks {
		d.chunks[at] = b
	}
	return d
}

// read fills b from what lies at off, and returns how much of it the file has.
func (c *content) read(b []byte, off int64) int {
	b = b[:max(0, min(int64(len(b)), c.size-off))]
	for n := 0; n < len(b); {
		at, within := (off+int64(n))/chunk, int((off+int64(n))%chunk)
		part := b[n:min(len(b), n+chunk-within)]
		if from := c.chunks[at]; from != nil {
			copy(part, from[within:])
		} else {
			clear(part)
		}
		n += len(part)
	}
	return len(b)
}

// write puts b at off. What lies past the file's size is lost.
func (c *content) write(b []byte, off int64) {
	b = b[:max(0, min(int64(len(b)), c.size-off))]
	for len(b) > 0 {
		at, within := off/chunk, int(off%chunk)
		fresh := new([chunk]byte)
		if old := c.chunks[at]; old != nil && (within > 0 || len(b) < chunk) {
			*fresh = *old
		}
		n := copy(fresh[within:], b)
		c.chunks[at] = fresh
		b, off = b[n:], off+int64(n)
	}
}

func (c *content) resize(size int64) {
	if size < c.size {
		for at := range c.chunks {
			if at*chunk >= size {
				delete(c.chunks, at)
			}
		}
		if within := size % chunk; within > 0 && c.chunks[size/chunk] != nil {
			fresh := new([chunk]byte)
			copy(fresh[:within], c.chunks[size/chunk][:within])
			c.chunks[size/chunk] = fresh
		}
	}
	c.size = size
}
