// Package installed remembers which certificate was installed on which target, so that status and
// metrics know every expiry date after a restart, too.
package installed

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/atomicfile"
)

const (
	name    = "served.json" // this name and the field "served" are fixed: existing hosts have such files
	version = 1

	// maxEntries bounds the number of entries. No host has that many targets. The entry that was
	// deployed longest ago is removed first.
	maxEntries = 4096

	// maxBytes bounds the file that is read at start. maxEntries take less.
	maxBytes = 8 << 20
)

// Entry is the certificate that the last successful deployment left on a target.
type Entry struct {
	TargetID      api.ID    `json:"target_id"`
	TargetType    string    `json:"target_type"`
	CertificateID api.ID    `json:"certificate_id"`
	CommonName    string    `json:"common_name"`
	Fingerprint   string    `json:"fingerprint_sha256"` // lower-case hex
	NotAfter      time.Time `json:"not_after"`
	DeployedAt    time.Time `json:"deployed_at"`
}

type file struct {
	Version int     `json:"version"`
	Served  []Entry `json:"served"`
}

// List holds the certificates installed on this host. It is safe for concurrent use.
type List struct {
	root *os.Root

	mu      sync.Mutex // guards entries and changes
	entries map[api.ID]Entry
	changes uint64 // number of changes so far

	file    sync.Mutex // guards the file and written
	written uint64     // number of changes that the file includes
}

// Open reads the list in root. It sets a damaged file aside, and returns an empty, usable list
// together with an error: the agent can start without the list.
func Open(root *os.Root) (*List, error) {
	l := &List{root: root, entries: make(map[api.ID]Entry)}
	err := l.read()
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if aside := root.Rename(name, name+".damaged"); aside != nil {
		return l, fmt.Errorf("read the list of served certificates: %w; set it aside: %w", err, aside)
	}
	return l, fmt.Errorf("read the list of served certificates: %w; it was set aside as %s.damaged", err, name)
}

func (l *List) read() error {
	info, err := l.root.Lstat(name)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > maxBytes {
		return fmt.Errorf("%s is not a regular file of at most %d bytes", name, maxBytes)
	}
	data, err := l.root.ReadFile(name)
	if err != nil {
		return err
	}
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return err
	}
	if f.Version != version {
		return fmt.Errorf("its format version is %d, not %d", f.Version, version)
	}
	for _, entry := range f.Served {
		l.entries[entry.TargetID] = entry
	}
	return nil
}

// Put records the certificate of a target, in place of the one before. Entries that arrive during a
// write of the file share the next write.
func (l *List) Put(entry Entry) error {
	change := l.put(entry)
	l.file.Lock()
	defer l.file.Unlock()
	if l.written >= change {
		return nil
	}
	l.mu.Lock()
	served, changes := l.sorted(), l.changes
	l.mu.Unlock()
	data, err := json.Marshal(file{Version: version, Served: served})
	if err != nil {
		return err
	}
	if err := atomicfile.WriteFile(l.root, name, data, 0o600); err != nil {
		return err
	}
	l.written = changes
	return nil
}

// put changes the entries in memory and returns the number of the change.
func (l *List) put(entry Entry) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries[entry.TargetID] = entry
	for len(l.entries) > maxEntries {
		oldest := slices.MinFunc(slices.Collect(maps.Values(l.entries)), func(a, b Entry) int { return a.DeployedAt.Compare(b.DeployedAt) })
		delete(l.entries, oldest.TargetID)
	}
	l.changes++
	return l.changes
}

// All returns the entries, sorted by target id.
func (l *List) All() []Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sorted()
}

func (l *List) sorted() []Entry {
	return slices.SortedFunc(maps.Values(l.entries), func(a, b Entry) int { return cmp.Compare(a.TargetID, b.TargetID) })
}
