package awsfake_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/awsfake"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// cli runs the AWS CLI against a fake.
type cli struct {
	t       *testing.T
	cloud   *awsfake.Cloud
	program string
	dir     string
	env     []string // environment with its credentials
}

func (c *cli) run(args ...string) (string, error) {
	command := exec.CommandContext(c.t.Context(), c.program, append([]string{"--endpoint-url", c.cloud.URL, "--output", "json"}, args...)...)
	command.Dir = c.dir
	command.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + c.dir, "AWS_CA_BUNDLE=" + filepath.Join(c.dir, "ca.pem"), "AWS_REGION=" + c.cloud.Region, "AWS_DEFAULT_REGION=" + c.cloud.Region,
		"AWS_PAGER=", "AWS_MAX_ATTEMPTS=3", "AWS_RETRY_MODE=standard", "PYTHONWARNINGS=ignore",
	}, c.env...)
	var stderr strings.Builder
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		err = fmt.Errorf("aws %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return string(out), err
}

func (c *cli) must(args ...string) map[string]any {
	c.t.Helper()
	out, err := c.run(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	var decoded map[string]any
	if out != "" {
		if err := json.Unmarshal([]byte(out), &decoded); err != nil {
			c.t.Fatalf("aws %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	return decoded
}

func (c *cli) write(name string, data []byte) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, name), data, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// pair writes the files of a certificate with a prefix.
func (c *cli) pair(prefix string, issued *testca.Issued) {
	c.t.Helper()
	c.write(prefix+".pem", issued.LeafPEM())
	c.write(prefix+".key", issued.KeyPEM())
	c.write(prefix+"-chain.pem", pemutil.EncodeCertificates(issued.Chain[1:]...))
}

func newCLI(t *testing.T, region string) *cli {
	t.Helper()
	cloud := awsfake.Start(t)
	cloud.Region = region
	c := &cli{t: t, cloud: cloud, program: needs.Need(t, "aws"), dir: t.TempDir()}
	c.write("ca.pem", cloud.CA.PEM())
	return c
}

func (c *cli) issue() *testca.Issued {
	c.t.Helper()
	issued, err := c.cloud.CA.Issue(testca.Template{Names: []string{"www.example.org"}, Intermediates: 1})
	if err != nil {
		c.t.Fatal(err)
	}
	return issued
}

func (c *cli) keysOf(user string) {
	id, secret := c.cloud.AddUser(user)
	c.env = []string{"AWS_ACCESS_KEY_ID=" + id, "AWS_SECRET_ACCESS_KEY=" + secret}
}

// TestCLI imports, re-imports, describes, gets, lists in pages, tags and deletes certificates with
// the AWS CLI.
func TestCLI(t *testing.T) {
	c := newCLI(t, "eu-central-1")
	c.keysOf("admin")
	first, second := c.issue(), c.issue()
	c.pair("first", first)
	c.pair("second", second)
	files := func(prefix string) []string {
		return []string{"acm", "import-certificate", "--certificate", "fileb://" + prefix + ".pem", "--private-key", "fileb://" + prefix + ".key",
			"--certificate-chain", "fileb://" + prefix + "-chain.pem"}
	}
	arn, _ := c.must(append(files("first"), "--tags", "Key=team,Value=web")...)["CertificateArn"].(string)
	if !strings.HasPrefix(arn, "arn:aws:acm:eu-central-1:"+awsfake.Account+":certificate/") {
		t.Fatalf("arn %q", arn)
	}
	if got := c.must("acm", "get-certificate", "--certificate-arn", arn)["Certificate"]; got != string(first.LeafPEM()) {
		t.Errorf("got %v", got)
	}
	if _, err := c.run(append(files("second"), "--certificate-arn", arn, "--tags", "Key=team,Value=db")...); err == nil || !strings.Contains(err.Error(), "Tagging is not permitted on re-import") {
		t.Errorf("tags on a re-import: %v", err)
	}
	c.cloud.OnCall(func(operation string, n int) awsfake.Fault { // the CLI retries
		return map[int]awsfake.Fault{1: awsfake.Throttled, 2: awsfake.Broken}[n]
	})
	if got := c.must(append(files("second"), "--certificate-arn", arn)...)["CertificateArn"]; got != arn {
		t.Errorf("re-import: got %v", got)
	}
	c.cloud.OnCall(nil)
	detail, _ := c.must("acm", "describe-certificate", "--certificate-arn", arn)["Certificate"].(map[string]any)
	if detail["Type"] != "IMPORTED" || detail["KeyAlgorithm"] != "EC_prime256v1" || detail["DomainName"] != "www.example.org" {
		t.Errorf("described as %v", detail)
	}
	c.must("acm", "add-tags-to-certificate", "--certificate-arn", arn, "--tags", "Key=stage,Value=live", "Key=team,Value=db")
	tags, _ := json.Marshal(c.must("acm", "list-tags-for-certificate", "--certificate-arn", arn)["Tags"])
	if got := string(tags); got != `[{"Key":"stage","Value":"live"},{"Key":"team","Value":"db"}]` {
		t.Errorf("tags %s", got)
	}
	for range 2 {
		c.must(files("first")...)
	}
	list := c.must("acm", "list-certificates", "--includes", "keyTypes=EC_prime256v1,RSA_2048")["CertificateSummaryList"]
	if got, _ := list.([]any); len(got) != 3 || c.cloud.Imports() != 3 {
		t.Errorf("%d in the list, %d imports", len(got), c.cloud.Imports())
	}
	if list, _ := c.must("acm", "list-certificates")["CertificateSummaryList"].([]any); len(list) > 0 {
		t.Errorf("the default list has %d certificates with another key type", len(list))
	}
	c.cloud.Set(func(cloud *awsfake.Cloud) { cloud.Quota = 3 })
	if _, err := c.run(files("second")...); err == nil || !strings.Contains(err.Error(), "LimitExceededException") {
		t.Errorf("over the quota: %v", err)
	}
	c.must("acm", "delete-certificate", "--certificate-arn", arn)
	if _, err := c.run("acm", "get-certificate", "--certificate-arn", arn); err == nil || !strings.Contains(err.Error(), "ResourceNotFoundException") {
		t.Errorf("after the deletion: %v", err)
	}
	c.env[1] = "AWS_SECRET_ACCESS_KEY=wrong"
	if _, err := c.run("acm", "list-certificates"); err == nil || !strings.Contains(err.Error(), "InvalidSignatureException") {
		t.Errorf("a wrong key: %v", err)
	}
}

// TestCLICredentials checks each source of the CLI's credentials in each partition.
func TestCLICredentials(t *testing.T) {
	for _, test := range []struct {
		name, region string
		set          func(c *cli)
		called       string
	}{
		{"assumed role", "cn-north-1", func(c *cli) {
			c.keysOf("agent")
			c.cloud.AddRole("deployer", "ticket-7", c.cloud.UserARN("agent"))
			c.assume("assume-role", "deployer", "--external-id", "ticket-7")
		}, "AssumeRole"},
		{"web identity", "us-gov-west-1", func(c *cli) {
			c.cloud.AllowToken("eyJ.a.b", c.cloud.AddRole("pod", ""))
			c.assume("assume-role-with-web-identity", "pod", "--web-identity-token", "eyJ.a.b")
		}, "AssumeRoleWithWebIdentity"},
		{"credential_process", "eu-central-1", func(c *cli) {
			id, secret := c.cloud.AddUser("agent")
			c.write("said.json", fmt.Appendf(nil, `{"Version": 1, "AccessKeyId": %q, "SecretAccessKey": %q}`, id, secret))
			c.write("config", []byte("[default]\ncredential_process = cat "+filepath.Join(c.dir, "said.json")+"\n"))
			c.env = []string{"AWS_CONFIG_FILE=" + filepath.Join(c.dir, "config")}
		}, ""},
		{"container", "eu-central-1", func(c *cli) {
			c.cloud.SetContainer(c.cloud.AddRole("task", ""), "Bearer hunter2")
			c.env = []string{"AWS_CONTAINER_CREDENTIALS_FULL_URI=" + c.cloud.MetadataURL + awsfake.ContainerPath, "AWS_CONTAINER_AUTHORIZATION_TOKEN=Bearer hunter2"}
		}, "metadata GET " + awsfake.ContainerPath},
		{"instance", "eu-central-1", func(c *cli) {
			c.cloud.SetInstance("machine")
			c.env = []string{"AWS_EC2_METADATA_SERVICE_ENDPOINT=" + c.cloud.MetadataURL + "/"}
		}, "metadata PUT /latest/api/token"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newCLI(t, test.region)
			test.set(c)
			c.pair("one", c.issue())
			c.must("acm", "import-certificate", "--certificate", "fileb://one.pem", "--private-key", "fileb://one.key", "--certificate-chain", "fileb://one-chain.pem")
			if got := c.cloud.Certificates(); len(got) != 1 || !strings.Contains(got[0].ARN, test.region) {
				t.Errorf("got %v", got)
			}
			if test.called != "" && !strings.Contains(strings.Join(c.cloud.Calls(), "\n"), test.called) {
				t.Errorf("called %q, not %q", c.cloud.Calls(), test.called)
			}
			if c.cloud.Expire(); strings.HasPrefix(test.called, "AssumeRole") {
				if _, err := c.run("acm", "list-certificates"); err == nil || !strings.Contains(err.Error(), "ExpiredToken") {
					t.Errorf("expired: %v", err)
				}
			}
		})
	}
}

// assume assumes a role with the CLI and uses the returned credentials. A profile with role_arn
// would do, but --endpoint-url then applies to ACM, and older versions have no other way to set it
// for STS.
func (c *cli) assume(command, role string, how ...string) {
	c.t.Helper()
	args := []string{"sts", command, "--role-arn", c.cloud.RoleARN(role), "--role-session-name", "certctl"}
	if _, err := c.run(append(args, how[0], "another")...); err == nil {
		c.t.Errorf("the role can be assumed with another %s", how[0])
	}
	issued, _ := c.must(append(args, how...)...)["Credentials"].(map[string]any)
	c.env = []string{
		fmt.Sprint("AWS_ACCESS_KEY_ID=", issued["AccessKeyId"]), fmt.Sprint("AWS_SECRET_ACCESS_KEY=", issued["SecretAccessKey"]),
		fmt.Sprint("AWS_SESSION_TOKEN=", issued["SessionToken"]),
	}
}
