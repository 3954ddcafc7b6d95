package needs_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"certctl-agent/internal/testing/needs"
)

func TestNeedFindsAProgram(t *testing.T) {
	dir := t.TempDir()
	want := filepath.Join(dir, "some-server")
	if err := os.WriteFile(want, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if got := needs.Need(t, "some-server"); got != want {
		t.Errorf("Need = %q, want %q", got, want)
	}
}

// verdict is a testing.TB that records how a helper would end the test.
type verdict struct {
	testing.TB
	word string
}

func (v *verdict) Helper()      {}
func (v *verdict) Fatal(...any) { v.word = "fail" }
func (v *verdict) Skip(...any)  { v.word = "skip" }

func TestNeedWithoutTheProgram(t *testing.T) {
	for _, test := range []struct{ e2e, want string }{{"", "skip"}, {"0", "skip"}, {"1", "fail"}} {
		t.Run("CERTCTL_E2E="+test.e2e, func(t *testing.T) {
			t.Setenv("CERTCTL_E2E", test.e2e)
			var v verdict
			needs.Need(&v, "no-such-program-anywhere")
			if v.word != test.want {
				t.Errorf("the helper would %q the test, want %q", v.word, test.want)
			}
		})
	}
}

func TestFreePort(t *testing.T) {
	port := needs.FreePort(t)
	listener, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatalf("port %d is not free: %v", port, err)
	}
	listener.Close()
}

func TestLong(t *testing.T) {
	for e2e, want := range map[string]string{"": "skip", "0": "skip", "1": ""} {
		t.Setenv("CERTCTL_E2E", e2e)
		var v verdict
		needs.Long(&v, "it takes minutes")
		if v.word != want {
			t.Errorf("with CERTCTL_E2E=%s the test would %q, want %q", e2e, v.word, want)
		}
	}
}

func TestUnprivileged(t *testing.T) {
	if !needs.Unprivileged(t) {
		return
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); !os.IsPermission(err) {
		t.Errorf("got %v, want permission denied", err)
	}
}
