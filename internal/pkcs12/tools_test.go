package pkcs12

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/needs"
)

// TestSamples opens stores written by other programs and replaces an entry.
func TestSamples(t *testing.T) {
	ca := newAuthority(t)
	for name, alias := range map[string]string{
		"java8.p12": "sample", "gnutls.p12": "sample", "nss.p12": "sample", "secret.p12": "",
		"windows.p12": "{6A3F1C2E-5D0B-4C57-9B36-0D1E2F3A4B5C}", "windows-3des.p12": "{6A3F1C2E-5D0B-4C57-9B36-0D1E2F3A4B5C}",
	} {
		t.Run(name, func(t *testing.T) {
			data := sample(t, name)
			s := mustOpen(t, data)
			if _, err := Open(data, "wrong", 1<<30); err == nil {
				t.Error("opened with a wrong password")
			}
			keys, err := s.Keys(password)
			if err != nil || len(keys) != 1 || len(keys[0].Chain) == 0 {
				t.Fatalf("the keys are %d, %v", len(keys), err)
			}
			if alias == "" { // of a key without a name
				s = mustPut(t, s, newKey(t, ca, "server"), false)
				if n := len(bags(s)); n != 5 {
					t.Errorf("%d entries, want the two old ones and three", n)
				}
				return
			}
			was, err := s.Find(alias, password)
			if err != nil || was == nil || len(was.Chain) != 2 {
				t.Fatalf("the sample's key: %+v, %v", was, err)
			}
			if !bytes.Equal(keys[0].PKCS8, was.PKCS8) || len(keys[0].Chain) != 2 {
				t.Error("Keys and Find return different keys")
			}
			if _, err := x509.ParsePKCS8PrivateKey(was.PKCS8); err != nil {
				t.Error(err)
			}
			if changed, err := s.Put(*was, false); changed || err != nil {
				t.Errorf("storing its own key again: changed %v, %v", changed, err)
			}
			before := bags(s)
			k := newKey(t, ca, alias)
			s = mustPut(t, s, k, name == "java8.p12")
			checkKey(t, s, k)
			for _, bag := range without(before, bags(s)) {
				e, _, err := readBag(element(t, bag))
				if err != nil || e.trusted {
					t.Errorf("removed %+v, %v", e, err)
				}
			}
		})
	}
}

func element(t *testing.T, b string) ber.Value {
	t.Helper()
	v, _, err := ber.Element([]byte(b))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// runner runs programs in a directory.
type runner struct{ dir string }

func (r runner) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	command := exec.CommandContext(t.Context(), name, args...)
	command.Dir = r.dir
	output, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, output)
	}
	return string(output)
}

// keytool runs Java's keytool with the fastest JVM settings.
func (r runner) keytool(t *testing.T, args ...string) string {
	t.Helper()
	args = append([]string{"-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC", "-J-Duser.language=en"}, args...)
	return r.run(t, needs.Need(t, "keytool"), append(args, "-storepass", password, "-noprompt")...)
}

func (r runner) path(name string) string { return filepath.Join(r.dir, name) }

func (r runner) write(t *testing.T, name string, s *Store) {
	t.Helper()
	data, err := s.Encode()
	if err == nil {
		err = os.WriteFile(r.path(name), data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (r runner) read(t *testing.T, name string) *Store {
	t.Helper()
	data, err := os.ReadFile(r.path(name))
	if err != nil {
		t.Fatal(err)
	}
	return mustOpen(t, data)
}

// certificates returns the certificates that a program printed as PEM.
func certificates(t *testing.T, text string) (all []*x509.Certificate) {
	t.Helper()
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, cert)
	}
	return all
}

// TestStoreAgainstKeytool replaces a key in a store written by keytool, with two keys and a trusted
// certificate. keytool must read the result and export the key.
func TestStoreAgainstKeytool(t *testing.T) {
	if testing.Short() {
		t.Skip("keytool takes seconds")
	}
	t.Parallel()
	for _, legacy := range []bool{false, true} {
		r := runner{t.TempDir()}
		options := []string{"-keystore", "a.p12", "-storetype", "PKCS12"}
		if legacy {
			options = append(options, "-J-Dkeystore.pkcs12.legacy")
		}
		keytool := func(args ...string) string { t.Helper(); return r.keytool(t, append(args, options...)...) }
		keytool("-genkeypair", "-alias", "Server", "-keyalg", "EC", "-dname", "CN=localhost")
		keytool("-genkeypair", "-alias", "other", "-keyalg", "RSA", "-dname", "CN=other")
		ca := newAuthority(t)
		if err := os.WriteFile(r.path("root.der"), ca.Root.Raw, 0o600); err != nil {
			t.Fatal(err)
		}
		keytool("-importcert", "-alias", "root", "-file", "root.der")

		s := r.read(t, "a.p12")
		was := bags(s)
		k, second := newKey(t, ca, "SERVER"), newKey(t, ca, "Zw\u00f6lf")
		s = mustPut(t, mustPut(t, s, k, legacy), second, legacy)
		if gone := without(was, bags(s)); len(gone) != 2 {
			t.Errorf("legacy %v: %d entries removed, want a key and its certificate", legacy, len(gone))
		}
		r.write(t, "a.p12", s)
		list := keytool("-list", "-rfc", "-alias", "server")
		if got := certificates(t, list); !strings.Contains(list, "PrivateKeyEntry") || !strings.Contains(list, "2020") ||
			len(got) != 3 || !slices.EqualFunc(got, append(slices.Clone(k.Chain), ca.Root), (*x509.Certificate).Equal) {
			t.Errorf("legacy %v: keytool says of the entry:\n%s", legacy, list)
		}
		if all := keytool("-list"); strings.Count(all, "PrivateKeyEntry") != 3 || strings.Count(all, "trustedCertEntry") != 1 {
			t.Errorf("legacy %v: keytool lists:\n%s", legacy, all)
		}
		for _, key := range []keyentry.PrivateKey{k, second} {
			r.keytool(t, "-importkeystore", "-srckeystore", "a.p12", "-srcstorepass", password, "-srcalias", strings.ToLower(key.Alias),
				"-destkeystore", "b.p12", "-deststoretype", "PKCS12", "-deststorepass", password)
			got, err := r.read(t, "b.p12").Find(key.Alias, password)
			if err != nil || got == nil || !keyentry.SameKey(got.PKCS8, key.PKCS8) {
				t.Errorf("legacy %v: keytool exported %s as %v, %v", legacy, key.Alias, got, err)
			}
		}
		keytool("-importcert", "-alias", "another", "-file", "root.der") // keytool rewrites the whole store
		if got, err := r.read(t, "a.p12").Find("server", password); err != nil || !keyentry.SameKey(got.PKCS8, k.PKCS8) {
			t.Errorf("legacy %v: after keytool wrote the store: %v", legacy, err)
		}
	}
}

// TestStoreAgainstOpenSSL exchanges stores with openssl in both directions, with each method.
func TestStoreAgainstOpenSSL(t *testing.T) {
	t.Parallel()
	openssl := needs.Need(t, "openssl")
	r, ca := runner{t.TempDir()}, newAuthority(t)
	k := newKey(t, ca, "server")
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k.PKCS8})
	for _, cert := range k.Chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	if err := os.WriteFile(r.path("a.pem"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{
		"", "-legacy", "-certpbe AES-128-CBC -keypbe AES-192-CBC -macalg SHA512", "-certpbe DES-EDE3-CBC -keypbe DES-EDE3-CBC", "-nomac",
		"-legacy -certpbe PBE-SHA1-RC2-128 -keypbe PBE-SHA1-RC2-128", "-legacy -certpbe PBE-SHA1-RC4-40 -keypbe PBE-SHA1-RC4-128",
		"-certpbe PBE-SHA1-2DES -keypbe PBE-SHA1-2DES -macalg SHA384", "-certpbe NONE -keypbe NONE", "-iter 1 -nomaciter",
	} {
		r.run(t, openssl, append([]string{"pkcs12", "-export", "-in", "a.pem", "-name", "Server", "-passout", "pass:" + password, "-out", "a.p12"}, strings.Fields(args)...)...)
		s := r.read(t, "a.p12")
		checkKey(t, s, k)
		changed, err := s.Put(k, false)
		if wantChange := strings.Contains(args, "-keypbe NONE"); err != nil || changed != wantChange { // Java does not read unencrypted keys
			t.Errorf("%q: storing the same key again: changed %v, %v", args, changed, err)
		}
		for _, legacy := range []bool{false, true} {
			renewed := newKey(t, ca, "server")
			s = mustPut(t, s, renewed, legacy)
			r.write(t, "b.p12", s)
			out := r.run(t, openssl, "pkcs12", "-in", "b.p12", "-nodes", "-info", "-passin", "pass:"+password)
			got := certificates(t, out)
			_, after, _ := strings.Cut(out, "-----BEGIN PRIVATE KEY")
			block, _ := pem.Decode([]byte("-----BEGIN PRIVATE KEY" + after))
			if len(got) != 2 || !got[0].Equal(renewed.Chain[0]) || !got[1].Equal(renewed.Chain[1]) || block == nil || !keyentry.SameKey(block.Bytes, renewed.PKCS8) {
				t.Errorf("%q, legacy %v: openssl says:\n%s", args, legacy, out)
			}
			if hasMAC := args != "-nomac"; hasMAC != strings.Contains(out, "MAC:") || hasMAC && legacy != strings.Contains(out, "MAC: sha1") {
				t.Errorf("%q, legacy %v: openssl says:\n%s", args, legacy, out)
			}
			if strings.Contains(out, "PBES2") == legacy {
				t.Errorf("%q, legacy %v: openssl says:\n%s", args, legacy, out)
			}
		}
	}
}

// FuzzStore checks that entries that are not replaced are written as they were read.
func FuzzStore(f *testing.F) {
	for _, name := range []string{"clear.p12", "windows.p12", "java8.p12"} {
		s, err := Open(sample(f, name), password, 1<<30)
		if err != nil {
			continue // has another password
		}
		for _, p := range s.parts {
			p.raw, p.sealed = nil, false
			safe, err := p.encode(s)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(safe)
		}
	}
	ca := newAuthority(f)
	k := newKey(f, ca, "sample")
	f.Fuzz(func(t *testing.T, safe []byte) {
		data := corpus.PKCS12(string(safe))
		before := bytes.Clone(data)
		s, err := Open(data, password, 1<<22)
		if err != nil {
			return
		}
		was := bags(s)
		s = reopen(t, s)
		if got := bags(s); !slices.Equal(was, got) {
			t.Fatalf("read %d entries, %d after writing", len(was), len(got))
		}
		if _, err := s.Put(k, false); err != nil {
			return
		}
		s = reopen(t, s)
		if got, err := s.Find("sample", password); err != nil || got == nil || !bytes.Equal(got.PKCS8, k.PKCS8) || len(got.Chain) == 0 || !got.Chain[0].Equal(k.Chain[0]) {
			t.Errorf("the stored key: %+v, %v", got, err)
		}
		if changed, err := s.Put(k, false); changed || err != nil {
			t.Errorf("storing the same key again: changed %v, %v", changed, err)
		}
		for _, bag := range without(was, bags(s)) {
			if e, _, err := readBag(element(t, bag)); err != nil || e.Kind != Certificate && !e.hasAlias("sample") || e.trusted {
				t.Errorf("lost: %+v, %v", e, err)
			}
		}
		if !bytes.Equal(before, data) {
			t.Error("the store's bytes were changed")
		}
	})
}
