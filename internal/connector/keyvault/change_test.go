package keyvault

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/azure"
	"certctl-agent/internal/transaction"
)

// Settings of others are kept: tags, the format of the secret, whether the key can
// be exported.
func TestRenewal(t *testing.T) {
	s := newSite(t)
	for _, test := range []struct {
		name   string
		theirs func(*azure.Version)
		kind   string
		form   string
		export bool
	}{
		{"PKCS#12", nil, "EC", azure.PFX, true},
		{"PEM", func(v *azure.Version) { v.Policy.Secret.ContentType = azure.PEM }, "EC", azure.PEM, true},
		{"not exportable", func(v *azure.Version) { v.Policy.Key.Exportable = new(false) }, "EC", azure.PFX, false},
		{"HSM", func(v *azure.Version) { v.Policy.Key.Exportable, v.Policy.Key.Type = new(false), "RSA-HSM" }, "EC-HSM", azure.PFX, false},
	} {
		f := s.fixture(t, environment())
		f.theirs(test.theirs)
		before := current(f.vault).Tags
		m := f.material()
		f.mustDeploy(m, "tags", map[string]any{"team": "web"})
		f.holds(m)
		at := current(f.vault)
		if at.Policy.Secret.ContentType != test.form || *at.Policy.Key.Exportable != test.export || at.Policy.Key.Type != test.kind {
			t.Errorf("%s: the policy is %+v", test.name, at.Policy)
		}
		want := maps.Clone(before)
		maps.Copy(want, map[string]string{"team": "web", managedTag: managedBy, certificateTag: "cert-1", targetTag: conformance.TargetID, fingerprintTag: fingerprint(m)})
		if !maps.Equal(at.Tags, want) {
			t.Errorf("%s: tags %v, want %v", test.name, at.Tags, want)
		}
	}
}

// A version with the same certificate is not imported again, no matter who imported it.
func TestSameCertificate(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	m := f.material()
	f.theirs(func(v *azure.Version) { v.Certificate, v.Chain, v.Key = m.Leaf, m.Chain, pkcs8Of(t, m) })
	if result := f.mustDeploy(m); !result.Unchanged {
		t.Error("the same certificate counts as a change")
	}
	s.Forget()
	f.mustDeploy(m, "tags", map[string]any{"team": "web"})
	at := current(f.vault)
	if at.Tags["team"] != "web" || at.Tags["owner"] != "them" || s.made("import www") > 0 || s.made("secret www") > 0 {
		t.Errorf("tags %v after %q", at.Tags, s.Calls())
	}
	f.holds(m)

	f = s.fixture(t, environment())
	f.theirs(func(v *azure.Version) {
		v.Certificate, v.Chain, v.Key, v.Enabled = m.Leaf, m.Chain, pkcs8Of(t, m), false
	})
	if _, err := f.deploy(m, unverified()...); err == nil || conformance.Broken(err) {
		t.Errorf("got %v", err)
	}
	if at := current(f.vault); at.Enabled || !maps.Equal(at.Tags, map[string]string{"owner": "them"}) {
		t.Errorf("a failed verification leaves %+v", at)
	}
	f.mustDeploy(m)
	f.holds(m)
}

// If a deleted certificate blocks the name, the deployment fails before any change.
func TestDeleted(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	m := f.material()
	f.mustDeploy(m)
	f.vault.Delete("www")
	s.Forget()
	words := []string{"can be recovered until 20", "az keyvault certificate recover --vault-name", "az keyvault certificate purge --vault-name", "certificate_name"}
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, words...)
	if s.made("import www") > 0 || conformance.Broken(err) {
		t.Errorf("it was imported: %v", err)
	}
	f.vault.Deny("deleted") // now the import reports it
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "import", "can be recovered,", "az keyvault certificate recover --vault-name")
	if conformance.Broken(err) {
		t.Errorf("nothing was changed, but the target needs attention: %v", err)
	}
	// Deleted between Read and Write.
	f.vault.Deny()
	f = s.fixture(t, environment())
	f.mustDeploy(m)
	f.Before = func(step transaction.Step) error {
		if step.Op == "change" {
			f.vault.Delete("www")
		}
		return nil
	}
	_, err = f.deploy(f.material())
	f.Before = nil
	conformance.WantError(t, err, errChanged.Error())
}

// A pending version blocks the import, one whose creation was cancelled
// does not.
func TestPending(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	f.vault.Create("www")
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "import: 409 Conflict", "status is inProgress", "az keyvault certificate pending delete --vault-name")
	if n := len(f.vault.Versions("www")); conformance.Broken(err) || n != 1 {
		t.Errorf("%v leaves %d versions", err, n)
	}
	f.vault.GiveUp("www")
	m := f.material()
	_, err = f.deploy(m, unverified()...)
	conformance.WantError(t, err, "verification failed")
	if at := current(f.vault); conformance.Broken(err) || at.Enabled || !at.Certificate.Equal(m.Leaf) {
		t.Errorf("%v leaves %+v", err, at)
	}
	f.mustDeploy(m)
	f.holds(m)
}

// A failed deployment is undone, or the error says that it cannot be.
func TestUndo(t *testing.T) {
	s := newSite(t)
	t.Run("exportable", func(t *testing.T) {
		for _, form := range []string{azure.PFX, azure.PEM} {
			f := s.fixture(t, environment())
			f.theirs(func(v *azure.Version) { v.Policy.Secret.ContentType = form })
			before := current(f.vault)
			_, err := f.deploy(f.material(), unverified()...)
			conformance.WantError(t, err, "verification failed")
			after := current(f.vault)
			if conformance.Broken(err) || !after.Certificate.Equal(before.Certificate) || string(after.Key) != string(before.Key) || !maps.Equal(after.Tags, before.Tags) ||
				after.Policy.Secret.ContentType != form || !*after.Policy.Key.Exportable || after.ID == before.ID {
				t.Errorf("%s: %v leaves %+v", form, err, after)
			}
		}
	})
	t.Run("not exportable", func(t *testing.T) {
		f := s.fixture(t, environment())
		f.theirs(func(v *azure.Version) { v.Policy.Key.Exportable = new(false) })
		before, m := current(f.vault), f.material()
		_, err := f.deploy(m, unverified()...)
		conformance.WantError(t, err, "this target needs attention", "certificate www of "+f.vault.Host+": it cannot be undone: the new version "+current(f.vault).ID+" stays the current one",
			"the old version "+before.ID+" cannot be imported again (its key cannot be exported)", "az keyvault certificate import --vault-name")
		if !conformance.Broken(err) || s.made("secret www") > 2 {
			t.Errorf("got %v", err)
		}
		f.holds(m)
		f.mustDeploy(m) // the next deployment keeps it
		f.holds(m)
	})
	t.Run("key may not be read", func(t *testing.T) {
		f := s.fixture(t, environment())
		f.theirs(nil)
		f.vault.Deny("secret")
		m := f.material()
		_, err := f.deploy(m, unverified()...)
		conformance.WantError(t, err, "it cannot be undone", "Microsoft.KeyVault/vaults/secrets/getSecret/action")
		f.holds(m)
		f.mustDeploy(f.material())
	})
	t.Run("first", func(t *testing.T) {
		f := s.fixture(t, environment())
		m := f.material()
		_, err := f.deploy(m, unverified()...)
		conformance.WantError(t, err, "verification failed")
		if at := current(f.vault); conformance.Broken(err) || at == nil || at.Enabled {
			t.Errorf("%v leaves %+v", err, at)
		}
		f.mustDeploy(m) // the same version
		f.holds(m)
	})
	t.Run("first, without update", func(t *testing.T) {
		f := s.fixture(t, environment())
		f.vault.Deny("update")
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, "this target needs attention", "failed (az keyvault certificate set-attributes --vault-name", "--enabled false)", "certificates/update/action")
	})
	t.Run("a first that failed, then another", func(t *testing.T) {
		f := s.fixture(t, environment())
		_, _ = f.deploy(f.material(), unverified()...)
		m := f.material()
		_, err := f.deploy(m, unverified()...)
		if at := current(f.vault); conformance.Broken(err) || at.Enabled || !at.Certificate.Equal(m.Leaf) {
			t.Errorf("%v leaves %+v", err, at)
		}
		f.mustDeploy(m)
		f.holds(m)
	})
	t.Run("import is refused then", func(t *testing.T) {
		f := s.fixture(t, environment())
		f.theirs(nil)
		f.Before = func(step transaction.Step) error {
			if step.Op == "restore" {
				f.vault.Deny("import")
			}
			return nil
		}
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, "this target needs attention", "importing the old version", "certificates/import/action")
	})
}

// Concurrent changes by someone else are left alone.
func TestOthers(t *testing.T) {
	s := newSite(t)
	for op, want := range map[string]string{"change": errChanged.Error(), "restore": errTheirs.Error()} {
		f := s.fixture(t, environment())
		f.mustDeploy(f.material())
		var theirs *azure.Version
		f.Before = func(step transaction.Step) error {
			if step.Op == op && theirs == nil {
				f.theirs(nil)
				theirs = current(f.vault)
			}
			return nil
		}
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, want)
		if conformance.Broken(err) != (op == "restore") {
			t.Errorf("%s: got %v", op, err)
		}
		if at := current(f.vault); theirs == nil || at.ID != theirs.ID || !at.Enabled || !maps.Equal(at.Tags, theirs.Tags) {
			t.Errorf("%s: someone else's version is no longer current: %+v", op, at)
		}
	}
}

// If the agent is killed at any step after the import, it does not import again.
func TestKilledOnce(t *testing.T) {
	s := newSite(t)
	for _, renewal := range []bool{false, true} {
		for n, steps := 0, 1; n < steps; n++ {
			f := s.fixture(t, environment())
			if renewal {
				f.mustDeploy(f.material())
			}
			m := f.material()
			behind := false // after the change
			steps = 0
			f.Before = func(step transaction.Step) error {
				if behind {
					if steps++; steps > n {
						return errKilled
					}
				}
				behind = behind || step.Op == "change"
				return nil
			}
			_, err := f.deploy(m)
			f.Before = nil
			if err != nil {
				f.Restart(t)
				f.mustDeploy(m)
			}
			f.holds(m)
		}
	}
	if n := s.made("update www"); n > 0 {
		t.Errorf("%d updates of what was imported already", n)
	}
}

// If the agent is killed while it undoes an import, the next deployment
// of another certificate restores the first one.
func TestKilledInUndo(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	first := f.material()
	f.mustDeploy(first)
	dead := false
	f.Before = func(step transaction.Step) error {
		if dead = dead || step.Op == "restore"; dead {
			return errKilled
		}
		return nil
	}
	_, _ = f.deploy(f.material(), unverified()...)
	f.Before = nil
	f.Restart(t)
	_, err := f.deploy(f.material(), unverified()...)
	if at := current(f.vault); conformance.Broken(err) || !at.Certificate.Equal(first.Leaf) || at.Tags[fingerprintTag] != fingerprint(first) {
		t.Errorf("%v leaves %+v", err, at.Tags)
	}
	m := f.material()
	f.mustDeploy(m)
	f.holds(m)
}

// If the agent is killed after an undo, the next deployment that also fails
// does not undo it again.
func TestKilledBehindUndo(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	f.theirs(nil)
	before := current(f.vault)
	undone := false
	f.Before = func(step transaction.Step) error {
		if undone {
			return errKilled
		}
		undone = step.Op == "restore"
		return nil
	}
	_, _ = f.deploy(f.material(), unverified()...)
	f.Before = nil
	f.Restart(t)
	f.Before = func(step transaction.Step) error {
		if step.Op == "change" {
			return errKilled
		}
		return nil
	}
	_, err := f.deploy(f.material())
	if at := current(f.vault); !undone || conformance.Broken(err) || !at.Certificate.Equal(before.Certificate) || len(f.vault.Versions("www")) != 3 {
		t.Errorf("%v leaves %d versions", err, len(f.vault.Versions("www")))
	}
}

// Errors name missing permissions.
func TestRights(t *testing.T) {
	s := newSite(t)
	for operation, words := range map[string][]string{
		"get":    {"get: 403", "DeniedWithNoValidRBAC", "the identity of client_secret needs a role with Microsoft.KeyVault/vaults/certificates/read on this vault"},
		"import": {"import: 403", "Microsoft.KeyVault/vaults/certificates/import/action"},
	} {
		f := s.fixture(t, environment())
		f.theirs(nil)
		f.vault.Deny(operation)
		before := current(f.vault)
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, words...)
		if at := current(f.vault); conformance.Broken(err) || at.ID != before.ID {
			t.Errorf("%s: %v leaves another version", operation, err)
		}
	}
	f := s.fixture(t, environment())
	s.Next("get", azure.Fault{Status: 403, Body: `{"error":{"code":"Forbidden","message":"Client address is not authorized","innererror":{"code":"ForbiddenByFirewall"}}}`})
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "Client address is not authorized", "the vault's firewall blocks this host")
	s.Next("import", azure.Fault{Status: 400, Body: `{"error":{"code":"BadParameter","message":"Unsupported key operation(s): \"wrapKey\", \"unwrapKey\". Supported values are \"sign\", \"verify\"."}}`})
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "import: 400 Bad Request", "issue the certificate with only the key usage digitalSignature")
}

// Invalid tags are refused before any change.
func TestTags(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	f.theirs(func(v *azure.Version) {
		for _, r := range "abcdefghijk" {
			v.Tags[string(r)] = ""
		}
	})
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "there would be 16, but Key Vault allows 15")
	if slices.Contains(s.Calls(), "import www") {
		t.Error("it was imported")
	}
	// If nothing changes, they are not checked.
	m := f.material()
	f.theirs(func(v *azure.Version) { v.Certificate, v.Key, v.Tags = m.Leaf, pkcs8Of(t, m), current(f.vault).Tags })
	if result := f.mustDeploy(m); !result.Unchanged {
		t.Error("the same certificate counts as a change")
	}
}

// The answer must be about the requested certificate, and the imported version
// must be the current one.
func TestAnswers(t *testing.T) {
	s := newSite(t)
	for body, want := range map[string]string{
		"<html>please log in</html>":        "not a certificate from a vault",
		"{}":                                "not a certificate from a vault",
		`{"id":"https://x/y","cer":"AAAA"}`: "about another certificate",
	} {
		f := s.fixture(t, environment())
		s.Next("get", azure.Fault{Status: 200, Body: body})
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, want)
	}
	f := s.fixture(t, environment())
	s.Next("get", azure.Fault{Status: 403, Body: "<html>\x1b[31mno" + strings.Repeat("x", 100_000)})
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "not from the vault but perhaps from a proxy")
	if err != nil && (len(err.Error()) > 2000 || strings.Contains(err.Error(), "\x1b")) {
		t.Errorf("got %d bytes: %.300q", len(err.Error()), err)
	}
}
