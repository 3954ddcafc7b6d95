package discovery

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/needs"
)

// TestOpensOnlyRegularFiles checks that a file that was replaced by something else is not opened,
// because opening a device can have effects.
func TestOpensOnlyRegularFiles(t *testing.T) {
	dir := t.TempDir()
	pipe, file := filepath.Join(dir, "pipe"), filepath.Join(dir, "file")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	watch, err := syscall.InotifyInit1(syscall.IN_NONBLOCK | syscall.IN_CLOEXEC)
	if err != nil {
		needs.Missing(t, "no inotify: "+err.Error())
	}
	defer syscall.Close(watch)
	if _, err := syscall.InotifyAddWatch(watch, dir, syscall.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	opened := func() bool {
		n, err := syscall.Read(watch, make([]byte, 4096))
		return err == nil && n > 0
	}
	w := &worker{r: &run{s: &Scanner{}}}
	st, data, err := w.read(pipe, "pipe", &entry{dir: &node{}})
	if st.isRegular() || data != nil || err != nil || opened() {
		t.Errorf("a pipe: regular %v, data %q, error %v", st.isRegular(), data, err)
	}
	st, data, err = w.read(file, "file", &entry{dir: &node{}})
	if !st.isRegular() || string(data) != "text" || err != nil || !opened() {
		t.Errorf("a file: regular %v, data %q, error %v", st.isRegular(), data, err)
	}
	if _, _, err := w.read(file+".missing", "file", &entry{dir: &node{}}); !os.IsNotExist(err) {
		t.Errorf("no file: error %v", err)
	}
}

// TestAccessTimes checks that a scan does not update the access times of files, however it reaches
// them.
func TestAccessTimes(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	text, _ := testCertificate(t)
	files := []string{filepath.Join(dir, "a.pem"), filepath.Join(outside, "b.pem")}
	link(t, files[1], filepath.Join(dir, "b.pem"))
	read := time.Now().AddDate(0, 0, -2).Truncate(time.Second) // so long ago that relatime would update it
	for _, path := range files {
		write(t, path, text)
		if err := os.Chtimes(path, read, read.AddDate(0, 0, -1)); err != nil {
			t.Fatal(err)
		}
	}
	if found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{dir}})); len(found) != 2 || len(summary.Errors) > 0 {
		t.Errorf("found %d certificates, errors %q", len(found), summary.Errors)
	}
	for _, path := range files {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil || st.Atim.Sec != read.Unix() {
			t.Errorf("%s was read at %d, want %d (error %v)", path, st.Atim.Sec, read.Unix(), err)
		}
	}
}
