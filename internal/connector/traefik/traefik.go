// Package traefik installs certificates for Traefik's file provider: a
// certificate file and a key file, and then the dynamic configuration that
// names them. Traefik watches that one, not the pair
// (https://doc.traefik.io/traefik/providers/file/), so it is replaced last.
package traefik

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type Traefik.
type Config struct {
	connector.DirPair
	DynamicConfig targetconf.Path `json:"dynamic_config"` // none: somebody else tells Traefik
	ReloadCommand string          `json:"reload_command"` // none: Traefik needs none
}

// Connector is one deployment to Traefik.
type Connector struct {
	params connector.Params
	files  *transaction.Store
	config Config
	pair   connector.Pair
	reload *policy.Command
}

var _ connector.Connector = (*Connector)(nil)

// New checks the configuration.
func New(p connector.Params, files *transaction.Store) (*Connector, error) {
	c := &Connector{params: p, files: files}
	err := p.Config.Decode(&c.config)
	if err != nil {
		return nil, err
	}
	if c.pair, err = c.config.Pair(); err != nil {
		return nil, err
	}
	if err := c.checkDynamic(); err != nil {
		return nil, err
	}
	c.reload, err = p.Command("reload_command", c.config.ReloadCommand)
	return c, err
}

func (c *Connector) checkDynamic() error {
	if c.config.DynamicConfig == "" {
		return nil
	}
	switch strings.ToLower(filepath.Ext(string(c.config.DynamicConfig))) {
	case ".yml", ".yaml", ".toml":
	default:
		return targetconf.Invalid("dynamic_config", "expected a .yml, .yaml or .toml file: Traefik loads no others")
	}
	// Traefik runs these files through text/template.
	if strings.Contains(string(c.pair.CertPath+c.pair.KeyPath), "{{") {
		return targetconf.Invalid("cert_dir", "holds {{, which Traefik would take for a template")
	}
	return nil
}

// Deploy implements connector.Connector.
func (c *Connector) Deploy(ctx context.Context, m *connector.Material) (connector.Result, error) {
	files, warnings := c.pair.Files(m)
	if c.config.DynamicConfig != "" {
		dynamic, err := c.dynamic(pemutil.Fingerprint(m.Leaf))
		if err != nil {
			return connector.Result{}, err
		}
		files = append(files, dynamic)
	}
	tx := transaction.NewTransaction(c.params, m)
	tx.Files, tx.Reload = files, c.reload
	result, err := c.files.Deploy(ctx, tx)
	if err == nil && !result.Unchanged && c.config.DynamicConfig == "" && c.reload == nil {
		warnings = append(warnings, "Traefik is not told of the new certificate and goes on with the old one until something else changes "+
			"its dynamic configuration: set dynamic_config to a file that Traefik watches")
	}
	result.Warnings = append(warnings, result.Warnings...)
	return result, err
}

// marker begins a dynamic configuration that is ours to replace.
const marker = "# Written by certctl-agent"

// dynamic is the file that Traefik watches. One that an operator wrote keeps
// its bytes: being replaced is all that it takes for Traefik to read the pair
// again.
func (c *Connector) dynamic(fingerprint string) (connector.File, error) {
	path := c.config.DynamicConfig
	file := connector.NewFile(path, connector.ConfigFile, c.content(fingerprint), targetconf.FileOptions{})
	was, err := serverconf.ReadFile(string(path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return file, fmt.Errorf("dynamic_config: %w", err)
	}
	file.Keep = err == nil && !isOurs(was)
	file.Written = isOurs
	return file, nil
}

func isOurs(data []byte) bool { return bytes.HasPrefix(data, []byte(marker)) }

// content names the pair. The fingerprint makes every version of the file
// another one, for whoever compares.
func (c *Connector) content(fingerprint string) []byte {
	lines := []string{
		marker + " for the certificate " + fingerprint + ".",
		"# Changes are lost with the next one, unless this first comment goes.",
	}
	cert, key := quote(c.pair.CertPath), quote(c.pair.KeyPath)
	if strings.EqualFold(filepath.Ext(string(c.config.DynamicConfig)), ".toml") {
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
