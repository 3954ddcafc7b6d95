package discovery

import (
	"crypto/sha256"
	"fmt"
	"sync"
	"time"

	"certctl-agent/internal/discovery/certfile"
)

// A key store can demand any amount of work: it names the number of key derivation iterations, and
// each password needs them. Package certfile bounds the work for one file; these limits bound it
// for a whole scan. Only time beyond what an ordinary file of that size takes counts, so large
// trees of ordinary files never reach the limits. Files beyond a limit are reported as errors and
// read by the next scan, which finds the other files in the index.

const (
	// ownerTime limits the processor time for one user's files in a scan.
	ownerTime = time.Minute

	// scanTime limits the processor time for all key stores, because one person can own files under
	// thousands of user ids.
	scanTime = 10 * time.Minute

	// fileTime and byteTime are the processor time per file and per byte that is not counted.
	fileTime = time.Millisecond
	byteTime = 64 * time.Nanosecond

	// measuredSize is the size from which ordinary files are measured. Smaller ones take a
	// millisecond or two.
	measuredSize = 64 << 10

	// ownerBytes limits the weight of the certificates reported from one user's files: over a
	// hundred thousand certificates. A user can have any number of links to one file, and would
	// otherwise keep later files from ever being reported.
	ownerBytes = 512 << 20

	// maxOwners bounds the users that are counted separately.
	maxOwners = 1 << 10
)

// effort counts the processor time that files have taken in one scan.
type effort struct {
	ownerLimit, limit time.Duration

	mu     sync.Mutex
	total  time.Duration            // guarded by mu
	owners map[uint32]time.Duration // guarded by mu
}

// rootUser is the user whose files are always reported, whatever files other users have.
const rootUser = 0

// allows reports whether a file may be parsed. When the limit of the whole scan is reached, only
// key stores of users other than root are refused: everything else is cheap.
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

// countedAs returns the user to count a file under. After maxOwners users all new ones but root
// share an entry.
func countedAs[T any](known map[uint32]T, owner uint32) uint32 {
	if _, ok := known[owner]; !ok && len(known) >= maxOwners && owner != rootUser {
		return ^uint32(0) // never a valid user: chown(2)
	}
	return owner
}

// parse returns the outcome of a file's bytes, or nil if no processor time is left for it.
func (r *run) parse(name string, data []byte, owner uint32) certfile.Outcome {
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

// leftOut counts each user's files that were omitted because of a limit.
type leftOut map[uint32]firstOf

// firstOf is the path of the first of a number of files.
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

// mayReport reports whether the certificates in a user's file are still within ownerBytes.
func (r *run) mayReport(owner uint32) bool {
	return owner == rootUser || r.reported[countedAs(r.reported, owner)] < r.s.ownerBytes
}

// reportLeftOut adds one error per user, so that one user's files do not fill the report.
func (r *run) reportLeftOut() {
	for owner, first := range r.unread {
		r.problems.add(first.path, fmt.Sprintf("not parsed, like %d other files of user %d: a scan's processor time for such files is used up; the next scan continues with them", first.files-1, owner))
	}
	for owner, first := range r.unreported {
		r.problems.add(first.path, fmt.Sprintf("its certificates are not reported, like those in %d other files of user %d: a scan reports at most %d MiB from the files of one user", first.files-1, owner, r.s.ownerBytes>>20))
	}
}
