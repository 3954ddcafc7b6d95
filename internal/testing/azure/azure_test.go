package azure_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/testing/azure"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// python returns the interpreter that has Debian's modules.
func python(t *testing.T) string {
	t.Helper()
	const program = "/usr/bin/python3"
	if exec.Command(program, "-c", "import azure.identity, azure.keyvault.certificates, azure.keyvault.secrets").Run() != nil {
		needs.Missing(t, "the Azure SDK for Python (python3-azure) is not installed")
	}
	return program
}

func write(t *testing.T, dir, name string, data ...[]byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	must(t, os.WriteFile(path, slices.Concat(data...), 0o600))
	return path
}

// pkcs8 returns a key in the form that the service accepts in PEM.
func pkcs8(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// federated returns a token like those of Kubernetes pods.
func federated(t *testing.T, key *rsa.PrivateKey) []byte {
	t.Helper()
	encode := func(v any) string {
		data, err := json.Marshal(v)
		must(t, err)
		return base64.RawURLEncoding.EncodeToString(data)
	}
	signed := encode(map[string]any{"alg": "RS256", "typ": "JWT"}) + "." + encode(map[string]any{
		"iss": "https://issuer.example", "sub": "system:serviceaccount:certctl:agent", "aud": "api://AzureADTokenExchange",
		"nbf": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	})
	digest := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	must(t, err)
	return []byte(signed + "." + base64.RawURLEncoding.EncodeToString(signature))
}

// TestSDK checks that Microsoft's client works against the fake with every kind of credential in
// every cloud, and meets the limits of the service.
func TestSDK(t *testing.T) {
	program, openssl := python(t), needs.Need(t, "openssl")
	ca := testca.Must(t)
	server, err := azure.Start(ca)
	must(t, err)
	t.Cleanup(server.Close)
	dir := t.TempDir()
	www, err := ca.Issue(testca.Template{Names: []string{"www.example.org"}, Intermediates: 1, OmitRoot: true})
	must(t, err)
	other, err := ca.Issue(testca.Template{Names: []string{"www.example.org"}})
	must(t, err)
	write(t, dir, "www.pem", pkcs8(t, www.Key), www.PEM())
	write(t, dir, "other.pem", pkcs8(t, other.Key), other.LeafPEM())
	out, err := exec.Command(openssl, "pkcs12", "-export", "-in", filepath.Join(dir, "www.pem"), "-out", filepath.Join(dir, "www.pfx"), "-passout", "pass:hunter2",
		"-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES", "-macalg", "sha1").CombinedOutput()
	if err != nil {
		t.Fatalf("openssl: %v: %s", err, out)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	app, err := ca.Issue(testca.Template{Names: []string{"app.example.org"}, Key: key})
	must(t, err)
	write(t, dir, "app.pem", pkcs8(t, key), app.LeafPEM())
	write(t, dir, "token", federated(t, key))
	bundle := write(t, dir, "ca.pem", ca.PEM())
	const client, secret = "0f4e1f4a-0000-4000-8000-000000000001", "hunter2~secret"
	server.Register(client, azure.App{
		Secret: secret, Certificates: []*x509.Certificate{app.Leaf},
		Federated: &azure.Federation{Issuer: "https://issuer.example", Subject: "system:serviceaccount:certctl:agent", Key: &key.PublicKey},
	})
	server.Assign("")
	for _, test := range []struct {
		name, kind string
		cloud      azure.Cloud
		env        []string
		calls      string // how the client obtains the token
	}{
		{"secret", "secret", azure.Public(), []string{"SECRET=" + secret}, "token " + client},
		{"certificate", "certificate", azure.USGovernment(), nil, "token " + client},
		{"federated token", "federated", azure.China(), nil, "token " + client},
		{"virtual machine", "managed", azure.Public(), []string{"AZURE_POD_IDENTITY_AUTHORITY_HOST=" + server.MetadataURL}, "imds"},
		{"App Service", "managed", azure.Public(), []string{"IDENTITY_ENDPOINT=" + server.AppURL, "IDENTITY_HEADER=" + server.AppHeader}, "app"},
	} {
		t.Run(test.name, func(t *testing.T) {
			server.Forget()
			vault := server.Vault(test.cloud, strings.ReplaceAll("kv-"+test.kind+test.calls[:3], " ", "-"))
			server.Next("import", azure.Throttled(1))
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, program, "testdata/sdk.py", test.kind, vault.URL(), dir)
			cmd.Env = append([]string{"PATH=/usr/bin:/bin", "HOME=" + dir, "HTTPS_PROXY=" + server.ProxyURL, "REQUESTS_CA_BUNDLE=" + bundle, "AZURE_AUTHORITY_HOST=" + test.cloud.Authority,
				"AZURE_TENANT_ID=" + azure.Tenant, "AZURE_CLIENT_ID=" + client}, test.env...)
			out, err := cmd.CombinedOutput()
			if err != nil || !bytes.HasSuffix(out, []byte("done\n")) {
				t.Fatalf("%v:\n%s\n%s", err, out, strings.Join(server.Calls(), "\n"))
			}
			calls := server.Calls()
			for _, want := range []string{"challenge www", test.calls, "import www", "versions www"} {
				if !slices.Contains(calls, want) {
					t.Errorf("no call %q in %q", want, calls)
				}
			}
		})
	}
	t.Run("another resource in the challenge", func(t *testing.T) {
		vault := server.Vault(azure.Public(), "kv-evil")
		vault.Challenge(`Bearer authorization="https://login.microsoftonline.com/` + azure.Tenant + `", resource="https://management.azure.com"`)
		cmd := exec.CommandContext(t.Context(), program, "testdata/sdk.py", "secret", vault.URL(), dir)
		cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + dir, "HTTPS_PROXY=" + server.ProxyURL, "REQUESTS_CA_BUNDLE=" + bundle, "AZURE_AUTHORITY_HOST=login.microsoftonline.com",
			"AZURE_TENANT_ID=" + azure.Tenant, "AZURE_CLIENT_ID=" + client, "SECRET=" + secret}
		out, err := cmd.CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte("does not match the requested domain")) {
			t.Errorf("%v: %s", err, out)
		}
	})
}
