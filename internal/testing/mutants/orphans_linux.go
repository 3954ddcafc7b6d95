package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// adoptOrphans makes this process the parent of all descendants that lose theirs, such as a daemon
// that a test has started.
func adoptOrphans() error {
	const prSetChildSubreaper = 36
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); errno != 0 {
		return fmt.Errorf("become a subreaper: %w", errno)
	}
	return nil
}

// isolated gives a process its own process group and, if permitted, its own mount namespace.
func isolated() *syscall.SysProcAttr {
	attributes := &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		attributes.Unshareflags = syscall.CLONE_NEWNS
	}
	return attributes
}

// killOrphans kills all children of this process. Nobody may be waiting for one.
func killOrphans() {
	for range 100 {
		children := 0
		stats, _ := filepath.Glob("/proc/[0-9]*/stat")
		for _, name := range stats {
			text, _ := os.ReadFile(name)
			// pid (name) state parent …; the name may contain anything
			_, rest, _ := strings.Cut(string(text[strings.LastIndexByte(string(text), ')')+1:]), " ")
			fields := strings.Fields(rest)
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			if err != nil || len(fields) < 2 || fields[1] != strconv.Itoa(os.Getpid()) {
				continue
			}
			children++
			syscall.Kill(pid, syscall.SIGKILL)
			syscall.Wait4(pid, nil, 0, nil)
		}
		if children == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
