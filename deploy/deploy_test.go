// Package deploy_test checks the files that ship with the binary by the tools of each service
// manager, and by the service manager itself if it is installed.
package deploy_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// output runs a program and returns its output. A failure ends the test.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryOutput(exec.CommandContext(t.Context(), name, args...))
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return out
}

func tryOutput(cmd *exec.Cmd) (string, error) {
	// A grandchild that keeps the pipe open must not block the test.
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

// makeTarget runs make in the project with dist as output directory.
func makeTarget(t *testing.T, target, dist string, variables ...string) string {
	t.Helper()
	return output(t, "make", append([]string{"-s", "-C", "..", target, "DIST=" + dist}, variables...)...)
}

// patience is how long a test waits for an expected event. Speed is not tested: a busy machine can
// turn seconds into more than 20.
const patience = 2 * time.Minute

// eventually polls until an event outside this process has happened.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !done() {
		if t.Failed() || time.Now().After(deadline) {
			t.Fatalf("waited %v for %s", patience, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func writeFile(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	// Independent of the umask and of an existing file's mode.
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}
