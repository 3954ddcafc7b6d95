// Package traefik installs certificates for Traefik's file provider: a certificate file, a key
// file, and then the dynamic configuration that names them. Traefik watches the dynamic
// configuration, not the pair (https://doc.traefik.io/traefik/providers/file/), so it is replaced
// last.
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

// Type returns the target type Traefik.
func Type() connector.Type {
	return connector.Type{Name: "Traefik", Aliases: map[string]string{"watch_dir": "cert_dir"}, New: newConnector}
}

// config is the target's configuration.
type config struct {
	connector.DirPair
	DynamicConfig targetconf.Path `json:"dynamic_config"` // "": none is written
	ReloadCommand string          `json:"reload_command"`
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
	// Traefik executes its dynamic configuration as a text/template.
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
		plan.Caveats = append(plan.Caveats, "Traefik keeps using the old certificate until its dynamic configuration changes: "+
			"set dynamic_config to a file that Traefik watches")
	}
	return plan, nil
}

// marker is the start of every dynamic configuration that the agent wrote.
const marker = "# Written by certctl-agent"

// dynamic returns the file that Traefik watches. An operator's file keeps its content: replacing it
// with a copy is enough to make Traefik read the pair again.
func (t *traefik) dynamic(fingerprint string) connector.File {
	file := connector.NewFile(t.config.DynamicConfig, connector.ConfigFile, t.content(fingerprint), targetconf.FileOptions{})
	file.Keep, file.Written = true, isOurs
	return file
}

func isOurs(data []byte) bool { return bytes.HasPrefix(data, []byte(marker)) }

// content returns a configuration that names the pair. The fingerprint in it makes each version
// different.
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

// quote returns path as a JSON string, which is also valid TOML and YAML.
func quote(path targetconf.Path) string {
	quoted, _ := json.Marshal(path) // cannot fail for a string
	return string(quoted)
}
