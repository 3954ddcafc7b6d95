// Package caddy installs certificates for Caddy: as a pair in the running configuration, through
// the admin API, or as two files that Caddy then loads again.
package caddy

import (
	"context"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// Type returns the target type Caddy.
func Type() connector.Type {
	return connector.Type{Name: "Caddy", Aliases: map[string]string{"watch_dir": "cert_dir", "admin_url": "admin_api"}, New: newConnector}
}

// config is the target's configuration.
type config struct {
	Mode     string `json:"mode" default:"api"`                        // api, file
	AdminAPI string `json:"admin_api" default:"http://localhost:2019"` // http://host:port or unix//path; localhost is 127.0.0.1
}

// fileConfig is the additional configuration of mode file.
type fileConfig struct {
	connector.DirPair
	ReloadCommand string `json:"reload_command"` // "": the admin API loads the running configuration again
}

const (
	modeAPI  = "api"
	modeFile = "file"
)

type caddy struct {
	target *targetconf.Config
	host   connector.Host
	admin  *admin          // nil: not needed
	pair   *connector.Pair // nil: mode api
	reload *policy.Command // of mode file
}

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	s := &caddy{target: c, host: host}
	var config config
	if err := c.Decode(&config); err != nil {
		return nil, err
	}
	switch config.Mode {
	case modeAPI:
	case modeFile:
		if err := s.decodeFiles(); err != nil || s.reload != nil {
			return s, err
		}
	default:
		return nil, targetconf.Invalid("mode", "expected %s or %s", modeAPI, modeFile)
	}
	var err error
	if s.admin, err = newAdmin(config.AdminAPI, time.Duration(c.Common.CommandTimeout), c.Local("admin_api")); err != nil {
		return nil, targetconf.Invalid("admin_api", "%v", err)
	}
	return s, nil
}

func (s *caddy) decodeFiles() error {
	var config fileConfig
	if err := s.target.Decode(&config); err != nil {
		return err
	}
	pair, err := config.Pair()
	if err != nil {
		return err
	}
	s.pair = &pair
	s.reload, err = s.host.Command(s.target, "reload_command", config.ReloadCommand)
	return err
}

// Plan implements connector.Connector.
func (s *caddy) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	if s.pair == nil {
		return s.planByAPI(m), nil
	}
	plan := s.pair.Plan(m)
	plan.Serves = s.target.Common.Endpoint()
	if plan.Reload.Command = s.reload; s.reload == nil {
		plan.Reload.Call, plan.Reload.Does = s.admin.reload, "POST /load of the running configuration, to "+s.admin.address
	}
	return plan, nil
}

// planByAPI returns the plan of mode api, which writes no files.
func (s *caddy) planByAPI(m *connector.Material) *connector.Plan {
	return &connector.Plan{
		Changes: []connector.Change{&pairChange{
			admin: s.admin,
			tag:   tagPrefix + string(s.target.Target()),
			pair:  loadedPair{Certificate: string(m.FullChain()), Key: string(m.Key())},
		}},
		Serves: s.target.Common.Endpoint(),
		Caveats: []string{
			`Caddy loses the certificate when it restarts, unless it runs with --resume: the certificate is only in its running configuration (mode "file" avoids this)`,
		},
	}
}
