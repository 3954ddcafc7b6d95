package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/tlsprobe"
)

// brokenReload is a reload command that fails.
const brokenReload = "/bin/false"

func (d *demo) firstHeartbeat(ctx context.Context) error {
	if err := d.startAgent(); err != nil {
		return err
	}
	d.say("agent", "%s, pid %d", d.agentPath, d.agent.Process.Pid)
	if err := d.wait(ctx, "a heartbeat", func() bool { return len(d.plane.Heartbeats()) > 0 }); err != nil {
		return err
	}
	beat := d.plane.Heartbeats()[0]
	d.say("heartbeat", "%s: version %s on %s/%s, %s", beat.Hostname, beat.Version, beat.OS, beat.Architecture, beat.IPAddress)
	return nil
}

func (d *demo) enrol(ctx context.Context) error {
	job := d.plane.StartIssuance(certificateID)
	d.say("job", "%s awaits a CSR for %s", job, commonName)
	accepted := func() bool {
		j, _ := d.plane.Job(job)
		return j.Status == api.StatusCompleted
	}
	if err := d.wait(ctx, "the CSR", accepted); err != nil {
		return err
	}
	key, err := d.newestKey()
	if err != nil {
		return err
	}
	info, err := os.Stat(key)
	if err != nil {
		return err
	}
	if got := info.Mode().Perm(); got != 0o600 {
		return fmt.Errorf("the key %s has mode %v, not 0600", key, got)
	}
	d.say("key", "created here: %s, mode %v", key, info.Mode().Perm())
	d.say("CSR", "accepted; the key never left this host")
	return nil
}

// newestKey returns the pending key, or the current one if the deployment is done already.
func (d *demo) newestKey() (string, error) {
	for _, pattern := range []string{certificateID + ".*.pending", certificateID + ".key"} {
		if found, _ := filepath.Glob(filepath.Join(d.keyDir(), pattern)); len(found) > 0 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("no key of %s in %s", certificateID, d.keyDir())
}

func (d *demo) deployment(ctx context.Context) error {
	job, err := d.waitDeployment(ctx, 1)
	if err != nil {
		return err
	}
	if job.Status != api.StatusCompleted {
		return fmt.Errorf("job %s ended %s: %s", job.ID, job.Status, job.Error)
	}
	d.say("deployment", "%s to %s: %s", job.ID, d.server.Name, job.Status)
	if err := d.servesLatest(ctx); err != nil {
		return err
	}
	d.say("", "after   sha256 %s", d.served)
	if err := d.wait(ctx, "the verification", func() bool { return len(d.plane.Verifications()) > 0 }); err != nil {
		return err
	}
	v := d.plane.Verifications()[0]
	if !v.Verified || v.ActualFingerprint != d.served {
		return fmt.Errorf("verification reported: %+v", v.Verification)
	}
	d.say("verification", "reported: the endpoint serves the new certificate")
	return nil
}

// servesLatest waits until the server serves the latest version, and records it.
func (d *demo) servesLatest(ctx context.Context) error {
	versions := d.plane.Versions(certificateID)
	d.served = pemutil.Fingerprint(versions[len(versions)-1].Leaf)
	return d.serves(ctx, d.served)
}

// serves waits until the server serves a certificate.
func (d *demo) serves(ctx context.Context, want string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		got, err := d.fingerprint(ctx)
		if err == nil && got == want {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the server serves %q (%v), not %s", got, err, want)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (d *demo) discovery(ctx context.Context) error {
	if err := d.wait(ctx, "the discovery report", func() bool { return len(d.plane.Discoveries()) >= 2 }); err != nil {
		return err
	}
	for _, found := range d.plane.Discoveries() {
		d.say("discovered", "%s, %s, until %s", found.SourcePath, found.CommonName, found.NotAfter[:10])
	}
	return nil
}

func (d *demo) renewal(ctx context.Context) error {
	before := d.served
	load := startLoad(append(d.server.Others, d.server.Endpoint), d.server.Resets)
	d.plane.StartRenewal(certificateID)
	d.say("renewal", "new key and new certificate, while clients keep connecting")
	job, err := d.waitDeployment(ctx, 2)
	if err == nil && job.Status != api.StatusCompleted {
		err = fmt.Errorf("job %s ended %s: %s", job.ID, job.Status, job.Error)
	}
	if err == nil {
		err = d.servesLatest(ctx)
	}
	load.stop()
	if err != nil {
		return err
	}
	if d.served == before {
		return errors.New("the renewed certificate is the old one")
	}
	d.say("", "now     sha256 %s", d.served)
	d.say("", "%d handshakes meanwhile, %d failed", load.count, load.failed)
	if load.reset > 0 {
		d.say("", "%d connections reset before the handshake: at a reload %s closes the listener where they waited", load.reset, d.server.Name)
	}
	if load.failed > 0 {
		return fmt.Errorf("%d of %d handshakes failed, the first one: %w", load.failed, load.count, load.first)
	}
	if load.count == 0 {
		return errors.New("there were no handshakes during the renewal")
	}
	return nil
}

// load is a set of clients that do handshakes as fast as they can.
type load struct {
	done    chan struct{}
	clients sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	count  int
	failed int
	first  error // of the failed ones
	reset  int   // by a server that is known to do that; not counted as failed
}

func startLoad(endpoints []tlsprobe.Endpoint, resets bool) *load {
	l := &load{done: make(chan struct{})}
	for range 2 {
		l.clients.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-l.done:
					return
				default:
					l.handshake(endpoints[i%len(endpoints)], resets)
				}
			}
		})
	}
	return l
}

func (l *load) handshake(endpoint tlsprobe.Endpoint, resets bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := tlsprobe.Probe(ctx, endpoint)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.count++
	case resets && errors.Is(err, syscall.ECONNRESET):
		l.reset++
	default:
		l.count++
		l.failed++
		l.first = cmp.Or(l.first, err)
	}
}

func (l *load) stop() {
	close(l.done)
	l.clients.Wait()
}

func (d *demo) rollback(ctx context.Context) error {
	before := d.served
	broken := maps.Clone(d.server.Config)
	if maps.Copy(broken, d.server.Broken); d.server.Broken == nil {
		broken["reload_command"] = brokenReload
	}
	d.plane.AddTarget(devplane.Target{ID: targetID, Agent: d.agentID, Type: d.server.Type, Config: broken})
	d.plane.StartRenewal(certificateID)
	job, err := d.waitDeployment(ctx, 3)
	if err != nil {
		return err
	}
	if job.Status != api.StatusFailed {
		return fmt.Errorf("job %s ended %s; it should have failed", job.ID, job.Status)
	}
	d.say("made to fail", "%s: %s", job.Status, job.Error)
	if err := d.serves(ctx, before); err != nil {
		return fmt.Errorf("after the failed deployment: %w", err)
	}
	leaf, err := d.server.OnDisk()
	if err != nil {
		return fmt.Errorf("after the failed deployment, %s: %w", d.server.CertPath, err)
	}
	if pemutil.Fingerprint(leaf) != before {
		return errors.New("after the failed deployment the old certificate is not on disk")
	}
	d.say("rolled back", "the old certificate is on disk and served: %s…", before[:16])
	return nil
}

func (d *demo) retirement(ctx context.Context) error {
	d.plane.Retire(d.agentID)
	d.say("retirement", "the next heartbeat is answered 410")
	select {
	case err := <-d.exited:
		d.exited <- err
		if err != nil {
			return fmt.Errorf("the agent exited with %w, not with status 0", err)
		}
	case <-time.After(20 * time.Second):
		return errors.New("the agent has not exited after 20 s")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d.say("agent", "exited with status %d", d.agent.ProcessState.ExitCode())
	return nil
}

// secrets checks that no request and no log line contained key material.
func (d *demo) secrets(context.Context) error {
	requests := d.plane.Requests()
	for _, request := range requests {
		if strings.Contains(string(request.Body), "PRIVATE KEY") {
			return fmt.Errorf("a %s request contained a private key", request.Path)
		}
	}
	if log := d.log.String(); strings.Contains(log, "PRIVATE KEY") || strings.Contains(log, d.plane.APIKey) {
		return errors.New("the agent's log contains a private key or the API key")
	}
	d.say("secrets", "%d requests and the agent's log: no private key, no API key", len(requests))
	return nil
}
