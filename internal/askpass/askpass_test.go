package askpass

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"certctl-agent/internal/secret"
)

// TestMain replaces the agent that ssh would run.
func TestMain(m *testing.M) {
	if Asked(os.Args) {
		if Main(os.Args, os.Stdout) != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func TestAnswers(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "t") // the path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s, err := Serve(dir, func(prompt string) (secret.String, bool) {
		return secret.New("correct horse"), prompt == "a's password: "
	})
	if err != nil {
		t.Fatal(err)
	}
	ask := func(prompt string) (string, error) {
		program, _ := strings.CutPrefix(s.Environment()[0], "SSH_ASKPASS=")
		command := exec.CommandContext(t.Context(), program, prompt)
		command.Env = s.Environment()
		out, err := command.Output()
		return string(out), err
	}
	if got, err := ask("a's password: "); err != nil || got != "correct horse\n" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := ask("another's password: "); err == nil || got != "" {
		t.Errorf("another: got %q, %v, want nothing and a failure", got, err)
	}
	if strings.Contains(strings.Join(s.Environment(), " "), "horse") {
		t.Error("the secret is in the environment")
	}
	s.Close()
	if got, err := ask("a's password: "); err == nil || got != "" {
		t.Errorf("after the end: got %q, %v", got, err)
	}
	if Asked([]string{"/usr/bin/certctl-agent"}) || Asked(nil) {
		t.Error("Asked is true for the agent's own name")
	}
}
