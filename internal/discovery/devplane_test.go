package discovery

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/devplane"
)

// repeated emits one certificate at many paths.
type repeated struct {
	cert api.DiscoveredCertificate
	n    int
}

func (r repeated) Scan(_ context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error) {
	for i := range r.n {
		cert := r.cert
		cert.SourcePath = fmt.Sprintf("/srv/%05d.pem", i)
		if err := emit([]api.DiscoveredCertificate{cert}); err != nil {
			return Summary{}, err
		}
	}
	return Summary{Certificates: r.n}, nil
}

// TestArrivesComplete runs a real scan and a real client against a control plane with production
// limits. Other agents use up most of its 50 requests per second.
func TestArrivesComplete(t *testing.T) {
	dir := t.TempDir()
	tree, err := corpus.Write(dir, corpus.Options{Seed: 5, Files: 3000, Certificates: 1200, Odd: true})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		scanner, err := New(Options{Dirs: []string{dir}, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		var one api.DiscoveredCertificate
		if _, err := scanner.Scan(t.Context(), func(found []api.DiscoveredCertificate) error {
			one = found[0]
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			name    string
			scanner interface {
				Scan(context.Context, func([]api.DiscoveredCertificate) error) (Summary, error)
			}
			want int
		}{{"scan", scanner, len(tree.Certificates)}, {"many", repeated{one, many}, many}} {
			plane, err := devplane.New(devplane.Options{RateLimit: true, Rate: 0.5, Burst: 2})
			if err != nil {
				t.Fatal(err)
			}
			agent := plane.AddAgent("agent-1", "a")
			client := controlplane.New(controlplane.Options{Server: plane.ServerURL(), AgentID: agent, Key: func() secret.String { return secret.New(plane.APIKey) },
				Roots: plane.Roots(), UserAgent: "certctl-agent/1 (linux/amd64)", Dial: plane.Dial})
			began := time.Now()
			stats, err := NewReporter(ReporterOptions{Scanner: test.scanner, Plane: client, AgentID: agent, Dirs: scanner.opts.Dirs,
				Interval: 6 * time.Hour, Log: slog.New(slog.DiscardHandler)}).Run(t.Context())
			if err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
			if arrived := len(plane.Discoveries()); arrived != test.want || stats.Reported != test.want {
				t.Errorf("%s: %d certificates arrived, %d reported, want %d", test.name, arrived, stats.Reported, test.want)
			}
			if problems := plane.Problems(); len(problems) > 0 {
				t.Errorf("%s: protocol violations: %.3q", test.name, problems)
			}
			t.Logf("%s: %d certificates in %d reports of %d requests, %v", test.name, stats.Reported, stats.Reports,
				plane.Count(devplane.CallDiscoveries), time.Since(began).Round(time.Second))
			client.Close()
			plane.Close()
		}
	})
}
