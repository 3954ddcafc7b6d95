package jks

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/needs"
)

func read(data []byte) (entries []Entry, err error) {
	err = Read(data, func(e Entry) { entries = append(entries, e) })
	return entries, err
}

func TestIs(t *testing.T) {
	for data, want := range map[string]bool{
		"\xfe\xed\xfe\xed\x00\x00\x00\x02\x00\x00\x00\x00": true,
		"\xfe\xed\xfe\xed\x00\x00\x00\x01\x00\x00\x00\x00": true,
		"\xce\xce\xce\xce\x00\x00\x00\x02\x00\x00\x00\x00": true,
		"\xce\xce\xce\xce\xce\xce\xce\xce\xce\xce\xce\xce": false, // a fill pattern
		"\xfe\xed\xfa\xcf\x00\x00\x00\x02\x00\x00\x00\x00": false, // Mach-O
		"\xfe\xed\xfe\xed\x00\x00\x00\x02":                 false,
		"":                                                 false,
	} {
		if got := Is([]byte(data)); got != want {
			t.Errorf("%x: %v, want %v", data, got, want)
		}
	}
	if _, err := read([]byte("text")); !errors.Is(err, errFormat) {
		t.Errorf("text: %v, want %v", err, errFormat)
	}
}

func TestRead(t *testing.T) {
	created := time.UnixMilli(1_600_000_000_000)
	for _, version := range []byte{1, 2} {
		entries, err := read(corpus.JKS(version, []byte("a"), []byte("bc")))
		if err != nil || len(entries) != 2 {
			t.Fatalf("version %d: %d entries, %v", version, len(entries), err)
		}
		for i, want := range []string{"a", "bc"} {
			e := entries[i]
			if e.Alias != []string{"alias0", "alias1"}[i] || !e.Created.Equal(created) || e.Key != nil ||
				len(e.Chain) != 1 || e.Chain[0].Type != X509 || string(e.Chain[0].Encoded) != want {
				t.Errorf("version %d: entry %d is %+v", version, i, e)
			}
		}
	}
	other := bytes.ReplaceAll(corpus.JKS(2, []byte("a")), []byte("X.509"), []byte("X.508"))
	if entries, err := read(other); err != nil || len(entries) != 1 || entries[0].Chain[0].Type != "X.508" {
		t.Errorf("another type of certificate: %+v, %v", entries, err)
	}
}

// TestDamage checks that entries before the damage are read.
func TestDamage(t *testing.T) {
	data := corpus.JKS(2, []byte("a"), []byte("b"))
	first := len(corpus.JKS(2, []byte("a"))) - 20 // without the digest
	for end := headerSize; end < len(data)-20; end++ {
		entries, err := read(data[:end])
		want := 0
		if end >= first {
			want = 1
		}
		if !errors.Is(err, errTruncated) || len(entries) != want {
			t.Errorf("the first %d bytes: %d entries, %v; want %d, and %v", end, len(entries), err, want, errTruncated)
		}
	}
	// A key entry with that many empty certificates.
	long := binary.BigEndian.AppendUint32([]byte("\xfe\xed\xfe\xed\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x01\x00\x01a\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), maxChain+1)
	entries, err := read(append(long, make([]byte, 4*(maxChain+1))...))
	if !errors.Is(err, errChain) || len(entries) != 1 || len(entries[0].Chain) != maxChain {
		t.Errorf("an overlong chain: %d entries, %v", len(entries), err)
	}
}

// TestSecretKey checks that a secret key, whose length is unknown without its password, ends the
// reading.
func TestSecretKey(t *testing.T) {
	data, err := os.ReadFile("testdata/java.jceks")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := read(data); !errors.Is(err, errSecret) {
		t.Errorf("got %v, want %v", err, errSecret)
	}
}

// TestAgainstKeytool compares aliases, a key's chain and a trusted certificate with keytool's.
func TestAgainstKeytool(t *testing.T) {
	if testing.Short() {
		t.Skip("keytool takes seconds")
	}
	t.Parallel()
	keytool := needs.Need(t, "keytool")
	for _, kind := range []string{"JKS", "JCEKS"} {
		dir := t.TempDir()
		run := func(args ...string) {
			t.Helper()
			args = append([]string{"-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC"}, args...)
			command := exec.CommandContext(t.Context(), keytool, append(args, "-keystore", "a", "-storetype", kind, "-storepass", "changeit")...)
			command.Dir = dir
			if output, err := command.CombinedOutput(); err != nil {
				t.Fatalf("keytool %q: %v\n%s", args, err, output)
			}
		}
		run("-genkeypair", "-alias", "Mine", "-keyalg", "EC", "-dname", "CN=mine", "-keypass", "changeit")
		run("-exportcert", "-alias", "mine", "-file", "mine.der")
		run("-importcert", "-noprompt", "-alias", "theirs", "-file", "mine.der")
		der, err := os.ReadFile(filepath.Join(dir, "mine.der"))
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(dir, "a"))
		if err != nil {
			t.Fatal(err)
		}
		entries, err := read(data)
		if err != nil || len(entries) != 2 {
			t.Fatalf("%s: %d entries, %v", kind, len(entries), err)
		}
		for _, e := range entries {
			if isKey := e.Alias == "mine"; isKey != (e.Key != nil) || !isKey && e.Alias != "theirs" || time.Since(e.Created) > time.Hour {
				t.Errorf("%s: entry %q of %v, with a key: %v", kind, e.Alias, e.Created, e.Key != nil)
			}
			if len(e.Chain) != 1 || !bytes.Equal(e.Chain[0].Encoded, der) {
				t.Errorf("%s: entry %q has another chain", kind, e.Alias)
			}
		}
		if _, err := x509.ParseCertificate(der); err != nil {
			t.Error(err)
		}
	}
}

func FuzzRead(f *testing.F) {
	header := []byte{0xfe, 0xed, 0xfe, 0xed, 0, 0, 0, 2, 0, 0, 0, 2}
	f.Add(corpus.JKS(2, []byte("a"), []byte("b"))[len(header):])
	f.Add([]byte("\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01k\x00\x00\x00\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := read(append(bytes.Clone(header), data...))
		size := 0
		for _, e := range entries {
			size += len(e.Alias) + len(e.Key)
			for _, cert := range e.Chain {
				size += len(cert.Encoded)
			}
		}
		if size > len(data) || err == nil && len(entries) != 2 {
			t.Errorf("%d entries of %d bytes from %d, %v", len(entries), size, len(data), err)
		}
	})
}
