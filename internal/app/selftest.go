package app

import (
	"cmp"
	"context"
	"log/slog"

	"certctl-agent/internal/config"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/windows"
	"certctl-agent/internal/targetconf"
)

// SelfTest lists what deployments need on a Windows host, and whether it is there.
type SelfTest []windows.Finding

// Complete reports whether nothing is missing.
func (t SelfTest) Complete() bool {
	for _, f := range t {
		if !f.OK {
			return false
		}
	}
	return true
}

// NewSelfTest logs on to the Windows host name with the settings of a target and checks what
// deployments need. It changes nothing there. The target's type may be empty.
func NewSelfTest(ctx context.Context, cfg *config.Config, target Target, name string) (SelfTest, error) {
	typ, err := connector.Find(windows.Types(), cmp.Or(target.Type, windows.Types()[0].Name))
	if err != nil {
		return nil, err
	}
	merged, err := targetconf.Merge(target.Config, typ.Name, typ.Aliases, target.ID, Overlays(cfg))
	if err != nil {
		return nil, err
	}
	return windows.SelfTest(ctx, merged, connector.Host{Policy: newPolicy(cfg), Log: slog.New(slog.DiscardHandler)}, name)
}
