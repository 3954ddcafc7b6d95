package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"certctl-agent/internal/printable"
)

// execCredential is what a plugin is told, in KUBERNETES_EXEC_INFO, and prints
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

// askPlugin runs the command of the kubeconfig. Its standard output holds
// credentials, and goes into no error.
func (c *client) askPlugin(ctx context.Context) (*credentials, error) {
	exec := c.User.Exec
	if c.query == nil {
		return nil, errors.New("no command can be run here")
	}
	told := execCredential{APIVersion: exec.APIVersion, Kind: execKind}
	if exec.ProvideClusterInfo {
		ca, err := orFile(c.Cluster.CA, c.Cluster.CAFile)
		if err != nil {
			return nil, err
		}
		told.Spec.Cluster = &execCluster{Server: c.Cluster.Server.String(), TLSServerName: c.Cluster.ServerName,
			InsecureSkipTLSVerify: c.Cluster.Insecure, CertificateAuthorityData: ca}
		if c.Cluster.Proxy != nil {
			told.Spec.Cluster.ProxyURL = c.Cluster.Proxy.String()
		}
	}
	info, err := json.Marshal(told)
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

// readCredential reads what a plugin printed.
func readCredential(out []byte, version string) (*credentials, error) {
	var said execCredential
	if json.Unmarshal(out, &said) != nil || said.Kind != execKind {
		return nil, errors.New("the command printed no " + execKind)
	}
	if said.APIVersion != version {
		return nil, fmt.Errorf("the command speaks %s, and the kubeconfig says %s", printable.Quote(said.APIVersion), version)
	}
	if said.Status == nil || said.Status.Token == "" && said.Status.ClientCertificateData == "" {
		return nil, errors.New("the command printed neither a token nor a client certificate")
	}
	if said.Status.Token != "" && !isToken(said.Status.Token) {
		return nil, errors.New("the command printed a token with white space, or something else than ASCII, in it")
	}
	issued := &credentials{token: said.Status.Token, expires: said.Status.ExpirationTimestamp}
	if said.Status.ClientCertificateData != "" {
		var err error
		if issued.certificate, err = keyPair([]byte(said.Status.ClientCertificateData), []byte(said.Status.ClientKeyData)); err != nil {
			return nil, fmt.Errorf("the client certificate that the command printed: %w", err)
		}
	}
	return issued, nil
}
