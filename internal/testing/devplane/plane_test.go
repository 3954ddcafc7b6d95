package devplane_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

func TestSocket(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: p.Roots()}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	resp, err := client.Get(p.URL + api.HealthPath)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 || resp.ProtoMajor != 2 || resp.TLS.Version != tls.VersionTLS13 {
		t.Errorf("got %d by %s and TLS %x", resp.StatusCode, resp.Proto, resp.TLS.Version)
	}
	onDisk, err := os.ReadFile(p.CAFile())
	if err != nil || !bytes.Equal(onDisk, p.CAPEM()) {
		t.Errorf("CA file: %v", err)
	}
	_, err = tls.Dial("tcp", p.ServerURL().Host, &tls.Config{RootCAs: p.Roots(), MaxVersion: tls.VersionTLS12})
	if err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("TLS 1.2: %v, want a refusal", err)
	}
	p.Close()
	p.Close() // has no effect
	if _, err := client.Get(p.URL + api.HealthPath); err == nil {
		t.Error("answers after Close")
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t, devplane.Options{})
		agent := p.RegisterAgent("web1")
		job := p.AddJob(devplane.WireJob{Type: api.TypeDeployment, Status: devplane.StatusPending})

		go func() {
			time.Sleep(5 * time.Second)
			ask(t, p, "POST", api.HeartbeatPath(agent), api.Heartbeat{})
			time.Sleep(5 * time.Second)
			ask(t, p, "POST", api.JobStatusPath(agent, job), api.JobStatus{Status: api.StatusCompleted})
		}()
		start := time.Now()
		if err := p.WaitRequests(t.Context(), devplane.CallHeartbeat, 1); err != nil || time.Since(start) != 5*time.Second {
			t.Errorf("WaitRequests: %v after %v", err, time.Since(start))
		}
		got, err := p.WaitJob(t.Context(), job, api.StatusFailed, api.StatusCompleted)
		if err != nil || got.Status != api.StatusCompleted || time.Since(start) != 10*time.Second {
			t.Errorf("WaitJob: %+v, %v after %v", got, err, time.Since(start))
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = p.WaitJob(ctx, job, api.StatusFailed)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), `has status "Completed"`) {
			t.Errorf("WaitJob for a status that does not come: %v", err)
		}
		p.Close()
		if err := p.WaitRequests(t.Context(), devplane.CallHeartbeat, 9); err == nil {
			t.Error("WaitRequests outlives the control plane")
		}
	})
}

func TestSkew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t, devplane.Options{Skew: -time.Hour})
		got, err := http.ParseTime(ask(t, p, "GET", api.HealthPath, nil).Header().Get("Date"))
		if want := time.Now().Add(-time.Hour); err != nil || !got.Equal(want) {
			t.Errorf("Date is %v, %v, want %v", got, err, want)
		}
	})
}
