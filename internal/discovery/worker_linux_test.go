package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/needs"
)

// mountDead mounts a FUSE file system that never answers, like a network file system whose server
// is gone. Every access hangs until the test revives it; then it fails.
func mountDead(t *testing.T, point string) (revive func()) {
	t.Helper()
	needs.Root(t, "mounting")
	fd, err := syscall.Open("/dev/fuse", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		needs.Missing(t, "cannot open FUSE: "+err.Error())
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := syscall.Mount("dead", point, "fuse", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		syscall.Close(fd)
		needs.Missing(t, "cannot mount FUSE: "+err.Error())
	}
	closed := false
	revive = func() {
		if !closed {
			closed = true
			syscall.Close(fd)
		}
	}
	t.Cleanup(func() {
		revive()
		if err := syscall.Unmount(point, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return revive
}

func TestHungMount(t *testing.T) {
	dir := t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "b", "dead")
	if err := os.MkdirAll(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a", "1.pem"), cert)
	write(t, filepath.Join(dir, "c", "2.pem"), cert)
	if err := os.Symlink(filepath.Join(dead, "cert.pem"), filepath.Join(dir, "link.pem")); err != nil {
		t.Fatal(err)
	}
	revive := mountDead(t, dead)

	t.Run("below a root it is not touched", func(t *testing.T) {
		found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{filepath.Join(dir, "b"), filepath.Join(dir, "c")}}))
		if len(found) != 1 || len(summary.Errors) != 0 || summary.Skipped[skipMount] != 1 {
			t.Errorf("found %d, errors %q, skipped %v; want the mount skipped", len(found), summary.Errors, summary.Skipped)
		}
	})
	t.Run("named as a root it is given up", func(t *testing.T) {
		s := newScanner(t, Options{Dirs: []string{dir, dead}})
		s.stall = 3 * time.Second // the other directories may be slow on a busy machine
		goroutines := runtime.NumGoroutine()
		for i := range 3 {
			found, summary := scanAll(t, s) // returns although the mount never answers
			if len(found) != 2 {
				t.Errorf("found %d certificates, want those elsewhere", len(found))
			}
			hung := slices.DeleteFunc(slices.Clone(summary.Errors), func(problem string) bool { return !strings.Contains(problem, errHung.Error()) })
			if len(hung) != 1 || !strings.Contains(hung[0], dead) {
				t.Errorf("scan %d: errors %q, want one that names the mount", i, summary.Errors)
			}
		}
		if left := runtime.NumGoroutine() - goroutines; left > 8 {
			t.Errorf("%d goroutines were left behind by three scans", left)
		}
		// When the server returns, the workers do, too.
		revive()
		for range 100 {
			if !s.isHung(dead) {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if s.isHung(dead) {
			t.Error("the mount still counts as hung")
		}
	})
}

// TestLinkToHungMount checks that only the link is missing from a scan if a link leads, through
// another, to a hung file system.
func TestLinkToHungMount(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(outside, "dead")
	if err := os.Mkdir(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "b.pem")
	write(t, filepath.Join(dir, "a.pem"), cert)
	write(t, filepath.Join(dir, "c.pem"), cert)
	if err := errors.Join(os.Symlink(filepath.Join(outside, "hop"), link), os.Symlink(filepath.Join(dead, "x.pem"), filepath.Join(outside, "hop"))); err != nil {
		t.Fatal(err)
	}
	mountDead(t, dead)
	s := newScanner(t, Options{Dirs: []string{dir}})
	s.stall = 3 * time.Second
	for range 2 {
		found, summary := scanAll(t, s)
		if len(found) != 2 || len(summary.Errors) != 1 || !strings.HasPrefix(summary.Errors[0], link+": ") {
			t.Errorf("found %d, errors %q; want 2 and one that names %s", len(found), summary.Errors, link)
		}
	}
}

func TestManyHungMountsEndTheScan(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	if err := os.Mkdir(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	mountDead(t, dead)
	s := newScanner(t, Options{Dirs: []string{dead}})
	s.stall = 50 * time.Millisecond
	s.countHung("/elsewhere", maxHung-1)
	_, err := s.Scan(t.Context(), func([]api.DiscoveredCertificate) error { return nil })
	if err != errManyHung {
		t.Errorf("error %v, want %v", err, errManyHung)
	}
}

func TestCancelWhileAMountHangs(t *testing.T) {
	dead := t.TempDir()
	mountDead(t, dead)
	s := newScanner(t, Options{Dirs: []string{dead}})
	s.stall = time.Hour // a scan that waits for the mount would not return
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Scan(ctx, nil); err == nil {
		t.Error("no error")
	}
}

func TestLowestPriority(t *testing.T) {
	dir := t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.pem"), cert)
	s, err := New(Options{Dirs: []string{dir}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	lowest := func() (n int) {
		tasks, err := filepath.Glob("/proc/self/task/*/stat")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			data, err := os.ReadFile(task)
			if err != nil {
				continue // a thread that has ended
			}
			// proc(5): the nice value is field 19, the policy 41 (5: SCHED_IDLE); field 2 ends in
			// ")".
			_, after, _ := strings.Cut(string(data), ") ")
			if fields := strings.Fields(after); len(fields) > 38 && fields[16] == "19" && fields[38] == "5" {
				n++
			}
		}
		return n
	}
	none := func() bool {
		for range 200 {
			if lowest() == 0 {
				return true
			}
			time.Sleep(5 * time.Millisecond)
		}
		return false
	}
	if !none() {
		t.Skip("threads have the lowest priority before the scan: all of this process may")
	}
	during, want := 0, workers()+1 // the walk may have ended
	if _, err := s.Scan(t.Context(), func([]api.DiscoveredCertificate) error {
		for range 200 { // on a busy host the last worker may start late
			if during = lowest(); during >= want {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if during < want {
		t.Errorf("%d threads have the lowest priority during a scan, want at least %d", during, want)
	}
	if !none() {
		t.Errorf("%d threads of the scan are still there", lowest())
	}
}

func TestUnescapeMount(t *testing.T) {
	for in, want := range map[string]string{
		`/plain`: "/plain", `/with\040blank`: "/with blank", `/a\134b\011`: "/a\\b\t", `/end\04`: `/end\04`, `/no\999`: `/no\999`,
	} {
		if got := unescapeMount(in); got != want {
			t.Errorf("unescapeMount(%q) = %q, want %q", in, got, want)
		}
	}
}
