package reliability_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
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
	"certctl-agent/internal/app"
	"certctl-agent/internal/config"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/crashstates"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
)

var statesFlag = flag.Int("states", traceStates, "how many states of a power cut TestTrace recovers from")

// traced is a host whose agent runs under strace.
type traced struct {
	t       *testing.T
	strace  string
	binary  string
	dir     string // files that the agent does not write
	site    *site  // files that the agent writes, to which power cuts apply
	disk    *crashstates.Disk
	plane   *devplane.Plane
	agent   string   // id
	env     []string // settings
	runs    [][]crashstates.Call
	caddy   string               // its admin API, behind a proxy
	mu      sync.Mutex           // guards changes
	changes []time.Time          // of Caddy's configuration, when they arrived
	sets    map[string][]fileSet // by target: nothing, then what each completed deployment left
}

// fileSet is the content of a server's files: certificate, key and chain.
type fileSet [3]string

// newTraced prepares a host with two servers that share a certificate.
func newTraced(t *testing.T) *traced {
	h := &traced{t: t, strace: needs.Need(t, "strace"), dir: needs.MemoryDir(t), sets: make(map[string][]fileSet)}
	var err error
	if h.binary, err = agentBinary(); err != nil {
		t.Fatal(err)
	}
	if h.site, err = newSite(filepath.Join(h.dir, "host"), []server{{id: "web1", cert: "cert", chain: true}, {id: "web2", cert: "cert"}}); err != nil {
		t.Fatal(err)
	}
	h.plane = devplane.Start(t, devplane.Options{Dir: h.dir})
	for _, dir := range []string{h.site.path("etc"), filepath.Join(h.dir, "targets.d")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(h.configFile(), []byte(configBefore), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.validate(), []byte(validateScript), 0o644); err != nil {
		t.Fatal(err)
	}
	h.env = []string{
		"PATH=" + os.Getenv("PATH"),
		"CERTCTL_CONFIG=" + h.configFile(),
		"CERTCTL_SERVER_URL=" + h.plane.URL,
		"CERTCTL_SERVER_CA_BUNDLE_PATH=" + h.plane.CAFile(),
		"CERTCTL_API_KEY=" + h.plane.APIKey,
		"CERTCTL_KEY_DIR=" + h.site.keyDir(),
		"CERTCTL_TARGETS_DIR=" + filepath.Join(h.dir, "targets.d"),
		"CERTCTL_DISCOVERY_DIRS=" + h.site.path("www"),
		"CERTCTL_ALLOWED_PATHS=" + h.site.path("www"),
		"CERTCTL_HEARTBEAT_INTERVAL=300ms",
		"CERTCTL_POLL_INTERVAL=100ms",
		"CERTCTL_STARTUP_JITTER=false",
		"CERTCTL_MAX_DEPLOYS=1",
	}
	for _, x := range h.site.servers {
		h.sets[x.id] = []fileSet{h.files(x)}
	}
	h.startCaddy()
	if h.disk, err = crashstates.Load(h.site.dir); err != nil {
		t.Fatal(err)
	}
	return h
}

// startCaddy starts Caddy with only its admin API, and a proxy that records the times of change
// requests.
func (h *traced) startCaddy() {
	address := net.JoinHostPort("127.0.0.1", fmt.Sprint(needs.FreePort(h.t)))
	conf := filepath.Join(h.dir, "caddy.json")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `{"admin":{"listen":%q}}`, address), 0o600); err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(needs.Need(h.t, "caddy"), "run", "--config", conf)
	cmd.Env = []string{"HOME=" + h.dir, "XDG_CONFIG_HOME=" + h.dir, "XDG_DATA_HOME=" + h.dir}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			h.t.Fatal(err)
		}
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: address})
		if r.In.Method != http.MethodGet {
			h.mu.Lock()
			h.changes = append(h.changes, time.Now())
			h.mu.Unlock()
		}
	}})
	h.t.Cleanup(proxy.Close)
	h.caddy = proxy.URL
}

const configBefore = "# of this host\nCERTCTL_LOG_LEVEL=debug\n"

func (h *traced) configFile() string { return h.site.path("etc", "agent.env") }

// files reads what a server would read.
func (h *traced) files(x server) (set fileSet) {
	for i, name := range []string{h.site.certPath(x), h.site.keyPath(x), h.site.path("www", x.id, "chain.pem")} {
		data, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			h.t.Fatal(err)
		}
		set[i] = string(data)
	}
	return set
}

// run runs the agent under strace until it exits. For the daemon, during makes it exit by a signal.
func (h *traced) run(during func(stop func(syscall.Signal)), args ...string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 3*time.Minute)
	defer cancel()
	trace, record, err := os.Pipe()
	if err != nil {
		h.t.Fatal(err)
	}
	defer trace.Close()
	cmd := crashstates.Command(ctx, h.strace, record, "/bin/sh", slices.Concat([]string{"-c", `umask 0; exec "$0" "$@"`, h.binary}, args)...)
	var output locked
	cmd.WaitDelay = time.Minute
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = h.dir, h.env, &output, &output
	err = cmd.Start()
	record.Close()
	if err != nil {
		h.t.Fatal(err)
	}
	var calls []crashstates.Call
	var parsed error
	var parsing sync.WaitGroup
	parsing.Go(func() {
		calls, parsed = crashstates.Parse(trace)
		_, _ = io.Copy(io.Discard, trace) // do not block strace after an error
	})
	killed := false
	if during != nil {
		during(func(s syscall.Signal) {
			killed = s == syscall.SIGKILL
			_ = cmd.Process.Signal(s)
		})
	}
	err = cmd.Wait()
	parsing.Wait()
	if err != nil && !killed || h.t.Failed() {
		h.t.Fatalf("%v: %s", err, output.since(0))
	}
	if parsed != nil {
		h.t.Fatal(parsed)
	}
	h.runs = append(h.runs, calls)
}

// deployed waits until n rounds of deployments have ended, those to files with the wanted status,
// and keeps the files that completed ones have left.
func (h *traced) deployed(n int, want string) {
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	err := h.plane.Wait(ctx, func() bool {
		jobs := h.plane.Deployments("cert")
		return len(jobs) == 3*n && !slices.ContainsFunc(jobs, func(j devplane.Job) bool {
			return j.Status != api.StatusCompleted && j.Status != api.StatusFailed
		})
	})
	if err != nil {
		h.t.Errorf("round %d of deployments: %v", n, err)
		return
	}
	for _, job := range h.plane.Deployments("cert")[3*n-3:] {
		if job.Status != want && (job.TargetID != "caddy" || job.Status != api.StatusCompleted) {
			h.t.Errorf("job %s ended %s (%s), want %s", job.ID, job.Status, job.Error, want)
		}
	}
	if want == api.StatusCompleted {
		for _, x := range h.site.servers {
			h.sets[x.id] = append(h.sets[x.id], h.files(x))
		}
	}
}

// live makes the agent do everything that it ever does to a disk.
func (h *traced) live() {
	h.run(nil, "register", "-name", "web", "-write", h.configFile())
	h.agent = h.plane.Agents()[0].ID
	for _, x := range h.site.servers {
		h.plane.AddTarget(devplane.Target{ID: x.id, Agent: h.agent, Type: "NGINX", Config: h.site.config(x, "/bin/sh "+h.validate(), "true")})
	}
	h.plane.AddCertificate(devplane.Certificate{ID: "cert", CommonName: "www.example.org", SANs: []string{"www.example.org"},
		Targets: []string{"web1", "web2", "caddy"}})
	h.plane.AddTarget(devplane.Target{ID: "caddy", Agent: h.agent, Type: "Caddy", Config: map[string]any{"admin_api": h.caddy}})
	h.run(func(stop func(syscall.Signal)) {
		h.plane.StartIssuance("cert")
		h.deployed(1, api.StatusCompleted)
		h.plane.StartRenewal("cert")
		h.deployed(2, api.StatusCompleted)
		h.place("refuse")
		h.plane.StartRenewal("cert")
		h.deployed(3, api.StatusFailed)
		stop(syscall.SIGTERM)
	})
	h.remove("refuse")
	h.place("hold")
	h.run(func(stop func(syscall.Signal)) {
		h.plane.StartRenewal("cert")
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if _, err := os.Stat(filepath.Join(h.dir, "held")); err == nil {
				break
			}
		}
		stop(syscall.SIGKILL) // new files are in place, but not validated yet
		h.remove("hold")      // the command outlives the agent
	})
	h.run(func(stop func(syscall.Signal)) {
		h.deployed(4, api.StatusCompleted)
		for n := 5; n <= 6; n++ {
			h.plane.StartRenewal("cert")
			h.deployed(n, api.StatusCompleted)
		}
		stop(syscall.SIGTERM)
	})
}

func (h *traced) validate() string { return filepath.Join(h.dir, "validate.sh") }

// validateScript refuses the new files, or does not exit, if the test says so.
const validateScript = `cd "${0%/*}" || exit 1
if [ -e refuse ]; then exit 1; fi
while [ -e hold ]; do : >held; sleep 0.02; done
`

// place creates an empty file beside the validate script.
func (h *traced) place(name string) {
	if err := os.WriteFile(filepath.Join(h.dir, name), nil, 0o600); err != nil {
		h.t.Error(err)
	}
}

func (h *traced) remove(name string) {
	if err := os.Remove(filepath.Join(h.dir, name)); err != nil {
		h.t.Fatal(err)
	}
}

// promises are what must hold after a power cut at some moment.
type promises struct {
	jobs       []string       // claimed, without a final status
	keys       []int          // versions whose CSR was sent and may still arrive
	least      map[string]int // by target: number of completed deployments
	registered bool           // the agent said that the id is in the configuration
	changing   int            // version that Caddy was last asked to load; 0 if that deployment is completed
}

// statusOf returns the job in the path of a report.
var statusOf = regexp.MustCompile(`/jobs/([^/]+)/status$`)

// at adds the promises from what the control plane had seen by a given time.
func (h *traced) at(requests []devplane.Request, now time.Time, claimed map[string]bool, registered bool) promises {
	p := promises{least: make(map[string]int), registered: registered}
	claimed, completed := maps.Clone(claimed), make(map[string]bool)
	versions := 0
	for _, r := range requests {
		if !r.Time.Before(now) || r.Status >= 300 {
			continue
		}
		if r.Call == devplane.CallCSR {
			versions++
		}
		var status api.JobStatus
		if r.Call != devplane.CallStatus || json.Unmarshal(r.Body, &status) != nil || status.Status == api.StatusRunning {
			continue
		}
		id := statusOf.FindStringSubmatch(r.Path)[1]
		delete(claimed, id)
		// A final status may be reported twice.
		if job, _ := h.plane.Job(id); status.Status == api.StatusCompleted && !completed[id] {
			completed[id] = true
			p.least[job.TargetID]++
		}
	}
	asked := 0 // change requests so far; each deployment makes one
	for _, t := range h.changes {
		if t.Before(now) {
			asked++
		}
	}
	if asked > p.least["caddy"] {
		p.changing = asked - 1
	}
	p.jobs = slices.Sorted(maps.Keys(claimed))
	for v := max(0, versions-2); v < versions; v++ {
		p.keys = append(p.keys, v)
	}
	return p
}

// moment is a state of the disk, with the promises that must hold in it.
type moment struct {
	state crashstates.State
	promises
	rank int
	call string // the last call before
}

var claimedLine = regexp.MustCompile(`"msg":"deployment claimed","job":"([^"]+)"`)

// moments returns the distinct states that a power cut can leave.
func (h *traced) moments(random *rand.Rand) (found []moment, points int) {
	seen := make(map[[32]byte]bool)
	claimed := make(map[string]bool)
	registered := false
	requests := slices.DeleteFunc(h.plane.Requests(), func(r devplane.Request) bool {
		return r.Call != devplane.CallCSR && r.Call != devplane.CallStatus
	})
	for _, calls := range h.runs {
		h.disk.Run()
		for i, call := range calls {
			matters, err := h.disk.Apply(&call)
			if err != nil {
				h.t.Fatal(err)
			}
			if text, ok := call.Output(); ok {
				matters = true
				for _, m := range claimedLine.FindAllStringSubmatch(text, -1) {
					claimed[m[1]] = true
				}
				registered = registered || strings.Contains(text, "CERTCTL_AGENT_ID set in")
			}
			if !matters {
				continue
			}
			points++
			p := h.at(requests, call.Time, claimed, registered)
			h.disk.States(random, 4, func(s crashstates.State, rank int) {
				hash := sha256.New()
				fmt.Fprintln(hash, p)
				for _, name := range slices.Sorted(maps.Keys(s)) {
					e := s[name]
					fmt.Fprintf(hash, "%s %d %o %v\n", name, len(e.Data), e.Mode, e.Dir)
					io.WriteString(hash, e.Data)
				}
				if key := [32]byte(hash.Sum(nil)); !seen[key] {
					seen[key] = true
					found = append(found, moment{s, p, rank, fmt.Sprintf("call %d, %s", i, call)})
				}
			})
		}
	}
	if name, err := h.disk.Now().Diff(h.site.dir); name != "" || err != nil {
		h.t.Fatalf("the model does not agree with the disk: %s differs (%v)", name, err)
	}
	return found, points
}

// recover starts the agent on a state, as the real binary or from its parts, and checks the result.
func (h *traced) recover(m moment, real bool) error {
	if err := m.state.Write(h.site.dir); err != nil {
		h.t.Fatal(err)
	}
	if err := h.site.checkSecrets(); err != nil {
		return fmt.Errorf("before recovery: %w", err)
	}
	if real {
		if err := h.restart(); err != nil {
			return err
		}
	}
	getenv := func(name string) string {
		for _, setting := range h.settings() {
			if value, ok := strings.CutPrefix(setting, name+"="); ok {
				return value
			}
		}
		return ""
	}
	cfg, err := config.Load(nil, getenv, config.Options{})
	if err != nil {
		return err
	}
	a, err := app.Open(h.t.Context(), app.Options{Config: cfg, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Notify: silent{},
		Seams: app.Seams{Run: func(context.Context, policy.Command) error { return nil }}})
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	errs := []error{h.kept(a, m)}
	if err := a.Close(); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, h.site.checkSecrets())
	for _, name := range h.site.leftOver(cfg.InstanceStateDir()) {
		switch dir := filepath.Base(filepath.Dir(name)); {
		case filepath.Base(name) == ".socket": // the status server replaces and removes it
		case filepath.Ext(name) == ".json" && (dir == "jobs" || dir == "journal" && (a.Recovered.Reloads > 0 || filepath.Base(name) == "caddy.json")):
		default:
			errs = append(errs, fmt.Errorf("left over: %s", name))
		}
	}
	return errors.Join(errs...)
}

func (h *traced) settings() []string { return append(h.env, "CERTCTL_AGENT_ID="+h.agent) }

// restart starts the real binary and stops it once it has recovered.
func (h *traced) restart() error {
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.binary)
	var output locked
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = h.dir, h.settings(), &output, &output
	if err := cmd.Start(); err != nil {
		return err
	}
	for ctx.Err() == nil && !bytes.Contains(output.since(0), []byte(`"msg":"ready"`)) {
		time.Sleep(2 * time.Millisecond)
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("the agent exited with %w: %s", err, output.since(0))
	}
	return nil
}

// kept checks that a recovered agent has kept the promises.
func (h *traced) kept(a *app.App, m moment) error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if r := a.Recovered; len(r.Failed)+len(r.SetAside) > 0 {
		fail("recovery: %+v", r)
	}
	known := make(map[string]bool)
	for _, job := range a.Ledger.Unfinished() {
		known[string(job.ID)] = true
	}
	for _, report := range a.Ledger.Undelivered() {
		known[string(report.Job)] = true
	}
	for _, id := range m.jobs {
		if !known[id] {
			fail("job %s was claimed and is not known", id)
		}
	}
	for _, v := range m.keys {
		if err := h.site.checkKeys(a.Keys, "cert", h.plane.Versions("cert")[v].Leaf); err != nil {
			fail("the key of a CSR is gone: %w", err)
		}
	}
	for _, x := range h.site.servers {
		if _, err := h.site.pair(x); err != nil {
			fail("target %s: %w", x.id, err)
		}
		if set := h.files(x); !slices.Contains(h.sets[x.id][m.least[x.id]:], set) {
			fail("target %s has files of %d, %d and %d bytes, which it never had after %d completed deployments",
				x.id, len(set[0]), len(set[1]), len(set[2]), m.least[x.id])
		}
	}
	if m.changing > 0 {
		// Compare with the element that was there, without the line ends of PEM.
		was := base64.StdEncoding.EncodeToString(h.plane.Versions("cert")[m.changing-1].Leaf.Raw)[:64]
		if !holds(h.site.path("keys"), was, "/backups/caddy/") {
			fail("Caddy may hold version %d, and what it held before is not on disk", m.changing+1)
		}
	}
	text, err := os.ReadFile(h.configFile())
	after := configBefore + "CERTCTL_AGENT_ID=" + h.agent + "\n"
	if err != nil || string(text) != after && (m.registered || string(text) != configBefore) {
		fail("the configuration is %q, %v", text, err)
	}
	return errors.Join(errs...)
}

// holds reports whether a file below dir, with part in its path, contains text.
func holds(dir, text, part string) (found bool) {
	_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && strings.Contains(path, part) {
			data, _ := os.ReadFile(path)
			found = found || strings.Contains(string(data), text)
		}
		return nil
	})
	return found
}

// realEach is how many states are recovered for each one that the real binary recovers, because
// that takes longer.
const realEach = 100

// TestTrace cuts the power after each system call of the real agent, in all the ways of package
// crashstates, and starts the agent again.
func TestTrace(t *testing.T) {
	h := newTraced(t)
	h.live()
	seed := max(*seedFlag, 1)
	random := rand.New(rand.NewPCG(seed, 4))
	all, points := h.moments(random)
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	slices.SortStableFunc(all, func(a, b moment) int { return a.rank - b.rank })
	ranks := make([]int, 3)
	for _, m := range all {
		ranks[m.rank]++
	}
	begun := time.Now()
	failed, ran := 0, 0
	tried := all[:min(len(all), *statesFlag)]
	// With an overloaded control plane, the agent only recovers.
	defer h.plane.Inject(devplane.Fault{Status: http.StatusServiceUnavailable})()
	for i, m := range tried {
		if interrupted.Err() != nil {
			break
		}
		ran++
		if err := h.recover(m, i%realEach == 0); err != nil {
			t.Errorf("after %s: %v\n%s", m.call, err, m.state)
			if failed++; failed == 5 {
				break
			}
		}
	}
	if failed > 0 {
		t.Log(again(t.Name(), seed), "-states", *statesFlag)
	}
	t.Logf("%d points of the trace, %d different states (by rank %v); recovered from %d in %v", points, len(all), ranks, ran, time.Since(begun).Round(time.Millisecond))
}
