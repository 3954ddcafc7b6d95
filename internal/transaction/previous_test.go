package transaction

import (
	"encoding/json"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/previous"
)

// What the deployment on the hosts in testdata/previous installs.
const (
	previousOldKey   = "-----BEGIN PRIVATE KEY-----\nb2xkIGtleSwgbG9uZ2VyIHRoYW4gdGhlIG5ldw==\n-----END PRIVATE KEY-----\n"
	previousNewKey   = "-----BEGIN PRIVATE KEY-----\nbmV3IGtleQ==\n-----END PRIVATE KEY-----\n"
	previousNewCert  = "-----BEGIN CERTIFICATE-----\nbmV3IGNlcnRpZmljYXRl\n-----END CERTIFICATE-----\n"
	previousNewChain = "-----BEGIN CERTIFICATE-----\nY2hhaW4=\n-----END CERTIFICATE-----\n"
)

// previousAgent is an agent on such a host. Only its methods use the engine.
type previousAgent struct{ *Engine }

func startPrevious(t *testing.T, w world, mounts bool) previousAgent {
	t.Helper()
	if mounts {
		return previousAgent{w.mustEngine(t, mounted(w.path("private/key.pem")))}
	}
	return previousAgent{w.mustEngine(t, nil)}
}

func (a previousAgent) deploy(t *testing.T, w world) (unchanged bool) {
	t.Helper()
	result, err := a.Engine.deploy(t.Context(), Transaction{
		Deployment{Target: "t1", Promotion: []keystore.Change{
			{Path: w.path("keys/c1.previous"), Data: []byte(previousOldKey)},
			{Path: w.path("keys/c1.key"), Data: []byte(previousNewKey)},
		}},
		proposal{
			Files: []connector.File{
				{Path: w.path("private/key.pem"), Kind: connector.KeyFile, Data: []byte(previousNewKey), DefaultMode: 0o600},
				{Path: w.path("site/cert.pem"), Kind: connector.CertificateFile, Data: []byte(previousNewCert), DefaultMode: 0o644},
				{Path: w.path("site/chain.pem"), Kind: connector.CertificateFile, Data: []byte(previousNewChain), DefaultMode: 0o644},
			},
			Validate: &policy.Command{Argv: []string{"validate"}},
			Reload:   connector.Reload{Command: &policy.Command{Argv: []string{"reload"}}},
		},
	})
	check(t, err)
	return result.Unchanged
}

// TestPreviousRelease upgrades hosts on which the previous version was stopped at some step.
// Recovery must leave them as that version would have, and the next deployment must succeed.
func TestPreviousRelease(t *testing.T) {
	names, err := filepath.Glob("testdata/previous/*.txt")
	check(t, err)
	if len(names) < 20 {
		t.Fatalf("found %d hosts", len(names))
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			host := previous.Read(t, name)
			var want Recovery
			check(t, json.Unmarshal([]byte(host.Recovery), &want))
			w := newWorld(t, t.TempDir())
			host.Before.Moved(t, w.base).Write(t, w.base)
			mounts := strings.Contains(name, "in-place")

			agent := startPrevious(t, w, mounts)
			found, err := agent.Recover(t.Context())
			if err != nil || !reflect.DeepEqual(found, want) {
				t.Errorf("found %+v, %v, want %+v", found, err, want)
			}
			recovered := previous.In(t, w.base)
			differ(t, recovered, host.After.Moved(t, w.base))
			if byHand := recovered["state/journal/t1.aside"].Data != ""; !byHand && recovered["keys/c1.key"].Data != recovered["private/key.pem"].Data {
				t.Error("the server's key is not the one of the key store")
			}
			if left := recovered.Temporaries(); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}

			if finished := len(want.Finished) > 0; agent.deploy(t, w) != finished {
				t.Errorf("the next deployment finds nothing to do: want %v", finished)
			}
			installed := previous.In(t, w.base)
			for name, data := range map[string]string{
				"keys/c1.previous": previousOldKey, "keys/c1.key": previousNewKey, "private/key.pem": previousNewKey,
				"site/cert.pem": previousNewCert, "site/chain.pem": previousNewChain,
			} {
				if installed[name].Data != data {
					t.Errorf("after the next deployment %s holds %q, want %q", name, installed[name].Data, data)
				}
			}
			if left := append(installed.Temporaries(), w.journal(t)...); len(left) > 0 {
				t.Errorf("after the next deployment there is still %q", left)
			}
			if !agent.deploy(t, w) {
				t.Error("the deployment after it finds something to do")
			}
		})
	}
}

// TestPreviousReload checks that Repair does the reload that the previous version still owed.
func TestPreviousReload(t *testing.T) {
	names, err := filepath.Glob("testdata/previous/*.txt")
	check(t, err)
	for _, name := range names {
		host := previous.Read(t, name)
		var want Recovery
		check(t, json.Unmarshal([]byte(host.Recovery), &want))
		if want.Reloads == 0 {
			continue
		}
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			host.Before.Moved(t, w.base).Write(t, w.base)
			agent := startPrevious(t, w, strings.Contains(name, "in-place"))
			_, err := agent.Recover(t.Context())
			check(t, err)
			err = agent.Repair(t.Context(), t.Context())
			if fails := strings.Contains(host.Before["state/journal/t1.json"].Data, `["fail"]`); (err != nil) != fails || len(w.journal(t)) > 0 != fails {
				t.Errorf("repaired: %v, journal %q, want an error: %v", err, w.journal(t), fails)
			}
		})
	}
}

// differ reports an error for each file that differs.
func differ(t *testing.T, got, want previous.Files) {
	t.Helper()
	all := maps.Clone(got)
	maps.Copy(all, want)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if got[name] != want[name] {
			t.Errorf("%s is %v %.400q, want %v %.400q", name, got[name].Mode, got[name].Data, want[name].Mode, want[name].Data)
		}
	}
}
