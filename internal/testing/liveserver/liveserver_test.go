package liveserver_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

// Each product serves its first pair on all its endpoints, and on none after it has been stopped.
func TestStarters(t *testing.T) {
	issued, err := testca.Must(t).Issue(testca.Template{Names: []string{"127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	pair := liveserver.Pair{Certificate: issued.PEM(), Key: issued.KeyPEM()}
	for name, start := range liveserver.Starters() {
		t.Run(name, func(t *testing.T) {
			if name == "postfix" {
				needs.Root(t, "starting Postfix")
			}
			dir := t.TempDir()
			// Unprivileged workers must be able to enter it.
			if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
				t.Fatal(err)
			}
			server, err := start(t.Context(), dir, pair)
			if errors.Is(err, liveserver.ErrMissing) {
				needs.Missing(t, err.Error())
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(server.Stop)
			endpoints := append(server.Others, server.Endpoint)
			for _, endpoint := range endpoints {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				got, err := tlsprobe.Probe(ctx, endpoint)
				cancel()
				if err != nil || got.Fingerprint != pemutil.Fingerprint(issued.Leaf) {
					t.Errorf("%+v: got %s, %v", endpoint, got.Fingerprint, err)
				}
			}
			server.Stop()
			for _, endpoint := range endpoints {
				if conn, err := net.Dial("tcp", endpoint.Address); err == nil {
					conn.Close()
					t.Errorf("%s still listens after the server was stopped", endpoint.Address)
				}
			}
		})
	}
}
