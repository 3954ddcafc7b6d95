package certfile

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ber"
)

// TestOutcomeKeepsEverything: an outcome from the index reports the same as the file, or is damaged.
func TestOutcomeKeepsEverything(t *testing.T) {
	text, der := testCertificate(t)
	broken := bytes.Replace(text, []byte("MII"), []byte("M=I"), 1)
	parser := Parser{}
	whole := parser.Parse("a.pem", slices.Concat(broken, text))
	want, err := describe(der)
	if err != nil {
		t.Fatal(err)
	}
	want.SourcePath, want.SourceFormat, want.PEMData = "/x/a.pem", "PEM", string(text)
	want.FingerprintSHA256 = fmt.Sprintf("%x", sha256.Sum256(der))
	report := func(o Outcome) (certs []api.DiscoveredCertificate, causes []string, err error) {
		err = o.Report("/x/a.pem", func(c api.DiscoveredCertificate) error { certs = append(certs, c); return nil },
			func(cause string) { causes = append(causes, cause) })
		return certs, causes, err
	}
	certs, causes, err := report(whole)
	if err != nil || len(causes) != 1 || len(certs) != 1 || !reflect.DeepEqual(certs[0], want) {
		t.Fatalf("got %+v, %q, %v\nwant %+v", certs, causes, err, want)
	}
	for n := range whole {
		if certs, _, err := report(whole[:n]); err != ErrDamaged || len(certs) > 0 {
			t.Errorf("cut at %d of %d: %d certificates, %v, want ErrDamaged", n, len(whole), len(certs), err)
		}
	}
	stop := errors.New("stop")
	if err := whole.Report("", func(api.DiscoveredCertificate) error { return stop }, func(string) {}); err != stop {
		t.Errorf("the caller's error came back as %v", err)
	}
}

// TestCenturyOfUTCTime: RFC 5280, section 4.1.2.5.1.
func TestCenturyOfUTCTime(t *testing.T) {
	for text, want := range map[string]string{
		"500101000000Z": "1950-01-01T00:00:00Z",
		"991231235959Z": "1999-12-31T23:59:59Z",
		"000101000000Z": "2000-01-01T00:00:00Z",
		"491231235959Z": "2049-12-31T23:59:59Z",
	} {
		p := ordinaryParts()
		p.notBefore = tlv(ber.TagUTCTime, text)
		if got, err := describe(p.der()); err != nil || got.NotBefore != want {
			t.Errorf("%s: %s, %v, want %s", text, got.NotBefore, err, want)
		}
	}
}

// TestEmbeddedBlocks: a damaged block is reported only where it begins a line.
func TestEmbeddedBlocks(t *testing.T) {
	for before, want := range map[string]bool{
		"": false, "\n": false, "\r": false, "-": false, "x\n": false, "x\r": false, "x-": false,
		"x": true, " ": true, "\nx": true, "\rx": true, "-x": true, "\n ": true, "\r\"": true, "- ": true,
	} {
		found := 0
		pemBlocks([]byte(before+"-----BEGIN CERTIFICATE-----\nMII"), func(b pemBlock) {
			if found++; b.embedded != want || b.err == nil {
				t.Errorf("after %q: embedded %v, %v, want %v and an error", before, b.embedded, b.err, want)
			}
		})
		if found != 1 {
			t.Errorf("after %q: %d blocks", before, found)
		}
	}
}

// TestWrappedFromTheBeginning: the value may be the whole file.
func TestWrappedFromTheBeginning(t *testing.T) {
	text, _ := testCertificate(t)
	found := 0
	wrappedPEM([]byte(base64.StdEncoding.EncodeToString(text)), func(got []byte) {
		if found++; !bytes.Equal(got, text) {
			t.Errorf("found %q", got)
		}
	})
	if found != 1 {
		t.Errorf("found %d values, want one", found)
	}
}
