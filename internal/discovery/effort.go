package discovery

import (
	"crypto/sha256"
	"fmt"
	"sync"
	"time"

	"certctl-agent/internal/discovery/certfile"
)

// A file can ask for any amount of work: the derivation of a key takes as many iterations as it
// says, once for each password. What one file may cost is bounded where it is read; here is what
// many may. Only the work beyond what a file of that size ordinarily takes counts, so a large tree
// of ordinary files never comes to these limits. What does is named, and read by the next scan,
// which finds the rest in the index.

const (
	// ownerTime is the processor time for the files of one user in a scan.
	ownerTime = time.Minute

	// scanTime is that for the key stores of all users. One user can own files
	// under thousands of ids.
	scanTime = 10 * time.Minute

	// fileTime and byteTime are what a file may take without being counted.
	fileTime = time.Millisecond
	byteTime = 64 * time.Nanosecond

	// measuredSize is that of the smallest ordinary file that is measured: what
	// is smaller takes a millisecond or two.
	measuredSize = 64 << 10

	// ownerBytes is how much a scan reports of the files of one user, as weight counts it: over a
	// hundred thousand certificates. With links to one file, a user can have any number of them,
	// and what comes later in the walk would be reported never.
	ownerBytes = 512 << 20

	// maxOwners bounds the users that are told apart.
	maxOwners = 1 << 10
)

// effort is the processor time that files have taken in one scan.
type effort struct {
	ownerLimit, limit time.Duration

	mu     sync.Mutex
	total  time.Duration            // guarded by mu
	owners map[uint32]time.Duration // guarded by mu
}

// rootUser is the user whose files no other user's can keep from a report.
const rootUser = 0

// allows reports whether a file may be looked into. After the limit of the whole scan only key
// stores may not, those of root excepted: everything else is cheap.
func (e *effort) allows(owner uint32, store bool) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.owners[countedAs(e.owners, owner)] < e.ownerLimit && (e.total < e.limit || !store || owner == rootUser)
}

func (e *effort) count(owner uint32, size int, took time.Duration) {
	took -= fileTime + time.Duration(size)*byteTime
	if took <= 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.total += took
	if e.owners == nil {
		e.owners = make(map[uint32]time.Duration)
	}
	e.owners[countedAs(e.owners, owner)] += took
}

// countedAs is the user under whom a file is counted: from maxOwners on, all but root are one.
func countedAs[T any](known map[uint32]T, owner uint32) uint32 {
	if _, ok := known[owner]; !ok && len(known) >= maxOwners && owner != rootUser {
		return ^uint32(0) // no user: chown(2)
	}
	return owner
}

// lookInto returns the outcome of a file's bytes, or nil when there is no processor time for it.
func (r *run) lookInto(name string, data []byte, owner uint32) certfile.Outcome {
	if !certfile.WorthParsing(name, data) {
		data = nil
	}
	store := certfile.IsStore(name, data)
	if !store && len(data) < measuredSize {
		return r.parser.Parse(name, data)
	}
	var digest [sha256.Size]byte
	if store {
		digest = sha256.Sum256(data)
		if outcome := r.s.opened.Get(digest); outcome != nil {
			return outcome
		}
	}
	if !r.effort.allows(owner, store) {
		return nil
	}
	began := threadTime()
	outcome := r.parser.Parse(name, data)
	r.effort.count(owner, len(data), threadTime()-began)
	if store {
		r.s.opened.Put(digest, outcome)
	}
	return outcome
}

// leftOut are files of each user that were passed over for the sake of others.
type leftOut map[uint32]firstOf

// firstOf is the first of some files.
type firstOf struct {
	path  string
	files int
}

func (l leftOut) note(e *entry) {
	owner := countedAs(l, e.owner)
	first := l[owner]
	if first.files++; first.files == 1 {
		first.path = join(e.dir.shown, string(e.name))
	}
	l[owner] = first
}

// mayReport reports whether there is room in the report for a file's certificates.
func (r *run) mayReport(owner uint32) bool {
	return owner == rootUser || r.reported[countedAs(r.reported, owner)] < r.s.ownerBytes
}

// nameLeftOut adds one error for each user, so that one user's files do not fill the report.
func (r *run) nameLeftOut() {
	for owner, first := range r.unread {
		r.problems.add(first.path, fmt.Sprintf("not looked into, like %d more files of user %d: the processor time that a scan has for such files is used up; the next scan goes on", first.files-1, owner))
	}
	for owner, first := range r.unreported {
		r.problems.add(first.path, fmt.Sprintf("what it holds is not reported, nor is that of %d more files of user %d: a scan reports up to %d MiB of the files of one user", first.files-1, owner, r.s.ownerBytes>>20))
	}
}
