package reliability_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/netfault"
)

// agentBinary builds the real program once.
var agentBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "reliability")
	if err != nil {
		return "", err
	}
	name := filepath.Join(dir, "certctl-agent")
	out, err := exec.Command("go", "build", "-o", name, "certctl-agent/cmd/certctl-agent").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the agent: %w: %s", err, out)
	}
	builtIn <- dir
	return name, nil
})

// builtIn holds the directory of agentBinary.
var builtIn = make(chan string, 1)

func removeBuild() {
	select {
	case dir := <-builtIn:
		os.RemoveAll(dir)
	default:
	}
}

// host is a real agent on its own host, with a bad network between it and its control plane.
type host struct {
	seed   uint64
	rand   *rand.Rand
	binary string
	base   string
	site   *site
	plane  *devplane.Plane
	proxy  *netfault.Proxy
	agent  string // id
	output *locked

	mu      sync.Mutex // guards what follows
	process *process   // nil: not running
	starts  int
}

// process is one run of the binary.
type process struct {
	cmd   *exec.Cmd
	begun int // length of the output before it
	ended chan struct{}
	err   error // valid after ended
}

// locked is a buffer for the output of processes.
type locked struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (b *locked) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.Write(p)
}

// since returns what was written after the first n bytes.
func (b *locked) since(n int) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.data.Bytes()[n:])
}

func (b *locked) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.Len()
}

// newHost prepares everything and starts nothing. choose decides the faults of the network.
func newHost(base string, seed uint64, servers []server, choose func(n int) netfault.Fault) (*host, error) {
	h := &host{seed: seed, rand: rand.New(rand.NewPCG(seed, 1)), base: base, output: new(locked)}
	var err error
	if h.binary, err = agentBinary(); err != nil {
		return nil, err
	}
	if h.site, err = newSite(filepath.Join(base, "host"), servers); err != nil {
		return nil, err
	}
	for _, name := range []string{"agent.env", "host/problems"} {
		if err := os.WriteFile(filepath.Join(base, name), nil, 0o600); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(filepath.Join(base, "targets.d"), 0o755); err != nil {
		return nil, err
	}
	if h.plane, err = devplane.New(devplane.Options{Listen: "127.0.0.1:0", Dir: base}); err != nil {
		return nil, err
	}
	backend, err := url.Parse(h.plane.URL)
	if err != nil {
		return nil, err
	}
	if h.proxy, err = netfault.New(backend.Host, choose); err != nil {
		return nil, err
	}
	h.agent = h.plane.RegisterAgent("web")
	certs := make(map[string][]string)
	for i, x := range servers {
		validate := "true"
		switch {
		case x.picky:
			validate = "false"
		case i%3 == 1:
			validate = "sleep 0.2" // leaves time for a kill
		}
		reload := "true"
		if i%2 == 0 {
			reload = fmt.Sprintf("%s -load-pair %s,%s,%s", os.Args[0], h.site.certPath(x), h.site.keyPath(x), h.site.path("problems"))
		}
		h.plane.AddTarget(devplane.Target{ID: x.id, Agent: h.agent, Type: "NGINX", Config: h.site.config(x, validate, reload)})
		certs[x.cert] = append(certs[x.cert], x.id)
	}
	for id, targets := range certs {
		h.plane.AddCertificate(devplane.Certificate{ID: id, CommonName: id + ".example.org",
			SANs: []string{id + ".example.org"}, Targets: targets})
	}
	return h, nil
}

// loadPair is the reload command of a server. It loads a certificate and its key, and records a
// failure. An orphan of a killed agent may run while the next agent restores the old files, so it
// tries more than once.
func loadPair(certPath, keyPath, problems string) error {
	var err error
	for range 20 {
		if _, err = load(certPath, keyPath, true); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	file, openErr := os.OpenFile(problems, os.O_APPEND|os.O_WRONLY, 0)
	if openErr != nil {
		return openErr
	}
	defer file.Close()
	fmt.Fprintf(file, "%s: %v\n", certPath, err)
	return err
}

// start starts the binary, with umask 0.
func (h *host) start() error {
	cmd := exec.Command("/bin/sh", "-c", `umask 0; exec "$0"`, h.binary)
	cmd.Dir = h.base
	cmd.Stdout, cmd.Stderr = h.output, h.output
	cmd.Env = []string{
		"CERTCTL_CONFIG=" + filepath.Join(h.base, "agent.env"),
		"CERTCTL_SERVER_URL=https://" + h.proxy.Addr(),
		"CERTCTL_SERVER_CA_BUNDLE_PATH=" + h.plane.CAFile(),
		"CERTCTL_API_KEY=" + h.plane.APIKey,
		"CERTCTL_AGENT_ID=" + h.agent,
		"CERTCTL_KEY_DIR=" + h.site.keyDir(),
		"CERTCTL_TARGETS_DIR=" + filepath.Join(h.base, "targets.d"),
		"CERTCTL_DISCOVERY_DIRS=" + h.site.path("www"),
		"CERTCTL_DISCOVERY_INTERVAL=2s",
		"CERTCTL_ALLOWED_PATHS=" + h.site.path("www"),
		"CERTCTL_HEARTBEAT_INTERVAL=300ms",
		"CERTCTL_POLL_INTERVAL=200ms",
		"CERTCTL_STARTUP_JITTER=false",
		"CERTCTL_SHUTDOWN_GRACE=10s",
		"CERTCTL_LOG_LEVEL=debug",
	}
	p := &process{cmd: cmd, begun: h.output.len(), ended: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		p.err = cmd.Wait()
		close(p.ended)
	}()
	h.mu.Lock()
	h.process = p
	h.starts++
	h.mu.Unlock()
	return nil
}

func (h *host) current() *process {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.process
}

// isReady reports whether the running agent has finished its recovery.
func (h *host) isReady() bool { return h.said(`"msg":"ready"`) }

// said reports whether the running agent's log contains a text.
func (h *host) said(text string) bool {
	p := h.current()
	return p != nil && bytes.Contains(h.output.since(p.begun), []byte(text))
}

// wait waits for a text in the running agent's log.
func (h *host) wait(text string) error {
	for deadline := time.Now().Add(30 * time.Second); !h.said(text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("the agent has not logged %s within 30 s", text)
		}
	}
	return nil
}

// end sends a signal to the agent and waits until it has exited.
func (h *host) end(signal syscall.Signal) error {
	p := h.current()
	select {
	case <-p.ended:
		return fmt.Errorf("the agent exited on its own: %v: %s", p.err, tail(h.output.since(p.begun)))
	default:
	}
	if signal == syscall.SIGTERM {
		// Before its first line the agent has no handler, so the signal ends it.
		if err := h.wait(`"msg":"certctl-agent starting"`); err != nil {
			return err
		}
	}
	h.mu.Lock()
	h.process = nil
	h.mu.Unlock()
	if err := p.cmd.Process.Signal(signal); err != nil {
		return err
	}
	select {
	case <-p.ended:
	case <-time.After(2 * time.Minute):
		_ = p.cmd.Process.Kill()
		<-p.ended
		return fmt.Errorf("the agent did not exit within two minutes of signal %d", signal)
	}
	if signal == syscall.SIGTERM && p.err != nil {
		return fmt.Errorf("after the signal to stop, the agent exited with %w: %s", p.err, tail(h.output.since(p.begun)))
	}
	return nil
}

func tail(data []byte) []byte { return data[max(len(data)-1000, 0):] }

func (h *host) close() {
	if p := h.current(); p != nil {
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
	h.proxy.Close()
	h.plane.Close()
}

// checkKeys finds the keys of the latest version of every certificate.
func (h *host) checkKeys() error {
	keys, err := keystore.Open(keystore.Owner{}, h.site.keyDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer keys.Close()
	for _, x := range h.site.servers {
		versions := h.plane.Versions(x.cert)
		if len(versions) == 0 {
			return fmt.Errorf("certificate %s was never issued", x.cert)
		}
		if err := h.site.checkKeys(keys, x.cert, versions[len(versions)-1].Leaf); err != nil {
			return err
		}
	}
	return nil
}

// stateDir returns the agent's state directory, or "" before it exists.
func (h *host) stateDir() string {
	found, err := filepath.Glob(h.site.path("keys", ".state", "*"))
	if err != nil || len(found) != 1 {
		return ""
	}
	return found[0]
}

// records lists the jobs in the ledger. The value is true if only the repetition of a final report
// is left.
func (h *host) records() map[string]bool {
	all := make(map[string]bool)
	files, _ := filepath.Glob(filepath.Join(h.stateDir(), "jobs", "*.json"))
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			continue // removed in the meantime
		}
		var file struct {
			Record struct {
				Job     api.Job
				Reports []struct{ Repeat bool }
			}
		}
		if json.Unmarshal(data, &file) == nil {
			r := file.Record
			all[string(r.Job.ID)] = len(r.Reports) == 1 && r.Reports[0].Repeat
		}
	}
	return all
}

// watcher keeps checking a host until it is stopped.
type watcher struct {
	stop    context.CancelFunc
	done    sync.WaitGroup
	looks   int
	longest time.Duration // for which a pair did not match while the agent was ready
	errs    []error       // valid after finish
}

// maxMismatch is how long a certificate and its key may mismatch while the agent runs. The two
// renames of a transaction follow each other immediately, but a busy machine may delay the second.
const maxMismatch = 5 * time.Second

func watch(h *host) *watcher {
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{stop: stop}
	var mu sync.Mutex
	fail := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if len(w.errs) < 5 {
			w.errs = append(w.errs, err)
		}
	}
	w.done.Go(func() {
		since := make(map[string]time.Time)
		good := make(map[string]string)
		for ; ctx.Err() == nil; time.Sleep(2 * time.Millisecond) {
			w.looks++
			for _, x := range h.site.servers {
				cert, certErr := os.ReadFile(h.site.certPath(x))
				key, keyErr := os.ReadFile(h.site.keyPath(x))
				err := errors.Join(certErr, keyErr)
				if now := string(cert) + string(key); err == nil && now != good[x.id] {
					if _, err = match(cert, key); err == nil {
						good[x.id] = now
					}
				}
				if errors.Is(certErr, fs.ErrNotExist) && (x.shared || errors.Is(keyErr, fs.ErrNotExist)) {
					err = nil // nothing is installed yet
				}
				switch begun, already := since[x.id]; {
				case err == nil || !h.isReady():
					delete(since, x.id) // do not count the time while the agent is dead or recovering
				case !already:
					since[x.id] = time.Now()
				default:
					w.longest = max(w.longest, time.Since(begun))
					if w.longest > maxMismatch {
						fail(fmt.Errorf("target %s: for %v: %w", x.id, maxMismatch, err))
						return
					}
				}
			}
		}
	})
	w.done.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
			if err := h.site.checkSecrets(); err != nil {
				fail(err)
				return
			}
		}
	})
	return w
}

func (w *watcher) finish() error {
	w.stop()
	w.done.Wait()
	return errors.Join(w.errs...)
}

// badNetwork draws the fate of each connection. Some seeds have a fault that only pings detect,
// which takes half a minute.
func badNetwork(seed uint64) func(n int) netfault.Fault {
	r := rand.New(rand.NewPCG(seed, 4))
	slow := seed%8 == 0
	return func(int) netfault.Fault {
		f := netfault.Fault{After: 1 + r.IntN(12_000), CountUp: r.IntN(3) == 0}
		if r.IntN(4) == 0 {
			f.After = 0
		}
		switch r.IntN(12) {
		case 0:
			f.Then = netfault.Close
		case 1, 2, 3:
			f.Then = netfault.Reset
		case 4:
			f.Then, f.For = netfault.Silence, time.Duration(100+r.IntN(2000))*time.Millisecond
		case 5:
			f.Then = netfault.Hold
		case 6:
			f.Then, f.After = netfault.Garbage, 0
		case 7:
			if f.Then = netfault.Reset; slow {
				f.Then = netfault.HalfOpen
			}
		case 8:
			f.Latency = time.Duration(r.IntN(150)) * time.Millisecond
		case 9:
			f.Down = 2000 + r.IntN(20_000)
		case 10:
			f.Up = 2000 + r.IntN(20_000)
		}
		return f
	}
}

// figures are the counts of a run.
type figures struct {
	jobs, starts, kills, connections, lost int
	looks                                  int
	longest                                time.Duration
	descriptors, goroutines                int
}

// run runs one seed, from the first start of the agent to its last exit.
func (h *host) run(quiet bool) (f figures, err error) {
	watcher := watch(h)
	defer func() {
		err = errors.Join(err, watcher.finish())
		f.looks, f.longest = watcher.looks, watcher.longest
	}()
	if err := h.start(); err != nil {
		return f, err
	}
	certs := make(map[string]bool)
	for _, x := range h.site.servers {
		certs[x.cert] = true
	}
	for id := range certs {
		h.plane.StartIssuance(id)
	}
	for range 8 {
		time.Sleep(time.Duration(100+h.rand.IntN(900)) * time.Millisecond)
		switch n := h.rand.IntN(8); {
		case n == 0:
			h.plane.Redeploy(h.site.servers[0].cert)
		case n == 1 || n == 2:
			for id := range certs {
				// A control plane has only one such job for a certificate at a time.
				if !awaiting(h.plane, id) {
					h.plane.StartRenewal(id)
				}
			}
		case n < 6 && !quiet:
			if err := h.end(syscall.SIGKILL); err != nil {
				return f, err
			}
			f.kills++
			time.Sleep(time.Duration(h.rand.IntN(300)) * time.Millisecond)
			if err := h.start(); err != nil {
				return f, err
			}
		case n == 6 && !quiet:
			if err := h.end(syscall.SIGTERM); err != nil {
				return f, err
			}
			if err := h.start(); err != nil {
				return f, err
			}
		}
	}
	h.proxy.Heal()
	if f.lost, err = h.waitUntilDone(); err != nil {
		return f, err
	}
	f.descriptors, f.goroutines, err = h.dump()
	f.jobs, f.starts, f.connections = len(h.plane.Jobs()), h.starts, h.proxy.Connections()
	return f, errors.Join(err, h.verdict())
}

// waitUntilDone waits until every job has ended. It hands out again the jobs that were lost with
// the answer to a poll, as control planes do for an agent that was silent.
func (h *host) waitUntilDone() (lost int, err error) {
	deadline := time.Now().Add(5 * time.Minute)
	orphans := make(map[string]time.Time)
	for ; time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		records := h.records()
		open := 0
		for _, job := range h.plane.Jobs() {
			if ended(job, records) {
				continue
			}
			open++
			_, known := records[job.ID]
			if job.Status != api.StatusRunning || known || job.History[len(job.History)-1].Agent != "" {
				delete(orphans, job.ID)
				continue
			}
			// The job was handed out, but has been neither recorded nor reported for longer than an
			// agent needs to record it.
			if since, seen := orphans[job.ID]; !seen {
				orphans[job.ID] = time.Now()
			} else if time.Since(since) > 3*time.Second {
				if n := bytes.Count(h.output.since(0), []byte(`"msg":"deployment claimed","job":"`+job.ID+`"`)); n >= job.Handed {
					if time.Since(since) < time.Minute {
						continue // the ledger's disk may be slow
					}
					return lost, fmt.Errorf("job %s was claimed %d times and is lost: %s", job.ID, n, history(job))
				}
				lost++
				delete(orphans, job.ID)
				h.plane.Requeue(job.ID)
			}
		}
		if open == 0 && !slices.Contains(mapValues(records), false) {
			return lost, nil
		}
	}
	var all []string
	for _, job := range h.plane.Jobs() {
		if !ended(job, h.records()) {
			all = append(all, job.ID+" ("+job.Type+"): "+history(job))
		}
	}
	return lost, fmt.Errorf("not ended: %s; in the ledger: %v", strings.Join(all, "; "), h.records())
}

func mapValues(m map[string]bool) []bool {
	var all []bool
	for _, v := range m {
		all = append(all, v)
	}
	return all
}

// ended reports whether a job has its final status, or will get it again because a late "Running"
// came after it.
func ended(job devplane.Job, records map[string]bool) bool {
	if job.Status == api.StatusCompleted || job.Status == api.StatusFailed {
		return true
	}
	for _, e := range slices.Backward(job.History) {
		if e.Agent == "" {
			return false
		}
		if e.Status != api.StatusRunning {
			return records[job.ID]
		}
	}
	return false
}

// dump counts the descriptors and goroutines of the idle agent, and ends it.
func (h *host) dump() (descriptors, goroutines int, err error) {
	if err := h.wait(`"msg":"first heartbeat accepted"`); err != nil {
		return 0, 0, err
	}
	p := h.current()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err == nil {
		descriptors = len(open)
	}
	n := h.output.len()
	if err := h.end(syscall.SIGQUIT); err != nil {
		return 0, 0, err
	}
	stacks := string(h.output.since(n))
	goroutines = len(goroutineHead.FindAllString(stacks, -1))
	for _, job := range []string{"startDeployment", "startEnrol", "command.Run"} {
		if strings.Contains(stacks, job) {
			return descriptors, goroutines, fmt.Errorf("%s is left running", job)
		}
	}
	// An idle agent has the runtime's goroutines, the loop, the status socket, signals, one
	// connection, and perhaps a heartbeat and a poll in progress.
	if descriptors > 24 || goroutines > 32 || goroutines == 0 {
		err = fmt.Errorf("the idle agent has %d descriptors and %d goroutines", descriptors, goroutines)
	}
	// This leaves the host as after a crash. One more start and stop cleans up.
	if err := errors.Join(err, h.start()); err != nil {
		return descriptors, goroutines, err
	}
	if err := h.wait(`"msg":"ready"`); err != nil {
		return descriptors, goroutines, err
	}
	return descriptors, goroutines, h.end(syscall.SIGTERM)
}

var goroutineHead = regexp.MustCompile(`(?m)^goroutine \d+ `)

// verdict checks what a stopped agent has left.
func (h *host) verdict() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := h.site.checkPairs(); err != nil {
		fail("at the end: %w", err)
	}
	for _, job := range h.plane.Jobs() {
		verdicts := make(map[string]bool)
		for _, e := range job.History {
			if e.Agent != "" && e.Status != api.StatusRunning {
				verdicts[e.Status+": "+e.Error] = true
			}
		}
		if job.Type == api.TypeDeployment && len(verdicts) != 1 {
			fail("job %s has %d outcomes: %s", job.ID, len(verdicts), history(job))
		}
	}
	for _, x := range h.site.servers {
		leaf, err := h.site.pair(x)
		if err == nil && (leaf != nil) == x.picky {
			fail("target %s: installed: %v, want %v", x.id, leaf != nil, !x.picky)
		}
	}
	if err := h.checkKeys(); err != nil {
		fail("a key is gone: %w", err)
	}
	state := h.stateDir()
	for _, name := range h.site.leftOver(state) {
		if filepath.Dir(name) == filepath.Join(state, "jobs") && strings.HasSuffix(name, ".json") {
			continue // its final report will be repeated: waitUntilDone has checked it
		}
		fail("left over: %s", name)
	}
	if err := h.site.checkSecrets(); err != nil {
		fail("%w", err)
	}
	if found := h.site.secretsIn(h.output.since(0)); len(found) > 0 {
		fail("the log holds %v", found)
	}
	for _, r := range h.plane.Requests() {
		if found := h.site.secretsIn(r.Body); len(found) > 0 {
			fail("a request of %s holds %v", r.Call, found)
		}
	}
	for _, p := range h.plane.Problems() {
		if !lateReport.MatchString(p) {
			fail("request against the protocol: %s", p)
		}
	}
	if problems, err := os.ReadFile(h.site.path("problems")); err != nil || len(problems) > 0 {
		fail("a server could not load its pair: %s%v", problems, err)
	}
	return errors.Join(errs...)
}

// lateReport is a problem caused by the network, which delivered reports out of order.
var lateReport = regexp.MustCompile(`(Running|Completed|Failed) after (Completed|Failed)$`)

// hostServers draws the servers of a host.
func hostServers(r *rand.Rand) []server {
	all := layout(r)
	if len(all) > 1 && r.IntN(3) == 0 {
		all[len(all)-1].picky = true
	}
	return all
}

// processWorkers is the number of seeds that run at the same time. They mostly wait.
const processWorkers = 8

// TestNetworkFaults runs the real binary through a bad network, and kills it with SIGKILL now and
// then.
func TestNetworkFaults(t *testing.T) {
	t.Parallel()
	begun := time.Now()
	base := needs.MemoryDir(t)
	var mu sync.Mutex
	var total figures
	slots := make(chan struct{}, processWorkers)
	var runs sync.WaitGroup
	ran := 0
	for _, seed := range seeds(processRuns) {
		slots <- struct{}{}
		if interrupted.Err() != nil {
			break
		}
		ran++
		runs.Go(func() {
			defer func() { <-slots }()
			dir := filepath.Join(base, fmt.Sprint(seed))
			f, err := runHost(dir, seed)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Errorf("%v\n%s", err, again(t.Name(), seed))
			}
			total.add(f)
		})
	}
	runs.Wait()
	t.Logf("%d runs in %v: %d jobs, %d starts of the agent, %d kills, %d connections, %d claims lost with the answer to a poll; "+
		"%d looks at certificate and key, which did not match for %v at the longest; at most %d descriptors and %d goroutines",
		ran, time.Since(begun).Round(100*time.Millisecond), total.jobs, total.starts, total.kills, total.connections, total.lost,
		total.looks, total.longest.Round(10*time.Microsecond), total.descriptors, total.goroutines)
}

func (f *figures) add(g figures) {
	f.jobs += g.jobs
	f.starts += g.starts
	f.kills += g.kills
	f.connections += g.connections
	f.lost += g.lost
	f.looks += g.looks
	f.longest = max(f.longest, g.longest)
	f.descriptors = max(f.descriptors, g.descriptors)
	f.goroutines = max(f.goroutines, g.goroutines)
}

func runHost(dir string, seed uint64) (figures, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return figures{}, err
	}
	h, err := newHost(dir, seed, hostServers(rand.New(rand.NewPCG(seed, 3))), badNetwork(seed))
	if err != nil {
		return figures{}, err
	}
	defer h.close()
	f, err := h.run(false)
	if oneSeed() {
		os.Stderr.Write(h.output.since(0))
	}
	return f, err
}
