package status

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/printable"
)

// metricsType is the content type of Prometheus' text format.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// WriteMetrics writes a snapshot in Prometheus' text format.
func WriteMetrics(w io.Writer, s Snapshot) error {
	var m metrics
	m.agent(s)
	m.activities(s)
	m.jobs(s)
	m.deployments(s.Counters.Deployments)
	m.certificates(s)
	m.scan(s.LastScan)
	_, err := w.Write(m.Bytes())
	return err
}

// WriteMetricsFile replaces a file for node_exporter's textfile collector. The collector does not
// read the temporary file beside it, because of its name.
func WriteMetricsFile(path string, s Snapshot) error {
	var text bytes.Buffer
	if err := WriteMetrics(&text, s); err != nil {
		return err
	}
	dir, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write metrics: %w", err)
	}
	defer dir.Close()
	if err := atomicfile.WriteFile(dir, filepath.Base(path), text.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write metrics: %w", err)
	}
	return nil
}

type metrics struct{ bytes.Buffer }

func (m *metrics) agent(s Snapshot) {
	m.family("build_info", "gauge", "Version of the agent; the value is always 1.")
	m.sample("build_info", 1, "version", s.Version, "commit", s.Commit, "goversion", runtime.Version())
	m.gauge("start_time_seconds", "Start of the agent, as Unix time.", unix(s.Started))
	m.gauge("last_contact_timestamp_seconds", "When the control plane last accepted a heartbeat or a poll, as Unix time; 0 if never.", unix(s.contact()))
	m.gauge("clock_skew_seconds", "How far the control plane's clock is ahead of this host's.", s.ClockSkewSeconds)
	m.gauge("warnings", "Standing warnings; certctl-agent status names them.", float64(len(s.Warnings)))
}

func (m *metrics) activities(s Snapshot) {
	names := slices.Sorted(maps.Keys(s.Activities))
	each := func(metric, help string, value func(Activity) float64) {
		m.family(metric, "gauge", help)
		for _, name := range names {
			m.sample(metric, value(s.Activities[name]), "activity", name)
		}
	}
	each("last_attempt_timestamp_seconds", "When an activity last started, as Unix time; 0 if never.",
		func(a Activity) float64 { return unix(a.LastAttempt) })
	each("last_success_timestamp_seconds", "When an activity last succeeded, as Unix time; 0 if never.",
		func(a Activity) float64 { return unix(a.LastSuccess) })
	each("consecutive_failures", "Failures of an activity in a row.",
		func(a Activity) float64 { return float64(a.Failures) })

	m.family("failures_total", "counter", "Failed tries, by activity and kind of failure.")
	for _, activity := range slices.Sorted(maps.Keys(s.Counters.Failures)) {
		m.counts("failures_total", s.Counters.Failures[activity], "activity", activity, "kind")
	}
	m.family("rate_limited_total", "counter", "Answers with status 429, by activity.")
	m.counts("rate_limited_total", s.Counters.RateLimited, "activity")
}

func (m *metrics) jobs(s Snapshot) {
	m.family("jobs", "gauge", "Deployments by state; undelivered ones are done, but not reported yet.")
	m.sample("jobs", float64(s.Jobs.Running), "state", "running")
	m.sample("jobs", float64(s.Jobs.Waiting), "state", "waiting")
	m.sample("jobs", float64(s.Jobs.Undelivered), "state", "undelivered")
	m.family("csrs_total", "counter", "Certificate requests, by result.")
	m.counts("csrs_total", s.Counters.CSRs, "result")
}

func (m *metrics) deployments(byType map[string]Deployments) {
	types := slices.Sorted(maps.Keys(byType))
	m.family("deployments_total", "counter", "Deployments that ended, by target type and outcome.")
	for _, targetType := range types {
		m.counts("deployments_total", byType[targetType].Outcomes, "target_type", targetType, "outcome")
	}
	m.family("deployment_duration_seconds", "histogram", "Time that deployments took, by target type.")
	for _, targetType := range types {
		h := byType[targetType].Seconds
		for _, bucket := range h.Buckets {
			m.sample("deployment_duration_seconds_bucket", float64(bucket.Count), "target_type", targetType, "le", number(bucket.LE))
		}
		m.sample("deployment_duration_seconds_bucket", float64(h.Count), "target_type", targetType, "le", "+Inf")
		m.sample("deployment_duration_seconds_sum", h.Sum, "target_type", targetType)
		m.sample("deployment_duration_seconds_count", float64(h.Count), "target_type", targetType)
	}
}

func (m *metrics) certificates(s Snapshot) {
	each := func(metric, help string, value func(Certificate) time.Time) {
		m.family(metric, "gauge", help)
		for _, c := range s.Certificates {
			m.sample(metric, unix(value(c)), "target_id", string(c.TargetID), "target_type", c.TargetType,
				"certificate_id", string(c.CertificateID), "common_name", c.CommonName)
		}
	}
	each("certificate_not_after_timestamp_seconds", "Expiry of the certificate that was installed on a target, as Unix time.",
		func(c Certificate) time.Time { return c.NotAfter })
	each("certificate_deployed_timestamp_seconds", "When the certificate of a target was installed, as Unix time.",
		func(c Certificate) time.Time { return c.DeployedAt })
}

func (m *metrics) scan(s Scan) {
	if s.Ended.IsZero() {
		return
	}
	m.gauge("scan_timestamp_seconds", "End of the last search for certificates, as Unix time.", unix(s.Ended))
	m.gauge("scan_duration_seconds", "Time that the last search took.", s.DurationSeconds)
	m.gauge("scan_files", "Files that the last search looked at.", float64(s.Files))
	m.gauge("scan_certificates", "Certificates that the last search found.", float64(s.Certificates))
	m.gauge("scan_refused", "Certificates of the last search that the control plane refused.", float64(s.Refused))
	m.gauge("scan_errors", "Files that the last search could not read or parse.", float64(s.Errors))
}

// prefix is before every name.
const prefix = "certctl_agent_"

// maxLabel is longer than any identifier or host name, in bytes.
const maxLabel = 256

// family starts a metric. All its samples must follow before the next metric.
func (m *metrics) family(name, kind, help string) {
	fmt.Fprintf(m, "# HELP %s%s %s\n# TYPE %s%s %s\n", prefix, name, help, prefix, name, kind)
}

// gauge writes a metric with one sample.
func (m *metrics) gauge(name, help string, value float64) {
	m.family(name, "gauge", help)
	m.sample(name, value)
}

// counts writes samples that differ in their last label. Labels ends with the name of that label.
func (m *metrics) counts(name string, counts map[string]uint64, labels ...string) {
	for _, value := range slices.Sorted(maps.Keys(counts)) {
		m.sample(name, float64(counts[value]), append(labels, value)...)
	}
}

// sample writes one value. Labels are alternately names and values.
func (m *metrics) sample(name string, value float64, labels ...string) {
	var pairs []string
	for pair := range slices.Chunk(labels, 2) {
		pairs = append(pairs, pair[0]+`="`+escape(pair[1])+`"`)
	}
	if pairs != nil {
		name += "{" + strings.Join(pairs, ",") + "}"
	}
	m.WriteString(prefix + name + " " + number(value) + "\n")
}

// escape makes a label value of an untrusted string: a single bad byte would make Prometheus refuse
// the whole text, and people read it on terminals.
func escape(value string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(printable.Line(value, maxLabel))
}

func number(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// unix returns a Unix time in seconds, with milliseconds, or 0 for the zero time.
func unix(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
