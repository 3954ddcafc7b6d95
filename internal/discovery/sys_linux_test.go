package discovery

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// A file that has become something else since it was found is not opened: to
// open a device can have effects.
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
		t.Skip("no inotify: ", err)
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
