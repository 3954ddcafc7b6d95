package discovery

import (
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/needs"
)

// watchOpens returns a function that lists the files in dirs that have been opened.
func watchOpens(t *testing.T, dirs ...string) func() []string {
	t.Helper()
	watch, err := syscall.InotifyInit1(syscall.IN_NONBLOCK | syscall.IN_CLOEXEC)
	if err != nil {
		needs.Missing(t, "no inotify: "+err.Error())
	}
	t.Cleanup(func() { syscall.Close(watch) })
	for _, dir := range dirs {
		if _, err := syscall.InotifyAddWatch(watch, dir, syscall.IN_OPEN); err != nil {
			t.Fatal(err)
		}
	}
	return func() (names []string) {
		buffer := make([]byte, 64<<10)
		n, _ := syscall.Read(watch, buffer)
		for b := buffer[:max(n, 0)]; len(b) >= syscall.SizeofInotifyEvent; {
			length := int(b[12]) | int(b[13])<<8
			name := strings.TrimRight(string(b[syscall.SizeofInotifyEvent:syscall.SizeofInotifyEvent+length]), "\x00")
			if b[7]&0x40 == 0 { // IN_ISDIR: a directory that was listed
				names = append(names, name)
			}
			b = b[syscall.SizeofInotifyEvent+length:]
		}
		return names
	}
}
