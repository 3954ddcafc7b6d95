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
	// maxProc bounds what is read of one file of /proc.
	maxProc = 4 << 20

	// searchWait bounds the search for a lock's holders: a user can have a
	// million files open.
	searchWait = 2 * time.Second

	// maxHolders bounds the holders that are looked at: of a user who forks
	// without end, the first ones decide.
	maxHolders = 8
)

// lockHolders finds who holds a flock of a directory. The kernel notes only the
// process that took it (/proc/locks, proc_locks(5)), which can have ended and
// left it to its children; those show it beside each of their open files
// (fdinfo), which takes root to see for all. It touches no file system but
// /proc, and nothing there that waits for another process.
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

// search looks at the processes that can be seen, until it has found enough or
// looked for long enough.
func search(ctx context.Context, match func([]byte) (int, bool)) (found []holder) {
	ctx, cancel := context.WithTimeout(ctx, searchWait)
	defer cancel()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, fileRecord := range entries {
		pid, err := strconv.Atoi(fileRecord.Name())
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

// holds reports whether one of a process's open files has the lock.
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

// flockOf reads a line such as "1: FLOCK  ADVISORY  WRITE 1234 08:01:131 0 EOF".
// The device is the file system's, which on btrfs differs from a directory's:
// there nobody is found.
func flockOf(line []byte, stat *syscall.Stat_t) (pid int, ok bool) {
	fields := strings.Fields(string(line))
	if len(fields) < 6 || fields[1] != "FLOCK" { // "->" in its place: only waits
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

// look says who runs a process: the user who started it, also where it is
// setuid.
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

// procLines reads a file of /proc, as far as it can be read.
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
