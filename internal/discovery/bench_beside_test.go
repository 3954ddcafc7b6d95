package discovery

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

var (
	besideTree   = flag.String("beside-tree", "", "scan this directory again and again, without an index; see BenchmarkBesideNGINX")
	besideGentle = flag.Bool("beside-gentle", true, "scan as the daemon does, and not as fast as a low priority lets it")
	besideTime   = flag.Duration("beside-time", 100*time.Millisecond, "how long BenchmarkBesideNGINX measures at a time")
)

// TestScanForever is the child process of BenchmarkBesideNGINX, which kills it.
func TestScanForever(t *testing.T) {
	if *besideTree == "" {
		t.Skip("runs as the child of BenchmarkBesideNGINX")
	}
	for {
		s := newScanner(t, Options{Dirs: []string{*besideTree}, Gentle: *besideGentle})
		s.idle = runAtIdlePriority
		if _, err := s.Scan(t.Context(), func([]api.DiscoveredCertificate) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
}

// BenchmarkBesideNGINX measures how many requests nginx serves to clients that keep every processor
// busy, alternately alone and beside a scan like the daemon's. The scan is stopped and continued,
// so the two halves of a pair follow each other directly.
func BenchmarkBesideNGINX(b *testing.B) {
	dir := needs.MemoryDir(b)
	n := min(*treeSize, 20_000)
	if _, err := corpus.Write(dir, corpus.Options{Seed: 1, Files: n, Certificates: n / 10, TextSize: 26 << 10}); err != nil {
		b.Fatal(err)
	}
	ca := testca.Must(b)
	issued, err := ca.Issue(testca.Template{Names: []string{"localhost"}})
	if err != nil {
		b.Fatal(err)
	}
	server, err := liveserver.StartNGINX(b.Context(), b.TempDir(), liveserver.Pair{Certificate: issued.PEM(), Key: issued.KeyPEM()})
	if errors.Is(err, liveserver.ErrMissing) {
		needs.Missing(b, err.Error())
	} else if err != nil {
		b.Fatal(err)
	}
	defer server.Stop()
	answered, stop := ask(b, server.Endpoint.Address, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"})
	defer stop()

	scan := exec.CommandContext(b.Context(), os.Args[0], "-test.run", "^TestScanForever$", "-beside-tree", dir, fmt.Sprintf("-beside-gentle=%v", *besideGentle))
	if err := scan.Start(); err != nil {
		b.Fatal(err)
	}
	during := func(signal syscall.Signal) float64 {
		if err := scan.Process.Signal(signal); err != nil {
			b.Fatal(err)
		}
		time.Sleep(*besideTime / 10)
		before := answered.Load()
		time.Sleep(*besideTime)
		return float64(answered.Load() - before)
	}
	var lost []float64
	var totals [2]float64
	for b.Loop() {
		for i := range 200 {
			var alone, beside float64
			if i%2 == 0 {
				alone, beside = during(syscall.SIGSTOP), during(syscall.SIGCONT)
			} else {
				beside, alone = during(syscall.SIGCONT), during(syscall.SIGSTOP)
			}
			lost = append(lost, 100*(1-beside/alone))
			totals[0] += alone
			totals[1] += beside
		}
	}
	_ = scan.Process.Kill()
	_ = scan.Wait() // killed
	slices.Sort(lost)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(totals[0]/float64(len(lost))/besideTime.Seconds(), "requests/s-alone")
	b.ReportMetric(100*(1-totals[1]/totals[0]), "%-lost-in-all")
	b.ReportMetric(lost[len(lost)/2], "%-lost")
	used := scan.ProcessState.UserTime() + scan.ProcessState.SystemTime()
	b.ReportMetric(used.Seconds(), "cpu-s-of-the-scan")
}

// ask sends requests to a server over several connections until stop.
func ask(b *testing.B, address string, config *tls.Config) (answered *atomic.Int64, stop func()) {
	ctx, cancel := context.WithCancel(b.Context())
	answered = new(atomic.Int64)
	var clients sync.WaitGroup
	for range 8 {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
		clients.Go(func() {
			defer client.CloseIdleConnections()
			for ctx.Err() == nil {
				request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/", nil)
				if err != nil {
					b.Error(err)
					return
				}
				response, err := client.Do(request)
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					b.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, response.Body)
				response.Body.Close()
				answered.Add(1)
			}
		})
	}
	return answered, func() { cancel(); clients.Wait() }
}
