package discovery

import (
	"context"
	"errors"
	"path"
	"sync/atomic"
	"time"

	"certctl-agent/internal/api"
)

// A call on a file system whose server is gone may never return. So every access to a scanned file
// is a task: a worker performs it, and the scan waits for it for a bounded time. A worker that
// hangs is abandoned and replaced; if it returns later, its result is ignored.

const (
	// maxHung bounds the workers that hang at one time, across all scans.
	maxHung = 16

	// cancelGrace is how long a cancelled scan waits for its workers. They check for cancellation
	// after each file, so only a hung worker takes longer.
	cancelGrace = 50 * time.Millisecond

	// After restAfter of processor time, a worker of a gentle scan rests restFactor times as long
	// as it worked, but at most maxRest: key stores that are deliberately slow must not delay the
	// other files for hours. Their own time is bounded in effort.go.
	restAfter  = 2 * time.Millisecond
	restFactor = 99
	maxRest    = time.Second
)

var (
	errHung     = errors.New("the file system does not answer")
	errManyHung = errors.New("too many file systems do not answer: scan aborted")
)

// task is one piece of work on a file system. The results of do take effect in commit, so an
// abandoned worker changes nothing when it returns.
type task struct {
	mount string
	do    func(*worker) (commit func())
	done  chan struct{}

	err error // errHung, or nil; set before done is closed
}

// worker is one thread of a scan.
type worker struct {
	r      *run
	active atomic.Int64           // start of its current call, in ns since the scan began; 0 if none
	task   atomic.Pointer[task]   // current task; the goroutine that swaps it for nil ends the task
	link   atomic.Pointer[string] // symbolic link that it is following, or nil
	blamed string                 // path that hangs; set before task is swapped for nil
	buffer []byte                 // bytes of the current file
	used   int                    // how much of buffer is filled
	rested time.Duration          // its thread's processor time at its last rest
	inside *node                  // directory whose files it reads, or nil
	dir    int                    // handle of inside, or -1
}

// tick records the start of a call on a file system.
func (w *worker) tick() { w.active.Store(int64(max(time.Since(w.r.began), 1))) }

// rest records that no call on a file system is in progress.
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

// wait waits for a task. A hung file system is not an error of the scan: it is reported once, and
// the walk continues elsewhere.
func (r *run) wait(t *task, path string) error {
	select {
	case <-t.done:
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
	if t.err == nil {
		return nil
	}
	if _, reported := r.hung.LoadOrStore(t.mount, true); !reported {
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
			if !more || !r.perform(w, t) {
				return
			}
			w.pause()
		}
	}
}

// pause lets a worker of a gentle scan rest restFactor times as long as it worked. Only processor
// time counts, so waiting for a disk or a busy processor does not lengthen the rest.
func (w *worker) pause() {
	if w.r.s.rest == nil {
		return
	}
	if worked := threadTime() - w.rested; worked >= restAfter {
		_ = w.r.s.rest(w.r.ctx, min(restFactor*worked, maxRest))
		w.rested = threadTime()
	}
}

// sleep waits for d. It returns an error if ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// perform runs a task. It reports false if the worker must end: it has been replaced or has
// panicked.
func (r *run) perform(w *worker, t *task) bool {
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

// followLink calls f, which follows a symbolic link. If f hangs, worker blames the link rather than
// its mount: the target may be on another file system.
func (w *worker) followLink(link string, f func() error) error {
	if w.r.s.isHung(link) {
		return errHung
	}
	w.link.Store(&link)
	defer w.link.Store(nil)
	w.tick()
	return f()
}

// watch replaces hung workers until the scan ends.
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
			// Count it first: the worker may return at any moment.
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
				r.queue(t) // isHung(link) now makes it skip the link
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

// countHung adds change to the hung calls on mount and returns the total on all file systems.
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

// mounts are the file systems that were mounted when the scan began, by mount point.
type mounts map[string]mount

// of returns the file system that a real path is on.
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

// mayEnter reports whether the walk may enter a directory that is on another device than its
// parent: a subvolume, which is not a mount, or a local file system mounted after the table was
// read.
func (m mounts) mayEnter(real string) bool {
	if found, ok := m[real]; ok {
		return found.local
	}
	table, err := mountTable()
	found, mounted := table[real]
	return err == nil && (!mounted || found.local)
}
