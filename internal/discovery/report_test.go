package discovery

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
)

// fakeScanner finds n certificates.
type fakeScanner struct {
	n      int
	pad    int // bytes of each certificate's PEM
	errors []string
	err    error
}

func fakeCertificate(i, pad int) api.DiscoveredCertificate {
	return api.DiscoveredCertificate{
		FingerprintSHA256: fmt.Sprintf("%064x", i), SANs: []string{}, SourcePath: fmt.Sprintf("/srv/%05d.pem", i),
		SourceFormat: "PEM", PEMData: strings.Repeat("A", pad),
	}
}

func (f fakeScanner) Scan(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error) {
	batch := make([]api.DiscoveredCertificate, 0, 10)
	for i := range f.n {
		batch = append(batch, fakeCertificate(i, f.pad))
		if len(batch) == cap(batch) || i == f.n-1 {
			if err := emit(batch); err != nil {
				return Summary{Certificates: i + 1}, err
			}
			clear(batch) // as a real scan does
			batch = batch[:0]
		}
	}
	return Summary{Files: 2 * f.n, Certificates: f.n, Errors: f.errors}, f.err
}

// fakePlane answers with the errors of answer and records what it accepts.
type fakePlane struct {
	t       *testing.T
	answer  func(n int, body []byte, report api.DiscoveryReport) error
	calls   int
	paths   []string
	bodies  []int
	reports []api.DiscoveryReport
}

func (p *fakePlane) ReportDiscovery(ctx context.Context, report api.DiscoveryReport) error {
	body, err := json.Marshal(report)
	if err != nil {
		p.t.Fatal(err)
	}
	p.calls++
	p.bodies = append(p.bodies, len(body))
	if err := ctx.Err(); err != nil {
		return err
	}
	if p.answer != nil {
		if err := p.answer(p.calls, body, report); err != nil {
			return err
		}
	}
	report.Certificates = slices.Clone(report.Certificates)
	p.reports = append(p.reports, report)
	for _, cert := range report.Certificates {
		p.paths = append(p.paths, cert.SourcePath)
	}
	return nil
}

func refusal(code int, after time.Duration) error {
	return &api.StatusError{Call: "discovery report", Status: code, RetryAfter: after, Own: true}
}

func gateway(code int) error { return &api.StatusError{Call: "discovery report", Status: code} }

func newReporter(scanner fakeScanner, plane *fakePlane, log *slog.Logger) *Reporter {
	return NewReporter(ReporterOptions{Scanner: scanner, Plane: plane, AgentID: "agent-1", Dirs: []string{"/srv"}, Interval: 6 * time.Hour, Log: log})
}

func TestReportsAreCompleteAndInOrder(t *testing.T) {
	for _, n := range []int{1, 1200, 50_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				plane := &fakePlane{t: t}
				s := newReporter(fakeScanner{n: n, pad: 300, errors: []string{"/srv/broken.pem: damaged"}}, plane, slog.New(slog.DiscardHandler))
				stats, err := s.Run(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if stats.Certificates != n || stats.Reported != n || stats.Errors != 1 || stats.Reports != plane.calls {
					t.Errorf("stats = %+v after %d calls, want %d certificates in as many reports", stats, plane.calls, n)
				}
				if len(plane.paths) != n || !slices.IsSorted(plane.paths) || len(slices.Compact(plane.paths)) != n {
					t.Errorf("%d paths arrived, want %d, each once, in the order of the walk", len(plane.paths), n)
				}
				for i, size := range plane.bodies {
					if size >= maxBody {
						t.Errorf("body %d has %d bytes, want under %d", i, size, maxBody)
					}
				}
				for i, report := range plane.reports {
					last := i == len(plane.reports)-1
					if (len(report.Errors) == 1) != last || report.Errors == nil || report.AgentID != "agent-1" || report.Directories[0] != "/srv" {
						t.Errorf("report %d: errors %v, agent %q, directories %v", i, report.Errors, report.AgentID, report.Directories)
					}
				}
			})
		})
	}
}

func TestEmptyScan(t *testing.T) {
	plane := &fakePlane{t: t}
	if _, err := newReporter(fakeScanner{}, plane, slog.New(slog.DiscardHandler)).Run(t.Context()); err != nil || plane.calls != 0 {
		t.Errorf("nothing found: %d reports, error %v, want none", plane.calls, err)
	}
	if _, err := newReporter(fakeScanner{errors: []string{"/x: y"}}, plane, slog.New(slog.DiscardHandler)).Run(t.Context()); err != nil || plane.calls != 1 {
		t.Fatalf("errors only: %d reports, error %v, want one", plane.calls, err)
	}
	body, _ := json.Marshal(plane.reports[0])
	if !bytes.Contains(body, []byte(`"certificates":[],"errors":["/x: y"]`)) {
		t.Errorf("body of a report of errors only: %s", body)
	}
}

// TestGatewaysSizeLimit checks that a gateway's 413 splits a report at once. Its other refusals do
// so only after they have lasted, and then for the rest of the scan.
func TestGatewaysSizeLimit(t *testing.T) {
	for code, most := range map[int]time.Duration{http.StatusRequestEntityTooLarge: time.Minute, http.StatusBadRequest: 20 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			plane := &fakePlane{t: t, answer: func(_ int, body []byte, _ api.DiscoveryReport) error {
				if len(body) > 100<<10 {
					return gateway(code)
				}
				return nil
			}}
			began := time.Now()
			stats, err := newReporter(fakeScanner{n: 1000, pad: 1500}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
			if err != nil || stats.Reported != 1000 || time.Since(began) > most {
				t.Errorf("%d: reported %d after %v, error %v; want 1000 within %v", code, stats.Reported, time.Since(began), err, most)
			}
		})
	}
}

// TestSizeLimit covers control planes that answer 400 or 413 to a body over their limit.
func TestSizeLimit(t *testing.T) {
	for _, code := range []int{http.StatusBadRequest, http.StatusRequestEntityTooLarge} {
		synctest.Test(t, func(t *testing.T) {
			plane := &fakePlane{t: t, answer: func(_ int, body []byte, _ api.DiscoveryReport) error {
				if len(body) > 100<<10 {
					return refusal(code, 0)
				}
				return nil
			}}
			stats, err := newReporter(fakeScanner{n: 1000, pad: 1500}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
			if err != nil || stats.Reported != 1000 || len(plane.paths) != 1000 || !slices.IsSorted(plane.paths) {
				t.Errorf("%d: reported %d, arrived %d, error %v; want 1000 in order", code, stats.Reported, len(plane.paths), err)
			}
		})
	}
}

func TestOneBadEntryIsOmitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bad = "/srv/00077.pem"
		plane := &fakePlane{t: t, answer: func(_ int, _ []byte, report api.DiscoveryReport) error {
			for _, cert := range report.Certificates {
				if cert.SourcePath == bad {
					return refusal(http.StatusBadRequest, 0)
				}
			}
			return nil
		}}
		var log bytes.Buffer
		stats, err := newReporter(fakeScanner{n: 300, errors: []string{"/x: y"}}, plane, slog.New(slog.NewTextHandler(&log, nil))).Run(t.Context())
		if err != nil || stats.Reported != 299 || stats.Refused != 1 || slices.Contains(plane.paths, bad) {
			t.Errorf("stats %+v, error %v; want 299 reported and one refused", stats, err)
		}
		if !strings.Contains(log.String(), bad) {
			t.Errorf("the log does not name %s:\n%s", bad, &log)
		}
	})
}

// TestGatewayForbidsOneCertificate checks that a firewall that takes one name for an attack does
// not keep the other certificates from arriving.
func TestGatewayForbidsOneCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bad = "/srv/00007.pem"
		plane := &fakePlane{t: t, answer: func(_ int, _ []byte, report api.DiscoveryReport) error {
			for _, cert := range report.Certificates {
				if cert.SourcePath == bad {
					return gateway(http.StatusForbidden)
				}
			}
			return nil
		}}
		stats, err := newReporter(fakeScanner{n: 1000, pad: 1500}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
		if err != nil || stats.Reported != 999 || stats.Refused != 1 || slices.Contains(plane.paths, bad) {
			t.Errorf("stats %+v, error %v; want 999 reported and one refused", stats, err)
		}
	})
}

func TestPlaneThatRefusesEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		plane := &fakePlane{t: t, answer: func(int, []byte, api.DiscoveryReport) error { return refusal(http.StatusBadRequest, 0) }}
		_, err := newReporter(fakeScanner{n: 5000}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
		if err == nil || plane.calls > 100 {
			t.Errorf("%d calls, error %v; want an error after a few", plane.calls, err)
		}
	})
}

func TestRetries(t *testing.T) {
	tests := []struct {
		name     string
		failures []error
		wantErr  bool
		min, max time.Duration
	}{
		{"rate limited", []error{refusal(429, time.Second)}, false, time.Second, 31 * time.Second},
		{"unavailable", []error{refusal(503, 0), refusal(503, 0)}, false, 54 * time.Second, 200 * time.Second},
		{"floor", []error{refusal(503, 10*time.Minute)}, false, 10 * time.Minute, 11 * time.Minute},
		{"network", []error{errors.New("no route to host")}, false, 27 * time.Second, 63 * time.Second},
		{"unknown agent today", []error{refusal(500, 0)}, false, 27 * time.Second, 63 * time.Second},
		{"retired", []error{refusal(410, 0)}, true, 0, 1},
		{"permanent", []error{refusal(404, 0)}, true, 0, 1},
		{"a gateway's 404", []error{gateway(404), gateway(404)}, false, 54 * time.Second, 200 * time.Second},
		{"a gateway's 400", []error{gateway(400)}, false, 27 * time.Second, 63 * time.Second},
		{"a gateway's 404 that lasts", slices.Repeat([]error{gateway(404)}, 100), true, 10 * time.Minute, 20 * time.Minute},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				plane := &fakePlane{t: t, answer: func(n int, _ []byte, _ api.DiscoveryReport) error {
					if n <= len(test.failures) {
						return test.failures[n-1]
					}
					return nil
				}}
				began := time.Now()
				stats, err := newReporter(fakeScanner{n: 3}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
				if (err != nil) != test.wantErr || !test.wantErr && stats.Reported != 3 {
					t.Errorf("reported %d, error %v, want error: %v", stats.Reported, err, test.wantErr)
				}
				if took := time.Since(began); took < test.min || took >= test.max {
					t.Errorf("took %v, want [%v, %v)", took, test.min, test.max)
				}
				if stats.Duration != 0 {
					t.Errorf("duration of the scan = %v, want 0: waiting for the control plane does not count", stats.Duration)
				}
			})
		})
	}
}

func TestGivesUpWhenTheNextScanIsDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		plane := &fakePlane{t: t, answer: func(int, []byte, api.DiscoveryReport) error { return refusal(503, 0) }}
		began := time.Now()
		_, err := newReporter(fakeScanner{n: 3}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
		if !errors.Is(err, errOverdue) || time.Since(began) != 6*time.Hour {
			t.Errorf("error %v after %v, want errOverdue after 6h", err, time.Since(began))
		}
	})
}

func TestCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		plane := &fakePlane{t: t, answer: func(int, []byte, api.DiscoveryReport) error {
			time.AfterFunc(time.Second, cancel)
			return refusal(503, 0)
		}}
		began := time.Now()
		_, err := newReporter(fakeScanner{n: 3}, plane, slog.New(slog.DiscardHandler)).Run(ctx)
		if !errors.Is(err, context.Canceled) || time.Since(began) != time.Second {
			t.Errorf("error %v after %v, want context.Canceled at once", err, time.Since(began))
		}
	})
}

func TestBrokenScanReportsWhatItFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("too many file systems do not answer")
		plane := &fakePlane{t: t}
		stats, err := newReporter(fakeScanner{n: 3, err: broken}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
		if !errors.Is(err, broken) || stats.Reported != 3 {
			t.Errorf("reported %d, error %v; want 3 and the scan's error", stats.Reported, err)
		}
	})
}

// scanFunc adapts a function to the interface of a scanner.
type scanFunc func(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error)

func (f scanFunc) Scan(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error) {
	return f(ctx, emit)
}

// TestWhatDoesNotFitIsLeftOutAndNamed checks that everything else arrives if the first certificates
// are too large for a report.
func TestWhatDoesNotFitIsLeftOutAndNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const large, rest = 100, 300
		long := strings.Repeat("/"+strings.Repeat("x", 200), 15) + "/end.pem"
		plane := &fakePlane{t: t}
		stats, err := NewReporter(ReporterOptions{Scanner: scanFunc(func(_ context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error) {
			for i := range large + rest {
				cert := fakeCertificate(i, 300)
				if i < large {
					// Too large because of the PEM, or because of names that grow when escaped.
					cert.PEMData = strings.Repeat("A", maxBody*(i%2))
					cert.SANs = []string{strings.Repeat("<", maxBody/6)}
				}
				if i == 0 {
					cert.SourcePath = long
				}
				if err := emit([]api.DiscoveredCertificate{cert}); err != nil {
					return Summary{}, err
				}
			}
			return Summary{Certificates: large + rest, Errors: []string{"/x: y"}}, nil
		}), Plane: plane, AgentID: "agent-1", Dirs: []string{"/srv"}, Interval: 6 * time.Hour, Log: slog.New(slog.DiscardHandler)}).Run(t.Context())
		if err != nil || stats.Reported != rest || stats.Refused != large || plane.calls != stats.Reports {
			t.Errorf("stats %+v after %d calls, error %v; want %d reported and %d omitted", stats, plane.calls, err, rest, large)
		}
		problems := plane.reports[len(plane.reports)-1].Errors
		if len(problems) != maxNamed+2 || stats.Errors != len(problems) || !strings.Contains(problems[2], "/srv/00001.pem: certificate omitted: it takes ") ||
			!strings.Contains(problems[1], "/end.pem: certificate omitted: it takes ") || problems[maxNamed+1] != "and 80 more certificates too large for a report" {
			t.Errorf("errors %q, want the scan's and the omitted certificates, within bounds", problems)
		}
	})
}

// TestRefusedEntriesDoNotHideOthers checks that certificates that the control plane refuses do not
// keep later ones from being reported. Users can place such certificates early in the walk.
func TestRefusedEntriesDoNotHideOthers(t *testing.T) {
	for _, test := range []struct{ bad, good, maxCalls int }{{20, 3000, 200}, {200, 3000, 1000}, {5000, 3000, 4000}} {
		synctest.Test(t, func(t *testing.T) {
			plane := &fakePlane{t: t, answer: func(_ int, _ []byte, report api.DiscoveryReport) error {
				for _, cert := range report.Certificates {
					if cert.SourcePath < fmt.Sprintf("/srv/%05d.pem", test.bad) {
						return refusal(http.StatusBadRequest, 0)
					}
				}
				return nil
			}}
			stats, err := newReporter(fakeScanner{n: test.bad + test.good, pad: 5000, errors: []string{"/x: y"}}, plane, slog.New(slog.DiscardHandler)).Run(t.Context())
			// One report may hold both kinds when enough have been refused.
			const perReport = maxBody / 5000
			if err != nil || stats.Reported < test.good-perReport || stats.Reported+stats.Refused != test.bad+test.good || plane.calls > test.maxCalls {
				t.Errorf("%+v: stats %+v after %d calls, error %v; want the good ones reported", test, stats, plane.calls, err)
			}
			if last := plane.reports[len(plane.reports)-1]; !slices.Contains(last.Errors, "/x: y") {
				t.Errorf("%+v: the errors of the scan did not arrive", test)
			}
		})
	}
}

// TestUnfinishedScanIsReported checks that a slow scan ends before the next one is due and reports
// what it found.
func TestUnfinishedScanIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		plane := &fakePlane{t: t}
		began := time.Now()
		stats, err := NewReporter(ReporterOptions{Scanner: scanFunc(func(ctx context.Context, emit func([]api.DiscoveredCertificate) error) (Summary, error) {
			if err := emit([]api.DiscoveredCertificate{fakeCertificate(1, 300), fakeCertificate(2, 300)}); err != nil {
				return Summary{}, err
			}
			<-ctx.Done()
			return Summary{Certificates: 2, Errors: []string{"/x: y"}, Reached: "/srv/00002.pem"}, context.Cause(ctx)
		}), Plane: plane, AgentID: "agent-1", Dirs: []string{"/srv"}, Interval: 6 * time.Hour, Log: slog.New(slog.DiscardHandler)}).Run(t.Context())
		if !errors.Is(err, errUnfinished) || stats.Reported != 2 || len(plane.reports) != 1 {
			t.Fatalf("stats %+v, error %v; want a report and %v", stats, err, errUnfinished)
		}
		if got, want := plane.reports[0].Errors, []string{"/x: y", "/srv/00002.pem: " + errUnfinished.Error()}; !slices.Equal(got, want) {
			t.Errorf("errors %q, want %q", got, want)
		}
		if took := time.Since(began); took >= 6*time.Hour {
			t.Errorf("took %v: the next scan is due", took)
		}
	})
}
