// Package config builds a Config from flags, environment and configuration file. Only this package
// knows the names of variables. It checks everything before the agent sends anything.
package config

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/proxy"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/trustedfile"
)

// defaultFile is the configuration file if none is named.
const defaultFile = "/etc/certctl/agent.env"

// defaultBackupRetention is how many sets of replaced files a target keeps.
const defaultBackupRetention = 3

// Config has all settings; the table in settings.go describes them. It is immutable: Reload returns
// a new one. It is safe to print, since its secrets redact themselves. All paths are absolute.
type Config struct {
	// Server is the control plane's base URL: https, a lower-case host, no trailing slash, no
	// default port.
	Server *url.URL

	// APIKey is the key at the time of loading. The daemon uses KeyFunc instead, which notices when
	// the key file changes.
	APIKey     secret.String
	APIKeyFile string // "" if the key was given directly

	Name    string // for people; only sent at registration
	AgentID string

	KeyDir string

	// StateDir holds state that must survive a restart. Only one process may use it at a time. The
	// state of one agent id and server is in InstanceStateDir.
	StateDir string

	CABundle           string         // the file of Roots, or ""
	Roots              *x509.CertPool // for the control plane's certificate; nil means the system's
	InsecureSkipVerify bool

	// Proxy chooses the proxy for requests to the control plane, from HTTPS_PROXY and NO_PROXY in
	// the environment or the configuration file.
	Proxy *proxy.Rules

	DiscoveryDirs      []string // empty means that discovery is off
	DiscoveryExclude   []string // path patterns
	DiscoveryMaxRate   int      // files a second; 0 means no limit
	DiscoveryPasswords []secret.String

	// The control plane considers an agent dead after five minutes without a heartbeat.
	HeartbeatInterval time.Duration
	PollInterval      time.Duration
	DiscoveryInterval time.Duration
	StartupJitter     bool // delay the first heartbeat, poll and scan

	MaxDeploys    int           // parallel deployments; at least 1
	ShutdownGrace time.Duration // for running deployments when the agent stops
	KeyAlgorithm  string        // such as "ecdsa-p256"

	// TargetsDir holds the overlays. It need not exist unless the operator named it.
	TargetsDir      string
	TargetsDirNamed bool

	// AllowedPaths are the directories below which deployments may write; nil means anywhere that
	// is not protected.
	AllowedPaths []string

	// AllowedCommands are the command lines that deployments may run, each split into words; a last
	// word "*" allows any further words. Nil means any.
	AllowedCommands [][]string

	// AllowedHosts are the other hosts to which deployments may send private keys. Nil means any;
	// empty, none.
	AllowedHosts []policy.HostRule

	BackupRetention  int // backup sets per target; -1 means none after a success. Never 0
	VerifyDeployment bool

	// SSHAcceptNewHostKeys accepts and remembers unknown host keys of servers.
	SSHAcceptNewHostKeys bool
	MetricsFile          string // "" for none

	LogLevel  slog.Level
	LogFormat string // "json" or "text"

	File string   // the configuration file that was read, or ""
	Args []string // the arguments after the flags, for commands that take some

	// Warnings about the configuration, in sentences, to be logged at start and after each reload.
	Warnings []string

	values []Value
	getenv func(string) string // nil if Load did not create this Config
	reload func() (*Config, error)
}

// Getenv reads the environment of the process, for variables that are not settings: Kubernetes
// tells a pod where its API server is.
func (c *Config) Getenv(name string) string {
	if c.getenv == nil {
		return ""
	}
	return c.getenv(name)
}

// Options adapt Load to a command. The zero value is the daemon's.
type Options struct {
	// Flags adds the command's own flags. They replace settings' flags of the same name.
	Flags func(*flag.FlagSet)

	// Args allows arguments after the flags.
	Args bool

	// Ignore reports whether the command ignores problems with a setting, by the flag's name. A
	// command that only needs the state directory must run without an API key.
	Ignore func(setting string) bool

	// DefaultFile is read if it exists and no other file is named. "" means /etc/certctl/agent.env.
	DefaultFile string
}

// UsageError means that the command line is wrong, not a value in it: exit code 2.
type UsageError struct{ reason string }

// NewUsageError returns a UsageError, for commands that check their own flags and arguments.
func NewUsageError(format string, args ...any) error {
	return &UsageError{fmt.Sprintf(format, args...)}
}

func (e *UsageError) Error() string { return e.reason }

// Problems are all problems with a configuration.
type Problems []error

// Error returns one line per problem.
func (p Problems) Error() string { return errors.Join(p...).Error() }

func (p Problems) Unwrap() []error { return p }

// Load reads the configuration. Flags take precedence over the environment, the configuration file
// and the defaults, in this order. An empty variable counts as unset.
//
// The error is flag.ErrHelp if the flags ask for help (see Usage), a *UsageError, or Problems. With
// Problems, Load also returns the settings that it could read, to show them to the operator.
func Load(args []string, getenv func(string) string, options Options) (*Config, error) {
	config := &Config{getenv: getenv}
	l := loader{
		config:   config,
		settings: settings(config),
		getenv:   getenv,
		ignore:   options.Ignore,
		set:      make(map[string]string),
		sources:  make(map[string]source),
	}
	flags := newFlagSet(l.settings, l.set, options)
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, NewUsageError("%v", err)
	}
	if flags.NArg() > 0 && !options.Args {
		return nil, NewUsageError("unexpected argument %q", flags.Arg(0))
	}
	config.Args = flags.Args()
	l.readFile(cmp.Or(options.DefaultFile, defaultFile))
	for _, s := range l.settings {
		l.apply(s)
	}
	l.finish()
	config.reload = func() (*Config, error) { return Load(args, getenv, options) }
	if len(l.problems) > 0 {
		return config, l.problems
	}
	return config, nil
}

// Reload loads the configuration again from the same flags and environment. It reads the
// configuration file, API key file and CA bundle again.
func (c *Config) Reload() (*Config, error) {
	fresh, err := c.reload()
	if err != nil {
		return nil, err
	}
	return fresh, nil
}

// InstanceStateDir returns the part of the state directory for this agent id and server: another
// control plane does not know the jobs of this one.
func (c *Config) InstanceStateDir() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%v", c.AgentID, c.Server))
	return filepath.Join(c.StateDir, fmt.Sprintf("%x", sum[:8]))
}

// newFlagSet returns flags that store their values in set without parsing them, so that the
// problems of all sources are reported together.
func newFlagSet(settings []setting, set map[string]string, options Options) *flag.FlagSet {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // the caller prints errors
	if options.Flags != nil {
		options.Flags(flags)
	}
	for _, s := range settings {
		if flags.Lookup(s.flag) != nil {
			continue
		}
		keep := func(value string) error { set[s.flag] = value; return nil }
		if _, ok := s.field.(boolean); ok {
			flags.BoolFunc(s.flag, s.doc, keep)
		} else {
			flags.Func(s.flag, s.doc, keep)
		}
	}
	return flags
}

// source says where a value comes from. Lower ones take precedence.
type source int

const (
	fromFlag source = iota
	fromEnvironment
	fromFile
	fromDefault
)

type loader struct {
	config   *Config
	settings []setting // of config
	getenv   func(string) string
	ignore   func(string) bool
	set      map[string]string // values on the command line, by flag
	file     *envFile
	sources  map[string]source // by flag
	problems Problems
}

func (l *loader) lookup(flag, variable, fallback string) (string, source) {
	if value, ok := l.set[flag]; ok {
		return strings.TrimSpace(value), fromFlag
	}
	if value := l.environment(variable); value != "" {
		return value, fromEnvironment
	}
	if l.file != nil {
		if value := strings.TrimSpace(l.file.get(variable)); value != "" {
			return value, fromFile
		}
	}
	return fallback, fromDefault
}

// environment looks a variable up. It removes quotes around the value, since Docker keeps those of
// an env file, and no valid value has them.
func (l *loader) environment(variable string) string {
	value := strings.TrimSpace(l.getenv(variable))
	if len(value) < 2 || value[0] != '"' && value[0] != '\'' || value[len(value)-1] != value[0] {
		return value
	}
	warning := variable + " has quotes around its value in the environment, which were removed: Docker keeps the quotes of an env file, so write the value without"
	if !slices.Contains(l.config.Warnings, warning) {
		l.config.warn(warning)
	}
	return strings.TrimSpace(value[1 : len(value)-1])
}

func (l *loader) describe(from source) string {
	return [...]string{fromFlag: "flag", fromEnvironment: "environment", fromFile: l.config.File, fromDefault: "default"}[from]
}

func (l *loader) setting(flag string) setting {
	return l.settings[slices.IndexFunc(l.settings, func(s setting) bool { return s.flag == flag })]
}

func (l *loader) problem(s setting, err error) {
	if l.ignore == nil || !l.ignore(s.flag) {
		l.problems = append(l.problems, l.explain(s, err))
	}
}

// explain adds the setting's names and source to an error.
func (l *loader) explain(s setting, err error) error {
	from, known := l.sources[s.flag]
	switch {
	case s.flag == "":
		return fmt.Errorf("%s: %w", s.variable, err)
	case known && from != fromDefault:
		return fmt.Errorf("-%s (%s, from %s): %w", s.flag, s.variable, l.describe(from), err)
	}
	return fmt.Errorf("-%s (%s): %w", s.flag, s.variable, err)
}

// readFile reads the named configuration file, which must exist, or the default one.
func (l *loader) readFile(fallback string) {
	s := l.setting("config")
	path, from := l.lookup(s.flag, s.variable, fallback)
	l.sources[s.flag] = from
	if path == "" {
		return
	}
	path, err := parsePath(path)
	if err != nil {
		l.problem(s, err)
		return
	}
	data, _, warning, err := trustedfile.Read(path, maxEnvFile)
	switch {
	case err == nil:
	case from == fromDefault && errors.Is(err, fs.ErrNotExist):
		return
	case from == fromDefault && errors.Is(err, fs.ErrPermission):
		// A service manager may have read it into the environment.
		l.config.warn(fmt.Sprintf("%s is not readable for this user: only flags and environment are used", path))
		return
	default:
		l.problem(s, err)
		return
	}
	l.config.warn(warning)
	if l.file, err = parseEnvFile(data); err != nil {
		l.problem(s, fmt.Errorf("%s: %w", path, err))
		return
	}
	l.config.File = path
	for _, warning := range l.file.warnings {
		l.config.warn(path + ": " + warning)
	}
	l.warnUnknown()
}

// warnUnknown warns about keys of the file that the agent does not know: most are typing errors.
func (l *loader) warnUnknown() {
	known := slices.Clone(proxyVariables)
	for _, s := range l.settings[1:] {
		known = append(known, s.variable)
	}
	var unknown []string
	for _, a := range l.file.assignments {
		if !slices.Contains(known, a.key) && !slices.Contains(unknown, a.key) {
			unknown = append(unknown, a.key)
		}
	}
	if len(unknown) > 0 {
		l.config.warn(fmt.Sprintf("%s has unknown keys: %s", l.config.File, strings.Join(unknown, ", ")))
	}
}

// apply looks up, parses and records the value of one setting.
func (l *loader) apply(s setting) {
	value, from := l.lookup(s.flag, s.variable, s.value)
	l.sources[s.flag] = from
	hidden := s.secret
	if s.field != nil && (value != "" || from == fromFlag) {
		err := s.field.set(value)
		if err != nil && s.lenient {
			l.config.warn(fmt.Sprintf("%v: the default, %s, is used", l.explain(s, err), s.value))
			value, from, err = s.value, fromDefault, s.field.set(s.value)
		}
		if err != nil {
			l.problem(s, err)
			hidden = hidden || s.flag == "server" // it may contain a password
		}
	}
	if s.flag == "config" {
		value = l.config.File
	}
	if hidden && value != "" {
		value = secret.New(value).String()
	}
	l.config.values = append(l.config.values, Value{Flag: s.flag, Variable: s.variable, Text: value, Origin: l.describe(from)})
}

// proxyVariables are the variables that curl and most other programs use too.
var proxyVariables = []string{"HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"}

// lookupProxy looks up a variable that has two spellings and no flag. Within one source the first
// spelling wins.
func (l *loader) lookupProxy(upper, lower string) Value {
	text, from := l.lookup("", upper, "")
	name := upper
	if other, otherFrom := l.lookup("", lower, ""); otherFrom < from {
		text, from, name = other, otherFrom, lower
	}
	return Value{Variable: name, Text: text, Origin: l.describe(from)}
}

// finish checks everything that depends on several settings.
func (l *loader) finish() {
	c := l.config
	l.finishKey()
	if c.AgentID == "" {
		l.problem(l.setting("agent-id"), errors.New("is required: register an agent first, with certctl-agent register or POST /api/v1/agents"))
	}
	if c.StateDir == "" && c.KeyDir != "" {
		c.StateDir = filepath.Join(c.KeyDir, ".state")
		c.values[slices.IndexFunc(c.values, func(v Value) bool { return v.Flag == "state-dir" })].Text = c.StateDir
	}
	c.BackupRetention = cmp.Or(c.BackupRetention, defaultBackupRetention)
	c.TargetsDirNamed = l.sources["targets-dir"] != fromDefault
	l.finishProxy()
	if c.InsecureSkipVerify {
		c.warn("insecure-skip-verify is on: the control plane's certificate is not checked, so a man in the middle gets the API key")
	}
	if c.AllowedPaths == nil {
		c.warn("CERTCTL_ALLOWED_PATHS is not set: an attacker who controls the control plane can write almost any file on this host")
	}
	if c.AllowedCommands == nil {
		c.warn("CERTCTL_ALLOWED_COMMANDS is not set: an attacker who controls the control plane can run any program on this host")
	}
	if c.AllowedHosts == nil {
		c.warn("CERTCTL_ALLOWED_HOSTS is not set: an attacker who controls the control plane can have this host's private keys sent to any host")
	}
	if c.MetricsFile != "" && filepath.Ext(c.MetricsFile) != ".prom" {
		c.warn("CERTCTL_METRICS_FILE does not end in .prom: node_exporter's textfile collector reads no other files")
	}
	// After five minutes without a heartbeat the control plane considers an agent dead and hands
	// its deployments out again.
	if c.HeartbeatInterval > 4*time.Minute {
		c.warn("CERTCTL_HEARTBEAT_INTERVAL is too long: the control plane considers an agent dead after five minutes without a heartbeat")
	}
}

// finishKey decides where the API key comes from. Of a key and a key file, the one from the source
// with precedence wins; in the same source, the file.
func (l *loader) finishKey() {
	c := l.config
	if l.sources["api-key"] == fromFlag && !c.APIKey.IsZero() {
		c.warn("-api-key on the command line shows the key in the process list: use CERTCTL_API_KEY_FILE")
	}
	if c.APIKeyFile != "" && !c.APIKey.IsZero() {
		if l.sources["api-key"] < l.sources["api-key-file"] {
			c.APIKeyFile = ""
			c.warn("CERTCTL_API_KEY_FILE is not used: the API key comes from a source that takes precedence")
		} else if l.sources["api-key"] == l.sources["api-key-file"] {
			c.warn("CERTCTL_API_KEY is not used: CERTCTL_API_KEY_FILE is set too")
		}
	}
	if c.APIKeyFile != "" {
		key, _, warning, err := readKey(trustedfile.Read, c.APIKeyFile)
		if err != nil {
			l.problem(l.setting("api-key-file"), err)
		}
		c.APIKey = key
		c.warn(warning)
		return
	}
	if c.APIKey.IsZero() {
		l.problem(l.setting("api-key"), errors.New("is required: set it, or set CERTCTL_API_KEY_FILE to a file that contains it"))
	}
}

func (l *loader) finishProxy() {
	through := l.lookupProxy("HTTPS_PROXY", "https_proxy")
	except := l.lookupProxy("NO_PROXY", "no_proxy")
	rules, err := proxy.Parse(through.Text, except.Text)
	if err != nil {
		l.problem(setting{variable: through.Variable}, err)
		rules = &proxy.Rules{}
	}
	l.config.Proxy = rules
	through.Text = ""
	if u := rules.URL(); u != nil {
		through.Text = proxy.Redacted(u)
	}
	l.config.values = append(l.config.values, through, except)
}

func (c *Config) warn(text string) {
	if text != "" {
		c.Warnings = append(c.Warnings, text)
	}
}
