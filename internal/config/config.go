// Package config makes one Config out of flags, environment and configuration
// file. It is the only place that knows the names of variables, and it checks
// everything before the first packet is sent.
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

// defaultFile is the configuration file where none is named.
const defaultFile = "/etc/certctl/agent.env"

// defaultBackupRetention is how many sets of replaced files a target keeps.
const defaultBackupRetention = 3

// Config is everything that an operator can choose; the table of settings says
// more. It does not change: Reload makes another one. It can be printed; secrets
// in it redact themselves. Every path is absolute.
type Config struct {
	// Server is the control plane's base URL: https, a host in lower case, no
	// trailing slash, the default port left out.
	Server *url.URL

	// APIKey is the key as it was when the configuration was loaded. The daemon
	// asks KeyFunc instead, which notices a changed key file.
	APIKey     secret.String
	APIKeyFile string // where the key comes from, or "" where it was given directly

	Name    string // for people; sent at registration only
	AgentID string // names this agent in every path of the API

	KeyDir string

	// StateDir holds what must outlive a restart. One process at a time uses
	// it. What belongs to an agent id and a server is in InstanceStateDir.
	StateDir string

	CABundle           string         // the file that Roots come from, or ""
	Roots              *x509.CertPool // verify the control plane's certificate; nil means the system's
	InsecureSkipVerify bool

	// Proxy chooses the proxy for requests to the control plane, from
	// HTTPS_PROXY and NO_PROXY of the environment or the configuration file.
	Proxy *proxy.Rules

	DiscoveryDirs      []string // none means that discovery is off
	DiscoveryExclude   []string // patterns of paths
	DiscoveryMaxRate   int      // files in a second; 0 means no limit
	DiscoveryPasswords []secret.String

	// The control plane takes an agent for dead after five minutes without a
	// heartbeat.
	HeartbeatInterval time.Duration
	PollInterval      time.Duration
	DiscoveryInterval time.Duration
	StartupJitter     bool // delays the first of each

	MaxDeploys    int           // at once; at least 1
	ShutdownGrace time.Duration // for running deployments when the agent stops
	KeyAlgorithm  string        // such as "ecdsa-p256"

	// TargetsDir holds the overlays. It need not exist unless it was named.
	TargetsDir      string
	TargetsDirNamed bool

	// AllowedPaths are the directories below which deployments may write; nil
	// means anywhere that is not protected.
	AllowedPaths []string

	// AllowedCommands are the command lines that deployments may run, each
	// split into words; a last word "*" stands for any further words. Nil
	// means any.
	AllowedCommands [][]string

	// AllowedHosts are where deployments may send private keys, beside this
	// host. Nil means anywhere; empty, nowhere.
	AllowedHosts []policy.HostRule

	BackupRetention  int // sets of replaced files for a target; -1 means none after a success. Never 0
	VerifyDeployment bool

	// SSHAcceptNewHostKeys says that a server whose host key is not known is
	// believed. The key is remembered.
	SSHAcceptNewHostKeys bool
	MetricsFile          string // "" for none

	LogLevel  slog.Level
	LogFormat string // "json" or "text"

	File string   // the configuration file that was read, or "" for none
	Args []string // what follows the flags, for commands that take arguments

	// Warnings are what an operator should know about the configuration, one
	// sentence each, to be logged at start and after each reload.
	Warnings []string

	values []Value
	getenv func(string) string // nil: nobody loaded it
	again  func() (*Config, error)
}

// Getenv reads the environment of the process, for what is said there by others
// than the operator: Kubernetes tells a pod where its API server is.
func (c *Config) Getenv(name string) string {
	if c.getenv == nil {
		return ""
	}
	return c.getenv(name)
}

// Options adapt Load to a command. The zero value is the daemon's.
type Options struct {
	// Flags adds flags that are the command's own. One that has the name of a
	// setting's takes its place.
	Flags func(*flag.FlagSet)

	// Args lets arguments follow the flags.
	Args bool

	// Ignore reports, by the flag's name, whether a problem with a setting
	// does not matter to the command: one that needs the state directory only
	// must run without an API key.
	Ignore func(setting string) bool

	// DefaultFile is read if it exists and no other file is named; "" means the
	// host's own, /etc/certctl/agent.env.
	DefaultFile string
}

// UsageError is a command line that cannot be understood, in contrast to
// values that cannot be used: exit code 2.
type UsageError struct{ reason string }

// NewUsageError returns one, for what a command finds wrong with its own flags
// and arguments.
func NewUsageError(format string, args ...any) error {
	return &UsageError{fmt.Sprintf(format, args...)}
}

func (e *UsageError) Error() string { return e.reason }

// Problems are all that is wrong with a configuration, one error each.
type Problems []error

// Error is one line for each problem.
func (p Problems) Error() string { return errors.Join(p...).Error() }

func (p Problems) Unwrap() []error { return p }

// Load reads the configuration: a flag beats the environment beats the
// configuration file beats the default, and an empty variable counts as unset.
//
// The error is flag.ErrHelp when help is asked for (see Usage), a *UsageError,
// or Problems. With Problems comes what could be read, for showing it to the
// operator and for nothing else.
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
	config.again = func() (*Config, error) { return Load(args, getenv, options) }
	if len(l.problems) > 0 {
		return config, l.problems
	}
	return config, nil
}

// Reload loads the configuration anew from the same flags and environment:
// configuration file, API key file and CA bundle are read again. On an error
// the old one stays in use.
func (c *Config) Reload() (*Config, error) {
	fresh, err := c.again()
	if err != nil {
		return nil, err
	}
	return fresh, nil
}

// InstanceStateDir is the part of the state directory that belongs to this
// agent id and this server: work claimed from one control plane is nothing
// that another one knows.
func (c *Config) InstanceStateDir() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%v", c.AgentID, c.Server))
	return filepath.Join(c.StateDir, fmt.Sprintf("%x", sum[:8]))
}

// newFlagSet returns flags that keep their values as they are in set, so that
// problems of all settings are reported at once, wherever they come from.
func newFlagSet(settings []setting, set map[string]string, options Options) *flag.FlagSet {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors are the caller's to print
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

// source says where a value comes from, the strongest first.
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
	set      map[string]string // by flag, on the command line
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

// environment looks a variable up. No value begins and ends with a quote, but
// Docker keeps the quotes of an env file.
func (l *loader) environment(variable string) string {
	value := strings.TrimSpace(l.getenv(variable))
	if len(value) < 2 || value[0] != '"' && value[0] != '\'' || value[len(value)-1] != value[0] {
		return value
	}
	warning := variable + " is in quotes in the environment, which are taken off: Docker keeps those of an env file; write the value without"
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

// explain puts a setting's names before what is wrong with it.
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

// readFile reads the configuration file: the one that is named, which must be
// there, or else the default one.
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
		// A service manager may have read it on the agent's behalf.
		l.config.warn(fmt.Sprintf("%s may not be read by this user: only flags and environment count", path))
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

// warnUnknown names the keys of the file that mean nothing to the agent: most
// are slips of the pen.
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
		l.config.warn(fmt.Sprintf("%s sets what the agent does not know: %s", l.config.File, strings.Join(unknown, ", ")))
	}
}

// apply finds, parses and records the value of one setting.
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
			hidden = hidden || s.flag == "server" // there may be a password in it
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

// proxyVariables are those that curl and most other programs honour too.
var proxyVariables = []string{"HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"}

// lookupProxy finds the value of a variable that is spelled in two ways and
// has no flag. Within one source the first spelling counts.
func (l *loader) lookupProxy(upper, lower string) Value {
	text, from := l.lookup("", upper, "")
	name := upper
	if other, otherFrom := l.lookup("", lower, ""); otherFrom < from {
		text, from, name = other, otherFrom, lower
	}
	return Value{Variable: name, Text: text, Origin: l.describe(from)}
}

// finish checks what depends on more than one setting.
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
		c.warn("insecure-skip-verify is on: the control plane's certificate is not checked, and whoever is in between gets the API key")
	}
	if c.AllowedPaths == nil {
		c.warn("CERTCTL_ALLOWED_PATHS is not set: whoever holds the control plane can write nearly any file of this host")
	}
	if c.AllowedCommands == nil {
		c.warn("CERTCTL_ALLOWED_COMMANDS is not set: whoever holds the control plane can run any program on this host")
	}
	if c.AllowedHosts == nil {
		c.warn("CERTCTL_ALLOWED_HOSTS is not set: whoever holds the control plane can have private keys of this host sent to any other")
	}
	if c.MetricsFile != "" && filepath.Ext(c.MetricsFile) != ".prom" {
		c.warn("CERTCTL_METRICS_FILE does not end in .prom: node_exporter's textfile collector reads no other files")
	}
	// Well before the five minutes after which the control plane takes an
	// agent for dead and hands its deployments out again.
	if c.HeartbeatInterval > 4*time.Minute {
		c.warn("CERTCTL_HEARTBEAT_INTERVAL is too long: the control plane takes an agent for dead after five minutes")
	}
}

// finishKey decides where the API key comes from. Between a key and a key file
// the stronger source counts, and in the same source the file.
func (l *loader) finishKey() {
	c := l.config
	if l.sources["api-key"] == fromFlag && !c.APIKey.IsZero() {
		c.warn("-api-key on the command line shows the key in the process list: use CERTCTL_API_KEY_FILE")
	}
	if c.APIKeyFile != "" && !c.APIKey.IsZero() {
		if l.sources["api-key"] < l.sources["api-key-file"] {
			c.APIKeyFile = ""
			c.warn("CERTCTL_API_KEY_FILE is not used: the API key itself comes from a stronger source")
		} else if l.sources["api-key"] == l.sources["api-key-file"] {
			c.warn("CERTCTL_API_KEY is not used: CERTCTL_API_KEY_FILE is set beside it")
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
		l.problem(l.setting("api-key"), errors.New("is required: set it, or CERTCTL_API_KEY_FILE to a file that holds it"))
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
