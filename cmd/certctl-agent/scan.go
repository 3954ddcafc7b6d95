package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/config"
	"certctl-agent/internal/discovery"
	"certctl-agent/internal/discovery/certfile"
	"certctl-agent/internal/printable"
)

const scanHelp = `Usage: certctl-agent scan [-json] [-soon DAYS] [flags of the daemon] [DIR|FILE…]

Lists the certificates that discovery would report, by expiry. It needs no server
and no configuration, writes nothing, and does not use the daemon's state. Without
an argument it scans the directories of CERTCTL_DISCOVERY_DIRS.

  -json       print one JSON document: {"certificates": […], "errors": […]}
  -soon DAYS  mark certificates that expire within DAYS days (30)

Examples:
  certctl-agent scan /etc/ssl /etc/letsencrypt
  certctl-agent scan /etc/nginx/site.p12
  certctl-agent scan -json /srv | jq -r '.certificates[].common_name'

Exit status: 0 scanned (errors of single files are listed), 1 the scan failed or an
argument cannot be scanned, 2 usage.

`

// progressAfter is when a scan starts to show its progress.
const progressAfter = 2 * time.Second

func runScan(ctx context.Context, p process) error {
	var asJSON bool
	soon := 30
	cfg, err := config.Load(p.args, p.getenv, config.Options{
		Args: true,
		Flags: func(f *flag.FlagSet) {
			f.BoolVar(&asJSON, "json", false, "print JSON")
			f.IntVar(&soon, "soon", soon, "days")
		},
		Ignore: func(setting string) bool { return !strings.HasPrefix(setting, "discovery-") },
	})
	if err != nil {
		return err
	}
	dirs, err := scanDirs(cfg)
	if err != nil {
		return err
	}
	options := app.ScanOptions(cfg)
	options.Dirs, options.Log = dirs, slog.New(slog.DiscardHandler) // the summary has the same
	scanner, err := discovery.New(options)
	if err != nil {
		return err
	}
	found := []api.DiscoveredCertificate{}
	stop := showProgress(p.stderr, scanner)
	summary, err := scanner.Scan(ctx, func(batch []api.DiscoveredCertificate) error {
		for _, cert := range batch {
			if !asJSON {
				cert.PEMData = "" // saves memory: not in the table
			}
			found = append(found, cert)
		}
		return nil
	})
	stop()
	if err != nil {
		return err
	}
	slices.SortStableFunc(found, func(a, b api.DiscoveredCertificate) int {
		return cmp.Or(strings.Compare(a.NotAfter, b.NotAfter), strings.Compare(a.SourcePath, b.SourcePath))
	})
	if asJSON {
		return printJSON(p.stdout, struct {
			Certificates []api.DiscoveredCertificate `json:"certificates"`
			Errors       []string                    `json:"errors"`
		}{found, append([]string{}, summary.Errors...)}) // not null if empty
	}
	table := scanTable{out: p.stdout, now: time.Now(), soon: time.Duration(soon) * 24 * time.Hour, colour: isTerminal(p.stdout)}
	return table.print(found, summary)
}

// scanDirs returns the absolute paths of the directories and files to scan.
func scanDirs(cfg *config.Config) ([]string, error) {
	if len(cfg.Args) == 0 {
		if len(cfg.DiscoveryDirs) == 0 {
			return nil, config.NewUsageError("name a directory or a file to scan, or set CERTCTL_DISCOVERY_DIRS")
		}
		return cfg.DiscoveryDirs, nil
	}
	var dirs []string
	for _, dir := range cfg.Args {
		absolute, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		if err := canScan(absolute); err != nil {
			return nil, fmt.Errorf("scan: %w", err)
		}
		dirs = append(dirs, absolute)
	}
	return dirs, nil
}

// canScan refuses files in which a scan finds nothing because it does not read them. For files
// below a directory, the scan reports that itself.
func canScan(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case info.Mode().IsRegular() && info.Size() > discovery.MaxFileSize:
		return fmt.Errorf("%s has %d bytes: scan does not read files larger than %d", path, info.Size(), discovery.MaxFileSize)
	case !info.Mode().IsRegular() && !info.IsDir():
		return fmt.Errorf("%s is neither a directory nor a regular file", path)
	case !info.IsDir() && certfile.IsKey(path):
		return fmt.Errorf("%s has the name of a private key: scan does not read .key files", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return file.Close()
}

// showProgress shows the progress of a long scan on a terminal, until stop is called.
func showProgress(w io.Writer, scanner *discovery.Scanner) (stop func()) {
	if !isTerminal(w) {
		return func() {}
	}
	w = unwrapped(w) // only numbers are written
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		wait := time.NewTimer(progressAfter)
		defer wait.Stop()
		shown := false
		for {
			select {
			case <-wait.C:
				files, certificates := scanner.Progress()
				fmt.Fprintf(w, "\r%d files, %d certificates …", files, certificates)
				shown = true
				wait.Reset(progressAfter / 10)
			case <-done:
				if shown {
					fmt.Fprint(w, "\r\x1b[K")
				}
				return
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	file, ok := unwrapped(w).(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

type scanTable struct {
	out    io.Writer
	now    time.Time
	soon   time.Duration
	colour bool
}

// maxColumn bounds the width of a column, in bytes.
const maxColumn = 40

func (t scanTable) print(found []api.DiscoveredCertificate, summary discovery.Summary) error {
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "DAYS\tSTATE\tNAME\tISSUER\tKEY\tPATH")
	counts := make(map[string]int)
	for _, c := range found {
		days, state := t.expiry(c.NotAfter)
		counts[state]++
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", days, state, column(nameOf(c)), column(c.IssuerDN), keyOf(c), printable.Line(c.SourcePath, 4096))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	out, lines := t.out, printable.Text(text.String())
	if t.colour {
		out, lines = unwrapped(out), colourise(lines)
	}
	var end strings.Builder
	fmt.Fprintf(&end, "\n%d certificates in %d files, %v: %d expired, %d soon\n", len(found), summary.Files,
		summary.Duration.Round(time.Millisecond), counts[stateExpired], counts[stateSoon])
	fmt.Fprintf(&end, "formats: %s\n", tally(summary.Formats))
	if len(summary.Skipped) > 0 {
		fmt.Fprintf(&end, "skipped: %s\n", tally(summary.Skipped))
	}
	for _, failure := range summary.Errors {
		fmt.Fprintf(&end, "error: %s\n", printable.Line(failure, 4096))
	}
	_, err := io.WriteString(out, lines+printable.Text(end.String()))
	return err
}

const (
	stateExpired = "expired"
	stateSoon    = "soon"
)

func (t scanTable) expiry(notAfter string) (days, state string) {
	at, err := time.Parse(time.RFC3339, notAfter)
	if err != nil {
		return "?", "?"
	}
	left := at.Sub(t.now)
	days = fmt.Sprint(int(left.Hours() / 24))
	switch {
	case left < 0:
		return days, stateExpired
	case left < t.soon:
		return days, stateSoon
	}
	return days, ""
}

func nameOf(c api.DiscoveredCertificate) string {
	if c.CommonName == "" && len(c.SANs) > 0 {
		return c.SANs[0]
	}
	return cmp.Or(c.CommonName, c.SubjectDN)
}

func keyOf(c api.DiscoveredCertificate) string {
	if c.KeySize == 0 {
		return c.KeyAlgorithm
	}
	return fmt.Sprintf("%s %d", c.KeyAlgorithm, c.KeySize)
}

func column(text string) string { return printable.Line(text, maxColumn) }

// colourise colours whole lines, so that the columns stay aligned.
func colourise(lines string) string {
	const red, yellow, reset = "\x1b[31m", "\x1b[33m", "\x1b[0m"
	colours := map[string]string{stateExpired: red, stateSoon: yellow}
	var out strings.Builder
	for line := range strings.Lines(lines) {
		fields := strings.Fields(line)
		if len(fields) > 1 && colours[fields[1]] != "" {
			line = colours[fields[1]] + strings.TrimSuffix(line, "\n") + reset + "\n"
		}
		out.WriteString(line)
	}
	return out.String()
}

func tally(counts map[string]int) string {
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%s %d", what, counts[what]))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}
