package status

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/api"
)

func render(t *testing.T, s Snapshot) string {
	t.Helper()
	var text strings.Builder
	if err := Render(&text, s); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

func TestRender(t *testing.T) {
	text := render(t, busy())
	golden(t, "busy.txt", text)
	if strings.Contains(text, "\x1b") || !utf8.ValidString(text) {
		t.Errorf("a terminal escape or a bad byte got through: %q", text)
	}
	golden(t, "fresh.txt", render(t, Snapshot{Version: "devel", AgentID: "agent-1", Server: "https://cp", Started: now, Taken: now,
		Activities: map[string]Activity{Heartbeat: {NextDue: now.Add(30 * time.Second)}, Poll: {}}}))
}

func TestRenderIsShort(t *testing.T) {
	s := busy()
	for i := range 1000 {
		s.Certificates = append(s.Certificates, Certificate{TargetID: api.ID(fmt.Sprint("t", i)), NotAfter: now.Add(time.Duration(i) * time.Hour)})
	}
	text := render(t, s)
	if got := strings.Count(text, "\n"); got > 50 {
		t.Errorf("%d lines, want at most 50", got)
	}
	if want := "and 977 more that expire later"; !strings.Contains(text, want) {
		t.Errorf("no line says %q", want)
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0:                                "0s",
		1499 * time.Millisecond:          "1s",
		59*time.Second + 600*1e6:         "1m 0s",
		time.Hour - time.Second:          "59m 59s",
		25*time.Hour + 30*time.Minute:    "1d 1h",
		3*time.Hour + 59*time.Minute + 1: "3h 59m",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %s, want %s", d, got, want)
		}
	}
}
