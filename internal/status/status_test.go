package status

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update rewrites it); got:\n%s", path, got)
	}
}

var now = time.Date(2031, 5, 6, 12, 0, 0, 0, time.UTC)

// busy is the snapshot of an agent with some of everything.
func busy() Snapshot {
	var c Counters
	c.Failure(Heartbeat, "network")
	c.Failure(Heartbeat, "network")
	c.Failure(Poll, "denied")
	c.Failure(Poll, "rate_limited")
	c.CSR("accepted")
	c.Job("NGINX", "Completed", 1300*time.Millisecond)
	c.Job("NGINX", "Failed", 61*time.Second)
	c.Job("", "Completed", 20*time.Millisecond)
	return Snapshot{
		Version: "v1.2.3", Commit: "0123456789ab", AgentID: "agent-1", Server: "https://certctl.example.org:8443",
		Started: now.Add(-50*time.Hour - 12*time.Minute), Taken: now,
		Activities: map[string]Activity{
			Heartbeat: {LastAttempt: now.Add(-70 * time.Second), LastSuccess: now.Add(-130 * time.Second), Failures: 1, IntervalSeconds: 60,
				LastError: "heartbeat: connection refused", LastErrorKind: "network", NextDue: now.Add(21 * time.Second)},
			Poll:      {LastAttempt: now.Add(-5 * time.Second), LastSuccess: now.Add(-5*time.Second + 250*time.Millisecond), IntervalSeconds: 30, NextDue: now.Add(26 * time.Second)},
			Discovery: {LastAttempt: now.Add(-2 * time.Second), Running: true, IntervalSeconds: 21600},
			"repair":  {},
		},
		Jobs: Jobs{Running: 1, Waiting: 2, Undelivered: 3, CSRs: 1},
		Certificates: []Certificate{
			{TargetID: "target-1", TargetType: "NGINX", CertificateID: "cert-1", CommonName: "web.example.org", NotAfter: now.Add(90*24*time.Hour + time.Hour), DeployedAt: now.Add(-2 * time.Hour)},
			{TargetID: "target-2", TargetType: "HAProxy", CertificateID: "cert-2", CommonName: "odd \"name\"\\\n\x1b[31m\xff", NotAfter: now.Add(-time.Hour), DeployedAt: now.Add(-90 * 24 * time.Hour)},
		},
		LastScan: Scan{Ended: now.Add(-3 * time.Hour), DurationSeconds: 12.3456, Files: 1000, Certificates: 70, Reported: 68, Refused: 2, Errors: 4},
		Counters: c, ClockSkewSeconds: -1.5, Warnings: []string{"CERTCTL_ALLOWED_PATHS is not set"},
	}
}

func TestReady(t *testing.T) {
	at := func(contact time.Duration) Snapshot {
		return Snapshot{Taken: now, Activities: map[string]Activity{
			Heartbeat: {LastSuccess: now.Add(-contact), IntervalSeconds: 60, LastError: "no route"}}}
	}
	polled := at(time.Hour)
	polled.Activities[Poll] = Activity{LastSuccess: now.Add(-time.Second)}
	for _, test := range []struct {
		name string
		s    Snapshot
		want string // "" for ready
	}{
		{"just now", at(0), ""},
		{"five intervals", at(5 * time.Minute), ""},
		{"longer", at(5*time.Minute + time.Second), "for 5m1s: no route"},
		{"polls count as well", polled, ""},
		{"never", Snapshot{Taken: now, Server: "https://cp"}, "no contact with https://cp since the start"},
	} {
		err := Ready(test.s)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.HasPrefix(err.Error(), "not ready: ") || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}
