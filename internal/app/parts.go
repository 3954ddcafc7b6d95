package app

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"

	"certctl-agent/internal/api"
	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/config"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/discovery"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/statedir"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/transaction"
)

// This file has the parts that commands use without an agent.

// NewClient returns a client of the control plane for a command.
func NewClient(cfg *config.Config) *controlplane.Client { return controlplane.New(clientOptions(cfg)) }

func clientOptions(cfg *config.Config) controlplane.Options {
	return controlplane.Options{
		Server:             cfg.Server,
		AgentID:            cfg.AgentID,
		Key:                func() secret.String { return cfg.APIKey },
		Roots:              cfg.Roots,
		InsecureSkipVerify: cfg.InsecureSkipVerify,
		Proxy:              cfg.Proxy.For,
		UserAgent:          buildinfo.UserAgent(),
	}
}

// NewHeartbeat returns a heartbeat for this process and host. Its host name is empty if the host
// does not know it.
func NewHeartbeat(ctx context.Context, client *controlplane.Client) api.Heartbeat {
	hostname, _ := os.Hostname()
	return api.Heartbeat{
		Version:      buildinfo.Version(),
		Hostname:     hostname,
		OS:           runtime.GOOS,
		Architecture: runtime.GOARCH,
		IPAddress:    client.LocalAddr(ctx),
	}
}

// ScanOptions returns the options for a scan of the configured directories.
func ScanOptions(cfg *config.Config) discovery.Options {
	return discovery.Options{
		Dirs:      cfg.DiscoveryDirs,
		Exclude:   cfg.DiscoveryExclude,
		Passwords: func() ([]secret.String, error) { return cfg.DiscoveryPasswords, nil },
		MaxRate:   cfg.DiscoveryMaxRate,
	}
}

// Overlays returns where this host keeps its overlays of target configurations.
func Overlays(cfg *config.Config) targetconf.Overlays {
	return targetconf.Overlays{Dir: cfg.TargetsDir, Required: cfg.TargetsDirNamed}
}

// newPolicy returns the policy of the configuration.
func newPolicy(cfg *config.Config) *policy.Policy {
	protected := []string{cfg.KeyDir, cfg.StateDir, cfg.TargetsDir}
	for _, path := range []string{cfg.File, cfg.APIKeyFile, cfg.CABundle} {
		if path != "" {
			protected = append(protected, path)
		}
	}
	return &policy.Policy{Paths: cfg.AllowedPaths, Commands: cfg.AllowedCommands, Hosts: cfg.AllowedHosts, Protected: protected}
}

// maxAbandoned bounds the ids in one warning, in bytes.
const maxAbandoned = 1 << 10

// AbandonedWarnings returns warnings about deployments that were interrupted under another agent id
// or control plane. The agent does not undo them: their record does not name the host, and a key
// directory may come from a copied disk.
func AbandonedWarnings(cfg *config.Config) []string {
	var warnings []string
	for _, dir := range statedir.Abandoned(cfg.InstanceStateDir()) {
		ids, err := transaction.Interrupted(dir)
		if err != nil || len(ids) == 0 {
			continue
		}
		list := printable.Line(strings.Join(ids, ", "), maxAbandoned)
		warnings = append(warnings, fmt.Sprintf("deployments were interrupted under another agent id or server, and their files may not match (targets %s): "+
			"start the agent once with the earlier -agent-id and -server to undo them, or check the files and remove %s", list, dir))
	}
	return warnings
}
