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
	// segmentFiles and segmentBytes are how much is read in one task.
	segmentFiles = 512
	segmentBytes = 256 << 10

	// readAhead bounds the files that are read, or wait to be emitted, in
	// bytes, in units of readUnit. It decides how much memory a scan takes.
	readAhead = 2 << 20
	readUnit  = 32 << 10

	// emitAtOnce and emitBytes are how many certificates are handed out at a
	// time. One certificate may be larger.
	emitAtOnce = 64
	emitBytes  = 256 << 10

	// racyWindow is how long a file must have been left alone before what was read of it is
	// believed later. A file system's clock may tick as slowly as every two seconds, and a change
	// within one tick leaves all times as they are.
	racyWindow = 2 * time.Second
)

type identity struct{ dev, ino uint64 }

// run is one scan. Fields without a remark are set before its goroutines start.
//
// The walk (one goroutine) goes through the directories in order, beside it the old index; it hands
// segments to the goroutine that emits, and what has to be read to the workers.
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
	budget   chan struct{} // a token for each readUnit in flight
	workers  sync.WaitGroup

	coveredMu   sync.Mutex
	coveredDirs map[string]bool // guarded by coveredMu: whether the walk lists a directory, by its real path

	anyFile  bool              // a root is a file; set before the walk begins
	named    sync.Map          // mount points of hung file systems already named
	linked   map[identity]bool // files reached by links; owned by the walk
	open     *segment          // being filled; owned by the walk
	filled   int               // entries of the segment before it; owned by the walk
	old      *index.Reader
	oldFile  index.File // next of the old index, when haveOld; owned by the walk
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
	last       entry          // the last one that was emitted: its directory and name
	unread     leftOut        // for lack of processor time
	reported   map[uint32]int // the weight of the certificates of each user's files
	unreported leftOut        // for lack of room among those
}

// segment is a number of files in the order of the walk, of which those that
// are not in the index are read by one task.
type segment struct {
	*task   // nil: nothing to read
	entries []entry
	units   int    // of the budget
	gone    bool   // a file of the old index is not there any more
	bytes   int64  // that its entries hold, or read
	block   int64  // of the old index, the last one that an entry is in
	reads   bool   // a file is to be read
	on      string // mount point of all that is to be read
}

// entry is a file in a segment: as the index has it, or to be read.
type entry struct {
	dir *node
	file
	hit  bool
	kept index.File // when hit

	*reading // when read
}

// reading is what came of a file that was opened.
type reading struct {
	outcome certfile.Outcome
	stamp   []byte // nil: not to be remembered
	problem string
	unread  bool // its owner's processor time is used up
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
		r.s.opts.Log.Warn("mounted file systems are not known: all count as local", "error", err.Error())
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
	r.nameLeftOut()
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

// guard turns a panic into an error: what a stranger's file can do to a scan
// must not end the agent.
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

// awaitWorkers leaves behind only workers that hang.
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

// join compares the files of a directory, or of a part, with the old index.
func (r *run) join(n *node) error {
	for i := range n.files {
		f := &n.files[i]
		if f.link {
			// A file that several links lead to counts once.
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
	// An entry of the index holds the whole block that it is in.
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

// readFile looks into one file. It returns nil when the file is gone.
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
		err = w.following(full, read)
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
	w.rest() // a slow key derivation must not count as a hung disk
	result := &reading{}
	if err := r.guard(full, func() error {
		result.outcome = r.lookInto(name, data, e.owner)
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

// errForbidden: a file is not what its path promised, and it is not to be read.
var errForbidden = errors.New("the path leads to a file that is not to be read")

// mayRead decides about a file that is open by handle only: a path that was
// looked at before may lead anywhere by now.
func (r *run) mayRead(handle int, st *syscall.Stat_t, e *entry) error {
	if !e.link && statusOf(st).identity == e.identity {
		return nil
	}
	real, err := pathOf(handle)
	if err != nil {
		return fmt.Errorf("where it leads cannot be checked: %w", err)
	}
	if r.forbidden(real) != "" {
		return errForbidden
	}
	return nil
}

// open opens a file to be read. One that is in the directory where the walk saw it is opened there
// by its name alone. That is as safe as to look at what a path leads to first: the directory is none
// of the agent's own, no link is followed on the way, and what is there under the name now, instead
// of the file that was seen, was put into that directory by somebody who may do so. That can be a
// pipe or a socket, for which opening does not wait and has no effect, but no device, which only
// root can make; what was opened is checked before it is read.
func (w *worker) open(full, name string, e *entry) (int, error) {
	flags := syscall.O_RDONLY | syscall.O_NONBLOCK | syscall.O_NOCTTY | syscall.O_CLOEXEC
	if !e.link {
		flags |= syscall.O_NOFOLLOW
		if dir, same := w.directoryOf(e); same {
			return openIn(dir, name, flags)
		}
	}
	return openWithoutAtime(full, flags, func(handle int, st *syscall.Stat_t) error { return w.r.mayRead(handle, st, e) })
}

// directoryOf is a handle of the directory of a file, unless there is another one under its path
// now.
func (w *worker) directoryOf(e *entry) (fd int, same bool) {
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

// leave closes the directory that was entered last.
func (w *worker) leave() {
	if w.inside != nil && w.dir >= 0 {
		syscall.Close(w.dir)
	}
	w.inside = nil
}

// read returns the bytes of a file, or none when its head tells that there is
// nothing in it. They are valid until the next call.
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
		return now, nil, nil // it changed since; the next scan counts it as what it is
	}
	// What is added to it from here on changes its status, and the next scan reads it again.
	size := int(now.size)
	data, err := w.fill(fd, 0, min(size, certfile.HeadSize))
	if err != nil || !certfile.WorthReading(name, data) {
		return now, nil, err
	}
	data, err = w.fill(fd, len(data), size)
	return now, data, err
}

// fill reads into the buffer from have on, up to size bytes in all.
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

// forget clears what was read: it may have been a private key.
func (w *worker) forget() {
	clear(w.buffer[:w.used])
	w.used = 0
}

// appendStamp is what tells that a file is unchanged.
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
		o.Log.Info("index of the last scan thrown away: every file is read again", "reason", err.Error())
	case !errors.Is(err, fs.ErrNotExist):
		o.Log.Warn("index of the last scan not read: every file is read again", "error", err.Error())
	}
	return func() {}
}

// lookUp finds a file in the old index, which is read on up to there.
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
		r.noteGone()
	}
	return index.File{}, false
}

// noteGone: the new index differs from here on.
func (r *run) noteGone() {
	if r.open == nil {
		r.open = &segment{}
	}
	r.open.gone = true
}

// advance makes oldFile the next of the old index.
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
		r.s.opts.Log.Warn("index of the last scan thrown away from here on", "error", err.Error())
		r.noteGone()
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
				// A cancelled task leaves files out: the scan is not complete.
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
	if s.gone && r.writer != nil {
		r.writer.Differ()
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

// weight is about how many bytes of memory a certificate takes.
func weight(c api.DiscoveredCertificate) int {
	const header = 16 // of a string
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
	// What the walk and the workers had in hand when the scan was cancelled comes here afterwards.
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	err := r.emit(r.batch)
	clear(r.batch)
	r.batch, r.batchBytes = r.batch[:0], 0
	return err
}

// finishIndex puts the new index in place. That of a scan that was broken off
// has what the old one knew of the files it did not come to.
func (r *run) finishIndex(scanned error) {
	if r.writer == nil {
		return
	}
	if _, panicked := errors.AsType[*panicError](scanned); panicked || errors.Is(scanned, certfile.ErrDamaged) {
		r.writer.Abandon()
		if !panicked {
			// Its checksums are right: it would fail every scan alike.
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
		r.writer.Differ() // what is left of the old one is gone
	}
	if err := r.writer.Commit(); err != nil {
		r.s.opts.Log.Warn("index not written: the next scan reads every file", "error", err.Error())
	}
}
