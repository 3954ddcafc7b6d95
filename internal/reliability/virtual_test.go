package reliability_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/config"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/tlsprobe"
)

// world is a control plane, a host, and the agents that live on it one after the other, in a
// synctest bubble.
type world struct {
	t     *testing.T
	rand  *rand.Rand // of the test's own goroutine
	log   *slog.Logger
	plane *devplane.Plane
	agent string // id
	site  *site
	lives int
	life  *life // nil: no agent is running

	config *config.Config

	healing []func()      // each ends a fault
	over    chan struct{} // closed at the end of the run

	mu       sync.Mutex // guards what follows
	draws    *rand.Rand // of everything else
	failing  bool       // commands fail now and then
	loaded   map[string]string
	claims   map[string]int // by deployment: poll answers with it that reached the agent
	begun    map[string]int // by deployment: the claim of the last "Running"
	outcomes map[outcomeKey][]string
	lostWork int // polls whose answers never reached the agent
	problems []error
}

// outcomeKey is one claim of a job.
type outcomeKey struct {
	job   string
	claim int
}

// life is one agent from start to end. It is also the control plane that the agent sees, and
// records calls and answers.
type life struct {
	app.Plane
	world *world
	app   *app.App
	stop  context.CancelFunc
	ended chan error

	mu    sync.Mutex // guards what follows
	dead  bool
	conns []net.Conn
	polls int // in progress
}

func newWorld(t *testing.T, seed uint64, servers []server) *world {
	return newWorldWith(t, seed, servers, devplane.Options{})
}

func newWorldWith(t *testing.T, seed uint64, servers []server, options devplane.Options) *world {
	w := &world{t: t, rand: rand.New(rand.NewPCG(seed, 1)), draws: rand.New(rand.NewPCG(seed, 2)),
		over: make(chan struct{}), loaded: make(map[string]string), claims: make(map[string]int), begun: make(map[string]int), outcomes: make(map[outcomeKey][]string)}
	out := io.Discard
	if oneSeed() {
		out = t.Output()
	}
	w.log = slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	base := needs.MemoryDir(t)
	options.Dir = base
	var err error
	if w.plane, err = devplane.New(options); err != nil {
		t.Fatal(err)
	}
	w.agent = w.plane.RegisterAgent("web")
	if w.site, err = newSite(filepath.Join(base, "host"), servers); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(w.site.path("targets.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.configure()
	certs := make(map[string][]string)
	for _, x := range servers {
		config := w.site.config(x, "validate "+x.id, "reload "+x.id)
		config["host"], config["port"] = x.id+".example.org", 443
		w.plane.AddTarget(devplane.Target{ID: x.id, Agent: w.agent, Type: "NGINX", Config: config})
		certs[x.cert] = append(certs[x.cert], x.id)
	}
	for id, targets := range certs {
		w.plane.AddCertificate(devplane.Certificate{ID: id, CommonName: id + ".example.org",
			SANs: []string{id + ".example.org"}, Targets: targets})
	}
	return w
}

func (w *world) fail(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.problems) < 20 {
		w.problems = append(w.problems, fmt.Errorf(format, args...))
	}
}

// draw draws for goroutines whose order the test does not determine.
func (w *world) draw(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.draws.IntN(n)
}

// configure sets the configuration, as the operator of the host would.
func (w *world) configure(more ...string) {
	set := slices.Concat([]string{
		"CERTCTL_SERVER_URL=" + w.plane.URL,
		"CERTCTL_SERVER_CA_BUNDLE_PATH=" + w.plane.CAFile(),
		"CERTCTL_API_KEY=" + w.plane.APIKey,
		"CERTCTL_AGENT_ID=" + w.agent,
		"CERTCTL_KEY_DIR=" + w.site.keyDir(),
		"CERTCTL_STATE_DIR=" + w.site.path("state"),
		"CERTCTL_TARGETS_DIR=" + w.site.path("targets.d"),
		"CERTCTL_ALLOWED_PATHS=" + w.site.path("www"),
		"CERTCTL_MAX_DEPLOYS=2",
		"CERTCTL_SHUTDOWN_GRACE=20s",
	}, more)
	getenv := func(name string) string {
		for _, setting := range slices.Backward(set) {
			if value, ok := strings.CutPrefix(setting, name+"="); ok {
				return value
			}
		}
		return ""
	}
	var err error
	if w.config, err = config.Load(nil, getenv, config.Options{DefaultFile: w.site.path("no.env")}); err != nil {
		w.t.Fatal(err)
	}
}

// stateDir returns the agent's state directory.
func (w *world) stateDir() string { return w.config.InstanceStateDir() }

// start starts an agent as the daemon does.
func (w *world) start() {
	w.lives++
	l := &life{world: w, ended: make(chan error, 1)}
	if err := l.open(); err != nil {
		w.t.Fatalf("start %d: %v", w.lives, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	go func() { l.ended <- l.app.Agent.Run(ctx) }()
	w.life = l
}

func (l *life) open() (err error) {
	w := l.world
	l.app, err = app.Open(context.Background(), app.Options{Config: w.config, Log: w.log, Notify: silent{}, MachineID: "machine",
		Seams: app.Seams{
			Dial:  l.dial,
			Plane: func(p app.Plane) app.Plane { l.Plane = p; return l },
			Run:   l.run,
			Query: l.query,
			Probe: w.probe,
			Rand:  func(n int64) int64 { w.mu.Lock(); defer w.mu.Unlock(); return w.draws.Int64N(n) },
		}})
	if err != nil {
		return err
	}
	if found := l.app.Recovered; len(found.Failed)+len(found.SetAside) > 0 {
		return fmt.Errorf("recovery: %+v", found)
	}
	if err := w.site.checkPairs(); err != nil {
		return fmt.Errorf("after recovery: %w", err)
	}
	return nil
}

type silent struct{}

func (silent) Status(string) bool { return true }
func (silent) Watchdog()          {}

// dial connects, unless this life has ended.
func (l *life) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := l.world.plane.Dial(ctx, network, address)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && l.dead {
		conn.Close()
		err = errors.New("the process is gone")
	}
	if err != nil {
		return nil, err
	}
	l.conns = append(l.conns, conn)
	return conn, nil
}

func (l *life) isDead() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

// crash ends an agent as SIGKILL does, at a moment when all its goroutines wait for the network, a
// command or a timer. Whatever it does from now on happens on an abandoned disk. The next agent
// continues with a copy of the present one.
func (w *world) crash() {
	synctest.Wait()
	l := w.life
	w.life = nil
	l.mu.Lock()
	l.dead = true
	conns, polls := l.conns, l.polls
	l.mu.Unlock()
	w.mu.Lock()
	w.lostWork += polls
	w.mu.Unlock()
	// The agent does not run before its connections are closed, so the copy is consistent.
	grave := w.site.dir + ".dead"
	if err := os.Rename(w.site.dir, grave); err != nil {
		w.t.Fatal(err)
	}
	if err := copyTree(w.site.dir, grave); err != nil {
		w.t.Fatal(err)
	}
	for _, conn := range conns {
		conn.Close()
	}
	l.end()
	if err := os.RemoveAll(grave); err != nil {
		w.t.Fatal(err)
	}
}

func (l *life) end() {
	l.stop()
	if err := <-l.ended; err != nil {
		l.world.fail("the agent ended with %v", err)
	}
	if err := l.app.Close(); err != nil {
		l.world.fail("close: %v", err)
	}
}

// terminate ends an agent as SIGTERM does.
func (w *world) terminate() {
	l := w.life
	w.life = nil
	l.end()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead = true; l.polls > 0 {
		w.fail("%d polls outlived the agent", l.polls)
	}
	for _, conn := range l.conns {
		conn.Close()
	}
}

// copyTree copies files with their modes, unlike os.CopyFS.
func copyTree(to, from string) error {
	return filepath.WalkDir(from, func(name string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		to := filepath.Join(to, rel)
		if entry.IsDir() {
			if err := os.Mkdir(to, 0o700); err != nil {
				return err
			}
			return os.Chmod(to, info.Mode().Perm())
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, data, 0o600); err != nil {
			return err
		}
		return os.Chmod(to, info.Mode().Perm())
	})
}

func (l *life) Work(ctx context.Context) (api.Work, error) {
	l.mu.Lock()
	l.polls++
	l.mu.Unlock()
	work, err := l.Plane.Work(ctx)
	l.mu.Lock()
	l.polls--
	dead := l.dead
	l.mu.Unlock()
	if dead {
		return work, errors.New("the process is gone")
	}
	w := l.world
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.lostWork++
	}
	for _, job := range work.Jobs {
		if job.IsDeployment() {
			w.claims[string(job.ID)]++
		}
	}
	return work, err
}

func (l *life) ReportStatus(ctx context.Context, id api.ID, s api.JobStatus) error {
	if !l.isDead() {
		w := l.world
		w.mu.Lock()
		job := string(id)
		// While the answer of a poll is being recorded, a verdict on the earlier claim may still leave.
		key := outcomeKey{job, w.begun[job]}
		if s.Status == api.StatusRunning {
			w.begun[job] = w.claims[job]
		} else if outcome := s.Status + ": " + s.Error; !slices.Contains(w.outcomes[key], outcome) {
			w.outcomes[key] = append(w.outcomes[key], outcome)
		}
		w.mu.Unlock()
	}
	return l.Plane.ReportStatus(ctx, id, s)
}

// run executes a server's command, which loads the pair in place.
func (l *life) run(ctx context.Context, c policy.Command) error {
	w := l.world
	took := time.Duration(w.draw(2000)) * time.Millisecond
	if w.draw(20) == 0 {
		took *= 20
	}
	select {
	case <-time.After(took):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if l.isDead() {
		return errors.New("the process is gone")
	}
	i := slices.IndexFunc(w.site.servers, func(x server) bool { return x.id == c.Argv[1] })
	leaf, err := w.site.pair(w.site.servers[i])
	if err != nil {
		w.fail("%s of %s: %v", c.Argv[0], c.Argv[1], err)
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failing && w.draws.IntN(8) == 0 {
		return errors.New("the server does not like it")
	}
	if c.Argv[0] == "reload" && leaf != nil {
		w.loaded[c.Argv[1]+".example.org:443"] = pemutil.Fingerprint(leaf)
	}
	return nil
}

// query stands for asking a server for its configuration. These servers have no program that could
// be asked.
func (l *life) query(_ context.Context, c policy.Command) ([]byte, error) {
	l.world.fail("the agent ran %q", c.Argv)
	return nil, errors.ErrUnsupported
}

// probe returns what a server has loaded.
func (w *world) probe(_ context.Context, e tlsprobe.Endpoint) (tlsprobe.Result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return tlsprobe.Result{Fingerprint: w.loaded[e.Address]}, nil
}

// disturb adds a fault for later requests.
func (w *world) disturb() {
	calls := []string{"", "", devplane.CallHeartbeat, devplane.CallWork, devplane.CallWork, devplane.CallCSR,
		devplane.CallCertificate, devplane.CallStatus, devplane.CallStatus, devplane.CallVerify}
	fault := devplane.Fault{Call: calls[w.rand.IntN(len(calls))], Skip: w.rand.IntN(4), Times: 1 + w.rand.IntN(3)}
	if w.rand.IntN(10) == 0 {
		fault.Times = 20 // an outage
	}
	switch w.rand.IntN(11) {
	case 0:
		fault.Drop = true
	case 1, 2:
		fault.LoseAnswer = true
	case 3:
		fault.LoseAnswer, fault.Delay = true, time.Duration(w.rand.IntN(60))*time.Second
	case 4:
		fault.Delay = time.Duration(w.rand.IntN(45)) * time.Second
	case 5:
		fault.Status = []int{408, 425, 500, 502, 503, 504}[w.rand.IntN(6)]
	case 6:
		fault.Status, fault.RetryAfter = 429, "1"
	case 7:
		fault.Status, fault.RetryAfter = 503, fmt.Sprint(w.rand.IntN(90))
	case 8:
		fault.Status, fault.Body = 200, "<html>front page</html>"
		fault.Header = http.Header{"Content-Type": {"text/html"}}
	case 9:
		fault.Status = 401
	case 10:
		fault.Handler = w.late(time.Duration(w.rand.IntN(180)) * time.Second)
	}
	w.healing = append(w.healing, w.plane.Inject(fault))
}

// heal ends all faults.
func (w *world) heal() {
	for _, remove := range w.healing {
		remove()
	}
	w.healing = nil
	w.setFailing(false)
}

// setFailing sets whether commands fail now and then.
func (w *world) setFailing(failing bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failing = failing
}

// late processes a request long after it was sent, even if nobody waits for the answer any more.
// The cause may be a queue in front of the control plane, or a kernel that retransmits what a
// process sent before it exited.
func (w *world) late(wait time.Duration) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(wait):
		case <-w.over:
			panic(http.ErrAbortHandler)
		}
		answer := httptest.NewRecorder()
		w.plane.Handler().ServeHTTP(answer, r.WithContext(context.WithoutCancel(r.Context())))
		rw.WriteHeader(answer.Code)
		_, _ = rw.Write(answer.Body.Bytes())
	})
}

// chaos is the part of a run with faults.
func (w *world) chaos() {
	certs := make(map[string]bool)
	for _, x := range w.site.servers {
		certs[x.cert] = true
	}
	for id := range certs {
		w.plane.StartIssuance(id)
	}
	for range 4 + w.rand.IntN(8) {
		for range w.rand.IntN(3) {
			w.disturb()
		}
		time.Sleep(time.Duration(w.rand.IntN(90_000)) * time.Millisecond)
		if err := w.site.checkPairs(); err != nil {
			w.fail("%v", err)
		}
		switch w.rand.IntN(9) {
		case 0:
			for id := range certs {
				if !awaiting(w.plane, id) {
					w.plane.StartRenewal(id)
				}
			}
		case 1:
			w.plane.Redeploy(w.site.servers[0].cert)
		case 2:
			w.plane.Stall()
		case 3:
			for _, job := range w.plane.Jobs() {
				if job.Status == api.StatusFailed && job.Type == api.TypeDeployment {
					w.plane.Requeue(job.ID)
				}
			}
		case 4, 5, 6:
			w.crash()
			w.afterCrash()
			time.Sleep(time.Duration(w.rand.IntN(60_000)) * time.Millisecond)
			w.start()
		case 7:
			w.terminate()
			w.start()
		}
	}
}

// awaiting reports whether a certificate has a job that awaits a CSR.
func awaiting(p *devplane.Plane, cert string) bool {
	return slices.ContainsFunc(p.Jobs(), func(j devplane.Job) bool {
		return j.CertificateID == cert && j.Status == api.StatusAwaitingCSR
	})
}

// afterCrash checks the disk as a crash left it.
func (w *world) afterCrash() {
	if err := w.site.checkPairs(); err != nil {
		w.fail("after a crash: %v", err)
	}
	if err := w.site.checkSecrets(); err != nil {
		w.fail("after a crash: %v", err)
	}
}

// waitUntilDone waits, without faults, until every job has ended.
func (w *world) waitUntilDone() {
	time.Sleep(5 * time.Minute) // until late requests have arrived
	deadline := time.Now().Add(3 * time.Hour)
	for {
		time.Sleep(time.Minute)
		open := 0
		for _, job := range w.plane.Jobs() {
			if job.Status == api.StatusCompleted || job.Status == api.StatusFailed {
				continue
			}
			open++
			w.mu.Lock()
			lost := job.Type == api.TypeDeployment && job.Status == api.StatusRunning && w.claims[job.ID] < job.Handed
			w.mu.Unlock()
			if lost {
				w.lost(job)
			} else if time.Now().After(deadline) {
				w.fail("job %s of type %s was claimed and is still %s: %v", job.ID, job.Type, job.Status, history(job))
			}
		}
		unfinished, undelivered := len(w.life.app.Ledger.Unfinished()), len(w.life.app.Ledger.Undelivered())
		journal, _ := os.ReadDir(filepath.Join(w.stateDir(), "journal")) // owed reloads
		if open+unfinished+undelivered+len(journal) == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.fail("the agent has %d unfinished jobs, %d undelivered reports and %d transactions to clear", unfinished, undelivered, len(journal))
			return
		}
	}
}

// lost handles a deployment that was lost with the answer to a poll. No call can ask for it. The test
// hands it out again, as control planes do for an agent that was silent.
func (w *world) lost(job devplane.Job) {
	w.mu.Lock()
	missing := job.Handed - w.claims[job.ID]
	w.claims[job.ID] = job.Handed
	possible := w.lostWork
	w.mu.Unlock()
	if missing > possible {
		w.fail("job %s was handed out %d times and claimed %d times less, but only %d polls failed", job.ID, job.Handed, missing, possible)
	}
	claimsLost.Add(int64(missing))
	w.plane.Requeue(job.ID)
}

func history(job devplane.Job) string {
	var all []string
	for _, e := range job.History {
		all = append(all, fmt.Sprintf("%s %s %q", e.Time.Format("15:04:05"), e.Status, e.Agent))
	}
	return strings.Join(all, ", ")
}

// verdict checks the end of a run.
func (w *world) verdict() {
	keys := w.life.app.Keys
	for _, x := range w.site.servers {
		versions := w.plane.Versions(x.cert)
		if len(versions) == 0 {
			w.fail("certificate %s was never issued", x.cert)
			continue
		}
		// Everything that the control plane would hand out can be deployed.
		leaves := []*x509.Certificate{versions[len(versions)-1].Leaf}
		leaf, err := w.site.pair(x)
		if err != nil {
			w.fail("at the end: target %s: %v", x.id, err)
		}
		if leaf != nil && w.alone(x) {
			leaves = append(leaves, leaf)
		}
		if leaf == nil && completed(w.plane.Jobs(), x) {
			w.fail("target %s: a deployment is Completed, and nothing is installed", x.id)
		}
		if err := w.site.checkKeys(keys, x.cert, leaves...); err != nil {
			w.fail("a key is gone: %v; %s", err, w.story(x.cert))
		}
	}
	w.terminate()
	w.mu.Lock()
	outcomes := w.outcomes
	w.mu.Unlock()
	for key, all := range outcomes {
		if len(all) > 1 {
			w.fail("claim %d of job %s has more than one outcome: %q", key.claim, key.job, all)
		}
	}
	if left := w.site.leftOver(w.stateDir()); len(left) > 0 {
		w.fail("left over: %q", left)
	}
	if err := w.site.checkSecrets(); err != nil {
		w.fail("%v", err)
	}
	for _, r := range w.plane.Requests() {
		if found := w.site.secretsIn(r.Body); len(found) > 0 {
			w.fail("a request of %s holds %v", r.Call, found)
		}
	}
	for _, p := range w.plane.Problems() {
		// Caused by a control plane that acts late and out of order.
		if !strings.HasSuffix(p, "Running after Completed") && !strings.HasSuffix(p, "Running after Failed") &&
			!strings.HasSuffix(p, "Failed after Completed") && !strings.HasSuffix(p, "Completed after Failed") {
			w.fail("request against the protocol: %s", p)
		}
	}
}

// story returns the history of a certificate at the control plane.
func (w *world) story(cert string) string {
	var all []string
	for _, v := range w.plane.Versions(cert) {
		all = append(all, fmt.Sprintf("version %x at %s", v.Leaf.SerialNumber, v.Time.Format("15:04:05")))
	}
	for _, job := range w.plane.Jobs() {
		if job.CertificateID == cert {
			all = append(all, fmt.Sprintf("%s (%s %s): %s", job.ID, job.Type, job.TargetID, history(job)))
		}
	}
	return strings.Join(all, "; ")
}

// completed reports whether a certificate was deployed to a server.
func completed(jobs []devplane.Job, x server) bool {
	return slices.ContainsFunc(jobs, func(j devplane.Job) bool { return j.TargetID == x.id && j.Status == api.StatusCompleted })
}

// alone reports whether a target is the only one of its certificate. If so, the agent holds the key
// of the certificate installed there, however many newer ones have been signed.
func (w *world) alone(x server) bool {
	n := 0
	for _, other := range w.site.servers {
		if other.cert == x.cert {
			n++
		}
	}
	return n == 1
}

// layout draws the servers of a host.
func layout(r *rand.Rand) []server {
	if r.IntN(4) == 0 {
		return []server{{id: "solo", cert: "solo", shared: true}}
	}
	var all []server
	for c := range 1 + r.IntN(2) {
		for i := range 1 + r.IntN(3) {
			all = append(all, server{id: fmt.Sprintf("web%d%d", c, i), cert: fmt.Sprintf("cert%d", c), chain: r.IntN(2) == 0})
		}
	}
	return all
}

// close ends the control plane and all requests on their way to it.
func (w *world) close() {
	close(w.over)
	w.plane.Close()
	synctest.Wait()
}

// forget drops the test's records of jobs that have ended.
func (w *world) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.claims)
	clear(w.begun)
	clear(w.outcomes)
	w.life.mu.Lock()
	defer w.life.mu.Unlock()
	w.life.conns = nil
}

// report fails the test if there were problems.
func (w *world) report(t *testing.T) {
	t.Helper()
	for _, problem := range w.problems {
		t.Error(problem)
	}
}

// Totals of all runs.
var claimsLost, livesLived, jobsEnded, deployed atomic.Int64

// TestVirtualNetwork runs seeded worlds in virtual time: the agent's real parts on a real disk, a
// control plane that is slow, wrong, out of order or gone, and crashes. In the end everything must
// have recovered. The test does not run in parallel with tests that start processes, because
// between fork and exec a child holds the locks of this process.
func TestVirtualNetwork(t *testing.T) {
	begun := time.Now()
	all := seeds(virtualRuns)
	var taken, ran atomic.Int64
	t.Run("seeds", func(t *testing.T) {
		for range runtime.GOMAXPROCS(0) {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				for interrupted.Err() == nil {
					i := taken.Add(1) - 1
					if i >= int64(len(all)) {
						break
					}
					virtualRun(t, all[i])
					ran.Add(1)
				}
			})
		}
	})
	took := time.Since(begun)
	if !oneSeed() && deployed.Load() < jobsEnded.Load()/3 {
		t.Errorf("only %[2]d of %[1]d jobs deployed a certificate: the runs prove too little", jobsEnded.Load(), deployed.Load())
	}
	t.Logf("%d runs with %d agents and %d jobs, %d of them completed deployments, %d claims lost with the answer to a poll, in %v: %.0f runs a second",
		ran.Load(), livesLived.Load(), jobsEnded.Load(), deployed.Load(), claimsLost.Load(), took.Round(time.Millisecond), float64(ran.Load())/took.Seconds())
}

func virtualRun(t *testing.T, seed uint64) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed, layout(rand.New(rand.NewPCG(seed, 3))))
		defer w.close()
		w.failing = seed%3 == 0
		w.start()
		w.chaos()
		w.heal()
		w.waitUntilDone()
		w.verdict()
		livesLived.Add(int64(w.lives))
		for _, job := range w.plane.Jobs() {
			jobsEnded.Add(1)
			if job.Type == api.TypeDeployment && job.Status == api.StatusCompleted {
				deployed.Add(1)
			}
		}
		if w.report(t); t.Failed() {
			t.Log(again("TestVirtualNetwork", seed))
		}
	})
}
