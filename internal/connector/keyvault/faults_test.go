package keyvault

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/azure"
	"certctl-agent/internal/transaction"
)

// Whichever call fails in whatever way, the vault has the new pair once or the
// old one, and the next deployment succeeds.
func TestFaults(t *testing.T) {
	var (
		throttled = azure.Fault{Status: 429, Code: "Throttled"}
		failed    = azure.Fault{Status: 500, Code: "InternalServerError"}
		recovers  = azure.Fault{Status: 409, Body: `{"error":{"code":"Conflict","message":"x","innererror":{"code":"ObjectIsBeingRecovered"}}}`}
		conflict  = azure.Fault{Status: 409, Code: "Conflict"}
		drop      = azure.Fault{Drop: true}
		lose      = azure.Fault{Lose: true}
		hang      = azure.Fault{Hang: true}
	)
	// The second get is before the import, the third reads it back.
	second := func(f azure.Fault) []azure.Fault { return []azure.Fault{{}, f} }
	third := func(f azure.Fault) []azure.Fault { return []azure.Fault{{}, {}, f} }
	one := func(f azure.Fault) []azure.Fault { return []azure.Fault{f} }
	for _, test := range []struct {
		name   string
		call   string
		faults []azure.Fault
		says   string // "": success
	}{
		{"asking is throttled", "challenge", one(throttled), ""},
		{"asking is lost", "challenge", one(drop), ""},
		{"asking fails", "challenge", one(failed), "500 Internal Server Error"},
		{"the authority is throttled", "token", one(throttled), ""},
		{"the authority is lost", "token", one(lose), ""},
		{"the authority fails", "token", one(failed), "login.microsoftonline.com: 500"},
		{"the authority hangs", "token", one(hang), "login.microsoftonline.com: no answer within"},
		{"the look is lost", "get", one(lose), ""},
		{"the look fails", "get", one(failed), "get: 500"},
		{"the key is lost", "secret", one(drop), ""},
		{"the key fails", "secret", one(failed), "get the secret: 500"},
		{"the key is asked for wrongly", "secret", one(azure.Fault{Status: 400}), "get the secret: 400"},
		{"the second look fails", "get", second(failed), "get: 500"},
		{"the second look is lost", "get", second(drop), ""},
		{"the import is throttled", "import", one(throttled), ""},
		{"the vault recovers it", "import", one(recovers), ""},
		{"the import conflicts", "import", one(conflict), "import: 409 Conflict"},
		{"the import fails", "import", one(failed), "import: 500"},
		{"the import is dropped", "import", one(drop), "it may have been carried out"},
		{"the import hangs", "import", one(hang), "no answer within"},
		{"the import's answer is lost", "import", one(lose), ""},
		{"a gateway gives up on the import", "import", one(azure.Fault{Late: true}), ""},
		{"reading back is lost", "get", third(drop), ""},
		{"reading back fails", "get", third(failed), "read it back: get: 500"},
		{"reading back hangs", "get", third(hang), "read it back: get: no answer within"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel() // some wait for a timeout
			s := newSite(t)
			f := s.fixture(t, environment())
			f.theirs(nil)
			before, m := current(f.vault), f.material()
			s.Next(test.call, test.faults...)
			var more []any
			if test.faults[len(test.faults)-1].Hang {
				more = []any{"command_timeout", "3s"} // enough for all other calls on any machine
			}
			_, err := f.deploy(m, more...)
			if test.says == "" {
				if err != nil {
					t.Fatalf("got %v", err)
				}
				f.holds(m)
				return
			}
			conformance.WantError(t, err, test.says)
			if at := current(f.vault); conformance.Broken(err) || !at.Certificate.Equal(before.Certificate) || string(at.Key) != string(before.Key) {
				t.Errorf("%v leaves another version", err)
			}
			imported := f.count(m)
			f.mustDeploy(m)
			if at := current(f.vault); !at.Certificate.Equal(m.Leaf) || f.count(m) != imported+1 {
				t.Errorf("the next deployment made %d versions", f.count(m)-imported)
			}
		})
	}
}

// An update is repeated if its answer is lost.
func TestUpdateIsLost(t *testing.T) {
	s := newSite(t)
	for _, fault := range []azure.Fault{{Drop: true}, {Lose: true}} {
		f := s.fixture(t, environment())
		m := f.material()
		s.Next("update", fault)
		if _, err := f.deploy(m, unverified()...); conformance.Broken(err) || current(f.vault).Enabled {
			t.Errorf("a first version that fails: %v", err)
		}
		s.Next("update", fault)
		f.mustDeploy(m)
		f.holds(m)
	}
}

// If an undo fails temporarily, the next deployment repairs the vault.
func TestUndoFails(t *testing.T) {
	s := newSite(t)
	for name, fault := range map[string]azure.Fault{"fails": {Status: 500}, "is lost": {Drop: true}} {
		f := s.fixture(t, environment())
		f.theirs(nil)
		before := current(f.vault)
		f.Before = func(step transaction.Step) error {
			if step.Op == "restore" {
				s.Next("import", fault)
			}
			return nil
		}
		_, err := f.deploy(f.material(), unverified()...)
		f.Before = nil
		conformance.WantError(t, err, "this target needs attention", "importing the old version")
		if _, err = f.deploy(f.material(), unverified()...); conformance.Broken(err) {
			t.Errorf("%s: the next deployment: %v", name, err)
		}
		if at := current(f.vault); !at.Certificate.Equal(before.Certificate) {
			t.Errorf("%s: the next deployment leaves another version", name)
		}
	}
	// The answer to an undo that was carried out is lost.
	f := s.fixture(t, environment())
	f.theirs(nil)
	before := current(f.vault)
	f.Before = func(step transaction.Step) error {
		if step.Op == "restore" {
			s.Next("import", azure.Fault{Lose: true})
		}
		return nil
	}
	_, err := f.deploy(f.material(), unverified()...)
	if at := current(f.vault); conformance.Broken(err) || !at.Certificate.Equal(before.Certificate) || len(f.vault.Versions("www")) != 3 {
		t.Errorf("%v leaves %d versions", err, len(f.vault.Versions("www")))
	}
}

// Secrets are only where they must be: the old key is in the backups as
// long as they are kept.
func TestSecrets(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	f.theirs(func(v *azure.Version) { v.Policy.Secret.ContentType = azure.PEM })
	var said strings.Builder
	var secrets []string
	note := func(err error) {
		if err != nil {
			said.WriteString(err.Error() + "\n")
		}
	}
	deploy := func(m *connector.Material, more ...any) {
		_, err := f.deploy(m, more...)
		note(err)
		for line := range strings.Lines(string(m.KeyPEM)) {
			if !strings.HasPrefix(line, "-----") {
				secrets = append(secrets, strings.TrimSpace(line))
			}
		}
	}
	// Journals exist only during a deployment.
	f.Before = func(transaction.Step) error {
		for _, name := range files(t, filepath.Join(f.StateDir, "journal")) {
			data, err := os.ReadFile(name)
			must(t, err)
			said.Write(data)
		}
		return nil
	}
	deploy(f.material())
	deploy(f.material(), unverified()...)
	s.Next("import", azure.Fault{Status: 400, Echo: true})
	deploy(f.material())
	f.theirs(nil)
	deploy(f.material(), unverified()...)
	// The vault, and then the authority, repeats the request.
	echo := f.material()
	s.Next("import", azure.Fault{Status: 400, Echo: true})
	deploy(echo)
	s.ExpireTokens()
	s.Next("token", azure.Fault{Status: 400, Echo: true})
	deploy(f.material())
	s.Next("get", azure.Fault{Status: 400, Echo: true})
	deploy(f.material())
	if !strings.Contains(said.String(), "[redacted]") {
		t.Error("nothing was repeated: the test shows nothing")
	}
	said.WriteString(f.Log())
	secrets = append(secrets, clientSecret)
	secrets = append(secrets, s.Tokens()...)
	for _, value := range s.Imported() {
		for line := range strings.Lines(value) { // of PEM; PKCS#12 is one
			if !strings.HasPrefix(line, "-----") {
				secrets = append(secrets, strings.TrimSpace(line[:min(len(line), 64)]))
			}
		}
	}
	for _, secret := range secrets {
		if len(secret) > 15 && strings.Contains(said.String(), secret) {
			t.Errorf("a secret of %d bytes shows in the log, in the journal or in an error:\n%s", len(secret), said.String())
		}
	}
	// The state directory has the vault's old key, readable only by the agent.
	kept := false
	for _, name := range files(t, f.StateDir) {
		data, err := os.ReadFile(name)
		must(t, err)
		inBackups := strings.Contains(name, "/backups/")
		if strings.Contains(string(data), `"secret":"`) {
			kept = true
			if info, err := os.Lstat(name); err != nil || info.Mode() != 0o600 || !inBackups {
				t.Errorf("%s holds a key: %v, %v", name, info.Mode(), err)
			}
		}
		for _, secret := range append([]string{clientSecret}, s.Tokens()...) {
			if strings.Contains(string(data), secret) {
				t.Errorf("%s holds a credential", name)
			}
		}
	}
	if !kept {
		t.Error("the old key was not saved for an undo")
	}
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, path)
		}
		return err
	}))
	return names
}

// An import whose answer is lost because the job is cancelled is undone.
func TestCancelledImport(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	f.theirs(nil)
	before, m := current(f.vault), f.material()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.Next("import", azure.Fault{Lose: true, Then: cancel})
	_, err := f.Deploy(ctx, f.typ, f.config, m)
	if !errors.Is(err, context.Canceled) || conformance.Broken(err) {
		t.Errorf("got %v", err)
	}
	if at := current(f.vault); f.count(m) != 1 || !at.Certificate.Equal(before.Certificate) || string(at.Key) != string(before.Key) {
		t.Errorf("%v leaves another version, after %d of the new one", err, f.count(m))
	}
}
