package connector

import (
	"strings"
	"testing"

	"certctl-agent/internal/targetconf"
)

func TestDirPair(t *testing.T) {
	tests := []struct {
		job       string
		cert, key targetconf.Path
		wantErr   string
	}{
		{job: `{"cert_dir": "/tls"}`, cert: "/tls/cert.pem", key: "/tls/key.pem"},
		{job: `{"watch_dir": "/tls/", "cert_file": "a.crt", "key_file": "a.key"}`, cert: "/tls/a.crt", key: "/tls/a.key"},
		{job: `{"cert_dir": "/tls", "cert_file": "key.pem"}`, wantErr: "key_file"},
		{job: `{"cert_dir": "/tls", "cert_file": "../cert.pem"}`, wantErr: "cert_file"},
		{job: `{"cert_dir": "/tls", "key_file": "********"}`, wantErr: "key_file"},
		{job: `{"cert_dir": "/tls", "key_file_mode": "0644"}`, wantErr: "key_file_mode"},
		{job: `{}`, wantErr: "cert_dir"},
	}
	for _, test := range tests {
		config, err := targetconf.Merge([]byte(test.job), "Traefik", map[string]string{"watch_dir": "cert_dir"}, "t1", targetconf.Overlays{})
		if err != nil {
			t.Fatal(err)
		}
		var d DirPair
		var got Pair
		if err = config.Decode(&d); err == nil {
			got, err = d.Pair()
		}
		if got.CertPath != test.cert || got.KeyPath != test.key {
			t.Errorf("%s: got %s and %s, want %s and %s", test.job, got.CertPath, got.KeyPath, test.cert, test.key)
		}
		if (err == nil) != (test.wantErr == "") || err != nil && !strings.Contains(err.Error(), test.wantErr) {
			t.Errorf("%s: got %v, want an error with %q", test.job, err, test.wantErr)
		}
	}
}
