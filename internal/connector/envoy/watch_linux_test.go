package envoy

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
)

// watcher watches a directory like Envoy, with inotify(7). Envoy reacts to
// IN_MOVED_TO. It must never see a write to a file in place.
type watcher struct {
	fd int
}

type event struct {
	name string
	mask uint32
}

func watch(t *testing.T, dir string) *watcher {
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if _, err := syscall.InotifyAddWatch(fd, dir, syscall.IN_MOVED_TO|syscall.IN_MODIFY|syscall.IN_DELETE); err != nil {
		t.Fatal(err)
	}
	return &watcher{fd}
}

// events returns the events since the last call, without those of temporary files.
func (w *watcher) events(t *testing.T) (events []event) {
	t.Helper()
	buf := make([]byte, 64<<10)
	for {
		n, err := syscall.Read(w.fd, buf)
		if err == syscall.EAGAIN {
			return events
		}
		if err != nil {
			t.Fatal(err)
		}
		for rest := buf[:n]; len(rest) > 0; {
			raw := (*syscall.InotifyEvent)(unsafe.Pointer(&rest[0]))
			end := syscall.SizeofInotifyEvent + int(raw.Len)
			name := string(bytes.TrimRight(rest[syscall.SizeofInotifyEvent:end], "\x00"))
			if !strings.HasPrefix(name, ".") {
				events = append(events, event{name, raw.Mask})
			}
			rest = rest[end:]
		}
	}
}

// moves returns the names in events, which must all be of files moved in.
func moves(t *testing.T, events []event) (names []string) {
	t.Helper()
	for _, e := range events {
		if e.mask != syscall.IN_MOVED_TO {
			t.Errorf("%s: event %#x, want nothing but IN_MOVED_TO (%#x)", e.name, e.mask, syscall.IN_MOVED_TO)
		}
		names = append(names, e.name)
	}
	return names
}

// The pair is complete when sds.json changes, in a rotation and in an undo.
func TestWatch(t *testing.T) {
	host, ca := conformance.NewHost(t, nil), testca.Must(t)
	config := map[string]any{"cert_dir": host.Dir, "sds_config": true}
	w := watch(t, host.Dir)
	want := []string{"cert.pem", "key.pem", "sds.json"}
	check := func(what string, m *connector.Material) {
		t.Helper()
		if got := moves(t, w.events(t)); !slices.Equal(got, want) {
			t.Errorf("%s: moved in: %q, want %q", what, got, want)
		}
		served(t, host.Dir, m)
	}
	var m *connector.Material
	for range 10 {
		m = host.Material(t, ca)
		if _, err := host.Deploy(t.Context(), Type(), config, m); err != nil {
			t.Fatal(err)
		}
		check("rotation", m)
	}
	config["post_deploy_verify"] = map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}
	config["post_deploy_verify_attempts"] = 1
	if _, err := host.Deploy(t.Context(), Type(), config, host.Material(t, ca)); err == nil {
		t.Fatal("a failed verification passes")
	}
	want = append(want, want...)
	check("rolled back", m)
}

// served fails the test unless sds.json in dir names m.
func served(t *testing.T, dir string, m *connector.Material) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, sdsName))
	if err != nil {
		t.Fatal(err)
	}
	var sds discoveryResponse
	if err := json.Unmarshal(data, &sds); err != nil || len(sds.Resources) != 1 {
		t.Fatalf("%v: %s", err, data)
	}
	certificate := sds.Resources[0].TLSCertificate
	pair, err := tls.LoadX509KeyPair(string(certificate.CertificateChain.Filename), string(certificate.PrivateKey.Filename))
	if err != nil {
		t.Fatalf("the pair that %s names: %v", sdsName, err)
	}
	if got, want := pemutil.Fingerprint(pair.Leaf), pemutil.Fingerprint(m.Leaf); got != want || sds.VersionInfo != want {
		t.Errorf("got certificate %s and version %s, want %s", got, sds.VersionInfo, want)
	}
}

// A watcher that reads the pair at each event of sds.json, as fast as it can,
// never reads a pair that does not match.
func TestWatchWhileRotating(t *testing.T) {
	host, ca := conformance.NewHost(t, nil), testca.Must(t)
	config := map[string]any{"cert_dir": host.Dir, "sds_config": true}
	w := watch(t, host.Dir)
	const rotations = 50
	read := make(chan struct{})
	deployed := make(chan error, 1)
	go func() {
		deployed <- func() error {
			for range rotations {
				if _, err := host.Deploy(t.Context(), Type(), config, host.Material(t, ca)); err != nil {
					return err
				}
				<-read // otherwise the next deployment would replace the pair
			}
			return nil
		}()
	}()
	pairs := 0
	for {
		select {
		case err := <-deployed:
			if err != nil || pairs != rotations {
				t.Errorf("%d matching pairs in %d rotations: %v", pairs, rotations, err)
			}
			return
		case <-time.After(100 * time.Microsecond):
		}
		for _, e := range w.events(t) {
			if e.name != sdsName {
				continue
			}
			if _, err := tls.LoadX509KeyPair(filepath.Join(host.Dir, "cert.pem"), filepath.Join(host.Dir, "key.pem")); err != nil {
				t.Errorf("after %d rotations: %v", pairs, err)
			} else {
				pairs++
			}
			read <- struct{}{}
		}
	}
}
