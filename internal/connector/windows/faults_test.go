package windows

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/windowshost"
	"certctl-agent/internal/transaction"
	"certctl-agent/internal/winrm"
)

// TestReboot: a host that reboots before or after any operation, with or without an
// answer, is repaired by the next deployment, and the failed one
// reports the truth.
func TestReboot(t *testing.T) {
	for _, kind := range []string{"IIS", "WinCertStore"} {
		for _, operation := range []string{opRead, opWrite, opFinish} {
			for _, done := range []bool{false, true} {
				for _, back := range []bool{true, false} {
					if !back && operation != opWrite {
						continue
					}
					f := newFixture(t, kind)
					first := f.material()
					f.mustDeploy(first)
					before := f.windows.State()
					down := false
					f.windows.Change(func(c *windowshost.Console) {
						c.Fault(func(at string, isDone bool) error {
							if at == operation && isDone == done {
								down = true
								return windowshost.ErrDropped
							}
							if down && !back {
								return windowshost.ErrDropped
							}
							return nil
						})
					})
					m := f.material()
					_, err := f.deploy(m)
					f.windows.Change(func(c *windowshost.Console) { c.Fault(nil) })
					switch {
					case operation == opFinish:
						must(t, err) // after the commit a failure is a warning
					case !errors.Is(err, windowshost.ErrDropped):
						t.Errorf("%s, %s, done %v: got %v", kind, operation, done, err)
					case operation == opWrite && !back:
						if !conformance.Broken(err) {
							t.Errorf("%s: got %v, want a BrokenError", kind, err)
						}
					case len(before) != len(f.windows.State()) || kind == "IIS" && f.bound(site, binding) != thumbprint(first.Leaf):
						t.Errorf("%s, %s, done %v: the host has %v, and had %v", kind, operation, done, f.windows.State(), before)
					}
					f.mustDeploy(m)
					if !f.holds(`LocalMachine\My`, thumbprint(m.Leaf)) {
						t.Errorf("%s, %s, done %v: the next deployment did not converge", kind, operation, done)
					}
					if kind == "IIS" && f.holds(`LocalMachine\My`, thumbprint(first.Leaf)) {
						t.Errorf("%s, %s, done %v: the older certificate is left", kind, operation, done)
					}
				}
			}
		}
	}
}

// refusing refuses connections.
type refusing struct{ runner }

func (refusing) Run(context.Context, []string, []byte) (*winrm.Result, error) {
	return nil, fmt.Errorf("WinRM of a: %w", syscall.ECONNREFUSED)
}

// TestRefused: the error for a refused connection names the possible causes.
func TestRefused(t *testing.T) {
	r := &remote{runner: refusing{}, deadline: time.Minute}
	_, err := r.call(t.Context(), &request{Operation: opRead})
	conformance.WantError(t, err, "connection refused: the host is down or restarting")
}

// answering always gives the same answer.
type answering struct {
	runner
	stdout string
}

func (a answering) Run(context.Context, []string, []byte) (*winrm.Result, error) {
	return &winrm.Result{Stdout: []byte(a.stdout)}, nil
}

// TestHostileAnswer: invalid names in an answer do not get into errors.
func TestHostileAnswer(t *testing.T) {
	m := newFixture(t, "IIS").material()
	name, sha256 := thumbprint(m.Leaf), pemutil.Fingerprint(m.Leaf)
	for member, value := range map[string]any{"bound": "\x1b[31m", "ours": []string{"\x1b[31m"}, "chain_missing": []string{"\x1b[31m"}, "unread": []string{"\x1b[31m"}} {
		said := map[string]any{"present": true, "has_key": true, "sha256": sha256, "bound": name, "bound_store": "My"}
		said[member] = value
		stdout, err := json.Marshal(map[string]any{"contract": contract, "state": said})
		must(t, err)
		place := newPlace(request{Site: "www", Store: "My"}, m)
		r := &remote{at: &connector.Peer{}, runner: answering{stdout: string(stdout)}, deadline: time.Minute}
		err = (&change{remote: r, place: place, material: m, seen: new(state)}).Write(t.Context())
		conformance.WantError(t, err, "[31m")
		if err != nil && strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%s: %q", member, err)
		}
	}
}

// hanging answers when its context ends.
type hanging struct{ runner }

func (h hanging) Run(ctx context.Context, _ []string, _ []byte) (*winrm.Result, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestDeadline: the agent gives up a script that does not end. Cancelling the deployment does
// not shorten a change.
func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &remote{runner: hanging{}, deadline: time.Minute}
		ctx, cancel := context.WithCancel(t.Context())
		for _, operation := range []string{opRead, opWrite} {
			_, err := r.call(t.Context(), &request{Operation: operation})
			conformance.WantError(t, err, "no answer within 1m0s", "exec_deadline")
		}
		go cancel()
		_, err := r.call(ctx, &request{Operation: opRead})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("a look after the cancellation: %v", err)
		}
		_, err = r.call(ctx, &request{Operation: opWrite})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("a change begun after the cancellation: %v", err)
		}
	})
}

// TestAnotherJob: a later job with another certificate undoes what a killed job started with
// someone else's certificate.
func TestAnotherJob(t *testing.T) {
	for _, kind := range []string{"IIS", "WinCertStore"} {
		f := newFixture(t, kind)
		f.windows.Change(func(c *windowshost.Console) { c.Account("S-1-5-20") })
		var more []any
		if kind == "WinCertStore" {
			more = []any{"friendly_name", "ours", "key_readers", "S-1-5-20"}
		}
		f.mustDeploy(f.material(), more...)
		theirs := f.material()
		f.windows.Change(func(c *windowshost.Console) {
			c.Put(`LocalMachine\My`, &windowshost.Certificate{Certificate: theirs.Leaf, Key: pkcs8(t, theirs), FriendlyName: "theirs"})
			c.Put(`LocalMachine\CA`, &windowshost.Certificate{Certificate: theirs.Chain[0]})
		})
		before := f.windows.State()
		killed := errors.New("killed")
		f.windows.Change(func(c *windowshost.Console) {
			c.Fault(func(operation string, done bool) error {
				if operation == opWrite && done {
					f.Before = func(transaction.Step) error { return killed }
				}
				return nil
			})
		})
		if _, err := f.deploy(theirs, more...); err == nil {
			t.Error("a killed deployment reports success")
		}
		f.Before = nil
		f.windows.Change(func(c *windowshost.Console) { c.Fault(nil) })
		f.Restart(t)
		if maps.Equal(before, f.windows.State()) {
			t.Errorf("%s: nothing was begun", kind)
		}
		if _, err := f.deploy(f.material(), append(unverified(), more...)...); err == nil || conformance.Broken(err) {
			t.Errorf("%s: got %v, want a deployment that is undone", kind, err)
		}
		if after := f.windows.State(); !maps.Equal(before, after) {
			t.Errorf("%s: from %v to %v", kind, before, after)
		}
	}
}

// cancelling cancels the deployment while a command runs.
type cancelling struct {
	runner
	cancel context.CancelFunc
}

func (c *cancelling) Run(ctx context.Context, command []string, stdin []byte) (*winrm.Result, error) {
	c.cancel()
	return c.runner.Run(ctx, command, stdin)
}

// TestCancelledMeanwhile: cancelling does not stop a started change, since its
// outcome would be unknown, but it stops reading.
func TestCancelledMeanwhile(t *testing.T) {
	host := windowshost.New()
	for operation, want := range map[string]error{opRead: context.Canceled, opFinish: nil} {
		ctx, cancel := context.WithCancel(t.Context())
		r := &remote{runner: &cancelling{&direct{host: func() *windowshost.Host { return host }}, cancel}, deadline: time.Minute}
		_, err := r.call(ctx, &request{Operation: operation, Location: "LocalMachine", Store: "My", Chain: [][]byte{}, KeyReaders: []string{}})
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", operation, err, want)
		}
	}
}

// TestSecrets: the key, the PKCS #12, its password and the account's password are
// only on standard input.
func TestSecrets(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	steps := 0
	secrets := []string{password}
	look := func() {
		for _, run := range f.windows.Runs() {
			if run.Request.PFX != "" {
				secrets = append(secrets, run.Request.Password, run.Request.PFX[:200])
			}
		}
		for _, run := range f.windows.Runs() {
			shown := strings.Join(run.Command, " ") + run.Script
			for _, secret := range secrets {
				if strings.Contains(shown, secret) {
					t.Fatal("a secret is in a command line or in the script")
				}
			}
			request := run.Request
			if request.Operation != opWrite && request.PFX+request.Password != "" {
				t.Errorf("%s is given the key", request.Operation)
			}
		}
		must(t, filepath.WalkDir(f.StateDir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			for _, secret := range secrets {
				if strings.Contains(string(data), secret) {
					t.Errorf("%s holds a secret", path)
				}
			}
			return err
		}))
		for _, secret := range secrets {
			if strings.Contains(f.Log(), secret) {
				t.Error("the log shows a secret")
			}
		}
	}
	f.Before = func(transaction.Step) error { steps++; look(); return nil }
	first := f.material()
	for line := range strings.Lines(string(first.Key())) {
		if !strings.HasPrefix(line, "-----") {
			secrets = append(secrets, strings.TrimSpace(line))
		}
	}
	secrets = append(secrets, base64.StdEncoding.EncodeToString(pkcs8(t, first))[:40])
	f.mustDeploy(first)
	_, err := f.deploy(f.material(), unverified()...)
	f.Before = nil
	look()
	for _, secret := range secrets {
		if strings.Contains(err.Error(), secret) {
			t.Error("the error shows a secret")
		}
	}
	if steps < 10 || len(secrets) < 6 {
		t.Errorf("looked at %d steps for %d secrets", steps, len(secrets))
	}
	scripts := make(map[string]bool)
	passwords := make(map[string]int)
	for _, run := range f.windows.Runs() {
		scripts[strings.Join(run.Command, " ")+run.Script] = true
		if run.Request.Password != "" {
			passwords[run.Request.Password]++
		}
	}
	if len(scripts) != 1 {
		t.Errorf("%d scripts were run, want always the same", len(scripts))
	}
	for _, times := range passwords {
		if times > 1 {
			t.Error("a password was used twice")
		}
	}
}
