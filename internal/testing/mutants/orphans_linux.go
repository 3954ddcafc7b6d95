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

// adoptOrphans makes this process the parent of every process that loses its
// own further down, such as a daemon that a test has started.
func adoptOrphans() error {
	const prSetChildSubreaper = 36
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); errno != 0 {
		return fmt.Errorf("become a subreaper: %w", errno)
	}
	return nil
}

// isolated puts a process in a group of its own, and, where that is allowed, out of
// sight what it mounts.
func isolated() *syscall.SysProcAttr {
	attributes := &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		attributes.Unshareflags = syscall.CLONE_NEWNS
	}
	return attributes
}

// killOrphans ends all children of this process. It is called while there is
// none that this process has started and still waits for.
func killOrphans() {
	for range 100 {
		children := 0
		stats, _ := filepath.Glob("/proc/[0-9]*/stat")
		for _, name := range stats {
			text, _ := os.ReadFile(name)
			// pid (name) state parent …, where the name may have anything in it
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
