package envoy

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
)

func TestConformance(t *testing.T) {
	run := func(name string, extra map[string]any, want func(m *connector.Material) map[string][]byte) {
		t.Run(name, func(t *testing.T) {
			conformance.Run(t, conformance.Harness{
				Type: Type(), Required: []string{"cert_dir"}, Want: want,
				Config: func(dir string) map[string]any {
					config := map[string]any{"cert_dir": dir}
					maps.Copy(config, extra)
					return config
				},
			})
		})
	}
	run("static", nil, func(m *connector.Material) map[string][]byte {
		return map[string][]byte{"cert.pem": append(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...)...), "key.pem": m.KeyPEM}
	})
	run("secret discovery", map[string]any{"cert_filename": "a.pem", "key_filename": "b.pem", "chain_filename": "c.pem", "sds_config": true, "sds_secret_name": "site"},
		func(m *connector.Material) map[string][]byte {
			return map[string][]byte{
				"a.pem": conformance.PEM(m.Leaf), "b.pem": m.KeyPEM, "c.pem": conformance.PEM(m.Chain...),
				"sds.json": fmt.Appendf(nil, `{
  "version_info": "%s",
  "resources": [
    {
      "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
      "name": "site",
      "tls_certificate": {
        "certificate_chain": {
          "filename": "%[2]s/a.pem"
        },
        "private_key": {
          "filename": "%[2]s/b.pem"
        },
        "watched_directory": {
          "path": "%[2]s"
        }
      }
    }
  ]
}
`, pemutil.Fingerprint(m.Leaf), conformance.Dir(m)),
			}
		})
}

func TestNew(t *testing.T) {
	tests := []struct {
		config map[string]any
		says   string
	}{
		{map[string]any{"key_filename": "cert.pem"}, "key_filename"},
		{map[string]any{"chain_filename": "key.pem"}, "chain_filename"},
		{map[string]any{"cert_filename": "sds.json", "sds_config": "true"}, "cert_filename"},
		{map[string]any{"cert_filename": "tls/cert.pem"}, "cert_filename"},
		{map[string]any{"key_filename": "********"}, "key_filename"},
		{map[string]any{"sds_config": "maybe"}, "sds_config"},
	}
	host := conformance.NewHost(t, nil)
	for _, test := range tests {
		test.config["cert_dir"] = host.Dir
		if _, err := host.Connector(Type(), test.config); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%v: got %v, want an error with %q", test.config, err, test.says)
		}
	}
}

func TestChainApartWarns(t *testing.T) {
	host := conformance.NewHost(t, nil)
	config := map[string]any{"cert_dir": filepath.Clean(host.Dir), "chain_filename": "chain.pem", "sds_config": true}
	result, err := host.Deploy(t.Context(), Type(), config, host.Material(t, testca.Must(t)))
	if err != nil || len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], "chain_filename") {
		t.Errorf("got %q, %v, want a warning that names chain_filename", result.Warnings, err)
	}
}

// Only a deployment that Envoy does not notice logs a warning.
func TestNotTold(t *testing.T) {
	for _, test := range []struct {
		told   bool
		config map[string]any
	}{
		{false, nil},
		{true, map[string]any{"sds_config": true}},
	} {
		host := conformance.NewHost(t, func(context.Context, policy.Command) error { return nil })
		config := map[string]any{"cert_dir": host.Dir}
		maps.Copy(config, test.config)
		m := host.Material(t, testca.Must(t))
		for _, unchanged := range []bool{false, true} {
			result, err := host.Deploy(t.Context(), Type(), config, m)
			if err != nil || result.Unchanged != unchanged {
				t.Fatalf("%v: got %+v, %v, want it unchanged: %v", config, result, err, unchanged)
			}
			if warned := strings.Contains(fmt.Sprint(result.Warnings), "keeps using the old certificate"); warned != (!test.told && !unchanged) {
				t.Errorf("%v, unchanged: %v: warnings %q", config, unchanged, result.Warnings)
			}
		}
	}
}
