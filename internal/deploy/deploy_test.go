package deploy

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/csr"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
	"certctl-agent/internal/transaction"
)

// world fakes everything that a Deployer uses, except the key store.
type world struct {
	t       *testing.T
	options Options
	keys    *keystore.Store
	ca      *testca.CA
	log     bytes.Buffer

	renewals int

	mu        sync.Mutex
	certs     map[api.ID][]byte // by certificate id: what the control plane has
	fetchErr  error
	statusErr error
	statuses  []string // reported, as job=status

	deploy    func(ctx context.Context, m *connector.Material) (transaction.Result, error)
	installed []string // targets, in order
	material  *connector.Material
	promotion []keystore.Change
	settle    func(ctx context.Context, targetID, keyPath string) error // nil: nothing to settle
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, ca: testca.Must(t), certs: make(map[api.ID][]byte)}
	log := slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	if w.keys, err = keystore.Open(keystore.Owner{}, t.TempDir(), log); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.keys.Close() })
	w.deploy = func(context.Context, *connector.Material) (transaction.Result, error) {
		return transaction.Result{}, nil
	}
	w.options = Options{
		Plane:    w,
		Keys:     w.keys,
		Engine:   w,
		Types:    []connector.Type{{Name: "NGINX", New: w.connector}, {Name: "Apache", New: w.connector}},
		Overlays: targetconf.Overlays{Dir: t.TempDir()},
		Host:     connector.Host{Policy: &policy.Policy{}, Log: log},
	}
	return w
}

// Certificate implements Plane.
func (w *world) Certificate(ctx context.Context, certID api.ID) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.certs[certID], w.fetchErr
}

// ReportStatus implements Plane.
func (w *world) ReportStatus(ctx context.Context, job api.ID, s api.JobStatus) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.statuses = append(w.statuses, string(job)+"="+s.Status)
	return w.statusErr
}

func (w *world) connector(c *targetconf.Config, _ connector.Host) (connector.Connector, error) {
	var config struct {
		Path string `json:"cert_path"`
	}
	return &fakeConnector{endpoint: c.Common.Endpoint()}, c.Decode(&config)
}

// fakeConnector proposes an empty plan.
type fakeConnector struct{ endpoint *tlsprobe.Endpoint }

// Plan implements connector.Connector.
func (c *fakeConnector) Plan(context.Context, *connector.Material) (*connector.Plan, error) {
	return &connector.Plan{Serves: c.endpoint}, nil
}

// Settle implements Engine.
func (w *world) Settle(ctx context.Context, targetID api.ID, keyPath string) error {
	if w.settle == nil {
		return nil
	}
	return w.settle(ctx, string(targetID), keyPath)
}

// Deploy implements Engine. It installs the key, and leaves the rest to world.deploy.
func (w *world) Deploy(ctx context.Context, d transaction.Deployment) (transaction.Result, error) {
	w.mu.Lock()
	w.material, w.promotion = d.Material, d.Promotion
	w.installed = append(w.installed, string(d.Target))
	w.mu.Unlock()
	plan, err := d.Connector.Plan(ctx, d.Material)
	if err != nil {
		return transaction.Result{}, err
	}
	result, err := w.deploy(ctx, d.Material)
	for _, change := range d.Promotion {
		if err == nil {
			err = os.WriteFile(change.Path, change.Data, keystore.FileMode)
		}
	}
	result.Serves = plan.Serves
	return result, err
}

func newKey() (crypto.Signer, error) { return csr.GenerateKey("ecdsa-p256") }

// renew makes a new key and issues a certificate for it.
func (w *world) renew(certID api.ID, template testca.Template) *testca.Issued {
	w.t.Helper()
	w.renewals++
	key, err := w.keys.Pending(certID, api.ID(fmt.Sprint("csr-", w.renewals)), newKey)
	if err != nil {
		w.t.Fatal(err)
	}
	template.PublicKey = key.Signer.Public()
	return w.issue(certID, template)
}

func (w *world) issue(certID api.ID, template testca.Template) *testca.Issued {
	w.t.Helper()
	issued, err := w.ca.Issue(template)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.certs[certID] = issued.PEM()
	return issued
}

func job(config string) api.Job {
	return api.Job{ID: "job-1", Type: api.TypeDeployment, Status: api.StatusRunning, CertificateID: "cert-1",
		TargetID: "target-1", TargetType: "NGINX", TargetConfig: json.RawMessage(config)}
}

func (w *world) run(j api.Job) Outcome {
	w.t.Helper()
	outcome, err := New(w.options).Deploy(w.t.Context(), w.t.Context(), j, Holds{})
	if err != nil {
		w.t.Fatalf("temporary error: %v", err)
	}
	return outcome
}

// role returns the present role of the certificate's key.
func (w *world) role(leaf *x509.Certificate) keystore.Role {
	key, _ := w.keys.Find("cert-1", leaf.PublicKey)
	return key.Role
}

func TestCompleted(t *testing.T) {
	w := newWorld(t)
	first := w.renew("cert-1", testca.Template{CommonName: "web.example.org", Intermediates: 1})
	w.deploy = func(context.Context, *connector.Material) (transaction.Result, error) {
		return transaction.Result{Warnings: []string{"a chain file was left"}}, nil
	}
	got := w.run(job(`{"cert_path":"/x","surprise":1}`))
	if got.Status != api.StatusCompleted || got.Error != "" || got.Unchanged || got.Broken || got.Verification != nil {
		t.Errorf("outcome %+v", got)
	}
	if got.CommonName != "web.example.org" || !got.NotAfter.Equal(first.Leaf.NotAfter) || got.Fingerprint != pemutil.Fingerprint(first.Leaf) {
		t.Errorf("certificate in the outcome: %+v", got)
	}
	m := w.material
	if !m.Leaf.Equal(first.Leaf) || len(m.Chain) != 2 || m.KeyPath != w.keys.Path("cert-1") || len(w.promotion) != 1 {
		t.Errorf("material %+v", m)
	}
	if bytes.ContainsFunc(m.KeyPEM, func(r rune) bool { return r != 0 }) {
		t.Error("the key was not cleared after use")
	}
	if got := w.role(first.Leaf); got != keystore.Current {
		t.Errorf("the key is %q, want current", got)
	}
	if want := []string{"job-1=Running"}; !slices.Equal(w.statuses, want) {
		t.Errorf("reported %v, want %v", w.statuses, want)
	}
	for _, want := range []string{"a chain file was left", "surprise"} {
		if !strings.Contains(w.log.String(), want) {
			t.Errorf("the log lacks %q: %s", want, &w.log)
		}
	}

	// The next renewal keeps the replaced key as the previous one.
	second := w.renew("cert-1", testca.Template{})
	w.run(job(`{}`))
	if len(w.promotion) != 2 {
		t.Errorf("key files: %+v", w.promotion)
	}
	if a, b := w.role(first.Leaf), w.role(second.Leaf); a != keystore.Previous || b != keystore.Current {
		t.Errorf("roles %q, %q, want previous, current", a, b)
	}

	w.deploy = func(context.Context, *connector.Material) (transaction.Result, error) {
		return transaction.Result{Unchanged: true}, nil
	}
	if got := w.run(job(`{}`)); !got.Unchanged || got.Status != api.StatusCompleted || len(w.promotion) != 0 {
		t.Errorf("a second time: %+v, key files %v", got, w.promotion)
	}
}

// TestLongCommonName checks that the common name that is remembered of a target is bounded.
func TestLongCommonName(t *testing.T) {
	w := newWorld(t)
	w.renew("cert-1", testca.Template{CommonName: strings.Repeat("x", 100_000)})
	if got := w.run(job("{}")); got.Status != api.StatusCompleted || len(got.CommonName) > 300 {
		t.Errorf("%s, error %q, a common name of %d bytes", got.Status, got.Error, len(got.CommonName))
	}
}

// TestRefusedBeforeTouching lists what fails a job without any change.
func TestRefusedBeforeTouching(t *testing.T) {
	tests := []struct {
		name   string
		change func(*world, *api.Job)
		want   string
	}{
		{"unknown type", func(w *world, j *api.Job) { j.TargetType = "nginx" }, `"nginx" is unknown (case matters); this agent version supports Apache, NGINX`},
		{"config", func(w *world, j *api.Job) { j.TargetConfig = json.RawMessage(`[]`) }, "object"},
		{"common key", func(w *world, j *api.Job) { j.TargetConfig = json.RawMessage(`{"port":99999}`) }, "port"},
		{"masked", func(w *world, j *api.Job) { j.TargetConfig = json.RawMessage(`{"cert_path":["x"]}`) }, "cert_path"},
		{"pinned type", func(w *world, j *api.Job) {
			dir := w.t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "target-1.json"), []byte(`{"target_type":"Apache"}`), 0o600); err != nil {
				w.t.Fatal(err)
			}
			w.options.Overlays = targetconf.Overlays{Dir: dir}
		}, "Apache"},
		{"pinned type, empty type", func(w *world, j *api.Job) {
			dir := w.t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "target-1.json"), []byte(`{"target_type":"Apache"}`), 0o600); err != nil {
				w.t.Fatal(err)
			}
			w.options.Overlays = targetconf.Overlays{Dir: dir}
			j.TargetType = ""
		}, "Apache"},
		{"not found", func(w *world, j *api.Job) {
			w.fetchErr = &api.StatusError{Call: "certificate", Status: http.StatusNotFound, Body: "no such certificate", Own: true}
		}, "no such certificate"},
		{"no PEM", func(w *world, j *api.Job) { w.certs["cert-1"] = []byte("hello") }, "CERTIFICATE"},
		{"a key in it", func(w *world, j *api.Job) {
			other := w.issue("other", testca.Template{})
			w.certs["cert-1"] = append(w.certs["cert-1"], other.KeyPEM()...)
		}, "PRIVATE KEY"},
		{"unrelated chain", func(w *world, j *api.Job) {
			leaf, _ := pem.Decode(w.certs["cert-1"])
			w.certs["cert-1"] = append(pem.EncodeToMemory(leaf), testca.Must(w.t).PEM()...)
		}, "issued the leaf"},
		{"another agent's", func(w *world, j *api.Job) { w.issue("cert-1", testca.Template{}) },
			"certificate cert-1 cannot be deployed here, and nothing was touched"},
		{"expired", func(w *world, j *api.Job) {
			w.renew("cert-1", testca.Template{NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(-time.Second)})
		}, "expired"},
		{"long ahead", func(w *world, j *api.Job) {
			w.renew("cert-1", testca.Template{NotBefore: time.Now().Add(6 * time.Minute)})
		}, "not valid before"},
		{"long text", func(w *world, j *api.Job) {
			w.fetchErr = &api.StatusError{Call: "certificate", Status: 400, Body: strings.Repeat("\x1b[31m", 2000), Own: true}
		}, "answered 400"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.renew("cert-1", testca.Template{})
			j := job(`{}`)
			test.change(w, &j)
			before := files(t, w)
			got := w.run(j)
			if got.Status != api.StatusFailed || got.Broken || !strings.Contains(got.Error, test.want) {
				t.Errorf("outcome %+v, want an error with %q", got, test.want)
			}
			if len(got.Error) > maxError || strings.ContainsRune(got.Error, 0x1b) || strings.Contains(got.Error, "BEGIN") {
				t.Errorf("the error is too long or not printable: %q", got.Error)
			}
			if len(w.installed) > 0 || !slices.Equal(files(t, w), before) {
				t.Errorf("touched: targets %v, keys %v, before %v", w.installed, files(t, w), before)
			}
		})
	}
}

func files(t *testing.T, w *world) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Dir(w.keys.Path("x")) + "/*")
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestAnotherAgentsCertificate(t *testing.T) {
	w := newWorld(t)
	w.issue("cert-1", testca.Template{})
	got := w.run(job(`{}`))
	for _, want := range []string{"cert-1", "another agent", "none"} {
		if !strings.Contains(got.Error, want) {
			t.Errorf("the error %q lacks %q", got.Error, want)
		}
	}
}

func TestTemporary(t *testing.T) {
	for name, cause := range map[string]error{
		"network": errors.New("connection reset"),
		"server":  &api.StatusError{Status: 503},
		"limit":   &api.StatusError{Status: 429, RetryAfter: time.Second},
		"gone":    &api.StatusError{Status: 410},
		// The agent decides for how long to retry.
		"gateway":   &api.StatusError{Status: 404, Body: "default backend"},
		"too large": api.ErrTooLarge,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.renew("cert-1", testca.Template{})
			w.fetchErr = cause
			outcome, err := New(w.options).Deploy(t.Context(), t.Context(), job(`{}`), Holds{})
			if !errors.Is(err, cause) || outcome.Status != "" {
				t.Errorf("got %+v, %v, want the error", outcome, err)
			}
			if api.RetryAfter(err) != api.RetryAfter(cause) {
				t.Errorf("Retry-After is lost: %v", err)
			}
		})
	}
}

func TestStopping(t *testing.T) {
	w := newWorld(t)
	w.renew("cert-1", testca.Template{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(w.options).Deploy(ctx, t.Context(), job(`{}`), Holds{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want cancelled", err)
	}
	if len(w.installed) > 0 {
		t.Error("a transaction was begun while the agent was stopping")
	}
	// Once begun, the transaction does not end with calls.
	ctx, cancel = context.WithCancel(t.Context())
	w.deploy = func(work context.Context, m *connector.Material) (transaction.Result, error) {
		cancel()
		return transaction.Result{}, work.Err()
	}
	if got, err := New(w.options).Deploy(ctx, t.Context(), job(`{}`), Holds{}); err != nil || got.Status != api.StatusCompleted {
		t.Errorf("got %+v, %v", got, err)
	}
}

// TestNotYetValid waits for a certificate from a CA whose clock is slightly ahead.
func TestNotYetValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		began := time.Now()
		w.renew("cert-1", testca.Template{NotBefore: began.Add(3 * time.Minute)})

		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := New(w.options).Deploy(ctx, t.Context(), job(`{}`), Holds{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want an end of the wait", err)
		}
		if got := w.run(job(`{}`)); got.Status != api.StatusCompleted || got.Duration != 2*time.Minute {
			t.Errorf("outcome %+v", got)
		}
		if got, want := time.Since(began), 3*time.Minute; got != want {
			t.Errorf("took %v, want %v", got, want)
		}

		// Other jobs use its slot in the meantime.
		w.renew("cert-1", testca.Template{NotBefore: time.Now().Add(time.Minute)})
		var waited time.Duration
		yield := func(_ int, wait func(context.Context) error) error {
			began := time.Now()
			err := wait(t.Context())
			waited = time.Since(began)
			return err
		}
		if got, err := New(w.options).Deploy(t.Context(), t.Context(), job(`{}`), Holds{Yield: yield}); err != nil || got.Status != api.StatusCompleted || waited != time.Minute {
			t.Errorf("got %+v, %v, %v without a slot", got, err, waited)
		}
	})
}

func TestChain(t *testing.T) {
	for _, drop := range []bool{false, true} {
		w := newWorld(t)
		issued := w.renew("cert-1", testca.Template{Intermediates: 2})
		chain := issued.Chain
		w.certs["cert-1"] = pemutil.EncodeCertificates(chain[0], chain[3], chain[2], chain[1])
		w.run(job(fmt.Sprintf(`{"drop_root":%v}`, drop)))
		want := chain[1:]
		if drop {
			want = chain[1:3]
		}
		if !slices.EqualFunc(w.material.Chain, want, (*x509.Certificate).Equal) {
			t.Errorf("drop_root %v: the chain has %d certificates in another order, want %d", drop, len(w.material.Chain), len(want))
		}
	}
}

// TestStrayCertificate checks that an unrelated certificate in the chain does not prevent a
// renewal.
func TestStrayCertificate(t *testing.T) {
	w := newWorld(t)
	chain := w.renew("cert-1", testca.Template{Intermediates: 1}).Chain
	stray := w.renew("cert-2", testca.Template{CommonName: "stray.example.org"}).Leaf
	w.certs["cert-1"] = pemutil.EncodeCertificates(chain[0], stray, chain[1])
	if got := w.run(job(`{}`)); got.Status != api.StatusCompleted {
		t.Errorf("outcome %+v", got)
	}
	if !slices.EqualFunc(w.material.Chain, chain[1:2], (*x509.Certificate).Equal) {
		t.Errorf("installed a chain of %d certificates, want the one that issued the leaf", len(w.material.Chain))
	}
	if !strings.Contains(w.log.String(), "stray.example.org") || !strings.Contains(w.log.String(), "is left out") {
		t.Errorf("the log does not say what was left out: %s", &w.log)
	}
}

func TestNothingToInstall(t *testing.T) {
	for _, id := range []string{"", "target-1"} {
		w := newWorld(t)
		w.options.Verify = true
		old := w.renew("cert-1", testca.Template{})
		w.run(job(`{}`))
		issued := w.renew("cert-1", testca.Template{})
		j := job(`{"host":"localhost"}`)
		j.TargetType, j.TargetID = "", api.ID(id)
		if got := w.run(j); got.Status != api.StatusCompleted || got.Verification != nil || got.Fingerprint != pemutil.Fingerprint(issued.Leaf) {
			t.Errorf("outcome %+v", got)
		}
		if len(w.installed) != 1 {
			t.Errorf("installed on %v", w.installed[1:])
		}
		if a, b := w.role(old.Leaf), w.role(issued.Leaf); a != keystore.Previous || b != keystore.Current {
			t.Errorf("roles %q, %q, want previous, current", a, b)
		}
	}
}

func TestConnectorFails(t *testing.T) {
	tests := []struct {
		name   string
		deploy func(context.Context, *connector.Material) (transaction.Result, error)
		want   string
		broken bool
	}{
		{"rolled back", func(context.Context, *connector.Material) (transaction.Result, error) {
			return transaction.Result{}, errors.New("reload failed: exit status 1; the previous certificate is back in place")
		}, "reload failed", false},
		{"not rolled back", func(context.Context, *connector.Material) (transaction.Result, error) {
			return transaction.Result{}, &transaction.BrokenError{Cause: errors.New("reload"), Rollback: errors.New("disk"), Backups: "/b"}
		}, "needs attention", true},
		{"panic", func(context.Context, *connector.Material) (transaction.Result, error) {
			panic("boom")
		}, "internal error", true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			issued := w.renew("cert-1", testca.Template{})
			w.deploy = test.deploy
			d := New(w.options)
			for range 2 { // the second time shows that the locks are free
				got, err := d.Deploy(t.Context(), t.Context(), job(`{}`), Holds{})
				if err != nil || got.Status != api.StatusFailed || got.Broken != test.broken || !strings.Contains(got.Error, test.want) {
					t.Errorf("outcome %+v, %v", got, err)
				}
			}
			if got := w.role(issued.Leaf); got != keystore.Pending {
				t.Errorf("the key is %q, want still pending", got)
			}
			if test.name == "panic" && !strings.Contains(w.log.String(), "deploy_test.go") {
				t.Errorf("no stack in the log: %s", &w.log)
			}
		})
	}
}

// TestTargetsOfOneCertificate deploys to three targets at once, as the agent does: the first
// promotes the key alone, then the others run concurrently.
func TestTargetsOfOneCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		old := w.renew("cert-1", testca.Template{})
		w.run(job(`{}`))
		issued := w.renew("cert-1", testca.Template{})
		w.installed = nil
		promotions := 0
		w.deploy = func(ctx context.Context, m *connector.Material) (transaction.Result, error) {
			w.mu.Lock()
			if len(w.promotion) > 0 {
				promotions++
			}
			w.mu.Unlock()
			time.Sleep(time.Minute)
			return transaction.Result{}, nil
		}
		d := New(w.options)
		began := time.Now()
		var group sync.WaitGroup
		alone := make(chan struct{}, 1)
		for i := range 3 {
			group.Go(func() {
				j := job(`{}`)
				j.ID, j.TargetID = api.ID(fmt.Sprint("job-", i)), api.ID(fmt.Sprint("target-", i))
				alone <- struct{}{}
				share := sync.OnceFunc(func() { <-alone })
				defer share()
				if got, err := d.Deploy(t.Context(), t.Context(), j, Holds{ReleaseCertificate: share}); err != nil || got.Status != api.StatusCompleted {
					t.Errorf("%s: %+v, %v", j.ID, got, err)
				}
			})
		}
		group.Wait()
		if got, want := time.Since(began), 2*time.Minute; got != want {
			t.Errorf("took %v, want %v", got, want)
		}
		if promotions != 1 || len(w.installed) != 3 {
			t.Errorf("%d promotions on %v, want 1 on three", promotions, w.installed)
		}
		if a, b := w.role(old.Leaf), w.role(issued.Leaf); a != keystore.Previous || b != keystore.Current {
			t.Errorf("roles %q, %q, want previous, current", a, b)
		}
	})
}

// TestSettledFirst checks that interrupted deployments are recovered before the key is looked up,
// and that nothing is reported while a job waits for that.
func TestSettledFirst(t *testing.T) {
	w := newWorld(t)
	w.renew("cert-1", testca.Template{})
	w.run(job(`{}`))
	old, err := os.ReadFile(w.keys.Path("cert-1"))
	if err != nil {
		t.Fatal(err)
	}
	issued := w.renew("cert-1", testca.Template{})
	w.run(job(`{}`)) // promotes the key
	w.statuses, w.installed = nil, nil
	var asked []string
	unsettled := &transaction.BusyError{Err: errors.New("not recovered yet")}
	w.settle = func(_ context.Context, targetID, keyPath string) error {
		if asked = append(asked, targetID+" "+filepath.Base(keyPath)); len(asked) == 1 {
			return unsettled
		}
		return os.WriteFile(keyPath, old, 0o600) // takes the promotion back
	}
	if got, err := New(w.options).Deploy(t.Context(), t.Context(), job(`{}`), Holds{}); !errors.Is(err, unsettled) || got.RunningUnanswered {
		t.Errorf("while it is not settled: %+v, %v", got, err)
	}
	if len(w.statuses)+len(w.installed) > 0 {
		t.Errorf("while it is not settled: reported %v, installed %v", w.statuses, w.installed)
	}
	if got := w.run(job(`{}`)); got.Status != api.StatusCompleted {
		t.Errorf("outcome %+v", got)
	}
	if got := w.role(issued.Leaf); got != keystore.Current {
		t.Errorf("the deployed key is %q, want current", got)
	}
	if want := []string{"target-1 cert-1.key", "target-1 cert-1.key"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %v, want %v", asked, want)
	}
}

// TestBusyTarget checks that a busy target is a temporary error.
func TestBusyTarget(t *testing.T) {
	w := newWorld(t)
	w.renew("cert-1", testca.Template{})
	busy := &transaction.BusyError{Err: errors.New("another deployment or another program holds it")}
	w.deploy = func(context.Context, *connector.Material) (transaction.Result, error) {
		return transaction.Result{}, busy
	}
	if got, err := New(w.options).Deploy(t.Context(), t.Context(), job(`{}`), Holds{}); !errors.Is(err, busy) || got.Status != "" {
		t.Errorf("got %+v, %v, want a temporary error", got, err)
	}
}

func TestRunningIsRefused(t *testing.T) {
	w := newWorld(t)
	w.renew("cert-1", testca.Template{})
	w.statusErr = &api.StatusError{Call: "job status", Status: http.StatusGone}
	if got := w.run(job(`{}`)); got.Status != api.StatusCompleted {
		t.Errorf("outcome %+v", got)
	}
}

// TestRunningIsNotAnswered checks RunningUnanswered: such a report may arrive after the final one.
func TestRunningIsNotAnswered(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want bool
	}{
		{"taken", nil, false},
		{"refused", &api.StatusError{Status: http.StatusTooManyRequests}, false},
		{"network", errors.New("connection reset"), true},
		{"gateway", &api.StatusError{Status: http.StatusGatewayTimeout}, true},
		{"server", &api.StatusError{Status: http.StatusInternalServerError}, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.statusErr = test.err
			w.renew("cert-1", testca.Template{})
			d := New(w.options)
			if outcome, err := d.Deploy(t.Context(), t.Context(), job(`{}`), Holds{}); err != nil || outcome.RunningUnanswered != test.want {
				t.Errorf("unsure %v, error %v, want %v", outcome.RunningUnanswered, err, test.want)
			}
			w.fetchErr = errors.New("connection reset")
			if outcome, err := d.Deploy(t.Context(), t.Context(), job(`{}`), Holds{}); err == nil || outcome.RunningUnanswered != test.want {
				t.Errorf("a try that did not begin: unsure %v, error %v, want %v", outcome.RunningUnanswered, err, test.want)
			}
		})
	}
}

func TestVerification(t *testing.T) {
	unreachable := errors.New("connection refused \x1b[31m")
	tests := []struct {
		name   string
		config string
		off    bool
		// serves returns what the server serves at some time after the deployment; "new" stands for
		// the deployed certificate.
		serves func(after time.Duration) (string, error)
		took   time.Duration
		want   *api.Verification // without the target and the expected one
	}{
		{name: "no host", config: `{"port":443}`},
		{name: "off", config: `{"host":"localhost"}`, off: true},
		{name: "at once", config: `{"host":"localhost"}`,
			serves: func(time.Duration) (string, error) { return "new", nil },
			want:   &api.Verification{ActualFingerprint: "new", Verified: true}},
		{name: "after a while", config: `{"address":"localhost"}`,
			serves: func(after time.Duration) (string, error) {
				switch {
				case after < time.Second:
					return "old", nil
				case after < 2*time.Second:
					return "", unreachable
				}
				return "new", nil
			},
			took: 2 * time.Second,
			want: &api.Verification{ActualFingerprint: "new", Verified: true}},
		{name: "another one", config: `{"host":"localhost"}`,
			serves: func(time.Duration) (string, error) { return "old", nil },
			took:   verifyBudget,
			want:   &api.Verification{ActualFingerprint: "old"}},
		{name: "gone in the end", config: `{"host":"localhost"}`,
			serves: func(after time.Duration) (string, error) {
				if after < 3*time.Second {
					return "old", nil
				}
				return "", unreachable
			},
			took: verifyBudget,
			want: &api.Verification{ActualFingerprint: "unreachable", Error: "connection refused \uFFFD[31m"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				issued := w.renew("cert-1", testca.Template{})
				fingerprint := pemutil.Fingerprint(issued.Leaf)
				var began time.Time
				w.deploy = func(context.Context, *connector.Material) (transaction.Result, error) {
					began = time.Now()
					return transaction.Result{}, nil
				}
				w.options.Verify = !test.off
				w.options.Probe = func(ctx context.Context, endpoint tlsprobe.Endpoint) (tlsprobe.Result, error) {
					if endpoint.Address != "localhost:443" || endpoint.ServerName != "localhost" {
						t.Errorf("probed %+v", endpoint)
					}
					got, err := test.serves(time.Since(began))
					return tlsprobe.Result{Fingerprint: strings.Replace(got, "new", fingerprint, 1)}, err
				}
				got := w.run(job(test.config))
				if got.Status != api.StatusCompleted {
					t.Errorf("outcome %+v", got)
				}
				if took := time.Since(began); took != test.took {
					t.Errorf("took %v, want %v", took, test.took)
				}
				if (got.Verification == nil) != (test.want == nil) {
					t.Fatalf("got %+v, want %+v", got.Verification, test.want)
				}
				if test.want == nil {
					return
				}
				test.want.TargetID, test.want.ExpectedFingerprint = "target-1", fingerprint
				test.want.ActualFingerprint = strings.Replace(test.want.ActualFingerprint, "new", fingerprint, 1)
				if *got.Verification != *test.want {
					t.Errorf("got %+v, want %+v", got.Verification, test.want)
				}
			})
		})
	}
}

// TestVerificationAsks checks what is probed, and that it does not matter whether the host is the
// listener or the proxy in front of it.
func TestVerificationAsks(t *testing.T) {
	for _, behind := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			issued := w.renew("cert-1", testca.Template{})
			w.options.Verify = true
			w.options.Probe = func(_ context.Context, endpoint tlsprobe.Endpoint) (tlsprobe.Result, error) {
				if endpoint.KeyType != issued.Leaf.PublicKeyAlgorithm {
					t.Errorf("looked for a key of type %v, want %v", endpoint.KeyType, issued.Leaf.PublicKeyAlgorithm)
				}
				if endpoint.ProxyProtocol == behind {
					return tlsprobe.Result{}, errors.New("closed")
				}
				return tlsprobe.Result{Fingerprint: pemutil.Fingerprint(issued.Leaf)}, nil
			}
			got := w.run(job(`{"host":"localhost","post_deploy_verify":{"proxy_protocol":true}}`))
			if got.Verification == nil || !got.Verification.Verified {
				t.Errorf("behind a proxy: %v: got %+v", behind, got.Verification)
			}
			for _, config := range []string{`{"host":"localhost"}`, `{"host":"localhost","post_deploy_verify":{"proxy_protocol":false}}`} {
				w.options.Probe = func(_ context.Context, endpoint tlsprobe.Endpoint) (tlsprobe.Result, error) {
					if endpoint.ProxyProtocol {
						t.Errorf("%s: a header that nobody asked for", config)
					}
					return tlsprobe.Result{}, errors.New("closed")
				}
				w.run(job(config))
			}
		})
	}
}

// TestVerificationIsCut checks that a probe that hangs is cut short, and that nothing is reported
// if the agent stops in the meantime.
func TestVerificationIsCut(t *testing.T) {
	for _, stops := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.renew("cert-1", testca.Template{})
			w.options.Verify = true
			work, stop := context.WithCancel(t.Context())
			defer stop()
			w.options.Probe = func(ctx context.Context, _ tlsprobe.Endpoint) (tlsprobe.Result, error) {
				if stops {
					stop()
				}
				<-ctx.Done()
				return tlsprobe.Result{}, ctx.Err()
			}
			got, err := New(w.options).Deploy(t.Context(), work, job(`{"host":"localhost"}`), Holds{})
			if err != nil || got.Status != api.StatusCompleted {
				t.Fatalf("got %+v, %v", got, err)
			}
			if v := got.Verification; stops != (v == nil) || v != nil && (v.ActualFingerprint != api.Unreachable || v.Error == "") {
				t.Errorf("agent stops: %v, report %+v", stops, v)
			}
		})
	}
}
