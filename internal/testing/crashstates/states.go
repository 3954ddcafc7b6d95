package crashstates

import (
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
)

// choice decides what of the unsynced changes is on the disk after a power cut.
type choice struct {
	kept func(node, index int, c change) bool // whether a change of names is
	file func(node int, n *node) content      // what a file holds
}

// pending is one unsynced change of a directory's names.
type pending struct{ node, index, at int }

// States calls use for states that a power cut at this moment can leave: everything lost,
// everything kept, each kind of torn file, what an ordered journal leaves (a prefix of all
// changes), each change lost or kept alone, and a number of random combinations. States with a
// lower rank are more worth testing. Rank 0 is for the states in which everything is lost.
func (d *Disk) States(random *rand.Rand, combinations int, use func(s State, rank int)) {
	var all []pending
	loose := false
	for _, i := range d.reachable() {
		n := d.nodes[i]
		for k, c := range n.changes {
			all = append(all, pending{i, k, c.at})
		}
		loose = loose || len(n.later) > 0
	}
	none := func(int, int, change) bool { return false }
	every := func(int, int, change) bool { return true }
	torn := func(k int) func(int, *node) content { return func(_ int, n *node) content { return n.torn(k) } }
	emit := func(rank int, kept func(int, int, change) bool, file func(int, *node) content) {
		use(d.state(choice{kept, file}), rank)
	}
	emit(1, every, torn(whole))
	if len(all) == 0 && !loose {
		return
	}
	emit(0, none, torn(whole))
	emit(0, none, torn(old))
	if loose {
		for k := range kinds {
			emit(1, every, torn(k))
		}
	}
	if len(all) > 1 {
		slices.SortFunc(all, func(a, b pending) int { return a.at - b.at })
		for cut := 1; cut < len(all); cut++ {
			limit := all[cut]
			prefix := func(_, _ int, c change) bool { return c.at < limit.at }
			emit(2, prefix, torn(whole))
			emit(2, prefix, torn(old))
		}
		for _, p := range all {
			alone := func(node, index int, _ change) bool { return node == p.node && index == p.index }
			emit(2, alone, torn(whole))
			emit(2, func(node, index int, c change) bool { return !alone(node, index, c) }, torn(whole))
		}
	}
	for range combinations {
		lost := make(map[[2]int]bool)
		for _, p := range all {
			lost[[2]int{p.node, p.index}] = random.IntN(2) == 0
		}
		kind := make([]int, len(d.nodes))
		for i := range kind {
			kind[i] = random.IntN(kinds)
		}
		emit(2, func(node, index int, _ change) bool { return !lost[[2]int{node, index}] },
			func(i int, n *node) content { return n.torn(kind[i]) })
	}
}

// Now returns the state that programs see while the power is on.
func (d *Disk) Now() State {
	return d.state(choice{func(int, int, change) bool { return true }, func(_ int, n *node) content { return n.latest() }})
}

// reachable lists the directories and files that have a name, now or after a power cut.
func (d *Disk) reachable() []int {
	seen := map[int]bool{root: true}
	todo := []int{root}
	for i := 0; i < len(todo); i++ {
		n := d.nodes[todo[i]]
		more := slices.Collect(maps.Values(n.synced))
		for _, c := range n.changes {
			more = append(more, c.node)
		}
		slices.Sort(more)
		for _, m := range more {
			if m >= 0 && !seen[m] {
				seen[m] = true
				todo = append(todo, m)
			}
		}
	}
	return todo
}

// The kinds of content that an unsynced file may have after a power cut.
const (
	whole    = iota // all new bytes
	old             // no new bytes: a new file is empty
	half            // only the first half of the new bytes
	zeroes          // the new length, but only zeroes
	halfZero        // the first half of the new bytes, then zeroes
	newMode         // the old bytes with the new mode
	oldMode         // the new bytes with the old mode
	kinds
)

// torn returns what a file holds after a power cut of the given kind.
func (n *node) torn(kind int) content {
	now, was := n.latest(), n.durable
	if len(n.later) == 0 {
		return was
	}
	middle := len(now.data) / 2
	switch kind {
	case old:
		return was
	case half:
		now.data = now.data[:middle]
	case zeroes:
		now.data = strings.Repeat("\x00", len(now.data))
	case halfZero:
		now.data = now.data[:middle] + strings.Repeat("\x00", len(now.data)-middle)
	case newMode:
		now.data = was.data
	case oldMode:
		now.mode = was.mode
	}
	return now
}

func (d *Disk) state(x choice) State {
	s := make(State)
	var walk func(at int, path string)
	walk = func(at int, path string) {
		n := d.nodes[at]
		if !n.dir {
			c := x.file(at, n)
			s[path] = Entry{Data: c.data, Mode: c.mode}
			return
		}
		s[path] = Entry{Dir: true, Mode: n.latest().mode}
		names := maps.Clone(n.synced)
		for k, c := range n.changes {
			if x.kept(at, k, c) {
				c.apply(names)
			}
		}
		for name, child := range names {
			walk(child, filepath.Join(path, name))
		}
	}
	walk(root, ".")
	return s
}
