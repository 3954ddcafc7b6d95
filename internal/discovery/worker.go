package discovery

import (
	"context"
	"errors"
	"path"
	"sync/atomic"
	"time"

	"certctl-agent/internal/api"
)

// A file system whose server is gone does not return from a call at all. So everything that touches
// a scanned file is a task: a worker does it, and the scan waits for it within bounds. A worker
// that hangs is given up and replaced; what it returns one day is not looked at.

const (
	// maxHung bounds the workers that hang at one time, over all scans.
	maxHung = 16

	// cancelGrace is how long a cancelled scan waits for its workers. They
	// look for it between files; none but a hung one needs longer.
	cancelGrace = 50 * time.Millisecond

	// A worker of a gentle scan rests after restAfter of processor time, restFactor times as long,
	// but not longer than maxRest: key stores that are made to be slow, whose time is bounded
	// elsewhere, must not keep a scan from the other files for hours.
	restAfter  = 2 * time.Millisecond
	restFactor = 99
	maxRest    = time.Second
)

var (
	errHung     = errors.New("the file system does not answer")
	errManyHung = errors.New("too many file systems do not answer: the scan was given up")
)

// task is one piece of work on a file system. What do has found takes effect by commit, so that a
// worker that was given up changes nothing when it comes back.
type task struct {
	mount string
	do    func(*worker) (commit func())
	done  chan struct{}

	err error // errHung, or nil; set before done is closed
}

// worker is one thread of a scan.
type worker struct {
	r      *run
	active atomic.Int64           // when its last call began, ns since the scan began; 0: none
	task   atomic.Pointer[task]   // what it works on; the goroutine that takes it away ends the task
	link   atomic.Pointer[string] // the symbolic link it follows, or nil
	blamed string                 // what hangs; set before task is taken away
	buffer []byte                 // of the file that is read
	used   int                    // bytes of buffer that hold some of it
	rested time.Duration          // its thread's processor time when it rested last
	inside *node                  // the directory whose files are read, or nil
	dir    int                    // its handle, or -1
}

// tick says that a call on a file system begins.
func (w *worker) tick() { w.active.Store(int64(max(time.Since(w.r.began), 1))) }

// rest says that no call on a file system is under way.
func (w *worker) rest() { w.active.Store(0) }

func newTask(mount string, do func(*worker) (commit func())) *task {
	return &task{mount: mount, do: do, done: make(chan struct{})}
}

func (r *run) queue(t *task) {
	select {
	case r.tasks <- t:
	case <-r.ctx.Done():
	}
}

// wait waits for a task. That its file system hangs is not an error of the
// scan: it is named once, and the walk goes on elsewhere.
func (r *run) wait(t *task, path string) error {
	select {
	case <-t.done:
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
	if t.err == nil {
		return nil
	}
	if _, named := r.named.LoadOrStore(t.mount, true); !named {
		r.problems.add(path, t.err.Error()+"; everything on "+api.TextOfPath(t.mount)+" is skipped")
	}
	return nil
}

func (r *run) work(w *worker) {
	for {
		select {
		case <-r.ctx.Done():
			return
		case t, more := <-r.tasks:
			if !more || !r.carryOut(w, t) {
				return
			}
			w.pause()
		}
	}
}

// pause lets a worker of a gentle scan rest restFactor times as long as it worked. What counts is
// the processor's time: a scan that waits, for a disk or because others keep the processors busy,
// does not wait for this, too.
func (w *worker) pause() {
	if w.r.s.rest == nil {
		return
	}
	if worked := threadTime() - w.rested; worked >= restAfter {
		_ = w.r.s.rest(w.r.ctx, min(restFactor*worked, maxRest))
		w.rested = threadTime()
	}
}

// sleep waits, and fails when ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// carryOut does a task and reports whether the worker is still wanted.
func (r *run) carryOut(w *worker, t *task) bool {
	if r.s.isHung(t.mount) {
		t.err = errHung
		close(t.done)
		return true
	}
	w.task.Store(t)
	w.tick()
	var commit func()
	if err := r.guard("worker", func() error { commit = t.do(w); return nil }); err != nil {
		r.cancel(err)
		return false
	}
	w.rest()
	if !w.task.CompareAndSwap(t, nil) {
		r.s.countHung(w.blamed, -1)
		return false
	}
	commit()
	close(t.done)
	return true
}

// following does f, which follows a symbolic link. Where that leads may hang
// when the file system of the link does not, so it is the link that is blamed.
func (w *worker) following(link string, f func() error) error {
	if w.r.s.isHung(link) {
		return errHung
	}
	w.link.Store(&link)
	defer w.link.Store(nil)
	w.tick()
	return f()
}

// watch replaces workers that hang, until the scan ends.
func (r *run) watch(workers []*worker) {
	ticker := time.NewTicker(r.s.stall / 4)
	defer ticker.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-ticker.C:
		}
		for i, w := range workers {
			t, link := w.task.Load(), w.link.Load()
			active := w.active.Load()
			if t == nil || active == 0 || time.Since(r.began)-time.Duration(active) < r.s.stall {
				continue
			}
			w.blamed = t.mount
			if link != nil {
				w.blamed = *link
			}
			// Counted first: the worker may come back at any moment.
			total := r.s.countHung(w.blamed, 1)
			if !w.task.CompareAndSwap(t, nil) {
				r.s.countHung(w.blamed, -1)
				continue
			}
			r.s.opts.Log.Warn("file system does not answer", "path", w.blamed)
			if total >= maxHung {
				r.cancel(errManyHung)
				return
			}
			workers[i] = r.newWorker()
			if link != nil {
				r.queue(t) // without the link, this time
				continue
			}
			t.err = errHung
			close(t.done)
		}
	}
}

func (s *Scanner) isHung(mount string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hung[mount] > 0
}

// countHung returns how many calls hang on all file systems together.
func (s *Scanner) countHung(mount string, change int) (total int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hung[mount] += change; s.hung[mount] == 0 {
		delete(s.hung, mount)
	}
	for _, n := range s.hung {
		total += n
	}
	return total
}

// mount is a mounted file system.
type mount struct {
	point string
	local bool
}

// mounts are the mounted file systems by mount point, as of the start of the scan.
type mounts map[string]mount

// of is the file system that a path is on.
func (m mounts) of(real string) mount {
	for {
		if found, ok := m[real]; ok {
			return found
		}
		if real == "/" || real == "." || real == "" {
			return mount{point: "/", local: true}
		}
		real = path.Dir(real)
	}
}

// mayEnter reports whether a directory on another device than its parent may be entered: a
// subvolume, which is not a mount, or a local file system that was mounted since the table was read.
func (m mounts) mayEnter(real string) bool {
	if found, ok := m[real]; ok {
		return found.local
	}
	table, err := mountTable()
	found, mounted := table[real]
	return err == nil && (!mounted || found.local)
}
