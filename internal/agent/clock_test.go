package agent_test

import (
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/agent"
	"certctl-agent/internal/api"
)

// TestAnswerWithoutDateSaysNothingOfTheClock: the header is optional (RFC 9110, section 6.6.1).
func TestAnswerWithoutDateSaysNothingOfTheClock(t *testing.T) {
	w := newWorld(t)
	agent.New(w.options).Observe(api.Observation{Received: time.Now()})
	if strings.Contains(w.log.String(), "clock") {
		t.Errorf("the log: %s", w.log)
	}
}
