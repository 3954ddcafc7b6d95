package awsacm

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/awsfake"
	"certctl-agent/internal/testing/testca"
)

// TestFound: the certificate is imported once and found again, by the note or by its tags among
// those of others.
func TestFound(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var others []string
	for range 5 { // more than a page
		others = append(others, f.put(f.material(), awsfake.Tag{Key: managedByTag, Value: managedBy}, awsfake.Tag{Key: certificateTag, Value: "cert-2"}))
	}
	before := f.Certificates()
	first := f.material()
	f.mustDeploy(first)
	arn := f.Certificates()[5].ARN
	f.OnCall(nil)
	f.mustDeploy(f.material())
	if slices.Contains(f.Calls(), "ListCertificates") {
		t.Errorf("it is noted, and was looked for: %q", f.Calls())
	}
	forget := func() { must(t, os.RemoveAll(filepath.Join(f.StateDir, noteDir))) }
	forget()
	f.mustDeploy(f.issue(testca.Template{Names: []string{"renamed.example.org"}}))
	forget()
	must(t, os.Mkdir(filepath.Join(f.StateDir, noteDir), 0o700))
	n := note{Certificate: "cert-1", Region: f.Region, Endpoint: f.URL + "/"}
	must(t, os.WriteFile(filepath.Join(f.StateDir, n.path()), []byte("{damaged"), 0o600))
	if must(t, n.read(f.StateDir)); n.Importing == "" {
		t.Error("a damaged note says that there was no import")
	}
	f.mustDeploy(f.material())
	if now := f.Certificates(); len(now) != 6 || now[5].ARN != arn || f.Imports() != 1 {
		t.Errorf("there are %d certificates, after %d imports", len(now), f.Imports())
	} else if !slices.EqualFunc(now[:5], before, func(a, b awsfake.Certificate) bool {
		return a.Body == b.Body && a.Key == b.Key && slices.Equal(a.Tags, b.Tags)
	}) {
		t.Error("those of others have changed")
	}

	// Someone else deleted it.
	must(t, f.change(f.material()).client.remove(t.Context(), arn))
	last := f.material()
	f.mustDeploy(last)
	if now := f.Certificates(); len(now) != 6 || now[5].ARN == arn {
		t.Errorf("deleted: there are %d", len(now))
	}

	// Someone gave its tags to another certificate.
	forget()
	f.put(f.material(), ours()...)
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "several certificates", certificateTag+"=cert-1", others[0][:30], "set certificate_arn")
	if f.Imports() != 2 {
		t.Errorf("%d imports", f.Imports())
	}
}

// TestOneImport: whatever happens to the answer of a first import, it is not repeated.
func TestOneImport(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		fault awsfake.Fault
		lag   int
	}{
		{"lost", awsfake.Lost, 0},
		{"lost, and lists are late", awsfake.Lost, 2},
		{"no answer in time", awsfake.HangingLate, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.Lag = test.lag
			f.typ = typeOf(waits{call: time.Minute, list: time.Minute, try: 3 * time.Second})
			f.OnCall(func(operation string, n int) awsfake.Fault {
				if operation == "ImportCertificate" && n == 1 {
					return test.fault
				}
				return awsfake.None
			})
			m := f.issue(testca.Template{Names: []string{"192.0.2.7"}})
			f.mustDeploy(m)
			f.holds(m)
			if f.Imports() != 1 || !f.mustDeploy(m).Unchanged {
				t.Errorf("%d imports", f.Imports())
			}
		})
	}

	t.Run("the agent ends before it notes the answer", func(t *testing.T) {
		t.Parallel()
		for _, list := range []time.Duration{time.Minute, 50 * time.Millisecond} {
			f := newFixture(t)
			f.typ = typeOf(waits{call: time.Minute, list: list})
			m := f.material()
			c := f.change(m)
			if _, _, err := c.Read(t.Context()); err != nil || c.arn != "" {
				t.Fatalf("read: %v, %q", err, c.arn)
			}
			c.host.StateDir = filepath.Join(f.StateDir, "gone") // before the answer arrives
			c.note.Importing = "of this one"
			must(t, c.note.write(f.StateDir))
			_, err := c.importOnce(t.Context())
			must(t, err)
			f.mustDeploy(m)
			if f.holds(m); f.Imports() != 1 {
				t.Errorf("%d imports", f.Imports())
			}
		}
	})

	t.Run("it is noted, and ACM does not show it yet", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.typ = typeOf(waits{call: time.Minute, list: time.Minute})
		f.Lag = 2
		f.mustDeploy(f.material())
		m := f.material()
		f.mustDeploy(m)
		if f.holds(m); f.Imports() != 1 {
			t.Errorf("%d imports", f.Imports())
		}
	})

	t.Run("only what may be it is asked for its tags", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.Lag = 1000
		f.put(f.issue(testca.Template{Names: []string{"other.example.org"}}), ours()[0])
		f.OnCall(func(operation string, n int) awsfake.Fault {
			if operation == "ImportCertificate" {
				return awsfake.Lost
			}
			return awsfake.None
		})
		_, err := f.deploy(f.issue(testca.Template{Names: []string{"192.0.2.7"}}))
		conformance.WantError(t, err, "the next deployment looks again")
		asked := slices.DeleteFunc(f.Calls(), func(call string) bool { return call != "ListTagsForCertificate" })
		if len(asked) != 1 {
			t.Errorf("%d certificates were asked for their tags, want the other one once", len(asked))
		}
	})

	t.Run("another agent was faster", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		theirs, m := f.material(), f.material()
		f.OnCall(func(operation string, n int) awsfake.Fault {
			if operation == "ImportCertificate" && n == 1 {
				f.put(theirs, ours()...)
				return awsfake.Dropped
			}
			return awsfake.None
		})
		_, err := f.deploy(m)
		conformance.WantError(t, err, "someone else imported another certificate for it")
		if f.holds(theirs); conformance.Broken(err) {
			t.Errorf("got %v", err)
		}
		f.mustDeploy(m)
		if f.holds(m); f.Imports() != 0 {
			t.Errorf("%d imports", f.Imports())
		}
	})

	// The import is uncertain and does not appear: the job fails, and the next one finds or imports
	// it.
	for _, test := range []struct {
		name  string
		fault awsfake.Fault
		list  time.Duration // of the next deployment
	}{
		{"appears later", awsfake.Lost, time.Minute},
		{"has not happened", awsfake.Dropped, time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.Lag = 3
			f.OnCall(func(operation string, n int) awsfake.Fault {
				if operation == "ImportCertificate" && n == 1 {
					return test.fault
				}
				return awsfake.None
			})
			m := f.material()
			_, err := f.deploy(m)
			conformance.WantError(t, err, "it may have been carried out", "the next deployment looks again")
			f.typ = typeOf(waits{call: time.Minute, list: test.list})
			f.mustDeploy(m)
			if f.holds(m); f.Imports() != 1 {
				t.Errorf("%d imports", f.Imports())
			}
		})
	}
}

// TestFaults: calls to a busy ACM are retried, and a re-import is repeated if its outcome is
// unknown.
func TestFaults(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]awsfake.Fault{"throttled": awsfake.Throttled, "too many": awsfake.TooMany, "broken": awsfake.Broken, "busy": awsfake.Busy, "dropped": awsfake.Dropped, "lost": awsfake.Lost} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.typ = typeOf(waits{call: time.Minute, list: time.Minute})
			first, second := f.material(), f.material()
			each := func(_ string, n int) awsfake.Fault { // of the operations
				if n == 1 {
					return fault
				}
				return awsfake.None
			}
			if fault == awsfake.Throttled || fault == awsfake.TooMany {
				f.OnCall(each)
			}
			f.mustDeploy(first)
			f.OnCall(each)
			f.mustDeploy(second)
			if f.holds(second); f.Imports() != 1 {
				t.Errorf("%d imports", f.Imports())
			}
		})
	}
	t.Run("hanging", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.mustDeploy(f.material())
		before := f.only()
		f.OnCall(func(operation string, n int) awsfake.Fault {
			if operation == "ImportCertificate" {
				return awsfake.HangingLate
			}
			return awsfake.None
		})
		f.typ = typeOf(waits{call: time.Second, list: time.Second, try: 3 * time.Second})
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, "no answer within 3s", "it may have been carried out")
		f.OnCall(nil)
		f.typ = typeOf(short)
		last := f.material()
		f.mustDeploy(last) // resumes from the saved state
		if f.holds(last); f.Imports() != 1 || f.only().ARN != before.ARN {
			t.Errorf("%d imports, %s", f.Imports(), f.only().ARN)
		}
	})
}

// TestQuota: after a refusal the next deployment does not wait for an import.
func TestQuota(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.Quota = 0
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "LimitExceededException", "certificate_arn")
	c := f.change(f.material())
	if _, _, err := c.Read(t.Context()); err != nil || c.note.Importing != "" || conformance.Broken(err) {
		t.Errorf("noted: %+v, %v", c.note, err)
	}
}

// TestDenied: errors name the missing permission.
func TestDenied(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.material()
	arn := f.put(m, ours()...)
	for _, test := range []struct{ operation, says string }{
		{"ListCertificates", "acm:ListCertificates on *"},
		{"ListTagsForCertificate", "acm:ListTagsForCertificate on " + arn},
		{"GetCertificate", "acm:GetCertificate on " + arn},
		{"DescribeCertificate", "acm:DescribeCertificate on " + arn},
		{"ImportCertificate", "acm:ImportCertificate on " + arn},
	} {
		f.Deny(test.operation)
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, "the credentials of the environment need the permission "+test.says)
	}
	if f.Deny(); f.only().Body != string(leafPEM(m.Leaf)) {
		t.Error("it was changed")
	}
	f.mustDeploy(f.material())
	f.Deny("GetCertificate")
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "acm:GetCertificate on "+arn, "the ARN is noted in "+filepath.Join(f.StateDir, noteDir))
}

// TestUndo: a failed deployment restores the old certificate if its key is available. Otherwise the
// error says what to do.
func TestUndo(t *testing.T) {
	t.Parallel()
	start := func(t *testing.T) (*fixture, *connector.Material) {
		f := newFixture(t)
		m := f.material()
		f.mustDeploy(m)
		return f, m
	}
	t.Run("key in the key store", func(t *testing.T) {
		f, old := start(t)
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, "the previous certificate is back in place")
		f.holds(old)
		if f.Imports() != 1 {
			t.Errorf("%d imports", f.Imports())
		}
	})
	t.Run("key not in the key store", func(t *testing.T) {
		f := newFixture(t)
		old, m := f.material(), f.material()
		arn := f.put(old)
		_, err := f.deploy(m, append(unverified(), "certificate_arn", arn)...)
		conformance.WantError(t, err, "it cannot be undone", "the private key of the old certificate", "is not in this agent's key store",
			"aws acm import-certificate --region eu-central-1 --certificate-arn "+arn, "or deploy another")
		if f.holds(m); !conformance.Broken(err) {
			t.Errorf("got %v, want a BrokenError", err)
		}
		f.mustDeploy(f.material(), "certificate_arn", arn) // the next deployment works
	})
	t.Run("old one has expired", func(t *testing.T) {
		f, _ := start(t)
		m := f.material()
		c := f.change(m)
		_, _, err := c.Read(t.Context())
		must(t, err)
		must(t, c.Write(t.Context()))
		expired, err := f.CA.Issue(testca.Template{NotBefore: time.Now().AddDate(0, 0, -9), NotAfter: time.Now().AddDate(0, 0, -1)})
		must(t, err)
		was := []byte(`{"arn": "` + f.only().ARN + `", "certificate": "` + strings.ReplaceAll(string(expired.LeafPEM()), "\n", `\n`) + `"}`)
		conformance.WantError(t, f.change(m).Restore(t.Context(), was), "it cannot be undone", "the old certificate expired")
		conformance.WantError(t, f.change(m).Restore(t.Context(), []byte("{")), "its backup cannot be read")
	})
	t.Run("old one lacks a usage", func(t *testing.T) {
		f, old := start(t)
		m := f.issue(testca.Template{ExtKeyUsage: append(old.Leaf.ExtKeyUsage, x509.ExtKeyUsageCodeSigning)})
		_, err := f.deploy(m, unverified()...)
		conformance.WantError(t, err, "it cannot be undone", "lacks Extended Key Usage", "the new one stays: deploy another")
		if f.holds(m); !conformance.Broken(err) {
			t.Errorf("got %v, want a BrokenError", err)
		}
	})
	t.Run("others were there", func(t *testing.T) {
		f, _ := start(t)
		m, theirs := f.material(), f.material()
		c := f.change(m)
		was, _, err := c.Read(t.Context())
		must(t, err)
		must(t, c.Write(t.Context()))
		other := f.change(theirs)
		if _, _, err := other.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		must(t, other.Write(t.Context()))
		conformance.WantError(t, c.Restore(t.Context(), was), "someone else has changed it since")
		f.holds(theirs)
		must(t, c.client.remove(t.Context(), f.only().ARN))
		conformance.WantError(t, c.Restore(t.Context(), was), "someone else has deleted it since")
	})
	t.Run("interrupted, and then another certificate", func(t *testing.T) {
		for _, renewal := range []bool{true, false} {
			f := newFixture(t)
			old := f.material()
			if renewal {
				f.mustDeploy(old)
			}
			f.Before = killAfter("change")
			killed := f.material()
			_, _ = f.deploy(killed)
			f.Before = nil
			f.Restart(t)
			f.holds(killed)
			f.OnCall(func(operation string, n int) awsfake.Fault {
				if operation == "ImportCertificate" && n <= maxTries {
					return awsfake.Broken
				}
				return awsfake.None
			})
			if _, err := f.deploy(f.material()); err == nil || conformance.Broken(err) {
				t.Errorf("got %v", err)
			}
			switch {
			case renewal:
				f.holds(old)
			case len(f.Certificates()) > 0:
				t.Error("it is still there")
			}
		}
	})
	t.Run("first one", func(t *testing.T) {
		f := newFixture(t)
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, "ACM does not have this certificate yet", "turn verification on")
		if len(f.Certificates()) > 0 || f.Imports() > 0 {
			t.Errorf("%d imports", f.Imports())
		}
		m := f.material()
		first := func() *change {
			c := f.change(m)
			_, _, err := c.Read(t.Context())
			must(t, err)
			must(t, c.Write(t.Context()))
			return c
		}
		c := first()
		f.Use(f.only().ARN, "arn:aws:elasticloadbalancing:eu-central-1:123456789012:loadbalancer/app/www/1")
		conformance.WantError(t, c.Restore(t.Context(), nil), "ResourceInUseException", "this deployment imported", "which stays")
		f.Use(f.only().ARN)
		f.OnCall(func(operation string, n int) awsfake.Fault {
			if operation == "DeleteCertificate" && n == 1 {
				return awsfake.Lost
			}
			return awsfake.None
		})
		must(t, f.change(m).Restore(t.Context(), nil)) // as after a crash
		must(t, f.change(m).Restore(t.Context(), nil))
		if len(f.Certificates()) > 0 {
			t.Error("it is still there")
		}
		// A certificate that another agent imported is not removed.
		f.put(m, ours()...)
		must(t, f.change(m).Restore(t.Context(), nil))
		f.holds(m)
	})
}

// TestSecrets: no key, secret key or token is in the log, in errors or in files outside the key
// store.
func TestSecrets(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.SetContainer(f.AddRole("task", ""), "Bearer hunter2")
	role := f.AddRole("acm", "ticket-7", f.RoleARN("task"))
	delete(f.env, "AWS_ACCESS_KEY_ID")
	delete(f.env, "AWS_SECRET_ACCESS_KEY")
	f.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = f.MetadataURL + awsfake.ContainerPath
	f.env["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = "Bearer hunter2"
	f.overlay(`{"role_arn": "` + role + `", "external_id": "ticket-7"}`)
	var said strings.Builder
	var keys []string
	deploy := func(more ...any) {
		m := f.material()
		for line := range strings.Lines(string(m.KeyPEM)) {
			if line = strings.TrimSpace(line); !strings.HasPrefix(line, "-----") {
				keys = append(keys, line)
			}
		}
		keys = append(keys, base64.StdEncoding.EncodeToString(m.Key())[:96]) // as it is sent
		config := map[string]any{"region": f.Region, "endpoint": f.URL}
		for i := 0; i < len(more); i += 2 {
			config[more[i].(string)] = more[i+1]
		}
		// No promotion of the key, since the engine backs up the key store's files too.
		if _, err := f.Deploy(t.Context(), f.typ, config, m); err != nil {
			said.WriteString(err.Error())
		}
	}
	deploy()
	deploy(unverified()...)
	f.Deny("ImportCertificate")
	deploy()
	f.Deny()
	f.OnCall(func(operation string, n int) awsfake.Fault {
		if operation == "ImportCertificate" {
			return awsfake.Broken
		}
		return awsfake.None
	})
	deploy()
	f.OnCall(nil)
	echo := f.server(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch operation := r.Header.Get("X-Amz-Target"); {
		case strings.HasSuffix(operation, "ListCertificates"):
			_, _ = w.Write([]byte("{}"))
		case strings.HasSuffix(operation, "ImportCertificate"):
			w.WriteHeader(http.StatusForbidden)
			_, _ = w.Write(body[bytes.Index(body, []byte("PrivateKey")):])
		default:
			// AWS quotes the string that it expected to be signed
			// (https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-troubleshooting.html).
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, `{"__type": "InvalidSignatureException", "message": "The canonical request should have been 'POST x-amz-security-token:%s'"}`, r.Header.Get("X-Amz-Security-Token"))
		}
	})
	deploy("endpoint", echo)
	deploy("endpoint", echo, "certificate_arn", f.only().ARN)
	f.Before = killAfter("change")
	deploy()
	said.WriteString(f.Log())
	err := filepath.WalkDir(f.StateDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if info, err := d.Info(); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s can be read by others: %v, %v", path, info.Mode(), err)
		}
		data, err := os.ReadFile(path)
		said.Write(data)
		return err
	})
	must(t, err)
	secrets := append(f.Secrets(), keys...)
	if len(secrets) < 10 || !strings.Contains(said.String(), "BEGIN CERTIFICATE") || !strings.Contains(said.String(), "AccessDenied") ||
		!strings.Contains(said.String(), "PrivateKey") || !strings.Contains(said.String(), "x-amz-security-token:") || !strings.Contains(said.String(), `"target":"target-1"`) {
		t.Fatalf("%d secrets, and what was said is not all", len(secrets))
	}
	for _, secret := range secrets {
		if strings.Contains(said.String(), secret) {
			t.Errorf("a secret was said or kept: %.8s…", secret)
		}
	}
}

// Answers that are not from ACM are refused.
func TestAnswers(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	answers := make(map[string]string) // by operation
	server := f.server(func(w http.ResponseWriter, r *http.Request) {
		_, operation, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
		_, _ = w.Write([]byte(answers[operation]))
	})
	const mine = `{"CertificateSummaryList": [{"CertificateArn": "arn:aws:acm:eu-central-1:123456789012:certificate/1", "Type": "IMPORTED"}]}`
	for _, test := range []struct{ operation, answer, says string }{
		{"ListCertificates", "<html>please log in</html>", "not from ACM"},
		{"ListCertificates", `{"CertificateSummaryList": [], "NextToken": "x"}`, "does not end after"},
		{"ListCertificates", `{"CertificateSummaryList": [` + strings.Repeat("{}, ", pageSize) + `{}]}`, "more than 1000 certificates"},
		{"ImportCertificate", "<html>please log in</html>", "not from ACM: check endpoint and any proxy before it; no certificate"},
		{"ImportCertificate", "{}", "not the ARN of a certificate in this region"},
		{"ImportCertificate", `{"CertificateArn": "arn:aws:acm:us-east-1:123456789012:certificate/1"}`, "not the ARN of a certificate in this region"},
		{"GetCertificate", "{}", "no certificate"},
		{"GetCertificate", `{"Certificate": "hunter2"}`, "cannot parse"},
	} {
		answers = map[string]string{"ListCertificates": "{}", "ListTagsForCertificate": `{"Tags": [{"Key": "` + certificateTag + `", "Value": "cert-1"}, {"Key": "` + managedByTag + `"}]}`}
		if test.operation == "GetCertificate" {
			answers["ListCertificates"] = mine
		}
		answers[test.operation] = test.answer
		must(t, os.RemoveAll(filepath.Join(f.StateDir, noteDir)))
		_, err := f.deploy(f.material(), "endpoint", server)
		conformance.WantError(t, err, test.says)
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error quotes the answer: %v", err)
		}
	}
}

// A cancelled deployment starts no change, and undoes one whose answer is lost.
func TestCancelled(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.material()
	f.OnCall(func(operation string, n int) awsfake.Fault {
		if operation == "ListCertificates" {
			return awsfake.Hanging
		}
		return awsfake.None
	})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := f.Deploy(ctx, f.typ, f.config, m, conformance.Promotion(m)); err == nil || f.Imports() > 0 {
		t.Errorf("got %v, %d imports", err, f.Imports())
	}
	again, stop := context.WithCancel(t.Context())
	f.typ = typeOf(waits{call: time.Minute, list: time.Minute})
	f.Set(func(c *awsfake.Cloud) { c.Lag = 1 })
	f.OnCall(func(operation string, n int) awsfake.Fault {
		if operation == "ImportCertificate" {
			stop()
			return awsfake.Lost
		}
		return awsfake.None
	})
	if _, err := f.Deploy(again, f.typ, f.config, m, conformance.Promotion(m)); !errors.Is(err, context.Canceled) || conformance.Broken(err) {
		t.Errorf("got %v", err)
	}
	if f.Imports() != 1 || len(f.Certificates()) > 0 {
		t.Errorf("%d imports, and %d certificates are left", f.Imports(), len(f.Certificates()))
	}
}
