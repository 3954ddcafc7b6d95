// Package all is the table of connectors: a new one is added here, one line.
package all

import (
	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/apache"
	"certctl-agent/internal/connector/awsacm"
	"certctl-agent/internal/connector/caddy"
	"certctl-agent/internal/connector/envoy"
	"certctl-agent/internal/connector/f5"
	"certctl-agent/internal/connector/haproxy"
	"certctl-agent/internal/connector/javakeystore"
	"certctl-agent/internal/connector/keyvault"
	"certctl-agent/internal/connector/kubernetes"
	"certctl-agent/internal/connector/mail"
	"certctl-agent/internal/connector/nginx"
	"certctl-agent/internal/connector/ssh"
	"certctl-agent/internal/connector/traefik"
	"certctl-agent/internal/connector/windows"
)

// Types returns the target types that control planes know.
func Types() []connector.Type {
	return []connector.Type{
		nginx.Type(),
		apache.Type(),
		haproxy.Type(),
		traefik.Type(),
		caddy.Type(),
		envoy.Type(),
		mail.Postfix(),
		mail.Dovecot(),
		javakeystore.Type(),
		ssh.Type(),
		f5.Type(),
		kubernetes.Type(),
		awsacm.Type(),
		keyvault.Type(),
		windows.IIS(),
		windows.WinCertStore(),
	}
}
