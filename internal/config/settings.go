package config

import (
	"strings"
	"time"

	"certctl-agent/internal/csr"
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
	field    field  // takes the value; nil for none
	value    string // the default, as it would be written; "" for none
	defaults string // what help and reference say in place of value
	doc      string // one or two sentences, without a final stop

	secret  bool // never shown
	lenient bool // a bad value means the default, with a warning: fleets run with such values
}

// settings is the table for the fields of c, in the order of the reference.
// -config comes first: the file is a source of all others.
func settings(c *Config) []setting {
	return []setting{
		{flag: "config", variable: "CERTCTL_CONFIG", defaults: defaultFile + ", if it exists",
			doc: "Configuration file: KEY=VALUE lines in the syntax of systemd's EnvironmentFile, with the variables of this table as keys"},
		{flag: "server", variable: "CERTCTL_SERVER_URL", field: parsed(&c.Server, parseServer), value: "https://localhost:8443",
			doc: "URL of the control plane. HTTPS only; a path prefix is kept"},
		{flag: "api-key", variable: "CERTCTL_API_KEY", field: parsed(&c.APIKey, parseKey), defaults: "none, required", secret: true,
			doc: "API key. On the command line it shows in ps: prefer a file"},
		{flag: "api-key-file", variable: "CERTCTL_API_KEY_FILE", field: parsed(&c.APIKeyFile, parsePath), defaults: "none",
			doc: "File with the API key, such as a Docker secret or a systemd credential, in place of the key itself. Read again when it changes"},
		{flag: "name", variable: "CERTCTL_AGENT_NAME", field: parsed(&c.Name, parseText), value: "certctl-agent",
			doc: "Name of the agent, for people"},
		{flag: "agent-id", variable: "CERTCTL_AGENT_ID", field: parsed(&c.AgentID, parseAgentID), defaults: "none, required",
			doc: "Id that the control plane gave to this agent when it was registered"},
		{flag: "key-dir", variable: "CERTCTL_KEY_DIR", field: parsed(&c.KeyDir, parseRequiredPath), value: "/var/lib/certctl/keys",
			doc: "Directory of the private keys"},
		{flag: "state-dir", variable: "CERTCTL_STATE_DIR", field: parsed(&c.StateDir, parsePath), defaults: "`.state` in the key directory",
			doc: "Directory of what the agent must remember: jobs, backups, the status socket"},
		{flag: "ca-bundle", variable: "CERTCTL_SERVER_CA_BUNDLE_PATH", field: bundle{c}, defaults: "the system's roots",
			doc: "PEM file with the certificates that the control plane's must chain to, in place of the system's roots"},
		{flag: "insecure-skip-verify", variable: "CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY", field: boolean{&c.InsecureSkipVerify}, value: "false", lenient: true,
			doc: "Accept any certificate of the control plane. For tests only: whoever is in between gets the API key"},
		{flag: "discovery-dirs", variable: "CERTCTL_DISCOVERY_DIRS", field: parsed(&c.DiscoveryDirs, parseDirs), defaults: "none: discovery is off",
			doc: "Directories to search for certificates, comma-separated"},
		{flag: "discovery-interval", variable: "CERTCTL_DISCOVERY_INTERVAL", field: duration{&c.DiscoveryInterval, minInterval, maxScanInterval}, value: "6h",
			doc: "Time between two searches"},
		{flag: "discovery-exclude", variable: "CERTCTL_DISCOVERY_EXCLUDE", field: parsed(&c.DiscoveryExclude, parseGlobs), defaults: "none",
			doc: "Patterns of paths that are not searched, comma-separated"},
		{flag: "discovery-max-rate", variable: "CERTCTL_DISCOVERY_MAX_RATE", field: integer{&c.DiscoveryMaxRate, 0, maxRate}, value: "0",
			doc: "Most files to look at in a second; 0 means no limit"},
		{flag: "discovery-passwords-file", variable: "CERTCTL_DISCOVERY_PASSWORDS_FILE", field: passwords{c}, defaults: "none",
			doc: "File with passwords to try on PKCS#12 files, one per line. The empty password is always tried"},
		{flag: "heartbeat-interval", variable: "CERTCTL_HEARTBEAT_INTERVAL", field: duration{&c.HeartbeatInterval, minInterval, maxInterval}, value: "60s",
			doc: "Time between two heartbeats, drawn anew within 10 % for each"},
		{flag: "poll-interval", variable: "CERTCTL_POLL_INTERVAL", field: duration{&c.PollInterval, minInterval, maxInterval}, value: "30s",
			doc: "Time between two questions for work, drawn anew within 10 % for each"},
		{flag: "startup-jitter", variable: "CERTCTL_STARTUP_JITTER", field: boolean{&c.StartupJitter}, value: "true",
			doc: "Delay the first heartbeat, poll and search by random times, so that a fleet that restarts at once does not arrive at once"},
		{flag: "max-deploys", variable: "CERTCTL_MAX_DEPLOYS", field: integer{&c.MaxDeploys, 1, maxDeploys}, value: "4",
			doc: "Most deployments at once. One target never has more than one"},
		{flag: "shutdown-grace", variable: "CERTCTL_SHUTDOWN_GRACE", field: duration{&c.ShutdownGrace, 0, maxGrace}, value: "60s",
			doc: "Time that running deployments get to end when the agent is stopped; then they are rolled back"},
		{flag: "key-algorithm", variable: "CERTCTL_KEY_ALGORITHM", field: word{&c.KeyAlgorithm, csr.Algorithms()}, value: csr.DefaultAlgorithm,
			doc: "Kind of the keys that are made: one of `" + strings.Join(csr.Algorithms(), "`, `") + "`"},
		{flag: "targets-dir", variable: "CERTCTL_TARGETS_DIR", field: parsed(&c.TargetsDir, parseRequiredPath), value: "/etc/certctl/targets.d",
			doc: "Directory of overlays, files with which this host has the last word on the configuration of its targets"},
		{flag: "allowed-paths", variable: "CERTCTL_ALLOWED_PATHS", field: parsed(&c.AllowedPaths, parseAllowedPaths), defaults: "anywhere but the agent's own and the system's vital files",
			doc: "Directories below which deployments may write, comma-separated. Unset, whoever holds the control plane holds this host"},
		{flag: "allowed-commands", variable: "CERTCTL_ALLOWED_COMMANDS", field: parsed(&c.AllowedCommands, parseAllowedCommands), defaults: "any",
			doc: "Command lines that deployments may run, separated by semicolons and compared word by word; a last word `*` allows any further words"},
		{flag: "allowed-hosts", variable: "CERTCTL_ALLOWED_HOSTS", field: parsed(&c.AllowedHosts, parseAllowedHosts), defaults: "any",
			doc: "Other hosts that deployments may send private keys to, comma-separated: names, `*.example.org`, addresses or CIDR blocks, each with `:port` if wanted; `none` for this host alone"},
		{flag: "deploy-backup-retention", variable: "CERTCTL_DEPLOY_BACKUP_RETENTION", field: integer{&c.BackupRetention, -1, maxRetention}, value: "3",
			doc: "Sets of replaced files that are kept for each target; 0 means the default, -1 keeps none after a success"},
		{flag: "verify-deployment", variable: "CERTCTL_VERIFY_DEPLOYMENT", field: boolean{&c.VerifyDeployment}, value: "true",
			doc: "Report what the live endpoint serves after a deployment"},
		{flag: "ssh-accept-new-host-keys", variable: "CERTCTL_SSH_ACCEPT_NEW_HOST_KEYS", field: boolean{&c.SSHAcceptNewHostKeys}, value: "false",
			doc: "Believe a server whose host key is not known, when a certificate is installed there for the first time. The key is remembered, and another one is refused from then on"},
		{flag: "metrics-file", variable: "CERTCTL_METRICS_FILE", field: parsed(&c.MetricsFile, parsePath), defaults: "none",
			doc: "File to write metrics to, for node_exporter's textfile collector; its name ends in `.prom`"},
		{flag: "log-level", variable: "CERTCTL_LOG_LEVEL", field: parsed(&c.LogLevel, parseLevel), value: "info", lenient: true,
			doc: "Least level that is logged: `debug`, `info`, `warn` or `error`"},
		{flag: "log-format", variable: "CERTCTL_LOG_FORMAT", field: word{&c.LogFormat, []string{"json", "text"}}, value: "json",
			doc: "Form of the log lines: `json` or `text`"},
	}
}
