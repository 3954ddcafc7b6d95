package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/needs"
)

// newScanner returns a scanner whose index trusts files at once, so tests do not wait until their
// files are two seconds old.
func newScanner(t testing.TB, o Options) *Scanner {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.State == nil {
		state, err := os.OpenRoot(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { state.Close() })
		o.State, o.Index = state, "index"
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	s.racy = 0
	s.idle = func(f func()) { // at normal priority, or tests would be slow on a busy host
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		f()
	}
	return s
}

// TestGentleScanRests checks that a gentle scan rests much longer than it works, within bounds.
func TestGentleScanRests(t *testing.T) {
	dir := t.TempDir()
	tree, err := corpus.Write(dir, corpus.Options{Seed: 1, Files: 2000, Certificates: 200})
	if err != nil {
		t.Fatal(err)
	}
	for _, gentle := range []bool{false, true} {
		s := newScanner(t, Options{Dirs: []string{dir}, Gentle: gentle})
		if (s.rest != nil) != gentle {
			t.Fatalf("gentle %v: it rests: %v", gentle, s.rest != nil)
		}
		var rests atomic.Int64
		if gentle {
			s.rest = func(_ context.Context, d time.Duration) error {
				rests.Add(1)
				if d < restFactor*restAfter || d > maxRest {
					t.Errorf("a rest of %v", d)
				}
				return nil
			}
		}
		if found, _ := scanAll(t, s); len(found) != len(tree.Certificates) {
			t.Errorf("gentle %v: found %d certificates, want %d", gentle, len(found), len(tree.Certificates))
		}
		if (rests.Load() > 0) != gentle {
			t.Errorf("gentle %v: %d rests", gentle, rests.Load())
		}
	}
}

// TestRestEndsWithTheScan checks that cancelling a scan ends its rest.
func TestRestEndsWithTheScan(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := sleep(ctx, 24*time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func scanAll(t testing.TB, s *Scanner) ([]api.DiscoveredCertificate, Summary) {
	t.Helper()
	var all []api.DiscoveredCertificate
	summary, err := s.Scan(t.Context(), func(found []api.DiscoveredCertificate) error {
		all = append(all, found...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if summary.Certificates != len(all) {
		t.Errorf("summary has %d certificates, %d were emitted", summary.Certificates, len(all))
	}
	return all, summary
}

func summarise(found []api.DiscoveredCertificate) []corpus.Certificate {
	list := make([]corpus.Certificate, 0, len(found))
	for _, cert := range found {
		list = append(list, corpus.Certificate{Path: cert.SourcePath, Fingerprint: cert.FingerprintSHA256, Format: cert.SourceFormat})
	}
	return list
}

func compare(t *testing.T, got, want []corpus.Certificate) {
	t.Helper()
	balance := make(map[corpus.Certificate]int)
	for _, c := range want {
		balance[c]++
	}
	for _, c := range got {
		balance[c]--
	}
	shown := 0
	for c, n := range balance {
		if n == 0 {
			continue
		}
		if shown++; shown > 5 {
			t.Error("and more")
			return
		}
		t.Errorf("%+v: found %d times too few", c, n)
	}
}

// mustRemember fails the test if a rescan read anything.
func mustRemember(t *testing.T, summary Summary) {
	t.Helper()
	if summary.Read != 0 {
		t.Errorf("an unchanged rescan read %d files, want none", summary.Read)
	}
}

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestCorpus(t *testing.T) {
	dir := t.TempDir()
	tree, err := corpus.Write(dir, corpus.Options{Seed: 1, Files: 900, Certificates: 400, Odd: true})
	if err != nil {
		t.Fatal(err)
	}
	s := newScanner(t, Options{Dirs: []string{dir}})
	cold, summary := scanAll(t, s)
	compare(t, summarise(cold), tree.Certificates)
	if summary.Files+summary.Skipped[skipKey] != tree.Files {
		t.Errorf("saw %d files and %d keys, want %d in all", summary.Files, summary.Skipped[skipKey], tree.Files)
	}
	for _, path := range tree.Damaged {
		if !slices.ContainsFunc(summary.Errors, func(problem string) bool { return strings.HasPrefix(problem, path+": ") }) {
			t.Errorf("damage in %s is not reported", path)
		}
	}
	if len(summary.Errors) != len(tree.Damaged) {
		t.Errorf("%d errors, want %d:\n%s", len(summary.Errors), len(tree.Damaged), strings.Join(summary.Errors, "\n"))
	}
	total := 0
	for n := range maps.Values(summary.Formats) {
		total += n
	}
	if total != len(cold) || summary.Formats["JKS"] == 0 || summary.Formats["PKCS7"] == 0 || summary.Formats["DER"] == 0 {
		t.Errorf("formats %v of %d certificates", summary.Formats, len(cold))
	}

	warm, again := scanAll(t, s)
	mustRemember(t, again)
	if !slices.EqualFunc(cold, warm, func(a, b api.DiscoveredCertificate) bool { return fmt.Sprint(a) == fmt.Sprint(b) }) {
		t.Error("an unchanged rescan emits other certificates, or another order")
	}
	if !slices.Equal(summary.Errors, again.Errors) {
		t.Errorf("an unchanged rescan has %d errors, want the same %d", len(again.Errors), len(summary.Errors))
	}
}

// TestChanges checks, for changes of all kinds, that a second scan emits what a scan without an
// index does.
func TestChanges(t *testing.T) {
	dir := t.TempDir()
	if _, err := corpus.Write(dir, corpus.Options{Seed: 2, Files: 500, Certificates: 150, Odd: true}); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*", "*", "*", "*"))
	if err != nil || len(files) != 500 {
		t.Fatalf("%d files, error %v", len(files), err)
	}
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	steps := []struct {
		name string
		do   func() error
		read int
	}{
		{"nothing", func() error { return nil }, 0},
		{"a file is rewritten", func() error { return os.WriteFile(files[300], cert, 0o644) }, 1},
		{"and rewritten in place with the same size and time", func() error {
			info, err := os.Stat(files[300])
			if err != nil {
				return err
			}
			changed := slices.Clone(cert)
			changed[60] ^= 1
			return errors.Join(os.WriteFile(files[300], changed, 0o644), os.Chtimes(files[300], info.ModTime(), info.ModTime()))
		}, 1},
		{"the first file goes", func() error { return os.Remove(files[0]) }, 0},
		{"the last file goes", func() error { return os.Remove(files[499]) }, 0},
		{"a directory goes", func() error { return os.RemoveAll(filepath.Dir(files[350])) }, 0},
		{"a file comes first", func() error { return os.WriteFile(filepath.Join(dir, "0.pem"), cert, 0o644) }, 1},
		{"a directory comes", func() error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "d00-new"), 0o755), os.WriteFile(filepath.Join(dir, "d00-new", "c.pem"), cert, 0o644))
		}, 1},
		{"a directory is renamed", func() error { return os.Rename(filepath.Join(dir, "d00-new"), filepath.Join(dir, "zz")) }, 1},
		{"a file becomes a directory", func() error {
			return errors.Join(os.Remove(filepath.Join(dir, "0.pem")), os.Mkdir(filepath.Join(dir, "0.pem"), 0o755))
		}, 0},
		{"everything goes", func() error { return os.RemoveAll(filepath.Join(dir, "d00")) }, 0},
	}
	s := newScanner(t, Options{Dirs: []string{dir}})
	scanAll(t, s)
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		want, _ := scanAll(t, newScanner(t, Options{Dirs: []string{dir}}))
		got, summary := scanAll(t, s)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: the index hides the change", step.name)
		}
		if summary.Read != step.read {
			t.Errorf("%s: read %d files, want %d", step.name, summary.Read, step.read)
		}
		_, summary = scanAll(t, s)
		mustRemember(t, summary)
	}
}

func TestRecentFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.pem"), cert)
	s := newScanner(t, Options{Dirs: []string{dir}})
	s.racy = racyWindow
	for range 2 {
		if found, summary := scanAll(t, s); len(found) != 1 || summary.Read != 1 {
			t.Errorf("found %d, read %d; a file this young can change without a trace, so it must be read again", len(found), summary.Read)
		}
	}
}

// TestLinks covers Let's Encrypt's directories, Debian's /etc/ssl/certs and Kubernetes volumes.
func TestLinks(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(outside, "ca.crt"), cert)
	write(t, filepath.Join(dir, "archive", "cert1.pem"), cert)
	write(t, filepath.Join(dir, "own", "state.pem"), cert)
	if err := os.Mkdir(filepath.Join(dir, "live"), 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{
		"live/cert.pem":   "../archive/cert1.pem",           // scanned under its own path
		"live/other.pem":  filepath.Join(outside, "ca.crt"), // only here
		"live/zother.pem": filepath.Join(outside, "ca.crt"), // the same file again
		"live/loop":       "..",
		"live/out":        outside,
		"live/self":       "self",
		"live/gone.pem":   "nowhere",
		"live/gone.txt":   "nowhere",
	} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "archive", "cert1.pem"), filepath.Join(dir, "archive", "hard.pem")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	// The configured directory is itself reached through a link.
	top := filepath.Join(t.TempDir(), "top")
	if err := os.Symlink(dir, top); err != nil {
		t.Fatal(err)
	}
	s := newScanner(t, Options{Dirs: []string{top}, Skip: []string{filepath.Join(dir, "own")}})
	for range 2 {
		found, summary := scanAll(t, s)
		var got []string
		for _, cert := range found {
			got = append(got, strings.TrimPrefix(cert.SourcePath, top))
		}
		if want := []string{"/archive/cert1.pem", "/archive/hard.pem", "/live/other.pem"}; !slices.Equal(got, want) {
			t.Errorf("found %q, want %q", got, want)
		}
		want := map[string]int{skipInside: 1, skipAgain: 1, skipDirLink: 2, skipDangling: 2, skipOwn: 1, skipSpecial: 1}
		if !maps.Equal(summary.Skipped, want) {
			t.Errorf("skipped %v, want %v", summary.Skipped, want)
		}
		if want := []string{top + "/live/gone.pem: dangling link: no such file or directory"}; !slices.Equal(summary.Errors, want) {
			t.Errorf("errors %q, want %q", summary.Errors, want)
		}
	}
}

func TestRootsAndExclusions(t *testing.T) {
	dir := t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a/1.pem", "a/node_modules/2.pem", "a/b/3.pem", "a/b/c/4.pem", "a/b.pem", "a/x.bak", "a.pem", "z/5"} {
		write(t, filepath.Join(dir, name), cert)
	}
	tests := []struct {
		name    string
		dirs    []string
		exclude []string
		want    []string
	}{
		{"order: a directory's files, then what is below it", []string{""}, nil,
			[]string{"a.pem", "a/1.pem", "a/b.pem", "a/x.bak", "a/b/3.pem", "a/b/c/4.pem", "a/node_modules/2.pem", "z/5"}},
		{"names", []string{""}, []string{"node_modules", "*.bak"}, []string{"a.pem", "a/1.pem", "a/b.pem", "a/b/3.pem", "a/b/c/4.pem", "z/5"}},
		{"paths", []string{""}, []string{dir + "/a/*", dir + "/?"}, []string{"a.pem"}},
		{"one root in another counts once", []string{"", "a/b", "a/b/"}, nil,
			[]string{"a.pem", "a/1.pem", "a/b.pem", "a/x.bak", "a/node_modules/2.pem", "z/5", "a/b/3.pem", "a/b/c/4.pem"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var dirs []string
			for _, d := range test.dirs {
				dirs = append(dirs, dir+"/"+d)
			}
			s := newScanner(t, Options{Dirs: dirs, Exclude: test.exclude})
			for range 2 {
				found, summary := scanAll(t, s)
				var got []string
				for _, cert := range found {
					got = append(got, strings.TrimPrefix(cert.SourcePath, dir+"/"))
				}
				if !slices.Equal(got, test.want) || len(summary.Errors) > 0 {
					t.Errorf("found %q, want %q; errors %q", got, test.want, summary.Errors)
				}
			}
		})
	}
}

func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	_, summary := scanAll(t, newScanner(t, Options{Dirs: []string{missing}}))
	if want := []string{missing + ": no such file or directory"}; !slices.Equal(summary.Errors, want) {
		t.Errorf("missing root: errors %q, want %q", summary.Errors, want)
	}
	if !needs.Unprivileged(t) {
		return
	}
	write(t, filepath.Join(dir, "secret.pem"), []byte("x"))
	if err := os.Chmod(filepath.Join(dir, "secret.pem"), 0); err != nil {
		t.Fatal(err)
	}
	_, summary = scanAll(t, newScanner(t, Options{Dirs: []string{dir}}))
	if want := []string{filepath.Join(dir, "secret.pem") + ": permission denied"}; !slices.Equal(summary.Errors, want) {
		t.Errorf("unreadable file: errors %q, want %q", summary.Errors, want)
	}
}

func TestNewRefuses(t *testing.T) {
	_, err := New(Options{Dirs: []string{"relative", "/ok"}, Exclude: []string{"[", ""}, MaxRate: -1})
	for _, want := range []string{`"relative"`, `"["`, `""`, "-1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name %s", err, want)
		}
	}
	if _, err := New(Options{}); err == nil {
		t.Error("no directory: no error")
	}
}

func TestLargeDirectoryComesInOrder(t *testing.T) {
	dir := t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	const n = 3*partSize + 7
	for i := range n {
		data := []byte("text")
		if i%3 == 0 {
			data = cert
		}
		write(t, filepath.Join(dir, fmt.Sprintf("f%06d", (i*7919)%n)), data)
	}
	s := newScanner(t, Options{Dirs: []string{dir}})
	for range 2 {
		found, summary := scanAll(t, s)
		if len(found) != (n+2)/3 || summary.Files != n || !slices.IsSortedFunc(found, func(a, b api.DiscoveredCertificate) int { return strings.Compare(a.SourcePath, b.SourcePath) }) {
			t.Errorf("found %d of %d certificates among %d files, or not in order", len(found), (n+2)/3, summary.Files)
		}
	}
}

func TestCancel(t *testing.T) {
	dir := t.TempDir()
	tree, err := corpus.Write(dir, corpus.Options{Seed: 3, Files: 1500, Certificates: 400})
	if err != nil {
		t.Fatal(err)
	}
	s := newScanner(t, Options{Dirs: []string{dir}})
	reason := errors.New("enough")
	for _, after := range []int{1, 200} {
		ctx, cancel := context.WithCancelCause(t.Context())
		n, late := 0, 0
		_, err := s.Scan(ctx, func(found []api.DiscoveredCertificate) error {
			if ctx.Err() != nil {
				late += len(found)
			}
			if n += len(found); n >= after {
				cancel(reason)
			}
			return nil
		})
		if !errors.Is(err, context.Canceled) && !errors.Is(err, reason) {
			t.Errorf("error %v, want the cancellation", err)
		}
		if late > 0 {
			t.Errorf("%d certificates were emitted after the scan was cancelled", late)
		}
	}
	_, err = s.Scan(t.Context(), func([]api.DiscoveredCertificate) error { return reason })
	if !errors.Is(err, reason) {
		t.Errorf("error %v, want that of emit", err)
	}
	// The index is not damaged by the interruptions.
	found, _ := scanAll(t, s)
	compare(t, summarise(found), tree.Certificates)
}

func TestOneScanAtATime(t *testing.T) {
	dir := t.TempDir()
	cert, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.pem"), cert)
	s := newScanner(t, Options{Dirs: []string{dir}})
	_, err = s.Scan(t.Context(), func([]api.DiscoveredCertificate) error {
		_, err := s.Scan(t.Context(), nil)
		return err
	})
	if !errors.Is(err, errBusy) {
		t.Errorf("second scan: error %v, want errBusy", err)
	}
}

func TestPanicIsAnError(t *testing.T) {
	dir := t.TempDir()
	text, _ := testCertificate(t)
	write(t, filepath.Join(dir, "a.pem"), text)
	s := newScanner(t, Options{Dirs: []string{dir}})
	_, err := s.Scan(t.Context(), func([]api.DiscoveredCertificate) error { panic("oh") })
	if err == nil || !strings.Contains(err.Error(), "oh") {
		t.Errorf("error %v, want the panic's", err)
	}
	if found, _ := scanAll(t, s); len(found) != 1 {
		t.Errorf("the scan after it finds %d certificates, want 1", len(found))
	}
}

func TestRate(t *testing.T) {
	dir := t.TempDir()
	for i := range 20 {
		write(t, filepath.Join(dir, fmt.Sprint(i)), []byte("x"))
	}
	began := time.Now()
	scanAll(t, newScanner(t, Options{Dirs: []string{dir}, MaxRate: 200}))
	if took := time.Since(began); took < 90*time.Millisecond {
		t.Errorf("20 files at 200 a second took %v, want about 100ms", took)
	}
}

func TestPasswordsAreTriedWhenTheyChange(t *testing.T) {
	dir := t.TempDir()
	store, err := os.ReadFile("../pkcs12/testdata/secret.p12")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.p12"), store)
	var words []secret.String
	s := newScanner(t, Options{Dirs: []string{dir}, Passwords: func() ([]secret.String, error) { return words, nil }})
	for _, step := range []struct {
		words       []string
		found, read int
	}{{nil, 0, 1}, {nil, 0, 0}, {[]string{"wrong"}, 0, 1}, {[]string{"wrong", "correct horse"}, 1, 1}, {nil, 1, 0}} {
		words = nil
		for _, word := range step.words {
			words = append(words, secret.New(word))
		}
		found, summary := scanAll(t, s)
		if len(found) != step.found || summary.Read != step.read || len(summary.Errors) != 1-step.found {
			t.Errorf("passwords %v: found %d, read %d, errors %q; want %d, %d", step.words, len(found), summary.Read, summary.Errors, step.found, step.read)
		}
	}
}

func TestProblemsAreBounded(t *testing.T) {
	var p problems
	for i := range 2000 {
		p.add(fmt.Sprintf("/file%d", i), strings.Repeat("x", i)+"\xff\x00")
	}
	list := p.list()
	total := 0
	for _, problem := range list {
		total += len(problem)
		if strings.ContainsRune(problem, 0) || len(problem) > maxProblem+3 {
			t.Errorf("problem of %d bytes, or with a NUL", len(problem))
		}
	}
	if len(list) > maxProblems+1 || total > 2*maxProblemBytes || !strings.HasPrefix(list[len(list)-1], "and ") {
		t.Errorf("%d problems of %d bytes, the last %q", len(list), total, list[len(list)-1])
	}
}

func testCertificate(t testing.TB) (text, der []byte) {
	t.Helper()
	text, err := os.ReadFile("certfile/testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	return text, mustDecode(text)
}
