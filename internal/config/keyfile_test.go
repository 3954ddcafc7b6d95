package config

import (
	"bytes"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"
)

func TestKeyFunc(t *testing.T) {
	path := write(t, "key", "one\n")
	c := mustLoad(t, environment{"CERTCTL_AGENT_ID": "a", "CERTCTL_API_KEY_FILE": path})
	var log bytes.Buffer
	key := c.KeyFunc(slog.New(slog.NewTextHandler(&log, nil)))

	// modified gives each version of the file a time of its own: a clock tick
	// is longer than a step of this test.
	when := time.Now()
	modified := func() {
		when = when.Add(time.Second)
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		name    string
		do      func() error
		want    string
		wantLog string // "" means that nothing more is logged
	}{
		{"as loaded", func() error { return nil }, "one", ""},
		{"another key of the same length", func() error { return os.WriteFile(path, []byte("two\n"), 0o600) }, "two", "API key read from its file again"},
		{"touched", func() error { return nil }, "two", ""},
		{"emptied", func() error { return os.WriteFile(path, nil, 0o600) }, "two", "is empty"},
		{"still empty", func() error { return nil }, "two", ""},
		{"open to others", func() error { return os.Chmod(path, 0o622) }, "two", "can be written by others"},
		{"two lines", func() error { os.Chmod(path, 0o600); return os.WriteFile(path, []byte("a\nb\n"), 0o600) }, "two", "holds a blank, a line end"},
		{"replaced", func() error { os.Remove(path); return os.WriteFile(path, []byte("three"), 0o600) }, "three", "API key read from its file again"},
		{"gone", func() error { return os.Remove(path) }, "three", "no such file"},
		{"still gone", func() error { return nil }, "three", ""},
		{"back with the same key", func() error { return os.WriteFile(path, []byte("three"), 0o600) }, "three", "changed=false"},
	} {
		log.Reset()
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err == nil {
			modified()
		}
		for range 2 {
			if got := key().Reveal(); got != step.want {
				t.Errorf("%s: key %q, want %q", step.name, got, step.want)
			}
		}
		got := log.String()
		if step.wantLog == "" && got != "" || !strings.Contains(got, step.wantLog) || strings.Count(got, "\n") > 1 {
			t.Errorf("%s: log %q, want one line with %q", step.name, got, step.wantLog)
		}
	}
}

func TestKeyFuncWithoutFile(t *testing.T) {
	if got := mustLoad(t, required()).KeyFunc(slog.New(slog.DiscardHandler))().Reveal(); got != "k3y" {
		t.Errorf("key %q, want k3y", got)
	}
}

func TestReadKeyFile(t *testing.T) {
	if got, err := ReadKeyFile(write(t, "token", " t0ken\r\n")); err != nil || got.Reveal() != "t0ken" {
		t.Errorf("token %q, %v", got.Reveal(), err)
	}
}
