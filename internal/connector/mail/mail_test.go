package mail

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
)

// harness has a configuration with default commands.
func harness(typ connector.Type) conformance.Harness {
	return conformance.Harness{
		Type: typ,
		Config: func(dir string) map[string]any {
			return map[string]any{"cert_path": filepath.Join(dir, "cert.pem"), "key_path": filepath.Join(dir, "key.pem")}
		},
		Want: func(m *connector.Material) map[string][]byte {
			return map[string][]byte{"cert.pem": append(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...)...), "key.pem": m.KeyPEM}
		},
	}
}

func TestPostfixConformance(t *testing.T) { conformance.Run(t, harness(Postfix())) }
func TestDovecotConformance(t *testing.T) { conformance.Run(t, harness(Dovecot())) }

func TestConformanceWithChain(t *testing.T) {
	h := harness(Postfix())
	h.Config = func(dir string) map[string]any {
		return map[string]any{
			"cert_path": filepath.Join(dir, "cert.pem"), "key_path": filepath.Join(dir, "key.pem"), "chain_path": filepath.Join(dir, "chain.pem"),
			"mode": "dovecot", "validate_command": "doveconf -c /etc/x -n", "reload_command": "doveadm -c /etc/x reload",
		}
	}
	h.Want = func(m *connector.Material) map[string][]byte {
		return map[string][]byte{"cert.pem": conformance.PEM(m.Leaf), "chain.pem": conformance.PEM(m.Chain...), "key.pem": m.KeyPEM}
	}
	conformance.Run(t, h)
}

func TestConformanceInOneFile(t *testing.T) {
	for _, typ := range []connector.Type{Postfix(), Dovecot()} {
		t.Run(typ.Name, func(t *testing.T) {
			h := harness(typ)
			h.Config = func(dir string) map[string]any {
				return map[string]any{"cert_path": filepath.Join(dir, "all.pem"), "key_path": filepath.Join(dir, "all.pem")}
			}
			h.Want = func(m *connector.Material) map[string][]byte {
				return map[string][]byte{"all.pem": slices.Concat(m.KeyPEM, conformance.PEM(m.Leaf), conformance.PEM(m.Chain...))}
			}
			conformance.Run(t, h)
		})
	}
}

func TestOneFileRefused(t *testing.T) {
	config := map[string]any{"cert_path": "/all.pem", "key_path": "/all.pem", "chain_path": "/chain.pem"}
	if _, err := conformance.NewHost(t, nil).Connector(Postfix(), config); err == nil || !strings.Contains(err.Error(), "chain_path: is not allowed") {
		t.Errorf("one file and a chain: got %v", err)
	}
}

func TestDefaults(t *testing.T) {
	inPostfix := [4]string{"/etc/postfix/certs/cert.pem", "/etc/postfix/certs/key.pem", "postfix check", "postfix reload"}
	inDovecot := [4]string{"/etc/dovecot/certs/cert.pem", "/etc/dovecot/certs/key.pem", "doveconf -n", "doveadm reload"}
	masked := inDovecot
	masked[1] = ""
	tests := []struct {
		name   string
		typ    connector.Type
		config map[string]any
		want   [4]string
	}{
		{"Postfix", Postfix(), map[string]any{}, inPostfix},
		{"Dovecot", Dovecot(), map[string]any{}, inDovecot},
		{"Postfix of mode dovecot", Postfix(), map[string]any{"mode": "dovecot"}, inDovecot},
		{"Dovecot of mode postfix", Dovecot(), map[string]any{"mode": "postfix"}, inPostfix},
		{"empty values", Postfix(), map[string]any{"mode": "", "cert_path": "", "key_path": "", "validate_command": "", "reload_command": ""}, inPostfix},
		{"key_path masked", Dovecot(), map[string]any{"key_path": "********"}, masked},
	}
	for _, test := range tests {
		connector, err := conformance.NewHost(t, nil).Connector(test.typ, test.config)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		c := connector.(*mail)
		got := [4]string{string(c.CertPath), string(c.KeyPath), strings.Join(c.Validate.Argv, " "), strings.Join(c.Reload.Argv, " ")}
		if got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
}

func TestMode(t *testing.T) {
	for _, mode := range []string{"exim", "Postfix"} {
		_, err := conformance.NewHost(t, nil).Connector(Postfix(), map[string]any{"mode": mode})
		if err == nil || !strings.Contains(err.Error(), "mode: expected postfix or dovecot") {
			t.Errorf("mode %s: got %v", mode, err)
		}
	}
}
