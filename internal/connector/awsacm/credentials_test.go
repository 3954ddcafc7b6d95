package awsacm

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/proxy"
	"certctl-agent/internal/testing/awsfake"
	"certctl-agent/internal/testing/netfault"
)

// bare returns a fixture without credentials.
func bare(t *testing.T) *fixture {
	t.Helper()
	f := newFixture(t)
	delete(f.env, "AWS_ACCESS_KEY_ID")
	delete(f.env, "AWS_SECRET_ACCESS_KEY")
	return f
}

// profile writes the shared configuration.
func (f *fixture) profile(text string) {
	f.t.Helper()
	f.env["AWS_CONFIG_FILE"] = f.file("config", text)
}

// setInstance lets the fixture ask the metadata service of its instance.
func (f *fixture) setInstance() {
	delete(f.env, "AWS_EC2_METADATA_DISABLED")
	f.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = f.MetadataURL + "/"
}

// TestCredentials: credentials from each place that AWS's SDKs use work for a deployment, even if
// they expire in the middle of it.
func TestCredentials(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		set   func(f *fixture)
		uses  string // a call that must be made
		fresh int    // how often it is made if the credentials expire in the middle; 0: they do not
	}{
		{"environment", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], f.env["AWS_SECRET_ACCESS_KEY"] = f.AddUser("e")
			f.env["AWS_PROFILE"] = "not asked for"
		}, "ImportCertificate", 0},
		{"profile", func(f *fixture) {
			id, key := f.AddUser("p")
			f.env["AWS_SHARED_CREDENTIALS_FILE"] = f.file("credentials", fmt.Sprintf("[other]\naws_access_key_id = x\n\n[work]\naws_access_key_id=%s\n; a comment\naws_secret_access_key = %s\n", id, key))
			f.profile("\ufeff[default]\nregion = us-east-1\n[profile work]\ns3 =\n  max_concurrent_requests = 20\naws_access_key_id = overruled\n")
			f.env["AWS_PROFILE"] = "work"
		}, "ImportCertificate", 0},
		{"default profile in HOME", func(f *fixture) {
			id, key := f.AddUser("p")
			must(f.t, os.Mkdir(f.dir+"/.aws", 0o700))
			f.file(".aws/credentials", fmt.Sprintf("[default]\naws_access_key_id=%s\naws_secret_access_key = %s\n", id, key))
		}, "ImportCertificate", 0},
		{"credential_process", func(f *fixture) {
			id, key := f.AddUser("process")
			said := f.file("said.json", fmt.Sprintf(`{"Version": 1, "AccessKeyId": %q, "SecretAccessKey": %q, "Expiration": %q}`, id, key, time.Now().Add(time.Hour).Format(time.RFC3339)))
			f.profile("[default]\ncredential_process = /bin/cat " + said + "\n")
		}, "ImportCertificate", 0},
		{"role of a profile", func(f *fixture) {
			id, key := f.AddUser("base")
			middle := f.AddRole("middle", "", f.UserARN("base"))
			role := f.AddRole("deployer", "ticket-7", middle)
			f.profile(fmt.Sprintf("[default]\nrole_arn = %s\nexternal_id = ticket-7\nsource_profile = middle\n[profile middle]\nrole_arn = %s\nsource_profile = base\n"+
				"[profile base]\naws_access_key_id = %s\naws_secret_access_key = %s\n", role, middle, id, key))
		}, "AssumeRole", 4},
		{"role of a profile that is its own source", func(f *fixture) {
			id, key := f.AddUser("base")
			role := f.AddRole("deployer", "", f.UserARN("base"))
			f.profile(fmt.Sprintf("[default]\nrole_arn = %s\nsource_profile = default\naws_access_key_id = %s\naws_secret_access_key = %s\n", role, id, key))
		}, "AssumeRole", 2},
		{"role of a profile from the instance", func(f *fixture) {
			f.SetInstance("machine")
			f.AddRole("machine", "")
			f.setInstance()
			role := f.AddRole("deployer", "", f.RoleARN("machine"))
			f.profile("[default]\nrole_arn = " + role + "\ncredential_source = Ec2InstanceMetadata\n")
		}, "AssumeRole", 2},
		{"web identity", func(f *fixture) {
			f.AllowToken("eyJ.a.b", f.AddRole("pod", ""))
			f.env["AWS_WEB_IDENTITY_TOKEN_FILE"], f.env["AWS_ROLE_ARN"] = f.file("token", "eyJ.a.b\n"), f.RoleARN("pod")
		}, "AssumeRoleWithWebIdentity", 2},
		{"web identity of a profile", func(f *fixture) {
			f.AllowToken("eyJ.a.b", f.AddRole("pod", ""))
			f.profile("[default]\nrole_arn = " + f.RoleARN("pod") + "\nweb_identity_token_file = " + f.file("token", "eyJ.a.b\n") + "\nrole_session_name = web\n")
		}, "AssumeRoleWithWebIdentity", 2},
		{"container", func(f *fixture) {
			f.SetContainer(f.AddRole("task", ""), "hunter2")
			f.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = f.MetadataURL + awsfake.ContainerPath
			f.env["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = "stale"
			f.env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = f.file("token", "hunter2\n")
		}, "metadata GET " + awsfake.ContainerPath, 2},
		{"instance", func(f *fixture) {
			f.SetInstance("machine")
			f.setInstance()
		}, "metadata GET /latest/meta-data/iam/security-credentials/machine", 2},
		{"role of the overlay", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], f.env["AWS_SECRET_ACCESS_KEY"] = f.AddUser("e")
			f.overlay(`{"role_arn": "` + f.AddRole("acm", "ticket-7", f.UserARN("e")) + `", "external_id": "ticket-7"}`)
		}, "AssumeRole", 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := bare(t)
			test.set(f)
			m := f.material()
			f.mustDeploy(m)
			if f.holds(m); !slices.Contains(f.Calls(), test.uses) {
				t.Errorf("called %q, not %s", f.Calls(), test.uses)
			}
			if test.fresh == 0 {
				return
			}
			f.OnCall(func(operation string, n int) awsfake.Fault {
				if operation == "ImportCertificate" && n == 1 {
					f.Expire()
				}
				return awsfake.None
			})
			m = f.material()
			f.mustDeploy(m)
			f.holds(m)
			if got := len(slices.DeleteFunc(f.Calls(), func(call string) bool { return call != test.uses })); got != test.fresh {
				t.Errorf("%s was called %d times, want %d", test.uses, got, test.fresh)
			}
			f.Set(func(c *awsfake.Cloud) { c.Lifetime = margin / 2 })
			f.Expire()
			f.OnCall(nil)
			f.mustDeploy(f.material())
			if got := len(slices.DeleteFunc(f.Calls(), func(call string) bool { return call != test.uses })); got <= test.fresh {
				t.Errorf("about to end: %s was called %d times", test.uses, got)
			}
		})
	}
}

// TestBadCredentials: errors explain the problem and contain no secret.
func TestBadCredentials(t *testing.T) {
	t.Parallel()
	const role = "arn:aws:iam::123456789012:role/x"
	for _, test := range []struct {
		name string
		set  func(f *fixture)
		says []string
	}{
		{"none", func(f *fixture) {}, []string{"found none", "AWS_EC2_METADATA_DISABLED", ".aws/config and ", ".aws/credentials"}},
		{"no HOME", func(f *fixture) { delete(f.env, "HOME") }, []string{"HOME is not set"}},
		{"half", func(f *fixture) { f.env["AWS_SECRET_ACCESS_KEY"] = "hunter2" }, []string{"the environment has only one of"}},
		{"unknown", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], f.env["AWS_SECRET_ACCESS_KEY"] = "AKIA1", "hunter2"
		}, []string{"UnrecognizedClientException", "AWS does not accept the credentials of the environment"}},
		{"wrong", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], _ = f.AddUser("e")
			f.env["AWS_SECRET_ACCESS_KEY"] = "hunter2"
		}, []string{"InvalidSignatureException", "the secret key of the environment is wrong", "clock"}},
		{"line break", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], f.env["AWS_SECRET_ACCESS_KEY"] = "AKIA1", "hunter2\nX-Evil: 1"
		}, []string{"a character that is not allowed"}},
		{"no such profile", func(f *fixture) { f.env["AWS_PROFILE"] = "p" }, []string{`AWS_PROFILE is "p"`}},
		{"SSO", func(f *fixture) {
			f.profile("[default]\nsso_session = corp\nsso_account_id = 1\n[sso-session corp]\nsso_region = x\n")
		},
			[]string{`the profile "default": it uses SSO`, "credential_process"}},
		{"login", func(f *fixture) { f.profile("[default]\nlogin_session = x\n") }, []string{"requires a browser"}},
		{"MFA", func(f *fixture) {
			f.profile("[default]\nrole_arn = " + role + "\nsource_profile = b\nmfa_serial = x\n")
		}, []string{"which the agent cannot enter"}},
		{"circle", func(f *fixture) {
			f.profile("[default]\nrole_arn = " + role + "\nsource_profile = b\n[profile b]\nrole_arn = " + role + "\nsource_profile = default\n")
		}, []string{"form a loop"}},
		{"no source", func(f *fixture) { f.profile("[default]\nrole_arn = " + role + "\nsource_profile = 100%d\n") }, []string{"it is not in", `"100%d"`}},
		{"empty source", func(f *fixture) {
			f.profile("[default]\nrole_arn = " + role + "\nsource_profile = b\n[profile b]\nregion = x\n")
		}, []string{`the profile "b" has no credentials`}},
		{"role alone", func(f *fixture) { f.profile("[default]\nrole_arn = " + role + "\n") }, []string{"role_arn needs source_profile"}},
		{"credential_source", func(f *fixture) { f.profile("[default]\nrole_arn = " + role + "\ncredential_source = Env\n") }, []string{"expected Environment, EcsContainer"}},
		{"not INI", func(f *fixture) { f.profile("[default]\naws_secret_access_key hunter2\n") }, []string{"config, line 2: expected key = value"}},
		{"section", func(f *fixture) { f.profile("[default\n") }, []string{"line 1: expected [profile name]"}},
		{"open to others", func(f *fixture) {
			f.profile("[default]\naws_access_key_id = x\naws_secret_access_key = hunter2\n")
			must(f.t, os.Chmod(f.env["AWS_CONFIG_FILE"], 0o644))
		}, []string{"config", "others"}},
		{"written by others", func(f *fixture) {
			f.profile("[default]\n")
			must(f.t, os.Chmod(f.env["AWS_CONFIG_FILE"], 0o666))
		}, []string{"can be written by others"}},
		{"process with a shell", func(f *fixture) { f.profile("[default]\ncredential_process = sh -c 'echo hunter2'\n") }, []string{"credential_process of"}},
		{"process that is not allowed", func(f *fixture) {
			f.Policy.Commands = [][]string{{"/bin/true"}}
			f.profile("[default]\ncredential_process = /bin/cat /etc/hostname\n")
		}, []string{"CERTCTL_ALLOWED_COMMANDS"}},
		{"process that says nonsense", func(f *fixture) {
			f.profile("[default]\ncredential_process = /bin/cat " + f.file("said", `{"Version": 2, "SecretAccessKey": "hunter2"}`) + "\n")
		},
			[]string{"did not print credentials, version 1"}},
		{"role denied", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], f.env["AWS_SECRET_ACCESS_KEY"] = f.AddUser("e")
			f.overlay(`{"role_arn": "` + f.AddRole("acm", "ticket-7", f.UserARN("e")) + `", "external_id": "ticket-8"}`)
		}, []string{"AssumeRole of arn:aws:iam::123456789012:role/acm with the credentials of the environment", "AccessDenied", "external_id"}},
		{"role with a wrong key", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], _ = f.AddUser("e")
			f.env["AWS_SECRET_ACCESS_KEY"] = "hunter2"
			f.overlay(`{"role_arn": "` + f.AddRole("acm", "", f.UserARN("e")) + `"}`)
		}, []string{"AssumeRole of", "the secret key of the environment is wrong"}},
		{"role, and the endpoint is down", func(f *fixture) {
			f.env["AWS_ACCESS_KEY_ID"], f.env["AWS_SECRET_ACCESS_KEY"] = f.AddUser("e")
			f.overlay(`{"role_arn": "` + f.AddRole("acm", "", f.UserARN("e")) + `"}`)
			f.env["AWS_CA_BUNDLE"] = f.dir + "/none.pem"
		}, []string{"with the credentials of the environment: open ", "no such file or directory"}},
		{"token refused", func(f *fixture) {
			f.env["AWS_WEB_IDENTITY_TOKEN_FILE"], f.env["AWS_ROLE_ARN"] = f.file("token", "hunter2"), role
		}, []string{"AssumeRoleWithWebIdentity of " + role, "InvalidIdentityToken"}},
		{"token without a role", func(f *fixture) { f.env["AWS_WEB_IDENTITY_TOKEN_FILE"] = f.file("token", "hunter2") }, []string{"AWS_ROLE_ARN"}},
		{"empty token", func(f *fixture) {
			f.env["AWS_WEB_IDENTITY_TOKEN_FILE"], f.env["AWS_ROLE_ARN"] = f.file("token", "\n"), role
		}, []string{"does not contain a token"}},
		{"container elsewhere", func(f *fixture) { f.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = "http://203.0.113.9/hunter2" }, []string{"expected https, or http to loopback"}},
		{"container refuses", func(f *fixture) {
			f.SetContainer(role, "hunter2")
			f.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = f.MetadataURL + awsfake.ContainerPath
		}, []string{"the role of this container", "401"}},
		{"instance without a role", func(f *fixture) { f.setInstance() }, []string{"it has no role"}},
		{"not an instance", func(f *fixture) {
			f.setInstance()
			f.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = f.MetadataURL + "/nothing"
		}, []string{"this host is not an EC2 instance with a role", "404"}},
		{"STS elsewhere", func(f *fixture) { f.env["AWS_ENDPOINT_URL_STS"] = "http://127.0.0.1" }, []string{"AWS_ENDPOINT_URL_STS"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := bare(t)
			test.set(f)
			_, err := f.deploy(f.material())
			conformance.WantError(t, err, test.says...)
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error shows a secret: %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "must trust them") != strings.Contains(err.Error(), "AccessDenied") {
				t.Errorf("the hint is wrong: %v", err)
			}
			if f.Imports() > 0 {
				t.Error("imported")
			}
		})
	}
}

// tunnel starts an HTTP proxy that connects everything to one server.
func tunnel(t *testing.T, to string) (url string, asked func() []string) {
	t.Helper()
	var mu sync.Mutex
	var hosts []string
	proxy := netfault.Tunnel(func(string) string { return to })
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		hosts = append(hosts, r.Method+" "+r.Host)
		mu.Unlock()
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return server.URL, func() []string {
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(hosts)
		return slices.Compact(slices.Clone(hosts))
	}
}

// TestRegions: ACM and STS of each partition are reached by their names through the host's proxy,
// and the metadata service directly.
func TestRegions(t *testing.T) {
	t.Parallel()
	for region, domain := range map[string]string{"eu-central-1": "amazonaws.com", "cn-north-1": "amazonaws.com.cn", "us-gov-west-1": "amazonaws.com"} {
		f := bare(t)
		f.Region = region
		through, asked := tunnel(t, strings.TrimPrefix(f.URL, "https://"))
		rules, err := proxy.Parse(through, "")
		must(t, err)
		f.Proxy = rules.For
		f.SetInstance("machine")
		f.setInstance()
		delete(f.env, "AWS_ENDPOINT_URL_STS")
		f.overlay(`{"role_arn": "` + f.AddRole("acm", "", f.RoleARN("machine")) + `"}`)
		acm := "acm." + region + "." + domain
		f.config = map[string]any{"region": region}
		rule, err := policy.ParseHostRule(acm)
		must(t, err)
		f.Policy.Hosts = []policy.HostRule{rule}
		m := f.material()
		f.mustDeploy(m)
		f.holds(m)
		if want := []string{"CONNECT " + acm + ":443", "CONNECT sts." + region + "." + domain + ":443"}; !slices.Equal(asked(), want) {
			t.Errorf("the proxy was asked for %q, want %q", asked(), want)
		}
		// Through a proxy only listed names are allowed.
		block, err := policy.ParseHostRule("0.0.0.0/0")
		must(t, err)
		f.Policy.Hosts = []policy.HostRule{block}
		_, err = f.deploy(f.material())
		conformance.WantError(t, err, "CERTCTL_ALLOWED_HOSTS", acm, "which a proxy connects to")
	}
}

func FuzzSections(f *testing.F) {
	f.Add("[profile a]\nb = c\n  d\n")
	f.Add("[]\n=\n[")
	f.Fuzz(func(t *testing.T, text string) {
		sections, err := parseSections(text)
		if err != nil && sections != nil {
			t.Error("both")
		}
		for _, values := range sections {
			for key := range values {
				if key != strings.ToLower(strings.TrimSpace(key)) {
					t.Errorf("the key %q", key)
				}
			}
		}
	})
}

func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"__type": "com.amazon#ThrottlingException", "message": "x"}`))
	f.Add([]byte(`<ErrorResponse><Error><Code>AccessDenied</Code><Message>x</Message></Error></ErrorResponse>`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if a := parseAnswer(body); a.Code == "" && message(body) != "" {
			t.Errorf("%q has no code and the message %q", body, message(body))
		}
	})
}
