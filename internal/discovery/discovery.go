// Package discovery finds the X.509 certificates on a host's disks. A scan walks directories, reads
// the files that may hold a certificate, and emits certificates in walk order in small batches, so
// memory use does not depend on the size of the tree. Only certificates leave the package: private
// keys are neither decrypted nor copied.
package discovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/discovery/index"
	"certctl-agent/internal/discovery/record"
	"certctl-agent/internal/secret"
)

// MaxFileSize is the size of the largest file that a scan reads, in bytes.
const MaxFileSize = 1 << 20

const (
	// stallAfter is how long a call on a file or directory may take before its file system counts
	// as hung. Scans have the lowest I/O priority, so a busy disk can make them wait for many
	// seconds.
	stallAfter = time.Minute

	// maxWorkers bounds the threads of a scan. A scan is bound by system calls, so more threads do
	// not make it faster, and most of the processor must remain for the host's own work.
	maxWorkers = 4
)

// errBusy is returned by Scan while another scan runs.
var errBusy = errors.New("another scan is still running")

// Options configures a Scanner.
type Options struct {
	Dirs    []string // absolute directories
	Exclude []string // path.Match patterns: matched against the path if they contain a slash, else the name
	Skip    []string // the agent's own directories, skipped however a scan reaches them

	// Passwords returns the passwords to try on PKCS#12 files, in order, after the empty one. Each
	// scan calls it once at its start. Nil means no passwords.
	Passwords func() ([]secret.String, error)

	MaxRate int // files per second; 0 means no limit

	// Gentle makes a scan rest most of the time. The idle priority alone still slows down a busy
	// server: see docs/performance.md.
	Gentle bool

	// State and Index name the file that records what each file held. If State is nil, every scan
	// reads everything.
	State *os.Root
	Index string

	Log *slog.Logger
}

// Scanner scans a fixed list of directories. It remembers file contents between scans.
type Scanner struct {
	opts       Options
	stall      time.Duration                              // stallAfter
	racy       time.Duration                              // racyWindow
	idle       func(func())                               // runAtIdlePriority
	rest       func(context.Context, time.Duration) error // sleep if gentle, else nil
	maxListing int                                        // the constant of the same name

	ownerTime, scanTime time.Duration // the constants of the same names
	ownerBytes          int           // the constant of the same name

	// opened caches the outcomes of key stores until the passwords change, so copies and touched
	// files do not cost the time of opening them again.
	opened record.Recent

	files, found atomic.Int64 // of the running scan, or else of the last one

	running atomic.Bool
	tried   []string // passwords of the last scan; owned by the running scan
	scanned bool     // true after the first scan; owned by the running scan

	mu   sync.Mutex
	hung map[string]int // guarded by mu: calls that hang, by mount point
}

// New returns a Scanner, or an error if o is invalid.
func New(o Options) (*Scanner, error) {
	var problems []error
	if len(o.Dirs) == 0 {
		problems = append(problems, errors.New("no directories to scan"))
	}
	dirs := make([]string, 0, len(o.Dirs))
	for _, dir := range o.Dirs {
		if !filepath.IsAbs(dir) {
			problems = append(problems, fmt.Errorf("scan directory %q is not an absolute path", dir))
		}
		dirs = append(dirs, filepath.Clean(dir))
	}
	slices.SortFunc(dirs, index.ComparePaths)
	o.Dirs = slices.Compact(dirs)
	for _, pattern := range o.Exclude {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			problems = append(problems, fmt.Errorf("exclude pattern %q is malformed", pattern))
		}
	}
	if o.MaxRate < 0 {
		problems = append(problems, fmt.Errorf("maximum rate of %d files per second is negative", o.MaxRate))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	if o.State != nil { // the last scan may have been killed while it wrote
		index.CleanUp(o.State, o.Index)
	}
	s := &Scanner{
		opts: o, stall: stallAfter, racy: racyWindow, idle: runAtIdlePriority, maxListing: maxListing,
		ownerTime: ownerTime, scanTime: scanTime, ownerBytes: ownerBytes, hung: make(map[string]int),
	}
	if o.Gentle {
		s.rest = sleep
	}
	return s, nil
}

// Progress returns how many files the running scan, or else the last one, has seen and how many
// certificates it has emitted.
func (s *Scanner) Progress() (files, certificates int64) { return s.files.Load(), s.found.Load() }

// Summary describes a scan.
type Summary struct {
	Files        int            // regular files seen, read or not
	Read         int            // files opened; the others were unchanged or skipped
	Certificates int            // emitted; one certificate at two paths counts twice
	Formats      map[string]int // certificates by source format
	Skipped      map[string]int // files and directories by the reason for skipping them
	Errors       []string       // path and cause; bounded
	Reached      string         // path of the last file that was processed
	Duration     time.Duration
}

// Scan walks the directories once. It calls emit from one goroutine with batches of certificates in
// walk order; the slice is valid only during the call. A scan ends early when emit fails or ctx is
// cancelled, within 100 ms plus the time to save the index. The summary then covers the part that
// was scanned.
func (s *Scanner) Scan(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error) {
	if !s.running.CompareAndSwap(false, true) {
		return Summary{}, errBusy
	}
	defer s.running.Store(false)
	// An otherwise idle process would keep the scan's garbage for minutes.
	defer debug.FreeOSMemory()

	began := time.Now()
	s.files.Store(0)
	s.found.Store(0)
	r := newRun(ctx, s, emit)
	if err := r.readPasswords(); err != nil {
		r.problems.add("PKCS#12 passwords", err.Error())
	}
	err := r.scan()
	r.summary.Errors = r.problems.list()
	r.summary.Files, r.summary.Certificates = int(s.files.Load()), int(s.found.Load())
	r.summary.Duration = time.Since(began)
	return r.summary, err
}

// readPasswords reads the configured passwords. Files that no password opened are retried if the
// passwords have changed, and on the first scan after a start, because passwords are not stored.
func (r *run) readPasswords() error {
	var list []string
	var err error
	if r.s.opts.Passwords != nil {
		var secrets []secret.String
		secrets, err = r.s.opts.Passwords()
		for _, s := range secrets {
			list = append(list, s.Reveal())
		}
	}
	r.retryLocked = !r.s.scanned || !slices.Equal(list, r.s.tried)
	if r.retryLocked {
		r.s.opened.Forget()
	}
	r.parser.Passwords, r.s.tried, r.s.scanned = list, list, true
	return err
}

func workers() int { return min(max(runtime.GOMAXPROCS(0), 2), maxWorkers) }

// problems collects the errors of a scan, bounded so that a tree full of damaged files fits into a
// report.
type problems struct {
	mu    sync.Mutex
	texts []string // guarded by mu
	bytes int      // guarded by mu
	more  int      // guarded by mu: errors omitted
}

const (
	maxProblems     = 200
	maxProblem      = 1 << 10  // bytes of one problem: a path and a cause
	maxProblemPath  = 640      // bytes of its path
	maxProblemBytes = 64 << 10 // bytes of all problems together
)

// problemOf formats one error of a report. Paths can be 4 KiB long: a long one keeps its beginning
// and end, so the cause always fits.
func problemOf(path, cause string) string {
	path = api.TextOfPath(path)
	if len(path) > maxProblemPath {
		path = strings.ToValidUTF8(path[:maxProblemPath/2], "") + "…" + strings.ToValidUTF8(path[len(path)-maxProblemPath/2:], "")
	}
	problem := path + ": " + cause
	if len(problem) > maxProblem {
		problem = strings.ToValidUTF8(problem[:maxProblem], "") + "…"
	}
	return api.Text(problem)
}

func (p *problems) add(path, cause string) { p.note(problemOf(path, cause)) }

func (p *problems) note(problem string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.texts) >= maxProblems || p.bytes+len(problem) > maxProblemBytes {
		p.more++
		return
	}
	p.texts = append(p.texts, problem)
	p.bytes += len(problem)
}

func (p *problems) list() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := slices.Sorted(slices.Values(p.texts)) // several goroutines add
	if p.more > 0 {
		list = append(list, fmt.Sprintf("and %d more", p.more))
	}
	return list
}

// cause returns the text of err without the operation and path that package os adds.
func cause(err error) string {
	if pathError, ok := errors.AsType[*fs.PathError](err); ok {
		err = pathError.Err
	}
	return err.Error()
}
