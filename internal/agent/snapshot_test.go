package agent

import (
	"errors"
	"testing"
	"time"

	"certctl-agent/internal/discovery"
	"certctl-agent/internal/status"
)

// TestScanStatus: the snapshot has every number of the last scan.
func TestScanStatus(t *testing.T) {
	got := scanStatus(discovery.Stats{Files: 1, Certificates: 2, Reported: 3, Refused: 4, Errors: 5, Duration: 6 * time.Second}, errors.New("x"))
	if time.Since(got.Ended).Abs() > time.Minute {
		t.Errorf("it ended at %v", got.Ended)
	}
	want := status.Scan{Ended: got.Ended, Files: 1, Certificates: 2, Reported: 3, Refused: 4, Errors: 5, DurationSeconds: 6, Error: "x"}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
