package caddy

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

const running = `{"apps":{"http":{"servers":{}},"tls":{"certificates":{"load_files":[{"certificate":"c","key":"k"}]}}}}`

func fullChain(m *connector.Material) []byte {
	return append(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...)...)
}

func TestConformance(t *testing.T) {
	pair := func(m *connector.Material) map[string][]byte {
		return map[string][]byte{"cert.pem": fullChain(m), "key.pem": m.KeyPEM}
	}
	t.Run("api", func(t *testing.T) {
		servers := new(sync.Map) // a fake for each directory
		api := func(dir string) *fake {
			if api, ok := servers.Load(dir); ok {
				return api.(*fake)
			}
			api := newFake(t, running)
			servers.Store(dir, api)
			return api
		}
		conformance.Run(t, conformance.Harness{
			Type:   Type(),
			Config: func(dir string) map[string]any { return map[string]any{"admin_url": api(dir).URL} },
			State: func(dir string) map[string]string {
				return map[string]string{
					"load_pem":                      strings.Trim(api(dir).get("apps/tls/certificates/load_pem"), "nul[]"),
					"load_files":                    api(dir).get("apps/tls/certificates/load_files"),
					"changes" + conformance.Written: fmt.Sprint(api(dir).made()),
				}
			},
			Want: func(m *connector.Material) map[string][]byte {
				return map[string][]byte{"load_pem": []byte(element(m, ourTag)), "load_files": []byte(`[{"certificate":"c","key":"k"}]`)}
			},
		})
	})
	t.Run("file, reload by command", func(t *testing.T) {
		conformance.Run(t, conformance.Harness{
			Type: Type(), Required: []string{"cert_dir"}, Want: pair,
			Config: func(dir string) map[string]any {
				return map[string]any{"mode": "file", "cert_dir": dir, "reload_command": "caddy reload --force"}
			},
		})
	})
	t.Run("file, reload by the admin API", func(t *testing.T) {
		api := newFake(t, running)
		conformance.Run(t, conformance.Harness{
			Type: Type(), Required: []string{"cert_dir"}, Want: pair,
			Config: func(dir string) map[string]any {
				return map[string]any{"mode": "file", "cert_dir": dir, "admin_api": api.URL}
			},
		})
		for _, change := range api.made() {
			if change != "POST /load must-revalidate" {
				t.Errorf("it made the change %q", change)
			}
		}
		if got := api.get(""); got != running {
			t.Errorf("the configuration is %s, want %s", got, running)
		}
	})
}

func TestNew(t *testing.T) {
	tests := []struct {
		config map[string]any
		says   string // "": no error
	}{
		{map[string]any{}, ""},
		{map[string]any{"mode": "", "admin_api": ""}, ""},
		{map[string]any{"key_file": "********", "cert_dir": 5}, ""}, // of mode file
		{map[string]any{"mode": "both"}, "mode"},
		{map[string]any{"admin_api": "http://192.0.2.1:2019"}, "overlay"},
		{map[string]any{"admin_url": "ftp://localhost"}, "admin_api"},
		{map[string]any{"mode": "file", "cert_dir": "/tls", "admin_api": "http://192.0.2.1"}, "overlay"},
		{map[string]any{"mode": "file", "cert_dir": "/tls", "admin_api": "http://192.0.2.1", "reload_command": "caddy reload"}, ""}, // the address is not used
		{map[string]any{"mode": "file", "cert_dir": "/tls", "key_file": "********"}, "key_file"},
	}
	host := conformance.NewHost(t, nil)
	for _, test := range tests {
		_, err := host.Connector(Type(), test.config)
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%v: got %v, want an error with %q", test.config, err, test.says)
		}
	}
	overlay := filepath.Join(host.Overlays, conformance.TargetID+".json")
	if err := os.WriteFile(overlay, []byte(`{"admin_url": "https://192.0.2.1:2021"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Connector(Type(), map[string]any{"admin_api": "http://192.0.2.2"}); err != nil {
		t.Errorf("an address that the overlay names: %v", err)
	}
}

// fixture is a host and the admin API that it deploys to.
type fixture struct {
	*conformance.Host
	api    *fake
	ca     *testca.CA
	config map[string]any
}

func newFixture(t *testing.T, config string) *fixture {
	f := &fixture{Host: conformance.NewHost(t, conformance.RunCommand), api: newFake(t, config), ca: testca.Must(t)}
	f.config = map[string]any{"admin_api": f.api.URL}
	return f
}

func (f *fixture) deploy(ctx context.Context, m *connector.Material) (transaction.Result, error) {
	return f.Deploy(ctx, Type(), f.config, m)
}

// element returns m as an element of load_pem.
func element(m *connector.Material, tags ...string) string {
	data, _ := json.Marshal(loadedPair{string(fullChain(m)), string(m.KeyPEM), tags})
	return string(data)
}

const ourTag = tagPrefix + conformance.TargetID

func TestDeployByAPI(t *testing.T) {
	other := `{"certificate":"C","key":"K","tags":["certctl:other"]}`
	ours := `{"certificate":"C","key":"K","tags":["site","` + ourTag + `"]}`
	tests := []struct {
		name, config string
		change       string
		want         func(m *connector.Material) string // of the whole configuration
	}{
		{"no configuration", `null`, "PUT", func(m *connector.Material) string {
			return fmt.Sprintf(`{"apps":{"tls":{"certificates":{"load_pem":[%s]}}}}`, element(m, ourTag))
		}},
		{"no TLS app", `{"apps":{"http":{}}}`, "PUT", func(m *connector.Material) string {
			return fmt.Sprintf(`{"apps":{"http":{},"tls":{"certificates":{"load_pem":[%s]}}}}`, element(m, ourTag))
		}},
		{"no list", `{"apps":{"tls":{"certificates":{"automate":["a"]}}}}`, "POST", func(m *connector.Material) string {
			return fmt.Sprintf(`{"apps":{"tls":{"certificates":{"automate":["a"],"load_pem":[%s]}}}}`, element(m, ourTag))
		}},
		{"others", `{"apps":{"tls":{"certificates":{"load_pem":[` + other + `]}}}}`, "POST", func(m *connector.Material) string {
			return fmt.Sprintf(`{"apps":{"tls":{"certificates":{"load_pem":[%s,%s]}}}}`, other, element(m, ourTag))
		}},
		{"ours among others", `{"apps":{"tls":{"certificates":{"load_pem":[` + other + "," + ours + "," + other + `]}}}}`, "PATCH", func(m *connector.Material) string {
			return fmt.Sprintf(`{"apps":{"tls":{"certificates":{"load_pem":[%s,%s,%s]}}}}`, other, element(m, "site", ourTag), other)
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t, test.config)
			m := f.Material(t, f.ca)
			result, err := f.deploy(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			if result.Unchanged || len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], "--resume") {
				t.Errorf("got %+v, want a change, and a warning of --resume", result)
			}
			if got, want := f.api.get(""), test.want(m); got != want {
				t.Errorf("got %s\nwant %s", got, want)
			}
			if result, err = f.deploy(t.Context(), m); err != nil || !result.Unchanged {
				t.Errorf("deployed again: %+v, %v, want no change", result, err)
			}
			if changes := f.api.made(); len(changes) != 1 || !strings.HasPrefix(changes[0], test.change) {
				t.Errorf("changes %q, want one %s", changes, test.change)
			}
			if files, err := os.ReadDir(f.Dir); err != nil || len(files) > 0 {
				t.Errorf("files were written: %v, %v", files, err)
			}
		})
	}
}

// A pending key is promoted together with its certificate, and not before.
func TestKeyPromotion(t *testing.T) {
	f := newFixture(t, running)
	m := f.Material(t, f.ca)
	f.api.before = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			return false
		}
		if data, err := os.ReadFile(m.KeyPath); err != nil || string(data) != string(m.KeyPEM) {
			t.Errorf("when Caddy gets the certificate, its key is not in place: %v", err)
		}
		http.Error(w, `{"error":"not today"}`, http.StatusInternalServerError)
		return true
	}
	promoted := func() (transaction.Result, error) {
		return f.Deploy(t.Context(), Type(), f.config, m, conformance.Promotion(m))
	}
	if _, err := promoted(); err == nil || !strings.Contains(err.Error(), "not today") {
		t.Errorf("got %v, want Caddy's own words", err)
	}
	if _, err := os.Stat(m.KeyPath); !os.IsNotExist(err) {
		t.Errorf("the key is still in place (%v)", err)
	}
	f.api.before = nil
	if _, err := promoted(); err != nil {
		t.Fatal(err)
	}
	// The same pair with a key that is not promoted yet is a change.
	if err := os.Remove(m.KeyPath); err != nil {
		t.Fatal(err)
	}
	if result, err := promoted(); err != nil || result.Unchanged {
		t.Errorf("got %+v, %v, want a change", result, err)
	}
	if _, err := os.Stat(m.KeyPath); err != nil {
		t.Error(err)
	}
}
