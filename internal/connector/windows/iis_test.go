package windows

import (
	"maps"
	"slices"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/windowshost"
)

const (
	site    = "Default Web Site"
	binding = "*:443:www.example.org"
)

// others are bindings that do not belong to the target.
func (f *fixture) others() (before map[string]string) {
	f.t.Helper()
	their := f.certificate()
	f.windows.Change(func(c *windowshost.Console) {
		name := c.Put(`LocalMachine\My`, their)
		c.Site(site,
			&windowshost.Binding{Protocol: "https", Information: "*:443:shop.example.org", Thumbprint: name, Store: "My", Flags: 1},
			&windowshost.Binding{Protocol: "https", Information: "*:8443:www.example.org", Thumbprint: name, Store: "My", Flags: 1},
			&windowshost.Binding{Protocol: "https", Information: "192.0.2.1:443:", Thumbprint: name, Store: "My"},
			&windowshost.Binding{Protocol: "http", Information: binding})
		c.Site("Other", &windowshost.Binding{Protocol: "https", Information: "*:443:", Thumbprint: name, Store: "My"})
	})
	return f.windows.State()
}

// TestOtherBindings: only the binding of the address, port and host changes, in
// successful and in failed deployments.
func TestOtherBindings(t *testing.T) {
	f := newFixture(t, "IIS")
	before := f.others()
	m := f.material()
	if _, err := f.deploy(m, unverified()...); err == nil || conformance.Broken(err) {
		t.Fatalf("got %v, want a deployment that is undone", err)
	}
	if after := f.windows.State(); !maps.Equal(before, after) {
		t.Errorf("after the undo: from %v to %v", before, after)
	}
	f.mustDeploy(m)
	after := f.windows.State()
	for name, value := range before {
		if after[name] != value {
			t.Errorf("%s was %s, is %s", name, value, after[name])
		}
	}
	if got := f.bound(site, binding); got != thumbprint(m.Leaf) {
		t.Errorf("the binding has %s", got)
	}
}

// TestUndo: the old certificate is restored, no matter who installed it.
func TestUndo(t *testing.T) {
	for _, test := range []struct {
		name    string
		binding *windowshost.Binding
	}{
		{"theirs", &windowshost.Binding{Protocol: "https", Information: binding, Store: "WebHosting", Flags: 1}},
		{"other flags", &windowshost.Binding{Protocol: "https", Information: binding, Store: "WebHosting", Flags: 1 | 4 | 32}},
	} {
		f := newFixture(t, "IIS")
		their := f.certificate()
		f.windows.Change(func(c *windowshost.Console) {
			test.binding.Thumbprint = c.Put(`LocalMachine\WebHosting`, their)
			c.Site(site, test.binding)
		})
		before := f.windows.State()
		if _, err := f.deploy(f.material(), unverified()...); err == nil || conformance.Broken(err) {
			t.Errorf("%s: got %v, want a deployment that is undone", test.name, err)
		}
		if after := f.windows.State(); !maps.Equal(before, after) {
			t.Errorf("%s: from %v to %v", test.name, before, after)
		}
		flags := test.binding.Flags
		f.mustDeploy(f.material())
		if test.binding.Flags != flags || test.binding.Store != "My" {
			t.Errorf("%s: the binding has flags %d and store %s", test.name, test.binding.Flags, test.binding.Store)
		}
		if !f.holds(`LocalMachine\WebHosting`, thumbprint(their.Certificate)) {
			t.Errorf("%s: someone else's certificate is gone", test.name)
		}
	}
}

// A binding without a certificate has none after an undo.
func TestUndoBare(t *testing.T) {
	f := newFixture(t, "IIS")
	f.windows.Change(func(c *windowshost.Console) {
		c.Site(site, &windowshost.Binding{Protocol: "https", Information: binding, Flags: 1})
	})
	before := f.windows.State()
	if _, err := f.deploy(f.material(), unverified()...); err == nil || conformance.Broken(err) {
		t.Fatalf("got %v, want a deployment that is undone", err)
	}
	if after := f.windows.State(); !maps.Equal(before, after) {
		t.Errorf("from %v to %v", before, after)
	}
}

// TestHalfway: an existing or new binding that a failed change left without a certificate
// is restored.
func TestHalfway(t *testing.T) {
	for _, kind := range []string{"new", "bare", "theirs"} {
		f := newFixture(t, "IIS")
		their := f.certificate()
		f.windows.Change(func(c *windowshost.Console) {
			switch kind {
			case "bare":
				c.Site(site, &windowshost.Binding{Protocol: "https", Information: binding, Flags: 1})
			case "theirs":
				c.Site(site, &windowshost.Binding{Protocol: "https", Information: binding, Flags: 1, Thumbprint: c.Put(`LocalMachine\WebHosting`, their), Store: "WebHosting"})
			}
			c.Lose()
		})
		err := f.refuses(f.material(), []string{"http.sys cannot use the certificate's key", "0x80070520"})
		if conformance.Broken(err) {
			t.Errorf("%s: got %v, want a deployment that is undone", kind, err)
		}
	}
}

// TestFormerIsGone: if an undo is impossible, the error says so and what to check.
func TestFormerIsGone(t *testing.T) {
	f := newFixture(t, "IIS")
	first := f.material()
	f.mustDeploy(first)
	f.windows.Change(func(c *windowshost.Console) {
		c.Fault(func(operation string, done bool) error {
			if operation == opWrite && done {
				c.Fault(nil)
				delete(c.Certificates(`LocalMachine\My`), thumbprint(first.Leaf))
			}
			return nil
		})
	})
	_, err := f.deploy(f.material(), unverified()...)
	conformance.WantError(t, err, thumbprint(first.Leaf), "is not in its store any more")
	if !conformance.Broken(err) {
		t.Errorf("got %v, want a BrokenError", err)
	}
}

// TestSharing: without SNI http.sys has one certificate per address and port.
func TestSharing(t *testing.T) {
	f := newFixture(t, "IIS")
	f.others()
	m := f.material()
	f.refuses(m, []string{"one certificate per address and port", `"*:443:www.example.org"`, "Other *:443:"}, "sni", false)

	f.windows.Change(func(c *windowshost.Console) {
		c.Site(site, &windowshost.Binding{Protocol: "https", Information: binding})
	})
	f.refuses(m, []string{"has no SNI, but the target has sni"})
	f.refuses(m, []string{"Other *:443:"}, "sni", false)
	f.wroteNothing()
}

// TestSharedName: with SNI http.sys has one certificate per host name and port,
// whatever the address. Bindings of the same site change, and are restored, together. A new
// binding, or another site's, would affect bindings that are not the target's.
func TestSharedName(t *testing.T) {
	const second = "[2001:db8::1]:443:www.example.org"
	f := newFixture(t, "IIS")
	their := f.certificate()
	f.windows.Change(func(c *windowshost.Console) {
		name := c.Put(`LocalMachine\My`, their)
		c.Site(site, &windowshost.Binding{Protocol: "https", Information: second, Thumbprint: name, Store: "My", Flags: 1})
	})
	f.refuses(f.material(), []string{"with SNI, per host name and port", site + " " + second})
	f.wroteNothing()
	f.windows.Change(func(c *windowshost.Console) {
		c.Site(site, &windowshost.Binding{Protocol: "https", Information: binding, Thumbprint: thumbprint(their.Certificate), Store: "My", Flags: 1})
	})
	if err := f.refuses(f.material(), nil, unverified()...); err == nil || conformance.Broken(err) {
		t.Errorf("got %v, want a deployment that is undone", err)
	}
	m := f.material()
	f.mustDeploy(m)
	for _, information := range []string{binding, second} {
		if got := f.bound(site, information); got != thumbprint(m.Leaf) {
			t.Errorf("%s has %s", information, got)
		}
	}
	f.windows.Change(func(c *windowshost.Console) {
		c.Site("Other", &windowshost.Binding{Protocol: "https", Information: "192.0.2.1:443:www.example.org", Thumbprint: thumbprint(m.Leaf), Store: "My", Flags: 1})
	})
	f.refuses(f.material(), []string{"Other 192.0.2.1:443:www.example.org"})
}

// wroteNothing fails the test if a change was started.
func (f *fixture) wroteNothing() {
	f.t.Helper()
	for _, run := range f.windows.Runs() {
		if run.Request.Operation != opRead {
			f.t.Errorf("the host was asked for %s", run.Request.Operation)
		}
	}
}

func TestCentralStore(t *testing.T) {
	f := newFixture(t, "IIS")
	f.windows.Change(func(c *windowshost.Console) {
		c.Site(site, &windowshost.Binding{Protocol: "https", Information: binding, Flags: 3})
	})
	f.refuses(f.material(), []string{"Central Certificate Store"})
	f.wroteNothing()
}

// TestMissing: errors name what is missing, in whatever language Windows runs,
// and nothing is created.
func TestMissing(t *testing.T) {
	f := newFixture(t, "IIS")
	f.refuses(f.material(), []string{`the site "It's \"mine\"" does not exist on the host`, site}, "site_name", `It's "mine"`)
	f.refuses(f.material(), []string{`the certificate store LocalMachine\Mine does not exist`}, "cert_store", "Mine")
	f.windows.Change(func(c *windowshost.Console) { c.German(); c.Demote() })
	f.refuses(f.material(), []string{"Administrators", "Zugriff verweigert – Schlüssel", "0x80070005"})
	f.windows.Change(func(c *windowshost.Console) { c.Uninstall() })
	f.refuses(f.material(), []string{"IIS is not installed on the host", "Install-WindowsFeature Web-Server"})
	f.wroteNothing()
}

// TestOlder: our older certificates are removed when they are unused. Those
// of others and of other targets never are.
func TestOlder(t *testing.T) {
	f := newFixture(t, "IIS")
	f.others()
	var all []*connector.Material
	next := func(more ...any) *connector.Material {
		m := f.material()
		all = append(all, m)
		f.mustDeploy(m, more...)
		return m
	}
	first, second := next(), next()
	if f.holds(`LocalMachine\My`, thumbprint(first.Leaf)) {
		t.Error("the older certificate is still there")
	}
	f.windows.Change(func(c *windowshost.Console) {
		c.Site("Other", &windowshost.Binding{Protocol: "https", Information: "*:9443:", Thumbprint: thumbprint(second.Leaf), Store: "My"})
	})
	third := next()
	f.windows.Change(func(c *windowshost.Console) { c.Listen(thumbprint(third.Leaf)) })
	fourth := next()
	fifth, sixth := next("backup_retention", 1), next("backup_retention", 1)
	want := map[*connector.Material]bool{first: false, second: true, third: true, fourth: false, fifth: true, sixth: true}
	for i, m := range all {
		if got := f.holds(`LocalMachine\My`, thumbprint(m.Leaf)); got != want[m] {
			t.Errorf("certificate %d is there: %v, want %v", i+1, got, want[m])
		}
		for _, c := range m.Chain {
			if got := f.holds(`LocalMachine\CA`, thumbprint(c)); got != want[m] {
				t.Errorf("the intermediate of certificate %d is there: %v, want %v", i+1, got, want[m])
			}
		}
	}
}

// TestTheirs: existing certificates and intermediates of others are used, and
// stay theirs.
func TestTheirs(t *testing.T) {
	f := newFixture(t, "IIS")
	m := f.material()
	f.windows.Change(func(c *windowshost.Console) {
		c.Put(`LocalMachine\My`, &windowshost.Certificate{Certificate: m.Leaf, Key: pkcs8(t, m), FriendlyName: "theirs"})
		c.Put(`LocalMachine\CA`, &windowshost.Certificate{Certificate: m.Chain[0]})
	})
	before := f.windows.State()
	if _, err := f.deploy(m, unverified()...); err == nil || conformance.Broken(err) {
		t.Fatalf("got %v, want a deployment that is undone", err)
	}
	if after := f.windows.State(); !maps.Equal(before, after) {
		t.Errorf("from %v to %v", before, after)
	}
	f.mustDeploy(m)
	f.mustDeploy(f.material())
	after := f.windows.State()
	for name, value := range before {
		if after[name] != value {
			t.Errorf("%s was %s, is %s", name, value, after[name])
		}
	}
}

// TestChangedMeanwhile: a certificate that someone else sets in the binding between Read
// and Write, or before an undo, stays there.
func TestChangedMeanwhile(t *testing.T) {
	for _, when := range []string{opWrite, opRestore} {
		f := newFixture(t, "IIS")
		f.mustDeploy(f.material())
		their := f.certificate()
		name := ""
		f.windows.Change(func(c *windowshost.Console) {
			c.Fault(func(operation string, done bool) error {
				if operation == when && !done {
					c.Fault(nil)
					name = c.Put(`LocalMachine\My`, their)
					i := slices.IndexFunc(c.Bindings(site), func(b *windowshost.Binding) bool { return b.Information == binding })
					c.Bindings(site)[i].Thumbprint = name
				}
				return nil
			})
		})
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, "someone else has changed the binding since", name)
		if got := f.bound(site, binding); got != name {
			t.Errorf("%s: the binding has %s, want %s", when, got, name)
		}
	}
}

// TestRoots: a root in the chain is not installed where the host would
// trust it.
func TestRoots(t *testing.T) {
	f := newFixture(t, "IIS")
	m := f.material()
	m.Chain = append(m.Chain, f.ca.Root)
	f.mustDeploy(m)
	for _, store := range []string{"CA", "Root", "My"} {
		if f.holds(`LocalMachine\`+store, thumbprint(f.ca.Root)) {
			t.Errorf("the root is in %s", store)
		}
	}
}

// TestNotExportable: the key cannot be exported from the host unless the
// configuration says so.
func TestNotExportable(t *testing.T) {
	f := newFixture(t, "IIS")
	for _, exportable := range []bool{false, true} {
		m := f.material()
		f.mustDeploy(m, "exportable", exportable)
		f.windows.Change(func(c *windowshost.Console) {
			if got := c.Certificates(`LocalMachine\My`)[thumbprint(m.Leaf)]; got.Exportable != exportable {
				t.Errorf("exportable is %v, want %v", got.Exportable, exportable)
			}
		})
	}
}

// TestOldWindows: Server 2016 reads only the older PKCS #12.
func TestOldWindows(t *testing.T) {
	f := newFixture(t, "IIS")
	f.windows.Change(func(c *windowshost.Console) { c.Old() })
	m := f.material()
	f.refuses(m, []string{"legacy_ciphers", "0x80070056"})
	f.mustDeploy(m, "legacy_ciphers", true)
}
