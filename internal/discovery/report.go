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
	// maxBody is the size that every report stays below, in bytes: half of the limit that control
	// planes have by default.
	maxBody = 512 << 10

	// gap is the mean pause between the reports of a scan. All hosts share the control plane's rate
	// limit, and discovery is not urgent.
	gap = 500 * time.Millisecond

	// retryInterval is the base of the back-off between retries of a report.
	retryInterval = 30 * time.Second

	// Each refused entry costs several requests, because its report is split until the entry is
	// alone. After maxRefused such entries without one accepted report, or maxRefusedInAll in one
	// scan, a refused report is omitted as a whole. So a control plane that accepts nothing does
	// not get requests for fifty thousand entries, and bad entries do not keep the others from
	// being reported.
	maxRefused      = 20
	maxRefusedInAll = 200

	// maxNamed bounds the omitted entries that a report lists as errors.
	maxNamed = 20

	// A scan stops after the interval minus interval/sendShare, to leave time for its reports.
	sendShare = 10
)

var (
	// errOverdue ends a scan whose reports have not been accepted before the next scan is due.
	errOverdue = errors.New("the reports of this scan were not accepted before the next scan was due")

	// errUnfinished ends a scan that takes too long. Its results so far are reported.
	errUnfinished = errors.New("the scan was stopped because the next one is almost due; the next one skips the files that this one has read")
)

// Plane receives reports. It returns the errors of package api.
type Plane interface {
	ReportDiscovery(ctx context.Context, report api.DiscoveryReport) error
}

// ReporterOptions configures a Reporter.
type ReporterOptions struct {
	Scanner interface {
		Scan(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error)
	}
	Plane    Plane
	AgentID  string
	Dirs     []string      // as configured
	Interval time.Duration // between scans; reports not accepted by then are dropped
	Log      *slog.Logger
}

// Reporter scans and reports the results to the control plane. Run must not be called concurrently.
type Reporter struct {
	opts ReporterOptions
	gap  time.Duration
	draw pace.Rand
}

// NewReporter returns a Reporter.
func NewReporter(o ReporterOptions) *Reporter {
	return &Reporter{opts: o, gap: gap, draw: pace.Global}
}

// Stats counts what a scan found and reported.
type Stats struct {
	Files        int
	Certificates int           // found; one certificate at two paths counts twice
	Reported     int           // certificates that the control plane accepted
	Refused      int           // certificates omitted: refused, or too large for a report
	Reports      int           // reports accepted
	Errors       int           // files and directories that could not be read or parsed
	Duration     time.Duration // of the scan, without the time spent on reports
}

// Run scans once and returns when everything found has been accepted or permanently refused. It
// sends nothing if there are neither certificates nor errors. After an error, the next scan reports
// everything again.
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
	problems := append(summary.Errors, r.tooLargeErrors()...)
	if err != nil && r.failed == nil && errors.Is(context.Cause(scanning), errUnfinished) {
		if !errors.Is(err, errUnfinished) {
			err = fmt.Errorf("%w: %w", errUnfinished, err)
		}
		problems = append(problems, problemOf(cmp.Or(summary.Reached, "the scan"), errUnfinished.Error()))
	}
	r.stats.Files, r.stats.Certificates, r.stats.Errors = summary.Files, summary.Certificates, len(problems)
	r.stats.Duration = time.Since(r.began) - r.sending
	if r.failed == nil && ctx.Err() == nil {
		// Certificates found before the scan was interrupted are still valid results.
		err = errors.Join(err, r.finish(problems))
	}
	if err != nil && ctx.Err() != nil {
		if cause := context.Cause(ctx); !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
	}
	return r.stats, err
}

// reports delivers the reports of one scan.
type reports struct {
	*Reporter
	ctx     context.Context
	began   time.Time
	sending time.Duration // time spent on reports
	pacer   *pace.Pacer
	stats   Stats
	failed  error // of the report that ended the scan

	patience      pace.Patience
	trustsGateway bool // a doubtful refusal has lasted: take further ones as final

	pending []api.DiscoveredCertificate
	size    int // of pending in the body, in bytes

	large    []string // errors for certificates that do not fit into a report
	tooLarge int      // all such certificates, listed in large or not
	refused  int      // entries that the control plane refused when sent alone
	refusal  error    // of the last refused entry
}

// collect adds certificates to the pending report and sends it when it is full.
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
				r.large = append(r.large, problemOf(cert.SourcePath, fmt.Sprintf("certificate omitted: it takes %d bytes in a report, and the limit is %d", size, maxBody)))
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

// tooLargeErrors returns errors for the certificates that do not fit into a report.
func (r *reports) tooLargeErrors() []string {
	if more := r.tooLarge - len(r.large); more > 0 {
		return append(r.large, fmt.Sprintf("and %d more certificates too large for a report", more))
	}
	return r.large
}

// envelope returns the size of a report without certificates, in bytes.
func (r *reports) envelope(problems []string) int {
	encoded, err := json.Marshal(r.report(nil, problems))
	if err != nil {
		return maxBody
	}
	return len(encoded)
}

// finish sends the last report, with the errors of the scan.
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

// send delivers a report. If the control plane refuses it, because of its size or because of one
// entry, send splits it in halves.
func (r *reports) send(certs []api.DiscoveredCertificate, problems []string, size int) error {
	err := r.deliver(r.report(certs, problems))
	switch {
	case err == nil:
		r.stats.Reports++
		r.stats.Reported += len(certs)
		return nil
	case !refusesContent(err):
		return err
	case len(certs) > 1 && r.tooManyRefused():
		r.stats.Refused += len(certs)
		r.opts.Log.Warn("discovery report omitted: the control plane refuses it, after refusing many entries of this scan",
			"certificates", len(certs), "from", certs[0].SourcePath, "to", certs[len(certs)-1].SourcePath, "error", err.Error())
		if len(problems) > 0 {
			return r.send(nil, problems, r.envelope(problems))
		}
		return nil
	case len(certs) > 1:
		r.opts.Log.Debug("discovery report refused: splitting it", "certificates", len(certs), "bytes", size, "error", err.Error())
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
		r.opts.Log.Warn("scan errors not reported: the control plane refuses them", "errors", len(problems), "error", err.Error())
		return nil
	}
	r.stats.Refused++
	r.refused, r.refusal = r.refused+1, err
	r.opts.Log.Warn("certificate omitted: the control plane refuses it", "path", certs[0].SourcePath,
		"fingerprint", certs[0].FingerprintSHA256, "error", err.Error())
	return nil
}

// tooManyRefused reports whether to stop searching refused reports for the entries at fault.
func (r *reports) tooManyRefused() bool {
	return r.stats.Reported == 0 && r.refused >= maxRefused || r.refused >= maxRefusedInAll
}

// refusesContent reports whether another body may be accepted. Some servers answer a body over
// their limit with 400.
func refusesContent(err error) bool {
	return answered(err, http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity) || forbidden(err)
}

func answered(err error, statuses ...int) bool {
	status, ok := errors.AsType[*api.StatusError](err)
	return ok && slices.Contains(statuses, status.Status)
}

// forbidden reports whether a gateway refused a report before the control plane saw it. Some
// gateways search bodies for attacks, and anyone can obtain a certificate with a name that looks
// like one.
func forbidden(err error) bool {
	status, ok := errors.AsType[*api.StatusError](err)
	return ok && status.Status == http.StatusForbidden && !status.Own
}

// deliver sends a report and retries until it gets a final answer.
func (r *reports) deliver(report api.DiscoveryReport) error {
	if r.stats.Reports > 0 && r.gap > 0 {
		if err := sleep(r.ctx, r.gap/2+time.Duration(r.draw(int64(r.gap)))); err != nil {
			return err
		}
	}
	for {
		err := r.opts.Plane.ReportDiscovery(r.ctx, report)
		doubtful := api.Doubtful(err) || forbidden(err)
		r.trustsGateway = r.patience.Exhausted(doubtful) || r.trustsGateway
		switch {
		case err == nil:
			r.pacer.Next(pace.Outcome{})
			return nil
		case errors.Is(err, api.ErrRetired) || errors.Is(err, api.ErrGone) || !api.Temporary(err) || r.ctx.Err() != nil:
			return err
		case answered(err, http.StatusRequestEntityTooLarge) || r.trustsGateway && doubtful:
			return err // a gateway's limit counts like the control plane's
		}
		wait := r.pacer.Next(pace.After(err))
		r.opts.Log.Warn("discovery report not delivered: retrying", "certificates", len(report.Certificates),
			"wait", wait.Round(time.Second).String(), "error", err.Error())
		if err := sleep(r.ctx, wait); err != nil {
			return err
		}
	}
}
