package discovery

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/discovery/certfile"
)

const (
	// partSize is how many files of a large directory one task stats.
	partSize = 512

	// lookAhead is how many sibling directories are read ahead of the walk.
	lookAhead = 8

	// tickEvery is how many files are statted per tick. Each takes microseconds, unless it hangs.
	tickEvery = 32

	// entriesAtOnce is how many entries of a directory are read per tick.
	entriesAtOnce = 256

	// maxListing bounds the memory for the names of one directory, in bytes: about two million
	// names, which are sorted in memory.
	maxListing = 64 << 20
)

// Reasons for skipping files and directories, shown by "certctl-agent scan".
const (
	skipKey      = "private key files (.key)"
	skipSize     = "files over 1 MiB"
	skipEmpty    = "empty files"
	skipSpecial  = "devices, sockets and pipes"
	skipExcluded = "excluded by a pattern"
	skipOwn      = "directories of this agent"
	skipMount    = "file systems that are not local"
	skipDirLink  = "links to directories"
	skipInside   = "links to files that are scanned under their own path"
	skipAgain    = "repeated links to one file"
	skipNamed    = "listed as scan directories themselves"
	skipDangling = "dangling links"
)

// root is a configured directory or file.
type root struct {
	path   string
	real   string // path without symbolic links, except that a file keeps its own name
	isFile bool
	err    error
}

// ownDir is one of the agent's own directories.
type ownDir struct {
	identity
	real string // path without symbolic links
}

// nameList holds the names of a directory in one buffer, because a directory can have a million.
type nameList struct {
	text []byte
	refs []nameRef
}

type nameRef struct {
	at   uint32
	size uint16
	link bool
}

func (l *nameList) add(name string, link bool) {
	l.refs = append(l.refs, nameRef{uint32(len(l.text)), uint16(len(name)), link})
	l.text = append(append(l.text, name...), 0)
}

// name returns the name at index i. The byte after it is a NUL.
func (l *nameList) name(i int) []byte {
	ref := l.refs[i]
	return l.text[ref.at : ref.at+uint32(ref.size)]
}

// bytes returns how much memory the list takes.
func (l *nameList) bytes() int {
	const ref = 8 // bytes of a nameRef
	return len(l.text) + ref*len(l.refs)
}

func (l *nameList) sort() {
	slices.SortFunc(l.refs, func(a, b nameRef) int {
		return bytes.Compare(l.text[a.at:a.at+uint32(a.size)], l.text[b.at:b.at+uint32(b.size)])
	})
}

// status is the result of stat that a scan needs.
type status struct {
	identity
	size              int64
	modified, changed int64 // ns since 1970
	mode, owner       uint32
}

func (s status) isRegular() bool { return s.mode&syscall.S_IFMT == syscall.S_IFREG }

func statusOf(st *syscall.Stat_t) status {
	s := status{identity: identity{uint64(st.Dev), st.Ino}, size: st.Size, mode: uint32(st.Mode), owner: st.Uid}
	s.modified, s.changed = changeTimes(st)
	return s
}

func statusOfOpen(fd int) (status, error) {
	var st syscall.Stat_t
	err := retry(func() error { return syscall.Fstat(fd, &st) })
	return statusOf(&st), err
}

// file is a regular file to read.
type file struct {
	name []byte
	status
	link bool // a symbolic link to a file outside the tree
}

// node is a directory, or a part of the files of a large directory.
type node struct {
	*task
	root   int
	isRoot bool // path may be a link
	path   string
	shown  string // path to report
	real   string // path without symbolic links
	dev    uint64 // device of the parent directory

	all    *nameList // names of which lo to hi are this part's
	lo, hi int

	listing // set when the task is done
}

// listing is the result of listing a directory.
type listing struct {
	files    []file
	rest     *nameList // files of a large directory, to be handled in parts
	dirs     *nameList
	current  string // subdirectory whose files are reported as this directory's, or ""
	self     status
	problems []string
	skipped  map[string]int
	seen     int
}

func (n *node) skip(reason string) {
	if n.skipped == nil {
		n.skipped = make(map[string]int)
	}
	n.skipped[reason]++
}

func (n *node) problem(name string, err error) {
	n.problems = append(n.problems, problemOf(name, cause(err)))
}

// walk visits the directories in order and passes their files to addFiles. Workers list directories
// ahead of it.
func (r *run) walk() error {
	for i := range r.roots {
		root := &r.roots[i]
		if root.err != nil {
			r.problems.add(root.path, cause(root.err))
			continue
		}
		top := &node{root: i, isRoot: true, path: root.path, shown: root.path, real: root.real}
		look := r.list
		if root.isFile {
			top.path, top.shown, top.real = path.Dir(root.path), path.Dir(root.path), path.Dir(root.real)
			look = func(w *worker, n *node) { r.examineOne(w, n, path.Base(root.path)) }
		}
		r.start(top, r.mounts.of(top.real).point, look)
		if err := r.visit(top); err != nil {
			return err
		}
	}
	return nil
}

// visit processes the files of a directory and then visits its subdirectories.
func (r *run) visit(n *node) error {
	if err := r.collect(n); err != nil {
		return err
	}
	if n.rest != nil {
		part := func(i int) *node { return r.startPart(n, i*partSize) }
		if err := inOrder((len(n.rest.refs)+partSize-1)/partSize, part, r.collect); err != nil {
			return err
		}
		n.rest = nil
	}
	if n.dirs == nil {
		return nil
	}
	child := func(i int) *node { return r.startChild(n, string(n.dirs.name(i))) }
	return inOrder(len(n.dirs.refs), child, r.visit)
}

// inOrder visits nodes in order and keeps the next lookAhead of them started.
func inOrder(total int, start func(int) *node, visit func(*node) error) error {
	var ahead []*node
	for i := range total {
		for len(ahead) < lookAhead && i+len(ahead) < total {
			ahead = append(ahead, start(i+len(ahead)))
		}
		n := ahead[0]
		ahead = append(ahead[:0:0], ahead[1:]...)
		if err := visit(n); err != nil {
			return err
		}
	}
	return nil
}

// collect waits for the task of a node, adds its counts to the summary, and passes its files to
// addFiles.
func (r *run) collect(n *node) error {
	if err := r.wait(n.task, n.shown); err != nil {
		return err
	}
	r.s.files.Add(int64(n.seen))
	for _, problem := range n.problems {
		r.problems.note(problem)
	}
	for reason, count := range n.skipped {
		r.summary.Skipped[reason] += count
	}
	n.problems, n.skipped = nil, nil
	return r.addFiles(n)
}

func join(dir, name string) string {
	if dir == "/" {
		return dir + name
	}
	return dir + "/" + name
}

func (r *run) startChild(parent *node, name string) *node {
	n := &node{root: parent.root, path: join(parent.path, name), real: join(parent.real, name), dev: parent.self.dev}
	n.shown = n.path
	if name == parent.current {
		n.shown = parent.shown
	} else if len(parent.shown) != len(parent.path) {
		n.shown = join(parent.shown, name)
	}
	mount := parent.mount
	if m, ok := r.mounts[n.real]; ok {
		mount = m.point
	}
	r.start(n, mount, r.list)
	return n
}

// startPart starts a task for up to partSize files of a large directory, beginning with lo.
func (r *run) startPart(n *node, lo int) *node {
	part := &node{root: n.root, isRoot: n.isRoot, path: n.path, shown: n.shown, real: n.real, all: n.rest, lo: lo, hi: min(lo+partSize, len(n.rest.refs))}
	r.start(part, n.mount, r.examineAt)
	return part
}

// start queues a task that lists a directory. The task works on a copy of n.
func (r *run) start(n *node, mount string, look func(*worker, *node)) {
	n.task = newTask(mount, func(w *worker) func() {
		done := *n
		look(w, &done)
		return func() { n.listing = done.listing }
	})
	r.queue(n.task)
}

// list reads a directory and, if it is small, examines its files.
func (r *run) list(w *worker, n *node) {
	if err := r.readDirectory(w, n); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.problem(n.shown, err)
	}
}

// examineOne examines one file of a directory.
func (r *run) examineOne(w *worker, n *node, name string) {
	n.all, n.hi = &nameList{}, 1
	n.all.add(name, false)
	w.tick()
	r.examineAt(w, n)
}

// examineAt opens a directory and examines the files of a part.
func (r *run) examineAt(w *worker, n *node) {
	dir, err := r.listable(n)
	if err != nil {
		n.problem(n.shown, err)
	}
	if dir == nil {
		return
	}
	defer dir.Close()
	r.examine(w, n, dir)
}

func (r *run) readDirectory(w *worker, n *node) error {
	w.tick()
	dir, err := r.listable(n)
	if dir == nil {
		return err
	}
	defer dir.Close()
	if !n.isRoot && n.self.dev != n.dev && !r.mounts.mayEnter(n.real) {
		n.skip(skipMount) // mounted after the scan began
		return nil
	}
	files := &nameList{}
	n.dirs = &nameList{}
	for {
		w.tick()
		entries, err := dir.ReadDir(entriesAtOnce)
		for _, entry := range entries {
			r.classify(n, files, entry.Name(), entry.Type())
		}
		if r.ctx.Err() != nil {
			return nil
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			n.problem(n.shown, err) // the names read so far are still used
			break
		}
		if files.bytes()+n.dirs.bytes() > r.s.maxListing {
			n.problem(n.shown, fmt.Errorf("the directory has too many names: only the first %d are scanned", len(files.refs)+len(n.dirs.refs)))
			break
		}
	}
	files.sort()
	n.dirs.sort()
	n.current = r.currentOf(n, files)
	if len(files.refs) > partSize {
		n.rest = files
		return nil
	}
	n.all, n.lo, n.hi = files, 0, len(files.refs)
	r.examine(w, n, dir)
	return nil
}

// currentOf returns the subdirectory whose files are reported as those of n, or "". Kubernetes
// writes each version of a mounted Secret into a new directory, named after the time, and links
// ..data to the newest. Programs read tls.crt, a link to ..data/tls.crt. That path is the one to
// report: it stays the same, and it is in the server's configuration.
func (r *run) currentOf(n *node, files *nameList) string {
	const link = "..data"
	_, found := slices.BinarySearchFunc(files.refs, link, func(ref nameRef, name string) int {
		return bytes.Compare(files.text[ref.at:ref.at+uint32(ref.size)], []byte(name))
	})
	if !found {
		return ""
	}
	target, err := os.Readlink(join(n.path, link))
	if err != nil || !strings.HasPrefix(target, "..") || target == ".." || strings.Contains(target, "/") {
		return ""
	}
	return target
}

// openDirectory opens the directory of a node. Only a root may be a link.
func openDirectory(n *node) (fd int, err error) {
	flags := syscall.O_RDONLY | syscall.O_DIRECTORY | syscall.O_CLOEXEC
	if !n.isRoot {
		flags |= syscall.O_NOFOLLOW
	}
	err = retry(func() (err error) {
		fd, err = syscall.Open(n.path, flags, 0)
		return err
	})
	return fd, err
}

// listable opens the directory of a node. It skips the agent's own directories: then the file is
// nil.
func (r *run) listable(n *node) (*os.File, error) {
	fd, err := openDirectory(n)
	if err != nil {
		return nil, err
	}
	dir := os.NewFile(uintptr(fd), n.path)
	if n.self, err = statusOfOpen(int(dir.Fd())); err != nil {
		dir.Close()
		return nil, err
	}
	if r.isOwn(dir, n.self) {
		dir.Close()
		n.skip(skipOwn)
		return nil, nil
	}
	return dir, nil
}

// isOwn reports whether an open directory is one of the agent's own, or below one. Only the kernel
// knows: the owner of any directory on the path can replace it with a link at any moment.
func (r *run) isOwn(dir *os.File, st status) bool {
	if len(r.own) == 0 {
		return false
	}
	if slices.ContainsFunc(r.own, func(own ownDir) bool { return own.identity == st.identity }) {
		return true
	}
	real, err := pathOf(int(dir.Fd()))
	return err == nil && r.inOwn(real)
}

// inOwn reports whether a real path is at or below one of the agent's own directories.
func (r *run) inOwn(real string) bool {
	return slices.ContainsFunc(r.own, func(own ownDir) bool { return isBelow(real, own.real) })
}

func isBelow(path, dir string) bool {
	return dir == "/" || strings.HasPrefix(path, dir) && (len(path) == len(dir) || path[len(dir)] == '/')
}

// forbidden returns the reason why a file must not be read whatever link leads to it, or "". A file
// below an excluded directory is not forbidden: the exclusion applies to the walk, and the link may
// be the path that matters, as in Let's Encrypt's live directory.
func (r *run) forbidden(real string) string {
	dir, name := path.Split(strings.TrimSuffix(real, " (deleted)"))
	dir = path.Clean(dir)
	switch {
	case r.inOwn(real):
		return skipOwn
	case certfile.IsKey(name):
		return skipKey
	case r.excluded(dir, name):
		return skipExcluded
	}
	for i := range r.roots {
		if root := &r.roots[i]; root.err == nil && root.real != root.path && isBelow(dir, root.real) && r.excluded(root.walkPath(dir), name) {
			return skipExcluded
		}
	}
	return ""
}

// walkPath returns the path under which the walk sees a real path below the root.
func (r *root) walkPath(real string) string {
	return path.Join(r.path, strings.TrimPrefix(real, r.real))
}

// classify decides by name and type alone how to handle a directory entry.
func (r *run) classify(n *node, files *nameList, name string, mode fs.FileMode) {
	switch {
	case mode.IsDir():
		if reason := r.skipReason(n, name); reason != "" {
			n.skip(reason)
			return
		}
		n.dirs.add(name, false)
	case mode.IsRegular(), mode&fs.ModeSymlink != 0:
		switch {
		case len(r.s.opts.Exclude) > 0 && r.excludedIn(n, name):
			n.skip(skipExcluded)
		case certfile.IsKey(name):
			n.skip(skipKey)
		case r.anyFile && slices.Contains(r.s.opts.Dirs, join(n.path, name)):
			n.skip(skipNamed)
		default:
			files.add(name, !mode.IsRegular())
		}
	default:
		n.skip(skipSpecial)
	}
}

// skipReason returns why a directory is not entered, or "".
func (r *run) skipReason(n *node, name string) string {
	if r.excludedIn(n, name) {
		return skipExcluded
	}
	full := join(n.path, name)
	if slices.Contains(r.s.opts.Dirs, full) {
		return skipNamed // it is walked as a root
	}
	if m, ok := r.mounts[join(n.real, name)]; ok && !m.local {
		return skipMount
	}
	switch join(n.real, name) {
	case "/proc", "/sys", "/dev":
		return skipMount
	}
	return ""
}

// excludedIn reports whether a pattern matches a name in a directory, by its path or by the path to
// report.
func (r *run) excludedIn(n *node, name string) bool {
	return r.excluded(n.path, name) || len(n.shown) != len(n.path) && r.excluded(n.shown, name)
}

func (r *run) excluded(dir, name string) bool {
	for _, pattern := range r.s.opts.Exclude {
		subject := name
		if strings.Contains(pattern, "/") {
			subject = join(dir, name)
		}
		if ok, _ := path.Match(pattern, subject); ok {
			return true
		}
	}
	return false
}

// examine stats the files of a node from lo to hi.
func (r *run) examine(w *worker, n *node, dir *os.File) {
	n.files = make([]file, 0, n.hi-n.lo)
	w.tick()
	var st syscall.Stat_t
	for i := n.lo; i < n.hi; i++ {
		if r.ctx.Err() != nil {
			return
		}
		if r.limit(w) || i%tickEvery == 0 {
			w.tick()
		}
		f := file{name: n.all.name(i), link: n.all.refs[i].link}
		n.seen++
		if err := retry(func() error { return lstatIn(dir, n.path, f.name[:len(f.name)+1], &st) }); err != nil {
			if err != syscall.ENOENT {
				n.problem(join(n.shown, string(f.name)), err)
			}
			continue
		}
		f.status = statusOf(&st)
		if f.mode&syscall.S_IFMT == syscall.S_IFLNK {
			f.link = true
			if !r.follow(w, n, &f) {
				continue
			}
		}
		switch {
		case !f.isRegular():
			n.skip(skipSpecial)
		case f.size == 0:
			n.skip(skipEmpty)
		case f.size > MaxFileSize:
			n.skip(skipSize)
		default:
			n.files = append(n.files, f)
		}
	}
}

// follow resolves a symbolic link and reports whether its target should be read under the link's
// name.
func (r *run) follow(w *worker, n *node, f *file) bool {
	full := join(n.path, string(f.name))
	var st syscall.Stat_t
	target, err := os.Readlink(full)
	if err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(n.real, target)
		}
		// A network file system is not touched: its server may be gone.
		if target = filepath.Clean(target); !r.mounts.of(target).local {
			n.skip(skipMount)
			return false
		}
		err = w.followLink(full, func() (err error) {
			if target, err = filepath.EvalSymlinks(full); err != nil {
				return err
			}
			return retry(func() error { return syscall.Stat(target, &st) })
		})
	}
	if err != nil {
		if certfile.HasKnownExtension(string(f.name)) || err == errHung {
			n.problem(join(n.shown, string(f.name)), fmt.Errorf("dangling link: %s", cause(err)))
		} else {
			n.skip(skipDangling)
		}
		return false
	}
	f.status = statusOf(&st)
	if reason := r.forbidden(target); reason != "" {
		n.skip(reason)
		return false
	}
	switch {
	case f.mode&syscall.S_IFMT == syscall.S_IFDIR:
		n.skip(skipDirLink)
		return false
	case !f.isRegular():
		return true
	case r.covered(target):
		n.skip(skipInside)
		return false
	case !r.mounts.of(target).local:
		n.skip(skipMount)
		return false
	}
	return true
}

// covered reports whether the walk reads a file under its real path.
func (r *run) covered(real string) bool {
	dir := path.Dir(real)
	r.coveredMu.Lock()
	covered, known := r.coveredDirs[dir]
	r.coveredMu.Unlock()
	if !known {
		covered = slices.ContainsFunc(r.roots, func(root root) bool { return root.err == nil && !root.isFile && r.reaches(&root, dir) })
		r.coveredMu.Lock()
		const maxCovered = 1 << 12
		if r.coveredDirs == nil || len(r.coveredDirs) >= maxCovered {
			r.coveredDirs = make(map[string]bool)
		}
		r.coveredDirs[dir] = covered
		r.coveredMu.Unlock()
	}
	return covered || r.anyFile && slices.ContainsFunc(r.roots, func(root root) bool { return root.isFile && root.real == real })
}

// reaches reports whether the walk from a root reaches a directory, given by its real path, and can
// list it.
func (r *run) reaches(root *root, dir string) bool {
	if !isBelow(dir, root.real) {
		return false
	}
	const readAndSearch = 4 | 1 // R_OK | X_OK
	if retry(func() error { return syscall.Access(dir, readAndSearch) }) != nil {
		return false
	}
	for at := dir; at != root.real; at = path.Dir(at) {
		above := path.Dir(at)
		shown := root.walkPath(above)
		if r.skipReason(&node{path: shown, shown: shown, real: above}, path.Base(at)) != "" {
			return false
		}
	}
	return true
}

func retry(f func() error) error {
	for {
		if err := f(); err != syscall.EINTR {
			return err
		}
	}
}

// limit enforces MaxRate: it waits until the next file is due. It reports whether there is a limit.
func (r *run) limit(w *worker) bool {
	if r.s.opts.MaxRate <= 0 {
		return false
	}
	w.rest()
	r.rateMu.Lock()
	now := time.Now()
	if r.nextFile.Before(now) {
		r.nextFile = now
	}
	wait := r.nextFile.Sub(now)
	r.nextFile = r.nextFile.Add(time.Second / time.Duration(r.s.opts.MaxRate))
	r.rateMu.Unlock()
	if wait >= time.Millisecond {
		_ = sleep(r.ctx, wait)
	}
	return true
}

// resolveRoots resolves the configured directories in tasks, because one may be a link to a hung
// file system.
func (r *run) resolveRoots() error {
	var tasks []*task
	for i, dir := range r.s.opts.Dirs {
		r.roots[i].path = dir
		t := newTask("", func(w *worker) func() {
			resolved := root{path: dir}
			resolved.err = w.followLink(dir, resolved.resolve)
			return func() { r.roots[i] = resolved }
		})
		r.queue(t)
		tasks = append(tasks, t)
	}
	for i, t := range tasks {
		if err := r.wait(t, r.s.opts.Dirs[i]); err != nil {
			return err
		}
		r.anyFile = r.anyFile || r.roots[i].isFile
	}
	return nil
}

func (r *root) resolve() (err error) {
	if r.real, err = filepath.EvalSymlinks(r.path); err != nil {
		return err
	}
	info, err := os.Stat(r.real)
	switch {
	case err != nil || info.IsDir():
		return err
	case !info.Mode().IsRegular():
		return errors.New("neither a directory nor a regular file")
	case certfile.IsKey(r.path):
		return errors.New("private key files (.key) are not read")
	}
	r.isFile = true
	above, err := filepath.EvalSymlinks(path.Dir(r.path))
	r.real = join(above, path.Base(r.path))
	return err
}
