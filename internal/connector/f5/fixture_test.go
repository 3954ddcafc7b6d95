package f5

import (
	"encoding/json"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/bigip"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

const profileName = "/Common/site/www"

// quick is how long tests retry a call.
const quick = 1500 * time.Millisecond

func newDeviceFor(t testing.TB, version string) *bigip.Device {
	t.Helper()
	d, err := bigip.New(version)
	must(t, err)
	d.Profile(clientSSL, profileName, "")
	d.Profile(serverSSL, profileName, "")
	return d
}

// settings returns the configuration of a target on a device. The trusted CA is in an
// overlay.
func settings(t testing.TB, d *bigip.Device, overlays string) map[string]any {
	t.Helper()
	port := 443
	if d.URL() != "" {
		at, err := url.Parse(d.URL())
		must(t, err)
		port, err = strconv.Atoi(at.Port())
		must(t, err)
		bundle := filepath.Join(overlays, "device-ca.pem")
		must(t, os.WriteFile(bundle, d.CA.PEM(), 0o600))
		overlay(t, overlays, map[string]any{"ca_bundle": bundle})
	}
	return map[string]any{"host": "127.0.0.1", "port": port, "username": bigip.Admin, "password": bigip.Password, "ssl_profile": profileName, "timeout": 10}
}

func overlay(t testing.TB, dir string, values map[string]any) {
	t.Helper()
	data, err := json.Marshal(values)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, conformance.TargetID+".json"), data, 0o600))
}

// fixture is a host and the device that it deploys to.
type fixture struct {
	*conformance.Host
	*bigip.Device
	t      *testing.T
	ca     *testca.CA
	typ    connector.Type
	config map[string]any
}

func newFixture(t *testing.T, version string) *fixture {
	t.Helper()
	f := &fixture{Host: conformance.NewHost(t, conformance.RunCommand), Device: newDeviceFor(t, version), t: t, ca: testca.Must(t), typ: typeOf(quick)}
	must(t, f.Start())
	t.Cleanup(f.Stop)
	f.config = settings(t, f.Device, f.Overlays)
	return f
}

func (f *fixture) deploy(m *connector.Material, more ...any) (transaction.Result, error) {
	f.t.Helper()
	return f.Host.Deploy(f.t.Context(), f.typ, conformance.With(f.config, more...), m)
}

func (f *fixture) mustDeploy(m *connector.Material, more ...any) transaction.Result {
	f.t.Helper()
	result, err := f.deploy(m, more...)
	if err != nil {
		f.t.Fatalf("deploy: %v", err)
	}
	return result
}

func (f *fixture) material() *connector.Material { f.t.Helper(); return f.Material(f.t, f.ca) }

// running returns the device's running state.
func (f *fixture) running() map[string]string {
	state := f.State()
	maps.DeleteFunc(state, func(name, _ string) bool {
		return strings.HasSuffix(name, bigip.Saved) || strings.HasSuffix(name, bigip.Peer)
	})
	return state
}

// holds fails the test unless the profile uses m, everything is saved, and
// nothing is left over.
func (f *fixture) holds(m *connector.Material) {
	f.t.Helper()
	leaf := leafPath(m)
	state := f.running()
	if !strings.Contains(state[clientSSL+" "+profileName], `"Cert":"`+leaf+`.crt","Key":"`+leaf+`.key"`) || state["ssl-key "+leaf+".key"] != string(m.Key()) {
		f.t.Errorf("the profile is %s", state[clientSSL+" "+profileName])
	}
	if saved, _ := f.InSync(); !saved {
		f.t.Error("the configuration is not saved")
	}
	f.clean()
}

// clean fails the test if uploads or tokens remain.
func (f *fixture) clean() {
	f.t.Helper()
	for name, value := range f.running() {
		if strings.HasPrefix(name, "upload ") || name == "tokens" {
			f.t.Errorf("%s is left (%.20s)", name, value)
		}
	}
}

func leafPath(m *connector.Material) string {
	return "/Common/certctl-" + conformance.TargetID + "-" + fingerprint(m)[:markDigits]
}

// unverified returns a configuration whose verification fails.
func unverified() []any {
	return []any{"post_deploy_verify", map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}, "post_deploy_verify_attempts", 1}
}

// inMemory is Type without TCP and TLS, for tests that make thousands of calls, or
// take their time.
func inMemory(of func(dir string) *bigip.Device) connector.Type {
	return connector.Type{Name: "F5", New: func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		made, err := newConnector(c, host, 0)
		if err != nil {
			return nil, err
		}
		t := made.(*target)
		t.device = newDevice(&t.config, t.device.address, of(filepath.Join(filepath.Dir(host.StateDir), "target")).Dial, 0)
		t.device.base = "http://" + t.device.address
		return t, nil
	}}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// devices are the devices of the conformance suite's targets, by directory.
type devices struct {
	t    *testing.T
	mu   sync.Mutex
	made map[string]*bigip.Device
}

func (s *devices) of(dir string) *bigip.Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.made[dir] == nil {
		s.made[dir] = newDeviceFor(s.t, "13.1.0")
	}
	return s.made[dir]
}
