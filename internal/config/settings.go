package config

import (
	"strings"
	"time"

	"certctl-agent/internal/csr"
	"certctl-agent/internal/secret"
)

const (
	// minInterval keeps a slip of the unit from becoming a busy loop; tests
	// and the demo run that fast, no fleet should.
	minInterval = 100 * time.Millisecond
	maxInterval = 24 * time.Hour

	maxScanInterval = 90 * 24 * time.Hour
	maxGrace        = time.Hour
	maxDeploys      = 256
	maxRetention    = 1000
	maxRate         = 1_000_000
)

// setting is one row of the table that everything about settings is made
// from: flags, variables, help, the reference in docs/configuration.md, and
// where each value came from.
type setting struct {
	flag     string
	variable string
	value    string // the default, as it would be written; "" for none
	defaults string // what help and reference say in place of value
	doc      string // one or two sentences, without a final stop

	boolean bool // the flag may stand without a value
	secret  bool // never shown
	lenient bool // a bad value means the default, with a warning: fleets run with such values

	// parse stores a value. It is also called with the default, unless that
	// is empty. An empty value reaches it only from a flag.
	parse func(c *Config, value string) error
}

// settings is the table, in the order of the reference. -config comes first:
// the file is a source of all others.
func settings() []setting {
	return []setting{
		{flag: "config", variable: "CERTCTL_CONFIG", defaults: DefaultFile + ", if it exists",
			doc: "Configuration file: KEY=VALUE lines in the syntax of systemd's EnvironmentFile, with the variables of this table as keys"},
		{flag: "server", variable: "CERTCTL_SERVER_URL", value: "https://localhost:8443",
			doc: "URL of the control plane. HTTPS only; a path prefix is kept",
			parse: func(c *Config, value string) (err error) {
				c.Server, err = parseServer(value)
				return err
			}},
		{flag: "api-key", variable: "CERTCTL_API_KEY", defaults: "none, required", secret: true,
			doc:   "API key. On the command line it shows in ps: prefer a file",
			parse: func(c *Config, value string) error { c.APIKey = secret.New(value); return checkKey(value) }},
		{flag: "api-key-file", variable: "CERTCTL_API_KEY_FILE", defaults: "none",
			doc:   "File with the API key, such as a Docker secret or a systemd credential, in place of the key itself. Read again when it changes",
			parse: func(c *Config, value string) (err error) { c.APIKeyFile, err = parsePath(value); return err }},
		{flag: "name", variable: "CERTCTL_AGENT_NAME", value: "certctl-agent",
			doc:   "Name of the agent, for people",
			parse: func(c *Config, value string) error { c.Name = value; return nil }},
		{flag: "agent-id", variable: "CERTCTL_AGENT_ID", defaults: "none, required",
			doc:   "Id that the control plane gave to this agent when it was registered",
			parse: func(c *Config, value string) error { c.AgentID = value; return checkAgentID(value) }},
		{flag: "key-dir", variable: "CERTCTL_KEY_DIR", value: "/var/lib/certctl/keys",
			doc:   "Directory of the private keys",
			parse: func(c *Config, value string) (err error) { c.KeyDir, err = parseRequiredPath(value); return err }},
		{flag: "state-dir", variable: "CERTCTL_STATE_DIR", defaults: "`.state` in the key directory",
			doc:   "Directory of what the agent must remember: jobs, backups, the status socket",
			parse: func(c *Config, value string) (err error) { c.StateDir, err = parsePath(value); return err }},
		{flag: "ca-bundle", variable: "CERTCTL_SERVER_CA_BUNDLE_PATH", defaults: "the system's roots",
			doc: "PEM file with the certificates that the control plane's must chain to, in place of the system's roots",
			parse: func(c *Config, value string) (err error) {
				if c.CABundle, err = parsePath(value); err != nil || value == "" {
					return err
				}
				var warning string
				c.Roots, warning, err = parseBundle(c.CABundle)
				c.warn(warning)
				return err
			}},
		{flag: "insecure-skip-verify", variable: "CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY", value: "false", boolean: true, lenient: true,
			doc:   "Accept any certificate of the control plane. For tests only: whoever is in between gets the API key",
			parse: func(c *Config, value string) (err error) { c.InsecureSkipVerify, err = parseBool(value); return err }},
		{flag: "discovery-dirs", variable: "CERTCTL_DISCOVERY_DIRS", defaults: "none: discovery is off",
			doc:   "Directories to search for certificates, comma-separated",
			parse: func(c *Config, value string) (err error) { c.DiscoveryDirs, err = parseDirs(value); return err }},
		{flag: "discovery-interval", variable: "CERTCTL_DISCOVERY_INTERVAL", value: "6h",
			doc: "Time between two searches",
			parse: func(c *Config, value string) (err error) {
				c.DiscoveryInterval, err = parseDuration(value, minInterval, maxScanInterval)
				return err
			}},
		{flag: "discovery-exclude", variable: "CERTCTL_DISCOVERY_EXCLUDE", defaults: "none",
			doc:   "Patterns of paths that are not searched, comma-separated",
			parse: func(c *Config, value string) (err error) { c.DiscoveryExclude, err = parseGlobs(value); return err }},
		{flag: "discovery-max-rate", variable: "CERTCTL_DISCOVERY_MAX_RATE", value: "0",
			doc: "Most files to look at in a second; 0 means no limit",
			parse: func(c *Config, value string) (err error) {
				c.DiscoveryMaxRate, err = parseInt(value, 0, maxRate)
				return err
			}},
		{flag: "discovery-passwords-file", variable: "CERTCTL_DISCOVERY_PASSWORDS_FILE", defaults: "none",
			doc: "File with passwords to try on PKCS#12 files, one per line. The empty password is always tried",
			parse: func(c *Config, value string) (err error) {
				if value == "" {
					return nil
				}
				var warning string
				c.DiscoveryPasswords, warning, err = parsePasswords(value)
				c.warn(warning)
				return err
			}},
		{flag: "heartbeat-interval", variable: "CERTCTL_HEARTBEAT_INTERVAL", value: "60s",
			doc: "Time between two heartbeats, drawn anew within 10 % for each",
			parse: func(c *Config, value string) (err error) {
				c.HeartbeatInterval, err = parseDuration(value, minInterval, maxInterval)
				return err
			}},
		{flag: "poll-interval", variable: "CERTCTL_POLL_INTERVAL", value: "30s",
			doc: "Time between two questions for work, drawn anew within 10 % for each",
			parse: func(c *Config, value string) (err error) {
				c.PollInterval, err = parseDuration(value, minInterval, maxInterval)
				return err
			}},
		{flag: "startup-jitter", variable: "CERTCTL_STARTUP_JITTER", value: "true", boolean: true,
			doc:   "Delay the first heartbeat, poll and search by random times, so that a fleet that restarts at once does not arrive at once",
			parse: func(c *Config, value string) (err error) { c.StartupJitter, err = parseBool(value); return err }},
		{flag: "max-deploys", variable: "CERTCTL_MAX_DEPLOYS", value: "4",
			doc: "Most deployments at once. One target never has more than one",
			parse: func(c *Config, value string) (err error) {
				c.MaxDeploys, err = parseInt(value, 1, maxDeploys)
				return err
			}},
		{flag: "shutdown-grace", variable: "CERTCTL_SHUTDOWN_GRACE", value: "60s",
			doc: "Time that running deployments get to end when the agent is stopped; then they are rolled back",
			parse: func(c *Config, value string) (err error) {
				c.ShutdownGrace, err = parseDuration(value, 0, maxGrace)
				return err
			}},
		{flag: "key-algorithm", variable: "CERTCTL_KEY_ALGORITHM", value: csr.DefaultAlgorithm,
			doc: "Kind of the keys that are made: one of `" + strings.Join(csr.Algorithms(), "`, `") + "`",
			parse: func(c *Config, value string) (err error) {
				c.KeyAlgorithm, err = parseWord(value, csr.Algorithms()...)
				return err
			}},
		{flag: "targets-dir", variable: "CERTCTL_TARGETS_DIR", value: "/etc/certctl/targets.d",
			doc:   "Directory of overlays, files with which this host has the last word on the configuration of its targets",
			parse: func(c *Config, value string) (err error) { c.TargetsDir, err = parseRequiredPath(value); return err }},
		{flag: "allowed-paths", variable: "CERTCTL_ALLOWED_PATHS", defaults: "anywhere but the agent's own and the system's vital files",
			doc:   "Directories below which deployments may write, comma-separated. Unset, whoever holds the control plane holds this host",
			parse: func(c *Config, value string) (err error) { c.AllowedPaths, err = parseAllowedPaths(value); return err }},
		{flag: "allowed-commands", variable: "CERTCTL_ALLOWED_COMMANDS", defaults: "any",
			doc: "Command lines that deployments may run, separated by semicolons and compared word by word; a last word `*` allows any further words",
			parse: func(c *Config, value string) (err error) {
				c.AllowedCommands, err = parseAllowedCommands(value)
				return err
			}},
		{flag: "deploy-backup-retention", variable: "CERTCTL_DEPLOY_BACKUP_RETENTION", value: "3",
			doc: "Sets of replaced files that are kept for each target; 0 means the default, -1 keeps none after a success",
			parse: func(c *Config, value string) (err error) {
				c.BackupRetention, err = parseInt(value, -1, maxRetention)
				if c.BackupRetention == 0 {
					c.BackupRetention = DefaultBackupRetention
				}
				return err
			}},
		{flag: "verify-deployment", variable: "CERTCTL_VERIFY_DEPLOYMENT", value: "true", boolean: true,
			doc:   "Report what the live endpoint serves after a deployment",
			parse: func(c *Config, value string) (err error) { c.VerifyDeployment, err = parseBool(value); return err }},
		{flag: "metrics-file", variable: "CERTCTL_METRICS_FILE", defaults: "none",
			doc:   "File to write metrics to, for node_exporter's textfile collector; its name ends in `.prom`",
			parse: func(c *Config, value string) (err error) { c.MetricsFile, err = parsePath(value); return err }},
		{flag: "log-level", variable: "CERTCTL_LOG_LEVEL", value: "info", lenient: true,
			doc:   "Least level that is logged: `debug`, `info`, `warn` or `error`",
			parse: func(c *Config, value string) (err error) { c.LogLevel, err = parseLevel(value); return err }},
		{flag: "log-format", variable: "CERTCTL_LOG_FORMAT", value: "json",
			doc: "Form of the log lines: `json` or `text`",
			parse: func(c *Config, value string) (err error) {
				c.LogFormat, err = parseWord(value, "json", "text")
				return err
			}},
	}
}
