package traefik

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

func TestConformance(t *testing.T) {
	config := func(dir string) map[string]any { return map[string]any{"cert_dir": dir} }
	want := func(m *connector.Material) map[string][]byte {
		return map[string][]byte{"cert.pem": append(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...)...), "key.pem": m.KeyPEM}
	}
	t.Run("pair alone", func(t *testing.T) {
		conformance.Run(t, conformance.Harness{Type: Type(), Required: []string{"cert_dir"}, Config: config, Want: want})
	})
	t.Run("dynamic configuration and reload", func(t *testing.T) {
		conformance.Run(t, conformance.Harness{
			Type: Type(), Required: []string{"cert_dir"},
			Config: func(d string) map[string]any {
				c := config(d)
				c["dynamic_config"] = filepath.Join(d, "certctl.yml")
				c["reload_command"] = "systemctl reload traefik"
				return c
			},
			Want: func(m *connector.Material) map[string][]byte {
				files := want(m)
				files["certctl.yml"] = fmt.Appendf(nil, `# Written by certctl-agent for the certificate %s.
# Changes are lost with the next one, unless this first comment goes.
tls:
  certificates:
    - certFile: "%[2]s/cert.pem"
      keyFile: "%[2]s/key.pem"
`, pemutil.Fingerprint(m.Leaf), conformance.Dir(m))
				return files
			},
		})
	})
}

// fixture is a host with a Traefik whose dynamic configuration is in a
// separate directory.
type fixture struct {
	*conformance.Host
	ca      *testca.CA
	dynamic string
	config  map[string]any
}

func newFixture(t *testing.T, dynamic string) *fixture {
	f := &fixture{Host: conformance.NewHost(t, conformance.RunCommand), ca: testca.Must(t)}
	f.dynamic = filepath.Join(f.Dir, "dynamic", dynamic)
	tls := filepath.Join(f.Dir, "tls")
	if err := errors.Join(os.Mkdir(tls, 0o755), os.Mkdir(filepath.Dir(f.dynamic), 0o755)); err != nil {
		t.Fatal(err)
	}
	f.config = map[string]any{"watch_dir": tls, "cert_file": "site.crt", "key_file": "site.key", "dynamic_config": f.dynamic}
	return f
}

func (f *fixture) deploy(t *testing.T, m *connector.Material) transaction.Result {
	t.Helper()
	result, err := f.Deploy(t.Context(), Type(), f.config, m)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// stat describes the dynamic file, and keeps it open: otherwise the next file could
// reuse its inode number.
func (f *fixture) stat(t *testing.T) os.FileInfo {
	t.Helper()
	file, err := os.Open(f.dynamic)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	info, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestTOML(t *testing.T) {
	f := newFixture(t, "certctl.toml")
	f.deploy(t, f.Material(t, f.ca))
	m := f.Material(t, f.ca)
	f.deploy(t, m) // replaces the file of the first deployment
	want := fmt.Sprintf(`# Written by certctl-agent for the certificate %s.
# Changes are lost with the next one, unless this first comment goes.
[[tls.certificates]]
  certFile = "%[2]s/tls/site.crt"
  keyFile = "%[2]s/tls/site.key"
`, pemutil.Fingerprint(m.Leaf), f.Dir)
	if got, err := os.ReadFile(f.dynamic); err != nil || string(got) != want {
		t.Errorf("got %v and\n%s\nwant\n%s", err, got, want)
	}
	if mode := f.stat(t).Mode(); mode != 0o644 {
		t.Errorf("mode %v, want 0644", mode)
	}
}

// The operator's file is replaced by a copy of itself, once for each new pair.
func TestOperatorsOwn(t *testing.T) {
	f := newFixture(t, "site.yml")
	own := []byte("# ours\ntls: {certificates: [{certFile: a, keyFile: b}]}\n")
	if err := os.WriteFile(f.dynamic, own, 0o640); err != nil {
		t.Fatal(err)
	}
	check := func(what string, before os.FileInfo, touched bool) {
		t.Helper()
		after := f.stat(t)
		if got := !os.SameFile(before, after); got != touched || after.Mode() != before.Mode() {
			t.Errorf("%s: replaced: %v, want %v; mode %v, was %v", what, got, touched, after.Mode(), before.Mode())
		}
		if got, err := os.ReadFile(f.dynamic); err != nil || !bytes.Equal(got, own) {
			t.Errorf("%s: it holds %q (%v)", what, got, err)
		}
	}
	m := f.Material(t, f.ca)
	before := f.stat(t)
	f.deploy(t, m)
	check("first deployment", before, true)
	before = f.stat(t)
	if result := f.deploy(t, m); !result.Unchanged {
		t.Error("deployed the same pair again")
	}
	check("the same pair", before, false)
	f.deploy(t, f.Material(t, f.ca))
	check("renewal", before, true)

	before = f.stat(t)
	f.config["reload_command"] = "/nonexistent/reload"
	if _, err := f.Deploy(t.Context(), Type(), f.config, f.Material(t, f.ca)); err == nil {
		t.Error("a failed reload passes")
	}
	check("rollback", before, true)
}

func TestNew(t *testing.T) {
	tests := []struct{ key, value, says string }{
		{"dynamic_config", "/etc/traefik/dynamic.json", ".toml"},
		{"dynamic_config", "dynamic.yml", "absolute"},
		{"watch_dir", "/etc/{{ env `HOME` }}", "cert_dir"},
		{"key_file", "site.crt", "key_file"},
		{"key_file", "********", "key_file"},
		{"key_file_mode", "0644", "key_file_mode"},
		{"reload_command", "a; b", "reload_command"},
	}
	f := newFixture(t, "site.yml")
	for _, test := range tests {
		was := f.config[test.key]
		f.config[test.key] = test.value
		if _, err := f.Connector(Type(), f.config); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s = %q: got %v, want an error with %q", test.key, test.value, err, test.says)
		}
		if f.config[test.key] = was; was == nil {
			delete(f.config, test.key)
		}
	}
}

// A file that is not readable or not regular might be the operator's.
func TestUnreadableDynamic(t *testing.T) {
	f := newFixture(t, "site.yml")
	if err := os.Mkdir(f.dynamic, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Deploy(t.Context(), Type(), f.config, f.Material(t, f.ca)); err == nil || !strings.Contains(err.Error(), f.dynamic+": it is not a regular file") {
		t.Errorf("got %v, want an error that names the file", err)
	}
}

// Only a deployment that Traefik does not notice logs a warning.
func TestNotTold(t *testing.T) {
	for _, test := range []struct {
		told   bool
		config map[string]any
	}{
		{false, nil},
		{true, map[string]any{"dynamic_config": "in the directory of the pair"}},
		{true, map[string]any{"reload_command": "docker restart traefik"}},
	} {
		host := conformance.NewHost(t, func(context.Context, policy.Command) error { return nil })
		config := map[string]any{"cert_dir": host.Dir}
		maps.Copy(config, test.config)
		if _, ok := config["dynamic_config"]; ok {
			config["dynamic_config"] = filepath.Join(host.Dir, "dynamic.yml")
		}
		m := host.Material(t, testca.Must(t))
		for _, unchanged := range []bool{false, true} {
			result, err := host.Deploy(t.Context(), Type(), config, m)
			if err != nil || result.Unchanged != unchanged {
				t.Fatalf("%v: got %+v, %v, want it unchanged: %v", config, result, err, unchanged)
			}
			if warned := strings.Contains(fmt.Sprint(result.Warnings), "keeps using the old certificate"); warned != (!test.told && !unchanged) {
				t.Errorf("%v, unchanged: %v: warnings %q", config, unchanged, result.Warnings)
			}
		}
	}
}
