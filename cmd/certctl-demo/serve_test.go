package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/secret"
)

// output collects what run prints.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

// wait waits until the output matches the pattern, and returns the submatches.
func (o *output) wait(t *testing.T, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		o.mu.Lock()
		text := o.text.String()
		o.mu.Unlock()
		if match := re.FindStringSubmatch(text); match != nil {
			return match
		}
		if time.Now().After(deadline) {
			t.Fatalf("the output has no %s:\n%s", pattern, text)
		}
	}
}

// TestServe: an agent can register with the printed settings, and gets work for the target.
func TestServe(t *testing.T) {
	config := filepath.Join(t.TempDir(), "target.json")
	if err := os.WriteFile(config, []byte(`{"cert_path": "/etc/nginx/tls/www.pem"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var out output
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{"-serve", "127.0.0.1:0", "-type", "NGINX", "-config", config}, &out, &out)
	}()

	settings := out.wait(t, `CERTCTL_SERVER_URL=(\S+)\nexport CERTCTL_SERVER_CA_BUNDLE_PATH=(\S+)\nexport CERTCTL_API_KEY=(\S+)\n`)
	server, err := url.Parse(settings[1])
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(settings[2])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	opts := controlplane.Options{Server: server, Roots: roots, Key: func() secret.String { return secret.New(settings[3]) }}
	registering := controlplane.New(opts)
	defer registering.Close()
	agent, err := registering.Register(t.Context(), api.Registration{Name: "web1", Hostname: "web1"})
	if err != nil {
		t.Fatal(err)
	}
	out.wait(t, `(?m)^`+agent.ID+`: registered as web1\n.*: Issuance of cert-\d+: AwaitingCSR$`)

	opts.AgentID = agent.ID
	working := controlplane.New(opts)
	defer working.Close()
	work, err := working.Work(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(work.Jobs) != 1 || work.Jobs[0].CommonName != commonName {
		t.Errorf("got the work %+v, want one job for %s", work, commonName)
	}

	stop()
	if code := <-ended; code != 0 {
		t.Errorf("exit status %d", code)
	}
	if _, err := os.Stat(settings[2]); err == nil {
		t.Errorf("%s was not removed", settings[2])
	}
}

func TestServeUsage(t *testing.T) {
	config := filepath.Join(t.TempDir(), "target.json")
	if err := os.WriteFile(config, []byte(`["not an object"]`), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args string
		code int
		want string
	}{
		{"-type NGINX -config " + config, 2, "need each other and -serve"},
		{"-serve 127.0.0.1:0 -type NGINX", 2, "need each other and -serve"},
		{"-serve 127.0.0.1:0 extra", 2, "arguments are not allowed"},
		{"-serve 127.0.0.1:0 -type NGINX -config " + config, 1, "is not a JSON object"},
		{"-serve 127.0.0.1:0 -type NGINX -config " + config + ".missing", 1, "read the target's configuration"},
	} {
		var out bytes.Buffer
		if code := run(t.Context(), strings.Fields(test.args), &out, &out); code != test.code || !strings.Contains(out.String(), test.want) {
			t.Errorf("%s: exit status %d, want %d and %q:\n%s", test.args, code, test.code, test.want, out.String())
		}
	}
}
