package discovery

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/discovery/certfile"
	"certctl-agent/internal/discovery/index"
)

const (
	// segmentFiles and segmentBytes bound the files that one task reads.
	segmentFiles = 512
	segmentBytes = 256 << 10

	// readAhead bounds the bytes of files that are being read or wait to be emitted. It is counted
	// in units of readUnit and determines the memory use of a scan.
	readAhead = 2 << 20
	readUnit  = 32 << 10

	// emitAtOnce and emitBytes bound a batch of certificates. A single certificate may be larger.
	emitAtOnce = 64
	emitBytes  = 256 << 10

	// racyWindow is how long a file must have been unchanged before its content is remembered. The
	// clock of a file system may tick only every two seconds, so a second change within one tick
	// leaves its times as they are.
	racyWindow = 2 * time.Second
)

type identity struct{ dev, ino uint64 }

// run is one scan. Fields without an owner are set before its goroutines start.
//
// The walk, in one goroutine, visits directories in order and compares them with the old index. It
// passes segments to the emitter goroutine and files to read to the workers.
type run struct {
	s      *Scanner
	ctx    context.Context
	cancel context.CancelCauseFunc
	emit   func([]api.DiscoveredCertificate) error
	began  time.Time

	roots       []root
	own         []ownDir
	mounts      mounts
	retryLocked bool
	parser      certfile.Parser

	tasks    chan *task
	segments chan *segment
	budget   chan struct{} // one token per readUnit in flight
	workers  sync.WaitGroup

	coveredMu   sync.Mutex
	coveredDirs map[string]bool // guarded by coveredMu: whether the walk lists a directory, by real path

	anyFile  bool              // some root is a file; set before the walk begins
	hung     sync.Map          // mount points of hung file systems that were reported
	linked   map[identity]bool // files reached through links; owned by the walk
	open     *segment          // the segment being filled; owned by the walk
	filled   int               // number of entries of the previous segment; owned by the walk
	old      *index.Reader
	oldFile  index.File // next file of the old index, if haveOld; owned by the walk
	haveOld  bool
	problems problems

	rateMu   sync.Mutex
	nextFile time.Time // guarded by rateMu

	summary Summary // Skipped: owned by the walk; Read, Formats: by the emitter
	effort  effort
	writer  *index.Writer

	// Owned by the emitter.
	batch      []api.DiscoveredCertificate
	batchBytes int
	last       entry          // directory and name of the last emitted file
	unread     leftOut        // files that would exceed a limit of processor time
	reported   map[uint32]int // weight of the certificates in each user's files
	unreported leftOut        // files that would exceed ownerBytes
}

// segment is a run of files in walk order. One task reads those that are not in the index.
type segment struct {
	*task   // nil if there is nothing to read
	entries []entry
	units   int    // tokens of the budget that it holds
	removed bool   // a file of the old index no longer exists
	bytes   int64  // memory that its entries hold, or need for reading
	block   int64  // last block of the old index that it refers to
	reads   bool   // some file must be read
	on      string // mount point of the files to read
}

// entry is a file in a segment: either known from the index or to be read.
type entry struct {
	dir *node
	file
	hit  bool       // found unchanged in the index
	kept index.File // if hit

	*reading // set by the task; nil if not read or gone
}

// reading is the result of opening a file.
type reading struct {
	outcome certfile.Outcome
	stamp   []byte // nil if the outcome must not be remembered
	problem string
	unread  bool // skipped: the processor time for such files is used up
}

func newRun(ctx context.Context, s *Scanner, emit func([]api.DiscoveredCertificate) error) *run {
	r := &run{
		s: s, emit: emit, began: time.Now(),
		roots:    make([]root, len(s.opts.Dirs)),
		tasks:    make(chan *task, 64),
		segments: make(chan *segment, 4),
		budget:   make(chan struct{}, readAhead/readUnit),
		linked:   make(map[identity]bool),
		unread:   make(leftOut), unreported: make(leftOut),
		reported: make(map[uint32]int),
		effort:   effort{ownerLimit: s.ownerTime, limit: s.scanTime},
		summary:  Summary{Formats: make(map[string]int), Skipped: make(map[string]int)},
	}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	return r
}

func (r *run) scan() error {
	defer r.cancel(nil)
	var err error
	if r.mounts, err = mountTable(); err != nil {
		r.s.opts.Log.Warn("mount table not readable: all file systems count as local", "error", err.Error())
	}
	r.findOwn()
	closeIndex := r.openIndex()
	defer closeIndex()

	pool := make([]*worker, workers())
	for i := range pool {
		pool[i] = r.newWorker()
	}
	var group sync.WaitGroup
	group.Go(func() { r.watch(pool) })
	var walked, emitted error // walked is set before segments is closed
	group.Go(func() {
		r.s.idle(func() {
			defer close(r.segments)
			walked = r.guard("walk", r.walkAll)
		})
	})
	group.Go(func() {
		r.s.idle(func() {
			if emitted = r.guard("emit", r.emitAll); emitted != nil {
				r.cancel(emitted)
				r.finishIndex(emitted)
			} else {
				r.finishIndex(walked)
			}
			r.cancel(nil) // ends workers and watch
		})
	})
	group.Wait()
	r.awaitWorkers()
	r.reportLeftOut()
	if r.last.dir != nil {
		r.summary.Reached = api.TextOfPath(join(r.last.dir.shown, string(r.last.name)))
	}
	return cmp.Or(emitted, walked)
}

func (r *run) findOwn() {
	for _, dir := range r.s.opts.Skip {
		var st syscall.Stat_t
		if retry(func() error { return syscall.Stat(dir, &st) }) != nil {
			continue
		}
		own := ownDir{statusOf(&st).identity, dir}
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			own.real = real
		}
		r.own = append(r.own, own)
	}
}

// guard turns a panic into an error: a malicious file must not end the agent.
func (r *run) guard(what string, f func() error) (err error) {
	defer func() {
		if reason := recover(); reason != nil {
			r.s.opts.Log.Error("panic in a scan", "in", what, "reason", fmt.Sprint(reason), "stack", string(debug.Stack()))
			err = &panicError{what, reason}
		}
	}()
	return f()
}

type panicError struct {
	in     string
	reason any
}

func (e *panicError) Error() string { return fmt.Sprintf("internal error in %s: %v", e.in, e.reason) }

// awaitWorkers waits until all workers have ended, except those that hang.
func (r *run) awaitWorkers() {
	ended := make(chan struct{})
	go func() {
		r.workers.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(cancelGrace):
	}
}

func (r *run) newWorker() *worker {
	w := &worker{r: r}
	r.workers.Go(func() { r.s.idle(func() { r.work(w) }) })
	return w
}

func (r *run) walkAll() error {
	if err := r.resolveRoots(); err != nil {
		return err
	}
	if err := r.walk(); err != nil {
		return err
	}
	return r.flush()
}

// addFiles compares the files of a node with the old index and adds them to segments.
func (r *run) addFiles(n *node) error {
	for i := range n.files {
		f := &n.files[i]
		if f.link {
			// Several links to one file count once.
			const maxLinked = 1 << 16
			if r.linked[f.identity] {
				r.summary.Skipped[skipAgain]++
				continue
			} else if len(r.linked) < maxLinked {
				r.linked[f.identity] = true
			}
		}
		e := entry{dir: n, file: *f}
		e.kept, e.hit = r.lookUp(n, f)
		if err := r.put(e, n.mount); err != nil {
			return err
		}
	}
	n.files = nil
	return nil
}

func (r *run) put(e entry, mount string) error {
	s := r.open
	// An index entry keeps its whole block in memory.
	holds := max(e.size, certfile.HeadSize/8)
	if e.hit {
		if holds = 0; s == nil || s.block != e.kept.Block {
			holds = int64(e.kept.BlockSize)
		}
	}
	if s != nil && holds > 0 && (s.bytes > 0 && s.bytes+holds > segmentBytes || !e.hit && s.on != "" && s.on != mount) {
		if err := r.flush(); err != nil {
			return err
		}
		s = nil
	}
	if s == nil {
		s = &segment{entries: make([]entry, 0, r.filled)}
		r.open = s
	}
	s.bytes += holds
	if e.hit {
		s.block = e.kept.Block
	} else {
		s.on, s.reads = mount, true
	}
	s.entries = append(s.entries, e)
	if len(s.entries) >= segmentFiles {
		return r.flush()
	}
	return nil
}

func (r *run) flush() error {
	s := r.open
	r.open = nil
	if s == nil {
		return nil
	}
	r.filled = len(s.entries)
	if s.bytes > 0 {
		s.units = min(int(s.bytes/readUnit)+1, cap(r.budget))
		for range s.units {
			select {
			case r.budget <- struct{}{}:
			case <-r.ctx.Done():
				return context.Cause(r.ctx)
			}
		}
	}
	if s.reads {
		s.task = newTask(s.on, r.readSegment(s.entries))
		r.queue(s.task)
	}
	select {
	case r.segments <- s:
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

func (r *run) readSegment(entries []entry) func(*worker) func() {
	return func(w *worker) func() {
		defer w.leave()
		done := make([]*reading, len(entries))
		for i := range entries {
			if e := &entries[i]; !e.hit && r.ctx.Err() == nil {
				done[i] = r.readFile(w, e)
			}
		}
		return func() {
			for i, result := range done {
				entries[i].reading = result
			}
		}
	}
}

// readFile reads and parses one file. It returns nil if the file is gone.
func (r *run) readFile(w *worker, e *entry) *reading {
	w.tick()
	name := string(e.name)
	full := join(e.dir.path, name)
	var st status
	var data []byte
	read := func() (err error) {
		st, data, err = w.read(full, name, e)
		return err
	}
	var err error
	if e.link {
		err = w.followLink(full, read)
	} else {
		err = read()
	}
	defer w.forget()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errForbidden) {
		return nil
	}
	if err != nil {
		return &reading{problem: cause(err)}
	}
	w.rest() // a slow key derivation must not look like a hung disk
	result := &reading{}
	if err := r.guard(full, func() error {
		result.outcome = r.parse(name, data, e.owner)
		return nil
	}); err != nil {
		return &reading{problem: err.Error()}
	}
	if result.outcome == nil {
		return &reading{unread: true}
	}
	if oldest := time.Now().Add(-r.s.racy).UnixNano(); st.modified < oldest && st.changed < oldest {
		result.stamp = appendStamp(nil, st)
	}
	return result
}

// errForbidden means that a path no longer leads to the file that the walk saw, and that the file
// it leads to must not be read.
var errForbidden = errors.New("the path leads to a file that must not be read")

// mayRead decides whether to read a file that is open only as a handle: its path may have changed
// since the walk checked it.
func (r *run) mayRead(handle int, st *syscall.Stat_t, e *entry) error {
	if !e.link && statusOf(st).identity == e.identity {
		return nil
	}
	real, err := pathOf(handle)
	if err != nil {
		return fmt.Errorf("find out where the path leads: %w", err)
	}
	if r.forbidden(real) != "" {
		return errForbidden
	}
	return nil
}

// open opens a file for reading. A file that is not a link is opened by its name in the directory
// where the walk saw it, if that is still the same directory. That is as safe as checking the
// target of a path first: the directory is not one of the agent's own, no link is followed, and
// only users who may write to the directory can have replaced the file. They could have put a pipe
// or a socket there, which open neither waits for nor affects, but not a device, which only root
// can create. The file is checked again once it is open.
func (w *worker) open(full, name string, e *entry) (int, error) {
	flags := syscall.O_RDONLY | syscall.O_NONBLOCK | syscall.O_NOCTTY | syscall.O_CLOEXEC
	if !e.link {
		flags |= syscall.O_NOFOLLOW
		if dir, ok := w.directoryOf(e); ok {
			return openIn(dir, name, flags)
		}
	}
	return openWithoutAtime(full, flags, func(handle int, st *syscall.Stat_t) error { return w.r.mayRead(handle, st, e) })
}

// directoryOf returns a handle of the directory that e was seen in. It reports false if the path
// now leads to another directory.
func (w *worker) directoryOf(e *entry) (fd int, ok bool) {
	if w.inside != e.dir {
		w.leave()
		w.enter(e.dir)
	}
	return w.dir, w.dir >= 0
}

func (w *worker) enter(n *node) {
	w.inside, w.dir = n, -1
	fd, err := openDirectory(n)
	if err != nil {
		return
	}
	if now, err := statusOfOpen(fd); err != nil || now.identity != n.self.identity {
		syscall.Close(fd)
		return
	}
	w.dir = fd
}

// leave closes the directory that the worker entered last, if any.
func (w *worker) leave() {
	if w.inside != nil && w.dir >= 0 {
		syscall.Close(w.dir)
	}
	w.inside = nil
}

// read returns the bytes of a file, or none if its head shows that it cannot hold a certificate.
// They are valid until the next call.
func (w *worker) read(full, name string, e *entry) (status, []byte, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = w.open(full, name, e)
		return err
	})
	if err != nil {
		return status{}, nil, err
	}
	defer syscall.Close(fd)
	now, err := statusOfOpen(fd)
	if err != nil {
		return status{}, nil, err
	}
	if !now.isRegular() || now.size > MaxFileSize {
		return now, nil, nil // it changed after the walk saw it; the next scan counts it correctly
	}
	// Data appended from here on changes the status, so the next scan reads the file again.
	size := int(now.size)
	data, err := w.fill(fd, 0, min(size, certfile.HeadSize))
	if err != nil || !certfile.WorthReading(name, data) {
		return now, nil, err
	}
	data, err = w.fill(fd, len(data), size)
	return now, data, err
}

// fill extends the buffer, which holds have bytes of the file, to size bytes.
func (w *worker) fill(fd, have, size int) ([]byte, error) {
	for have < size {
		if have == len(w.buffer) {
			grown := make([]byte, min(max(4*len(w.buffer), 16<<10), MaxFileSize+1))
			copy(grown, w.buffer[:have])
			w.forget()
			w.buffer = grown
		}
		n, err := 0, error(nil)
		err = retry(func() (err error) {
			n, err = syscall.Read(fd, w.buffer[have:min(size, len(w.buffer))])
			return err
		})
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		have += n
		w.used = have
	}
	return w.buffer[:have], nil
}

// forget clears the buffer, which may hold a private key.
func (w *worker) forget() {
	clear(w.buffer[:w.used])
	w.used = 0
}

// appendStamp appends the part of a status that changes whenever the file does.
func appendStamp(b []byte, s status) []byte {
	b = binary.AppendUvarint(b, s.dev)
	b = binary.AppendUvarint(b, s.ino)
	b = binary.AppendUvarint(b, uint64(s.size))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.modified))
	return binary.LittleEndian.AppendUint64(b, uint64(s.changed))
}

func (r *run) openIndex() (closeOld func()) {
	o := r.s.opts
	if o.State == nil {
		return func() {}
	}
	old, err := index.Open(o.State, o.Index, o.Dirs)
	r.old = old
	r.writer = index.NewWriter(o.State, o.Index, o.Dirs, old)
	switch {
	case err == nil:
		return func() { old.Close() }
	case errors.Is(err, index.ErrDamaged), errors.Is(err, index.ErrForeign):
		o.Log.Info("index of the last scan discarded: every file is read again", "reason", err.Error())
	case !errors.Is(err, fs.ErrNotExist):
		o.Log.Warn("index of the last scan not readable: every file is read again", "error", err.Error())
	}
	return func() {}
}

// lookUp finds a file in the old index by reading the index up to that file. It reports false if
// the file is new, has changed, or must be retried with new passwords.
func (r *run) lookUp(n *node, f *file) (index.File, bool) {
	for r.advance() {
		order := r.oldFile.Compare(n.root, n.path, f.name)
		if order > 0 {
			break
		}
		r.haveOld = false
		if order == 0 {
			unchanged := bytes.Equal(appendStamp(make([]byte, 0, 64), f.status), r.oldFile.Stamp)
			return r.oldFile, unchanged && !(r.retryLocked && certfile.Outcome(r.oldFile.Outcome).Locked())
		}
		r.markRemoved()
	}
	return index.File{}, false
}

// markRemoved records that a file of the old index is gone, so the new index differs from here on.
func (r *run) markRemoved() {
	if r.open == nil {
		r.open = &segment{}
	}
	r.open.removed = true
}

// advance sets oldFile to the next file of the old index. It reports whether there is one.
func (r *run) advance() bool {
	if r.haveOld || r.old == nil {
		return r.haveOld
	}
	var err error
	r.oldFile, err = r.old.Next()
	switch {
	case err == nil:
		r.haveOld = true
	case err != io.EOF:
		r.s.opts.Log.Warn("rest of the last scan's index discarded", "error", err.Error())
		r.markRemoved()
		r.old = nil
	default:
		r.old = nil
	}
	return r.haveOld
}

func (r *run) emitAll() error {
	for {
		select {
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		case s, more := <-r.segments:
			if !more {
				// Cancelled tasks omit files, so the scan is incomplete.
				return cmp.Or(r.emitBatch(), context.Cause(r.ctx))
			}
			if err := r.emitSegment(s); err != nil {
				return err
			}
		}
	}
}

func (r *run) emitSegment(s *segment) error {
	if s.task != nil {
		if err := r.wait(s.task, s.entries[0].dir.shown); err != nil {
			return err
		}
	}
	if s.removed && r.writer != nil {
		r.writer.Diverge()
	}
	for i := range s.entries {
		if err := r.emitEntry(&s.entries[i]); err != nil {
			return err
		}
	}
	for range s.units {
		<-r.budget
	}
	return nil
}

func (r *run) emitEntry(e *entry) error {
	var outcome certfile.Outcome
	switch {
	case e.hit:
		outcome = e.kept.Outcome
		if r.writer != nil {
			r.writer.Keep(e.kept)
		}
	case e.reading == nil:
		return nil
	case e.unread:
		r.unread.note(e)
		return nil
	default:
		r.summary.Read++
		outcome = e.outcome
		if r.writer != nil && e.stamp != nil {
			r.writer.Add(e.dir.root, e.dir.path, e.name, e.stamp, outcome)
		}
		if e.problem != "" {
			r.problems.add(join(e.dir.shown, string(e.name)), e.problem)
			return nil
		}
	}
	r.last = entry{dir: e.dir, file: file{name: e.name}}
	if outcome.Empty() {
		return nil
	}
	if !r.mayReport(e.owner) {
		r.unreported.note(e)
		return nil
	}
	path := join(e.dir.shown, string(e.name))
	source := api.TextOfPath(path)
	return outcome.Report(source,
		func(cert api.DiscoveredCertificate) error {
			r.summary.Formats[cert.SourceFormat]++
			r.s.found.Add(1)
			size := weight(cert)
			r.reported[countedAs(r.reported, e.owner)] += size
			r.batch = append(r.batch, cert)
			if r.batchBytes += size; len(r.batch) < emitAtOnce && r.batchBytes < emitBytes {
				return nil
			}
			return r.emitBatch()
		},
		func(cause string) { r.problems.add(path, cause) })
}

// weight estimates how many bytes of memory a certificate takes.
func weight(c api.DiscoveredCertificate) int {
	const header = 16 // bytes of a string header
	size := len(c.PEMData) + len(c.SubjectDN) + len(c.IssuerDN) + len(c.CommonName) + len(c.SerialNumber)
	for _, san := range c.SANs {
		size += header + len(san)
	}
	return size
}

func (r *run) emitBatch() error {
	if len(r.batch) == 0 {
		return nil
	}
	// Segments that were in flight when the scan was cancelled still arrive here.
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	err := r.emit(r.batch)
	clear(r.batch)
	r.batch, r.batchBytes = r.batch[:0], 0
	return err
}

// finishIndex replaces the old index with the new one. After an interrupted scan the new index
// keeps the old records of the files that the scan did not reach.
func (r *run) finishIndex(scanned error) {
	if r.writer == nil {
		return
	}
	if _, panicked := errors.AsType[*panicError](scanned); panicked || errors.Is(scanned, certfile.ErrDamaged) {
		r.writer.Abandon()
		if !panicked {
			// Its checksums are correct, so it would fail every scan.
			_ = r.s.opts.State.Remove(r.s.opts.Index)
		}
		return
	}
	if scanned != nil {
		if r.last.dir == nil {
			r.writer.KeepAfter(-1, "", nil)
		} else {
			r.writer.KeepAfter(r.last.dir.root, r.last.dir.path, r.last.name)
		}
	} else if r.advance() {
		r.writer.Diverge() // the remaining files of the old index are gone
	}
	if err := r.writer.Commit(); err != nil {
		r.s.opts.Log.Warn("index not written: the next scan reads every file again", "error", err.Error())
	}
}
