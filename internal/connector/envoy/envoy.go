// Package envoy installs certificates for Envoy: a certificate file, a key file
// and perhaps a chain file, and the file of a secret discovery service that
// names them. Envoy reads such a file again when something is renamed over it
// or into its watched directory
// (https://www.envoyproxy.io/docs/envoy/latest/configuration/security/secret).
package envoy

import (
	"context"
	"encoding/json"
	"slices"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type Envoy.
type Config struct {
	CertDir   targetconf.Path     `json:"cert_dir" config:"required"`
	CertName  targetconf.FileName `json:"cert_filename"`  // cert.pem
	KeyName   targetconf.FileName `json:"key_filename"`   // key.pem
	ChainName targetconf.FileName `json:"chain_filename"` // none: the chain follows the leaf in the certificate's file

	SDSConfig  bool   `json:"sds_config"`      // write sds.json beside them
	SecretName string `json:"sds_secret_name"` // server_cert
}

const (
	sdsName           = "sds.json"
	defaultSecretName = "server_cert"
)

// Connector is one deployment to Envoy.
type Connector struct {
	params connector.Params
	files  *transaction.Store
	config Config
	pair   connector.Pair
}

var _ connector.Connector = (*Connector)(nil)

// New checks the configuration.
func New(p connector.Params, files *transaction.Store) (*Connector, error) {
	c := &Connector{params: p, files: files}
	if err := p.Config.Decode(&c.config); err != nil {
		return nil, err
	}
	return c, c.resolve()
}

// resolve makes paths of the names.
func (c *Connector) resolve() error {
	names := map[targetconf.FileName]string{}
	for _, file := range []struct {
		key  string
		name targetconf.FileName
		path *targetconf.Path
	}{
		{"cert_filename", c.config.CertName.Or("cert.pem"), &c.pair.CertPath},
		{"key_filename", c.config.KeyName.Or("key.pem"), &c.pair.KeyPath},
		{"chain_filename", c.config.ChainName, &c.pair.ChainPath},
	} {
		if file.name == "" {
			continue
		}
		if other := names[file.name]; other != "" {
			return targetconf.Invalid(file.key, "is the same file as %s", other)
		}
		if file.name == sdsName && c.config.SDSConfig {
			return targetconf.Invalid(file.key, "is the file that sds_config writes")
		}
		names[file.name] = file.key
		*file.path = c.config.CertDir.Join(file.name)
	}
	return nil
}

// Deploy implements connector.Connector.
func (c *Connector) Deploy(ctx context.Context, m *connector.Material) (connector.Result, error) {
	files, warnings := c.pair.Files(m)
	if c.config.SDSConfig {
		sds, err := c.sds(pemutil.Fingerprint(m.Leaf))
		if err != nil {
			return connector.Result{}, err
		}
		// The last one: at its event the pair is complete.
		file := connector.NewFile(c.config.CertDir.Join(sdsName), connector.ConfigFile, sds, targetconf.FileOptions{})
		file.Written = isSDS
		files = append(files, file)
		if c.pair.ChainPath != "" && len(m.Chain) > 0 {
			warnings = append(warnings, "Envoy serves the certificate without its chain, since a secret names a single certificate file: leave chain_filename out")
		}
	}
	tx := transaction.NewTransaction(c.params, m)
	tx.Files = files
	result, err := c.files.Deploy(ctx, tx)
	if err == nil && !result.Unchanged && !c.config.SDSConfig {
		warnings = append(warnings, "Envoy reads a certificate that its static configuration names only when it starts, and goes on with the old one: "+
			"set sds_config, unless a secret of your own with watched_directory names the files")
	}
	result.Warnings = append(warnings, result.Warnings...)
	return result, err
}

// The parts of a DiscoveryResponse
// (https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/discovery/v3/discovery.proto)
// that holds one Secret with one TlsCertificate
// (https://www.envoyproxy.io/docs/envoy/latest/api-v3/extensions/transport_sockets/tls/v3/common.proto).
type (
	discoveryResponse struct {
		VersionInfo string   `json:"version_info"`
		Resources   []secret `json:"resources"`
	}
	secret struct {
		Type           string         `json:"@type"`
		Name           string         `json:"name"`
		TLSCertificate tlsCertificate `json:"tls_certificate"`
	}
	tlsCertificate struct {
		CertificateChain dataSource `json:"certificate_chain"`
		PrivateKey       dataSource `json:"private_key"`
		WatchedDirectory directory  `json:"watched_directory"`
	}
	dataSource struct {
		Filename targetconf.Path `json:"filename"`
	}
	directory struct {
		Path targetconf.Path `json:"path"`
	}
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// isSDS reports whether data is a file such as sds makes.
func isSDS(data []byte) bool {
	var r discoveryResponse
	return json.Unmarshal(data, &r) == nil && len(r.Resources) > 0 &&
		!slices.ContainsFunc(r.Resources, func(s secret) bool { return s.Type != secretType })
}

// sds is sds.json. The fingerprint as its version makes each one another.
func (c *Connector) sds(fingerprint string) ([]byte, error) {
	name := c.config.SecretName
	if name == "" {
		name = defaultSecretName
	}
	data, err := json.MarshalIndent(discoveryResponse{
		VersionInfo: fingerprint,
		Resources: []secret{{
			Type: secretType,
			Name: name,
			TLSCertificate: tlsCertificate{
				CertificateChain: dataSource{c.pair.CertPath},
				PrivateKey:       dataSource{c.pair.KeyPath},
				WatchedDirectory: directory{c.config.CertDir},
			},
		}},
	}, "", "  ")
	return append(data, '\n'), err
}
