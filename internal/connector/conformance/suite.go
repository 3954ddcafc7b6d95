package conformance

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
)

// Harness describes one connector to the suite.
type Harness struct {
	Type string
	New  New

	// Config is a complete configuration whose destinations are below dir. Its
	// commands are not run: the suite fakes them.
	Config func(dir string) map[string]any

	// Want is what the files below dir hold once m is installed, by their
	// names in dir.
	Want func(m *connector.Material) map[string][]byte

	// Required are the keys without which the configuration is refused.
	Required []string

	// Secrets are values in Config that must never be seen.
	Secrets []string
}

// Run puts a connector through the suite.
func Run(t *testing.T, h Harness) {
	s := &suite{Harness: h, ca: testca.Must(t)}
	t.Run("installs", s.installs)
	t.Run("second deployment changes nothing", s.idempotent)
	t.Run("renews, keeping mode and owner", s.renews)
	t.Run("rolls back a first deployment", func(t *testing.T) { s.rollsBack(t, false) })
	t.Run("rolls back a renewal", func(t *testing.T) { s.rollsBack(t, true) })
	t.Run("configuration errors", s.configErrors)
	t.Run("policy", s.policy)
}

type suite struct {
	Harness
	ca *testca.CA
}

// rig is a host with faked commands.
type rig struct {
	*suite
	*Host
	t        *testing.T
	commands *commands
	extra    map[string]any // laid over Config
}

func (s *suite) rig(t *testing.T) *rig {
	r := &rig{suite: s, t: t, commands: new(commands)}
	r.Host = NewHost(t, func(ctx context.Context, c policy.Command) error { return r.commands.run(ctx, c) })
	r.Host.Query = nil
	return r
}

func (r *rig) deploy(ctx context.Context, m *connector.Material) (connector.Result, error) {
	r.t.Helper()
	config := r.Config(r.Dir)
	maps.Copy(config, r.extra)
	result, err := r.Host.Deploy(ctx, r.Type, r.New, config, m)
	r.checkSecrets(m, err)
	return result, err
}

func (r *rig) mustDeploy(m *connector.Material) connector.Result {
	r.t.Helper()
	result, err := r.deploy(r.t.Context(), m)
	if err != nil {
		r.t.Fatalf("deploy: %v", err)
	}
	return result
}

// checkSecrets looks for key material and secrets of the configuration in
// everything that was said.
func (r *rig) checkSecrets(m *connector.Material, err error) {
	r.t.Helper()
	said := r.Log()
	if err != nil {
		said += err.Error()
	}
	secrets := slices.Clone(r.Secrets)
	for line := range strings.Lines(string(m.KeyPEM)) {
		if !strings.HasPrefix(line, "-----") {
			secrets = append(secrets, strings.TrimSpace(line))
		}
	}
	for _, secret := range secrets {
		if secret != "" && strings.Contains(said, secret) {
			r.t.Errorf("a secret shows in the log or in the error:\n%s", said)
		}
	}
}

// checkFiles compares the target with what it should hold, and finds what
// should not be there: a server may load a whole directory.
func (r *rig) checkFiles(m *connector.Material) {
	r.t.Helper()
	got := r.snapshot()
	want := r.Want(m)
	for name, data := range want {
		if f, ok := got[name]; !ok || !bytes.Equal([]byte(f.data), data) {
			r.t.Errorf("%s: got %d bytes (there: %v), want %d", name, len(f.data), ok, len(data))
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			r.t.Errorf("%s should not be there", name)
		}
	}
}

// entry is what must survive a failed deployment.
type entry struct {
	data  string
	mode  fs.FileMode
	owner string
}

func (r *rig) snapshot() map[string]entry {
	r.t.Helper()
	files := make(map[string]entry)
	err := filepath.WalkDir(r.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(r.Dir, path)
		files[name] = entry{string(data), info.Mode(), owner(info)}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return files
}

// owner is a file's user and group, as far as the platform has them.
func owner(info fs.FileInfo) string {
	stat := reflect.Indirect(reflect.ValueOf(info.Sys()))
	if stat.Kind() != reflect.Struct || !stat.FieldByName("Uid").IsValid() {
		return ""
	}
	return fmt.Sprint(stat.FieldByName("Uid"), ":", stat.FieldByName("Gid"))
}

func (s *suite) installs(t *testing.T) {
	r := s.rig(t)
	m := r.Material(t, s.ca)
	r.commands.each = func(int) { r.checkFiles(m) } // a command sees the new files, all of them
	if result := r.mustDeploy(m); result.Unchanged {
		t.Error("the first deployment reports that nothing changed")
	}
	r.checkFiles(m)
	for name, f := range r.snapshot() {
		if want := fs.FileMode(0o600); bytes.Contains([]byte(f.data), []byte("PRIVATE KEY")) && f.mode.Perm() != want {
			t.Errorf("%s holds a key and has mode %v, want %v", name, f.mode, want)
		}
	}
	for _, c := range r.commands.ran {
		if c.Timeout <= 0 || c.Timeout > time.Hour {
			t.Errorf("%q runs with a deadline of %v", c.Argv, c.Timeout)
		}
	}
}

func (s *suite) idempotent(t *testing.T) {
	r := s.rig(t)
	m := r.Material(t, s.ca)
	r.mustDeploy(m)
	times := func() map[string]time.Time {
		all := make(map[string]time.Time)
		for name := range r.snapshot() {
			info, err := os.Lstat(filepath.Join(r.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			all[name] = info.ModTime()
		}
		return all
	}
	before, ran := times(), len(r.commands.ran)
	result := r.mustDeploy(m)
	if !result.Unchanged {
		t.Error("a second deployment of the same certificate reports a change")
	}
	if got := len(r.commands.ran); got != ran {
		t.Errorf("it ran %d commands, want none", got-ran)
	}
	if after := times(); !maps.EqualFunc(before, after, time.Time.Equal) {
		t.Errorf("it wrote: files changed from %v to %v", before, after)
	}
}

// renew gives the installed files another mode and, as root, another owner,
// so that keeping them can be told from making them anew.
func (r *rig) setAside() {
	r.t.Helper()
	for name, f := range r.snapshot() {
		path := filepath.Join(r.Dir, name)
		if err := os.Chmod(path, f.mode.Perm()&0o640|0o440); err != nil {
			r.t.Fatal(err)
		}
		if os.Geteuid() == 0 {
			if err := os.Lchown(path, 4201, 4202); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

func (s *suite) renews(t *testing.T) {
	r := s.rig(t)
	r.mustDeploy(r.Material(t, s.ca))
	r.setAside()
	before := r.snapshot()
	m := r.Material(t, s.ca)
	r.mustDeploy(m)
	r.checkFiles(m)
	for name, f := range r.snapshot() {
		if was := before[name]; f.mode != was.mode || f.owner != was.owner {
			t.Errorf("%s: mode %v and owner %s, were %v and %s", name, f.mode, f.owner, was.mode, was.owner)
		}
	}
}

// rollsBack fails, then cancels, a deployment at each of its commands and at
// its verification.
func (s *suite) rollsBack(t *testing.T, renewal bool) {
	probe := s.rig(t)
	probe.mustDeploy(probe.Material(t, s.ca))
	stages := len(probe.commands.ran)

	type attempt struct {
		name string
		do   func(r *rig, m *connector.Material) error
	}
	var attempts []attempt
	add := func(name string, do func(r *rig, m *connector.Material) error) {
		attempts = append(attempts, attempt{name, do})
	}
	for stage := range stages {
		add(fmt.Sprintf("command %d fails", stage+1), func(r *rig, m *connector.Material) error {
			r.commands.fail = map[int]error{stage: errors.New("exit status 1: made to fail")}
			_, err := r.deploy(r.t.Context(), m)
			return err
		})
		add(fmt.Sprintf("cancelled in command %d", stage+1), func(r *rig, m *connector.Material) error {
			ctx, cancel := context.WithCancel(r.t.Context())
			defer cancel()
			r.commands.each = func(n int) {
				if n == stage {
					cancel()
				}
			}
			_, err := r.deploy(ctx, m)
			return err
		})
	}
	add("verification fails", func(r *rig, m *connector.Material) error {
		r.extra = s.verifyElsewhere(r.t)
		_, err := r.deploy(r.t.Context(), m)
		return err
	})
	add("cancelled before it begins", func(r *rig, m *connector.Material) error {
		ctx, cancel := context.WithCancel(r.t.Context())
		cancel()
		_, err := r.deploy(ctx, m)
		return err
	})
	for _, a := range attempts {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel() // some connectors wait for their server
			r := s.rig(t)
			if renewal {
				r.mustDeploy(r.Material(t, s.ca))
				r.setAside()
				r.commands.reset()
			}
			before := r.snapshot()
			m := r.Material(t, s.ca)
			m.KeyFiles = []connector.File{{
				Path: m.KeyPath, Kind: connector.StoreFile, Data: m.KeyPEM, DefaultMode: 0o600,
			}}
			err := a.do(r, m)
			if err == nil {
				t.Fatal("the deployment reports success")
			}
			if broken, ok := errors.AsType[*connector.BrokenError](err); ok {
				t.Fatalf("the rollback failed: %v", broken)
			}
			if after := r.snapshot(); !maps.Equal(before, after) {
				t.Errorf("%v\nthe target changed: from %v to %v", err, slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
			}
			if _, err := os.Lstat(m.KeyPath); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the pending key became the current one all the same (%v)", err)
			}
		})
	}
}

// verifyElsewhere is a configuration whose verification meets another
// certificate.
func (s *suite) verifyElsewhere(t *testing.T) map[string]any {
	certificate, err := s.ca.TLSCertificate("localhost")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).HandshakeContext(context.Background())
			conn.Close()
		}
	})
	t.Cleanup(func() { listener.Close(); serving.Wait() })
	return map[string]any{
		"post_deploy_verify":          map[string]any{"enabled": true, "endpoint": listener.Addr().(*net.TCPAddr).String(), "timeout": "2s"},
		"post_deploy_verify_attempts": 1,
	}
}

func (s *suite) configErrors(t *testing.T) {
	r := s.rig(t)
	m := r.Material(t, s.ca)
	try := func(key, what string, change func(config map[string]any)) {
		config := r.Config(r.Dir)
		change(config)
		_, err := r.Host.Deploy(t.Context(), r.Type, r.New, config, m)
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%s %s: got %v, want an error that names the key", key, what, err)
		}
		r.checkSecrets(m, err)
	}
	for _, key := range s.Required {
		try(key, "missing", func(config map[string]any) { delete(config, key) })
		try(key, "empty", func(config map[string]any) { config[key] = "" })
	}
	for key := range r.Config(r.Dir) {
		try(key, "of a wrong type", func(config map[string]any) { config[key] = []any{map[string]any{}} })
	}
	try("post_deploy_verify", "no object", func(config map[string]any) { config["post_deploy_verify"] = "on" })
	try("command_timeout", "next to nothing", func(config map[string]any) { config["command_timeout"] = 60 })
	if files := r.snapshot(); len(files) > 0 {
		t.Errorf("files were written: %v", slices.Sorted(maps.Keys(files)))
	}
	if len(r.commands.ran) > 0 {
		t.Errorf("commands were run: %v", r.commands.ran)
	}
}

func (s *suite) policy(t *testing.T) {
	r := s.rig(t)
	m := r.Material(t, s.ca)
	r.Policy.Paths = []string{r.StateDir + "-elsewhere"}
	if _, err := r.deploy(t.Context(), m); len(s.Want(m)) > 0 && (err == nil || !strings.Contains(err.Error(), "CERTCTL_ALLOWED_PATHS")) {
		t.Errorf("a destination that is not allowed: got %v", err)
	}
	if files := r.snapshot(); len(files) > 0 {
		t.Errorf("files were written: %v", slices.Sorted(maps.Keys(files)))
	}
	r.Policy.Paths = nil
	r.mustDeploy(m)
	if len(r.commands.ran) == 0 {
		return
	}
	r = s.rig(t)
	r.Policy.Commands = [][]string{{"/bin/true"}}
	if _, err := r.deploy(t.Context(), m); err == nil || !strings.Contains(err.Error(), "CERTCTL_ALLOWED_COMMANDS") || !strings.Contains(err.Error(), "_command") {
		t.Errorf("a command that is not allowed: got %v", err)
	}
	if files := r.snapshot(); len(files) > 0 || len(r.commands.ran) > 0 {
		t.Errorf("files were written (%d) or commands run (%d)", len(files), len(r.commands.ran))
	}
}

// commands stands in for the commands of a target.
type commands struct {
	ran  []policy.Command
	fail map[int]error // by position; consumed
	each func(n int)
}

func (c *commands) reset() { *c = commands{} }

func (c *commands) run(ctx context.Context, command policy.Command) error {
	n := len(c.ran)
	c.ran = append(c.ran, command)
	if c.each != nil {
		c.each(n)
	}
	if err := c.fail[n]; err != nil {
		return err
	}
	return ctx.Err()
}

// PEM encodes certificates as every target of files holds them.
func PEM(certificates ...*x509.Certificate) []byte {
	return pemutil.EncodeCertificates(certificates...)
}
