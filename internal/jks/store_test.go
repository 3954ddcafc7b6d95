package jks

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/needs"
)

const password = "correct horse"

// newKey returns a private key for an alias with a chain of two certificates.
func newKey(t testing.TB, alias string) keyentry.PrivateKey {
	t.Helper()
	k := keyentry.PrivateKey{Alias: alias, Created: time.UnixMilli(1_600_000_000_000), Password: password}
	issuer := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuer of " + alias},
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: alias}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, template := range []*x509.Certificate{leaf, issuer} {
		public := &key.PublicKey
		if template == issuer {
			public = &signer.PublicKey
		}
		der, err := x509.CreateCertificate(rand.Reader, template, issuer, public, signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		k.Chain = append(k.Chain, cert)
	}
	if k.PKCS8, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		t.Fatal(err)
	}
	return k
}

func mustOpen(t testing.TB, data []byte) *Store {
	t.Helper()
	s, err := Open(data, password)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// mustPut stores k, encodes the store and opens it again.
func mustPut(t testing.TB, s *Store, k keyentry.PrivateKey) *Store {
	t.Helper()
	if changed, err := s.Put(k); err != nil || !changed {
		t.Fatalf("put %q: changed %v, %v", k.Alias, changed, err)
	}
	return mustOpen(t, s.Encode())
}

func checkKey(t testing.TB, s *Store, k keyentry.PrivateKey) {
	t.Helper()
	got, err := s.Find(k.Alias, k.Password)
	if err != nil || got == nil {
		t.Fatalf("find %q: %v, %v", k.Alias, got, err)
	}
	if !keyentry.SameKey(got.PKCS8, k.PKCS8) || !slices.EqualFunc(got.Chain, k.Chain, (*x509.Certificate).Equal) {
		t.Errorf("%q has another key, or a chain of %d certificates, want %d", k.Alias, len(got.Chain), len(k.Chain))
	}
}

func raws(s *Store) (all []string) {
	for _, e := range s.entries {
		all = append(all, string(e.raw))
	}
	return all
}

func TestPut(t *testing.T) {
	first, other := newKey(t, "Server"), newKey(t, "Zw\u00f6lf\x00\U0001f511")
	other.Password = "another password"
	s := mustPut(t, mustPut(t, New(password), first), other)
	checkKey(t, s, first)
	checkKey(t, s, other)
	for _, k := range []keyentry.PrivateKey{first, other} {
		k.Created = time.Now()
		if changed, err := s.Put(k); changed || err != nil {
			t.Errorf("storing the same key again under %q: changed %v, %v", k.Alias, changed, err)
		}
	}
	was := raws(s)
	renewed := newKey(t, "sERVER")
	s = mustPut(t, s, renewed)
	checkKey(t, s, renewed)
	if now := raws(s); len(now) != 2 || now[0] == was[0] || now[1] != was[1] {
		t.Error("another entry changed or moved")
	}
	shorter := renewed
	shorter.Chain = renewed.Chain[:1]
	checkKey(t, mustPut(t, s, shorter), shorter)
	if _, err := s.Find("server", "another password"); !errors.Is(err, ErrPassword) {
		t.Errorf("a key under a wrong password: %v", err)
	}
	if k, err := s.Find("nobody", password); k != nil || err != nil {
		t.Errorf("an unknown alias: %v, %v", k, err)
	}
	if _, err := s.Put(keyentry.PrivateKey{Alias: strings.Repeat("a", 1<<16), Chain: first.Chain}); err == nil {
		t.Error("no error for an overlong alias")
	}
}

// signed returns a store of the corpus with the digest for password.
func signed(version byte, certificates ...[]byte) []byte {
	data := corpus.JKS(version, certificates...)
	content := data[:len(data)-20]
	return append(content, digest(password, content)...)
}

func TestOpenRefuses(t *testing.T) {
	for _, version := range []byte{1, 2} {
		data := signed(version, []byte("a"), []byte("b"))
		s := mustOpen(t, data)
		if !bytes.Equal(s.Encode(), data) {
			t.Errorf("version %d: an unchanged store is written differently", version)
		}
		if _, err := s.Put(newKey(t, "ALIAS0")); !errors.Is(err, ErrAlias) {
			t.Errorf("the alias of a trusted certificate: %v", err)
		}
		k := newKey(t, "server")
		was := raws(s)
		s = mustPut(t, s, k)
		if checkKey(t, s, k); !slices.Equal(raws(s)[:2], was) {
			t.Errorf("version %d: the other entries changed", version)
		}
		if _, err := Open(data, "wrong"); !errors.Is(err, ErrPassword) {
			t.Errorf("a wrong password: %v", err)
		}
		for end := range len(data) {
			if _, err := Open(data[:end], password); err == nil {
				t.Errorf("opened the first %d bytes", end)
			}
		}
		if _, err := Open(append(bytes.Clone(data), 0), password); err == nil {
			t.Error("no error for an additional byte")
		}
	}
	many := signed(2)
	binary.BigEndian.PutUint32(many[8:], maxEntries+1)
	if _, err := Open(many, password); !errors.Is(err, errEntries) {
		t.Errorf("many entries: %v, want %v", err, errEntries)
	}
	java, err := os.ReadFile("testdata/java.jceks")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(java, password); !errors.Is(err, ErrJCEKS) {
		t.Errorf("JCEKS: %v, want %v", err, ErrJCEKS)
	}
}

// TestSample covers a store written by Java 8 whose key has a different password.
func TestSample(t *testing.T) {
	data, err := os.ReadFile("testdata/java8.jks")
	if err != nil {
		t.Fatal(err)
	}
	s := mustOpen(t, data)
	if !bytes.Equal(s.Encode(), data) {
		t.Error("an unchanged store is written differently")
	}
	if _, err := s.Find("sample", password); !errors.Is(err, ErrPassword) {
		t.Errorf("the key under the store's password: %v", err)
	}
	was, err := s.Find("sample", "another word")
	if err != nil || was == nil || len(was.Chain) != 2 {
		t.Fatalf("%+v, %v", was, err)
	}
	if changed, err := s.Put(*was); changed || err != nil {
		t.Errorf("storing its own key again: changed %v, %v", changed, err)
	}
	was.Password = password
	checkKey(t, mustPut(t, s, *was), *was)
}

func TestManyEntries(t *testing.T) {
	s := New(password)
	k := newKey(t, "server")
	for i := range 1000 {
		k.Alias = fmt.Sprint("alias", i)
		if _, err := s.Put(k); err != nil {
			t.Fatal(err)
		}
	}
	s = mustOpen(t, s.Encode())
	was := raws(s)
	renewed := newKey(t, "alias500")
	s = mustPut(t, s, renewed)
	checkKey(t, s, renewed)
	for i, raw := range raws(s) {
		if changed := raw != was[i]; changed != (i == 500) {
			t.Errorf("entry %d: changed %v", i, changed)
		}
	}
}

// TestStoreAgainstKeytool replaces keys in a store written by keytool, with a password for each key
// and a trusted certificate. keytool must read the result and export the keys.
func TestStoreAgainstKeytool(t *testing.T) {
	if testing.Short() {
		t.Skip("keytool takes seconds")
	}
	t.Parallel()
	program, dir := needs.Need(t, "keytool"), t.TempDir()
	path := filepath.Join(dir, "a.jks")
	keytool := func(args ...string) string {
		t.Helper()
		args = append([]string{"-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC", "-J-Duser.language=en"}, args...)
		command := exec.CommandContext(t.Context(), program, append(args, "-noprompt")...)
		command.Dir = dir
		output, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("keytool %q: %v\n%s", args, err, output)
		}
		return string(output)
	}
	of := []string{"-keystore", path, "-storetype", "JKS", "-storepass", password}
	keytool(append(of, "-genkeypair", "-alias", "Server", "-keyalg", "EC", "-dname", "CN=localhost", "-keypass", password)...)
	keytool(append(of, "-genkeypair", "-alias", "other", "-keyalg", "EC", "-dname", "CN=other", "-keypass", "another password")...)
	keytool(append(of, "-exportcert", "-alias", "other", "-file", "other.der")...)
	keytool(append(of, "-importcert", "-alias", "trusted", "-file", "other.der")...)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := mustOpen(t, data)
	k, second := newKey(t, "SERVER"), newKey(t, "Zw\u00f6lf")
	second.Password = "a third password"
	s = mustPut(t, mustPut(t, s, k), second)
	if err := os.WriteFile(path, s.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
	list := keytool(append(of, "-list", "-rfc", "-alias", "server")...)
	var got []*x509.Certificate
	for block, rest := pem.Decode([]byte(list)); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, cert)
	}
	if !strings.Contains(list, "PrivateKeyEntry") || !strings.Contains(list, "2020") || !slices.EqualFunc(got, k.Chain, (*x509.Certificate).Equal) {
		t.Errorf("keytool says of the entry:\n%s", list)
	}
	for alias, pass := range map[string]string{"server": password, "other": "another password", "zw\u00f6lf": "a third password"} {
		keytool("-importkeystore", "-srckeystore", path, "-srcstorepass", password, "-srcalias", alias, "-srckeypass", pass,
			"-destkeystore", "b.jks", "-deststoretype", "JKS", "-deststorepass", password, "-destkeypass", password)
	}
	if data, err = os.ReadFile(filepath.Join(dir, "b.jks")); err != nil {
		t.Fatal(err)
	}
	read := mustOpen(t, data)
	second.Password = password
	checkKey(t, read, k)
	checkKey(t, read, second)
	keytool(append(of, "-delete", "-alias", "trusted")...) // keytool rewrites the whole store
	if data, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	checkKey(t, mustOpen(t, data), k)
}

// FuzzStore checks that entries that are not replaced are written as they were read.
func FuzzStore(f *testing.F) {
	f.Add(signed(2, []byte("a"), []byte("b")))
	f.Add(signed(1, []byte("a")))
	if data, err := os.ReadFile("testdata/java8.jks"); err == nil {
		f.Add(data)
	}
	k := newKey(f, "sample")
	f.Fuzz(func(t *testing.T, data []byte) {
		if !Is(data) || len(data) < 32 {
			return
		}
		content := data[:len(data)-20]
		data = slices.Concat(content, digest(password, content))
		s, err := Open(data, password)
		if err != nil {
			return
		}
		if !bytes.Equal(s.Encode(), data) {
			t.Fatal("an unchanged store is written differently")
		}
		was := raws(s)
		changed, err := s.Put(k)
		if err != nil || !changed {
			return
		}
		s = mustOpen(t, s.Encode())
		checkKey(t, s, k)
		same := 0
		for i, raw := range raws(s) {
			if i < len(was) && was[i] == raw {
				same++
			}
		}
		if same < len(was)-1 {
			t.Errorf("%d of %d entries are unchanged", same, len(was))
		}
	})
}
