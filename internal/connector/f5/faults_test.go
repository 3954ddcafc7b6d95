package f5

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/bigip"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// remote returns a fixture without TCP and TLS, for tests in virtual time.
func remote(t *testing.T, version string) *fixture {
	t.Helper()
	f := &fixture{Host: conformance.NewHost(t, conformance.RunCommand), Device: newDeviceFor(t, version), t: t, ca: testca.Must(t)}
	f.typ = inMemory(func(string) *bigip.Device { return f.Device })
	f.config = settings(t, f.Device, f.Overlays)
	f.config["timeout"] = 20
	return f
}

var faults = []bigip.Fault{bigip.Fail, bigip.Busy, bigip.Drop, bigip.Lose, bigip.Hang, bigip.Expire, bigip.Reboot, bigip.RebootAfter, bigip.Garbage}

// TestFaults makes each call of a renewal fail in every way, including those that
// remove older files. The deployment either succeeds or changes nothing,
// and the next one succeeds.
func TestFaults(t *testing.T) {
	t.Setenv("TMPDIR", needs.MemoryDir(t)) // the engine syncs its files
	succeeded, failed := 0, 0
	for k, fault := range faults {
		synctest.Test(t, func(t *testing.T) {
			f := remote(t, "17.1.1")
			f.config["device_group"], f.config["backup_retention"] = bigip.Group, -1
			f.mustDeploy(f.material())
			f.Forget()
			f.mustDeploy(f.material())
			for i, call := range f.Calls() {
				n := i + 1
				// Adjacent calls are similar, and reads are retried.
				if (n+k)%2 > 0 || call.Method == "GET" && (n+k)%6 > 0 {
					continue
				}
				if disturbed(t, f, fault, n) {
					succeeded++
				} else {
					failed++
				}
			}
		})
	}
	t.Logf("%d deployments succeeded, %d failed", succeeded, failed)
	if succeeded < 50 || failed < 20 {
		t.Error("want more of both")
	}
}

// disturbed makes the n-th call of a renewal fail. It reports whether the renewal
// succeeded.
func disturbed(t *testing.T, f *fixture, fault bigip.Fault, n int) bool {
	f.Reboot() // drop leaked tokens
	before := f.running()
	f.Forget()
	f.OnCall(func(c bigip.Call) bigip.Fault {
		if c.N != n {
			return bigip.None
		}
		return fault
	})
	m := f.material()
	result, err := f.deploy(m)
	f.OnCall(nil)
	at := f.Calls()[n-1]
	name := fmt.Sprintf("%v at call %d, %s %s", fault, n, at.Method, at.Path)
	leaked := at.Is("POST", "/mgmt/shared/authn/login") || fault == bigip.Hang && at.Is("DELETE", "/mgmt/shared/authz/tokens/")
	left := func() {
		for entry, value := range f.running() {
			if strings.HasPrefix(entry, "upload ") || entry == "tokens" && !leaked {
				t.Errorf("%s: %v, %q: %s is left: %.30s", name, err, result.Warnings, entry, value)
			}
		}
	}
	after := f.running()
	delete(after, "tokens")
	switch {
	case conformance.Broken(err):
		t.Errorf("%s: %v", name, err)
	case err != nil:
		if !maps.Equal(before, after) {
			t.Errorf("%s: %v, and the device changed to %v", name, err, slices.Sorted(maps.Keys(after)))
		}
		left()
	case !strings.Contains(after[clientSSL+" "+profileName], leafPath(m)):
		t.Errorf("%s: success, and the profile is %s", name, after[clientSSL+" "+profileName])
	case len(result.Warnings) == 0:
		left()
		if saved, synced := f.InSync(); !saved || !synced {
			t.Errorf("%s: success without a warning: saved %v, synced %v", name, saved, synced)
		}
	}
	if said := fmt.Sprint(err, result.Warnings, f.Log()); strings.Contains(said, bigip.Password) || strings.Contains(said, "TOKEN0") {
		t.Errorf("%s: a secret shows: %s", name, said)
	}
	f.mustDeploy(m)
	if !strings.Contains(f.running()[clientSSL+" "+profileName], leafPath(m)) {
		t.Errorf("%s: the next deployment did not install", name)
	}
	left()
	if saved, synced := f.InSync(); !saved || !synced {
		t.Errorf("%s: after the next deployment: saved %v, synced %v", name, saved, synced)
	}
	return err == nil
}

// TestGone: the device is unreachable from the n-th call on. When it is back, the
// next deployment repairs everything.
func TestGone(t *testing.T) {
	t.Setenv("TMPDIR", needs.MemoryDir(t))
	for n := 1; ; n += 3 {
		ended := false
		synctest.Test(t, func(t *testing.T) {
			f := remote(t, "15.1.2")
			f.mustDeploy(f.material())
			f.Forget()
			f.OnCall(func(c bigip.Call) bigip.Fault {
				if c.N >= n {
					return []bigip.Fault{bigip.Busy, bigip.Unregistered}[n%2]
				}
				return bigip.None
			})
			m := f.material()
			_, err := f.deploy(m)
			if err != nil && strings.Contains(err.Error(), "make it on the device") {
				t.Errorf("gone from call %d: %v", n, err)
			}
			ended = len(f.Calls()) < n
			if err == nil && !strings.Contains(f.running()[clientSSL+" "+profileName], leafPath(m)) {
				t.Errorf("gone from call %d: success, and the profile is %s", n, f.running()[clientSSL+" "+profileName])
			}
			f.OnCall(nil)
			f.Reboot()
			f.Restart(t)
			f.mustDeploy(m)
			f.holds(m)
		})
		if ended {
			return
		}
	}
}

// TestFailOver: the other unit of the pair answers from the n-th call on, without
// unsynced changes. A successful deployment is on both.
func TestFailOver(t *testing.T) {
	t.Setenv("TMPDIR", needs.MemoryDir(t))
	synctest.Test(t, func(t *testing.T) {
		f := remote(t, "17.1.1")
		f.config["device_group"] = bigip.Group
		f.mustDeploy(f.material())
		for n, ended := 1, false; !ended; n++ {
			f.Reboot() // drop leaked tokens
			f.Forget()
			f.OnCall(func(c bigip.Call) bigip.Fault {
				if c.N == n {
					return bigip.FailOver
				}
				return bigip.None
			})
			m := f.material()
			result, err := f.deploy(m)
			ended = len(f.Calls()) < n
			_, synced := f.InSync()
			if in := strings.Contains(f.running()[clientSSL+" "+profileName], leafPath(m)); err == nil && len(result.Warnings) == 0 && !(in && synced) {
				t.Errorf("fail-over at call %d: success, installed %v, synced %v", n, in, synced)
			}
			f.OnCall(nil)
			f.mustDeploy(m)
			f.holds(m)
			if _, synced := f.InSync(); !synced {
				t.Errorf("fail-over at call %d: not synced after the next deployment", n)
			}
		}
	})
}

// TestNotRemoved: rm fails on the device, but the answer is a success.
func TestNotRemoved(t *testing.T) {
	f := remote(t, "17.1.1")
	f.RemoveFails("Permission denied")
	f.mustDeploy(f.material())
	if data, ok := f.running()["upload certctl-target-1.key"]; !ok || data != "\n" {
		t.Errorf("the upload is there: %v, and holds %.30q", ok, data)
	}
}

// TestSavedByOthers: someone saves and syncs the device during a deployment. If the
// deployment is undone, that is saved and synced too.
func TestSavedByOthers(t *testing.T) {
	f := remote(t, "17.1.1")
	f.config["device_group"], f.config["save_config"] = bigip.Group, true
	f.mustDeploy(f.material())
	pair, err := f.ca.Issue(testca.Template{})
	must(t, err)
	f.OnCall(func(c bigip.Call) bigip.Fault {
		if c.Is("POST", "/mgmt/tm/sys/config") {
			f.OnCall(nil)
			must(t, f.Install("/Common/other", pair.LeafPEM(), pair.KeyPEM(), ""))
			return bigip.Fail
		}
		return bigip.None
	})
	m := f.material()
	_, err = f.deploy(m)
	conformance.WantError(t, err, "save the configuration", "the previous certificate is back in place")
	if saved, synced := f.InSync(); !saved || !synced || strings.Contains(f.running()[clientSSL+" "+profileName], leafPath(m)) {
		t.Errorf("saved %v, synced %v", saved, synced)
	}
}

// TestCancelled: a deployment ends with its context, whatever the device does, and
// started changes are undone.
func TestCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := remote(t, "17.1.1")
		f.mustDeploy(f.material())
		before := f.running()
		ctx, cancel := context.WithCancel(t.Context())
		f.OnCall(func(c bigip.Call) bigip.Fault {
			if c.Is("PATCH", "/mgmt/tm/transaction/") {
				cancel()
			}
			return bigip.None
		})
		_, err := f.Host.Deploy(ctx, f.typ, f.config, f.material())
		conformance.WantError(t, err, "context canceled", "the previous certificate is back in place")
		if after := f.running(); !maps.Equal(before, after) {
			t.Errorf("the device changed: %v", slices.Sorted(maps.Keys(after)))
		}
	})
}

// TestLogin: a refused login is not retried, since the device may lock the
// account.
func TestLogin(t *testing.T) {
	f := newFixture(t, "17.1.1")
	_, err := f.deploy(f.material(), "password", "another-s3cret")
	conformance.WantError(t, err, "log in as \"admin\"", "401", "Authentication failed.", "check username, password and token_provider")
	if n := len(f.Calls()); n != 1 || strings.Contains(err.Error(), "another-s3cret") {
		t.Errorf("%d calls: %v", n, err)
	}
	_, err = f.deploy(f.material(), "token_provider", "radius")
	conformance.WantError(t, err, "no provider radius")
}

// TestSlow: other deployments do not wait for a device that hangs.
func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := remote(t, "17.1.1")
		f.OnCall(func(bigip.Call) bigip.Fault { return bigip.Hang })
		begun := time.Now()
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, "no answer within 20s")
		if took := time.Since(begun); took > time.Minute {
			t.Errorf("it took %v", took)
		}
	})
}

var _ connector.Connector = (*target)(nil)
