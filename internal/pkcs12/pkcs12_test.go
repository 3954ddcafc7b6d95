package pkcs12

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/needs"
)

// enough is a budget that no test exhausts.
const enough = 256 << 20

func read(data []byte, passwords ...string) (entries []Entry, problems []error) {
	r := &Reader{Passwords: passwords, Work: enough}
	r.Read(data, func(e Entry) { entries = append(entries, e) }, func(err error) { problems = append(problems, err) })
	return entries, problems
}

func sample(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestIs(t *testing.T) {
	store := corpus.PKCS12(corpus.PKCS12Certificate([]byte("der")))
	for _, test := range []struct {
		what string
		data []byte
		want bool
	}{
		{"a store", store, true},
		{"its head", store[:20], true},
		{"of OpenSSL", sample(t, "secret.p12"), true},
		{"of indefinite length", []byte("\x30\x80\x02\x01\x03\x30\x80"), true},
		{"a key", []byte("\x30\x81\x87\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01"), false},
		{"another object of version 3", []byte("\x30\x81\x87\x02\x01\x03\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01"), false},
		{"an SNMP message", []byte("\x30\x3e\x02\x01\x03\x30\x11\x02\x04\x00\x00\x00\x01"), false},
		{"text", []byte("0123456789"), false},
		{"nothing", nil, false},
	} {
		if got := Is(test.data); got != test.want {
			t.Errorf("%s: %v, want %v", test.what, got, test.want)
		}
	}
}

// TestRead compares entries with the output of openssl pkcs12 -info.
func TestRead(t *testing.T) {
	entries, problems := read(sample(t, "secret.p12"), "wrong", "correct horse")
	if len(problems) > 0 || len(entries) != 2 {
		t.Fatalf("%d entries, %q", len(entries), problems)
	}
	certificate, key := entries[0], entries[1]
	if _, err := x509.ParseCertificate(certificate.DER); certificate.Kind != Certificate || err != nil {
		t.Errorf("the first entry is of kind %d: %v", certificate.Kind, err)
	}
	if key.Kind != EncryptedKey || key.Alias != "" || len(key.DER) == 0 {
		t.Errorf("the second entry is %+v, want an encrypted key", key)
	}
	const id = "81aa259dac217c476f3f2925e0bd495ce6950024"
	if hex.EncodeToString(key.ID) != id || hex.EncodeToString(certificate.ID) != id {
		t.Errorf("their ids are %x and %x, want %s", key.ID, certificate.ID, id)
	}
	entries, problems = read(sample(t, "secret.p12"), "", "wrong")
	if len(entries) != 1 || entries[0].Kind != EncryptedKey || len(problems) != 1 || !errors.Is(problems[0], ErrPassword) {
		t.Errorf("without the password: %d entries, %q; want the key, and %v", len(entries), problems, ErrPassword)
	}
}

// TestAgainstOpenSSL covers aliases and unencrypted keys.
func TestAgainstOpenSSL(t *testing.T) {
	t.Parallel()
	openssl := needs.Need(t, "openssl")
	dir := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		command := exec.CommandContext(t.Context(), openssl, args...)
		command.Dir = dir
		if output, err := command.CombinedOutput(); err != nil {
			t.Fatalf("openssl %q: %v\n%s", args, err, output)
		}
	}
	for _, name := range []string{"one", "two"} {
		run("req", "-x509", "-nodes", "-days", "30", "-newkey", "ed25519", "-subj", "/CN="+name, "-keyout", name+".key", "-out", name+".pem")
	}
	for _, test := range []struct {
		what string
		args []string
		key  Kind
	}{
		{"default", nil, EncryptedKey},
		{"key in clear", []string{"-keypbe", "NONE"}, Key},
		{"all in clear", []string{"-keypbe", "NONE", "-certpbe", "NONE"}, Key},
	} {
		run(append([]string{"pkcs12", "-export", "-in", "one.pem", "-inkey", "one.key", "-certfile", "two.pem", "-name", "z\xc3\xbcri", "-caname", "the other",
			"-passout", "pass:secret", "-out", "a.p12"}, test.args...)...)
		data, err := os.ReadFile(filepath.Join(dir, "a.p12"))
		if err != nil {
			t.Fatal(err)
		}
		entries, problems := read(data, "secret")
		var got []string
		for _, e := range entries {
			got = append(got, e.Alias)
		}
		if want := []string{"z\xc3\xbcri", "the other", "z\xc3\xbcri"}; !slices.Equal(got, want) || len(problems) > 0 {
			t.Fatalf("%s: aliases %q, want %q; %q", test.what, got, want, problems)
		}
		key := entries[2]
		if key.Kind != test.key || !bytes.Equal(key.ID, entries[0].ID) || entries[1].ID != nil {
			t.Errorf("%s: the key is %+v, its certificate %+v", test.what, key, entries[0])
		}
		if test.key == Key {
			text, err := os.ReadFile(filepath.Join(dir, "one.key"))
			if err != nil {
				t.Fatal(err)
			}
			if block, _ := pem.Decode(text); !bytes.Equal(block.Bytes, key.DER) {
				t.Errorf("%s: another key", test.what)
			}
		}
	}
}

// TestParts checks the limit of encrypted parts, since a store with many of them would cost the
// work of many stores.
func TestParts(t *testing.T) {
	part := corpus.PKCS12Locked("\x01", 16)
	for parts, want := range map[int]error{maxEncrypted: ErrPassword, maxEncrypted + 1: errParts} {
		_, problems := read(corpus.PKCS12(strings.Repeat(part, parts)), "")
		if last := problems[len(problems)-1]; !errors.Is(last, want) {
			t.Errorf("%d parts: got %q", parts, problems)
		}
	}
}

// TestWork checks that all stores share the budget and never exceed it.
func TestWork(t *testing.T) {
	store := corpus.PKCS12(corpus.PKCS12Locked("\x03\xe8", 16))
	r := &Reader{Passwords: []string{"a", "b"}, Work: 1 << 20}
	for done := 0; ; done++ {
		var problem error
		r.Read(store, func(Entry) { t.Error("an entry of a store that no password opens") }, func(err error) { problem = err })
		if r.Work < 0 {
			t.Fatalf("%d work left after %d stores", r.Work, done)
		}
		if errors.Is(problem, ErrWork) {
			if done < 2 {
				t.Errorf("the budget was used up after %d stores", done)
			}
			return
		}
		if !errors.Is(problem, ErrPassword) || done > 100 {
			t.Fatalf("after %d stores: %v", done, problem)
		}
	}
}

func FuzzRead(f *testing.F) {
	files, err := filepath.Glob("testdata/*.p12")
	if err != nil || len(files) == 0 {
		f.Fatalf("no samples: %v", err)
	}
	for _, file := range files {
		f.Add(sample(f, filepath.Base(file)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		before := bytes.Clone(data)
		// Enough for OpenSSL's 2,048 iterations. Under load, the fuzzer would take the 600,000 of
		// GnuTLS and NSS for a hang; TestSamples covers those.
		r := &Reader{Passwords: []string{"", "correct horse"}, Work: 4 << 20}
		r.Read(data, func(e Entry) {
			if len(e.Alias) > 4*maxAlias {
				t.Errorf("an alias of %d bytes", len(e.Alias))
			}
		}, func(error) {})
		if !bytes.Equal(before, data) {
			t.Error("the store's bytes were changed")
		}
	})
}
