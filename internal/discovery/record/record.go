// Package record encodes the results that discovery remembers between scans, and caches recent
// encodings. Strings and lists are preceded by their length as a varint.
package record

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
)

// AppendString appends the length of s and then s.
func AppendString[S ~string | ~[]byte](b []byte, s S) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// Decoder decodes a record. After damage it sets Damaged and returns zero values.
type Decoder struct {
	Rest    []byte
	Damaged bool
	shared  string // a copy that ends where Rest ends, or ""
}

// Share makes all further strings substrings of one copy, which saves an allocation for each.
func (d *Decoder) Share() { d.shared = string(d.Rest) }

func (d *Decoder) Uvarint() uint64 {
	n, size := binary.Uvarint(d.Rest)
	if size <= 0 {
		d.Damaged, d.Rest = true, nil
		return 0
	}
	d.Rest = d.Rest[size:]
	return n
}

// Length returns the number of elements of a list. Each element takes at least one byte.
func (d *Decoder) Length() int {
	n := d.Uvarint()
	if n > uint64(len(d.Rest)) {
		d.Damaged, d.Rest = true, nil
		return 0
	}
	return int(n)
}

func (d *Decoder) Bytes() []byte {
	n := d.Length()
	b := d.Rest[:n:n]
	d.Rest = d.Rest[n:]
	return b
}

func (d *Decoder) String() string {
	b := d.Bytes()
	if d.shared == "" {
		return string(b)
	}
	end := len(d.shared) - len(d.Rest)
	return d.shared[end-len(b) : end]
}

func (d *Decoder) Byte() byte {
	if len(d.Rest) == 0 {
		d.Damaged = true
		return 0
	}
	b := d.Rest[0]
	d.Rest = d.Rest[1:]
	return b
}

// Recent caches records by the digest of their source. It may be used concurrently.
type Recent struct {
	mu    sync.Mutex
	known map[[sha256.Size]byte][]byte // guarded by mu
	bytes int                          // guarded by mu
}

// maxRecent bounds the cached bytes: about 500 certificates.
const maxRecent = 1 << 20

// Get returns the record for a digest, or nil.
func (r *Recent) Get(digest [sha256.Size]byte) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known[digest]
}

// Put caches a record, unless it is so large that it would displace many others.
func (r *Recent) Put(digest [sha256.Size]byte, record []byte) {
	size := len(digest) + len(record)
	if size > maxRecent/8 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil || r.bytes+size > maxRecent {
		// Starting over is simpler than evicting by age and as good here: frequent records return
		// with their next copy.
		r.known, r.bytes = make(map[[sha256.Size]byte][]byte), 0
	}
	r.known[digest] = record
	r.bytes += size
}

// Forget drops all records.
func (r *Recent) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known, r.bytes = nil, 0
}
