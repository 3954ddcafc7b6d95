package sftp

import (
	"encoding/binary"
	"io/fs"
)

// Attrs are the attributes of a file (section 5 of the draft).
type Attrs struct {
	Size     uint64
	UID, GID uint32
	Mode     fs.FileMode // type and permissions
	Modified uint32      // seconds since 1970

	complete bool // the server sent all of them
}

// Flags for the attributes that follow.
const (
	hasSize        = 0x01
	hasOwner       = 0x02
	hasPermissions = 0x04
	hasTimes       = 0x08
	hasExtended    = 0x80000000
)

// packet is the body of a packet that is being built.
type packet struct{ data []byte }

// newPacket returns a packet that starts with a path or handle.
func newPacket(what string) (p packet) {
	p.string(what)
	return p
}

func (p *packet) uint32(n uint32) { p.data = binary.BigEndian.AppendUint32(p.data, n) }
func (p *packet) uint64(n uint64) { p.data = binary.BigEndian.AppendUint64(p.data, n) }
func (p *packet) string(s string) {
	p.uint32(uint32(len(s)))
	p.data = append(p.data, s...)
}

// reader decodes a packet. If data is missing, it returns zero values and sets short.
type reader struct {
	data  []byte
	short bool
}

func (r *reader) next(n uint32) []byte {
	if uint64(n) > uint64(len(r.data)) {
		r.data, r.short = nil, true
		return nil
	}
	taken := r.data[:n]
	r.data = r.data[n:]
	return taken
}

func (r *reader) uint32() uint32 {
	if b := r.next(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.next(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) string() string { return string(r.next(r.uint32())) }

func (r *reader) attrs() Attrs {
	var a Attrs
	flags := r.uint32()
	if flags&hasSize != 0 {
		a.Size = r.uint64()
	}
	if flags&hasOwner != 0 {
		a.UID, a.GID = r.uint32(), r.uint32()
	}
	if flags&hasPermissions != 0 {
		a.Mode = modeOf(r.uint32())
	}
	if flags&hasTimes != 0 {
		r.uint32() // last access
		a.Modified = r.uint32()
	}
	if flags&hasExtended != 0 {
		for count := r.uint32(); count > 0 && !r.short; count-- {
			r.string()
			r.string()
		}
	}
	const all = hasSize | hasOwner | hasPermissions | hasTimes
	a.complete = flags&all == all
	return a
}

// modeOf converts a POSIX mode. The values of its types are the same on all relevant systems.
func modeOf(bits uint32) fs.FileMode {
	mode := fs.FileMode(bits & 0o777)
	switch bits & 0o170000 {
	case 0o100000:
	case 0o040000:
		mode |= fs.ModeDir
	case 0o120000:
		mode |= fs.ModeSymlink
	default:
		mode |= fs.ModeIrregular
	}
	if bits&0o1000 != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}
