package targetconf

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

func common(t *testing.T, config string) (Common, error) {
	t.Helper()
	c, err := Merge(json.RawMessage(config), "NGINX", nil, "t-1", Overlays{})
	if err != nil {
		return Common{}, err
	}
	return c.Common, nil
}

func TestEndpoint(t *testing.T) {
	tests := []struct {
		config string
		want   tlsprobe.Endpoint
	}{
		{`{"host":"a","hostname":"b"}`, tlsprobe.Endpoint{Address: "a:443", ServerName: "a"}},
		{`{"host":"","hostname":"b","port":"8443"}`, tlsprobe.Endpoint{Address: "b:8443", ServerName: "b"}},
		{`{"target":"c","address":"d"}`, tlsprobe.Endpoint{Address: "c:443", ServerName: "c"}},
		{`{"address":"::1"}`, tlsprobe.Endpoint{Address: "[::1]:443", ServerName: "::1"}},
		{`{"address":"[::1]"}`, tlsprobe.Endpoint{Address: "[::1]:443", ServerName: "::1"}},
		{`{"host":"m","port":587}`, tlsprobe.Endpoint{Address: "m:587", ServerName: "m", StartTLS: "smtp"}},
		{`{"host":"m","port":2525,"post_deploy_verify":{"starttls":"smtp"}}`, tlsprobe.Endpoint{Address: "m:2525", ServerName: "m", StartTLS: "smtp"}},
		{`{}`, tlsprobe.Endpoint{}},
	}
	for _, test := range tests {
		c, err := common(t, test.config)
		must(t, err)
		got := c.Endpoint()
		if got == nil && test.want.Address != "" || got != nil && *got != test.want {
			t.Errorf("%s: got %+v, want %+v", test.config, got, test.want)
		}
	}
}

func TestCommonMistakes(t *testing.T) {
	for config, key := range map[string]string{
		`{"port":65536}`:                          "port",
		`{"port":-1}`:                             "port",
		`{"port":"https"}`:                        "port",
		`{"post_deploy_verify_attempts":1000}`:    "post_deploy_verify_attempts",
		`{"backup_retention":-2}`:                 "backup_retention",
		`{"command_timeout":30}`:                  "command_timeout",
		`{"post_deploy_verify":{"enabled":true}}`: "post_deploy_verify.endpoint",
		`{"post_deploy_verify":{"enabled":true,"endpoint":"host"}}`:   "post_deploy_verify.endpoint",
		`{"post_deploy_verify":{"enabled":true,"endpoint":"host:0"}}`: "post_deploy_verify.endpoint",
		`{"post_deploy_verify":{"enabled":true,"endpoint":":443"}}`:   "post_deploy_verify.endpoint",
		`{"post_deploy_verify":{"starttls":"ftp"}}`:                   "post_deploy_verify.starttls",
		`{"post_deploy_verify":{"timeout":"x"}}`:                      "post_deploy_verify.timeout",
	} {
		if _, err := common(t, config); err == nil || !strings.Contains(err.Error(), key+": ") {
			t.Errorf("%s: got %v, want an error that names %s", config, err, key)
		}
	}
	if _, err := common(t, `{"post_deploy_verify":{"enabled":true},"host":"h","backup_retention":-1,"drop_root":"yes"}`); err != nil {
		t.Errorf("the endpoint of the report must also do for the verification: %v", err)
	}
}

// server serves a different certificate on each connection and repeats the last one.
func server(t *testing.T, certificates ...tls.Certificate) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var serving sync.WaitGroup
	serving.Go(func() {
		for i := 0; ; i++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			served := certificates[min(i, len(certificates)-1)]
			_ = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{served}}).HandshakeContext(context.Background())
			conn.Close()
		}
	})
	t.Cleanup(func() { listener.Close(); serving.Wait() })
	return listener.Addr().String()
}

// TestVerifyAsked checks that the probe uses the protocol that the listener needs.
func TestVerifyAsked(t *testing.T) {
	ca := testca.Must(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	onRSA, err := ca.Issue(testca.Template{Key: key})
	must(t, err)
	onECDSA, err := ca.Issue(testca.Template{})
	must(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			header := make([]byte, 16)
			if _, err := io.ReadFull(conn, header); err == nil && string(header[7:11]) == "QUIT" {
				_ = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{onECDSA.TLS(), onRSA.TLS()}}).HandshakeContext(t.Context())
			}
			conn.Close()
		}
	})
	defer serving.Wait()
	defer listener.Close()
	c, err := common(t, `{"post_deploy_verify":{"enabled":true,"endpoint":"`+listener.Addr().String()+`","proxy_protocol":"true"},"post_deploy_verify_attempts":1}`)
	must(t, err)
	for _, leaf := range []*x509.Certificate{onRSA.Leaf, onECDSA.Leaf} {
		if err := c.Verifier(leaf)(t.Context()); err != nil {
			t.Errorf("%v: %v", leaf.PublicKeyAlgorithm, err)
		}
	}
	c, err = common(t, `{"host":"h","post_deploy_verify":{"proxy_protocol":true}}`)
	must(t, err)
	if endpoint := c.Endpoint(); endpoint == nil || !endpoint.ProxyProtocol {
		t.Errorf("the report probes %+v", endpoint)
	}
}

func TestVerify(t *testing.T) {
	ca := testca.Must(t)
	certificate := func() (tls.Certificate, *x509.Certificate) {
		issued, err := ca.Issue(testca.Template{})
		must(t, err)
		return issued.TLS(), issued.Leaf
	}
	before, was := certificate()
	after, want := certificate()

	config := func(endpoint, more string) Common {
		c, err := common(t, `{"post_deploy_verify":{"enabled":true,"endpoint":"`+endpoint+`","timeout":"5s"},"post_deploy_verify_backoff":"1ms"`+more+`}`)
		must(t, err)
		return c
	}
	c := config(server(t, before, before, after), "")
	if err := c.Verifier(want)(t.Context()); err != nil {
		t.Errorf("served at the third attempt: %v", err)
	}
	c = config(server(t, before), `,"post_deploy_verify_attempts":2`)
	err := c.Verifier(want)(t.Context())
	if err == nil || !strings.Contains(err.Error(), "attempt 2 of 2") || !strings.Contains(err.Error(), pemutil.Fingerprint(was)) || !strings.Contains(err.Error(), pemutil.Fingerprint(want)) {
		t.Errorf("never served: got %v, want both fingerprints", err)
	}
	c = config("127.0.0.1:1", `,"post_deploy_verify_attempts":"1"`)
	if err := c.Verifier(want)(t.Context()); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("no listener: got %v", err)
	}
	c = config("127.0.0.1:1", "")
	c.VerifyBackoff = Duration(time.Hour)
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(5*time.Millisecond, func() { cancel(errors.New("shutting down")) })
	if err := c.Verifier(want)(ctx); err == nil {
		t.Error("cancelled: got no error")
	}
	c, err = common(t, `{"post_deploy_verify":{"endpoint":"127.0.0.1:1"}}`)
	if err != nil || c.Verifier(want) != nil {
		t.Errorf("verification is on without enabled: %v", err)
	}
}

// TestVerifyEnds checks that attempts, timeouts and pauses do not add up to days.
func TestVerifyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := common(t, `{"post_deploy_verify":{"enabled":true,"endpoint":"127.0.0.1:1","timeout":"1h"},
			"post_deploy_verify_attempts":100,"post_deploy_verify_backoff":"40s","post_deploy_verify_max_backoff":"1h"}`)
		must(t, err)
		began := time.Now()
		err = c.Verifier(new(x509.Certificate))(t.Context())
		if err == nil || !strings.Contains(err.Error(), "given up after 5m0s") || !strings.Contains(err.Error(), "refused") {
			t.Errorf("got %v, want the limit and the last result", err)
		}
		if took := time.Since(began); took != maxVerify {
			t.Errorf("took %v, want %v", took, maxVerify)
		}
	})
}

// TestManaged checks that the management address of a target is not verified.
func TestManaged(t *testing.T) {
	merge := func(job string) (*Common, error) {
		c, err := Merge([]byte(job), "SSH", nil, "t-1", Overlays{})
		must(t, err)
		return &c.Common, c.Common.MarkRemote()
	}
	c, err := merge(`{"host":"bigip.example.org","port":22}`)
	if err != nil || c.Endpoint() != nil || c.VerifiedAt() != nil {
		t.Errorf("no endpoint: got %v, %v, %v", c.Endpoint(), c.VerifiedAt(), err)
	}
	c, err = merge(`{"host":"bigip.example.org","post_deploy_verify":{"endpoint":"www.example.org:993","server_name":"www"}}`)
	if at := c.Endpoint(); err != nil || at == nil || at.Address != "www.example.org:993" || at.ServerName != "www" || at.StartTLS != "" || c.VerifiedAt() != nil {
		t.Errorf("an endpoint to report: got %+v, %v, %v", at, c.VerifiedAt(), err)
	}
	c, err = merge(`{"post_deploy_verify":{"enabled":true,"endpoint":"www.example.org:443"}}`)
	if at := c.VerifiedAt(); err != nil || at == nil || at.Address != "www.example.org:443" || at.ServerName != "www.example.org" {
		t.Errorf("an endpoint that decides: got %+v, %v", at, err)
	}
	if _, err := merge(`{"host":"bigip.example.org","post_deploy_verify":{"enabled":true}}`); err == nil || !strings.Contains(err.Error(), "post_deploy_verify.endpoint: is required") {
		t.Errorf("enabled without an endpoint: got %v", err)
	}
	if _, err := merge(`{"post_deploy_verify":{"endpoint":"www.example.org"}}`); err == nil || !strings.Contains(err.Error(), "expected host:port") {
		t.Errorf("an endpoint without a port: got %v", err)
	}
}
