package transaction

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/testing/needs"
)

// This file models what a power cut leaves on a file system that journals metadata. It keeps what
// was synced. For the rest,
//
//   - any subset of the changes of a directory's names is kept, applied in order (real file systems lose
//     only a suffix);
//   - the bytes of a file are old, new or torn, and its mode and owner old or new, independently.

// disks models a disk: what is certainly on it, and what may be.
type disks struct {
	base  string
	dirs  map[string]*modelDir
	nodes []*modelFile
}

type modelDir struct {
	attributes
	durable map[string]int // file by name; sub-directories are in disks.dirs
	pending []diskChange
	now     map[string]int
}

// diskChange is one change of a directory's names.
type diskChange struct {
	op       string // create, remove, rename, mkdir
	from, to string
	file     int
}

type modelFile struct{ durable, now content }

type content struct {
	data string
	attributes
}

// load reads a world into the model. Everything in it is durable.
func load(t testing.TB, base string) *disks {
	t.Helper()
	m := &disks{base: base, dirs: make(map[string]*modelDir)}
	check(t, filepath.WalkDir(base, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		a := attributes{Mode: info.Mode().Perm()}
		a.UID, a.GID = hostfile.Owner(info)
		if e.IsDir() {
			m.dirs[p] = &modelDir{attributes: a, durable: make(map[string]int), now: make(map[string]int)}
			return nil
		}
		data, err := os.ReadFile(p)
		c := content{string(data), a}
		d := m.dirs[filepath.Dir(p)]
		d.durable[e.Name()], d.now[e.Name()] = len(m.nodes), len(m.nodes)
		m.nodes = append(m.nodes, &modelFile{c, c})
		return err
	}))
	return m
}

// note applies one step to the model. It is called before the step happens, so it computes the
// effect itself.
func (m *disks) note(s Step) {
	d := m.dirs[path.Dir(s.Path)]
	name := path.Base(s.Path)
	alter := func(c diskChange) {
		d.pending = append(d.pending, c)
		c.apply(d.now)
	}
	file := func() *modelFile { return m.nodes[d.now[name]] }
	switch s.Op {
	case "create":
		c := content{"", attributes{Mode: 0o600, UID: os.Geteuid(), GID: os.Getegid()}}
		alter(diskChange{op: "create", to: name, file: len(m.nodes)})
		m.nodes = append(m.nodes, &modelFile{c, c})
	case "write":
		f := file()
		f.now.data = string(s.data) + f.now.data[min(len(s.data), len(f.now.data)):]
	case "truncate":
		f := file()
		f.now.data = f.now.data[:len(s.data)]
	case "chmod":
		file().now.Mode = s.attr.Mode
	case "chown":
		f := file()
		if s.attr.UID >= 0 {
			f.now.UID = s.attr.UID
		}
		if s.attr.GID >= 0 {
			f.now.GID = s.attr.GID
		}
	case "sync":
		f := file()
		f.durable = f.now
	case "rename":
		alter(diskChange{op: "rename", from: name, to: path.Base(s.to), file: d.now[name]})
	case "remove":
		if _, isDir := m.dirs[s.Path]; isDir {
			// Its files are removed first, so it does not matter whether its name is still there.
			return
		}
		alter(diskChange{op: "remove", from: name})
	case "mkdir":
		m.dirs[s.Path] = &modelDir{attributes: attributes{Mode: 0o700, UID: os.Geteuid(), GID: os.Getegid()},
			durable: make(map[string]int), now: make(map[string]int)}
		alter(diskChange{op: "mkdir", to: name})
	case "syncdir":
		d := m.dirs[s.Path]
		d.durable, d.pending = maps.Clone(d.now), nil
	}
}

func (c diskChange) apply(names map[string]int) {
	switch c.op {
	case "create":
		names[c.to] = c.file
	case "rename":
		if names[c.from] == c.file {
			delete(names, c.from)
		}
		names[c.to] = c.file
	case "remove":
		delete(names, c.from)
	}
}

// image is one state of the disk after a power cut: files and directories, by path.
type image map[string]content

const isDir = "directory\x00"

// maxStates bounds the states tested after one step. If there are more, the test takes a sample,
// the same in each run.
var maxStates = flag.Int("states", 20, "power-cut states to try after one step")

// images calls use for each state that a power cut at this moment can leave.
func (m *disks) images(use func(image)) {
	var choices []int // how many states each undecided thing has
	paths := slices.Sorted(maps.Keys(m.dirs))
	for _, p := range paths {
		choices = append(choices, m.dirs[p].choices())
	}
	var loose []int
	for i, f := range m.nodes {
		if !sameContent(f.durable, f.now) {
			loose = append(loose, i)
			choices = append(choices, 6)
		}
	}
	total := 1
	for _, n := range choices {
		total *= n
	}
	pick := make([]int, len(choices))
	if total > *maxStates {
		random := rand.New(rand.NewPCG(uint64(total), 0))
		for range *maxStates {
			for i, n := range choices {
				pick[i] = random.IntN(n)
			}
			m.image(paths, loose, pick, use)
		}
		return
	}
	for {
		m.image(paths, loose, pick, use)
		i := 0
		for ; i < len(pick); i++ {
			if pick[i]++; pick[i] < choices[i] {
				break
			}
			pick[i] = 0
		}
		if i == len(pick) {
			return
		}
	}
}

// maxSubsets bounds how many unsynced changes of a directory are lost in all subsets. If there are
// more, only suffixes are lost.
const maxSubsets = 5

func (d *modelDir) choices() int {
	if n := len(d.pending); n > maxSubsets {
		return n + 1
	}
	return 1 << len(d.pending)
}

// happened reports whether a change is on the disk for a given choice.
func (d *modelDir) happened(choice, i int) bool {
	if len(d.pending) > maxSubsets {
		return i < choice
	}
	return choice&(1<<i) != 0
}

func sameContent(a, b content) bool { return a.data == b.data && a.attributes.equal(b.attributes) }

func (m *disks) image(paths []string, loose, pick []int, use func(image)) {
	files := make([]content, len(m.nodes))
	for i, f := range m.nodes {
		files[i] = f.durable
	}
	for k, i := range loose {
		files[i] = m.nodes[i].torn(pick[len(paths)+k])
	}
	img := make(image)
	missing := make(map[string]bool)
	for k, p := range paths {
		d := m.dirs[p]
		if missing[p] || missing[path.Dir(p)] {
			missing[p] = true
			continue
		}
		names := maps.Clone(d.durable)
		for bit, c := range d.pending {
			if d.happened(pick[k], bit) {
				c.apply(names)
			} else if c.op == "mkdir" {
				missing[path.Join(p, c.to)] = true
			}
		}
		img[p] = content{isDir, d.attributes}
		for name, file := range names {
			img[path.Join(p, name)] = files[file]
		}
	}
	use(img)
}

// torn returns one of the six states of an unsynced file: its bytes are old, torn or new, its
// attributes old or new.
func (f *modelFile) torn(choice int) content {
	c := f.durable
	if choice%2 == 1 {
		c.attributes = f.now.attributes
	}
	switch choice / 2 {
	case 1:
		c.data = f.now.data[:len(f.now.data)/2] + f.durable.data[min(len(f.now.data)/2, len(f.durable.data)):]
	case 2:
		c.data = f.now.data
	}
	return c
}

// key identifies an image, regardless of the random names in it.
func (img image) key(base string) string {
	hash := sha256.New()
	for _, p := range slices.Sorted(maps.Keys(img)) {
		c := img[p]
		name := strings.TrimPrefix(p, base)
		if strings.HasPrefix(name, "/state/journal/.certctl-") {
			name = "/state/journal/temporary"
		}
		fmt.Fprintf(hash, "%s %o %d %d %d\n", name, c.Mode, c.UID, c.GID, len(c.data))
		io.WriteString(hash, c.data)
	}
	return string(hash.Sum(nil))
}

// write writes the image to the disk.
func (img image) write(t testing.TB) {
	t.Helper()
	for _, p := range slices.Sorted(maps.Keys(img)) {
		c := img[p]
		if c.data == isDir {
			check(t, os.MkdirAll(p, 0o700))
			check(t, os.Chmod(p, c.Mode))
			continue
		}
		check(t, os.WriteFile(p, []byte(c.data), 0o600))
		if root() {
			check(t, os.Chown(p, c.UID, c.GID))
		}
		check(t, os.Chmod(p, c.Mode))
	}
}

// powerCuts explores the states of one scenario.
type powerCuts struct {
	sc    scenario
	base  string
	seen  map[string]bool
	tried int
	todo  []image // states whose recovery will be interrupted too
}

// explore runs a function on the world in base and, after each of its steps, tests every state that
// a power cut can leave.
func (x *powerCuts) explore(t *testing.T, run func(w world, before func(Step) error) error) {
	m := load(t, x.base)
	var found []image
	collect := func() {
		m.images(func(img image) {
			if key := img.key(x.base); !x.seen[key] {
				x.seen[key] = true
				found = append(found, img)
			}
		})
	}
	err := run(world{x.base}, func(s Step) error {
		collect()
		m.note(s)
		return nil
	})
	collect()
	if err != nil && x.sc.want == "new" {
		t.Fatal(err)
	}
	for i, img := range found {
		if i%stride != 0 {
			continue
		}
		x.reset(t, img)
		x.tried++
		if err := x.sc.recovered(world{x.base}, i%(5*stride) == 0); err != nil {
			t.Fatalf("%v\n%s", err, img.list(x.base))
		}
	}
	x.todo = append(x.todo, found...)
}

// reset makes the world equal to the image.
func (x *powerCuts) reset(t *testing.T, img image) {
	t.Helper()
	entries, err := os.ReadDir(x.base)
	check(t, err)
	for _, e := range entries {
		check(t, os.RemoveAll(filepath.Join(x.base, e.Name())))
	}
	img.write(t)
}

func (img image) list(base string) string {
	var b strings.Builder
	for _, p := range slices.Sorted(maps.Keys(img)) {
		if c := img[p]; c.data != isDir {
			fmt.Fprintf(&b, "  %s %04o %d bytes\n", strings.TrimPrefix(p, base), c.Mode, len(c.data))
		}
	}
	return b.String()
}

// TestPowerCut cuts the power after each step of each scenario, and during the recoveries from
// that, in every way that the model allows.
func TestPowerCut(t *testing.T) {
	var total, again atomic.Int64
	t.Run("in", func(t *testing.T) {
		for _, sc := range scenarios {
			t.Run(sc.name, func(t *testing.T) {
				t.Parallel()
				first, more := cutScenario(t, sc)
				total.Add(int64(first + more))
				again.Add(int64(more))
				t.Logf("%d states, %d more from power cuts during recovery", first, more)
			})
		}
	})
	t.Logf("recovered from %d states, %d of them from a power cut during recovery", total.Load(), again.Load())
	if total.Load() < 1000/stride {
		t.Errorf("only %d states: the model no longer sees the steps of the code", total.Load())
	}
}

// recoveries is how many recoveries of each scenario are interrupted too. A sample is enough,
// because from most states they take the same few steps.
const recoveries = 6

func cutScenario(t *testing.T, sc scenario) (first, more int) {
	x := &powerCuts{sc: sc, base: needs.MemoryDir(t), seen: make(map[string]bool)}
	sc.prepare(t, newWorld(t, x.base))
	x.explore(t, sc.run)
	first = x.tried
	todo := x.todo
	for apart := max(1, len(todo)/recoveries*stride); len(todo) > 0; todo = todo[min(apart, len(todo)):] {
		x.reset(t, todo[0])
		x.explore(t, func(w world, before func(Step) error) error {
			s, err := w.engine(sc.hook(w, before))
			if err != nil {
				return err
			}
			defer s.opts.State.Close()
			defer s.Close()
			_, err = s.Recover(context.Background())
			return err
		})
	}
	return first, x.tried - first
}
