// Package all is the table of connectors: a new one is added here, one line.
package all

import (
	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/apache"
	"certctl-agent/internal/connector/caddy"
	"certctl-agent/internal/connector/envoy"
	"certctl-agent/internal/connector/haproxy"
	"certctl-agent/internal/connector/mail"
	"certctl-agent/internal/connector/nginx"
	"certctl-agent/internal/connector/traefik"
	"certctl-agent/internal/transaction"
)

// Connectors are the supported target types, by the names that the control
// plane uses. The file-based ones share one Store.
func Connectors(files *transaction.Store) map[string]connector.Factory {
	return map[string]connector.Factory{
		"NGINX":   onFiles(files, nginx.New),
		"Apache":  onFiles(files, apache.New),
		"HAProxy": onFiles(files, haproxy.New),
		"Traefik": onFiles(files, traefik.New),
		"Caddy":   onFiles(files, caddy.New),
		"Envoy":   onFiles(files, envoy.New),
		"Postfix": onFiles(files, mail.NewPostfix),
		"Dovecot": onFiles(files, mail.NewDovecot),
	}
}

// onFiles makes a Factory of a connector's constructor.
func onFiles[C connector.Connector](files *transaction.Store, build func(connector.Params, *transaction.Store) (C, error)) connector.Factory {
	return func(p connector.Params) (connector.Connector, error) {
		c, err := build(p, files)
		if err != nil {
			return nil, err // and not a C that is nil in an interface that is not
		}
		return c, nil
	}
}
