package reliability_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/testing/devplane"
)

// usage is what an agent uses in its process and on disk.
type usage struct {
	heap        uint64 // bytes, after a collection
	goroutines  int
	descriptors int // 0 if the system does not tell
	files       int
	bytes       int64 // on disk
}

func (u usage) String() string {
	return fmt.Sprintf("heap %d KiB, %d goroutines, %d descriptors, %d files with %d KiB",
		u.heap>>10, u.goroutines, u.descriptors, u.files, u.bytes>>10)
}

// measure measures the usage. Nothing may be running.
func measure(w *world) usage {
	w.plane.Forget()
	w.forget()
	synctest.Wait()
	var u usage
	runtime.GC()
	runtime.GC() // for what finalizers and pools release
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	u.heap = memory.HeapAlloc
	u.goroutines = runtime.NumGoroutine()
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		u.descriptors = len(open)
	}
	err := filepath.WalkDir(w.site.dir, func(_ string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		u.files++
		u.bytes += info.Size()
		return err
	})
	if err != nil {
		w.fail("measure: %v", err)
	}
	return u
}

// TestSoak runs one agent for a day (with -soak, otherwise for a short time) with constant
// renewals, redeployments, scans, refused commands and network errors. Its usage must not grow
// after the second hour.
func TestSoak(t *testing.T) {
	hours := 4
	if *soakFlag {
		hours = 24
	}
	begun := time.Now()
	synctest.Test(t, func(t *testing.T) {
		var servers []server
		for i := range 8 {
			servers = append(servers, server{id: fmt.Sprint("web", i), cert: fmt.Sprint("cert", i/2), chain: i%2 == 0})
		}
		w := newWorld(t, 1, servers)
		defer w.close()
		w.configure("CERTCTL_DISCOVERY_DIRS="+w.site.path("www"), "CERTCTL_DISCOVERY_INTERVAL=15m")
		w.start()
		for i := range 4 {
			w.plane.StartIssuance(fmt.Sprint("cert", i))
		}
		work := rand.New(rand.NewPCG(1, 5))
		jobs := 0
		hour := func() {
			for minute := range 60 {
				switch cert := fmt.Sprint("cert", work.IntN(4)); {
				case minute > 48: // the last minutes are for finishing
				case minute%2 == 0 && !awaiting(w.plane, cert):
					w.plane.StartRenewal(cert)
					jobs += 3
				case minute%3 == 0:
					jobs += len(w.plane.Redeploy(cert))
				}
				if minute <= 45 && work.IntN(3) == 0 {
					w.disturb()
				}
				w.setFailing(minute%10 == 0)
				time.Sleep(time.Minute)
				if minute == 48 {
					w.heal()
				}
			}
			w.waitUntilDone()
		}
		// By the second hour every target has all the backups that it keeps.
		hour()
		hour()
		first := measure(w)
		t.Logf("after 2 hours: %v", first)
		last := first
		for h := 3; h <= hours; h++ {
			hour()
			if last = measure(w); h%6 == 0 || h == hours {
				t.Logf("after %d hours: %v", h, last)
			}
		}
		// Two measurements may differ by a tenth. The leaks of a day would be more.
		for _, check := range []struct {
			what        string
			first, last float64
			slack       float64
		}{
			{"heap", float64(first.heap), float64(last.heap), 256 << 10},
			{"goroutines", float64(first.goroutines), float64(last.goroutines), 4},
			{"descriptors", float64(first.descriptors), float64(last.descriptors), 4},
			{"files on disk", float64(first.files), float64(last.files), 8},
			{"bytes on disk", float64(first.bytes), float64(last.bytes), 16 << 10},
		} {
			if check.last > check.first*1.1+check.slack {
				t.Errorf("%s grew from %.0f to %.0f", check.what, check.first, check.last)
			}
		}
		if done := w.plane.Count(devplane.CallStatus); done < jobs {
			t.Errorf("%d jobs and %d status reports", jobs, done)
		}
		t.Logf("%d hours with %d jobs, %d requests, %d of them discovery reports", hours, jobs, w.plane.Count(""),
			w.plane.Count(devplane.CallDiscoveries))
		w.verdict()
		w.report(t)
	})
	t.Logf("%v of real time", time.Since(begun).Round(100*time.Millisecond))
}
