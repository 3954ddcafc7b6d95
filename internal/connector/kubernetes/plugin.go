package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"certctl-agent/internal/printable"
)

// execCredential is the input of a plugin, in KUBERNETES_EXEC_INFO, and its output
// (https://kubernetes.io/docs/reference/config-api/client-authentication.v1/).
type execCredential struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Spec       struct {
		Cluster     *execCluster `json:"cluster,omitempty"`
		Interactive bool         `json:"interactive"`
	} `json:"spec"`
	Status *execStatus `json:"status,omitempty"`
}

type execCluster struct {
	Server                   string `json:"server"`
	TLSServerName            string `json:"tls-server-name,omitempty"`
	InsecureSkipTLSVerify    bool   `json:"insecure-skip-tls-verify,omitempty"`
	CertificateAuthorityData []byte `json:"certificate-authority-data,omitempty"`
	ProxyURL                 string `json:"proxy-url,omitempty"`
}

type execStatus struct {
	ExpirationTimestamp   time.Time `json:"expirationTimestamp,omitzero"`
	Token                 string    `json:"token,omitempty"`
	ClientCertificateData string    `json:"clientCertificateData,omitempty"`
	ClientKeyData         string    `json:"clientKeyData,omitempty"`
}

const execKind = "ExecCredential"

// askPlugin runs the command of the kubeconfig. Errors must not contain its output, which has
// credentials.
func (c *client) askPlugin(ctx context.Context) (*credentials, error) {
	exec := c.User.Exec
	if c.query == nil {
		return nil, errors.New("commands cannot run here")
	}
	input := execCredential{APIVersion: exec.APIVersion, Kind: execKind}
	if exec.ProvideClusterInfo {
		ca, err := orFile(c.Cluster.CA, c.Cluster.CAFile)
		if err != nil {
			return nil, err
		}
		input.Spec.Cluster = &execCluster{Server: c.Cluster.Server.String(), TLSServerName: c.Cluster.ServerName,
			InsecureSkipTLSVerify: c.Cluster.Insecure, CertificateAuthorityData: ca}
		if c.Cluster.Proxy != nil {
			input.Spec.Cluster.ProxyURL = c.Cluster.Proxy.String()
		}
	}
	info, err := json.Marshal(input)
	if err != nil {
		return nil, err
	}
	command := *c.plugin
	command.Env = append(command.Env[:len(command.Env):len(command.Env)], "KUBERNETES_EXEC_INFO="+string(info))
	out, err := c.query(ctx, command)
	if err != nil {
		if exec.InstallHint != "" {
			err = fmt.Errorf("%w (%s)", err, printable.Line(exec.InstallHint, 300))
		}
		return nil, err
	}
	return readCredential(out, exec.APIVersion)
}

// readCredential parses the output of a plugin.
func readCredential(out []byte, version string) (*credentials, error) {
	var printed execCredential
	if json.Unmarshal(out, &printed) != nil || printed.Kind != execKind {
		return nil, errors.New("the command printed no " + execKind)
	}
	if printed.APIVersion != version {
		return nil, fmt.Errorf("the command printed version %s, but the kubeconfig says %s", printable.Quote(printed.APIVersion), version)
	}
	if printed.Status == nil || printed.Status.Token == "" && printed.Status.ClientCertificateData == "" {
		return nil, errors.New("the command printed neither a token nor a client certificate")
	}
	if printed.Status.Token != "" && !isToken(printed.Status.Token) {
		return nil, errors.New("the command printed a token that contains white space or non-ASCII characters")
	}
	issued := &credentials{token: printed.Status.Token, expires: printed.Status.ExpirationTimestamp}
	if printed.Status.ClientCertificateData != "" {
		var err error
		if issued.certificate, err = keyPair([]byte(printed.Status.ClientCertificateData), []byte(printed.Status.ClientKeyData)); err != nil {
			return nil, fmt.Errorf("the client certificate that the command printed: %w", err)
		}
	}
	return issued, nil
}
