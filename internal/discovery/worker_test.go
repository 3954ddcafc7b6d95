package discovery

import (
	"bytes"
	"runtime"
	"testing"
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
