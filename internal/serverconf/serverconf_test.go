package serverconf

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

func TestKeyFor(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "real"), 0o755))
	must(t, os.Symlink("real", filepath.Join(dir, "link")))
	linked, direct := filepath.Join(dir, "link/c.pem"), filepath.Join(dir, "real/c.pem")

	found, err := KeyFor(targetconf.Path(linked), []Pair{{"/x", "/y", "f:1"}, {direct, "/k//k.pem", "f:2"}})
	if err != nil || found.Key != "/k/k.pem" || found.Where != "f:2" {
		t.Errorf("through a symlink: got %+v, %v", found, err)
	}
	// A key in the certificate's own file is reported as cert, whichever path the server uses.
	if found, err = KeyFor(targetconf.Path(linked), []Pair{{direct, direct, ""}}); err != nil || found.Key != linked {
		t.Errorf("one file: got %+v, %v", found, err)
	}
	if found, err = KeyFor("/c", []Pair{{"/c", linked, ""}, {"/c", direct, ""}}); err != nil || found.Key != linked {
		t.Errorf("one key under two paths: got %+v, %v", found, err)
	}
	for says, pairs := range map[string][]Pair{
		"does not use that file": {{"/x", "/k", ""}},
		"several keys":           {{linked, "/k1", ""}, {direct, "/k2", ""}},
		"which key belongs to":   {{linked, "", ""}},
		`several keys for `:      {{linked, "/k1", ""}, {direct, "", ""}},
		"a variable":             {{linked, "/k/$name", ""}},
		"absolute path":          {{linked, "engine:", ""}},
		`".."`:                   {{linked, "/k/../x", ""}},
	} {
		found, err := KeyFor(targetconf.Path(linked), pairs)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v: got %+v, %v, want an error with %q", pairs, found, err, says)
		}
		if _, isUnclear := errors.AsType[*UnclearError](err); isUnclear == errors.Is(err, ErrUnnamed) {
			t.Errorf("%v: %v must be either an UnclearError or ErrUnnamed", pairs, err)
		}
	}
}

func TestProgram(t *testing.T) {
	for line, want := range map[string]int{
		"nginx -t": 0, "/usr/sbin/nginx-debug": 0, "nginx1.26 -t": 0, "sudo -n /usr/sbin/nginx -t": 2, "sudo -u root nginx": 3, "doas nginx": 1,
		"systemctl reload nginx": -1, "true": -1, "sudo": -1, "sudo -u": -1,
		"nginx-deploy --all": -1, "nginx.sh": -1, "sudo systemctl reload nginx": -1, "sudo -u nginx /opt/deploy": -1,
	} {
		if got := program(strings.Fields(line), "nginx"); got != want {
			t.Errorf("%s: got %d, want %d", line, got, want)
		}
	}
}

func TestReadFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	if text, err := readFile(file); string(text) != "x" || err != nil {
		t.Errorf("got %q, %v", text, err)
	}
	must(t, os.Truncate(file, maxFile+1))
	for _, path := range []string{file, filepath.Dir(file), file + ".missing"} {
		if _, err := readFile(path); err == nil {
			t.Errorf("%s: got no error", path)
		}
	}
}

// words returns the command in a line without quotes.
func words(line string) policy.Command { return policy.Command{Argv: strings.Fields(line)} }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
