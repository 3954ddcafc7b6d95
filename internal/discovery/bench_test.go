package discovery

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/corpus"
)

var treeSize = flag.Int("tree", 100_000, "files of the tree that BenchmarkScan scans; a tenth are certificates")

// BenchmarkScan compares four ways to read one tree: this scan without its index, this scan with
// it, a plain scan, and find. It runs them in turns, so a busy host slows all of them down alike,
// and only the ratios matter. The page cache is warm throughout.
func BenchmarkScan(b *testing.B) {
	n := *treeSize
	if testing.Short() {
		n = min(n, 2000)
	}
	dir := b.TempDir()
	tree, err := corpus.Write(dir, corpus.Options{Seed: 1, Files: n, Certificates: n / 10})
	if err != nil {
		b.Fatal(err)
	}
	scanner := func() *Scanner { return newScanner(b, Options{Dirs: []string{dir}}) }
	ways := []struct {
		name string
		run  func(b *testing.B, warm *Scanner) int
	}{
		{"find", func(b *testing.B, _ *Scanner) int { return find(b, dir) }},
		{"plain", func(b *testing.B, _ *Scanner) int { return plain(b, dir) }},
		{"cold", func(b *testing.B, _ *Scanner) int { return count(b, scanner()) }},
		{"warm", func(b *testing.B, warm *Scanner) int { return count(b, warm) }},
	}
	warm := scanner()
	if got := count(b, warm); got != len(tree.Certificates) {
		b.Fatalf("the scan finds %d certificates, want %d", got, len(tree.Certificates))
	}
	times := make(map[string][]time.Duration)
	for b.Loop() {
		for range 5 {
			for _, way := range ways {
				runtime.GC()
				began := time.Now()
				got := way.run(b, warm)
				times[way.name] = append(times[way.name], time.Since(began))
				if want := len(tree.Certificates); got != want && way.name != "find" {
					b.Fatalf("%s finds %d certificates, want %d", way.name, got, want)
				}
			}
		}
	}
	median := make(map[string]float64)
	for _, way := range ways {
		slices.Sort(times[way.name])
		median[way.name] = times[way.name][len(times[way.name])/2].Seconds()
		b.ReportMetric(1000*median[way.name], "ms-"+way.name)
	}
	b.ReportMetric(0, "ns/op") // the sum of all ways is meaningless
	b.ReportMetric(median["plain"]/median["warm"], "plain/warm")
	b.ReportMetric(median["plain"]/median["cold"], "plain/cold")
	b.ReportMetric(median["warm"]/median["find"], "warm/find")
}

func count(b *testing.B, s *Scanner) int {
	summary, err := s.Scan(b.Context(), func([]api.DiscoveredCertificate) error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	return summary.Certificates
}

func find(b *testing.B, dir string) int {
	command := exec.CommandContext(b.Context(), "find", dir)
	command.Stdout = io.Discard
	if err := command.Run(); err != nil {
		b.Skipf("find: %v", err)
	}
	return 0
}

// plain is the obvious scan: walk, read, parse.
func plain(b *testing.B, dir string) int {
	var found []api.DiscoveredCertificate
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || filepath.Ext(path) == ".key" {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		add := func(der []byte, format string) {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return
			}
			found = append(found, api.DiscoveredCertificate{
				FingerprintSHA256: fmt.Sprintf("%x", sha256.Sum256(der)), CommonName: cert.Subject.CommonName,
				SANs: cert.DNSNames, SerialNumber: fmt.Sprintf("%x", cert.SerialNumber),
				SubjectDN: cert.Subject.String(), IssuerDN: cert.Issuer.String(),
				NotBefore: cert.NotBefore.UTC().Format(time.RFC3339), NotAfter: cert.NotAfter.UTC().Format(time.RFC3339),
				KeyAlgorithm: cert.PublicKeyAlgorithm.String(), IsCA: cert.IsCA,
				PEMData:    string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
				SourcePath: path, SourceFormat: format,
			})
		}
		any := false
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type == "CERTIFICATE" {
				any = true
				add(block.Bytes, "PEM")
			}
		}
		if ext := filepath.Ext(path); !any && slices.Contains([]string{".pem", ".crt", ".cer", ".cert", ".der"}, ext) {
			add(data, "DER")
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return len(found)
}

var memoryTree = flag.String("memory-tree", "", "scan this directory and print what memory it took; see BenchmarkMemory")

// TestMemoryOf is the child process of BenchmarkMemory.
func TestMemoryOf(t *testing.T) {
	if *memoryTree == "" {
		t.Skip("runs as the child of BenchmarkMemory")
	}
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	before := memory(t, "VmRSS")
	s := newScanner(t, Options{Dirs: []string{*memoryTree}})
	for _, scan := range []string{"cold", "warm"} {
		summary, err := s.Scan(t.Context(), func([]api.DiscoveredCertificate) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("memory: %s %d %.1f %.1f %.1f %.2f\n", scan, summary.Files, before, memory(t, "VmHWM"), memory(t, "VmRSS"), summary.Duration.Seconds())
	}
}

// memory reads a line of proc(5), in MiB.
func memory(t testing.TB, field string) float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, field+": %f kB", &kib); n == 1 {
			return kib / 1024
		}
	}
	t.Fatalf("no %s in /proc/self/status", field)
	return 0
}

// BenchmarkMemory scans the tree of BenchmarkScan in a child process and reports its resident
// memory: the peak, and the rest after the scans. Some MiB of it belong to the test binary.
func BenchmarkMemory(b *testing.B) {
	n := *treeSize
	if testing.Short() {
		n = min(n, 2000)
	}
	dir := b.TempDir()
	if _, err := corpus.Write(dir, corpus.Options{Seed: 1, Files: n, Certificates: n / 10}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		output, err := exec.CommandContext(b.Context(), os.Args[0], "-test.run", "^TestMemoryOf$", "-memory-tree", dir).CombinedOutput()
		if err != nil {
			b.Fatalf("%v\n%s", err, output)
		}
		for line := range strings.Lines(string(output)) {
			var scan string
			var files int
			var before, peak, after, seconds float64
			if n, _ := fmt.Sscanf(line, "memory: %s %d %f %f %f %f", &scan, &files, &before, &peak, &after, &seconds); n == 6 {
				b.ReportMetric(before, "MiB-before")
				b.ReportMetric(peak, "MiB-peak")
				b.ReportMetric(after, "MiB-after-"+scan)
				b.ReportMetric(seconds, "s-"+scan)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}
