package discovery

import (
	"bytes"
	"context"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestWorkers: a scan adapts to the parallelism of the process, and does not change it.
func TestWorkers(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	for procs, want := range map[int]int{1: 2, 2: 2, 3: min(3, maxWorkers), 1000: maxWorkers} {
		runtime.GOMAXPROCS(procs)
		if got := workers(); got != want {
			t.Errorf("%d workers for %d processors, want %d", got, procs, want)
		}
		if got := runtime.GOMAXPROCS(0); got != procs {
			t.Errorf("GOMAXPROCS went from %d to %d", procs, got)
		}
	}
}

// TestHungWorkerReturnsJustThen: a worker that returns while the watch is about to replace it has
// done its task, and its mount does not count as hung.
func TestHungWorkerReturnsJustThen(t *testing.T) {
	var log bytes.Buffer
	s := newScanner(t, Options{Dirs: []string{t.TempDir()}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	s.stall = 20 * time.Millisecond
	ctx, cancel := context.WithCancelCause(t.Context())
	r := &run{s: s, ctx: ctx, cancel: cancel, began: time.Now(), tasks: make(chan *task, 1)}
	returns, committed := make(chan bool), false
	slow := newTask("/mnt", func(*worker) func() {
		<-returns
		return func() { committed = true }
	})
	w := r.newWorker()
	r.tasks <- slow
	watched := make(chan bool)
	for w.task.Load() == nil {
		time.Sleep(time.Millisecond)
	}
	s.mu.Lock()
	go func() {
		r.watch([]*worker{w})
		close(watched)
	}()
	time.Sleep(10 * s.stall) // the watch has found it hung, and waits to count it
	returns <- true
	<-slow.done
	s.mu.Unlock()
	time.Sleep(10 * s.stall)
	cancel(nil)
	<-watched
	r.workers.Wait()
	if !committed || slow.err != nil {
		t.Errorf("committed %v, error %v, want that the task is done", committed, slow.err)
	}
	if s.isHung("/mnt") {
		t.Error("the mount counts as hung")
	}
	if strings.Contains(log.String(), "does not answer") {
		t.Errorf("log: %s", &log)
	}
}

// TestStampOfEveryField: a file that changed in any way is read again.
func TestStampOfEveryField(t *testing.T) {
	base := status{identity: identity{dev: 1, ino: 2}, size: 3, modified: 4, changed: 5}
	for name, change := range map[string]func(*status){
		"device": func(s *status) { s.dev++ }, "inode": func(s *status) { s.ino++ }, "size": func(s *status) { s.size++ },
		"modification": func(s *status) { s.modified++ }, "change": func(s *status) { s.changed++ },
	} {
		other := base
		change(&other)
		if bytes.Equal(appendStamp(nil, base), appendStamp(nil, other)) {
			t.Errorf("another %s has the same stamp", name)
		}
	}
}
