// Package traefik installs certificates for Traefik's file provider: a
// certificate file and a key file, and then the dynamic configuration that
// names them. Traefik watches that one, not the pair
// (https://doc.traefik.io/traefik/providers/file/), so it is replaced last.
package traefik

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// Type is the kind of target.
func Type() connector.Type {
	return connector.Type{Name: "Traefik", Aliases: map[string]string{"watch_dir": "cert_dir"}, New: newConnector}
}

// config is what can be set.
type config struct {
	connector.DirPair
	DynamicConfig targetconf.Path `json:"dynamic_config"` // none: somebody else tells Traefik
	ReloadCommand string          `json:"reload_command"` // none: Traefik needs none
}

type traefik struct {
	config config
	common targetconf.Common
	pair   connector.Pair
	reload *policy.Command
}

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	t := &traefik{common: c.Common}
	err := c.Decode(&t.config)
	if err != nil {
		return nil, err
	}
	if t.pair, err = t.config.Pair(); err != nil {
		return nil, err
	}
	if err := t.checkDynamic(); err != nil {
		return nil, err
	}
	if t.reload, err = host.Command(c, "reload_command", t.config.ReloadCommand); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *traefik) checkDynamic() error {
	if t.config.DynamicConfig == "" {
		return nil
	}
	switch strings.ToLower(filepath.Ext(string(t.config.DynamicConfig))) {
	case ".yml", ".yaml", ".toml":
	default:
		return targetconf.Invalid("dynamic_config", "expected a .yml, .yaml or .toml file: Traefik loads no others")
	}
	// Traefik runs these files through text/template.
	if strings.Contains(string(t.pair.CertPath+t.pair.KeyPath), "{{") {
		return targetconf.Invalid("cert_dir", "holds {{, which Traefik would take for a template")
	}
	return nil
}

// Plan implements connector.Connector.
func (t *traefik) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	plan := t.pair.Plan(m)
	plan.Reload.Command, plan.Serves = t.reload, t.common.Endpoint()
	if t.config.DynamicConfig != "" {
		plan.Files = append(plan.Files, t.dynamic(pemutil.Fingerprint(m.Leaf)))
	} else if t.reload == nil {
		plan.Caveats = append(plan.Caveats, "Traefik is not told of the new certificate and goes on with the old one until something else changes "+
			"its dynamic configuration: set dynamic_config to a file that Traefik watches")
	}
	return plan, nil
}

// marker begins a dynamic configuration that is ours to replace.
const marker = "# Written by certctl-agent"

// dynamic is the file that Traefik watches. One that an operator wrote keeps
// its bytes: being replaced is all that it takes for Traefik to read the pair
// again.
func (t *traefik) dynamic(fingerprint string) connector.File {
	file := connector.NewFile(t.config.DynamicConfig, connector.ConfigFile, t.content(fingerprint), targetconf.FileOptions{})
	file.Keep, file.Written = true, isOurs
	return file
}

func isOurs(data []byte) bool { return bytes.HasPrefix(data, []byte(marker)) }

// content names the pair. The fingerprint makes every version of the file
// another one, for whoever compares.
func (t *traefik) content(fingerprint string) []byte {
	lines := []string{
		marker + " for the certificate " + fingerprint + ".",
		"# Changes are lost with the next one, unless this first comment goes.",
	}
	cert, key := quote(t.pair.CertPath), quote(t.pair.KeyPath)
	if strings.EqualFold(filepath.Ext(string(t.config.DynamicConfig)), ".toml") {
		lines = append(lines, "[[tls.certificates]]", "  certFile = "+cert, "  keyFile = "+key)
	} else {
		lines = append(lines, "tls:", "  certificates:", "    - certFile: "+cert, "      keyFile: "+key)
	}
	return []byte(strings.Join(lines, "\n") + "\n")
}

// quote makes a string that TOML and YAML read as JSON does.
func quote(path targetconf.Path) string {
	quoted, _ := json.Marshal(path) // a string always can be
	return string(quoted)
}
