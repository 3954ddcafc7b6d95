// Package envoy installs certificates for Envoy: a certificate file, a key file and optionally a
// chain file, and a secret discovery service (SDS) file that names them. Envoy reads the SDS file
// again when something is renamed over it or into its watched directory
// (https://www.envoyproxy.io/docs/envoy/latest/configuration/security/secret).
package envoy

import (
	"context"
	"encoding/json"
	"slices"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/targetconf"
)

// Type returns the target type Envoy.
func Type() connector.Type {
	return connector.Type{Name: "Envoy", Aliases: map[string]string{"watch_dir": "cert_dir"}, New: newConnector}
}

// config is the target's configuration.
type config struct {
	CertDir   targetconf.Path     `json:"cert_dir" config:"required"`
	CertName  targetconf.FileName `json:"cert_filename" default:"cert.pem"`
	KeyName   targetconf.FileName `json:"key_filename" default:"key.pem"`
	ChainName targetconf.FileName `json:"chain_filename"` // "": the chain follows the leaf in the certificate file

	SDSConfig  bool   `json:"sds_config"` // write sds.json to CertDir
	SecretName string `json:"sds_secret_name" default:"server_cert"`
}

const sdsName = "sds.json"

type envoy struct {
	config config
	common targetconf.Common
	pair   connector.Pair
}

func newConnector(c *targetconf.Config, _ connector.Host) (connector.Connector, error) {
	e := &envoy{common: c.Common}
	if err := c.Decode(&e.config); err != nil {
		return nil, err
	}
	return e, e.resolve()
}

// resolve joins the file names with CertDir.
func (e *envoy) resolve() error {
	names := map[targetconf.FileName]string{}
	for _, file := range []struct {
		key  string
		name targetconf.FileName
		path *targetconf.Path
	}{
		{"cert_filename", e.config.CertName, &e.pair.CertPath},
		{"key_filename", e.config.KeyName, &e.pair.KeyPath},
		{"chain_filename", e.config.ChainName, &e.pair.ChainPath},
	} {
		if file.name == "" {
			continue
		}
		if other := names[file.name]; other != "" {
			return targetconf.Invalid(file.key, "is the same file as %s", other)
		}
		if file.name == sdsName && e.config.SDSConfig {
			return targetconf.Invalid(file.key, "is the file that sds_config writes")
		}
		names[file.name] = file.key
		*file.path = e.config.CertDir.Join(file.name)
	}
	return nil
}

// Plan implements connector.Connector.
func (e *envoy) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	plan := e.pair.Plan(m)
	plan.Serves = e.common.Endpoint()
	if !e.config.SDSConfig {
		plan.Caveats = append(plan.Caveats, "Envoy keeps using the old certificate until it restarts if its static configuration names the files: "+
			"set sds_config, unless a secret of your own with watched_directory names them")
		return plan, nil
	}
	sds, err := e.sds(pemutil.Fingerprint(m.Leaf))
	if err != nil {
		return nil, err
	}
	// sds.json is last: when Envoy sees it change, the pair is complete.
	file := connector.NewFile(e.config.CertDir.Join(sdsName), connector.ConfigFile, sds, targetconf.FileOptions{})
	file.Written = isSDS
	plan.Files = append(plan.Files, file)
	if e.pair.ChainPath != "" && len(m.Chain) > 0 {
		plan.Warnings = append(plan.Warnings, "Envoy serves the certificate without its chain, since a secret names a single certificate file: remove chain_filename")
	}
	return plan, nil
}

// A DiscoveryResponse
// (https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/discovery/v3/discovery.proto)
// with one Secret, which holds one TlsCertificate
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

// isSDS reports whether data looks like the output of sds.
func isSDS(data []byte) bool {
	var r discoveryResponse
	return json.Unmarshal(data, &r) == nil && len(r.Resources) > 0 &&
		!slices.ContainsFunc(r.Resources, func(s secret) bool { return s.Type != secretType })
}

// sds returns the content of sds.json. Its version is the fingerprint, so it differs for each
// certificate.
func (e *envoy) sds(fingerprint string) ([]byte, error) {
	data, err := json.MarshalIndent(discoveryResponse{
		VersionInfo: fingerprint,
		Resources: []secret{{
			Type: secretType,
			Name: e.config.SecretName,
			TLSCertificate: tlsCertificate{
				CertificateChain: dataSource{e.pair.CertPath},
				PrivateKey:       dataSource{e.pair.KeyPath},
				WatchedDirectory: directory{e.config.CertDir},
			},
		}},
	}, "", "  ")
	return append(data, '\n'), err
}
