// Package index remembers, from one scan to the next, what each file held. An
// index has it in the order of the walk, so that a scan reads it as a stream beside the
// walk and never holds it in memory.
//
//	header: magic, digest of what the order depends on
//	block:  length, CRC-32C, records; length 0 ends the file
//	record: length, 'd', number of the root, path of a directory
//	        length, 'f', name, stamp, outcome
//
// A file's record belongs to the directory record before it. Fixed-size
// integers are little-endian, others varints. It is only a cache: it is not
// synced to disk, and from the first damage on it counts as absent.
package index

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strings"

	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/discovery/record"
)

const (
	magic       = "certctl-found-1\n"
	headerSize  = int64(len(magic) + sha256.Size)
	blockHeader = 8

	// blockSize is when a block is written. One record may make it longer.
	blockSize = 64 << 10

	// maxRecord bounds a record; a file that holds more is read every time.
	maxRecord = 2 << 20

	// maxSize bounds the index: two million files, or 100,000 certificates.
	// Files beyond it are read every time.
	maxSize = 256 << 20

	kindDirectory = 'd'
	kindFile      = 'f'
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	// ErrDamaged: an index cannot be read any further.
	ErrDamaged = errors.New("the index of the last scan is damaged")

	// ErrForeign: an index is of no use to this scan.
	ErrForeign = errors.New("the index of the last scan is of other directories, or of another version of the agent")
)

// headerOf binds an index to the roots, whose order is that of the walk,
// and to the version of the agent: a newer one may find more in a file.
func headerOf(roots []string) []byte {
	digest := sha256.Sum256([]byte(buildinfo.Version() + "\x00" + strings.Join(roots, "\x00")))
	return append([]byte(magic), digest[:]...)
}

// position is where a record ends: the offset of its block in the file, and
// the end in the block. The zero position is before the first record.
type position struct {
	block int64
	end   int
}

// File is one file of an index. Its slices stay valid, and hold the whole block that they are in.
type File struct {
	Root    int    // number of the root
	Dir     string // path of its directory
	Name    []byte
	Stamp   []byte // what tells that it is unchanged
	Outcome []byte // what it held

	Block     int64 // tells the blocks apart
	BlockSize int

	end int // of its record, in the block
}

// Compare orders files as the walk does.
func (f *File) Compare(root int, dir string, name []byte) int {
	return cmp.Or(cmp.Compare(f.Root, root), ComparePaths(f.Dir, dir), bytes.Compare(f.Name, name))
}

// Reader reads an index from begin to end.
type Reader struct {
	file    *os.File
	in      io.Reader
	offset  int64 // of the block after this one
	block   []byte
	current position
	root    int
	dir     string
}

// Open opens the index of the last scan. It returns ErrDamaged or ErrForeign if that is of no use.
func Open(root *os.Root, name string, roots []string) (*Reader, error) {
	file, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	r, err := newReader(file, headerOf(roots))
	if err != nil {
		file.Close()
		return nil, err
	}
	r.file = file
	return r, nil
}

// Close closes the file. Reading ends, and so does a Writer that has the Reader.
func (r *Reader) Close() error { return r.file.Close() }

// newReader checks the header.
func newReader(in io.Reader, header []byte) (*Reader, error) {
	got := make([]byte, headerSize)
	if _, err := io.ReadFull(in, got); err != nil || !bytes.HasPrefix(got, []byte(magic)) {
		return nil, ErrDamaged
	}
	if !bytes.Equal(got, header) {
		return nil, ErrForeign
	}
	return &Reader{in: in, offset: headerSize}, nil
}

// Next returns the next file, or io.EOF after the last one.
func (r *Reader) Next() (File, error) {
	for {
		for r.current.end == len(r.block) {
			if err := r.nextBlock(); err != nil {
				return File{}, err
			}
		}
		d := record.Decoder{Rest: r.block[r.current.end:]}
		entry := record.Decoder{Rest: d.Bytes()}
		r.current.end = len(r.block) - len(d.Rest)
		switch entry.Byte() {
		case kindDirectory:
			r.root = int(entry.Uvarint())
			r.dir = entry.String()
		case kindFile:
			file := File{Root: r.root, Dir: r.dir, Name: entry.Bytes(), Stamp: entry.Bytes(), Outcome: entry.Rest,
				Block: r.current.block, BlockSize: len(r.block), end: r.current.end}
			if !entry.Damaged {
				return file, nil
			}
		default:
			entry.Damaged = true
		}
		if entry.Damaged {
			return File{}, ErrDamaged
		}
	}
}

func (r *Reader) nextBlock() error {
	var header [blockHeader]byte
	if _, err := io.ReadFull(r.in, header[:]); err != nil {
		return ErrDamaged
	}
	size := binary.LittleEndian.Uint32(header[:])
	if size == 0 {
		return io.EOF
	}
	if size > blockSize+maxRecord {
		return ErrDamaged
	}
	// A new buffer: records of the last block may still be in use.
	r.block = make([]byte, size)
	if _, err := io.ReadFull(r.in, r.block); err != nil || crc32.Checksum(r.block, castagnoli) != binary.LittleEndian.Uint32(header[4:]) {
		return ErrDamaged
	}
	r.current = position{block: r.offset}
	r.offset += blockHeader + int64(size)
	return nil
}

// Writer writes the index of this scan. As long as that is the same as the last
// one, it writes nothing: an unchanged rescan leaves the disk alone.
type Writer struct {
	root   *os.Root
	name   string
	header []byte
	old    *os.File // of the last scan, or nil
	same   position // up to here both are the same

	file    *os.File // nil until the first difference
	size    int64
	block   []byte
	scratch []byte
	inRoot  int
	inDir   string
	failed  error
}

// NewWriter returns a Writer that takes what is the same from old, which is nil if there is none.
func NewWriter(root *os.Root, name string, roots []string, old *Reader) *Writer {
	w := &Writer{root: root, name: name, header: headerOf(roots)}
	if old != nil {
		w.old = old.file
	}
	return w
}

// CleanUp removes a new index that a kill has left half written.
func CleanUp(root *os.Root, name string) { (&Writer{root: root, name: name}).remove() }

func (w *Writer) temporary() string { return "." + w.name + ".tmp" }

// Keep adds the record of an unchanged file.
func (w *Writer) Keep(f File) {
	if w.file == nil {
		w.same, w.inRoot, w.inDir = position{f.Block, f.end}, f.Root, f.Dir
		return
	}
	w.append(f.Root, f.Dir, f.Name, f.Stamp, f.Outcome)
}

// Add adds the record of a file that is new or was read again.
func (w *Writer) Add(root int, dir string, name, stamp, outcome []byte) {
	if len(outcome) > maxRecord/2 {
		return
	}
	w.Differ()
	w.append(root, dir, name, stamp, outcome)
}

// Differ begins the new index, because the last one differs from here on. It copies what is the
// same.
func (w *Writer) Differ() {
	if w.file != nil || w.failed != nil || w.same.block > maxSize-maxRecord {
		return
	}
	w.file, w.failed = w.root.OpenFile(w.temporary(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if w.failed != nil {
		return
	}
	w.write(w.header)
	if w.same == (position{}) {
		return
	}
	n, err := io.Copy(w.file, io.NewSectionReader(w.old, headerSize, w.same.block-headerSize))
	if err == nil {
		w.block = make([]byte, w.same.end, max(w.same.end, blockSize))
		_, err = w.old.ReadAt(w.block, w.same.block+blockHeader)
	}
	w.size += n
	w.failed = err
}

func (w *Writer) append(root int, dir string, name, stamp, outcome []byte) {
	if w.failed != nil || w.file == nil || w.size+int64(len(w.block)) > maxSize-maxRecord {
		return
	}
	if root != w.inRoot || dir != w.inDir {
		w.scratch = binary.AppendUvarint(append(w.scratch[:0], kindDirectory), uint64(root))
		w.block = record.AppendString(w.block, record.AppendString(w.scratch, dir))
		w.inRoot, w.inDir = root, dir
	}
	w.scratch = record.AppendString(append(w.scratch[:0], kindFile), name)
	w.scratch = append(record.AppendString(w.scratch, stamp), outcome...)
	w.block = record.AppendString(w.block, w.scratch)
	if len(w.block) >= blockSize {
		w.flush()
	}
}

func (w *Writer) flush() {
	if len(w.block) > 0 {
		header := binary.LittleEndian.AppendUint32(nil, uint32(len(w.block)))
		w.write(binary.LittleEndian.AppendUint32(header, crc32.Checksum(w.block, castagnoli)))
		w.write(w.block)
		w.block = w.block[:0]
	}
}

func (w *Writer) write(b []byte) {
	if w.failed == nil {
		_, w.failed = w.file.Write(b)
		w.size += int64(len(b))
	}
}

// Commit ends the new index and puts it in place of the old one. It is not
// synced: what a power cut damages is noticed and thrown away.
func (w *Writer) Commit() error {
	if w.file != nil {
		w.flush()
		w.write(make([]byte, blockHeader))
		w.failed = cmp.Or(w.failed, w.file.Close())
		w.file = nil
		if w.failed == nil {
			w.failed = w.root.Rename(w.temporary(), w.name)
		}
		if w.failed != nil {
			w.remove()
		}
	}
	if w.failed != nil {
		return fmt.Errorf("write the index %s: %w", w.name, w.failed)
	}
	return nil
}

// Abandon leaves the old index as it is.
func (w *Writer) Abandon() {
	if w.file != nil {
		w.file.Close()
		w.file = nil
		w.remove()
	}
}

// KeepAfter ends the new index where its scan was broken off, after the given
// file, with what the old one has behind it. Every file is behind root -1.
func (w *Writer) KeepAfter(root int, dir string, name []byte) {
	if w.file == nil || w.old == nil {
		return // the old index holds all of that, or there is none
	}
	old, err := newReader(io.NewSectionReader(w.old, 0, maxSize), w.header)
	if err != nil {
		return
	}
	for {
		f, err := old.Next()
		if err != nil {
			return // the end; or damage, after which all is read again
		}
		if f.Compare(root, dir, name) > 0 {
			w.append(f.Root, f.Dir, f.Name, f.Stamp, f.Outcome)
		}
	}
}

// remove removes the temporary file. A leftover is overwritten next time.
func (w *Writer) remove() { _ = w.root.Remove(w.temporary()) }

// ComparePaths orders paths as the walk does: component by component, so that
// everything below a directory follows it directly.
func ComparePaths(a, b string) int {
	if a == b {
		return 0
	}
	for i := range min(len(a), len(b)) {
		switch x, y := a[i], b[i]; {
		case x == y:
		case x == '/' || y != '/' && x < y:
			return -1
		default:
			return 1
		}
	}
	return len(a) - len(b)
}
