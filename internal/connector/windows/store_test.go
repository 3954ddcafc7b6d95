package windows

import (
	"maps"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/windowshost"
)

// TestStore: name, location, friendly name and readers, and the undo for
// an existing certificate of someone else.
func TestStore(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	f.windows.Change(func(c *windowshost.Console) { c.Account(`CORP\sql$`, "S-1-5-20") })
	m := f.material()
	more := []any{"store_name", "WebHosting", "friendly_name", "größe \"www\"", "key_readers", `CORP\sql$,S-1-5-20`}
	f.windows.Change(func(c *windowshost.Console) {
		c.Put(`LocalMachine\WebHosting`, &windowshost.Certificate{Certificate: m.Leaf, Key: pkcs8(t, m), FriendlyName: "theirs", Readers: []string{"S-1-5-20"}})
		c.Put(`LocalMachine\CA`, &windowshost.Certificate{Certificate: m.Chain[0]})
	})
	before := f.windows.State()
	if _, err := f.deploy(m, append(unverified(), more...)...); err == nil || conformance.Broken(err) {
		t.Fatalf("got %v, want a deployment that is undone", err)
	}
	if after := f.windows.State(); !maps.Equal(before, after) {
		t.Errorf("from %v to %v", before, after)
	}
	f.mustDeploy(m, more...)
	f.windows.Change(func(c *windowshost.Console) {
		got := c.Certificates(`LocalMachine\WebHosting`)[thumbprint(m.Leaf)]
		if got.FriendlyName != "größe \"www\"" || len(got.Readers) != 2 {
			t.Errorf("got %q, read by %q", got.FriendlyName, got.Readers)
		}
	})
	if result := f.mustDeploy(m, more...); !result.Unchanged {
		t.Error("the second deployment changes something")
	}
	f.refuses(f.material(), []string{"key_readers", `CORP\nobody`}, "key_readers", `CORP\nobody`)
	f.refuses(f.material(), []string{"key_readers", "Everyone", "such groups cannot get access to a key"}, "key_readers", "S-1-5-20,Everyone")
}

func TestCurrentUser(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	f.windows.Change(func(c *windowshost.Console) { c.Demote() })
	f.refuses(f.material(), []string{"Administrators"})
	m := f.material()
	f.mustDeploy(m, "store_location", "CurrentUser")
	if !f.holds(`CurrentUser\My`, thumbprint(m.Leaf)) || !f.holds(`CurrentUser\CA`, thumbprint(m.Chain[0])) {
		t.Error("the certificate or its intermediate is not there")
	}
}

// TestRemoveExpired: only our expired certificates of the same subject are removed, and only
// if the configuration says so.
func TestRemoveExpired(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	first, their := f.material(), f.certificate()
	f.mustDeploy(first)
	f.windows.Change(func(c *windowshost.Console) { c.Put(`LocalMachine\My`, their) })
	second := f.material()
	f.mustDeploy(second, "remove_expired", true)
	if !f.holds(`LocalMachine\My`, thumbprint(first.Leaf)) {
		t.Error("one that has not expired is gone")
	}
	f.windows.Change(func(c *windowshost.Console) {
		c.Clock(func() time.Time { return time.Now().AddDate(50, 0, 0) })
	})
	third := f.material()
	f.mustDeploy(third)
	if !f.holds(`LocalMachine\My`, thumbprint(first.Leaf)) {
		t.Error("an expired certificate was removed although remove_expired is not set")
	}
	f.mustDeploy(third, "remove_expired", true)
	for name, want := range map[string]bool{thumbprint(first.Leaf): false, thumbprint(second.Leaf): false, thumbprint(third.Leaf): true, thumbprint(their.Certificate): true} {
		if got := f.holds(`LocalMachine\My`, name); got != want {
			t.Errorf("%s is there: %v, want %v", name, got, want)
		}
	}
}

// TestServed: a certificate in use stays, even if it is ours and expired.
func TestServed(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	first := f.material()
	f.mustDeploy(first)
	f.windows.Change(func(c *windowshost.Console) {
		c.Clock(func() time.Time { return time.Now().AddDate(50, 0, 0) })
		c.Listen(thumbprint(first.Leaf))
	})
	f.mustDeploy(f.material(), "remove_expired", true)
	if !f.holds(`LocalMachine\My`, thumbprint(first.Leaf)) {
		t.Error("a certificate that something serves is gone")
	}
}
