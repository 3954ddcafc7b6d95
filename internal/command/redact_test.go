package command

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"
)

// testKeys are keys of the types that servers use.
func testKeys(t *testing.T) map[string]string {
	t.Helper()
	cryptotest.SetGlobalRandom(t, 42) // detection depends on the random bytes
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	sec1, err := x509.MarshalECPrivateKey(ec)
	must(t, err)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(ed)
	must(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return map[string]string{
		"ecdsa":   encode("EC PRIVATE KEY", sec1),
		"ed25519": encode("PRIVATE KEY", pkcs8),
		"rsa":     encode("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)),
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// leaks returns a part of the key that text contains in base64 or hex, or "". It ignores white
// space in text.
func leaks(key, text string) string {
	const shown = 12 // characters
	squeeze := strings.NewReplacer(" ", "", "\n", "", "\t", "", ":", "", "|", "").Replace
	text = squeeze(text)
	block, _ := pem.Decode([]byte(key))
	for _, form := range []string{base64.StdEncoding.EncodeToString(block.Bytes), hex.EncodeToString(block.Bytes), hex.EncodeToString([]byte(key))} {
		for i := 0; i+shown <= len(form); i++ {
			if part := form[i : i+shown]; strings.Contains(text, part) {
				return part
			}
		}
	}
	return ""
}

// TestRunShowsNoKey: commands print a key in many ways, without a shell.
func TestRunShowsNoKey(t *testing.T) {
	for kind, key := range testKeys(t) {
		path := filepath.Join(t.TempDir(), "key.pem")
		must(t, os.WriteFile(path, []byte(key), 0o600))
		noise := filepath.Join(t.TempDir(), "noise")
		must(t, os.WriteFile(noise, []byte(strings.Repeat("all is well\n", 2000)), 0o600))
		for _, line := range []string{
			"cat", "cat " + noise, "cat -n", "cat -A", "tail -n +2", "head -n -1", "grep -v BEGIN", "grep -n -v PRIVATE", "grep -o .",
			"sed -n 2,3p", "fold -w 20", "fold -w 7", "fold -w 2", "tac", "rev", "sort", "base64", "base64 -w 0", "base32",
			"od -An -tx1", "od -tx1", "od -c", "od -An -tu1", "od", "hexdump -C", "hexdump", "xxd", "xxd -p",
			"openssl pkey -text -noout -in", "openssl pkey -text -in", "nl", "pr -n", "comm /dev/null", "diff /dev/null", "paste /dev/null", "date -f",
		} {
			words := append(strings.Fields(line), path)
			if _, err := exec.LookPath(words[0]); err != nil || kind == "rsa" && words[0] != "cat" {
				continue // an RSA key differs from the others only in length
			}
			// The last word makes most of them fail, so that the error has it too.
			argv := append(words, "/nonexistent/file")
			output, err := Run(t.Context(), argv, 10*time.Second)
			if part := leaks(key, output+fmt.Sprint(err)); part != "" {
				t.Errorf("%s, %s: shows %q:\n%s\n%v", kind, argv, part, output, err)
			}
		}
		// The output may be cut at any place in the key.
		for at := half - len(key) - 40; at < half+40; at += 7 {
			var output clipped
			output.Write([]byte(strings.Repeat("x ", at/2) + key + strings.Repeat(" y", maxOutput)))
			if part := leaks(key, output.String()); part != "" {
				t.Fatalf("%s: the head, cut at %d, shows %q", kind, at, part)
			}
			output = clipped{}
			output.Write([]byte(strings.Repeat("x ", maxOutput) + key + strings.Repeat(" y", at/2)))
			if part := leaks(key, output.String()); part != "" {
				t.Fatalf("%s: the tail, cut at %d, shows %q", kind, at, part)
			}
			for _, form := range []string{strings.NewReplacer("\n", "").Replace(key[strings.Index(key, "\n"):strings.LastIndex(key, "-----END")]), hex.EncodeToString([]byte(key))} {
				output = clipped{}
				output.Write([]byte(strings.Repeat("x ", at/2) + form + strings.Repeat(" y", maxOutput)))
				if part := leaks(key, output.String()); part != "" {
					t.Fatalf("%s: one line in the head, cut at %d, shows %q", kind, at, part)
				}
			}
		}
	}
}

// TestRedactKeeps: text that operators need is not redacted.
func TestRedactKeeps(t *testing.T) {
	for _, text := range []string{
		"",
		"nginx: the configuration file /etc/nginx/nginx.conf syntax is ok\nnginx: configuration file /etc/nginx/nginx.conf test is successful\n",
		`nginx: [emerg] cannot load certificate "/etc/letsencrypt/live/www.example.org/fullchain.pem": BIO_new_file() failed (SSL: error:80000002:system library::No such file or directory)`,
		"/opt/IBM/WebSphere/AppServer/profiles/AppSrv01/config/cells/DefaultCell01/trust.p12: no such file",
		"/etc/ssl/certs/DigiCert_Global_Root_CA_With_A_Long_Name_Of_2024.pem",
		"/var/lib/certctl/keys/123e4567-e89b-12d3-a456-426614174000.key",
		"Reloading\nNginx\nDone\nAll\nServices\nAre\nRunning\nNow\n",
		"ssl_ciphers ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:DHE-RSA-CHACHA20-POLY1305;",
		"link 00:1b:44:11:3a:b7 at 2001:db8:0:0:0:0:0:1 and 10.1.2.3",
		"Job for nginx.service failed because the control process exited with error code.\nSee \"systemctl status nginx.service\" and \"journalctl -xeu nginx.service\" for details.",
		"AH00558: apache2: Could not reliably determine the server's fully qualified domain name, using 127.0.1.1. Set the 'ServerName' directive globally to suppress this message",
		"tcp 0 128 0.0.0.0:443 LISTEN 1234/nginx\n-rw-r--r-- 1 root root 1234 Jan  1 00:00 a\n",
		"systemd-networkd-wait-online-of-a-very-long-name.service",
	} {
		if got := redact(text, true, true); got != text {
			t.Errorf("redact(%q) = %q", text, got)
		}
	}
}

// TestRedactManyLines: the cost of a hostile server's output is linear. Looking from each line to
// the end of the text would take hours here.
func TestRedactManyLines(t *testing.T) {
	text := strings.Repeat("no\n", 300_000)
	if got := redact(text, true, true); got != text {
		t.Errorf("%d bytes became %d", len(text), len(got))
	}
}

func TestRedactArmour(t *testing.T) {
	const begin, end = "-----BEGIN X-----", "-----END X-----"
	for text, want := range map[string]string{
		"a " + begin + " k " + end + " b":                     "a [redacted] b",
		"a " + begin + " k":                                   "a [redacted]",
		"k " + end + " b":                                     "[redacted] b",
		"k " + end + " a " + begin + " k " + end + " b":       "[redacted] a [redacted] b",
		begin + "k" + end + "a" + begin + "k" + end + "b":     "[redacted]a[redacted]b",
		begin + begin + "k" + end + "k" + end + " a " + begin: "[redacted] a [redacted]",
		"-----BEGIN \n a":                                     "-----BEGIN \n a",
	} {
		if got := redact(text, true, true); got != want {
			t.Errorf("redact(%q) = %q, want %q", text, got, want)
		}
	}
}

// FuzzRedact: no text around a key makes it visible.
func FuzzRedact(f *testing.F) {
	f.Add("a -----BEGIN X-----\n", "-----END X----- b")
	f.Add("-----END X-----", "-----BEGIN X-----")
	f.Add("-----BEGIN X", "")
	f.Add("00000000: 2d2d 2d2d 2d42 4547 494e 2045 4320 5052  -----BEGIN EC PR\n", "x")
	f.Fuzz(func(t *testing.T, before, after string) {
		const key = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIPnJO50gnS/HTZK0oTUfKgkwJQPenVYyYY9tYsY0FpzS\n-----END PRIVATE KEY-----\n"
		for _, cut := range []bool{false, true} {
			if got := redact(before+key+after, cut, cut); strings.Contains(got, "TZK0oTUf") && !strings.Contains(before+after, "TZK0oTUf") {
				t.Errorf("redact(%q) = %q", before+key+after, got)
			}
		}
	})
}
