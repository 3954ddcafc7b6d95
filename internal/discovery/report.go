package discovery

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pace"
)

const (
	// maxBody is the size that no report reaches, half of what control planes take by default.
	maxBody = 512 << 10

	// gap is the mean pause between the reports of one scan. A fleet shares
	// its control plane's rate limit, and nobody waits for an inventory.
	gap = 500 * time.Millisecond

	// retryInterval is the unit of the back-off between tries of one report.
	retryInterval = 30 * time.Second

	// maxRefused bounds how many entries are refused one by one before a single report was
	// accepted, and maxRefusedInAll how many in one scan: each costs several requests. From then on
	// a refused report is left out as a whole and the next one is tried, so a control plane that
	// takes none is not asked about fifty thousand entries, and entries that it does not like
	// cannot keep others from it.
	maxRefused      = 20
	maxRefusedInAll = 200

	// maxNamed bounds the entries that a scan's errors name as left out.
	maxNamed = 20

	// sendShare is the part of the interval, as its divisor, that is kept for
	// reports: a scan ends that long before the next one is due.
	sendShare = 10
)

var (
	// errOverdue ends a scan whose reports did not arrive before the next one is due.
	errOverdue = errors.New("the reports of this scan were not accepted before the next scan is due")

	// errUnfinished ends a scan that takes too long. What it found is reported.
	errUnfinished = errors.New("the scan ended early because the next one is almost due; that one does not read again what this one has read")
)

// Plane takes reports. Its errors are those of package api.
type Plane interface {
	ReportDiscovery(ctx context.Context, report api.DiscoveryReport) error
}

// ReporterOptions is what a Reporter needs.
type ReporterOptions struct {
	Scanner interface {
		Scan(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error)
	}
	Plane    Plane
	AgentID  string
	Dirs     []string      // as configured
	Interval time.Duration // between scans: what is not accepted by then is given up
	Log      *slog.Logger
}

// Reporter carries scans from the walk to reports that the control plane has
// accepted. Run is not to be called twice at a time.
type Reporter struct {
	opts ReporterOptions
	gap  time.Duration
	draw pace.Rand
}

// NewReporter returns a Reporter.
func NewReporter(o ReporterOptions) *Reporter {
	return &Reporter{opts: o, gap: gap, draw: pace.Global}
}

// Stats says what a scan saw and what became of it.
type Stats struct {
	Files        int
	Certificates int           // found; the same one at two paths counts twice
	Reported     int           // of these, accepted by the control plane
	Refused      int           // of these, left out: refused, or too large for a report
	Reports      int           // accepted
	Errors       int           // files and directories that could not be read or parsed
	Duration     time.Duration // of the scan, without waiting for the control plane
}

// Run scans once and returns when everything that was found has been accepted or refused for good.
// Nothing found and no errors: nothing is sent. After an error the next scan reports it all again.
func (s *Reporter) Run(ctx context.Context) (Stats, error) {
	scanning := ctx
	if s.opts.Interval > 0 {
		var cancel, cancelScan context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.opts.Interval, errOverdue)
		defer cancel()
		scanning, cancelScan = context.WithTimeoutCause(ctx, s.opts.Interval-s.opts.Interval/sendShare, errUnfinished)
		defer cancelScan()
	}
	r := &reports{Reporter: s, ctx: ctx, began: time.Now(), pacer: pace.New(retryInterval, s.draw)}
	summary, err := s.opts.Scanner.Scan(scanning, r.collect)
	problems := append(summary.Errors, r.named()...)
	if err != nil && r.failed == nil && errors.Is(context.Cause(scanning), errUnfinished) {
		if !errors.Is(err, errUnfinished) {
			err = fmt.Errorf("%w: %w", errUnfinished, err)
		}
		problems = append(problems, problemOf(cmp.Or(summary.Reached, "the scan"), errUnfinished.Error()))
	}
	r.stats.Files, r.stats.Certificates, r.stats.Errors = summary.Files, summary.Certificates, len(problems)
	r.stats.Duration = time.Since(r.began) - r.sending
	if r.failed == nil && ctx.Err() == nil {
		// What was found before a scan broke off is true all the same.
		err = errors.Join(err, r.finish(problems))
	}
	if err != nil && ctx.Err() != nil {
		if cause := context.Cause(ctx); !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
	}
	return r.stats, err
}

// reports are those of one scan.
type reports struct {
	*Reporter
	ctx     context.Context
	began   time.Time
	sending time.Duration // spent on reports
	pacer   *pace.Pacer
	stats   Stats
	failed  error // of a report, which ended the scan

	patience pace.Patience
	believes bool // a gateway's refusals are: one has lasted

	pending []api.DiscoveredCertificate
	size    int // of pending in the body

	large    []string // errors that name what does not fit into a report
	tooLarge int      // certificates that do not, named or not
	refused  int      // entries that the control plane refused alone
	refusal  error    // of the last of them
}

// collect gathers certificates until a report is full.
func (r *reports) collect(found []api.DiscoveredCertificate) error {
	for _, cert := range found {
		encoded, err := json.Marshal(cert)
		if err != nil {
			return err
		}
		size := len(encoded) + len(",")
		envelope := r.envelope(nil)
		if envelope+size >= maxBody {
			r.stats.Refused++
			r.tooLarge++
			if len(r.large) < maxNamed {
				r.large = append(r.large, problemOf(cert.SourcePath, fmt.Sprintf("a certificate takes %d bytes in a report, whose limit is %d: it is left out", size, maxBody)))
			}
			continue
		}
		if len(r.pending) > 0 && envelope+r.size+size >= maxBody {
			if err := r.flush(nil); err != nil {
				return err
			}
		}
		r.pending = append(r.pending, cert)
		r.size += size
	}
	return nil
}

// named is what the errors of the scan say about entries that were too large.
func (r *reports) named() []string {
	if more := r.tooLarge - len(r.large); more > 0 {
		return append(r.large, fmt.Sprintf("and %d more certificates too large for a report", more))
	}
	return r.large
}

// envelope is the size of a report without certificates.
func (r *reports) envelope(problems []string) int {
	encoded, err := json.Marshal(r.report(nil, problems))
	if err != nil {
		return maxBody
	}
	return len(encoded)
}

// finish sends what is left, with the errors of the scan.
func (r *reports) finish(problems []string) error {
	if len(r.pending) > 0 && r.envelope(problems)+r.size >= maxBody {
		if err := r.flush(nil); err != nil {
			return err
		}
	}
	if len(r.pending) > 0 || len(problems) > 0 {
		if err := r.flush(problems); err != nil {
			return err
		}
	}
	if r.stats.Reported == 0 && r.refused >= maxRefused {
		return fmt.Errorf("the control plane refused each of %d certificates: %w", r.stats.Refused, r.refusal)
	}
	return nil
}

func (r *reports) flush(problems []string) error {
	began := time.Now()
	r.failed = r.send(r.pending, problems, r.envelope(problems)+r.size)
	r.sending += time.Since(began)
	clear(r.pending)
	r.pending, r.size = r.pending[:0], 0
	return r.failed
}

func (r *reports) report(certs []api.DiscoveredCertificate, problems []string) api.DiscoveryReport {
	report := api.DiscoveryReport{
		AgentID:        r.opts.AgentID,
		Directories:    r.opts.Dirs,
		Certificates:   certs,
		Errors:         problems,
		ScanDurationMS: (time.Since(r.began) - r.sending).Milliseconds(),
	}
	if certs == nil {
		report.Certificates = []api.DiscoveredCertificate{}
	}
	if problems == nil {
		report.Errors = []string{}
	}
	return report
}

// send delivers one report, in halves where it is refused as a whole: for its
// size, or for one entry that the control plane does not like.
func (r *reports) send(certs []api.DiscoveredCertificate, problems []string, size int) error {
	err := r.deliver(r.report(certs, problems))
	switch {
	case err == nil:
		r.stats.Reports++
		r.stats.Reported += len(certs)
		return nil
	case !refusesContent(err):
		return err
	case len(certs) > 1 && r.refusedEnough():
		r.stats.Refused += len(certs)
		r.opts.Log.Warn("discovery report left out: the control plane refuses it, as it refused many entries of this scan",
			"certificates", len(certs), "from", certs[0].SourcePath, "to", certs[len(certs)-1].SourcePath, "error", err.Error())
		if len(problems) > 0 {
			return r.send(nil, problems, r.envelope(problems))
		}
		return nil
	case len(certs) > 1:
		r.opts.Log.Debug("discovery report refused: sending halves", "certificates", len(certs), "bytes", size, "error", err.Error())
		half := len(certs) / 2
		if err := r.send(certs[:half], nil, size/2); err != nil {
			return err
		}
		return r.send(certs[half:], problems, size/2)
	case len(certs) == 1 && len(problems) > 0:
		if err := r.send(certs, nil, size); err != nil {
			return err
		}
		return r.send(nil, problems, size)
	case len(certs) == 0:
		r.opts.Log.Warn("errors of the scan not reported: the control plane refuses them", "errors", len(problems), "error", err.Error())
		return nil
	}
	r.stats.Refused++
	r.refused, r.refusal = r.refused+1, err
	r.opts.Log.Warn("certificate left out: the control plane refuses it", "path", certs[0].SourcePath,
		"fingerprint", certs[0].FingerprintSHA256, "error", err.Error())
	return nil
}

// refusedEnough reports whether looking for the entries that the control plane
// does not like costs more than it is worth.
func (r *reports) refusedEnough() bool {
	return r.stats.Reported == 0 && r.refused >= maxRefused || r.refused >= maxRefusedInAll
}

// refusesContent reports whether another body may be accepted. 400 is also
// what a body over the limit gets.
func refusesContent(err error) bool {
	return answered(err, http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity) || forbidden(err)
}

func answered(err error, statuses ...int) bool {
	status, ok := errors.AsType[*api.StatusError](err)
	return ok && slices.Contains(statuses, status.Status)
}

// forbidden reports whether a gateway forbids what the control plane has not seen. Some look for
// attacks in what is sent, and anybody can have a certificate made whose name looks like one.
func forbidden(err error) bool {
	status, ok := errors.AsType[*api.StatusError](err)
	return ok && status.Status == http.StatusForbidden && !status.Own
}

// deliver sends a report until it is answered for good.
func (r *reports) deliver(report api.DiscoveryReport) error {
	if r.stats.Reports > 0 && r.gap > 0 {
		if err := sleep(r.ctx, r.gap/2+time.Duration(r.draw(int64(r.gap)))); err != nil {
			return err
		}
	}
	for {
		err := r.opts.Plane.ReportDiscovery(r.ctx, report)
		doubtful := api.Doubtful(err) || forbidden(err)
		r.believes = r.patience.Lasts(doubtful) || r.believes
		switch {
		case err == nil:
			r.pacer.Next(pace.Outcome{})
			return nil
		case errors.Is(err, api.ErrRetired) || errors.Is(err, api.ErrGone) || !api.Temporary(err) || r.ctx.Err() != nil:
			return err
		case answered(err, http.StatusRequestEntityTooLarge) || r.believes && doubtful:
			return err // a gateway's limit is as good a reason to send less as the control plane's
		}
		wait := r.pacer.Next(pace.After(err))
		r.opts.Log.Warn("discovery report not delivered: trying again", "certificates", len(report.Certificates),
			"wait", wait.Round(time.Second).String(), "error", err.Error())
		if err := sleep(r.ctx, wait); err != nil {
			return err
		}
	}
}
