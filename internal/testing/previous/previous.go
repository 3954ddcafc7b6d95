// Package previous recreates hosts as the previous version of the agent left them, so that tests
// can upgrade them.
//
// Each file in testdata holds one host, in sections. The header of a section has its kind, and the
// mode and the path of a file. "before" is a file of the host as it was left. "after" is a file as
// the previous version left it when it was started there, and "recovery" is what that version
// reported. The newline at the end of each section belongs to the format.
package previous

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"certctl-agent/internal/hostfile"
)

// base is the path of every host's files, all of which belonged to user and group 0.
const base = "/srv/previous"

// File is one file of a host.
type File struct {
	Mode fs.FileMode
	Data string
}

// Files are the files of a host, by their paths relative to base.
type Files map[string]File

// Host is a host from testdata.
type Host struct {
	Recovery      string // JSON
	Before, After Files
}

// Read reads a host from the file name.
func Read(t *testing.T, name string) Host {
	t.Helper()
	text, err := os.ReadFile(name)
	check(t, err)
	h := Host{Before: make(Files), After: make(Files)}
	for section := range strings.SplitSeq(strings.TrimPrefix(strings.TrimSuffix(string(text), "\n"), "-- "), "\n-- ") {
		header, data, ok := strings.Cut(section, " --\n")
		words := strings.Fields(header)
		if ok && header == "recovery" {
			h.Recovery = data
			continue
		}
		if !ok || len(words) < 3 {
			t.Fatalf("%s: a section has the header %.40q", name, section)
		}
		mode, err := strconv.ParseUint(words[1], 8, 32)
		check(t, err)
		if len(words) == 4 && words[3] == "base64" {
			binary, err := base64.StdEncoding.DecodeString(data)
			check(t, err)
			data = string(binary)
		}
		files := h.Before
		if words[0] == "after" {
			files = h.After
		}
		files[words[2]] = File{fs.FileMode(mode), data}
	}
	return h
}

// Moved returns the files as if the host had been at dir and had belonged to dir's owner. It checks
// the checksum of each record in an envelope, and replaces it by that of the new bytes.
func (f Files) Moved(t *testing.T, dir string) Files {
	t.Helper()
	info, err := os.Stat(dir)
	check(t, err)
	uid, gid := hostfile.Owner(info)
	owner := fmt.Appendf(nil, `"uid":%d,"gid":%d`, uid, gid)
	moved := make(Files)
	for name, file := range f {
		data := strings.ReplaceAll(file.Data, base, dir)
		if strings.HasPrefix(file.Data, `{"version":1,"sha256":`) {
			if sum, record := open(t, file.Data); sum != digest(record) {
				t.Fatalf("%s has a wrong checksum", name)
			}
			_, record := open(t, data)
			record = bytes.ReplaceAll(record, []byte(`"uid":0,"gid":0`), owner)
			data = fmt.Sprintf(`{"version":1,"sha256":"%s","record":%s}`, digest(record), record)
		}
		moved[name] = File{file.Mode, data}
	}
	return moved
}

// open returns the checksum and the record in an envelope of the journal or the ledger.
func open(t *testing.T, data string) (sum string, record []byte) {
	t.Helper()
	var envelope struct {
		SHA256 string
		Record json.RawMessage
	}
	check(t, json.Unmarshal([]byte(data), &envelope))
	return envelope.SHA256, envelope.Record
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Write writes the files into dir. It creates missing directories with mode 0700.
func (f Files) Write(t *testing.T, dir string) {
	t.Helper()
	for name, file := range f {
		path := filepath.Join(dir, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o700))
		check(t, os.WriteFile(path, []byte(file.Data), 0o600))
		check(t, os.Chmod(path, file.Mode))
	}
}

// In returns the files in dir.
func In(t *testing.T, dir string) Files {
	t.Helper()
	files := make(Files)
	check(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
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
		name, err := filepath.Rel(dir, path)
		files[name] = File{info.Mode(), string(data)}
		return err
	}))
	return files
}

// Temporaries returns the names of the agent's temporary files.
func (f Files) Temporaries() (names []string) {
	for name := range f {
		if strings.HasPrefix(filepath.Base(name), ".certctl-") {
			names = append(names, name)
		}
	}
	return names
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
