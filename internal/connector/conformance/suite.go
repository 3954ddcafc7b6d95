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
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// Harness describes one connector to the suite.
type Harness struct {
	Type connector.Type

	// Config returns a new, complete configuration with all destinations below dir. Each target
	// has its own dir, from which Config derives what is not a file, such as the path of an object
	// in an API. Targets are deployed to in parallel. The suite fakes the commands.
	Config func(dir string) map[string]any

	// State returns a new map of everything of the target that a deployment may change, by name,
	// wherever it is. An entry with the suffix Written changes with each write, even if the
	// content does not. If State is nil, it is the Files below dir; a target that has both adds to
	// those.
	State func(dir string) map[string]string

	// Want returns the content in State, without entries that have a suffix, after m is installed.
	Want func(m *connector.Material) map[string][]byte

	// UndoOnly reports whether an entry of State is only there to undo a change, until Finish
	// removes it. If it is nil, there are no such entries.
	UndoOnly func(name string) bool

	// Required are the keys that the configuration must have.
	Required []string

	// Occupied says that the target serves another certificate before the first deployment.
	Occupied bool

	// Secrets are values in Config that must never appear in any output.
	Secrets []string
}

// Suffixes of the entries of State that are not content.
const (
	Written    = " (written)"    // time of the last write, or number of writes
	attributes = " (attributes)" // mode and owner
)

// Run runs the suite on a connector. It does not depend on the type of target.
func Run(t *testing.T, h Harness) {
	s := &suite{Harness: h, ca: testca.Must(t)}
	if s.State == nil {
		s.State = Files
	}
	t.Run("installs", s.installs)
	t.Run("second deployment changes nothing", s.unchanged)
	t.Run("renews, keeping mode and owner", s.renews)
	for _, renewal := range []bool{false, true} {
		name := map[bool]string{false: "first deployment", true: "renewal"}[renewal]
		t.Run(name+" fails", func(t *testing.T) { s.fails(t, renewal) })
		t.Run(name+" fails at each step", func(t *testing.T) { s.atEachStep(t, renewal, failing) })
		t.Run(name+" is cancelled at each step", func(t *testing.T) { s.atEachStep(t, renewal, cancelling) })
		t.Run(name+" is killed at each step", func(t *testing.T) { s.atEachStep(t, renewal, killing) })
	}
	t.Run("configuration errors", s.configErrors)
	t.Run("policy", s.policy)
}

type suite struct {
	Harness
	ca *testca.CA
}

// rig is a target with faked commands.
type rig struct {
	*suite
	*Host
	t        *testing.T
	commands *commands
	extra    map[string]any // overrides Config
}

func (s *suite) rig(t *testing.T) *rig {
	r := &rig{suite: s, t: t, commands: new(commands)}
	r.Host = NewMemoryHost(t, func(ctx context.Context, c policy.Command) error { return r.commands.run(ctx, c) })
	r.Host.Query = nil
	return r
}

// deploy deploys m and promotes its key.
func (r *rig) deploy(ctx context.Context, m *connector.Material) (transaction.Result, error) {
	r.t.Helper()
	config := r.Config(r.Dir)
	maps.Copy(config, r.extra)
	var promotion []keystore.Change
	if !r.isCurrent(m) {
		promotion = append(promotion, Promotion(m))
	}
	result, err := r.Host.Deploy(ctx, r.Type, config, m, promotion...)
	r.checkSecrets(m, err)
	return result, err
}

func (r *rig) mustDeploy(m *connector.Material) transaction.Result {
	r.t.Helper()
	result, err := r.deploy(r.t.Context(), m)
	if err != nil {
		r.t.Fatalf("deploy: %v", err)
	}
	return result
}

// isCurrent reports whether the key of m is the current one.
func (r *rig) isCurrent(m *connector.Material) bool {
	data, err := os.ReadFile(m.KeyPath)
	return err == nil && bytes.Equal(data, m.KeyPEM)
}

// checkSecrets fails the test if the key or a secret of the configuration is in the log, in err or
// in the journal.
func (r *rig) checkSecrets(m *connector.Material, err error) {
	r.t.Helper()
	var output strings.Builder
	output.WriteString(r.Log())
	if err != nil {
		output.WriteString(err.Error())
	}
	for _, name := range r.glob("journal", "*") {
		record, err := os.ReadFile(name)
		if err != nil {
			r.t.Fatal(err)
		}
		output.Write(record)
	}
	secrets := slices.Clone(r.Secrets)
	for line := range strings.Lines(string(m.KeyPEM)) {
		if !strings.HasPrefix(line, "-----") {
			secrets = append(secrets, strings.TrimSpace(line))
		}
	}
	for _, secret := range secrets {
		if secret != "" && strings.Contains(output.String(), secret) {
			r.t.Errorf("the log, the journal or the error contains a secret:\n%s", output.String())
		}
	}
}

// state returns the state that must survive a failed deployment.
func (r *rig) state() map[string]string {
	state := r.State(r.Dir)
	maps.DeleteFunc(state, func(name, _ string) bool { return strings.HasSuffix(name, Written) })
	return state
}

// checkInstalled fails the test unless the target holds m and nothing else: a server may load a
// whole directory.
func (r *rig) checkInstalled(m *connector.Material) {
	r.t.Helper()
	r.check(m, r.state())
}

// checkUnfinished is checkInstalled before Finish.
func (r *rig) checkUnfinished(m *connector.Material) {
	r.t.Helper()
	got := r.state()
	if r.UndoOnly != nil {
		maps.DeleteFunc(got, func(name, _ string) bool { return r.UndoOnly(name) })
	}
	r.check(m, got)
}

func (r *rig) check(m *connector.Material, got map[string]string) {
	r.t.Helper()
	want := r.Want(m)
	for name, data := range want {
		if has, ok := got[name]; !ok {
			r.t.Errorf("%s is missing", name)
		} else if has != string(data) {
			r.t.Errorf("%s is not that of the new certificate: got %d bytes, want %d, the first difference at byte %d", name, len(has), len(data), difference(has, string(data)))
		}
	}
	for name := range got {
		if _, ok := want[strings.TrimSuffix(name, attributes)]; !ok {
			r.t.Errorf("%s should not be there", name)
		}
	}
}

// difference returns the index of the first byte that differs.
func difference(a, b string) int {
	i := 0
	for i < min(len(a), len(b)) && a[i] == b[i] {
		i++
	}
	return i
}

// changed returns the names of the entries that differ between two States, with what happened.
func changed(before, after map[string]string) []string {
	var names []string
	for name, was := range before {
		if is, ok := after[name]; !ok {
			names = append(names, name+" is gone")
		} else if is != was {
			names = append(names, name+" differs")
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			names = append(names, name+" is new")
		}
	}
	slices.Sort(names)
	return names
}

// Files returns the State of a target that consists of the files below dir.
func Files(dir string) map[string]string {
	state := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
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
		name, err := filepath.Rel(dir, path)
		state[name] = string(data)
		state[name+attributes] = info.Mode().String() + " " + owner(info)
		state[name+Written] = info.ModTime().String()
		return err
	})
	if err != nil {
		panic(err) // a test's own directory
	}
	return state
}

// owner returns a file's user and group, or "" if the platform has none.
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
	r.commands.each = func(int) { r.checkInstalled(m) } // commands see the complete new certificate
	if result := r.mustDeploy(m); result.Unchanged {
		t.Error("the first deployment reports that nothing changed")
	}
	r.checkInstalled(m)
	state := r.state()
	for name, data := range state {
		if has := state[name+attributes]; has != "" && strings.Contains(data, "PRIVATE KEY") && !strings.HasPrefix(has, fs.FileMode(0o600).String()) {
			t.Errorf("%s holds a key and is %s, want 0600", name, has)
		}
	}
	for _, c := range r.commands.ran {
		if c.Timeout <= 0 || c.Timeout > time.Hour {
			t.Errorf("%q runs with a deadline of %v", c.Argv, c.Timeout)
		}
	}
}

func (s *suite) unchanged(t *testing.T) {
	r := s.rig(t)
	m := r.Material(t, s.ca)
	r.mustDeploy(m)
	before, ran := r.State(r.Dir), len(r.commands.ran)
	result := r.mustDeploy(m)
	if !result.Unchanged {
		t.Error("a second deployment of the same certificate reports a change")
	}
	if got := len(r.commands.ran); got != ran {
		t.Errorf("it ran %d commands, want none", got-ran)
	}
	if after := r.State(r.Dir); !maps.Equal(before, after) {
		t.Errorf("the target was written: %q", changed(before, after))
	}
}

// changeModes gives the installed files another mode and, as root, another owner, to tell whether a
// renewal keeps them.
func (r *rig) changeModes() {
	r.t.Helper()
	err := filepath.WalkDir(r.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		err = os.Chmod(path, info.Mode().Perm()&0o640|0o440)
		if err == nil && os.Geteuid() == 0 {
			err = os.Lchown(path, 4201, 4202)
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

func (s *suite) renews(t *testing.T) {
	r := s.rig(t)
	r.mustDeploy(r.Material(t, s.ca))
	r.changeModes()
	before := r.state()
	m := r.Material(t, s.ca)
	ids := r.changes(m)
	r.Before = func(step transaction.Step) error {
		switch step.Op {
		case "change":
			r.checkSaved(step.Path)
			if !slices.Contains(ids, step.Path) {
				r.t.Errorf("the change %q has another ID in a new connector with the same configuration, which plans %q", step.Path, ids)
			}
		case "finish":
			if open := r.glob("journal", "*"); len(open) > 0 {
				r.t.Errorf("%s is finished before the commit", step.Path)
			}
		}
		return nil
	}
	r.mustDeploy(m)
	r.Before = nil
	r.checkInstalled(m)
	for name, value := range r.state() {
		if strings.HasSuffix(name, attributes) && value != before[name] {
			t.Errorf("%s is %s, was %s", name, value, before[name])
		}
	}
}

// changes returns the IDs of the changes that a new connector plans.
func (r *rig) changes(m *connector.Material) (ids []string) {
	r.t.Helper()
	c, err := r.Connector(r.Type, r.Config(r.Dir))
	if err != nil {
		r.t.Fatal(err)
	}
	plan, err := c.Plan(r.t.Context(), m)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, change := range plan.Changes {
		ids = append(ids, change.ID())
	}
	return ids
}

// checkSaved fails the test unless the old state of a change is in a backup set that only the agent
// can read.
func (r *rig) checkSaved(change string) {
	r.t.Helper()
	if sets := r.glob("backups", "*", "*", "manifest.json"); len(sets) == 0 {
		r.t.Errorf("no backup before the change of %s", change)
	}
	for _, name := range r.glob("backups", "*", "*", "*") {
		if info, err := os.Lstat(name); err != nil || info.Mode() != 0o600 {
			r.t.Errorf("before the change of %s: others can read the backup %s: %v, %v", change, name, info.Mode(), err)
		}
	}
}

// glob lists files of the state directory.
func (r *rig) glob(pattern ...string) []string {
	r.t.Helper()
	names, err := filepath.Glob(filepath.Join(append([]string{r.StateDir}, pattern...)...))
	if err != nil {
		r.t.Fatal(err)
	}
	return names
}

// prepared returns a rig that is ready for a first deployment or a renewal, and its material.
func (s *suite) prepared(t *testing.T, renewal bool) (*rig, *connector.Material) {
	r := s.rig(t)
	if renewal {
		r.mustDeploy(r.Material(t, s.ca))
		r.changeModes()
		r.commands.reset()
	}
	return r, r.Material(t, s.ca)
}

// fails makes a deployment fail or be cancelled at each command and in the verification.
func (s *suite) fails(t *testing.T, renewal bool) {
	probe := s.rig(t)
	probe.mustDeploy(probe.Material(t, s.ca))

	type attempt struct {
		name string
		do   func(r *rig, m *connector.Material) error
	}
	var attempts []attempt
	add := func(name string, do func(r *rig, m *connector.Material) error) {
		attempts = append(attempts, attempt{name, do})
	}
	for n := range probe.commands.ran {
		add(fmt.Sprintf("command %d fails", n+1), func(r *rig, m *connector.Material) error {
			r.commands.fail = map[int]error{n: errors.New("exit status 1: made to fail")}
			_, err := r.deploy(r.t.Context(), m)
			return err
		})
		add(fmt.Sprintf("cancelled in command %d", n+1), func(r *rig, m *connector.Material) error {
			ctx, cancel := context.WithCancel(r.t.Context())
			defer cancel()
			r.commands.each = func(i int) {
				if i == n {
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
	add("cancelled before it starts", func(r *rig, m *connector.Material) error {
		ctx, cancel := context.WithCancel(r.t.Context())
		cancel()
		_, err := r.deploy(ctx, m)
		return err
	})
	for _, a := range attempts {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel() // some connectors wait for their server
			r, m := s.prepared(t, renewal)
			before := r.state()
			err := a.do(r, m)
			if err == nil {
				t.Fatal("the deployment reports success")
			}
			if broken, ok := errors.AsType[*transaction.BrokenError](err); ok {
				t.Fatalf("the rollback failed: %v", broken)
			}
			if untrue := map[bool]string{true: "there was no certificate before", false: "the previous certificate"}[renewal]; strings.Contains(err.Error(), untrue) && (renewal || !s.Occupied) {
				t.Errorf("the error is wrong about the old certificate: %v", err)
			}
			r.checkAsBefore(before, m, err)
		})
	}
}

// checkAsBefore fails the test unless the target is unchanged and m's key is not the current one.
func (r *rig) checkAsBefore(before map[string]string, m *connector.Material, err error) {
	r.t.Helper()
	if after := r.state(); !maps.Equal(before, after) {
		r.t.Errorf("%v\nthe target changed: %q", err, changed(before, after))
	}
	if r.isCurrent(m) {
		r.t.Errorf("%v\nthe pending key was promoted", err)
	}
}

// disturbance is what happens to a deployment at one of its steps.
type disturbance int

const (
	failing    disturbance = iota // the step fails
	cancelling                    // the deployment is cancelled
	killing                       // the agent is killed and starts again
)

var errDisturbed = errors.New("made to fail")

// atEachStep disturbs a deployment at each step of the engine in turn.
func (s *suite) atEachStep(t *testing.T, renewal bool, how disturbance) {
	var steps []transaction.Step
	probe, m := s.prepared(t, renewal)
	probe.Before = func(step transaction.Step) error { steps = append(steps, step); return nil }
	probe.mustDeploy(m)
	if len(steps) < 5 {
		t.Fatalf("a deployment has %d steps", len(steps))
	}
	for n, step := range steps {
		if !step.Touches() && n%4 != int(how) {
			continue // the engine's own tests cover all of these
		}
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			if how != killing {
				s.disturb(t, renewal, how, n)
				return
			}
			s.kill(t, renewal, n, true)
			s.kill(t, renewal, n, false)
		})
	}
}

// disturb fails or cancels a deployment at its n-th step. The deployment must still succeed, as
// after the commit, or change nothing.
func (s *suite) disturb(t *testing.T, renewal bool, how disturbance, n int) {
	r, m := s.prepared(t, renewal)
	before := r.state()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var at transaction.Step
	r.Before = func(step transaction.Step) error {
		if n--; n != -1 {
			return nil
		}
		if at = step; how == failing {
			return errDisturbed
		}
		cancel()
		return nil
	}
	_, err := r.deploy(ctx, m)
	r.Before = nil
	if broken, ok := errors.AsType[*transaction.BrokenError](err); ok {
		t.Fatalf("%s %s: the rollback failed: %v", at.Op, at.Path, broken)
	}
	if err == nil {
		r.checkUnfinished(m)
		r.mustDeploy(m)
		r.checkInstalled(m)
		return
	}
	if how == failing && !errors.Is(err, errDisturbed) || how == cancelling && !errors.Is(err, context.Canceled) {
		t.Errorf("%s %s: got error %v", at.Op, at.Path, err)
	}
	r.checkAsBefore(before, m, fmt.Errorf("%s %s: %w", at.Op, at.Path, err))
	r.mustDeploy(m)
	r.checkInstalled(m)
}

// kill kills the agent at the n-th step of a deployment and starts it again. The job then runs
// again and succeeds or fails.
func (s *suite) kill(t *testing.T, renewal bool, n int, succeeds bool) {
	r, m := s.prepared(t, renewal)
	before := r.state()
	var at transaction.Step
	r.Before = func(step transaction.Step) error {
		if n--; n == -1 {
			at = step
		}
		if n < 0 {
			return errDisturbed
		}
		return nil
	}
	_, _ = r.deploy(t.Context(), m) // a killed agent reports no error
	r.Before = nil
	r.Restart(t)

	committed := r.isCurrent(m)
	if !succeeds {
		r.extra = s.verifyElsewhere(t)
		_, err := r.deploy(t.Context(), m)
		switch {
		case err == nil:
			t.Errorf("killed at %s %s: a deployment whose verification fails reports success", at.Op, at.Path)
		case committed:
			r.checkUnfinished(m)
		default:
			r.checkAsBefore(before, m, fmt.Errorf("killed at %s %s: %w", at.Op, at.Path, err))
		}
		r.extra = nil
	}
	if _, err := r.deploy(t.Context(), m); err != nil || !r.isCurrent(m) {
		t.Errorf("killed at %s %s: the next deployment: %v", at.Op, at.Path, err)
	}
	r.checkInstalled(m)
}

// verifyElsewhere returns a configuration whose verification finds another certificate.
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
	m, before := r.Material(t, s.ca), r.state()
	try := func(key, what string, change func(config map[string]any)) {
		config := r.Config(r.Dir)
		change(config)
		_, err := r.Host.Deploy(t.Context(), r.Type, config, m)
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
	if after := r.state(); !maps.Equal(before, after) {
		t.Errorf("the target changed: %q", changed(before, after))
	}
	if len(r.commands.ran) > 0 {
		t.Errorf("commands were run: %v", r.commands.ran)
	}
}

func (s *suite) policy(t *testing.T) {
	r := s.rig(t)
	m := r.Material(t, s.ca)
	r.Policy.Paths = []string{r.StateDir + "-elsewhere"}
	_, err := r.deploy(t.Context(), m)
	if err != nil && !strings.Contains(err.Error(), "CERTCTL_ALLOWED_PATHS") {
		t.Errorf("a destination that is not allowed: got %v", err)
	}
	if written := Files(r.Dir); len(written) > 0 {
		t.Errorf("files were written: %v", slices.Sorted(maps.Keys(written)))
	}
	r.Policy.Paths = []string{r.Dir}
	if result := r.mustDeploy(m); err == nil && !result.Unchanged {
		t.Error("destinations were not written and not refused")
	}
	if len(r.commands.ran) == 0 {
		return
	}
	r = s.rig(t)
	before := r.state()
	r.Policy.Commands = [][]string{{"/bin/true"}}
	if _, err := r.deploy(t.Context(), m); err == nil || !strings.Contains(err.Error(), "CERTCTL_ALLOWED_COMMANDS") || !strings.Contains(err.Error(), "_command") {
		t.Errorf("a command that is not allowed: got %v", err)
	}
	if after := r.state(); !maps.Equal(before, after) || len(r.commands.ran) > 0 {
		t.Errorf("the target changed (%q), or commands were run (%d)", changed(before, after), len(r.commands.ran))
	}
}

// commands fakes the commands of a target.
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

// PEM encodes certificates as connectors write them to files.
func PEM(certificates ...*x509.Certificate) []byte {
	return pemutil.EncodeCertificates(certificates...)
}
