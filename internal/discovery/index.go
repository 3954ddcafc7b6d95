package discovery

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
)

// The index holds what each file held, in the order of the walk, so that a
// scan reads it as a stream beside the walk and never holds it in memory.
//
//	header: magic, digest of what the order depends on
//	block:  length, CRC-32C, records; length 0 ends the file
//	record: length, 'd', number of the root, path of a directory
//	        length, 'f', name, stamp, outcome (outcome.go)
//
// A file's record belongs to the directory record before it. Fixed-size
// integers are little-endian, others varints. It is only a cache: it is not
// synced to disk, and from the first damage on it counts as absent.
const (
	indexMagic  = "certctl-found-1\n"
	headerSize  = int64(len(indexMagic) + sha256.Size)
	blockHeader = 8

	// blockSize is when a block is written. One record may make it longer.
	blockSize = 64 << 10

	// maxRecord bounds a record; a file that holds more is read every time.
	maxRecord = 2 << 20

	// maxIndex bounds the index: two million files, or 100,000 certificates.
	// Files beyond it are read every time.
	maxIndex = 256 << 20

	kindDirectory = 'd'
	kindFile      = 'f'
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errDamagedIndex = errors.New("the index of the last scan is damaged")
)

// indexHeader binds an index to the roots, whose order is that of the walk,
// and to the version of the agent: a newer one may find more in a file.
func indexHeader(roots []string) []byte {
	digest := sha256.Sum256([]byte(buildinfo.Version() + "\x00" + strings.Join(roots, "\x00")))
	return append([]byte(indexMagic), digest[:]...)
}

// position is where a record ends: the offset of its block in the file, and
// the end in the block. The zero position is before the first record.
type position struct {
	block int64
	end   int
}

// indexed is one file of the index. Its slices stay valid.
type indexed struct {
	root    int
	dir     string
	name    []byte
	stamp   []byte
	outcome []byte
	at      position
}

// indexReader reads an index from begin to end.
type indexReader struct {
	in      io.Reader
	offset  int64 // of the block after this one
	block   []byte
	current position
	root    int
	dir     string
}

// newIndexReader checks the header.
func newIndexReader(in io.Reader, header []byte) (*indexReader, error) {
	got := make([]byte, headerSize)
	if _, err := io.ReadFull(in, got); err != nil || !bytes.HasPrefix(got, []byte(indexMagic)) {
		return nil, errDamagedIndex
	}
	if !bytes.Equal(got, header) {
		return nil, errors.New("the index of the last scan is of other directories, or of another version of the agent")
	}
	return &indexReader{in: in, offset: headerSize}, nil
}

// next returns the next file, or io.EOF after the last one.
func (r *indexReader) next() (indexed, error) {
	for {
		for r.current.end == len(r.block) {
			if err := r.nextBlock(); err != nil {
				return indexed{}, err
			}
		}
		d := decoder{rest: r.block[r.current.end:]}
		record := decoder{rest: d.bytes()}
		r.current.end = len(r.block) - len(d.rest)
		switch kind := record.byte(); {
		case d.damaged:
			return indexed{}, errDamagedIndex
		case kind == kindDirectory:
			r.root = int(record.uvarint())
			r.dir = record.string()
		case kind == kindFile:
			file := indexed{root: r.root, dir: r.dir, name: record.bytes(), stamp: record.bytes(), outcome: record.rest, at: r.current}
			if !record.damaged {
				return file, nil
			}
		default:
			record.damaged = true
		}
		if record.damaged {
			return indexed{}, errDamagedIndex
		}
	}
}

func (r *indexReader) nextBlock() error {
	var header [blockHeader]byte
	if _, err := io.ReadFull(r.in, header[:]); err != nil {
		return errDamagedIndex
	}
	size := binary.LittleEndian.Uint32(header[:])
	if size == 0 {
		return io.EOF
	}
	if size > blockSize+maxRecord {
		return errDamagedIndex
	}
	// A new buffer: records of the last block may still be in use.
	r.block = make([]byte, size)
	if _, err := io.ReadFull(r.in, r.block); err != nil || crc32.Checksum(r.block, castagnoli) != binary.LittleEndian.Uint32(header[4:]) {
		return errDamagedIndex
	}
	r.current = position{block: r.offset}
	r.offset += blockHeader + int64(size)
	return nil
}

// indexWriter writes the index of this scan. As long as that is the same as
// the last one, it writes nothing: an unchanged rescan leaves the disk alone.
type indexWriter struct {
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

func (w *indexWriter) temporary() string { return "." + w.name + ".tmp" }

// keep adds the record of an unchanged file.
func (w *indexWriter) keep(f indexed) {
	if w.file == nil {
		w.same, w.inRoot, w.inDir = f.at, f.root, f.dir
		return
	}
	w.append(f.root, f.dir, f.name, f.stamp, f.outcome)
}

// add adds the record of a file that is new or was read again.
func (w *indexWriter) add(root int, dir string, name, stamp, outcome []byte) {
	if len(outcome) > maxRecord/2 {
		return
	}
	w.differ()
	w.append(root, dir, name, stamp, outcome)
}

// differ begins the new index, with what is the same copied from the old one.
func (w *indexWriter) differ() {
	if w.file != nil || w.failed != nil || w.same.block > maxIndex-maxRecord {
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

func (w *indexWriter) append(root int, dir string, name, stamp, outcome []byte) {
	if w.failed != nil || w.file == nil || w.size+int64(len(w.block)) > maxIndex-maxRecord {
		return
	}
	if root != w.inRoot || dir != w.inDir {
		w.scratch = binary.AppendUvarint(append(w.scratch[:0], kindDirectory), uint64(root))
		w.block = appendString(w.block, appendString(w.scratch, dir))
		w.inRoot, w.inDir = root, dir
	}
	w.scratch = appendString(append(w.scratch[:0], kindFile), name)
	w.scratch = append(appendString(w.scratch, stamp), outcome...)
	w.block = appendString(w.block, w.scratch)
	if len(w.block) >= blockSize {
		w.flush()
	}
}

func (w *indexWriter) flush() {
	if len(w.block) > 0 {
		header := binary.LittleEndian.AppendUint32(nil, uint32(len(w.block)))
		w.write(binary.LittleEndian.AppendUint32(header, crc32.Checksum(w.block, castagnoli)))
		w.write(w.block)
		w.block = w.block[:0]
	}
}

func (w *indexWriter) write(b []byte) {
	if w.failed == nil {
		_, w.failed = w.file.Write(b)
		w.size += int64(len(b))
	}
}

// commit ends the new index and puts it in place of the old one. It is not
// synced: what a power cut damages is noticed and thrown away.
func (w *indexWriter) commit() error {
	if w.file == nil {
		return w.wrap(w.failed)
	}
	w.flush()
	w.write(make([]byte, blockHeader))
	if err := w.file.Close(); w.failed == nil {
		w.failed = err
	}
	w.file = nil
	if w.failed == nil {
		w.failed = w.root.Rename(w.temporary(), w.name)
	}
	if w.failed != nil {
		w.remove()
	}
	return w.wrap(w.failed)
}

func (w *indexWriter) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("write the index %s: %w", w.name, err)
}

// abandon leaves the old index as it is.
func (w *indexWriter) abandon() {
	if w.file != nil {
		w.file.Close()
		w.file = nil
		w.remove()
	}
}

// keepAfter ends the new index where its scan was broken off, after the given
// file, with what the old one has behind it. A nil directory is before all.
func (w *indexWriter) keepAfter(dir *node, name []byte) {
	if w.file == nil || w.old == nil {
		return // the old index holds all of that, or there is none
	}
	old, err := newIndexReader(io.NewSectionReader(w.old, 0, maxIndex), w.header)
	if err != nil {
		return
	}
	for {
		f, err := old.next()
		if err != nil {
			return // the end; or damage, after which all is read again
		}
		if dir == nil || cmp.Or(cmp.Compare(f.root, dir.root), comparePaths(f.dir, dir.path), bytes.Compare(f.name, name)) > 0 {
			w.append(f.root, f.dir, f.name, f.stamp, f.outcome)
		}
	}
}

// remove clears the temporary away; one that stays is overwritten next time.
func (w *indexWriter) remove() { _ = w.root.Remove(w.temporary()) }

// comparePaths orders paths as the walk does: component by component, so that
// everything below a directory follows it directly.
func comparePaths(a, b string) int {
	if a == b {
		return 0
	}
	for i := range min(len(a), len(b)) {
		switch x, y := a[i], b[i]; {
		case x == y:
		case x == '/':
			return -1
		case y == '/':
			return 1
		case x < y:
			return -1
		default:
			return 1
		}
	}
	return len(a) - len(b)
}
