package ledger

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/api"
)

// crashDir makes this binary the child of TestKilled.
var crashDir = flag.String("crash-dir", "", "internal to TestKilled")

func open(t *testing.T, state string) *Ledger {
	t.Helper()
	return openLogged(t, state, slog.New(slog.DiscardHandler))
}

func openLogged(t *testing.T, state string, log *slog.Logger) *Ledger {
	t.Helper()
	root, err := os.OpenRoot(state)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Open(root, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); root.Close() })
	return l
}

func deployment(id api.ID) api.Job {
	return api.Job{ID: id, Type: api.TypeDeployment, Status: api.StatusRunning, CertificateID: "cert-1", TargetID: "target-1",
		TargetType: "NGINX", TargetConfig: json.RawMessage(`{"cert_path":"/etc/x.pem","key_path":"********","reload_command":"a <b> & c"}`)}
}

func outcome(text string) []Report {
	return []Report{
		{Verification: &api.Verification{TargetID: "target-1", ExpectedFingerprint: "ab", ActualFingerprint: "ab", Verified: true}},
		{Status: &api.JobStatus{Status: api.StatusFailed, Error: text}},
	}
}

func claim(t *testing.T, l *Ledger, jobs ...api.Job) []string {
	t.Helper()
	accepted, refused := l.Claim(jobs, time.Now())
	for _, r := range refused {
		t.Errorf("claim of %s was refused: %v", r.Job.ID, r.Err)
	}
	return ids(accepted)
}

func ids(jobs []api.Job) []string {
	var all []string
	for _, job := range jobs {
		all = append(all, string(job.ID))
	}
	return all
}

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestLife takes a job through its states, with a restart after each.
func TestLife(t *testing.T) {
	dir := t.TempDir()
	job := deployment("job-1")
	if got, want := claim(t, open(t, dir), job, deployment("job-2"), job), []string{"job-1", "job-2"}; !slices.Equal(got, want) {
		t.Fatalf("accepted %v, want %v", got, want)
	}

	l := open(t, dir)
	if got, want := ids(l.Unfinished()), []string{"job-1", "job-2"}; !slices.Equal(got, want) {
		t.Fatalf("unfinished %v, want %v", got, want)
	}
	if got := l.Unfinished()[0]; !sameJob(got, job) {
		t.Errorf("the job came back as %+v, want %+v", got, job)
	}
	do(t, l.Start("job-1"))

	l = open(t, dir)
	if got, want := ids(l.Unfinished()), []string{"job-1", "job-2"}; !slices.Equal(got, want) {
		t.Fatalf("unfinished after a crash in the middle: %v, want %v", got, want)
	}
	do(t, l.Start("job-1"))
	do(t, l.Finish("job-1", outcome("boom")))

	for range 2 {
		if got, want := ids(l.Unfinished()), []string{"job-2"}; !slices.Equal(got, want) {
			t.Errorf("unfinished %v, want %v", got, want)
		}
		all := l.Undelivered()
		if len(all) != 2 || all[0].Report.Verification == nil || all[1].Report.Status == nil || all[1].Report.Status.Error != "boom" {
			t.Fatalf("undelivered: %+v", all)
		}
		if time.Since(all[0].Recorded).Abs() > time.Minute {
			t.Errorf("recorded at %v", all[0].Recorded)
		}
		l = open(t, dir)
	}
	do(t, l.Delivered(l.Undelivered()[0]))
	l = open(t, dir)
	if unfinished, undelivered := len(l.Unfinished()), len(l.Undelivered()); unfinished != 1 || undelivered != 1 {
		t.Errorf("counts %d, %d, want 1, 1", unfinished, undelivered)
	}
	do(t, l.Drop(l.Undelivered()[0], "refused"))
	if _, err := os.Stat(filepath.Join(dir, "jobs", fileName("job-1"))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record of a job that is done: %v, want not exist", err)
	}
	if got := open(t, dir).Undelivered(); got != nil {
		t.Errorf("undelivered %+v, want nothing", got)
	}
}

func TestFilesAreClosedToOthers(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	claim(t, l, deployment("job-1"))
	do(t, l.Start("job-1"))
	for name, want := range map[string]os.FileMode{"jobs": 0o700, filepath.Join("jobs", fileName("job-1")): 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		do(t, err)
		if got := info.Mode().Perm(); got != want {
			t.Errorf("mode of %s: %v, want %v", name, got, want)
		}
	}
}

func TestConfigIsForgottenWithTheJob(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	claim(t, l, deployment("job-1"))
	do(t, l.Finish("job-1", outcome("x")))
	data, err := os.ReadFile(filepath.Join(dir, "jobs", fileName("job-1")))
	do(t, err)
	if bytes.Contains(data, []byte("cert_path")) {
		t.Errorf("a finished record still has the configuration: %s", data)
	}
}

// TestNamesAreNotLoaded checks that the names in records of earlier versions are not loaded.
// Deployments do not use them, and from a hostile control plane they may take hundreds of
// megabytes.
func TestNamesAreNotLoaded(t *testing.T) {
	dir := t.TempDir()
	job := deployment("job-1")
	job.CommonName, job.SANs = "www.example.org", slices.Repeat([]string{""}, 50_000)
	claim(t, open(t, dir), job)
	l := open(t, dir)
	got := l.Unfinished()
	if len(got) != 1 || got[0].SANs != nil || got[0].CommonName != "" || !sameJob(got[0], deployment("job-1")) {
		t.Errorf("loaded %d jobs, the first with %d names", len(got), len(got[0].SANs))
	}
	if again := claim(t, l, deployment("job-1")); again != nil {
		t.Errorf("the same job was taken for another one: %v", again)
	}
}

func TestClaimedAgain(t *testing.T) {
	changed := deployment("job-1")
	changed.TargetID = "target-2"
	tests := []struct {
		name       string
		before     func(*testing.T, *Ledger)
		accepted   []string
		target     string // of the job in the ledger
		undeliverd int
	}{
		{"waiting", func(*testing.T, *Ledger) {}, nil, "target-2", 0},
		{"begun", func(t *testing.T, l *Ledger) { do(t, l.Start("job-1")) }, nil, "target-1", 0},
		{"finished", func(t *testing.T, l *Ledger) { do(t, l.Finish("job-1", outcome("x"))) }, []string{"job-1"}, "target-2", 0},
		{"refused", func(t *testing.T, l *Ledger) {
			do(t, l.Finish("job-1", outcome("x")))
			do(t, l.Report("job-1", api.JobStatus{Status: api.StatusFailed, Error: "y"}))
		}, []string{"job-1"}, "target-2", 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			claim(t, l, deployment("job-1"))
			test.before(t, l)
			stale := l.Undelivered()
			if got := claim(t, l, changed); !slices.Equal(got, test.accepted) {
				t.Errorf("accepted %v, want %v", got, test.accepted)
			}
			// What was under way when the new claim came is none of it.
			for _, d := range stale {
				do(t, l.Delivered(d))
			}
			for _, l := range []*Ledger{l, open(t, dir)} {
				job, ok := l.Job("job-1")
				if !ok || string(job.TargetID) != test.target {
					t.Errorf("the ledger has %+v (%v), want target %s", job, ok, test.target)
				}
				if undelivered := len(l.Undelivered()); undelivered != 0 {
					t.Errorf("%d reports are undelivered, want 0", undelivered)
				}
			}
		})
	}
}

func TestReportOnJobNeverBegun(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	failed := api.JobStatus{Status: api.StatusFailed, Error: "no"}
	do(t, l.Report("job-csr", failed))
	claim(t, l, deployment("job-1"))
	do(t, l.Report("job-1", failed)) // ignored: it will end with its own report
	all := open(t, dir).Undelivered()
	if len(all) != 1 || all[0].Job != "job-csr" || *all[0].Report.Status != failed {
		t.Errorf("undelivered %+v, want the refusal of job-csr", all)
	}
}

func TestSteps(t *testing.T) {
	l := open(t, t.TempDir())
	claim(t, l, deployment("job-1"))
	if err := l.Finish("job-1", nil); err == nil {
		t.Error("an outcome without a report was recorded")
	}
	do(t, l.Finish("job-1", outcome("x")))
	for name, err := range map[string]error{
		"start of an unknown job": l.Start("job-9"), "start of a finished job": l.Start("job-1"),
		"finish of an unknown job": l.Finish("job-9", outcome("")), "second finish": l.Finish("job-1", outcome("")),
	} {
		if err == nil || !strings.Contains(err.Error(), "has no such unfinished job") {
			t.Errorf("%s: %v, want that the ledger holds no such job", name, err)
		}
	}
	if _, ok := l.Job("job-1"); ok {
		t.Error("a finished job is still unfinished")
	}
	do(t, l.Delivered(Delivery{Job: "job-9"}))
}

func TestBounds(t *testing.T) {
	large := deployment("job-large")
	large.TargetConfig = json.RawMessage(`{"a":"` + strings.Repeat("x", maxRecord) + `"}`)
	broken := deployment("job-broken")
	broken.TargetConfig = json.RawMessage(`{`)
	full := func(n, size int) func(*Ledger) {
		return func(l *Ledger) {
			for i := range n {
				l.put(&record{Job: api.Job{ID: api.ID(fmt.Sprint("old-", i))}, State: claimed, data: make([]byte, size)})
			}
		}
	}
	tests := []struct {
		name string
		fill func(*Ledger)
		job  api.Job
		want string
	}{
		{"too large", full(0, 0), large, "the limit is 262144"},
		{"no JSON", full(0, 0), broken, "encode"},
		{"too many", full(maxRecords, 0), deployment("job-1"), "it holds 4096 jobs"},
		{"too many bytes", full(2, maxBytes/2), deployment("job-1"), "of 16777216 bytes"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			test.fill(l)
			accepted, refused := l.Claim([]api.Job{test.job}, time.Now())
			if len(accepted) != 0 || len(refused) != 1 || !strings.Contains(refused[0].Err.Error(), test.want) {
				t.Errorf("accepted %v, refused %v, want a refusal with %q", accepted, refused, test.want)
			}
			if list, _ := os.ReadDir(filepath.Join(dir, "jobs")); len(list) > 0 {
				t.Errorf("left behind: %v", list)
			}
		})
	}
	t.Run("refusals", func(t *testing.T) {
		l := open(t, t.TempDir())
		full(maxRecords, 0)(l)
		do(t, l.Report("job-1", api.JobStatus{Status: api.StatusFailed}))
		full(maxRecords+maxRefusals, 0)(l)
		if err := l.Report("job-2", api.JobStatus{Status: api.StatusFailed}); err == nil {
			t.Error("a report beyond the limit was recorded")
		}
	})
}

// TestDamaged opens a directory with all kinds of files that a ledger cannot have written.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	claim(t, l, deployment("job-whole"), deployment("job-cut"), deployment("job-bit"), deployment("job-new"))
	jobs := filepath.Join(dir, "jobs")
	file := func(id api.ID) string { return filepath.Join(jobs, fileName(id)) }
	edit := func(id api.ID, change func([]byte) []byte) {
		data, err := os.ReadFile(file(id))
		do(t, err)
		do(t, os.WriteFile(file(id), change(data), 0o600))
	}
	edit("job-cut", func(b []byte) []byte { return b[:len(b)-60] })
	edit("job-bit", func(b []byte) []byte { return bytes.Replace(b, []byte("target-1"), []byte("target-2"), 1) })
	edit("job-new", func(b []byte) []byte { return bytes.Replace(b, []byte(`"version":1`), []byte(`"version":2`), 1) })
	do(t, os.WriteFile(file("job-empty"), nil, 0o600))
	do(t, os.WriteFile(file("job-garbage"), []byte("\x00\x01{{"), 0o600))
	do(t, os.WriteFile(file("job-huge"), bytes.Repeat([]byte(" "), maxRecord+2), 0o600))
	whole, err := os.ReadFile(file("job-whole"))
	do(t, err)
	do(t, os.WriteFile(file("job-copied"), whole, 0o600))
	do(t, os.WriteFile(filepath.Join(jobs, "notes.txt"), []byte("mine"), 0o600))
	do(t, os.Mkdir(file("job-dir"), 0o700))
	do(t, os.Symlink("/dev/zero", file("job-link")))

	var text bytes.Buffer
	l = openLogged(t, dir, slog.New(slog.NewTextHandler(&text, nil)))
	if got, want := ids(l.Unfinished()), []string{"job-whole"}; !slices.Equal(got, want) {
		t.Errorf("unfinished %v, want %v", got, want)
	}
	var failed []string
	for _, d := range l.Undelivered() {
		if d.Report.Status == nil || d.Report.Status.Status != api.StatusFailed || !strings.Contains(d.Report.Status.Error, "damaged") {
			t.Errorf("report on %s: %+v", d.Job, d.Report)
		}
		failed = append(failed, string(d.Job))
	}
	slices.Sort(failed)
	if want := []string{"job-bit", "job-cut", "job-new"}; !slices.Equal(failed, want) {
		t.Errorf("reported as failed: %v, want those whose id can be salvaged: %v", failed, want)
	}
	for _, id := range []string{"job-cut", "job-bit", "job-new", "job-empty", "job-garbage", "job-huge", "job-copied"} {
		if _, err := os.Stat(file(api.ID(id)) + damagedExt); err != nil {
			t.Errorf("%s was not set aside: %v", id, err)
		}
		if !strings.Contains(text.String(), fileName(api.ID(id))) {
			t.Errorf("%s is in no log line", id)
		}
	}
	for _, name := range []string{filepath.Join(jobs, "notes.txt"), file("job-dir"), file("job-link")} {
		if _, err := os.Lstat(name); err != nil {
			t.Errorf("a foreign file was removed: %v", err)
		}
	}
	text.Reset()
	openLogged(t, dir, slog.New(slog.NewTextHandler(&text, nil)))
	if strings.Contains(text.String(), "damaged") {
		t.Errorf("the second start logs it again: %s", &text)
	}
}

// TestOlderRecords opens records of an older version, which recorded a job before it checked the
// ids of its certificate and target.
func TestOlderRecords(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	certificate, target, none, done := deployment("job-certificate"), deployment("job-target"), deployment("job-none"), deployment("job-done")
	certificate.CertificateID, target.TargetID, none.TargetID, done.CertificateID = "../../evil", "a/b", "", "../../evil"
	claim(t, l, certificate, target, none, done, deployment("job-whole"))
	do(t, l.Finish("job-done", outcome("x")))

	l = open(t, dir)
	if got, want := ids(l.Unfinished()), []string{"job-whole"}; !slices.Equal(got, want) {
		t.Errorf("unfinished %v, want %v", got, want)
	}
	for id, want := range map[api.ID]string{
		"job-certificate": `(the certificate id "../../evil" is not valid: expected 1 to 128 of A-Z a-z 0-9 . _ -)`,
		"job-target":      `(the target id "a/b" is not valid: expected`,
		"job-none":        `(the target id "" is not valid: expected`,
		"job-done":        `(the certificate id "../../evil" is not valid: expected`,
	} {
		all := l.UndeliveredOf(id)
		if len(all) != 1 || all[0].Report.Status == nil || all[0].Report.Status.Status != api.StatusFailed ||
			!strings.Contains(all[0].Report.Status.Error, "was damaged on disk "+want) {
			t.Errorf("reports on %s: %+v, want Failed with %q", id, all, want)
		}
		if _, err := os.Stat(filepath.Join(dir, "jobs", fileName(id)+damagedExt)); err != nil {
			t.Errorf("%s was not set aside: %v", id, err)
		}
	}
}

func TestDamagedAreBounded(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	for i := range maxDamaged + 5 {
		name := filepath.Join(dir, "jobs", fileName(api.ID(fmt.Sprint(i)))+damagedExt)
		do(t, os.WriteFile(name, nil, 0o600))
		at := time.Unix(int64(i)*1000, 0)
		do(t, os.Chtimes(name, at, at))
	}
	open(t, dir)
	for i := range maxDamaged + 5 {
		_, err := os.Stat(filepath.Join(dir, "jobs", fileName(api.ID(fmt.Sprint(i)))+damagedExt))
		if got, want := err == nil, i >= 5; got != want {
			t.Errorf("damaged record %d exists: %v, want %v", i, got, want)
		}
	}
}

// TestDiskRefuses removes the directory. Steps then still hold in this process, and claims are
// refused.
func TestDiskRefuses(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	claim(t, l, deployment("job-1"))
	do(t, os.RemoveAll(filepath.Join(dir, "jobs")))
	accepted, refused := l.Claim([]api.Job{deployment("job-2")}, time.Now())
	if len(accepted) != 0 || len(refused) != 1 {
		t.Errorf("accepted %v, refused %v", accepted, refused)
	}
	if err := l.Start("job-1"); err == nil {
		t.Error("no error from Start")
	}
	if err := l.Finish("job-1", outcome("x")); err == nil {
		t.Error("no error from Finish")
	}
	if err := l.Report("job-2", api.JobStatus{Status: api.StatusFailed}); err == nil {
		t.Error("no error from Report")
	}
	if got := len(l.Undelivered()); got != 3 {
		t.Errorf("%d reports to deliver, want 3", got)
	}
}

func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	var group sync.WaitGroup
	for worker := range 4 {
		group.Go(func() {
			for i := range 5 {
				id := fmt.Sprintf("job-%d-%d", worker, i)
				l.Claim([]api.Job{deployment(api.ID(id)), deployment("shared")}, time.Now())
				if err := errors.Join(l.Start(api.ID(id)), l.Finish(api.ID(id), outcome(id))); err != nil {
					t.Error(err)
				}
				for _, d := range l.Undelivered() {
					if string(d.Job) == id {
						if err := l.Delivered(d); err != nil {
							t.Error(err)
						}
					}
				}
				l.Unfinished()
			}
		})
	}
	group.Wait()
	if got := ids(l.Unfinished()); !slices.Equal(got, []string{"shared"}) {
		t.Errorf("unfinished %v, want shared", got)
	}
	if l.bytes != l.records["shared"].size {
		t.Errorf("%d bytes counted, want %d", l.bytes, l.records["shared"].size)
	}
}

// TestKilled kills a process at random moments while it writes. Every step that it has reported as
// recorded must be there, and at most one more.
func TestKilled(t *testing.T) {
	if *crashDir != "" {
		crash(t)
		return
	}
	dir := t.TempDir()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	draw := rand.New(rand.NewPCG(seed, 0))
	for round := range 8 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$", "-crash-dir="+dir)
		out, err := cmd.StdoutPipe()
		do(t, err)
		do(t, cmd.Start())
		said := make(map[string]int)
		rest := 1 + draw.IntN(40)
		for lines := bufio.NewScanner(out); lines.Scan(); rest-- {
			if step, id, ok := strings.Cut(lines.Text(), " "); ok {
				said[id] = slices.Index(crashSteps, step)
			}
			if rest == 0 {
				time.Sleep(time.Duration(draw.IntN(2000)) * time.Microsecond)
				do(t, cmd.Process.Kill())
			}
		}
		cmd.Wait()

		var text bytes.Buffer
		l := openLogged(t, dir, slog.New(slog.NewTextHandler(&text, nil)))
		if strings.Contains(text.String(), "damaged") {
			t.Fatalf("round %d: %s", round, &text)
		}
		is := make(map[string]int)
		for _, r := range l.sorted() {
			switch {
			case r.State == claimed:
				is[string(r.Job.ID)] = 0
			case r.State == running:
				is[string(r.Job.ID)] = 1
			case len(r.Reports) == 2:
				is[string(r.Job.ID)] = 2
			default:
				is[string(r.Job.ID)] = 3
			}
		}
		for id, step := range said {
			got, ok := is[id]
			if !ok {
				got = 4
			}
			if got < step || got > step+1 {
				t.Errorf("round %d: %s was %s, and is now at step %d", round, id, crashSteps[step], got)
			}
		}
		for _, file := range must(os.ReadDir(filepath.Join(dir, "jobs"))) {
			if !isFileName(file.Name()) {
				t.Errorf("round %d: left over: %s", round, file.Name())
			}
		}
		l.Close()
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

var crashSteps = []string{"claimed", "running", "finished", "verified", "delivered"}

func crash(t *testing.T) {
	l := open(t, *crashDir)
	for i := 0; ; i++ {
		id := fmt.Sprintf("job-%d-%d", os.Getpid(), i)
		claim(t, l, deployment(api.ID(id)), deployment(api.ID(id+"b")))
		fmt.Println("claimed", id)
		do(t, l.Start(api.ID(id)))
		fmt.Println("running", id)
		do(t, l.Finish(api.ID(id), outcome(id)))
		fmt.Println("finished", id)
		for _, d := range l.Undelivered() {
			if string(d.Job) != id {
				continue
			}
			do(t, l.Delivered(d))
			fmt.Println(map[bool]string{true: "verified", false: "delivered"}[d.Report.Verification != nil], id)
		}
	}
}
