package transaction

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/policy"
)

// previousBase is where the hosts in testdata/previous were; see README.md there.
const previousBase = "/srv/previous"

// What the deployment on these hosts installs.
const (
	previousOldKey   = "-----BEGIN PRIVATE KEY-----\nb2xkIGtleSwgbG9uZ2VyIHRoYW4gdGhlIG5ldw==\n-----END PRIVATE KEY-----\n"
	previousNewKey   = "-----BEGIN PRIVATE KEY-----\nbmV3IGtleQ==\n-----END PRIVATE KEY-----\n"
	previousNewCert  = "-----BEGIN CERTIFICATE-----\nbmV3IGNlcnRpZmljYXRl\n-----END CERTIFICATE-----\n"
	previousNewChain = "-----BEGIN CERTIFICATE-----\nY2hhaW4=\n-----END CERTIFICATE-----\n"
)

// previousAgent is an agent on such a host. Everything that this test needs of
// the engine is here.
type previousAgent struct{ *Store }

func startPrevious(t *testing.T, w world, mounts bool) previousAgent {
	t.Helper()
	if mounts {
		return previousAgent{w.mustStore(t, mounted(w.path("private/key.pem")))}
	}
	return previousAgent{w.mustStore(t, nil)}
}

func (a previousAgent) deploy(t *testing.T, w world) (unchanged bool) {
	t.Helper()
	mode := fs.FileMode(0o600)
	result, err := a.Deploy(t.Context(), Transaction{
		Target: "t1",
		Material: &connector.Material{KeyFiles: []connector.File{
			{Path: w.path("keys/c1.previous"), Kind: connector.StoreFile, Data: []byte(previousOldKey), Mode: &mode},
			{Path: w.path("keys/c1.key"), Kind: connector.StoreFile, Data: []byte(previousNewKey), Mode: &mode},
		}},
		Files: []connector.File{
			{Path: w.path("private/key.pem"), Kind: connector.KeyFile, Data: []byte(previousNewKey), DefaultMode: 0o600},
			{Path: w.path("site/cert.pem"), Kind: connector.CertificateFile, Data: []byte(previousNewCert), DefaultMode: 0o644},
			{Path: w.path("site/chain.pem"), Kind: connector.CertificateFile, Data: []byte(previousNewChain), DefaultMode: 0o644},
		},
		Validate: &policy.Command{Argv: []string{"validate"}},
		Reload:   &policy.Command{Argv: []string{"reload"}},
	})
	check(t, err)
	return result.Unchanged
}

// previousFile is a file of such a host.
type previousFile struct {
	mode fs.FileMode
	data string
}

// readPrevious reads one host, by path: as a crash left it, and as the version
// before left it when it was started again.
func readPrevious(t *testing.T, name string) (recovery Recovery, before, after map[string]previousFile) {
	t.Helper()
	text, err := os.ReadFile(name)
	check(t, err)
	before, after = make(map[string]previousFile), make(map[string]previousFile)
	for section := range strings.SplitSeq(strings.TrimPrefix(strings.TrimSuffix(string(text), "\n"), "-- "), "\n-- ") {
		header, data, ok := strings.Cut(section, " --\n")
		words := strings.Fields(header)
		switch {
		case !ok:
			t.Fatalf("%s: a section without a header: %.40q", name, section)
		case words[0] == "recovery":
			check(t, json.Unmarshal([]byte(data), &recovery))
			continue
		}
		mode, err := strconv.ParseUint(words[1], 8, 32)
		check(t, err)
		map[string]map[string]previousFile{"before": before, "after": after}[words[0]][words[2]] = previousFile{fs.FileMode(mode), data}
	}
	return recovery, before, after
}

// relocate moves the files of a host to w. A record in the journal gets the
// checksum of its new bytes.
func relocate(t *testing.T, w world, files map[string]previousFile) map[string]previousFile {
	t.Helper()
	info, err := os.Stat(w.path("state"))
	check(t, err)
	uid, gid := hostfile.Owner(info)
	moved := make(map[string]previousFile)
	for name, file := range files {
		data := strings.ReplaceAll(file.data, previousBase, w.base)
		if strings.HasPrefix(name, "state/journal/") {
			sum, record := envelopeOf(t, file.data)
			if sumOf(record) != sum {
				t.Fatalf("%s is not as it was written", name)
			}
			_, record = envelopeOf(t, data)
			record = bytes.ReplaceAll(record, []byte(`"uid":0,"gid":0`), fmt.Appendf(nil, `"uid":%d,"gid":%d`, uid, gid))
			data = fmt.Sprintf(`{"version":1,"sha256":"%s","record":%s}`, sumOf(record), record)
		}
		moved[name] = previousFile{file.mode, data}
	}
	return moved
}

// envelopeOf takes a record out of the envelope that every version so far has
// written.
func envelopeOf(t *testing.T, data string) (sum string, record []byte) {
	t.Helper()
	var e struct {
		Version int
		SHA256  string
		Record  json.RawMessage
	}
	if err := json.Unmarshal([]byte(data), &e); err != nil || e.Version != 1 {
		t.Fatalf("version %d, %v: %.60q", e.Version, err, data)
	}
	return e.SHA256, e.Record
}

func sumOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// unpack makes the host that files are.
func (w world) unpack(t *testing.T, files map[string]previousFile) {
	t.Helper()
	for name, file := range files {
		check(t, os.MkdirAll(filepath.Dir(w.path(name)), 0o700))
		w.write(t, name, []byte(file.data), file.mode)
	}
}

// pack reads the whole host.
func (w world) pack(t *testing.T) map[string]previousFile {
	t.Helper()
	files := make(map[string]previousFile)
	check(t, filepath.WalkDir(w.base, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(w.base, path)
		files[name] = previousFile{info.Mode(), string(data)}
		return err
	}))
	return files
}

// TestPreviousRelease takes over hosts on which the version before was stopped at
// some step: they become what that version would have made of them, and the next
// deployment goes on from there.
func TestPreviousRelease(t *testing.T) {
	names, err := filepath.Glob("testdata/previous/*.txt")
	check(t, err)
	if len(names) < 20 {
		t.Fatalf("found %d hosts", len(names))
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			want, before, after := readPrevious(t, name)
			w := newWorld(t, t.TempDir())
			w.unpack(t, relocate(t, w, before))
			mounts := strings.Contains(name, "in-place")

			agent := startPrevious(t, w, mounts)
			found, err := agent.Recover(t.Context())
			if err != nil || !reflect.DeepEqual(found, want) {
				t.Errorf("found %+v, %v, want %+v", found, err, want)
			}
			differ(t, w.pack(t), relocate(t, w, after))
			if left := temporaries(w.pack(t)); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}

			if finished := len(want.Finished) > 0; agent.deploy(t, w) != finished {
				t.Errorf("the next deployment has something to do: %v", finished)
			}
			installed := w.pack(t)
			for name, data := range map[string]string{
				"keys/c1.previous": previousOldKey, "keys/c1.key": previousNewKey, "private/key.pem": previousNewKey,
				"site/cert.pem": previousNewCert, "site/chain.pem": previousNewChain,
			} {
				if installed[name].data != data {
					t.Errorf("after the next deployment %s holds %q, want %q", name, installed[name].data, data)
				}
			}
			if left := append(temporaries(installed), w.journal(t)...); len(left) > 0 {
				t.Errorf("after the next deployment there is still %q", left)
			}
			if !agent.deploy(t, w) {
				t.Error("the deployment after it finds something to do")
			}
		})
	}
}

// TestPreviousReload does the reload that the version before left owing.
func TestPreviousReload(t *testing.T) {
	names, err := filepath.Glob("testdata/previous/*.txt")
	check(t, err)
	for _, name := range names {
		want, before, _ := readPrevious(t, name)
		if want.Reloads == 0 {
			continue
		}
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			w.unpack(t, relocate(t, w, before))
			agent := startPrevious(t, w, strings.Contains(name, "in-place"))
			_, err := agent.Recover(t.Context())
			check(t, err)
			err = agent.Repair(t.Context(), t.Context())
			if fails := strings.Contains(before["state/journal/t1.json"].data, `["fail"]`); (err != nil) != fails || len(w.journal(t)) > 0 != fails {
				t.Errorf("repaired: %v, journal %q, want an error: %v", err, w.journal(t), fails)
			}
		})
	}
}

// differ reports an error for each file that is not as it should be.
func differ(t *testing.T, got, want map[string]previousFile) {
	t.Helper()
	all := maps.Clone(got)
	maps.Copy(all, want)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if got[name] != want[name] {
			t.Errorf("%s is %v %.400q, want %v %.400q", name, got[name].mode, got[name].data, want[name].mode, want[name].data)
		}
	}
}

func temporaries(files map[string]previousFile) (names []string) {
	for name := range files {
		if strings.HasPrefix(filepath.Base(name), ".certctl-") {
			names = append(names, name)
		}
	}
	return names
}
