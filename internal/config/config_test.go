package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

// environment is what getenv answers in a test.
type environment map[string]string

func (e environment) get(name string) string { return e[name] }

// required is an environment with the required variables.
func required() environment {
	return environment{"CERTCTL_API_KEY": "k3y", "CERTCTL_AGENT_ID": "agent-1"}
}

func with(pairs ...string) environment {
	e := required()
	for i := 0; i < len(pairs); i += 2 {
		e[pairs[i]] = pairs[i+1]
	}
	return e
}

// load loads a configuration without this machine's configuration file.
func load(t *testing.T, e environment, args ...string) (*Config, error) {
	t.Helper()
	return Load(args, e.get, Options{DefaultFile: filepath.Join(t.TempDir(), "none.env")})
}

func mustLoad(t *testing.T, e environment, args ...string) *Config {
	t.Helper()
	c, err := load(t, e, args...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// origin returns where the value of a setting comes from.
func origin(c *Config, flag string) string {
	i := slices.IndexFunc(c.Values(), func(v Value) bool { return v.Flag == flag })
	return c.Values()[i].Origin
}

// write creates a trusted file.
func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDefaults(t *testing.T) {
	c := mustLoad(t, required())
	for _, test := range []struct {
		name      string
		got, want any
	}{
		{"Server", c.Server.String(), "https://localhost:8443"},
		{"Name", c.Name, "certctl-agent"},
		{"KeyDir", c.KeyDir, "/var/lib/certctl/keys"},
		{"StateDir", c.StateDir, "/var/lib/certctl/keys/.state"},
		{"DiscoveryDirs", len(c.DiscoveryDirs), 0},
		{"Roots", c.Roots == nil, true},
		{"InsecureSkipVerify", c.InsecureSkipVerify, false},
		{"LogLevel", c.LogLevel, slog.LevelInfo},
		{"LogFormat", c.LogFormat, "json"},
		{"HeartbeatInterval", c.HeartbeatInterval, time.Minute},
		{"PollInterval", c.PollInterval, 30 * time.Second},
		{"DiscoveryInterval", c.DiscoveryInterval, 6 * time.Hour},
		{"StartupJitter", c.StartupJitter, true},
		{"MaxDeploys", c.MaxDeploys, 4},
		{"ShutdownGrace", c.ShutdownGrace, time.Minute},
		{"KeyAlgorithm", c.KeyAlgorithm, "ecdsa-p256"},
		{"TargetsDir", c.TargetsDir, "/etc/certctl/targets.d"},
		{"BackupRetention", c.BackupRetention, 3},
		{"VerifyDeployment", c.VerifyDeployment, true},
		{"DiscoveryMaxRate", c.DiscoveryMaxRate, 0},
		{"Proxy", c.Proxy.URL() == nil, true},
		{"File", c.File, ""},
	} {
		if test.got != test.want {
			t.Errorf("%s = %v, want %v", test.name, test.got, test.want)
		}
	}
	// Only the three allow-lists.
	if len(c.Warnings) != 3 || !strings.Contains(c.Warnings[0], "CERTCTL_ALLOWED_PATHS") || !strings.Contains(c.Warnings[1], "CERTCTL_ALLOWED_COMMANDS") ||
		!strings.Contains(c.Warnings[2], "CERTCTL_ALLOWED_HOSTS") {
		t.Errorf("warnings %q, want those about the three allow-lists", c.Warnings)
	}
}

func hostRule(t *testing.T, entry string) policy.HostRule {
	rule, err := policy.ParseHostRule(entry)
	must(t, err)
	return rule
}

// TestEverySetting sets each by its variable and by its flag.
func TestEverySetting(t *testing.T) {
	passwords := write(t, "passwords", "one\n two \r\n\n")
	keyFile := write(t, "key", "from-file\n")
	bundle := writeBundle(t)
	for _, test := range []struct {
		flag, value string
		got         func(c *Config) any
		want        any
	}{
		{"server", "https://cp.example.org/prefix/", func(c *Config) any { return c.Server.String() }, "https://cp.example.org/prefix"},
		{"api-key", "another", func(c *Config) any { return c.APIKey.Reveal() }, "another"},
		{"api-key-file", keyFile, func(c *Config) any { return c.APIKey.Reveal() }, "from-file"},
		{"name", "web1", func(c *Config) any { return c.Name }, "web1"},
		{"agent-id", "agent-2", func(c *Config) any { return c.AgentID }, "agent-2"},
		{"key-dir", "/k/../keys", func(c *Config) any { return c.KeyDir + " " + c.StateDir }, "/keys /keys/.state"},
		{"state-dir", "/s", func(c *Config) any { return c.StateDir }, "/s"},
		{"ca-bundle", bundle, func(c *Config) any { return c.Roots != nil && c.CABundle == bundle }, true},
		{"insecure-skip-verify", "YES", func(c *Config) any { return c.InsecureSkipVerify }, true},
		{"discovery-dirs", " /a , /b,,/a", func(c *Config) any { return c.DiscoveryDirs }, []string{"/a", "/b"}},
		{"discovery-interval", "90m", func(c *Config) any { return c.DiscoveryInterval }, 90 * time.Minute},
		{"discovery-exclude", "*.bak,/x/*", func(c *Config) any { return c.DiscoveryExclude }, []string{"*.bak", "/x/*"}},
		{"discovery-max-rate", "500", func(c *Config) any { return c.DiscoveryMaxRate }, 500},
		{"discovery-passwords-file", passwords, func(c *Config) any { return c.DiscoveryPasswords[0].Reveal() + "|" + c.DiscoveryPasswords[1].Reveal() }, "one| two "},
		{"heartbeat-interval", "100ms", func(c *Config) any { return c.HeartbeatInterval }, 100 * time.Millisecond},
		{"poll-interval", "1m30s", func(c *Config) any { return c.PollInterval }, 90 * time.Second},
		{"startup-jitter", "off", func(c *Config) any { return c.StartupJitter }, false},
		{"max-deploys", "1", func(c *Config) any { return c.MaxDeploys }, 1},
		{"shutdown-grace", "0", func(c *Config) any { return c.ShutdownGrace }, time.Duration(0)},
		{"key-algorithm", "RSA-3072", func(c *Config) any { return c.KeyAlgorithm }, "rsa-3072"},
		{"targets-dir", "/t", func(c *Config) any { return c.TargetsDir }, "/t"},
		{"allowed-paths", "/etc/nginx, /etc/haproxy/", func(c *Config) any { return c.AllowedPaths }, []string{"/etc/nginx", "/etc/haproxy"}},
		{"allowed-commands", "nginx -t; systemctl reload *", func(c *Config) any { return c.AllowedCommands },
			[][]string{{"nginx", "-t"}, {"systemctl", "reload", "*"}}},
		{"allowed-hosts", "web1.example.org:22, 10.0.0.0/8", func(c *Config) any { return c.AllowedHosts },
			[]policy.HostRule{hostRule(t, "web1.example.org:22"), hostRule(t, "10.0.0.0/8")}},
		{"allowed-hosts", "None", func(c *Config) any { return c.AllowedHosts }, []policy.HostRule{}},
		{"deploy-backup-retention", "0", func(c *Config) any { return c.BackupRetention }, 3},
		{"verify-deployment", "no", func(c *Config) any { return c.VerifyDeployment }, false},
		{"metrics-file", "/m.prom", func(c *Config) any { return c.MetricsFile }, "/m.prom"},
		{"log-level", "WARN", func(c *Config) any { return c.LogLevel }, slog.LevelWarn},
		{"log-format", "Text", func(c *Config) any { return c.LogFormat }, "text"},
	} {
		i := slices.IndexFunc(settings(new(Config)), func(s setting) bool { return s.flag == test.flag })
		if i < 0 {
			t.Errorf("there is no flag -%s", test.flag)
			continue
		}
		variable := settings(new(Config))[i].variable
		file := write(t, "agent.env", variable+"='"+test.value+"'\n")
		fromFile := environment{"CERTCTL_CONFIG": file}
		for _, name := range []string{"CERTCTL_API_KEY", "CERTCTL_AGENT_ID"} {
			if name != variable {
				fromFile[name] = required()[name]
			}
		}
		if test.flag == "api-key-file" {
			delete(fromFile, "CERTCTL_API_KEY")
		}
		for _, given := range []struct {
			how    string
			e      environment
			args   []string
			origin string
		}{
			{"variable", with(variable, test.value), nil, "environment"},
			{"flag", required(), []string{"-" + test.flag + "=" + test.value}, "flag"},
			{"file", fromFile, nil, file},
		} {
			c, err := load(t, given.e, given.args...)
			if err != nil {
				t.Errorf("%s by %s: %v", test.flag, given.how, err)
				continue
			}
			if got := test.got(c); !reflect.DeepEqual(got, test.want) {
				t.Errorf("%s=%q by %s gives %v, want %v", test.flag, test.value, given.how, got, test.want)
			}
			if got := origin(c, test.flag); got != given.origin {
				t.Errorf("origin of %s = %q, want %q", test.flag, got, given.origin)
			}
		}
	}
}

func TestPrecedence(t *testing.T) {
	file := write(t, "agent.env", "CERTCTL_AGENT_NAME=file\nCERTCTL_MAX_DEPLOYS=7\nCERTCTL_LOG_FORMAT=text\nCERTCTL_POLL_INTERVAL=\n")
	e := with("CERTCTL_CONFIG", file, "CERTCTL_AGENT_NAME", "env", "CERTCTL_MAX_DEPLOYS", "8", "CERTCTL_LOG_FORMAT", " ")
	c := mustLoad(t, e, "-name", "flag")
	got := fmt.Sprint(c.Name, " ", c.MaxDeploys, " ", c.LogFormat, " ", c.PollInterval)
	if want := "flag 8 text 30s"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	got = fmt.Sprint(origin(c, "name"), " ", origin(c, "max-deploys"), " ", origin(c, "log-format"), " ", origin(c, "poll-interval"), " ", origin(c, "config"))
	if want := "flag environment " + file + " default environment"; got != want {
		t.Errorf("origins %s, want %s", got, want)
	}
	// An empty flag overrides the environment.
	if c := mustLoad(t, with("CERTCTL_DISCOVERY_DIRS", "/a"), "-discovery-dirs="); c.DiscoveryDirs != nil {
		t.Errorf("discovery directories %q beside an empty flag", c.DiscoveryDirs)
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := load(t, environment{
		"CERTCTL_SERVER_URL":            "http://cp.example.org:8443",
		"CERTCTL_SERVER_CA_BUNDLE_PATH": "/does/not/exist.pem",
		"CERTCTL_HEARTBEAT_INTERVAL":    "60",
		"CERTCTL_STARTUP_JITTER":        "maybe",
		"CERTCTL_ALLOWED_PATHS":         "etc/nginx",
		"HTTPS_PROXY":                   "gopher://user:pa55@proxy",
	}, "-max-deploys", "0")
	problems, ok := errors.AsType[Problems](err)
	if !ok {
		t.Fatalf("error %v is not Problems", err)
	}
	want := []string{
		"-server (CERTCTL_SERVER_URL, from environment): is plain http://, and the control plane is HTTPS-only: write https://; see docs/upgrade-to-tls.md",
		"-ca-bundle (CERTCTL_SERVER_CA_BUNDLE_PATH, from environment): open /does/not/exist.pem",
		`-heartbeat-interval (CERTCTL_HEARTBEAT_INTERVAL, from environment): "60" has no unit: write 60s`,
		`-startup-jitter (CERTCTL_STARTUP_JITTER, from environment): "maybe" is neither true nor false`,
		"-max-deploys (CERTCTL_MAX_DEPLOYS, from flag): 0 is out of range",
		`-allowed-paths (CERTCTL_ALLOWED_PATHS, from environment): "etc/nginx" is not an absolute path`,
		"-api-key (CERTCTL_API_KEY): is required",
		"-agent-id (CERTCTL_AGENT_ID): is required: register an agent first, with certctl-agent register or POST /api/v1/agents",
		`HTTPS_PROXY: has scheme "gopher"`,
	}
	if len(problems) != len(want) {
		t.Errorf("%d problems, want %d", len(problems), len(want))
	}
	for _, text := range want {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("no problem says %q", text)
		}
	}
	if t.Failed() || strings.Contains(err.Error(), "pa55") {
		t.Errorf("problems:\n%v", err)
	}
}

func TestBadValues(t *testing.T) {
	empty := write(t, "empty", "\n")
	for _, test := range []struct{ flag, value, want string }{
		{"server", "", "is empty"},
		{"server", "cp.example.org:8443", "has no scheme"},
		{"server", "localhost:8443", "has no scheme"},
		{"server", "://x", "is not a valid URL"},
		{"server", "ftp://cp.example.org", `has scheme "ftp"`},
		{"server", "HTTP://cp.example.org", "HTTPS-only"},
		{"server", "https://", "has no host"},
		{"server", "https://:8443", "has no host"},
		{"server", "https://cp:99999", "has port 99999"},
		{"server", "https://user:hunter2@cp", "contains credentials"},
		{"server", "hunter2@cp", "has no scheme"},
		{"server", "https://cp/?a=b", "contains a query"},
		{"server", "https://cp/?", "contains a query"},
		{"server", "https://cp/#a", "contains a fragment"},
		{"server", "https://cp/#", "contains a fragment"},
		{"server", "https://user:hunter2%@cp", "is not a valid URL"},
		{"server", "https://cp:hunter2", "is not a valid URL"},
		{"server", "https://c p/", "is not a valid URL"},
		{"api-key", "hunter2\n hunter2", "white space"},
		{"api-key-file", "/does/not/exist", "no such file"},
		{"api-key-file", empty, "is empty"},
		{"api-key-file", filepath.Dir(empty), "is not a regular file"},
		{"agent-id", "..", "cannot be an agent id"},
		{"agent-id", "a\x1bb", "cannot be an agent id"},
		{"agent-id", "a b", "cannot be an agent id"},
		{"key-dir", "", "is empty"},
		{"key-dir", "~/keys", `"~/keys" begins with '~', which only a shell expands`},
		{"key-dir", "~", "only a shell expands"},
		{"state-dir", "$HOME/state", `begins with '$', which only a shell expands`},
		{"config", "~agent/agent.env", "only a shell expands"},
		{"api-key-file", "~/key", "only a shell expands"},
		{"ca-bundle", "${HOME}/ca.pem", "only a shell expands"},
		{"discovery-passwords-file", "~/passwords", "only a shell expands"},
		{"discovery-dirs", "/etc,~/tls", "only a shell expands"},
		{"metrics-file", "~/m.prom", "only a shell expands"},
		{"ca-bundle", empty, "contains no PEM certificate"},
		{"discovery-interval", "soon", "is not a duration"},
		{"discovery-exclude", "[", "is not a valid pattern"},
		{"discovery-max-rate", "-1", "out of range"},
		{"discovery-max-rate", "1.5", "is not a whole number"},
		{"discovery-passwords-file", "/does/not/exist", "no such file"},
		{"heartbeat-interval", "99ms", "out of range: from 100ms to 24h0m0s"},
		{"poll-interval", "", "is not a duration"},
		{"poll-interval", "0", "out of range"},
		{"poll-interval", "-5s", "out of range"},
		{"verify-deployment", "2", "neither true nor false"},
		{"verify-deployment", "", "neither true nor false"},
		{"shutdown-grace", "2h", "out of range"},
		{"key-algorithm", "rsa-1024", "is not one of ecdsa-p256, "},
		{"allowed-paths", ",", "names no directory"},
		{"allowed-commands", ";", "names no command"},
		{"allowed-commands", "*", "names no program"},
		{"allowed-commands", "nginx -t && nginx -s reload", `contains '&'`},
		{"allowed-hosts", ",", "names no host: unset it to allow any, or write none"},
		{"allowed-hosts", "web1, none", "none must be the only entry"},
		{"allowed-hosts", "https://web1", "expected a port from"},
		{"deploy-backup-retention", "-2", "out of range"},
		{"log-format", "xml", "is not one of json, text"},
	} {
		c, err := load(t, required(), "-"+test.flag+"="+test.value)
		if shown := fmt.Sprint(c.Values()); strings.Contains(shown, "hunter2") {
			t.Errorf("-%s: the settings show a secret: %s", test.flag, shown)
		}
		problems, ok := errors.AsType[Problems](err)
		if !ok || len(problems) != 1 || !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), "-"+test.flag+" (CERTCTL_") {
			t.Errorf("-%s=%s: error %v, want one problem with %q", test.flag, test.value, err, test.want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("-%s: the error quotes a secret: %v", test.flag, err)
		}
	}
}

// TestQuotesOfDocker: Docker keeps the quotes of an env file, which systemd removes.
func TestQuotesOfDocker(t *testing.T) {
	c := mustLoad(t, environment{"CERTCTL_SERVER_URL": `"https://cp.example.org"`, "CERTCTL_AGENT_ID": "'agent-1'", "CERTCTL_API_KEY": `"k3y"`,
		"CERTCTL_AGENT_NAME": `a "b"`, "CERTCTL_LOG_FORMAT": `""`, "NO_PROXY": `"a.example b.example"`, "HTTPS_PROXY": `"proxy:3128"`})
	got := fmt.Sprint(c.Server, " ", c.AgentID, " ", c.APIKey.Reveal(), " ", c.Name, " ", c.LogFormat, " ", c.Proxy.URL())
	if want := `https://cp.example.org agent-1 k3y a "b" json http://proxy:3128`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	warnings := strings.Join(c.Warnings, "\n")
	for _, name := range []string{"CERTCTL_SERVER_URL", "CERTCTL_AGENT_ID", "CERTCTL_API_KEY", "CERTCTL_LOG_FORMAT", "NO_PROXY", "HTTPS_PROXY"} {
		if strings.Count(warnings, name+" has quotes around its value in the environment") != 1 {
			t.Errorf("want one warning about the quotes of %s:\n%s", name, warnings)
		}
	}
	if strings.Contains(warnings, "k3y") || strings.Contains(warnings, "CERTCTL_AGENT_NAME") {
		t.Errorf("warnings:\n%s", warnings)
	}
}

func TestServerIsNormalised(t *testing.T) {
	for value, want := range map[string]string{
		"https://CP.Example.org:443/": "https://cp.example.org",
		"HTTPS://cp/a/b//":            "https://cp/a/b",
		"https://[::1]:443":           "https://[::1]",
		"https://[2001:DB8::1]:8443":  "https://[2001:db8::1]:8443",
		"https://cp/a%2Fb/":           "https://cp/a%2Fb",
		"https://cp:":                 "https://cp",
	} {
		c, err := load(t, required(), "-server", value)
		if err != nil {
			t.Errorf("%s: %v", value, err)
		} else if got := c.Server.String(); got != want {
			t.Errorf("server %s is read as %s, want %s", value, got, want)
		}
	}
}

func TestLegacyValuesAreForgiven(t *testing.T) {
	c := mustLoad(t, with("CERTCTL_LOG_LEVEL", "verbose", "CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY", "maybe"))
	if c.LogLevel != slog.LevelInfo || c.InsecureSkipVerify {
		t.Errorf("level %v, insecure %v, want the defaults", c.LogLevel, c.InsecureSkipVerify)
	}
	warnings := strings.Join(c.Warnings, "\n")
	for _, want := range []string{
		`-log-level (CERTCTL_LOG_LEVEL, from environment): "verbose" is not one of debug, info, warn, error: the default, info, is used`,
		`-insecure-skip-verify (CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY, from environment): "maybe" is neither true nor false: the default, false, is used`,
	} {
		if !strings.Contains(warnings, want) {
			t.Errorf("no warning says %s:\n%s", want, warnings)
		}
	}
	if got := origin(c, "log-level"); got != "default" {
		t.Errorf("origin of the log level = %q, want default", got)
	}
}

func TestWarnings(t *testing.T) {
	for _, test := range []struct {
		name string
		e    environment
		args []string
		want string
	}{
		{"key on the command line", required(), []string{"-api-key", "x"}, "process list"},
		{"insecure", with("CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY", "1"), nil, "insecure-skip-verify is on"},
		{"insecure by a bare flag", required(), []string{"-insecure-skip-verify"}, "insecure-skip-verify is on"},
		{"metrics file", with("CERTCTL_METRICS_FILE", "/m.txt"), nil, ".prom"},
		{"rare heartbeats", with("CERTCTL_HEARTBEAT_INTERVAL", "10m"), nil, "five minutes"},
		{"key beside a key file", with("CERTCTL_API_KEY_FILE", write(t, "key", "x")), nil, "CERTCTL_API_KEY is not used"},
		{"key stronger than a key file", with("CERTCTL_API_KEY_FILE", write(t, "key", "x")), []string{"-api-key", "y"}, "CERTCTL_API_KEY_FILE is not used"},
		{"unknown keys", with("CERTCTL_CONFIG", write(t, "e", "CERTCTL_SERVER=x\nTZ=UTC\nHTTPS_PROXY=p\nTZ=x\n")), nil,
			"has unknown keys: CERTCTL_SERVER, TZ"},
	} {
		c, err := load(t, test.e, test.args...)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
		} else if !strings.Contains(strings.Join(c.Warnings, "\n"), test.want) {
			t.Errorf("%s: warnings %q, want one with %q", test.name, c.Warnings, test.want)
		}
	}
}

func TestKeyAndKeyFile(t *testing.T) {
	file := write(t, "key", "from-file\n")
	weak := write(t, "agent.env", "CERTCTL_API_KEY_FILE="+file+"\n")
	for _, test := range []struct {
		name string
		e    environment
		args []string
		want string
	}{
		{"same source: the file", with("CERTCTL_API_KEY_FILE", file), nil, "from-file"},
		{"a flag beats it", with("CERTCTL_API_KEY_FILE", file), []string{"-api-key", "direct"}, "direct"},
		{"the environment beats the file's", with("CERTCTL_CONFIG", weak), nil, "k3y"},
		{"the file's flag beats the environment", required(), []string{"-api-key-file", file}, "from-file"},
	} {
		if got := mustLoad(t, test.e, test.args...).APIKey.Reveal(); got != test.want {
			t.Errorf("%s: key %q, want %q", test.name, got, test.want)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{{"-no-such-flag"}, {"-server"}, {"run"}, {"-insecure-skip-verify", "true"}} {
		_, err := load(t, required(), args...)
		if _, ok := errors.AsType[*UsageError](err); !ok {
			t.Errorf("%q: error %v is not a UsageError", args, err)
		}
	}
	for _, args := range [][]string{{"-h"}, {"--help"}} {
		if _, err := load(t, environment{}, args...); !errors.Is(err, flag.ErrHelp) {
			t.Errorf("%q: error %v, want flag.ErrHelp", args, err)
		}
	}
}

func TestOptions(t *testing.T) {
	var jsonOutput bool
	c, err := Load([]string{"-json", "-state-dir", "/s", "a", "b"}, environment{"CERTCTL_POLL_INTERVAL": "x"}.get, Options{
		DefaultFile: "/none.env",
		Flags:       func(f *flag.FlagSet) { f.BoolVar(&jsonOutput, "json", false, "") },
		Args:        true,
		Ignore:      func(setting string) bool { return setting != "state-dir" },
	})
	if err != nil {
		t.Fatal(err)
	}
	if !jsonOutput || c.StateDir != "/s" || !slices.Equal(c.Args, []string{"a", "b"}) {
		t.Errorf("json %v, state directory %s, arguments %q", jsonOutput, c.StateDir, c.Args)
	}
}

func TestConfigFile(t *testing.T) {
	good := write(t, "agent.env", "CERTCTL_API_KEY=k\nCERTCTL_AGENT_ID=a\n")
	chmod := func(mode fs.FileMode) string {
		path := write(t, "agent.env", "CERTCTL_API_KEY=k\nCERTCTL_AGENT_ID=a\n")
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, test := range []struct {
		name, path, def    string
		wantErr, wantWarns string
	}{
		{"named", good, "", "", ""},
		{"the default one", "", good, "", ""},
		{"named and missing", good + ".none", "", "no such file", ""},
		{"writable by the group", chmod(0o660), "", "can be written by others (mode 0660): chmod go-w", ""},
		{"the default one, writable by all", "", chmod(0o602), "can be written by others (mode 0602)", ""},
		{"readable by all", chmod(0o644), "", "", "can be read by others (mode 0644)"},
		{"readable by the agent's group", chmod(0o640), "", "", ""},
		{"a directory", filepath.Dir(good), "", "is not a regular file", ""},
		{"bad syntax", write(t, "bad.env", "\nA=\"\n"), "", "line 2 opens a quote", ""},
		{"odd syntax", write(t, "odd.env", "CERTCTL_API_KEY=k\nCERTCTL_AGENT_ID=a\nA-B=c\n"), "", "", `line 3 is ignored: "A-B"`},
		{"too long", write(t, "long.env", strings.Repeat("#", maxEnvFile+1)), "", "is longer than", ""},
	} {
		e := environment{}
		if test.path != "" {
			e["CERTCTL_CONFIG"] = test.path
		}
		if test.def == "" {
			test.def = "/none.env"
		}
		c, err := Load(nil, e.get, Options{DefaultFile: test.def})
		switch {
		case test.wantErr != "":
			if err == nil || !strings.Contains(err.Error(), test.wantErr) || !strings.Contains(err.Error(), "-config (CERTCTL_CONFIG") {
				t.Errorf("%s: error %v, want one with %q", test.name, err, test.wantErr)
			}
		case err != nil:
			t.Errorf("%s: %v", test.name, err)
		case c.APIKey.Reveal() != "k" || c.File == "":
			t.Errorf("%s: the file was not read", test.name)
		case strings.Contains(strings.Join(c.Warnings, "\n"), "can be read by others") != strings.Contains(test.wantWarns, "can be read by others"),
			!strings.Contains(strings.Join(c.Warnings, "\n"), test.wantWarns):
			t.Errorf("%s: warnings %q, want %q", test.name, c.Warnings, test.wantWarns)
		}
	}
}

// TestUnreadableDefaultFile: if the agent must not read the default file, systemd may have read it
// into the environment. An unreadable named file is an error.
func TestUnreadableDefaultFile(t *testing.T) {
	if !needs.Unprivileged(t) {
		return
	}
	path := write(t, "agent.env", "CERTCTL_AGENT_NAME=x\n")
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	c, err := Load(nil, required().get, Options{DefaultFile: path})
	if err != nil || !strings.Contains(strings.Join(c.Warnings, "\n"), "is not readable for this user") {
		t.Errorf("default file: %v, warnings %q", err, c.Warnings)
	}
	if _, err := Load(nil, with("CERTCTL_CONFIG", path).get, Options{}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("named file: %v, want permission denied", err)
	}
}

func TestReload(t *testing.T) {
	bundle := writeBundle(t)
	path := write(t, "agent.env", "CERTCTL_API_KEY=one\nCERTCTL_AGENT_ID=a\n")
	c := mustLoad(t, environment{"CERTCTL_CONFIG": path}, "-name", "n")
	if err := SetInFile(path, "CERTCTL_API_KEY", "two"); err != nil {
		t.Fatal(err)
	}
	if err := SetInFile(path, "CERTCTL_SERVER_CA_BUNDLE_PATH", bundle); err != nil {
		t.Fatal(err)
	}
	fresh, err := c.Reload()
	if err != nil {
		t.Fatal(err)
	}
	if fresh.APIKey.Reveal() != "two" || fresh.Roots == nil || fresh.Name != "n" || c.APIKey.Reveal() != "one" {
		t.Errorf("reloaded %v from %v", fresh, c)
	}
	if got, want := c.Changed(fresh), []string{"CERTCTL_SERVER_CA_BUNDLE_PATH"}; !slices.Equal(got, want) {
		t.Errorf("changed settings %q, want %q", got, want)
	}
	if err := os.WriteFile(bundle, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if broken, err := fresh.Reload(); err == nil || broken != nil {
		t.Errorf("reload with an empty CA bundle: %v, %v", broken, err)
	}
}

func TestProxyFromFile(t *testing.T) {
	file := write(t, "agent.env", "https_proxy=http://u:pa55@file:3128\nNO_PROXY=direct.example\n")
	c := mustLoad(t, with("CERTCTL_CONFIG", file))
	if got := c.Proxy.URL().Host; got != "file:3128" {
		t.Errorf("proxy %s, want the file's", got)
	}
	if got := fmt.Sprint(c.Values()); strings.Contains(got, "pa55") || !strings.Contains(got, "http://u:xxxxx@file:3128") {
		t.Errorf("values %s", got)
	}
	c = mustLoad(t, with("CERTCTL_CONFIG", file, "HTTPS_PROXY", "env:1"))
	if got := c.Proxy.URL().Host; got != "env:1" {
		t.Errorf("proxy %s, want the environment's", got)
	}
}

func TestInstanceStateDir(t *testing.T) {
	dirs := make(map[string]bool)
	for _, args := range [][]string{
		{}, {"-agent-id", "agent-2"}, {"-server", "https://other"},
		{"-server", "https://localhost:8443/"}, {"-server", "https://LOCALHOST:8443"}, // the default
	} {
		dirs[mustLoad(t, with("CERTCTL_STATE_DIR", "/s"), args...).InstanceStateDir()] = true
	}
	if len(dirs) != 3 {
		t.Errorf("directories %v, want 3", dirs)
	}
	for dir := range dirs {
		if filepath.Dir(dir) != "/s" || len(filepath.Base(dir)) != 16 {
			t.Errorf("directory %s, want 16 digits below /s", dir)
		}
	}
}

func TestSecretsAreNeverPrinted(t *testing.T) {
	const key = "hunter2-hunter2"
	file := write(t, "agent.env", "CERTCTL_API_KEY="+key+"\nHTTPS_PROXY=http://u:"+key+"@p\nCERTCTL_AGENT_ID=a\n")
	passwords := write(t, "passwords", key+"\n")
	var out bytes.Buffer
	for _, c := range []*Config{
		mustLoad(t, environment{"CERTCTL_CONFIG": file, "CERTCTL_DISCOVERY_PASSWORDS_FILE": passwords}),
		mustLoad(t, with("CERTCTL_API_KEY", key)),
		mustLoad(t, required(), "-api-key", key),
		mustLoad(t, required(), "-api-key-file", write(t, "key", key)),
	} {
		holder := struct{ c *Config }{c}
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
			fmt.Fprintf(&out, verb+verb+verb+"\n", c, *c, holder)
		}
		for _, v := range c.Values() {
			fmt.Fprintf(&out, "%+v\n", v)
		}
		for _, handler := range []slog.Handler{slog.NewJSONHandler(&out, nil), slog.NewTextHandler(&out, nil)} {
			slog.New(handler).Info("test", "config", c, "value", *c)
		}
		if err := json.NewEncoder(&out).Encode(c.Values()); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&out, c.Warnings)
	}
	Usage(&out)
	if strings.Contains(out.String(), "hunter2") {
		t.Errorf("a secret was printed:\n%s", out.String())
	}
	if got := strings.Count(out.String(), "[redacted]"); got < 10 {
		t.Errorf("placeholder appears %d times, want at least 10", got)
	}
}
