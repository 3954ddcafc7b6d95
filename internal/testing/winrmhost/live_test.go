package winrmhost_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/testing/winrmhost"
)

// python is Debian's interpreter, which finds Debian's modules.
const python = "/usr/bin/python3"

// TestPywinrm checks that an independent client works against the host.
func TestPywinrm(t *testing.T) {
	needs.Need(t, python)
	if err := exec.Command(python, "-c", "import winrm").Run(); err != nil {
		needs.Missing(t, "python3-winrm is not installed")
	}
	ca := testca.Must(t)
	serving, err := ca.TLSCertificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	client, err := ca.Issue(testca.Template{CommonName: "deployer"})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// NTLM needs MD4, which OpenSSL 3 has in its legacy provider.
	openssl := file("openssl.cnf", []byte("openssl_conf = a\n[a]\nproviders = b\n[b]\ndefault = c\nlegacy = c\n[c]\nactivate = 1\n"))
	long := strings.Repeat("0123456789abcdef", 20_000)
	options := winrmhost.Options{Domain: "CORP", User: "deployer", Password: "geheim", Basic: true, ClientCA: ca.Pool(),
		Handler: func(command []string, stdin []byte) ([]byte, []byte, int) {
			if command[0] == "long" {
				return []byte(long), []byte("ü"), 0
			}
			return []byte(strings.Join(command, "|")), []byte("error"), 7
		}}
	how := map[string]any{
		"user": `CORP\deployer`, "password": options.Password, "commands": [][]string{{"hostname", "-a", "b"}, {"long"}},
		"ca": file("ca.pem", ca.PEM()), "cert": "", "key": "",
	}
	for _, test := range []struct {
		scheme, transport, password string
		want                        string
	}{
		{"http", "ntlm", "geheim-ß", ""},
		{"https", "ntlm", "geheim-ß", ""},
		{"https", "plaintext", "geheim", ""},
		{"https", "certificate", "geheim", ""},
		{"http", "ntlm", "wrong", "rejected"},
	} {
		t.Run(test.scheme+" "+test.transport+" "+test.want, func(t *testing.T) {
			o := options
			if test.want == "" {
				o.Password = test.password
			}
			if test.scheme == "https" {
				o.Certificate = &serving
			}
			host, err := winrmhost.Start(o)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			how["endpoint"], how["transport"], how["password"] = fmt.Sprintf("%s://127.0.0.1:%d/wsman", test.scheme, host.Port), test.transport, test.password
			how["cert"], how["key"] = "", ""
			if test.transport == "certificate" {
				how["cert"], how["key"] = file("cert.pem", client.LeafPEM()), file("key.pem", client.KeyPEM())
			}
			input, err := json.Marshal(how)
			if err != nil {
				t.Fatal(err)
			}
			command := exec.CommandContext(t.Context(), python, filepath.Join("testdata", "client.py"))
			command.Env = append(os.Environ(), "no_proxy=*", "OPENSSL_CONF="+openssl)
			command.Stdin = bytes.NewReader(input)
			output, err := command.Output()
			if exit, ok := err.(*exec.ExitError); ok {
				t.Fatalf("%v: %s", err, exit.Stderr)
			}
			var result struct {
				Answers [][]any
				Error   string
			}
			if err := json.Unmarshal(output, &result); err != nil {
				t.Fatalf("%v: %s", err, output)
			}
			if test.want != "" {
				if !strings.Contains(result.Error, test.want) || host.Counts().Shells != 0 {
					t.Errorf("result = %.500s, counts %+v", output, host.Counts())
				}
				return
			}
			if len(result.Answers) != 2 || fmt.Sprint(result.Answers[0]) != "[hostname|-a|b error 7]" || fmt.Sprint(result.Answers[1]) != "["+long+" ü 0]" {
				t.Errorf("result = %.500s", output)
			}
			if counts := host.Counts(); host.Shells() != 0 || counts.Shells != 1 || counts.Commands != 2 || counts.Failed != 0 {
				t.Errorf("%d shells are left, counts %+v", host.Shells(), counts)
			}
		})
	}
}
