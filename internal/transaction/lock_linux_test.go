package transaction

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/needs"
)

// TestForeignLock checks that the lock of a user who runs no agent is ignored, whichever of the
// user's processes holds it now, and that root's lock is not. Messages name the holder.
func TestForeignLock(t *testing.T) {
	needs.Root(t, "becoming another user")
	tests := []struct {
		name        string
		environment []string
		counts      bool
		user        string
	}{
		{"root", nil, true, "user 0"},
		{"foreign", []string{"RUNS_AS=65534"}, false, "user 65534"},
		{"foreign, passed on", []string{"RUNS_AS=65534", "PASS=1"}, false, "user 65534"},
		{"root, passed on", []string{"PASS=1"}, true, "user 0"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			w.old(t)
			holding(t, append(test.environment, "DIR="+w.path("site"))...)
			var log bytes.Buffer
			s := w.mustEngine(t, nil)
			s.opts.Log = slog.New(slog.NewTextHandler(&log, nil))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			tx := w.renewal()
			tx.Yield = func(wait func(context.Context) error) error {
				enough := time.Minute
				if test.counts {
					enough = 100 * time.Millisecond
				}
				defer time.AfterFunc(enough, cancel).Stop()
				return wait(ctx)
			}
			_, err := s.deploy(t.Context(), tx)
			if _, busy := errors.AsType[*BusyError](err); busy != test.counts || err != nil && !busy {
				t.Fatalf("got %v", err)
			}
			said := log.String()
			if err != nil {
				w.want(t, false, "old")
				said += err.Error()
			} else {
				w.want(t, false, "new")
				if !strings.Contains(said, "level=WARN") {
					t.Error("there is no warning")
				}
			}
			for _, want := range []string{test.user, "transaction.tes", w.path("site")} {
				if !strings.Contains(said, want) {
					t.Errorf("%q is missing in: %s", want, said)
				}
			}
		})
	}
}

// TestHoldersWithoutRoot: an agent that is not root cannot read the open files of other users'
// processes, so it believes what /proc/locks says. A holder that it cannot find may be an agent.
func TestHoldersWithoutRoot(t *testing.T) {
	needs.Root(t, "becoming another user")
	const agent, other = 65534, 65533
	tests := []struct {
		name        string
		environment []string
		uids        []int // of the holders
		foreign     bool
	}{
		{"root", nil, []int{0}, false},
		{"its own user", []string{fmt.Sprint("RUNS_AS=", agent)}, []int{agent}, false},
		{"another user", []string{fmt.Sprint("RUNS_AS=", other)}, []int{other}, true},
		{"another user, passed on", []string{fmt.Sprint("RUNS_AS=", other), "PASS=1"}, nil, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := t.TempDir()
			holding(t, append(test.environment, "DIR="+path)...)
			info, err := os.Stat(path)
			check(t, err)
			found := make(chan []holder)
			go func() {
				// The thread acts as another user, and ends with the goroutine.
				runtime.LockOSThread()
				syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), agent, ^uintptr(0))
				found <- lockHolders(t.Context(), &dir{info: info})
			}()
			by := <-found
			var uids []int
			for _, h := range by {
				uids = append(uids, h.uid)
			}
			if !slices.Equal(uids, test.uids) {
				t.Fatalf("found %s, want the users %d", describe(by), test.uids)
			}
			if got := foreign(by); got != test.foreign {
				t.Errorf("foreign: %v, want %v: %s", got, test.foreign, describe(by))
			}
		})
	}
}

func TestFlockOf(t *testing.T) {
	info, err := os.Stat(t.TempDir())
	check(t, err)
	d := &dir{info: info}
	stat := statOf(d)
	device := fmt.Sprintf("%02x:%02x", stat.Dev>>8&0xfff, stat.Dev&0xff|stat.Dev>>12&^0xff)
	place := fmt.Sprintf("%s:%d", device, stat.Ino)
	tests := []struct {
		line string
		want int
	}{
		{"1: FLOCK  ADVISORY  WRITE 1234 " + place + " 0 EOF", 1234},
		{"12: FLOCK  ADVISORY  READ 7 " + place + " 0 EOF", 7},
		{"1: -> FLOCK  ADVISORY  WRITE 1234 " + place + " 0 EOF", 0}, // waits
		{"1: POSIX  ADVISORY  WRITE 1234 " + place + " 0 EOF", 0},
		{"1: FLOCK  ADVISORY  WRITE 0 " + place + " 0 EOF", 0}, // in another namespace
		{"1: FLOCK  ADVISORY  WRITE -1 " + place + " 0 EOF", 0},
		{"1: FLOCK  ADVISORY  WRITE 1234 " + place + "1 0 EOF", 0},
		{"1: FLOCK  ADVISORY  WRITE 1234 ff:ff:" + fmt.Sprint(stat.Ino) + " 0 EOF", 0},
		{"1: FLOCK  ADVISORY  WRITE 1234 " + device + " 0 EOF", 0},
		{"1: FLOCK", 0},
		{"", 0},
	}
	for _, test := range tests {
		if pid, ok := flockOf([]byte(test.line), stat); ok != (test.want != 0) || ok && pid != test.want {
			t.Errorf("%q: got %d, %v, want %d", test.line, pid, ok, test.want)
		}
	}
}
