package discovery

import (
	"io"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/needs"
)

// BenchmarkText compares a first scan of 470 MB of configuration files with a search by ripgrep or
// grep for the line that begins every certificate, and compares a rescan with find. The tree is in
// memory. It runs them in turns; only the ratios of the median times matter.
func BenchmarkText(b *testing.B) {
	n := min(*treeSize, 20_000)
	if testing.Short() {
		n = min(n, 2000)
	}
	dir := needs.MemoryDir(b)
	tree, err := corpus.Write(dir, corpus.Options{Seed: 1, Files: n, Certificates: n / 10, TextSize: 26 << 10})
	if err != nil {
		b.Fatal(err)
	}
	search := []string{"rg", "-uuu", "-laF", "--", "-----BEGIN", dir}
	if _, err := exec.LookPath(search[0]); err != nil {
		search = []string{"grep", "-rlaF", "--", "-----BEGIN", dir}
	}
	program := func(args ...string) func() {
		return func() {
			command := exec.CommandContext(b.Context(), args[0], args[1:]...)
			command.Stdout = io.Discard
			if err := command.Run(); err != nil {
				b.Fatal(args, err)
			}
		}
	}
	scan := func(s *Scanner) func() {
		return func() {
			if got := count(b, s); got != len(tree.Certificates) {
				b.Fatalf("the scan finds %d certificates, want %d", got, len(tree.Certificates))
			}
		}
	}
	first, again := newScanner(b, Options{Dirs: []string{dir}}), newScanner(b, Options{Dirs: []string{dir}})
	ways := []way{
		{name: search[0], run: program(search...), who: syscall.RUSAGE_CHILDREN},
		{name: "find", run: program("find", dir), who: syscall.RUSAGE_CHILDREN},
		{name: "first", run: scan(first), who: syscall.RUSAGE_SELF, before: func() { _ = first.opts.State.Remove(first.opts.Index) }},
		{name: "rescan", run: scan(again), who: syscall.RUSAGE_SELF},
	}
	ways[3].run()
	for b.Loop() {
		for range 11 {
			for i := range ways {
				ways[i].measure()
			}
		}
	}
	for i := range ways {
		b.ReportMetric(ways[i].ms(ways[i].wall), "ms-"+ways[i].name)
		b.ReportMetric(ways[i].ms(ways[i].processor), "cpu-ms-"+ways[i].name)
	}
	b.ReportMetric(0, "ns/op") // the sum of all ways is meaningless
	for _, pair := range [][2]*way{{&ways[2], &ways[0]}, {&ways[3], &ways[1]}} {
		names := pair[0].name + "/" + pair[1].name
		b.ReportMetric(pair[0].ms(pair[0].wall)/pair[1].ms(pair[1].wall), names)
		b.ReportMetric(pair[0].ms(pair[0].processor)/pair[1].ms(pair[1].processor), "cpu-"+names)
	}
}

// way is one of several ways to search a tree, with its measurements.
type way struct {
	name            string
	run, before     func()
	who             int // of getrusage
	wall, processor []time.Duration
}

func (w *way) measure() {
	if w.before != nil {
		w.before()
	}
	runtime.GC()
	began, used := time.Now(), processorTime(w.who)
	w.run()
	w.wall = append(w.wall, time.Since(began))
	w.processor = append(w.processor, processorTime(w.who)-used)
}

// ms returns the median in milliseconds.
func (w *way) ms(times []time.Duration) float64 {
	return 1000 * slices.Sorted(slices.Values(times))[len(times)/2].Seconds()
}

func processorTime(who int) time.Duration {
	var usage syscall.Rusage
	if syscall.Getrusage(who, &usage) != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkGentle measures how long the daemon's scan of that tree takes and which share of one
// processor it uses.
func BenchmarkGentle(b *testing.B) {
	n := min(*treeSize, 20_000)
	if testing.Short() {
		n = min(n, 2000)
	}
	dir := needs.MemoryDir(b)
	if _, err := corpus.Write(dir, corpus.Options{Seed: 1, Files: n, Certificates: n / 10, TextSize: 26 << 10}); err != nil {
		b.Fatal(err)
	}
	s := newScanner(b, Options{Dirs: []string{dir}, Gentle: true})
	ways := []way{{name: "first"}, {name: "rescan"}}
	for b.Loop() {
		_ = s.opts.State.Remove(s.opts.Index)
		for i := range ways {
			ways[i].run, ways[i].who = func() { count(b, s) }, syscall.RUSAGE_SELF
			ways[i].measure()
		}
	}
	for i := range ways {
		b.ReportMetric(ways[i].ms(ways[i].wall), "ms-"+ways[i].name)
		b.ReportMetric(100*ways[i].ms(ways[i].processor)/ways[i].ms(ways[i].wall), "cpu-%-"+ways[i].name)
	}
	b.ReportMetric(0, "ns/op")
}
