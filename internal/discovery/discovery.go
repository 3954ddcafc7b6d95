// Package discovery finds the X.509 certificates on a host's disks. A scan walks directories, reads
// what can hold a certificate, and hands out what it finds in the order of the walk, a few at a
// time, so that the size of a tree shows in none of its buffers. Only certificates leave it:
// private keys are neither decrypted nor copied.
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

// MaxFileSize is the size of the largest file that is read.
const MaxFileSize = 1 << 20

const (
	// stallAfter is how long one call on a file or directory may take before its file system counts
	// as hung. A busy disk lets those who come last, as a scan does, wait for many seconds.
	stallAfter = time.Minute

	// maxWorkers bounds the threads of a scan. More do not help: it is bound
	// by system calls, and is to leave the host to others.
	maxWorkers = 4
)

// errBusy is returned by Scan while another scan runs.
var errBusy = errors.New("a scan is running already")

// Options says what to scan and how.
type Options struct {
	Dirs    []string // absolute directories
	Exclude []string // patterns of path.Match: with a slash for the whole path, else for the name
	Skip    []string // directories of the agent's own, wherever they are reached

	// Passwords are tried on PKCS#12 files after the empty one, in order. It is
	// called at the start of each scan; nil means none.
	Passwords func() ([]secret.String, error)

	MaxRate int // files a second; 0: as fast as it goes

	// Gentle makes a scan rest most of the time. At the idle priority alone it uses what a server
	// leaves of the processors, and slows that server down all the same: see docs/performance.md.
	Gentle bool

	// State and Index name the file that remembers what each file held. With a
	// nil State each scan reads everything.
	State *os.Root
	Index string

	Log *slog.Logger
}

// Scanner scans the same directories again and again.
type Scanner struct {
	opts  Options
	stall time.Duration                              // stallAfter
	racy  time.Duration                              // racyWindow
	idle  func(func())                               // runAtIdlePriority
	rest  func(context.Context, time.Duration) error // sleep when it is gentle, or nil
	names int                                        // maxListing

	ownerTime, scanTime time.Duration // the constants of these names
	ownerBytes          int           // likewise

	// opened has the outcomes of key stores, as long as the passwords stay the same: a copy, or one
	// that was only touched, does not cost a second time.
	opened record.Recent

	files, found atomic.Int64 // of the scan that runs, or of the last one

	running atomic.Bool
	locked  []string // passwords of the last scan; owned by the running one
	scanned bool     // there was a scan; owned by the running one

	mu   sync.Mutex
	hung map[string]int // guarded by mu: calls that have not returned, by mount point
}

// New checks the options.
func New(o Options) (*Scanner, error) {
	var problems []error
	if len(o.Dirs) == 0 {
		problems = append(problems, errors.New("no directory to scan"))
	}
	dirs := make([]string, 0, len(o.Dirs))
	for _, dir := range o.Dirs {
		if !filepath.IsAbs(dir) {
			problems = append(problems, fmt.Errorf("directory to scan %q is not an absolute path", dir))
		}
		dirs = append(dirs, filepath.Clean(dir))
	}
	slices.SortFunc(dirs, index.ComparePaths)
	o.Dirs = slices.Compact(dirs)
	for _, pattern := range o.Exclude {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			problems = append(problems, fmt.Errorf("pattern to exclude %q is malformed", pattern))
		}
	}
	if o.MaxRate < 0 {
		problems = append(problems, fmt.Errorf("rate of %d files a second is negative", o.MaxRate))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	if o.State != nil { // a kill may have left it half written
		index.CleanUp(o.State, o.Index)
	}
	s := &Scanner{opts: o, stall: stallAfter, racy: racyWindow, idle: runAtIdlePriority, names: maxListing, ownerTime: ownerTime, scanTime: scanTime, ownerBytes: ownerBytes, hung: make(map[string]int)}
	if o.Gentle {
		s.rest = sleep
	}
	return s, nil
}

// Progress is how many files the running scan, or the last one, has seen and
// how many certificates it has handed out.
func (s *Scanner) Progress() (files, certificates int64) { return s.files.Load(), s.found.Load() }

// Summary is the outcome of a scan.
type Summary struct {
	Files        int            // regular files seen, read or not
	Read         int            // files opened; the others were unchanged or need not be read
	Certificates int            // handed out; the same one at two paths counts twice
	Formats      map[string]int // certificates by source format
	Skipped      map[string]int // files and directories by the reason why they were passed over
	Errors       []string       // bounded; path and cause
	Reached      string         // the path of the last file that was handed out or passed over
	Duration     time.Duration
}

// Scan walks the directories once. emit gets the certificates in the order of the walk, a few at a
// time, in one goroutine; the slice is valid during the call only. An error of emit ends the scan,
// and so does ctx, within 100 ms and the time that it takes to keep the index of what was read. The
// summary is complete as far as the scan came.
func (s *Scanner) Scan(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error) {
	if !s.running.CompareAndSwap(false, true) {
		return Summary{}, errBusy
	}
	defer s.running.Store(false)
	// A scan leaves garbage that a process with little else to do would keep for minutes.
	defer debug.FreeOSMemory()

	began := time.Now()
	s.files.Store(0)
	s.found.Store(0)
	r := newRun(ctx, s, emit)
	if err := r.readPasswords(); err != nil {
		r.problems.add("passwords for PKCS#12", err.Error())
	}
	err := r.scan()
	r.summary.Errors = r.problems.list()
	r.summary.Files, r.summary.Certificates = int(s.files.Load()), int(s.found.Load())
	r.summary.Duration = time.Since(began)
	return r.summary, err
}

// readPasswords reads the configured ones. A file that no password opened is tried again when they
// have changed, and once after a start: what they were before is not written down anywhere.
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
	r.retryLocked = !r.s.scanned || !slices.Equal(list, r.s.locked)
	if r.retryLocked {
		r.s.opened.Forget()
	}
	r.parser.Passwords, r.s.locked, r.s.scanned = list, list, true
	return err
}

func workers() int { return min(max(runtime.GOMAXPROCS(0), 2), maxWorkers) }

// problems collects the errors of a scan within bounds, so that a tree full of
// damage fits in a report.
type problems struct {
	mu    sync.Mutex
	texts []string // guarded by mu
	bytes int      // guarded by mu
	more  int      // guarded by mu: errors that were left out
}

const (
	maxProblems     = 200
	maxProblem      = 1 << 10  // bytes of one, which is a path and a cause
	maxProblemPath  = 640      // of its path
	maxProblemBytes = 64 << 10 // of all
)

// problemOf is an entry of a report's errors: a path and what is wrong with it.
// A path can have 4 KiB. Of a long one both ends are kept, and the cause always.
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
	list := slices.Sorted(slices.Values(p.texts)) // the goroutines of a scan add in any order
	if p.more > 0 {
		list = append(list, fmt.Sprintf("and %d more", p.more))
	}
	return list
}

// cause is what went wrong, without the operation and the path that the standard library adds.
func cause(err error) string {
	if pathError, ok := errors.AsType[*fs.PathError](err); ok {
		err = pathError.Err
	}
	return err.Error()
}
