package connector

import (
	"testing"

	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

func TestNewFile(t *testing.T) {
	f := NewFile("/k", KeyFile, []byte("x"), targetconf.FileOptions{Mode: 0o640, Owner: "root"})
	if f.Mode == nil || *f.Mode != 0o640 || f.DefaultMode != 0o600 || f.Owner != "root" || f.Path != "/k" {
		t.Errorf("key: got %+v", f)
	}
	f = NewFile("/c", CertificateFile, nil, targetconf.FileOptions{})
	if f.Mode != nil || f.DefaultMode != 0o644 {
		t.Errorf("certificate: got %+v", f)
	}
}

func TestMatches(t *testing.T) {
	m := &Material{KeyPath: "/store/c.key"}
	for _, test := range []struct {
		server  string
		keyPath targetconf.Path
		want    bool
	}{
		{"/k", "/k", true}, {"/k", "/other", false}, {"/k", "", false}, {"/store/c.key", "", true}, {"/store/c.key", "/k", true},
	} {
		pair := &Pair{KeyPath: test.keyPath}
		if got := pair.matches(serverconf.Pair{Key: test.server}, m); got != test.want {
			t.Errorf("server reads %s, key_path is %q: got %v", test.server, test.keyPath, got)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
