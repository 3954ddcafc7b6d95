package liveserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"certctl-agent/internal/testing/apiserver"
	"certctl-agent/internal/tlsprobe"
)

const (
	kubeNamespace = "web"
	kubeSecret    = "www"
	kubeAgent     = "agent" // the agent's user

	// kubePoll is how often the ingress polls its secret. Real ones watch it.
	kubePoll = 100 * time.Millisecond
)

// StartKubernetes starts a Kubernetes API server and, in this process, a stand-in for an ingress
// controller: a TLS server that serves the pair in a secret and records it in a file.
func StartKubernetes(ctx context.Context, dir string, pair Pair) (*Server, error) {
	etcd, err := program(apiserver.Etcd)
	if err != nil {
		return nil, err
	}
	kube, err := program(apiserver.APIServer)
	if err != nil {
		return nil, err
	}
	home := filepath.Join(dir, "kubernetes")
	if err := os.Mkdir(home, 0o700); err != nil {
		return nil, err
	}
	cluster, err := apiserver.Start(ctx, home, etcd, kube, kubeAgent)
	if err != nil {
		return nil, err
	}
	s, err := startIngress(ctx, dir, cluster, pair)
	if err != nil {
		cluster.Stop()
		return nil, err
	}
	return s, s.ready(ctx)
}

func startIngress(ctx context.Context, dir string, cluster *apiserver.Server, pair Pair) (*Server, error) {
	kubeconfig := filepath.Join(dir, "kubeconfig")
	err := errors.Join(
		cluster.Namespace(ctx, kubeNamespace),
		cluster.Allow(ctx, kubeNamespace, kubeAgent, []string{kubeSecret}, "get", "update"),
		os.WriteFile(kubeconfig, cluster.Kubeconfig(kubeAgent), 0o600),
	)
	if err != nil {
		return nil, err
	}
	_, err = cluster.Do(ctx, http.MethodPost, "/api/v1/namespaces/"+kubeNamespace+"/secrets", map[string]any{
		"metadata": map[string]any{"name": kubeSecret}, "type": "kubernetes.io/tls",
		"data": map[string]any{"tls.crt": pair.Certificate, "tls.key": pair.Key}})
	if err != nil {
		return nil, err
	}
	i := &ingress{cluster: cluster, file: filepath.Join(dir, "served.pem")}
	if err := i.load(ctx); err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	web := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }),
		TLSConfig:         &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return i.current.Load(), nil }},
		ReadHeaderTimeout: 5 * time.Second,
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	address := listener.Addr().String()
	s := &Server{
		Name: "Kubernetes (an ingress of the demo's own)",
		Type: "KubernetesSecrets",
		Config: map[string]any{
			"namespace": kubeNamespace, "secret_name": kubeSecret, "kubeconfig_path": kubeconfig,
			"post_deploy_verify":         map[string]any{"enabled": true, "endpoint": address},
			"post_deploy_verify_backoff": "200ms", "post_deploy_verify_attempts": 20,
		},
		Broken: map[string]any{
			"post_deploy_verify": map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}, "post_deploy_verify_attempts": 1,
		},
		Endpoint: tlsprobe.Endpoint{Address: address},
		CertPath: i.file,
	}
	s.stop = func() error {
		cancel()
		err := web.Close()
		cluster.Stop()
		return err
	}
	s.ended.Go(func() { _ = web.ServeTLS(listener, "", "") })
	s.ended.Go(func() { i.follow(ctx) })
	return s, nil
}

// ingress serves the pair in the secret.
type ingress struct {
	cluster *apiserver.Server
	file    string
	current atomic.Pointer[tls.Certificate]
	loaded  []byte
}

func (i *ingress) follow(ctx context.Context) {
	for {
		select {
		case <-time.After(kubePoll):
			_ = i.load(ctx) // after an error it keeps the last pair
		case <-ctx.Done():
			return
		}
	}
}

func (i *ingress) load(ctx context.Context) error {
	answer, err := i.cluster.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+kubeNamespace+"/secrets/"+kubeSecret, nil)
	if err != nil {
		return err
	}
	var secret struct{ Data map[string][]byte }
	if err := json.Unmarshal(answer, &secret); err != nil {
		return err
	}
	certificate := secret.Data["tls.crt"]
	if bytes.Equal(certificate, i.loaded) {
		return nil
	}
	pair, err := tls.X509KeyPair(certificate, secret.Data["tls.key"])
	if err != nil {
		return err
	}
	if err := os.WriteFile(i.file, certificate, 0o600); err != nil {
		return err
	}
	i.current.Store(&pair)
	i.loaded = certificate
	return nil
}
