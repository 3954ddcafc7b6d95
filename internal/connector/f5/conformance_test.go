package f5

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/bigip"
)

func fingerprint(m *connector.Material) string { return pemutil.Fingerprint(m.Leaf) }

// TestConformance runs the suite. The state of a target includes the uploads and tokens on the
// device, besides the profile and the files.
func TestConformance(t *testing.T) {
	all := &devices{t: t, made: make(map[string]*bigip.Device)}
	factory := stateOf(newDeviceFor(t, "13.1.0"))
	conformance.Run(t, conformance.Harness{
		Type: inMemory(all.of), Required: []string{"host", "username", "password", "ssl_profile"},
		Secrets:  []string{bigip.Password, "SECRET"},
		Occupied: true,
		Config: func(dir string) map[string]any {
			config := settings(t, all.of(dir), filepath.Join(filepath.Dir(dir), "overlays"))
			config["backup_retention"] = -1
			return config
		},
		State: func(dir string) map[string]string {
			state := stateOf(all.of(dir))
			maps.DeleteFunc(state, func(name, value string) bool {
				return factory[name] == value && name != clientSSL+" "+profileName || isFactory(name)
			})
			return state
		},
		Want: func(m *connector.Material) map[string][]byte {
			leaf, chain := leafPath(m), chainPath(m)
			return map[string][]byte{
				"ssl-cert " + leaf + ".crt":   conformance.PEM(m.Leaf),
				"ssl-cert " + chain:           conformance.PEM(m.Chain...),
				"ssl-key " + leaf + ".key":    m.Key(),
				clientSSL + " " + profileName: wantProfile(leaf, chain),
			}
		},
		UndoOnly: func(name string) bool {
			return strings.HasPrefix(name, "ssl-") && strings.HasSuffix(name, unused) || strings.HasPrefix(name, "upload ")
		},
	})
	for dir, d := range all.made {
		if saved, _ := d.InSync(); !saved {
			t.Errorf("%s: the configuration is not saved at the end", dir)
		}
	}
}

func isFactory(name string) bool { return strings.Contains(name, "/Common/default.") }

// unused is the suffix of the names of files that no profile uses.
const unused = " (unused)"

// stateOf returns the state of a device in the form that the suite expects.
func stateOf(d *bigip.Device) map[string]string {
	state, all := make(map[string]string), d.State()
	profiles := all[clientSSL+" "+profileName] + all[serverSSL+" "+profileName]
	for name, value := range all {
		_, path, _ := strings.Cut(name, " ")
		switch {
		case strings.HasSuffix(name, bigip.Saved) || strings.HasSuffix(name, bigip.Peer):
			name += conformance.Written
		case strings.HasPrefix(name, "ssl-") && !strings.Contains(profiles, strconv.Quote(path)):
			name += unused
		}
		state[name] = value
	}
	return state
}

// chainPath returns the path of m's chain.
func chainPath(m *connector.Material) string {
	sum := sha256.Sum256(pemutil.EncodeCertificates(m.Chain...))
	return leafPath(m) + "-" + hex.EncodeToString(sum[:chainDigits/2]) + ".crt"
}

// wantProfile returns the State of a profile that serves the certificate. The RSA pair of the
// default profile stays beside it.
func wantProfile(leaf, chain string) []byte {
	pair := fmt.Sprintf(`"Cert":"%s.crt","Key":"%[1]s.key","CA":%q,"Passphrase":""`, leaf, chain)
	return fmt.Appendf(nil, `{"Kind":"client-ssl","Path":%q,"Parent":"/Common/clientssl","Inherit":false,"Chain":[`+
		`{"Name":"default","Cert":"/Common/default.crt","Key":"/Common/default.key","CA":"","Passphrase":"","Usage":""},`+
		`{"Name":"certctl-target-1-ec-private",%s,"Usage":""}],"Cert":"","Key":"","CA":"","Passphrase":"","Other":null}`, profileName, pair)
}
