package javakeystore

import (
	"bytes"
	"context"
	"encoding/pem"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/pkcs12"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

const (
	password    = "changeit-Tr0ub4dor"
	keyPassword = "of-the-key-3lm0"
)

func configIn(dir, format string) map[string]any {
	return map[string]any{
		"keystore_path":     filepath.Join(dir, "server.store"),
		"keystore_password": password,
		"keystore_type":     format,
		"validate_command":  "java-server check",
		"reload_command":    "systemctl reload java-server",
	}
}

// found returns the entry of an alias as PEM.
func found(t testing.TB, data []byte, alias, password, keyPassword string) []byte {
	t.Helper()
	format, err := formatOf(data)
	if err != nil {
		t.Fatal(err)
	}
	s, err := format.open(data, password, false)
	if err != nil {
		t.Fatal(err)
	}
	k, err := s.Find(alias, keyPassword)
	if err != nil || k == nil {
		t.Fatalf("%s: %v, %v", alias, k, err)
	}
	return append(conformance.PEM(k.Chain...), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k.PKCS8})...)
}

// want returns the result of found for m.
func want(m *connector.Material) []byte {
	e, err := newEntry(m, "", "")
	if err != nil {
		panic(err) // a test's own key
	}
	return append(conformance.PEM(e.Chain...), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: e.PKCS8})...)
}

func TestConformance(t *testing.T) {
	for name, set := range map[string]map[string]any{
		"PKCS12": {"alias": "Web"},
		"JKS":    {"keystore_type": "jks", "key_password": keyPassword},
	} {
		t.Run(name, func(t *testing.T) {
			of, alias := password, "server"
			if set["key_password"] != nil {
				of = keyPassword
			}
			if set["alias"] != nil {
				alias = "web"
			}
			var opened sync.Map // content of the stores, since opening one is slow
			conformance.Run(t, conformance.Harness{
				Type: Type(), Required: []string{"keystore_path", "keystore_password"}, Secrets: []string{password, keyPassword},
				Config: func(dir string) map[string]any {
					config := configIn(dir, "PKCS12")
					maps.Copy(config, set)
					return config
				},
				State: func(dir string) map[string]string {
					state := conformance.Files(dir)
					if data := state["server.store"]; data != "" {
						holds, known := opened.Load(data)
						if !known {
							holds = string(found(t, []byte(data), alias, password, of))
							opened.Store(data, holds)
						}
						state["server.store"] = holds.(string)
					}
					return state
				},
				Want: func(m *connector.Material) map[string][]byte {
					return map[string][]byte{"server.store": want(m)}
				},
			})
		})
	}
}

// world is a host with a key store.
type world struct {
	*conformance.Host
	ca   *testca.CA
	path string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	host := conformance.NewHost(t, func(context.Context, policy.Command) error { return nil })
	return &world{host, testca.Must(t), filepath.Join(host.Dir, "server.store")}
}

func (w *world) write(t *testing.T, data []byte) {
	t.Helper()
	if err := os.WriteFile(w.path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (w *world) read(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(w.path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// store returns a store with other keys than the agent's.
func (w *world) store(t *testing.T, format string, aliases ...string) []byte {
	t.Helper()
	p, j := pkcs12.New(password, false), jks.New(password)
	for _, alias := range aliases {
		e, err := newEntry(w.Material(t, w.ca), alias, "someone else's")
		if err != nil {
			t.Fatal(err)
		}
		s := store(pkcs12Store{p, false})
		if format == "JKS" {
			s = jksStore{j}
		}
		if _, err := s.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	if format == "JKS" {
		return j.Encode()
	}
	data, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestOthers: other entries stay, even those with passwords that the agent does not know.
func TestOthers(t *testing.T) {
	for _, format := range []string{"PKCS12", "legacy", "JKS"} {
		w := newWorld(t)
		before := w.store(t, format, "first", "last")
		w.write(t, before)
		others := [][]byte{
			found(t, before, "first", password, "someone else's"),
			found(t, before, "last", password, "someone else's"),
		}
		config := configIn(w.Dir, "")
		config["legacy_ciphers"] = format == "legacy"
		for range 2 {
			m := w.Material(t, w.ca)
			for _, unchanged := range []bool{false, true} {
				result, err := w.Deploy(t.Context(), Type(), config, m)
				if err != nil || result.Unchanged != unchanged {
					t.Fatalf("%s: got %+v, %v, want it unchanged: %v", format, result, err, unchanged)
				}
				data := w.read(t)
				const sha256 = "\x60\x86\x48\x01\x65\x03\x04\x02\x01" // of the MAC; the older form has SHA-1
				if got := bytes.Contains(data, []byte(sha256)); got != (format == "PKCS12") {
					t.Errorf("%s: written with newer methods: %v", format, got)
				}
				if got := found(t, data, "server", password, password); !bytes.Equal(got, want(m)) {
					t.Errorf("%s: got\n%swant\n%s", format, got, want(m))
				}
				for i, alias := range []string{"first", "last"} {
					if got := found(t, data, alias, password, "someone else's"); !bytes.Equal(got, others[i]) {
						t.Errorf("%s: %s changed", format, alias)
					}
				}
			}
		}
	}
}

// TestRefused: nothing is changed, and the error says what to do.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	jceks, err := os.ReadFile("../../jks/testdata/java.jceks")
	if err != nil {
		t.Fatal(err)
	}
	good := w.store(t, "PKCS12", "other")
	trusted, err := os.ReadFile("../../pkcs12/testdata/java8.p12")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		what   string
		is     []byte
		config map[string]any
		says   string
	}{
		{"a wrong password", good, map[string]any{"keystore_password": "wrong-one"}, "keystore_password does not open it"},
		{"a wrong password of JKS", w.store(t, "JKS", "other"), map[string]any{"keystore_password": "wrong-one", "keystore_type": ""}, "keystore_password does not open it"},
		{"another type", w.store(t, "JKS", "other"), nil, "it is of type JKS, and keystore_type is PKCS12"},
		{"damage", good[:len(good)-7], nil, "server.store"},
		{"text", []byte("-----BEGIN CERTIFICATE-----\n"), nil, "neither PKCS12 nor JKS"},
		{"JCEKS", jceks, map[string]any{"keystore_type": "JKS"}, "JCEKS"},
		{"a trusted certificate", trusted, map[string]any{"keystore_password": "correct horse", "alias": "ROOT"}, "configure another alias"},
		{"nothing there", nil, map[string]any{"create_keystore": "false"}, "create_keystore is false"},
		{"a key with a different password", w.store(t, "JKS", "server"), map[string]any{"keystore_type": "JKS"}, "set key_password"},
		{"the same in PKCS12", w.store(t, "PKCS12", "server"), nil, "set key_password"},
		{"a password that Java does not take", nil, map[string]any{"keystore_password": "wröng-one"}, "printable ASCII"},
		{"such a one for the key", good, map[string]any{"key_password": "wrong-one\t"}, "printable ASCII"},
		{"a type that is not there", good, map[string]any{"keystore_type": "BCFKS"}, "keystore_type: expected PKCS12 or JKS"},
		{"a strange alias", good, map[string]any{"alias": "a\nb"}, "alias: expected"},
		{"masked", good, map[string]any{"keystore_password": "********"}, "keystore_password: the control plane sent it masked"},
		{"masked, and nothing there", nil, map[string]any{"keystore_type": "********"}, "keystore_type: the control plane sent it masked"},
	} {
		os.Remove(w.path)
		if test.is != nil {
			w.write(t, test.is)
		}
		config := configIn(w.Dir, "PKCS12")
		maps.Copy(config, test.config)
		_, err := w.Deploy(t.Context(), Type(), config, w.Material(t, w.ca))
		if err == nil || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), "wrong-one") {
			t.Errorf("%s: got %v, want an error with %q", test.what, err, test.says)
		}
		if is, err := os.ReadFile(w.path); test.is == nil && err == nil || !bytes.Equal(is, test.is) {
			t.Errorf("%s: the store was touched", test.what)
		}
	}
	if log := w.Log(); strings.Contains(log, password) || strings.Contains(log, "wrong-one") {
		t.Error("the log holds a password")
	}
}

// TestTrustStore: the trust store of other programs is not changed.
func TestTrustStore(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"testdata/trusted.jks", "testdata/trusted.p12"} {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		w.write(t, data)
		config := configIn(w.Dir, "")
		config["keystore_password"] = "correct horse"
		for _, mode := range []os.FileMode{0o644, 0o640} {
			if err := os.Chmod(w.path, mode); err != nil {
				t.Fatal(err)
			}
			_, err := w.Deploy(t.Context(), Type(), config, w.Material(t, w.ca))
			if mode == 0o644 && (err == nil || !strings.Contains(err.Error(), "no private key") || !bytes.Equal(w.read(t), data)) || mode == 0o640 && err != nil {
				t.Errorf("%s with mode %04o: %v", name, mode, err)
			}
		}
	}
}

// TestMasked: masked settings come from an overlay. The type of an existing store needs
// none, and the path of keytool is never needed.
func TestMasked(t *testing.T) {
	w := newWorld(t)
	w.write(t, w.store(t, "JKS", "other"))
	overlay := `{"keystore_path": "` + w.path + `", "keystore_password": "` + password + `"}`
	if err := os.WriteFile(filepath.Join(w.Overlays, conformance.TargetID+".json"), []byte(overlay), 0o600); err != nil {
		t.Fatal(err)
	}
	const mask = "********"
	m := w.Material(t, w.ca)
	config := map[string]any{
		"keystore_path": mask, "keystore_password": mask, "keystore_type": mask, "keytool_path": mask, "backup_dir": "/var/backups", "create_keystore": true,
	}
	if _, err := w.Deploy(t.Context(), Type(), config, m); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(w.Log(), "are unknown") {
		t.Errorf("keys of other agents are unknown: %s", w.Log())
	}
	if got := found(t, w.read(t), "server", password, password); !bytes.Equal(got, want(m)) {
		t.Errorf("got\n%swant\n%s", got, want(m))
	}
}

// TestCaveat: a deployment without a reload logs a warning if it changed something.
func TestCaveat(t *testing.T) {
	w := newWorld(t)
	config := configIn(w.Dir, "PKCS12")
	delete(config, "reload_command")
	m := w.Material(t, w.ca)
	for _, want := range []int{1, 0} {
		result, err := w.Deploy(t.Context(), Type(), config, m)
		if err != nil || len(result.Warnings) != want || want > 0 && !strings.Contains(result.Warnings[0], "reload_command is not set") {
			t.Errorf("got %q, %v", result.Warnings, err)
		}
	}
}

// TestChangedMeanwhile: if another program writes the store while the deployment is prepared, it is
// read again.
func TestChangedMeanwhile(t *testing.T) {
	w := newWorld(t)
	w.write(t, w.store(t, "PKCS12", "first"))
	c, err := w.Connector(Type(), configIn(w.Dir, "PKCS12"))
	if err != nil {
		t.Fatal(err)
	}
	m := w.Material(t, w.ca)
	plan, err := c.Plan(t.Context(), m)
	if err != nil || !bytes.Equal(plan.Files[0].From, w.read(t)) {
		t.Fatalf("the plan does not say what it was made from: %v", err)
	}
	os.Remove(w.path)
	if plan, err = c.Plan(t.Context(), m); err != nil || plan.Files[0].From == nil || len(plan.Files[0].From) > 0 {
		t.Errorf("without a store: from %v, %v", plan.Files[0].From, err)
	}
}

// TestOwnKey: a store of another user, like Tomcat's, keeps its owner in a renewal.
func TestOwnKey(t *testing.T) {
	needs.Root(t, "giving files away")
	w := newWorld(t)
	config := configIn(w.Dir, "PKCS12")
	owned := maps.Clone(config)
	owned["keystore_owner"], owned["keystore_group"] = "4201", "4202"
	if err := os.Chown(w.Dir, 4201, 4202); err != nil {
		t.Fatal(err)
	}
	first := w.Material(t, w.ca)
	if _, err := w.Deploy(t.Context(), Type(), owned, first, conformance.Promotion(first)); err != nil {
		t.Fatal(err)
	}
	second := w.Material(t, w.ca)
	if _, err := w.Deploy(t.Context(), Type(), config, second, conformance.Promotion(second)); err != nil {
		t.Errorf("a renewal of the agent's own key: %v", err)
	}
	w.write(t, w.store(t, "PKCS12", "server"))
	config["key_password"] = keyPassword
	if _, err := w.Deploy(t.Context(), Type(), config, w.Material(t, w.ca)); err == nil || !strings.Contains(err.Error(), "is not given to") {
		t.Errorf("a store that someone else has put there: got %v", err)
	}
}

// TestHuge: the time for a hostile store is bounded.
func TestHuge(t *testing.T) {
	w := newWorld(t)
	w.write(t, make([]byte, maxStore+1))
	if _, err := w.Deploy(t.Context(), Type(), configIn(w.Dir, "PKCS12"), w.Material(t, w.ca)); err == nil {
		t.Error("a file of any size is read")
	}
	os.Remove(w.path)
	if err := os.Mkdir(w.path, 0o700); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if _, err := w.Deploy(t.Context(), Type(), configIn(w.Dir, "PKCS12"), w.Material(t, w.ca)); err == nil || time.Since(begun) > time.Minute {
		t.Errorf("a directory: %v after %v", err, time.Since(begun))
	}
}

// TestNotRead: the control plane learns nothing about files that it may not write.
func TestNotRead(t *testing.T) {
	w := newWorld(t)
	w.Policy.Paths = []string{filepath.Join(w.Dir, "elsewhere")}
	w.write(t, []byte("a text"))
	_, err := w.Deploy(t.Context(), Type(), configIn(w.Dir, "PKCS12"), w.Material(t, w.ca))
	if err == nil || !strings.Contains(err.Error(), "CERTCTL_ALLOWED_PATHS") {
		t.Errorf("got %v, want a refusal of the path", err)
	}
}
