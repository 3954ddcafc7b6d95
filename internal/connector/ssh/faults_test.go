package ssh

import (
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// dying is a connection that is lost at a request. Each request is one Write.
type dying struct {
	io.ReadWriteCloser
	left      *atomic.Int32 // requests until then
	delivered bool          // the last request arrives, but its answer does not
}

func (d *dying) Write(data []byte) (int, error) {
	const reads, readsDir = 5, 12 // packet types of reads, which are frequent and similar
	if kind := data[4]; kind != reads && kind != readsDir && d.left.Add(-1) == 0 {
		if d.delivered {
			if _, err := d.ReadWriteCloser.Write(data); err != nil {
				return 0, err
			}
			// The answer shows that the request was processed.
			if _, err := io.ReadFull(d.ReadWriteCloser, make([]byte, 5)); err != nil {
				return 0, err
			}
		}
		d.Close()
		return 0, io.ErrClosedPipe
	}
	return d.ReadWriteCloser.Write(data)
}

// there is a host whose remote host is a directory.
type there struct {
	*conformance.Host
	t   *testing.T
	ca  *testca.CA
	dir string
}

func newThere(t *testing.T) *there {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	return &there{Host: conformance.NewMemoryHost(t, conformance.RunCommand), t: t, ca: testca.Must(t), dir: dir}
}

func (h *there) config() map[string]any {
	return map[string]any{
		"host": "192.0.2.1", "user": "deploy", "private_key": "-----BEGIN OPENSSH PRIVATE KEY-----",
		"cert_path": filepath.Join(h.dir, "cert.pem"), "key_path": filepath.Join(h.dir, "key.pem"), "chain_path": filepath.Join(h.dir, "chain.pem"),
		"reload_command": "test -s " + filepath.Join(h.dir, "key.pem"),
	}
}

func (h *there) deploy(typ connector.Type, m *connector.Material) error {
	_, err := h.Deploy(h.t.Context(), typ, h.config(), m)
	return err
}

// state returns the remote files without times.
func (h *there) state() map[string]string {
	state := stateOf(h.dir)
	maps.DeleteFunc(state, func(name, _ string) bool { return strings.HasSuffix(name, conformance.Written) })
	return state
}

// holds fails the test unless the remote files are exactly m.
func (h *there) holds(m *connector.Material) {
	h.t.Helper()
	checkFiles(h.t, h.dir, "cert.pem", "chain.pem", "key.pem")
	if readFile(h.t, filepath.Join(h.dir, "cert.pem")) != string(conformance.PEM(m.Leaf)) || readFile(h.t, filepath.Join(h.dir, "key.pem")) != string(m.KeyPEM) {
		h.t.Error("another certificate or key is there")
	}
}

var errDown = errors.New("the server is down")

// gone makes connections fail while down returns true.
func gone(typ connector.Type, down *atomic.Bool) connector.Type {
	made := typ.New
	typ.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		built, err := made(c, host)
		if err == nil {
			connect := built.(*target).connect
			built.(*target).connect = func(ctx context.Context) (*session, error) {
				if down.Load() {
					return nil, errDown
				}
				return connect(ctx)
			}
		}
		return built, err
	}
	return typ
}

// TestServerDies: the server dies at each request of a deployment in turn, before
// or after processing it. If it comes back, everything is old or new when the
// job ends. If it does not, the next job repairs it.
func TestServerDies(t *testing.T) {
	for _, renewal := range []bool{false, true} {
		for _, delivered := range []bool{false, true} {
			for _, returns := range []bool{true, false} {
				name := map[bool]string{false: "first deployment, ", true: "renewal, "}[renewal] +
					map[bool]string{false: "request lost, ", true: "answer lost, "}[delivered] + map[bool]string{false: "stays away", true: "comes back"}[returns]
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					for n := 1; !dieAt(t, n, renewal, delivered, returns); n++ {
						if n > 200 {
							t.Fatal("a deployment has no end")
						}
					}
				})
			}
		}
	}
}

// dieAt makes the server die at the nth request. It reports whether the deployment
// has fewer.
func dieAt(t *testing.T, n int, renewal, delivered, returns bool) (last bool) {
	h := newThere(t)
	healthy := local(t, nil)
	if renewal {
		must(t, h.deploy(healthy, h.Material(t, h.ca)))
	}
	before, m := h.state(), h.Material(t, h.ca)
	var left atomic.Int32
	left.Store(int32(n))
	var down atomic.Bool
	typ := gone(local(t, func(conn io.ReadWriteCloser) io.ReadWriteCloser {
		return &dying{conn, &left, delivered}
	}), &down)
	inner := typ.New
	typ.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		built, err := inner(c, host)
		if err == nil {
			connect := built.(*target).connect
			built.(*target).connect = func(ctx context.Context) (*session, error) {
				if left.Load() <= 0 && !returns {
					down.Store(true)
				}
				return connect(ctx)
			}
		}
		return built, err
	}
	err := h.deploy(typ, m)
	died := left.Load() <= 0
	_, broken := errors.AsType[*transaction.BrokenError](err)
	switch {
	case err == nil && returns: // the server did not die, or only at the end
		h.holds(m)
	case err == nil && !died:
		h.holds(m)
	case err == nil, broken && !returns:
	case broken:
		t.Errorf("request %d: the server is back, and the rollback failed: %v", n, err)
	default:
		if after := h.state(); !maps.Equal(before, after) && returns {
			t.Errorf("request %d: %v\nthe files changed: from %v to %v", n, err, before, after)
		}
	}
	down.Store(false)
	must(t, h.deploy(healthy, m))
	h.holds(m)
	return !died
}

// TestForeignFiles: other kinds of files are not replaced.
func TestForeignFiles(t *testing.T) {
	typ := local(t, nil)
	for _, test := range []struct {
		name, file, data string
		says             string
	}{
		{"no certificate", "cert.pem", "root:x:0:0:root:/root:/bin/bash\n", "holds no certificate"},
		{"a key in place of the certificate", "cert.pem", "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ+DYvh6SEqVTm50DFtMDoQikTmiCqirVv9mWG9qfSnF\n-----END PRIVATE KEY-----\n", "holds a private key"},
		{"no key", "key.pem", "[client]\npassword=x\n", "holds no key"},
		{"a certificate in place of the key", "key.pem", "-----BEGIN CERTIFICATE-----\n", "starts with a certificate"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newThere(t)
			must(t, os.WriteFile(filepath.Join(h.dir, test.file), []byte(test.data), 0o600))
			err := h.deploy(typ, h.Material(t, h.ca))
			if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), h.dir) {
				t.Errorf("got %v, want an error with %q", err, test.says)
			}
			checkFiles(t, h.dir, test.file)
			if strings.HasPrefix(test.says, "holds no ") {
				must(t, os.WriteFile(filepath.Join(h.Overlays, conformance.TargetID+".json"), []byte(`{"replace_any_file": true}`), 0o600))
				m := h.Material(t, h.ca)
				must(t, h.deploy(typ, m))
				h.holds(m)
			}
		})
	}
}

// TestSomeoneElse: if someone else installs a pair meanwhile, all of it
// stays.
func TestSomeoneElse(t *testing.T) {
	h := newThere(t)
	must(t, h.deploy(local(t, nil), h.Material(t, h.ca)))
	built, err := h.Connector(local(t, nil), h.config())
	must(t, err)
	defer connector.Close(built, h.Logger())
	plan, err := built.Plan(t.Context(), h.Material(t, h.ca))
	must(t, err)
	was, _, err := plan.Changes[0].Read(t.Context())
	must(t, err)
	must(t, plan.Changes[0].Write(t.Context()))
	theirs := h.Material(t, h.ca)
	must(t, os.WriteFile(filepath.Join(h.dir, "cert.pem"), conformance.PEM(theirs.Leaf), 0o644))
	must(t, os.WriteFile(filepath.Join(h.dir, "key.pem"), theirs.KeyPEM, 0o600))
	if err := plan.Changes[0].Restore(t.Context(), was); err == nil || !strings.Contains(err.Error(), "someone else") {
		t.Errorf("got %v, want an error with %q", err, "someone else")
	}
	if readFile(t, filepath.Join(h.dir, "cert.pem")) != string(conformance.PEM(theirs.Leaf)) || readFile(t, filepath.Join(h.dir, "key.pem")) != string(theirs.KeyPEM) {
		t.Error("their pair is not whole any more")
	}
}

func TestWhereFilesGo(t *testing.T) {
	typ := local(t, nil)
	t.Run("a symlink stays one", func(t *testing.T) {
		h := newThere(t)
		archive := t.TempDir()
		for _, name := range []string{"cert.pem", "key.pem", "chain.pem"} {
			must(t, os.Symlink(filepath.Join(archive, name), filepath.Join(h.dir, name)))
		}
		for range 2 { // the first one creates the files
			m := h.Material(t, h.ca)
			must(t, h.deploy(typ, m))
			h.holds(m)
			checkFiles(t, archive, "cert.pem", "chain.pem", "key.pem")
			if info, err := os.Lstat(filepath.Join(h.dir, "key.pem")); err != nil || info.Mode().Type() != os.ModeSymlink {
				t.Errorf("the link is %v, %v", info, err)
			}
		}
	})
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, h *there)
		says   string
	}{
		{"a directory", func(t *testing.T, h *there) { must(t, os.Mkdir(filepath.Join(h.dir, "key.pem"), 0o700)) }, "is not a regular file"},
		{"no directory", func(t *testing.T, h *there) { must(t, os.Remove(h.dir)) }, "does not exist"},
		{"a directory of everybody", func(t *testing.T, h *there) { must(t, os.Chmod(h.dir, 0o777)) }, "chmod o-w"},
		{"two names of one file", func(t *testing.T, h *there) {
			must(t, os.Symlink("key.pem", filepath.Join(h.dir, "cert.pem")))
		}, "are the same file"},
		{"a vital place", func(t *testing.T, h *there) {
			must(t, os.Symlink("/etc/cron.d/www", filepath.Join(h.dir, "cert.pem")))
		}, "/etc/cron.d/www is refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newThere(t)
			test.damage(t, h)
			if err := h.deploy(typ, h.Material(t, h.ca)); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want an error with %q", err, test.says)
			}
		})
	}
}

// recorder keeps what a server sends.
type recorder struct{ strings.Builder }

func (r *recorder) wrap(conn io.ReadWriteCloser) io.ReadWriteCloser {
	return &recorded{conn, r}
}

type recorded struct {
	io.ReadWriteCloser
	to *recorder
}

func (r *recorded) Read(data []byte) (int, error) {
	n, err := r.ReadWriteCloser.Read(data)
	r.to.Builder.Write(data[:n])
	return n, err
}
