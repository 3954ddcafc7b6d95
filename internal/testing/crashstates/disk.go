package crashstates

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// A Disk models a directory and everything below it, on a file system that journals metadata. A
// power cut keeps what was synced. For the rest,
//
//   - each change of a directory's names is kept or lost, independently of the others;
//   - a file has its old bytes, its new bytes, a part of the new ones, or its new length with zeroes,
//     and its old or its new mode.
//
// The model has no owners and no extended attributes.
type Disk struct {
	base    string
	nodes   []*node
	now     int         // calls applied
	open    map[int]int // node by descriptor
	offsets map[int]int // by descriptor
}

const root = 0 // the node of base

// node is a file or a directory.
type node struct {
	dir     bool
	durable content
	later   []content // after each unsynced change, oldest first

	// Of a directory. Both maps give nodes by name.
	synced  map[string]int // durable
	changes []change       // unsynced, oldest first
	names   map[string]int // now
}

// content is a file's bytes and mode.
type content struct {
	at   int // number of the call that made it so
	data string
	mode fs.FileMode
}

// change gives a name to a node, or removes the name if node is -1. A rename is one change.
type change struct {
	at   int
	name string
	node int
	from string // the old name, in a rename
}

func (c change) apply(names map[string]int) {
	if c.from != "" {
		delete(names, c.from)
	}
	if c.node < 0 {
		delete(names, c.name)
	} else {
		names[c.name] = c.node
	}
}

// Load returns a Disk with everything that is now in base, all of it durable.
func Load(base string) (*Disk, error) {
	d := &Disk{base: base}
	at := make(map[string]int)
	err := filepath.WalkDir(base, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		n := &node{dir: entry.IsDir(), durable: content{mode: info.Mode().Perm()}}
		switch {
		case n.dir:
			n.synced, n.names = make(map[string]int), make(map[string]int)
		case entry.Type().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			n.durable.data = string(data)
		case entry.Type() == fs.ModeSocket:
			return nil
		default:
			return fmt.Errorf("%s is neither a file nor a directory", path)
		}
		at[path] = len(d.nodes)
		if path != base {
			parent := d.nodes[at[filepath.Dir(path)]]
			parent.synced[entry.Name()], parent.names[entry.Name()] = len(d.nodes), len(d.nodes)
		}
		d.nodes = append(d.nodes, n)
		return nil
	})
	d.Run()
	return d, err
}

// Run starts another run of the program. Its calls are applied next, and counted from 0.
func (d *Disk) Run() {
	d.offsets, d.open, d.now = make(map[int]int), make(map[int]int), 0
	for _, n := range d.nodes {
		for i := range n.later {
			n.later[i].at = -1
		}
		for i := range n.changes {
			n.changes[i].at = -1
		}
	}
}

// latest returns the present content of a file.
func (n *node) latest() content {
	if len(n.later) > 0 {
		return n.later[len(n.later)-1]
	}
	return n.durable
}

// find returns the node at path, or -1 if there is none or path is outside base.
func (d *Disk) find(path string) int {
	rel, err := filepath.Rel(d.base, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return -1
	}
	at := root
	if rel == "." {
		return at
	}
	for name := range strings.SplitSeq(rel, "/") {
		next, ok := d.nodes[at].names[name]
		if !ok {
			return -1
		}
		at = next
	}
	return at
}

// parent returns the directory of path and the last element. The directory is nil outside base.
func (d *Disk) parent(path string) (*node, string) {
	at := d.find(filepath.Dir(path))
	if at < 0 || !d.nodes[at].dir {
		return nil, ""
	}
	return d.nodes[at], filepath.Base(path)
}

// alter changes the names of a directory.
func (d *Disk) alter(n *node, c change) {
	c.at = d.now
	n.changes = append(n.changes, c)
	c.apply(n.names)
}

// create creates a file or a directory.
func (d *Disk) create(path string, dir bool, mode fs.FileMode) {
	parent, name := d.parent(path)
	if parent == nil {
		return
	}
	n := &node{dir: dir, durable: content{mode: mode}}
	if dir {
		n.synced, n.names = make(map[string]int), make(map[string]int)
	}
	d.nodes = append(d.nodes, n)
	d.alter(parent, change{name: name, node: len(d.nodes) - 1})
}

// at returns the path in arguments i and i+1: the descriptor of a directory, and a name.
func (c *Call) at(i int) (string, error) {
	_, dir, err := descriptor(c.arg(i))
	if err != nil {
		return "", err
	}
	name, err := c.text(i + 1)
	if err != nil {
		return "", err
	}
	if filepath.IsAbs(name) {
		return filepath.Clean(name), nil
	}
	return filepath.Join(dir, name), nil
}

// write changes a file's bytes.
func (d *Disk) write(at, offset int, data string) {
	n := d.nodes[at]
	c := n.latest()
	if missing := offset - len(c.data); missing > 0 {
		c.data += strings.Repeat("\x00", missing)
	}
	c.data = c.data[:offset] + data + c.data[min(len(c.data), offset+len(data)):]
	d.become(n, c)
}

// become changes the content of a file.
func (d *Disk) become(n *node, c content) {
	c.at = d.now
	n.later = append(n.later, c)
}

// sync makes durable what was there when the sync call was entered.
func (d *Disk) sync(n *node, entered int) {
	for len(n.later) > 0 && n.later[0].at < entered {
		n.durable, n.later = n.later[0], n.later[1:]
	}
	for len(n.changes) > 0 && n.changes[0].at < entered {
		n.changes[0].apply(n.synced)
		n.changes = n.changes[1:]
	}
}

// Apply applies the next call. It reports whether the call changes the disk or starts a command.
func (d *Disk) Apply(c *Call) (matters bool, err error) {
	defer func() { d.now++ }()
	if c.foreign {
		return c.Name == "execve", nil
	}
	if matters, err = d.apply(c); err != nil {
		return false, fmt.Errorf("%v: %w", c, err)
	}
	return matters, nil
}

func (d *Disk) apply(c *Call) (bool, error) {
	switch c.Name {
	case "execve", "fork", "vfork", "clone", "clone3":
		return false, nil
	case "openat", "open", "creat":
		return d.opened(c)
	case "renameat", "renameat2":
		return d.rename(c)
	case "linkat":
		from, err := c.at(0)
		if err != nil {
			return false, err
		}
		to, err := c.at(2)
		if err != nil {
			return false, err
		}
		parent, name := d.parent(to)
		if parent == nil {
			return false, nil
		}
		at := d.find(from)
		if at < 0 {
			return false, fmt.Errorf("link of %s, which is not known", from)
		}
		d.alter(parent, change{name: name, node: at})
		return true, nil
	case "unlinkat":
		path, err := c.at(0)
		if err != nil {
			return false, err
		}
		parent, name := d.parent(path)
		if parent == nil {
			return false, nil
		}
		if _, known := parent.names[name]; known {
			d.alter(parent, change{name: name, node: -1})
		} else if !strings.HasSuffix(name, ".sock") {
			return false, fmt.Errorf("%s was removed, and is not known", path)
		}
		return true, nil
	case "mkdirat":
		path, err := c.at(0)
		if err != nil {
			return false, err
		}
		mode, err := c.number(2)
		if err != nil {
			return false, err
		}
		d.create(path, true, fs.FileMode(mode))
		return d.find(path) >= 0, nil
	case "fchmodat", "fchownat", "fchown":
		return d.attributes(c)
	}
	fd, path, err := descriptor(c.arg(0))
	if err != nil {
		return false, fmt.Errorf("the model does not know this call: %w", err)
	}
	// close is not traced: another file may get the descriptor before the call has returned.
	at := d.find(path)
	if at < 0 {
		return false, nil // elsewhere, or without a name
	}
	if open, ok := d.open[fd]; !ok || open != at {
		return false, fmt.Errorf("%s was not seen to be opened", path)
	}
	n := d.nodes[at]
	switch c.Name {
	case "write", "pwrite64":
		data, err := c.text(1)
		if err != nil {
			return false, err
		}
		if written := fmt.Sprint(len(data)); c.result != written {
			return false, fmt.Errorf("wrote %s of %s bytes", c.result, written)
		}
		offset := d.offsets[fd]
		if c.Name == "pwrite64" {
			o, err := c.number(3)
			if err != nil {
				return false, err
			}
			offset = int(o)
		} else {
			d.offsets[fd] += len(data)
		}
		d.write(at, offset, data)
	case "ftruncate":
		size, err := c.number(1)
		if err != nil {
			return false, err
		}
		now := n.latest()
		now.data = now.data[:min(int(size), len(now.data))]
		now.data += strings.Repeat("\x00", int(size)-len(now.data))
		d.become(n, now)
	case "fchmod":
		mode, err := c.number(1)
		if err != nil {
			return false, err
		}
		now := n.latest()
		now.mode = fs.FileMode(mode)
		d.become(n, now)
	case "fsync", "fdatasync":
		d.sync(n, c.entered)
	default:
		return false, fmt.Errorf("the model does not know this call on a file (%s)", path)
	}
	return true, nil
}

func (d *Disk) opened(c *Call) (bool, error) {
	if c.Name != "openat" {
		return false, fmt.Errorf("the model knows openat only")
	}
	fd, path, err := descriptor(c.result)
	if err != nil {
		return false, err
	}
	flags := c.arg(2)
	delete(d.open, fd)
	delete(d.offsets, fd)
	made := false
	if d.find(path) < 0 && strings.Contains(flags, "O_CREAT") {
		mode, err := c.number(3)
		if err != nil {
			return false, err
		}
		d.create(path, false, fs.FileMode(mode))
		made = true
	}
	at := d.find(path)
	if at < 0 {
		return false, nil
	}
	n := d.nodes[at]
	if strings.Contains(flags, "O_APPEND") {
		return false, fmt.Errorf("the model does not know O_APPEND")
	}
	if strings.Contains(flags, "O_TRUNC") && n.latest().data != "" {
		now := n.latest()
		now.data = ""
		d.become(n, now)
		made = true
	}
	d.open[fd] = at
	return made, nil
}

func (d *Disk) rename(c *Call) (bool, error) {
	from, err := c.at(0)
	if err != nil {
		return false, err
	}
	to, err := c.at(2)
	if err != nil {
		return false, err
	}
	if strings.Contains(c.arg(4), "EXCHANGE") {
		return false, fmt.Errorf("the model does not know RENAME_EXCHANGE")
	}
	source, old := d.parent(from)
	target, name := d.parent(to)
	if source == nil && target == nil {
		return false, nil
	}
	at := d.find(from)
	switch {
	case at < 0 && strings.HasSuffix(to, ".sock"):
		return false, nil // sockets are not in the model
	case at < 0:
		return false, fmt.Errorf("%s is not known", from)
	case source != target:
		return false, fmt.Errorf("from one directory into another")
	}
	d.alter(source, change{name: name, node: at, from: old})
	return true, nil
}

// attributes applies a call that changes attributes by name. It ignores owners.
func (d *Disk) attributes(c *Call) (bool, error) {
	if c.Name == "fchown" || c.Name == "fchownat" {
		return false, nil
	}
	path, err := c.at(0)
	if err != nil {
		return false, err
	}
	at := d.find(path)
	if at < 0 {
		return false, nil // a socket
	}
	mode, err := c.number(2)
	if err != nil {
		return false, err
	}
	now := d.nodes[at].latest()
	now.mode = fs.FileMode(mode)
	d.become(d.nodes[at], now)
	return true, nil
}

// State is a disk after a power cut: its files and directories, by their paths below base.
type State map[string]Entry

// Entry is a file or a directory.
type Entry struct {
	Dir  bool
	Data string
	Mode fs.FileMode
}

// Diff returns the name of a file that is different in base and in the state, or "" if there is
// none. It ignores sockets.
func (s State) Diff(base string) (name string, err error) {
	disk, err := Load(base)
	if err != nil {
		return "", err
	}
	has := disk.Now()
	for name := range s {
		if _, ok := has[name]; !ok {
			return name, nil
		}
	}
	for name, e := range has {
		if s[name] != e {
			return name, nil
		}
	}
	return "", nil
}

// Write replaces everything in base by the state.
func (s State) Write(base string) error {
	entries, err := os.ReadDir(base)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := os.RemoveAll(filepath.Join(base, entry.Name())); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s)) {
		e, path := s[name], filepath.Join(base, name)
		if e.Dir {
			if err := os.Mkdir(path, 0o700); err != nil && !(name == "." && os.IsExist(err)) {
				return err
			}
		} else if err := os.WriteFile(path, []byte(e.Data), 0o600); err != nil {
			return err
		}
		if err := syscall.Chmod(path, uint32(e.Mode)); err != nil {
			return err
		}
	}
	return nil
}

// String lists the files.
func (s State) String() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s)) {
		if e := s[name]; !e.Dir {
			fmt.Fprintf(&b, "  %s %04o %d bytes\n", name, e.Mode, len(e.Data))
		}
	}
	return b.String()
}
