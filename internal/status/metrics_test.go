package status

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

func metricsOf(t testing.TB, s Snapshot) string {
	t.Helper()
	var text strings.Builder
	if err := WriteMetrics(&text, s); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

func TestWriteMetrics(t *testing.T) {
	text := metricsOf(t, busy())
	if err := checkExposition(text); err != nil {
		t.Error(err)
	}
	if strings.Contains(text, "\x1b") {
		t.Error("a terminal escape got through")
	}
	golden(t, "busy.prom", strings.ReplaceAll(text, runtime.Version(), "GO"))
	if err := checkExposition(metricsOf(t, Snapshot{})); err != nil {
		t.Errorf("right after the start: %v", err)
	}
}

var (
	familyLine = regexp.MustCompile(`^# (HELP|TYPE) (certctl_agent_[a-z_]+) (.+)$`)
	sampleLine = regexp.MustCompile(`^(certctl_agent_[a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\})? (-?[0-9.]+)$`)
	edgeLabel  = regexp.MustCompile(`,?le="([^"]+)"`)
)

// checkExposition parses Prometheus' text format 0.0.4 and checks the naming conventions.
func checkExposition(text string) error {
	if !utf8.ValidString(text) || !strings.HasSuffix(text, "\n") {
		return errors.New("not UTF-8, or the last line has no end")
	}
	kinds := make(map[string]string)
	series := make(map[string]bool)
	buckets := make(map[string]float64) // the last bucket of each histogram
	family, help := "", ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if m := familyLine.FindStringSubmatch(line); m != nil {
			switch {
			case m[1] == "HELP" && kinds[m[2]] != "":
				return fmt.Errorf("%s appears twice", m[2])
			case m[1] == "HELP":
				help = m[2]
			case help != m[2]:
				return fmt.Errorf("%s has no help", m[2])
			default:
				family = m[2]
				kinds[family] = m[3]
				if strings.HasSuffix(family, "_total") != (m[3] == "counter") {
					return fmt.Errorf("%s is a %s", family, m[3])
				}
			}
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			return fmt.Errorf("bad line %q", line)
		}
		name, labels := m[1], m[2]
		value, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
		part := strings.TrimPrefix(name, family)
		if part != "" && (kinds[family] != "histogram" || part != "_bucket" && part != "_sum" && part != "_count") {
			return fmt.Errorf("%q in the family %s", line, family)
		}
		if series[name+labels] {
			return fmt.Errorf("%q appears twice", name+labels)
		}
		series[name+labels] = true
		key := family + edgeLabel.ReplaceAllString(labels, "")
		if part == "_bucket" {
			if value < buckets[key] {
				return fmt.Errorf("%q is less than the bucket before it", line)
			}
			buckets[key] = value
		}
		if part == "_count" && value != buckets[key] {
			return fmt.Errorf("%q is not the last bucket, %v", line, buckets[key])
		}
	}
	return nil
}

func FuzzWriteMetrics(f *testing.F) {
	f.Add("web.example.org", "NGINX")
	f.Add("a\"b\\c\n\r\xff{}", "\x00")
	f.Fuzz(func(t *testing.T, name, targetType string) {
		s := busy()
		s.Certificates[0].CommonName = name
		s.Certificates[1].TargetType = targetType
		s.Counters.Job(targetType, "Failed", 0)
		if err := checkExposition(metricsOf(t, s)); err != nil {
			t.Error(err)
		}
	})
}

func TestWriteMetricsFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "certctl_agent.prom")
	for range 2 {
		if err := WriteMetricsFile(path, busy()); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil || string(data) != metricsOf(t, busy()) {
		t.Errorf("the file contains %q, %v", data, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v, want 0644: node_exporter runs as another user", info.Mode(), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("directory holds %v, %v, want only the file", entries, err)
	}
	if err := WriteMetricsFile(filepath.Join(dir, "none", "x.prom"), busy()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without the directory: %v", err)
	}
}
