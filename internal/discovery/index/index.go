// Package index stores, from one scan to the next, what each file held. It keeps files in walk
// order, so a scan can read the old index as a stream beside the walk without holding it in memory.
//
//	header: magic, digest of what the order depends on
//	block:  length, CRC-32C, records; length 0 ends the file
//	record: length, 'd', number of the root, path of a directory
//	        length, 'f', name, stamp, outcome
//
// A file's record belongs to the directory record before it. Fixed-size integers are little-endian,
// others varints. The index is only a cache: it is not synced to disk, and everything after the
// first damage is ignored.
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

	// blockSize is the size at which a block is written. Its last record may exceed it.
	blockSize = 64 << 10

	// maxRecord bounds a record. A file that needs more is read in every scan.
	maxRecord = 2 << 20

	// maxSize bounds the index: two million files, or 100,000 certificates. Further files are read
	// in every scan.
	maxSize = 256 << 20

	kindDirectory = 'd'
	kindFile      = 'f'
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	// ErrDamaged means that the rest of an index cannot be read.
	ErrDamaged = errors.New("the index of the last scan is damaged")

	// ErrForeign means that an index belongs to another configuration or version.
	ErrForeign = errors.New("the index of the last scan was made for other directories, or by another version of the agent")
)

// headerOf binds an index to the roots, which determine the walk order, and to the version of the
// agent, because a newer version may find more in a file.
func headerOf(roots []string) []byte {
	digest := sha256.Sum256([]byte(buildinfo.Version() + "\x00" + strings.Join(roots, "\x00")))
	return append([]byte(magic), digest[:]...)
}

// position is the end of a record: the offset of its block in the file and the end in the block.
// The zero position is before the first record.
type position struct {
	block int64
	end   int
}

// File is one file of an index. Its slices remain valid and keep their whole block in memory.
type File struct {
	Root    int    // number of the root
	Dir     string // path of its directory
	Name    []byte
	Stamp   []byte // differs if the file has changed
	Outcome []byte // a certfile.Outcome

	Block     int64 // identifies the block
	BlockSize int

	end int // end of its record in the block
}

// Compare orders files as the walk does.
func (f *File) Compare(root int, dir string, name []byte) int {
	return cmp.Or(cmp.Compare(f.Root, root), ComparePaths(f.Dir, dir), bytes.Compare(f.Name, name))
}

// Reader reads an index from start to end.
type Reader struct {
	file    *os.File
	in      io.Reader
	offset  int64 // of the next block
	block   []byte
	current position
	root    int
	dir     string
}

// Open opens the index of the last scan. It returns ErrDamaged or ErrForeign if the index is
// unusable.
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

// Close closes the file. A Writer that uses the Reader must have finished.
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
	// Use a new buffer: records of the previous block may still be in use.
	r.block = make([]byte, size)
	if _, err := io.ReadFull(r.in, r.block); err != nil || crc32.Checksum(r.block, castagnoli) != binary.LittleEndian.Uint32(header[4:]) {
		return ErrDamaged
	}
	r.current = position{block: r.offset}
	r.offset += blockHeader + int64(size)
	return nil
}

// Writer writes the index of a scan. It writes nothing as long as that equals the last one, so an
// unchanged rescan does not touch the disk.
type Writer struct {
	root   *os.Root
	name   string
	header []byte
	old    *os.File // of the last scan, or nil
	same   position // up to here both are equal

	file    *os.File // nil until the first difference
	size    int64
	block   []byte
	scratch []byte
	inRoot  int
	inDir   string
	failed  error
}

// NewWriter returns a Writer that copies the common part from old, which may be nil.
func NewWriter(root *os.Root, name string, roots []string, old *Reader) *Writer {
	w := &Writer{root: root, name: name, header: headerOf(roots)}
	if old != nil {
		w.old = old.file
	}
	return w
}

// CleanUp removes an unfinished index left by a killed scan.
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
	w.Diverge()
	w.append(root, dir, name, stamp, outcome)
}

// Diverge starts a new file, because the index differs from the last one from here on. It copies
// the common part.
func (w *Writer) Diverge() {
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

// Commit completes the new index and replaces the old one. It does not sync: damage from a power
// cut is detected and discarded.
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

// Abandon discards the new index and keeps the old one.
func (w *Writer) Abandon() {
	if w.file != nil {
		w.file.Close()
		w.file = nil
		w.remove()
	}
}

// KeepAfter completes the index of a scan that stopped after the given file: it copies the old
// records of all later files. Root -1 is before every file.
func (w *Writer) KeepAfter(root int, dir string, name []byte) {
	if w.file == nil || w.old == nil {
		return // the old index stays in place, or there is none
	}
	old, err := newReader(io.NewSectionReader(w.old, 0, maxSize), w.header)
	if err != nil {
		return
	}
	for {
		f, err := old.Next()
		if err != nil {
			return // the end, or damage: the remaining files will be read again
		}
		if f.Compare(root, dir, name) > 0 {
			w.append(f.Root, f.Dir, f.Name, f.Stamp, f.Outcome)
		}
	}
}

// remove removes the temporary file. If that fails, the next scan overwrites it.
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
