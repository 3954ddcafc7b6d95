package enroll

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/api"
	"certctl-agent/internal/csr"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
)

// plane answers CSRs as answer says, and remembers their keys.
type plane struct {
	mu     sync.Mutex
	keys   []crypto.PublicKey
	answer func(ctx context.Context) error
}

func (p *plane) SubmitCSR(ctx context.Context, certID api.ID, csrPEM []byte) error {
	block, _ := pem.Decode(csrPEM)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.keys = append(p.keys, request.PublicKey)
	p.mu.Unlock()
	if p.answer == nil {
		return nil
	}
	return p.answer(ctx)
}

func answers(errs ...error) func(context.Context) error {
	return func(context.Context) error {
		err := errs[0]
		errs = errs[1:]
		return err
	}
}

func newKeys(t *testing.T) *keystore.Store {
	t.Helper()
	keys, err := keystore.Open(keystore.Owner{}, t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keys.Close() })
	return keys
}

func newEnroller(keys Keys, p Plane) *Enroller {
	return New(Options{Keys: keys, Plane: p, Algorithm: "ecdsa-p256", Log: slog.New(slog.DiscardHandler)})
}

var job = api.Job{ID: "job-1", Type: api.TypeIssuance, Status: api.StatusAwaitingCSR, CertificateID: "cert-1",
	CommonName: "web.example.org", SANs: []string{"web.example.org", "127.0.0.1"}}

func TestAnswers(t *testing.T) {
	network := errors.New("connection reset")
	status := func(code int) error { return &api.StatusError{Call: "CSR", Status: code, Body: "because", Own: true} }
	gateway := &api.StatusError{Call: "CSR", Status: 404, Body: "default backend"}
	tests := []struct {
		name    string
		answers []error // to the same job, one after the other
		refused bool    // by the last
		kept    bool    // the key
	}{
		{"accepted", []error{nil}, false, true},
		{"refused", []error{status(400)}, true, false},
		{"unsendable id", []error{api.ErrBadID}, true, false},
		{"network", []error{network}, false, true},
		{"server", []error{status(503)}, false, true},
		{"rate limit", []error{status(429)}, false, true},
		{"wrong key", []error{status(401)}, false, true},
		{"gone", []error{status(410)}, false, true},
		{"a gateway", []error{gateway}, false, true},
		{"a gateway, then accepted", []error{gateway, nil}, false, true},
		{"answer too large", []error{api.ErrTooLarge}, false, true},
		{"answer lost, then refused: it may have been signed", []error{network, status(409)}, true, true},
		{"answer lost, then accepted", []error{network, network, nil}, false, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			keys := newKeys(t)
			p := &plane{answer: answers(test.answers...)}
			var err error
			for range test.answers {
				err = newEnroller(keys, p).Enroll(t.Context(), t.Context(), job)
			}
			last := test.answers[len(test.answers)-1]
			refused, ok := errors.AsType[*RefusedError](err)
			if ok != test.refused || !errors.Is(err, last) {
				t.Errorf("got %v, want %v (refused: %v)", err, last, test.refused)
			}
			if ok && !strings.Contains(refused.Reason, last.Error()) {
				t.Errorf("the reason %q lacks the control plane's words %q", refused.Reason, last)
			}
			for _, key := range p.keys[1:] {
				if !pemutil.SamePublicKey(p.keys[0], key) {
					t.Error("the same job sent CSRs of two keys")
				}
			}
			if _, err := keys.Find("cert-1", p.keys[0]); (err == nil) != test.kept {
				t.Errorf("the key: %v, want kept: %v", err, test.kept)
			}
		})
	}
}

// noKeys fails the test if a key is made.
type noKeys struct{ t *testing.T }

func (k noKeys) Pending(certID, jobID api.ID, _ func() (crypto.Signer, error)) (keystore.Key, error) {
	k.t.Errorf("a key was made for %q, %q", certID, jobID)
	return keystore.Key{}, errors.New("no")
}

func (k noKeys) Discard(certID, jobID api.ID) error { return nil }

func TestChecksComeBeforeTheKey(t *testing.T) {
	tests := map[string]func(*api.Job){
		"common name": func(j *api.Job) { j.CommonName = "" },
		"long":        func(j *api.Job) { j.CommonName = strings.Repeat("é\x1b", 5000) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			bad := job
			change(&bad)
			refused, ok := errors.AsType[*RefusedError](newEnroller(noKeys{t}, &plane{}).Enroll(t.Context(), t.Context(), bad))
			if !ok {
				t.Fatalf("got %v, want a RefusedError", refused)
			}
			if len(refused.Reason) > maxReason || !utf8.ValidString(refused.Reason) || strings.ContainsAny(refused.Reason, "\x00\x1b") {
				t.Errorf("the reason is too long or not printable: %q", refused.Reason)
			}
		})
	}
}

// brokenKeys cannot make a key.
type brokenKeys struct{ err error }

func (k brokenKeys) Pending(api.ID, api.ID, func() (crypto.Signer, error)) (keystore.Key, error) {
	if k.err == nil {
		panic("boom")
	}
	return keystore.Key{}, k.err
}

func (k brokenKeys) Discard(api.ID, api.ID) error { return nil }

func TestDiskError(t *testing.T) {
	full := errors.New("no space left on device")
	err := newEnroller(brokenKeys{full}, &plane{}).Enroll(t.Context(), t.Context(), job)
	if _, refused := errors.AsType[*RefusedError](err); refused || !errors.Is(err, full) || !errors.Is(err, ErrKey) {
		t.Errorf("got %v, want the temporary error %v", err, full)
	}
}

func TestPanicIsTheJobsFailure(t *testing.T) {
	var text bytes.Buffer
	e := New(Options{Keys: brokenKeys{}, Plane: &plane{}, Log: slog.New(slog.NewTextHandler(&text, nil))})
	for range 2 { // the second time shows that the first left nothing locked
		refused, ok := errors.AsType[*RefusedError](e.Enroll(t.Context(), t.Context(), job))
		if !ok || !strings.Contains(refused.Reason, "internal error") {
			t.Errorf("got %v, want a refusal", refused)
		}
	}
	if !strings.Contains(text.String(), "boom") || !strings.Contains(text.String(), "enroll.go") {
		t.Errorf("no stack in the log: %s", &text)
	}
}

// slowKeys counts the keys that are made at the same time. Each takes a second.
type slowKeys struct {
	mu        sync.Mutex
	now, most int
}

func (k *slowKeys) make(string) (crypto.Signer, error) {
	k.count(1)
	defer k.count(-1)
	time.Sleep(time.Second)
	return csr.GenerateKey("ecdsa-p256")
}

func (k *slowKeys) count(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.now += n
	k.most = max(k.most, k.now)
}

func TestFewRSAKeysAtOnce(t *testing.T) {
	for algorithm, want := range map[string]int{"rsa-4096": maxRSA, "ecdsa-p256": 8} {
		t.Run(algorithm, func(t *testing.T) {
			store := newKeys(t)
			synctest.Test(t, func(t *testing.T) {
				keys := new(slowKeys)
				e := New(Options{Keys: store, Plane: &plane{}, Algorithm: algorithm, Log: slog.New(slog.DiscardHandler)})
				e.make = keys.make
				var all sync.WaitGroup
				for i := range 8 {
					all.Go(func() {
						own := job
						own.ID, own.CertificateID = api.ID(fmt.Sprint("job-", i)), api.ID(fmt.Sprint("cert-", i))
						if err := e.Enroll(t.Context(), t.Context(), own); err != nil {
							t.Error(err)
						}
					})
				}
				all.Wait()
				if keys.most != want {
					t.Errorf("%d keys were made at once, want %d", keys.most, want)
				}
			})
		})
	}
}

// TestRSALimitIsForNewKeys checks that, at the limit, a CSR whose key is on disk is still sent, and
// that a CSR that waits for a new key ends when the agent stops.
func TestRSALimitIsForNewKeys(t *testing.T) {
	store := newKeys(t)
	synctest.Test(t, func(t *testing.T) {
		keys, p := new(slowKeys), &plane{answer: answers(errors.New("connection reset"), nil)}
		e := New(Options{Keys: store, Plane: p, Algorithm: "rsa-4096", Log: slog.New(slog.DiscardHandler)})
		e.make = keys.make
		if err := e.Enroll(t.Context(), t.Context(), job); err == nil {
			t.Fatal("the answer was not lost")
		}
		for range maxRSA {
			e.rsa <- struct{}{}
		}
		calls, stop := context.WithCancelCause(t.Context())
		if err := e.Enroll(calls, t.Context(), job); err != nil || len(p.keys) != 2 {
			t.Errorf("with an existing key: got %v, %d CSRs, want 2", err, len(p.keys))
		}
		stopped := errors.New("the agent stops")
		time.AfterFunc(time.Second, func() { stop(stopped) })
		other := job
		other.ID = "job-2"
		began := time.Now()
		if err := e.Enroll(calls, t.Context(), other); !errors.Is(err, stopped) || time.Since(began) != time.Second || len(p.keys) != 2 {
			t.Errorf("a stop: got %v after %v, %d CSRs", err, time.Since(began), len(p.keys))
		}
		if err := e.Enroll(calls, t.Context(), job); !errors.Is(err, stopped) || len(p.keys) != 2 {
			t.Errorf("after a stop: got %v, %d CSRs", err, len(p.keys))
		}
	})
}

// keptKeys keeps what it returned.
type keptKeys struct {
	*keystore.Store
	pem []byte
}

func (k *keptKeys) Pending(certID, jobID api.ID, generate func() (crypto.Signer, error)) (keystore.Key, error) {
	key, err := k.Store.Pending(certID, jobID, generate)
	k.pem = key.PEM
	return key, err
}

func TestEncodedKeyIsCleared(t *testing.T) {
	keys := &keptKeys{Store: newKeys(t)}
	if err := newEnroller(keys, &plane{}).Enroll(t.Context(), t.Context(), job); err != nil {
		t.Fatal(err)
	}
	if len(keys.pem) == 0 || len(bytes.Trim(keys.pem, "\x00")) > 0 {
		t.Error("a copy of the key is left in memory")
	}
}

// brokenSigner is a key that cannot sign.
type brokenSigner struct{ crypto.Signer }

func (brokenSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the key is broken")
}

// brokenKey has such a key, and notes what is discarded.
type brokenKey struct{ discarded []api.ID }

func (k *brokenKey) Pending(_, _ api.ID, generate func() (crypto.Signer, error)) (keystore.Key, error) {
	signer, err := generate()
	return keystore.Key{Signer: brokenSigner{signer}, Fresh: true}, err
}

func (k *brokenKey) Discard(_, jobID api.ID) error {
	k.discarded = append(k.discarded, jobID)
	return nil
}

func TestKeyThatCannotSign(t *testing.T) {
	keys, p := new(brokenKey), &plane{}
	refused, ok := errors.AsType[*RefusedError](newEnroller(keys, p).Enroll(t.Context(), t.Context(), job))
	if !ok || !strings.Contains(refused.Reason, "the key is broken") {
		t.Errorf("got %v, want a refusal", refused)
	}
	if len(p.keys) > 0 || len(keys.discarded) != 1 || keys.discarded[0] != job.ID {
		t.Errorf("%d CSRs were sent and the keys of %v discarded, want no CSR, and the job's key", len(p.keys), keys.discarded)
	}
}
