package discovery

import (
	"errors"
	"path"
	"sync/atomic"
	"time"
)

// A file system whose server is gone does not return from a call at all. So
// everything that touches a scanned file is a task: a worker does it, and the
// scan waits for it within bounds. A worker that hangs is given up and
// replaced; what it returns one day is not looked at.

const (
	// maxHung bounds the workers that hang at one time, over all scans.
	maxHung = 16

	// cancelGrace is how long a cancelled scan waits for its workers. They
	// look for it between files; none but a hung one needs longer.
	cancelGrace = 50 * time.Millisecond
)

var (
	errHung     = errors.New("the file system does not answer")
	errManyHung = errors.New("too many file systems do not answer: the scan was given up")
)

// task is one piece of work on a file system.
type task struct {
	mount   string
	do      func(*worker) (commit func())
	claimed atomic.Bool // by the worker with a result, or by who gave it up
	done    chan struct{}
	err     error // errHung, or nil; set before done is closed
}

// worker is one thread of a scan.
type worker struct {
	r      *run
	active atomic.Int64         // when its last call began, ns since the scan began; 0: none
	task   atomic.Pointer[task] // what it works on
	buffer []byte               // of the file that is read
	used   int                  // bytes of buffer that hold some of it
}

// tick says that a call on a file system begins.
func (w *worker) tick() { w.active.Store(int64(max(time.Since(w.r.began), 1))) }

// rest says that what follows is no call on a file system.
func (w *worker) rest() { w.active.Store(0) }

func newTask(mount string, do func(*worker) (commit func())) *task {
	return &task{mount: mount, do: do, done: make(chan struct{})}
}

// queue gives a task to the workers.
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
		return r.ctx.Err()
	}
	if t.err != nil && !r.named[t.mount] {
		r.named[t.mount] = true
		r.problems.add(printablePath(path) + ": " + t.err.Error() + "; everything on " + printablePath(t.mount) + " is skipped")
	}
	return nil
}

// work is the life of a worker.
func (r *run) work(w *worker) {
	for {
		select {
		case <-r.ctx.Done():
			return
		case t, more := <-r.tasks:
			if !more || !r.carryOut(w, t) {
				return
			}
		}
	}
}

// carryOut does a task and reports whether the worker is still wanted.
func (r *run) carryOut(w *worker, t *task) bool {
	if r.s.isHung(t.mount) {
		t.giveUp()
		return true
	}
	w.task.Store(t)
	w.tick()
	commit := t.do(w)
	w.rest()
	if !t.claimed.CompareAndSwap(false, true) {
		r.s.countHung(t.mount, -1)
		return false
	}
	commit()
	close(t.done)
	return true
}

// giveUp ends a task without a result, unless it has one.
func (t *task) giveUp() bool {
	if !t.claimed.CompareAndSwap(false, true) {
		return false
	}
	t.err = errHung
	close(t.done)
	return true
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
			active := w.active.Load()
			if active == 0 || time.Since(r.began)-time.Duration(active) < r.s.stall {
				continue
			}
			t := w.task.Load()
			if w.active.Load() != active {
				continue // it came back, and t may be another task
			}
			// Counted first: the worker may come back at any moment.
			total := r.s.countHung(t.mount, 1)
			if !t.giveUp() {
				r.s.countHung(t.mount, -1)
				continue
			}
			r.s.opts.Log.Warn("file system does not answer", "mount", t.mount)
			if total >= maxHung {
				r.cancel(errManyHung)
				return
			}
			workers[i] = r.newWorker()
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

// mounts is what is mounted where, as of the start of the scan.
type mounts struct{ table map[string]mount }

// at is what is mounted at exactly this path.
func (m *mounts) at(real string) (mount, bool) {
	found, ok := m.table[real]
	return found, ok
}

// of is the file system that a path is on.
func (m *mounts) of(real string) mount {
	for {
		if found, ok := m.table[real]; ok {
			return found
		}
		if real == "/" || real == "." || real == "" {
			return mount{point: "/", local: true}
		}
		real = path.Dir(real)
	}
}

// mayEnter reports whether a directory on another device than its parent may
// be entered: a subvolume, which is no mount, or a local file system that was
// mounted since the table was read.
func (m *mounts) mayEnter(real string) bool {
	if found, ok := m.table[real]; ok {
		return found.local
	}
	table, err := mountTable()
	if err != nil {
		return false
	}
	found, mounted := table[real]
	return !mounted || found.local
}
