package transaction

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// maxProc bounds how much of a file in /proc is read, in bytes.
	maxProc = 4 << 20

	// searchWait bounds the search for a lock's holders: a user may have a million open files.
	searchWait = 2 * time.Second

	// maxHolders bounds the number of holders, because a user may fork without end. The first
	// ones decide.
	maxHolders = 8
)

// lockHolders finds the processes that hold a flock on a directory. /proc/locks names only the
// process that took the lock (proc_locks(5)), and that may have exited and left it to its children.
// /proc/PID/fdinfo shows the lock for every process that holds it, but only root can read all of
// them. lockHolders reads nothing outside /proc, and nothing there that blocks on another process.
func lockHolders(ctx context.Context, d *dir) []holder {
	stat := statOf(d)
	match := func(line []byte) (pid int, ok bool) { return flockOf(line, stat) }

	var takers []int
	for line := range procLines("/proc/locks") {
		if pid, ok := match(line); ok && len(takers) < maxHolders && !slices.Contains(takers, pid) {
			takers = append(takers, pid)
		}
	}
	var sure, guesses []holder
	for _, pid := range takers {
		h, ok := look(pid)
		if !ok {
			continue
		}
		guesses = append(guesses, h)
		if holds(ctx, pid, match) {
			sure = append(sure, h)
		}
	}
	switch {
	case len(sure) > 0 && len(sure) == len(takers):
		return sure
	case os.Geteuid() != 0:
		return guesses
	}
	return search(ctx, match)
}

// search searches all visible processes, up to maxHolders and searchWait.
func search(ctx context.Context, match func([]byte) (int, bool)) (found []holder) {
	ctx, cancel := context.WithTimeout(ctx, searchWait)
	defer cancel()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || !holds(ctx, pid, match) {
			continue
		}
		if h, ok := look(pid); ok {
			found = append(found, h)
		}
		if ctx.Err() != nil || len(found) == maxHolders {
			break
		}
	}
	return found
}

// holds reports whether one of the process's open files has the lock.
func holds(ctx context.Context, pid int, match func([]byte) (int, bool)) bool {
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fdinfo", pid))
	if err != nil {
		return false
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(1000)
		for _, name := range names {
			for line := range procLines(dir.Name() + "/" + name) {
				lock, ok := bytes.CutPrefix(line, []byte("lock:"))
				if !ok {
					continue
				}
				if _, ok := match(lock); ok {
					return true
				}
			}
		}
		if err != nil || ctx.Err() != nil {
			return false
		}
	}
}

// flockOf parses a line such as "1: FLOCK  ADVISORY  WRITE 1234 08:01:131 0 EOF", and returns the
// process if the lock is on the given directory. The device in the line is that of the file system,
// which differs from the directory's on btrfs: there it finds no holder.
func flockOf(line []byte, stat *syscall.Stat_t) (pid int, ok bool) {
	fields := strings.Fields(string(line))
	if len(fields) < 6 || fields[1] != "FLOCK" { // "->": the process only waits for the lock
		return 0, false
	}
	place := strings.Split(fields[5], ":")
	if len(place) != 3 {
		return 0, false
	}
	pid, err1 := strconv.Atoi(fields[4])
	major, err2 := strconv.ParseUint(place[0], 16, 32)
	minor, err3 := strconv.ParseUint(place[1], 16, 32)
	inode, err4 := strconv.ParseUint(place[2], 10, 64)
	if cmp.Or(err1, err2, err3, err4) != nil {
		return 0, false
	}
	device := major&0xfff<<8 | major&^0xfff<<32 | minor&0xff | minor&^0xff<<12 // makedev(3)
	return pid, pid > 0 && inode == stat.Ino && device == uint64(stat.Dev)
}

// look returns the name of a process and the user who started it, even if it is set-user-ID.
func look(pid int) (holder, bool) {
	h := holder{pid: pid, uid: -1}
	for line := range procLines(fmt.Sprintf("/proc/%d/status", pid)) {
		switch name, value, _ := strings.Cut(string(line), ":"); name {
		case "Name":
			h.command = strings.TrimSpace(value)
		case "Uid": // real, effective, saved, file system
			fields := strings.Fields(value)
			if len(fields) < 2 {
				return h, false
			}
			for i := range 2 {
				uid, err := strconv.Atoi(fields[i])
				if err != nil {
					return h, false
				}
				if i == 0 {
					h.uid = uid
				}
				h.foreign = h.foreign || uid != 0 && uid != os.Geteuid()
			}
			return h, true
		}
	}
	return h, false
}

// procLines iterates over the lines of a file in /proc, until it ends or cannot be read.
func procLines(name string) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		f, err := os.Open(name)
		if err != nil {
			return
		}
		defer f.Close()
		for lines := bufio.NewScanner(io.LimitReader(f, maxProc)); lines.Scan(); {
			if !yield(lines.Bytes()) {
				return
			}
		}
	}
}
