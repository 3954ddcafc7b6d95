package config

import (
	"strings"
	"time"

	"certctl-agent/internal/csr"
)

const (
	// minInterval keeps a wrong unit from causing a busy loop. It is for tests and the demo, not
	// for fleets.
	minInterval = 100 * time.Millisecond
	maxInterval = 24 * time.Hour

	maxScanInterval = 90 * 24 * time.Hour
	maxGrace        = time.Hour
	maxDeploys      = 256
	maxRetention    = 1000
	maxRate         = 1_000_000
)

// setting is one row of the table of settings. Flags, variables, help and the reference in
// docs/configuration.md are generated from it.
type setting struct {
	flag     string
	variable string
	field    field  // parses and stores the value; nil for -config
	value    string // the default, as text; "" for none
	defaults string // describes the default if value does not
	doc      string // one or two sentences, without a final period

	secret  bool // never shown
	lenient bool // an invalid value means the default, with a warning: existing fleets have such values
}

// settings returns the table for the fields of c, in the order of the reference. -config must come
// first, since the file is a source for the others.
func settings(c *Config) []setting {
	return []setting{
		{flag: "config", variable: "CERTCTL_CONFIG", defaults: defaultFile + ", if it exists",
			doc: "Configuration file: KEY=VALUE lines in the syntax of systemd's EnvironmentFile, with these variables as keys"},
		{flag: "server", variable: "CERTCTL_SERVER_URL", field: parsed(&c.Server, parseServer), value: "https://localhost:8443",
			doc: "URL of the control plane. HTTPS only; a path prefix is kept"},
		{flag: "api-key", variable: "CERTCTL_API_KEY", field: parsed(&c.APIKey, parseKey), defaults: "none, required", secret: true,
			doc: "API key. On the command line it shows in ps: prefer a file"},
		{flag: "api-key-file", variable: "CERTCTL_API_KEY_FILE", field: parsed(&c.APIKeyFile, parsePath), defaults: "none",
			doc: "File with the API key, such as a Docker secret or a systemd credential, instead of the key itself. The agent reads it again when it changes"},
		{flag: "name", variable: "CERTCTL_AGENT_NAME", field: parsed(&c.Name, parseText), value: "certctl-agent",
			doc: "Name of the agent, for people"},
		{flag: "agent-id", variable: "CERTCTL_AGENT_ID", field: parsed(&c.AgentID, parseAgentID), defaults: "none, required",
			doc: "Id that the control plane assigned to this agent at its registration"},
		{flag: "key-dir", variable: "CERTCTL_KEY_DIR", field: parsed(&c.KeyDir, parseRequiredPath), value: "/var/lib/certctl/keys",
			doc: "Directory for private keys"},
		{flag: "state-dir", variable: "CERTCTL_STATE_DIR", field: parsed(&c.StateDir, parsePath), defaults: "`.state` in the key directory",
			doc: "Directory for the agent's state: jobs, backups, the status socket"},
		{flag: "ca-bundle", variable: "CERTCTL_SERVER_CA_BUNDLE_PATH", field: bundle{c}, defaults: "the system's roots",
			doc: "PEM file with the CA certificates to trust for the control plane, instead of the system's roots"},
		{flag: "insecure-skip-verify", variable: "CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY", field: boolean{&c.InsecureSkipVerify}, value: "false", lenient: true,
			doc: "Accept any certificate of the control plane. For tests only: a man in the middle gets the API key"},
		{flag: "discovery-dirs", variable: "CERTCTL_DISCOVERY_DIRS", field: parsed(&c.DiscoveryDirs, parseDirs), defaults: "none: discovery is off",
			doc: "Directories to scan for certificates, comma-separated"},
		{flag: "discovery-interval", variable: "CERTCTL_DISCOVERY_INTERVAL", field: duration{&c.DiscoveryInterval, minInterval, maxScanInterval}, value: "6h",
			doc: "Time between two scans"},
		{flag: "discovery-exclude", variable: "CERTCTL_DISCOVERY_EXCLUDE", field: parsed(&c.DiscoveryExclude, parseGlobs), defaults: "none",
			doc: "Patterns of paths that are not scanned, comma-separated"},
		{flag: "discovery-max-rate", variable: "CERTCTL_DISCOVERY_MAX_RATE", field: integer{&c.DiscoveryMaxRate, 0, maxRate}, value: "0",
			doc: "Maximum number of files to scan per second; 0 means no limit"},
		{flag: "discovery-passwords-file", variable: "CERTCTL_DISCOVERY_PASSWORDS_FILE", field: passwords{c}, defaults: "none",
			doc: "File with passwords to try on PKCS#12 files, one per line. The empty password is always tried"},
		{flag: "heartbeat-interval", variable: "CERTCTL_HEARTBEAT_INTERVAL", field: duration{&c.HeartbeatInterval, minInterval, maxInterval}, value: "60s",
			doc: "Time between two heartbeats, varied at random by up to 10 %"},
		{flag: "poll-interval", variable: "CERTCTL_POLL_INTERVAL", field: duration{&c.PollInterval, minInterval, maxInterval}, value: "30s",
			doc: "Time between two polls for work, varied at random by up to 10 %"},
		{flag: "startup-jitter", variable: "CERTCTL_STARTUP_JITTER", field: boolean{&c.StartupJitter}, value: "true",
			doc: "Delay the first heartbeat, poll and scan by random times, to spread the load when a whole fleet restarts"},
		{flag: "max-deploys", variable: "CERTCTL_MAX_DEPLOYS", field: integer{&c.MaxDeploys, 1, maxDeploys}, value: "4",
			doc: "Maximum number of parallel deployments. A target never has more than one"},
		{flag: "shutdown-grace", variable: "CERTCTL_SHUTDOWN_GRACE", field: duration{&c.ShutdownGrace, 0, maxGrace}, value: "60s",
			doc: "How long running deployments may continue when the agent stops; then they are rolled back"},
		{flag: "key-algorithm", variable: "CERTCTL_KEY_ALGORITHM", field: word{&c.KeyAlgorithm, csr.Algorithms()}, value: csr.DefaultAlgorithm,
			doc: "Algorithm of new keys: one of `" + strings.Join(csr.Algorithms(), "`, `") + "`"},
		{flag: "targets-dir", variable: "CERTCTL_TARGETS_DIR", field: parsed(&c.TargetsDir, parseRequiredPath), value: "/etc/certctl/targets.d",
			doc: "Directory of overlays: files with which this host overrides the configuration of its targets"},
		{flag: "allowed-paths", variable: "CERTCTL_ALLOWED_PATHS", field: parsed(&c.AllowedPaths, parseAllowedPaths), defaults: "anywhere except the agent's own files and critical system files",
			doc: "Directories below which deployments may write, comma-separated. If it is unset, an attacker who controls the control plane controls this host"},
		{flag: "allowed-commands", variable: "CERTCTL_ALLOWED_COMMANDS", field: parsed(&c.AllowedCommands, parseAllowedCommands), defaults: "any",
			doc: "Command lines that deployments may run, separated by semicolons and compared word by word; a last word `*` allows any further words"},
		{flag: "allowed-hosts", variable: "CERTCTL_ALLOWED_HOSTS", field: parsed(&c.AllowedHosts, parseAllowedHosts), defaults: "any",
			doc: "Other hosts that deployments may send private keys to, comma-separated: names, `*.example.org`, addresses or CIDR blocks, each with an optional `:port`; `none` for no other host"},
		{flag: "deploy-backup-retention", variable: "CERTCTL_DEPLOY_BACKUP_RETENTION", field: integer{&c.BackupRetention, -1, maxRetention}, value: "3",
			doc: "Backups of replaced files to keep per target; 0 means the default, -1 keeps none after a success"},
		{flag: "verify-deployment", variable: "CERTCTL_VERIFY_DEPLOYMENT", field: boolean{&c.VerifyDeployment}, value: "true",
			doc: "After a deployment, report which certificate the endpoint serves"},
		{flag: "ssh-accept-new-host-keys", variable: "CERTCTL_SSH_ACCEPT_NEW_HOST_KEYS", field: boolean{&c.SSHAcceptNewHostKeys}, value: "false",
			doc: "Accept an unknown host key of a server on the first deployment. The agent remembers the key and refuses any other one from then on"},
		{flag: "metrics-file", variable: "CERTCTL_METRICS_FILE", field: parsed(&c.MetricsFile, parsePath), defaults: "none",
			doc: "File to write metrics to, for node_exporter's textfile collector; its name must end in `.prom`"},
		{flag: "log-level", variable: "CERTCTL_LOG_LEVEL", field: parsed(&c.LogLevel, parseLevel), value: "info", lenient: true,
			doc: "Lowest level to log: `debug`, `info`, `warn` or `error`"},
		{flag: "log-format", variable: "CERTCTL_LOG_FORMAT", field: word{&c.LogFormat, []string{"json", "text"}}, value: "json",
			doc: "Format of the log: `json` or `text`"},
	}
}
