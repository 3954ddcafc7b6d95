package status

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"certctl-agent/internal/printable"
)

const (
	// maxShown is how many certificates are shown; JSON has them all.
	maxShown = 25

	// maxField and maxError bound untrusted strings, in bytes.
	maxField = 60
	maxError = 200
)

// Render writes a snapshot as text for people.
func Render(w io.Writer, s Snapshot) error {
	var text strings.Builder
	fmt.Fprintf(&text, "certctl-agent %s, up %s\n", s.Version, span(s.Taken.Sub(s.Started)))
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "agent\t%s\n", field(s.AgentID))
	fmt.Fprintf(table, "server\t%s\n", field(s.Server))
	fmt.Fprintf(table, "contact\t%s\n", ago(s.Taken, s.contact()))
	fmt.Fprintf(table, "jobs\t%d running, %d waiting, %d not reported yet; %d CSRs under way\n",
		s.Jobs.Running, s.Jobs.Waiting, s.Jobs.Undelivered, s.Jobs.CSRs)
	if scan := s.LastScan; !scan.Ended.IsZero() {
		fmt.Fprintf(table, "last scan\t%s: %d files, %d certificates, %d errors, took %s\n",
			ago(s.Taken, scan.Ended), scan.Files, scan.Certificates, scan.Errors, took(scan.DurationSeconds))
	}
	table.Flush()

	fmt.Fprintln(&text)
	renderActivities(&text, s)
	if len(s.Certificates) > 0 {
		fmt.Fprintln(&text)
		renderCertificates(&text, s)
	}
	if len(s.Warnings) > 0 {
		fmt.Fprintln(&text, "\nwarnings")
		for _, warning := range s.Warnings {
			fmt.Fprintf(&text, "  %s\n", printable.Line(warning, 1000))
		}
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func renderActivities(w io.Writer, s Snapshot) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer table.Flush()
	fmt.Fprintln(table, "ACTIVITY\tLAST SUCCESS\tNEXT\tFAILURES\tOUTCOME")
	// The loop's own in the order in which they start, then the others.
	names := []string{Heartbeat, Poll, Discovery, Delivery}
	for _, name := range slices.Sorted(maps.Keys(s.Activities)) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, name := range names {
		a, ok := s.Activities[name]
		if !ok {
			continue
		}
		next, outcome := "-", "-"
		switch {
		case a.Running:
			next = "running"
		case !a.NextDue.IsZero():
			next = "in " + span(max(a.NextDue.Sub(s.Taken), 0))
		}
		switch {
		case a.LastError != "":
			outcome = printable.Line(a.LastError, maxError)
		case !a.LastSuccess.IsZero():
			outcome = "ok"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%s\n", name, ago(s.Taken, a.LastSuccess), next, a.Failures, outcome)
	}
}

// renderCertificates shows the certificates that expire first.
func renderCertificates(w io.Writer, s Snapshot) {
	certificates := slices.SortedFunc(slices.Values(s.Certificates), func(a, b Certificate) int {
		return cmp.Or(a.NotAfter.Compare(b.NotAfter), cmp.Compare(a.TargetID, b.TargetID))
	})
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "EXPIRES\tDAYS\tCOMMON NAME\tTARGET\tTYPE\tDEPLOYED")
	for _, c := range certificates[:min(maxShown, len(certificates))] {
		days := "expired"
		if left := c.NotAfter.Sub(s.Taken); left > 0 {
			days = fmt.Sprint(int(left / (24 * time.Hour)))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", c.NotAfter.UTC().Format(time.DateOnly), days, field(c.CommonName),
			field(string(c.TargetID)), field(c.TargetType), ago(s.Taken, c.DeployedAt))
	}
	table.Flush()
	if rest := len(certificates) - maxShown; rest > 0 {
		fmt.Fprintf(w, "and %d more that expire later: status -json lists them all\n", rest)
	}
}

// field makes an untrusted string safe for a cell.
func field(s string) string {
	if s = printable.Line(s, maxField); s == "" {
		return "-"
	}
	return s
}

func ago(taken, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return span(max(taken.Sub(t), 0)) + " ago"
}

func took(seconds float64) string {
	return time.Duration(seconds * float64(time.Second)).Round(time.Millisecond).String()
}

// span formats a duration in its two largest units.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	switch d = d.Round(time.Second); {
	case d >= day:
		return fmt.Sprintf("%dd %dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh %dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return fmt.Sprintf("%dm %ds", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}
