package discovery

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/api"
)

// link creates a symbolic link.
func link(t testing.TB, target, path string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(target, path)); err != nil {
		t.Fatal(err)
	}
}

// pathsBelow returns the paths of certificates relative to a directory.
func pathsBelow(dir string, found []api.DiscoveredCertificate) []string {
	var paths []string
	for _, cert := range found {
		paths = append(paths, strings.TrimPrefix(cert.SourcePath, dir+"/"))
	}
	return paths
}

// TestLinkCountsWhereTheWalkDoesNotCome checks that a link into the tree is skipped only if the
// walk reads its target.
func TestLinkCountsWhereTheWalkDoesNotCome(t *testing.T) {
	dir := t.TempDir()
	text, _ := testCertificate(t)
	write(t, filepath.Join(dir, "archive", "www", "cert2.pem"), text)
	write(t, filepath.Join(dir, "else", "cert.bak"), text)
	link(t, "../../archive/www/cert2.pem", filepath.Join(dir, "live", "www", "cert.pem"))
	link(t, "../../else/cert.bak", filepath.Join(dir, "live", "www", "old.pem"))
	top := filepath.Join(t.TempDir(), "top")
	link(t, dir, top)
	inArchive, linked := "archive/www/cert2.pem", "live/www/cert.pem"
	tests := []struct {
		name    string
		root    string
		exclude []string
		want    []string
	}{
		{"nothing", dir, nil, []string{inArchive, "else/cert.bak"}},
		{"by name", dir, []string{"archive", "*.bak"}, []string{linked}},
		{"by path", dir, []string{dir + "/archive", "*.bak"}, []string{linked}},
		{"further down", dir, []string{dir + "/archive/www", "else"}, []string{linked, "live/www/old.pem"}},
		{"the root is a link", top, []string{top + "/archive", top + "/else/cert.bak"}, []string{linked}},
		{"the link too", dir, []string{"archive", "cert.pem", "*.bak"}, nil},
		{"the file itself", dir, []string{"cert2.pem", dir + "/else/*"}, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newScanner(t, Options{Dirs: []string{test.root}, Exclude: test.exclude})
			for range 2 {
				found, summary := scanAll(t, s)
				if got := pathsBelow(test.root, found); !slices.Equal(got, test.want) || len(summary.Errors) > 0 {
					t.Errorf("found %q, want %q; errors %q", got, test.want, summary.Errors)
				}
			}
		})
	}
	if os.Geteuid() == 0 {
		return // root can list every directory
	}
	t.Run("not to be listed", func(t *testing.T) {
		archive := filepath.Join(dir, "archive", "www")
		if err := os.Chmod(archive, 0o311); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(archive, 0o755)
		found, _ := scanAll(t, newScanner(t, Options{Dirs: []string{dir}, Exclude: []string{"else", "*.bak"}}))
		if got := pathsBelow(dir, found); !slices.Equal(got, []string{linked}) {
			t.Errorf("found %q, want %q", got, linked)
		}
	})
}

// TestLinksToWhatIsNotRead checks that no link makes a scan read the agent's own files, private
// keys, or excluded files.
func TestLinksToWhatIsNotRead(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	text, _ := testCertificate(t) // every file holds one, so a file that was read is found
	own, other := filepath.Join(outside, "keys"), filepath.Join(outside, "other")
	inTree := filepath.Join(dir, "state")
	targets := []string{filepath.Join(own, "c1.key"), filepath.Join(own, ".state", "agent", "job.pem"), filepath.Join(inTree, "a", "b.pem"),
		filepath.Join(other, "server.key"), filepath.Join(other, "SERVER.KEY"), filepath.Join(other, "old.bak")}
	link(t, own, filepath.Join(outside, "alias"))
	for i, target := range targets {
		write(t, target, text)
		link(t, target, filepath.Join(outside, "hops", string('a'+rune(i))))
		link(t, filepath.Join(outside, "hops", string('a'+rune(i))), filepath.Join(dir, string('a'+rune(i))+".pem"))
	}
	link(t, filepath.Join(outside, "alias", "c1.key"), filepath.Join(dir, "alias.pem"))
	link(t, filepath.Join(outside, "alias", ".state", "agent", "job.pem"), filepath.Join(dir, "alias2.pem"))
	write(t, filepath.Join(outside, "fine"), text)
	link(t, filepath.Join(outside, "fine"), filepath.Join(dir, "fine.pem"))
	opened := watchOpens(t, append([]string{filepath.Join(own, ".state", "agent"), filepath.Join(inTree, "a"), other}, own)...)

	s := newScanner(t, Options{Dirs: []string{dir}, Skip: []string{filepath.Join(outside, "alias"), inTree}, Exclude: []string{"*.bak"}})
	found, summary := scanAll(t, s)
	if got := pathsBelow(dir, found); !slices.Equal(got, []string{"fine.pem"}) || len(summary.Errors) > 0 {
		t.Errorf("found %q, errors %q; want the one that may be read", got, summary.Errors)
	}
	if names := opened(); len(names) > 0 {
		t.Errorf("opened %q", names)
	}
	if summary.Skipped[skipOwn] != 6 || summary.Skipped[skipKey] != 2 || summary.Skipped[skipExcluded] != 1 {
		t.Errorf("skipped %v", summary.Skipped)
	}
}

// TestPathThatIsReplaced covers owners of a directory on the path who replace it with a link
// between stat and open.
func TestPathThatIsReplaced(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	text, _ := testCertificate(t)
	own := filepath.Join(outside, "keys")
	write(t, filepath.Join(own, "agent", "served.pem"), text)
	write(t, filepath.Join(outside, "other", "served.pem"), text)
	write(t, filepath.Join(dir, "a", "agent", "served.pem"), text)
	write(t, filepath.Join(dir, "b", "served.pem"), text)
	s := newScanner(t, Options{Dirs: []string{dir}, Skip: []string{own}})
	r := newRun(t.Context(), s, nil)
	defer r.cancel(nil)
	r.findOwn()
	w := &worker{r: r}
	read := func(path string, id identity) error {
		_, _, err := w.read(path, filepath.Base(path), &entry{dir: &node{path: filepath.Dir(path)}, file: file{status: status{identity: id}}})
		return err
	}
	// The entries as the walk saw them.
	var inA, inB syscall.Stat_t
	file := filepath.Join(dir, "a", "agent", "served.pem")
	if err := errors.Join(syscall.Stat(file, &inA), syscall.Stat(filepath.Join(dir, "b", "served.pem"), &inB)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"a", "b"} {
		if err := os.Rename(filepath.Join(dir, path), filepath.Join(dir, "was "+path)); err != nil {
			t.Fatal(err)
		}
	}
	link(t, own, filepath.Join(dir, "a"))
	link(t, filepath.Join(outside, "other"), filepath.Join(dir, "b"))

	opened := watchOpens(t, filepath.Join(own, "agent"))
	if err := read(file, statusOf(&inA).identity); !errors.Is(err, errForbidden) || len(opened()) > 0 {
		t.Errorf("a file of the agent: error %v, want %v and no open", err, errForbidden)
	}
	if err := read(filepath.Join(dir, "b", "served.pem"), statusOf(&inB).identity); err != nil {
		t.Errorf("a file that was replaced by another: %v", err)
	}
	n := &node{path: filepath.Join(dir, "a", "agent"), shown: filepath.Join(dir, "a", "agent"), real: filepath.Join(dir, "a", "agent")}
	if err := r.readDirectory(w, n); err != nil || len(n.files) > 0 || n.skipped[skipOwn] != 1 {
		t.Errorf("a directory of the agent: error %v, %d files, skipped %v", err, len(n.files), n.skipped)
	}
	n = &node{path: filepath.Join(dir, "b"), shown: filepath.Join(dir, "b"), real: filepath.Join(dir, "b"), dev: statusOf(&inB).dev}
	if err := r.readDirectory(w, n); err == nil || len(n.files) > 0 {
		t.Errorf("a directory that became a link: error %v, %d files", err, len(n.files))
	}
}

// TestReplacedName covers files that are replaced between stat and open, by another file or
// by something that must not be read. Reading must not wait for any of them.
func TestReplacedName(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	text, _ := testCertificate(t)
	write(t, filepath.Join(outside, "served.pem"), text)
	write(t, filepath.Join(dir, "big"), make([]byte, MaxFileSize+1))
	for _, name := range []string{"file", "link", "pipe", "socket", "dir", "grown", "gone"} {
		write(t, filepath.Join(dir, name), []byte("text"))
	}
	r := newRun(t.Context(), newScanner(t, Options{Dirs: []string{dir}}), nil)
	defer r.cancel(nil)
	w := &worker{r: r}
	defer w.leave()
	n := &node{path: dir, shown: dir, real: dir}
	if err := r.readDirectory(w, n); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "link", "pipe", "socket", "dir", "grown", "gone"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "file"), text)
	link(t, filepath.Join(outside, "served.pem"), filepath.Join(dir, "link"))
	listener, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := errors.Join(syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600), os.Mkdir(filepath.Join(dir, "dir"), 0o700),
		os.Rename(filepath.Join(dir, "big"), filepath.Join(dir, "grown"))); err != nil {
		t.Fatal(err)
	}
	opened := watchOpens(t, outside)
	for _, f := range n.files {
		name := string(f.name)
		got := r.readFile(w, &entry{dir: n, file: f})
		switch certificate := got != nil && !got.outcome.Empty() && got.problem == ""; {
		case w.dir < 0:
			t.Error("the directory was not opened")
		case certificate != (name == "file"):
			t.Errorf("%s: %+v", name, got)
		case name == "gone" && got != nil:
			t.Errorf("%s: %+v, want nothing", name, got)
		}
	}
	if names := opened(); len(names) > 0 {
		t.Errorf("opened %q", names)
	}
}

// TestKubernetesVolume checks that a mounted Secret keeps its paths when it is updated.
func TestKubernetesVolume(t *testing.T) {
	dir := t.TempDir()
	vol := filepath.Join(dir, "vol")
	text, _ := testCertificate(t)
	version := func(name string) {
		t.Helper()
		write(t, filepath.Join(vol, name, "tls.crt"), text)
		write(t, filepath.Join(vol, name, "sub", "ca.crt"), text)
		write(t, filepath.Join(vol, name, "broken.pem"), []byte("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"))
		link(t, name, filepath.Join(vol, "..data_tmp"))
		if err := os.Rename(filepath.Join(vol, "..data_tmp"), filepath.Join(vol, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..2026_01_02_03_04_05.123456789")
	link(t, "..data/tls.crt", filepath.Join(vol, "tls.crt"))
	link(t, "..data/broken.pem", filepath.Join(vol, "broken.pem"))
	link(t, "..data/sub", filepath.Join(vol, "sub"))
	write(t, filepath.Join(vol, "z.pem"), text) // not part of the Secret
	// Directories that only look like a volume.
	write(t, filepath.Join(dir, "x", "..deeper", "a.pem"), text)
	link(t, "/", filepath.Join(dir, "x", "..data"))
	s := newScanner(t, Options{Dirs: []string{dir}})
	check := func(want []string) {
		t.Helper()
		found, summary := scanAll(t, s)
		if got := pathsBelow(dir, found); !slices.Equal(got, want) {
			t.Errorf("found %q, want %q", got, want)
		}
		if len(summary.Errors) != 1 || !strings.HasPrefix(summary.Errors[0], filepath.Join(vol, "broken.pem")+": ") {
			t.Errorf("errors %q, want one of %s", summary.Errors, filepath.Join(vol, "broken.pem"))
		}
	}
	want := []string{"vol/z.pem", "vol/tls.crt", "vol/sub/ca.crt", "x/..deeper/a.pem"}
	check(want)
	_, summary := scanAll(t, s)
	mustRemember(t, summary)
	version("..2026_02_03_04_05_06.987654321")
	if err := os.RemoveAll(filepath.Join(vol, "..2026_01_02_03_04_05.123456789")); err != nil {
		t.Fatal(err)
	}
	check(want)

	s = newScanner(t, Options{Dirs: []string{dir}, Exclude: []string{filepath.Join(vol, "sub")}})
	check([]string{"vol/z.pem", "vol/tls.crt", "x/..deeper/a.pem"})
	// Excluding the versioned directories makes the links count.
	s = newScanner(t, Options{Dirs: []string{dir}, Exclude: []string{"..2*"}})
	check([]string{"vol/tls.crt", "vol/z.pem", "x/..deeper/a.pem"})
}

// TestRootIsAFile checks that configured files are scanned like directories.
func TestRootIsAFile(t *testing.T) {
	dir := t.TempDir()
	text, _ := testCertificate(t)
	for _, name := range []string{"a.pem", "b.pem", "c.key", "d/e.pem"} {
		write(t, filepath.Join(dir, name), text)
	}
	link(t, "d/e.pem", filepath.Join(dir, "link.pem"))
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name         string
		roots        []string
		want, errors []string
	}{
		{"a file", []string{"b.pem"}, []string{"b.pem"}, nil},
		{"a link", []string{"link.pem"}, []string{"link.pem"}, nil},
		{"its directory too", []string{"", "b.pem", "d/e.pem"}, []string{"a.pem", "b.pem", "d/e.pem"}, nil},
		{"a link and its target", []string{"d", "link.pem"}, []string{"d/e.pem"}, nil},
		{"no file", []string{"pipe"}, nil, []string{"pipe: neither a directory nor a regular file"}},
		{"a key", []string{"c.key"}, nil, []string{"c.key: private key files (.key) are not read"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var roots []string
			for _, root := range test.roots {
				roots = append(roots, filepath.Join(dir, root))
			}
			s := newScanner(t, Options{Dirs: roots})
			for i := range 2 {
				found, summary := scanAll(t, s)
				var problems []string
				for _, problem := range summary.Errors {
					problems = append(problems, strings.TrimPrefix(problem, dir+"/"))
				}
				if got := pathsBelow(dir, found); !slices.Equal(got, test.want) || !slices.Equal(problems, test.errors) {
					t.Errorf("found %q, want %q; errors %q, want %q", got, test.want, problems, test.errors)
				}
				if i > 0 {
					mustRemember(t, summary)
				}
			}
		})
	}
}

// TestNamesOfADirectoryAreBounded checks that sorting names does not use unbounded memory.
func TestNamesOfADirectoryAreBounded(t *testing.T) {
	dir := t.TempDir()
	text, _ := testCertificate(t)
	const n = 3000
	for i := range n {
		write(t, filepath.Join(dir, "many", fmt.Sprintf("%04d", i)), []byte("text"))
	}
	write(t, filepath.Join(dir, "other", "a.pem"), text)
	s := newScanner(t, Options{Dirs: []string{dir}})
	if _, summary := scanAll(t, s); summary.Files != n+1 || len(summary.Errors) > 0 {
		t.Errorf("%d files, errors %q; want %d files", summary.Files, summary.Errors, n+1)
	}
	s.maxListing = 8 << 10
	found, summary := scanAll(t, s)
	if len(found) != 1 || summary.Files >= n || summary.Files < 100 || len(summary.Errors) != 1 ||
		!strings.HasPrefix(summary.Errors[0], filepath.Join(dir, "many")+": the directory has too many names") {
		t.Errorf("found %d certificates, %d files, errors %q; want part of the directory, and an error", len(found), summary.Files, summary.Errors)
	}
}

// TestLinkToALargeDirectory checks that a configured link to a large directory is read in parts.
func TestLinkToALargeDirectory(t *testing.T) {
	outside := t.TempDir()
	text, _ := testCertificate(t)
	const n = partSize + 1
	for i := range n {
		write(t, filepath.Join(outside, "large", fmt.Sprintf("%04d.pem", i)), text)
	}
	top := filepath.Join(outside, "link")
	link(t, filepath.Join(outside, "large"), top)
	found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{top}}))
	if len(found) != n || len(summary.Errors) > 0 {
		t.Errorf("found %d certificates, errors %q; want %d", len(found), summary.Errors, n)
	}
}
