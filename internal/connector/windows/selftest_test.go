package windows

import (
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/windowshost"
)

// selfTest runs the self-test with the fixture's overlay.
func (f *fixture) selfTest(name string) ([]Finding, error) {
	f.t.Helper()
	merged, err := targetconf.Merge(nil, f.typ.Name, f.typ.Aliases, conformance.TargetID, targetconf.Overlays{Dir: f.Overlays})
	must(f.t, err)
	return selfTest(f.t.Context(), merged, connector.Host{Policy: &policy.Policy{Hosts: []policy.HostRule{}}, Log: f.Logger()}, name, f.network.connect)
}

// missing returns the findings that are not OK.
func missing(found []Finding) (what []string) {
	for _, f := range found {
		if !f.OK {
			what = append(what, f.What+": "+f.Says)
		}
	}
	return what
}

func TestSelfTest(t *testing.T) {
	for _, test := range []struct {
		name   string
		breaks func(*windowshost.Console)
		says   [][]string // of each finding that is not OK
	}{
		{"fine", func(*windowshost.Console) {}, nil},
		{"no IIS", func(c *windowshost.Console) { c.Uninstall() }, [][]string{{"IIS", "Install-WindowsFeature"}}},
		{"no administrator", func(c *windowshost.Console) { c.Demote() },
			[][]string{{"administrator", "Administrators"}, {`store LocalMachine\My`, "access denied"}, {"IIS", "access denied"}}},
		{"older", func(c *windowshost.Console) {
			c.AdjustHostState(func(s *windowshost.HostState) {
				s.PowerShell, s.LanguageMode, s.DotNet = "4.0", "ConstrainedLanguage", 378758
			})
		}, [][]string{{"PowerShell", "4.0", "5.1"}, {"language mode", "FullLanguage"}, {".NET", "4.6.2"}}},
	} {
		for _, kind := range []string{"IIS", "WinCertStore"} {
			f := newFixture(t, kind)
			f.windows.Change(test.breaks)
			before := f.windows.State()
			found, err := f.selfTest("win1.example.org")
			if err != nil {
				t.Errorf("%s, %s: %v", test.name, kind, err)
				continue
			}
			got := missing(found)
			if n := len(test.says); kind == "WinCertStore" && n > 0 && test.says[n-1][0] == "IIS" {
				test.says = test.says[:n-1] // it does not need IIS
			}
			if len(got) != len(test.says) || len(found) < 8 {
				t.Errorf("%s, %s: %q is missing", test.name, kind, got)
				continue
			}
			for i, words := range test.says {
				for _, word := range words {
					if !strings.Contains(got[i], word) {
						t.Errorf("%s, %s: got %q, want %q in it", test.name, kind, got[i], word)
					}
				}
			}
			if len(before) != len(f.windows.State()) || f.windows.Writes() > 0 {
				t.Errorf("%s, %s: it changed the host", test.name, kind)
			}
			for _, run := range f.windows.Runs() {
				if run.Request.Operation != opSelfTest {
					t.Errorf("%s, %s: it asked for %s", test.name, kind, run.Request.Operation)
				}
			}
		}
	}
}

// TestSelfTestOld: the self-test says what targets on an older Windows need.
func TestSelfTestOld(t *testing.T) {
	for version, want := range map[string]bool{"6.3.9600.0": true, "10.0.14393.0": true, "10.0.17763.0": false, "10.0.26100.0": false, "": false} {
		if got := strings.Contains((&hostState{Windows: version}).hint(), "legacy_ciphers"); got != want {
			t.Errorf("%q needs legacy_ciphers: %v, want %v", version, got, want)
		}
	}
}

// TestSelfTestLogon: wrong settings are reported before a connection
// is made, and the overlay's password is never sent to another host.
func TestSelfTestLogon(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	_, err := f.selfTest("win2.example.org")
	conformance.WantError(t, err, "the overlay's password is for win1.example.org, so it is not sent to win2.example.org")
	f.overlay(map[string]any{"winrm_username": "u", "winrm_password": password})
	if _, err := f.selfTest("win2.example.org"); err != nil {
		t.Errorf("a host that the caller names: %v", err)
	}
	f.overlay(map[string]any{"winrm_username": "u"})
	_, err = f.selfTest("win2.example.org")
	conformance.WantError(t, err, "winrm_password: is required")
	if n := len(f.network.options); n != 1 {
		t.Errorf("%d connections were prepared, want one", n)
	}
}
