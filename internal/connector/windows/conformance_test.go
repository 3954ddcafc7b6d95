package windows

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/windowshost"
)

// names are the host names for the directories of the suite.
type names struct {
	mu    sync.Mutex
	byDir map[string]string
}

func (n *names) of(dir string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byDir == nil {
		n.byDir = make(map[string]string)
	}
	if n.byDir[dir] == "" {
		n.byDir[dir] = fmt.Sprintf("win%d.example.org", len(n.byDir))
	}
	return n.byDir[dir]
}

// stateOf returns the state of a host. Entries that Finish removes start with
// spare: our certificates except the newest, and issuers of no others.
func stateOf(host *windowshost.Host, store string) map[string]string {
	state := host.State()
	state["the host"+conformance.Written] = fmt.Sprint(host.Writes())
	host.Change(func(c *windowshost.Console) {
		older := make(map[string]bool)
		for i, name := range c.Marked(store, conformance.TargetID) {
			older[name] = i > 0
		}
		issuers := make(map[string]bool) // of the certificates that stay
		for name, certificate := range c.Certificates(store) {
			if !older[name] {
				issuers[certificate.Issuer.String()] = true
			}
		}
		rename := func(store, name string) {
			if value, ok := state[store+`\`+name]; ok {
				delete(state, store+`\`+name)
				state["spare "+name] = value
			}
		}
		for name := range older {
			if older[name] {
				rename(store, name)
			}
		}
		for name, certificate := range c.Certificates(`LocalMachine\CA`) {
			if !issuers[certificate.Subject.String()] {
				rename(`LocalMachine\CA`, name)
			}
		}
	})
	return state
}

func isSpare(name string) bool { return strings.HasPrefix(name, "spare ") }

func TestConformanceIIS(t *testing.T) {
	hosts, called := newNetwork(), new(names)
	conformance.Run(t, conformance.Harness{
		Type:     iis(hosts.connect),
		Required: []string{"site_name", "cert_store", "winrm"},
		Secrets:  []string{password},
		Config: func(dir string) map[string]any {
			return map[string]any{
				"site_name": "Default Web Site", "cert_store": "WebHosting", "hostname": "www.example.org", "sni": true, "mode": "winrm",
				"winrm": map[string]any{"winrm_host": called.of(dir), "winrm_username": `WIN\certctl`, "winrm_password": password},
			}
		},
		State: func(dir string) map[string]string {
			return stateOf(hosts.host(called.of(dir)), `LocalMachine\WebHosting`)
		},
		Want: func(m *connector.Material) map[string][]byte {
			want := installed(t, m, `LocalMachine\WebHosting`, "certctl-agent "+conformance.TargetID)
			want["Default Web Site/https/*:443:www.example.org"] = []byte(thumbprint(m.Leaf) + "|WebHosting|1")
			return want
		},
		UndoOnly: isSpare,
	})
}

func TestConformanceWinCertStore(t *testing.T) {
	hosts, called := newNetwork(), new(names)
	conformance.Run(t, conformance.Harness{
		Type:     certStore(hosts.connect),
		Required: []string{"winrm_host", "winrm_username", "winrm_password"},
		Secrets:  []string{password},
		Config: func(dir string) map[string]any {
			hosts.host(called.of(dir)).Change(func(c *windowshost.Console) {
				c.Account("IIS APPPOOL\\www")
				c.Clock(func() time.Time { return time.Now().AddDate(50, 0, 0) }) // all certificates have expired
			})
			return map[string]any{
				"friendly_name": "www", "remove_expired": true, "key_readers": []string{"IIS APPPOOL\\www"}, "mode": "winrm",
				"winrm_host": called.of(dir), "winrm_username": `WIN\certctl`, "winrm_password": password,
			}
		},
		State: func(dir string) map[string]string {
			return stateOf(hosts.host(called.of(dir)), `LocalMachine\My`)
		},
		Want: func(m *connector.Material) map[string][]byte {
			return installed(t, m, `LocalMachine\My`, "www", "IIS APPPOOL\\www")
		},
		UndoOnly: isSpare,
	})
}
