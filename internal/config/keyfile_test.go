package config

import (
	"bytes"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/secret"
)

func TestKeyFunc(t *testing.T) {
	path := write(t, "key", "one\n")
	c := mustLoad(t, environment{"CERTCTL_AGENT_ID": "a", "CERTCTL_API_KEY_FILE": path})
	var log bytes.Buffer
	key := c.KeyFunc(slog.New(slog.NewTextHandler(&log, nil)))

	// modified gives each version of the file a different time, since the steps of this test are
	// shorter than a clock tick.
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
		{"two lines", func() error { os.Chmod(path, 0o600); return os.WriteFile(path, []byte("a\nb\n"), 0o600) }, "two", "contains white space"},
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

// TestKeyFileHangs: calls return the last good key while the file system of the key file hangs.
func TestKeyFileHangs(t *testing.T) {
	path := write(t, "key", "two")
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		looks := 0
		answer := make(chan struct{})
		f := &keyFile{path: path, key: secret.New("one"), log: slog.New(slog.NewTextHandler(&log, nil)), stat: func(path string) (fs.FileInfo, error) {
			looks++
			<-answer
			return os.Stat(path)
		}}
		started := time.Now()
		for range 5 {
			if got := f.get().Reveal(); got != "one" {
				t.Errorf("key %q, want the last good one", got)
			}
		}
		if waited := time.Since(started); waited != keyTimeout {
			t.Errorf("five calls waited %v in all, want %v", waited, keyTimeout)
		}
		synctest.Wait()
		if looks != 1 || strings.Count(log.String(), "does not answer") != 1 {
			t.Errorf("%d checks, log %q; want one of each", looks, log.String())
		}
		close(answer)
		synctest.Wait()
		if got := f.get().Reveal(); got != "two" {
			t.Errorf("key %q once the file answers, want its own", got)
		}
	})
}

func TestByteOrderMark(t *testing.T) {
	key := write(t, "key", "\ufeffk3y\r\n")
	passwords := write(t, "passwords", "\ufeffone\n")
	file := write(t, "agent.env", "\ufeffCERTCTL_AGENT_ID=a\r\nCERTCTL_API_KEY_FILE="+key+"\r\nCERTCTL_DISCOVERY_PASSWORDS_FILE="+passwords+"\r\n")
	c := mustLoad(t, environment{"CERTCTL_CONFIG": file})
	if c.AgentID != "a" || c.APIKey.Reveal() != "k3y" || c.DiscoveryPasswords[0].Reveal() != "one" {
		t.Errorf("agent id %q, key %q, password %q", c.AgentID, c.APIKey.Reveal(), c.DiscoveryPasswords[0].Reveal())
	}
	for _, warning := range c.Warnings {
		if strings.Contains(warning, file) {
			t.Errorf("warning %q", warning)
		}
	}
	if err := SetInFile(file, "CERTCTL_AGENT_ID", "b"); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(file); !strings.HasPrefix(string(text), "\ufeffCERTCTL_AGENT_ID=b\r\n") {
		t.Errorf("the file became %q", text)
	}
}
