package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/testca"
)

// planted returns a directory with three certificates, a key and a file that does not parse.
func planted(t *testing.T) (dir string, key []byte) {
	t.Helper()
	ca := testca.Must(t)
	dir = t.TempDir()
	for name, ends := range map[string]time.Duration{"expired": -36 * time.Hour, "soon": 10*24*time.Hour + time.Hour, "later": 80*24*time.Hour + time.Hour} {
		issued, err := ca.Issue(testca.Template{CommonName: name + ".example.org", NotBefore: time.Now().AddDate(0, -2, 0), NotAfter: time.Now().Add(ends)})
		if err != nil {
			t.Fatal(err)
		}
		key = issued.KeyPEM()
		if err := os.WriteFile(filepath.Join(dir, name+".pem"), append(issued.LeafPEM(), key...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	damaged := "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
	if err := os.WriteFile(filepath.Join(dir, "damaged.pem"), []byte(damaged), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, key
}

func TestScanTable(t *testing.T) {
	t.Parallel()
	dir, _ := planted(t)
	code, stdout, stderr := inProcess(t, nil, "scan", dir)
	if code != exitOK || stderr != "" {
		t.Fatalf("exit code %d, stderr %q", code, stderr)
	}
	lines := strings.Split(stdout, "\n")
	var shown [][]string
	for _, line := range lines[:4] {
		shown = append(shown, strings.Fields(line))
	}
	if !slices.Equal(shown[0], []string{"DAYS", "STATE", "NAME", "ISSUER", "KEY", "PATH"}) {
		t.Errorf("the heading is %q", lines[0])
	}
	for i, want := range []string{"-1 expired expired.example.org", "10 soon soon.example.org", "80 later.example.org"} {
		got := strings.Join(shown[i+1], " ")
		if !strings.HasPrefix(got, want+" CN=Test Root") || !strings.Contains(got, " ECDSA 256 "+dir) {
			t.Errorf("line %d is %q, want %q and so on", i+1, lines[i+1], want)
		}
	}
	for _, want := range []string{"3 certificates in 4 files", "1 expired, 1 soon", "error: " + filepath.Join(dir, "damaged.pem")} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is missing in\n%s", want, stdout)
		}
	}
	if strings.Contains(stdout, "\x1b") {
		t.Error("colours although the output is not a terminal")
	}
}

// TestScanJSON checks the exact fields of the document.
func TestScanJSON(t *testing.T) {
	t.Parallel()
	dir, key := planted(t)
	code, stdout, stderr := inProcess(t, nil, "scan", "-json", dir)
	if code != exitOK || stderr != "" {
		t.Fatalf("exit code %d, stderr %q", code, stderr)
	}
	var document map[string][]any
	if err := json.Unmarshal([]byte(stdout), &document); err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(document)); !slices.Equal(got, []string{"certificates", "errors"}) {
		t.Errorf("the document has %q", got)
	}
	if len(document["certificates"]) != 3 || len(document["errors"]) != 1 {
		t.Fatalf("%d certificates and %d errors, want 3 and 1", len(document["certificates"]), len(document["errors"]))
	}
	want := []string{"common_name", "fingerprint_sha256", "is_ca", "issuer_dn", "key_algorithm", "key_size", "not_after", "not_before",
		"pem_data", "sans", "serial_number", "source_format", "source_path", "subject_dn"}
	for _, found := range document["certificates"] {
		if got := slices.Sorted(maps.Keys(found.(map[string]any))); !slices.Equal(got, want) {
			t.Errorf("a certificate has %q, want %q", got, want)
		}
	}
	if bytes.Contains([]byte(stdout), bytes.Split(key, []byte("\n"))[1]) {
		t.Error("the document contains a key")
	}

	code, stdout, _ = inProcess(t, nil, "scan", "-json", t.TempDir())
	if code != exitOK || stdout != "{\n  \"certificates\": [],\n  \"errors\": []\n}\n" {
		t.Errorf("nothing found: exit code %d\n%s", code, stdout)
	}
}

// TestScanArguments: a file is scanned, and an argument that cannot be scanned is a failure.
func TestScanArguments(t *testing.T) {
	t.Parallel()
	dir, key := planted(t)
	big, pipe, dangling := filepath.Join(dir, "big.pem"), filepath.Join(dir, "pipe"), filepath.Join(dir, "dangling.pem")
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "soon.key"), key, 0o600), os.WriteFile(big, nil, 0o600), os.Truncate(big, 1<<20+1),
		syscall.Mkfifo(pipe, 0o600), os.Symlink("nowhere", dangling)); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := inProcess(t, nil, "scan", filepath.Join(dir, "soon.pem"), filepath.Join(dir, "expired.pem"))
	if code != exitOK || stderr != "" || !strings.Contains(stdout, "soon.example.org") || !strings.Contains(stdout, "2 certificates in 2 files") {
		t.Errorf("two files: exit code %d, stderr %q\n%s", code, stderr, stdout)
	}
	wrong := map[string]string{"/no/such/directory": "no such file", dangling: "no such file", pipe: "neither a directory nor a regular file",
		"/dev/null": "neither a directory nor a regular file", big: "1048577 bytes", filepath.Join(dir, "soon.key"): "private key"}
	if os.Geteuid() != 0 {
		closed := filepath.Join(dir, "closed")
		if err := os.Mkdir(closed, 0); err != nil {
			t.Fatal(err)
		}
		wrong[closed] = "permission denied"
	}
	for path, want := range wrong {
		code, stdout, stderr := inProcess(t, nil, "scan", dir, path)
		if code != exitFailure || stdout != "" || !strings.Contains(stderr, path) || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %q, %s", path, code, stdout, stderr)
		}
	}
}

// TestScanBesideDaemon scans with the daemon's configuration: it does not change the daemon's state
// and sends nothing.
func TestScanBesideDaemon(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	dir, _ := planted(t)
	h.env["CERTCTL_DISCOVERY_DIRS"] = dir
	agent := h.start()
	agent.waitLog("scan reported")
	agent.stop()
	state, requests := h.tree("keys"), h.plane.Count("")
	code, output := h.run("scan")
	if code != exitOK || !strings.Contains(output, "soon.example.org") {
		t.Errorf("exit code %d\n%s", code, output)
	}
	if !maps.Equal(state, h.tree("keys")) {
		t.Error("the daemon's state was touched")
	}
	if n := h.plane.Count("") - requests; n != 0 {
		t.Errorf("%d requests", n)
	}
}
