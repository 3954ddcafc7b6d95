package keyvault

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/azure"
)

func TestConformance(t *testing.T) {
	s := newSite(t)
	var vaults sync.Map // by directory
	at := func(dir string) *azure.Vault {
		if v, ok := vaults.Load(dir); ok {
			return v.(*azure.Vault)
		}
		v, _ := vaults.LoadOrStore(dir, s.vault())
		return v.(*azure.Vault)
	}
	overlay, err := json.Marshal(map[string]any{"ca_bundle": s.bundle})
	must(t, err)
	conformance.Run(t, conformance.Harness{
		Type: s.typ(environment(), brief), Required: []string{"vault_url", "certificate_name"}, Secrets: []string{clientSecret},
		Config: func(dir string) map[string]any {
			must(t, os.WriteFile(filepath.Join(filepath.Dir(dir), "overlays", "default.json"), overlay, 0o600))
			return map[string]any{"vault_url": at(dir).URL(), "certificate_name": "www"}
		},
		State: func(dir string) map[string]string {
			state := make(map[string]string)
			// The version that clients get. Older versions stay anyway.
			if v := current(at(dir)); v != nil && v.Enabled {
				state["certificate"] = string(conformance.PEM(append(slices.Clone(v.Chain), v.Certificate)...))
				state["key"], state["content type"], state["certificate id"] = string(v.Key), v.Policy.Secret.ContentType, v.Tags[certificateTag]
				state["fingerprint"] = v.Tags[fingerprintTag]
			}
			return state
		},
		Want: func(m *connector.Material) map[string][]byte {
			return map[string][]byte{
				"certificate": conformance.PEM(append(slices.Clone(m.Chain), m.Leaf)...), "key": pkcs8Of(t, m), "content type": []byte(azure.PFX),
				"certificate id": []byte(m.CertificateID), "fingerprint": []byte(fingerprint(m)),
			}
		},
	})
}
