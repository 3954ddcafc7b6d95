package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"unicode/utf8"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/config"
)

const registerHelp = `Usage: certctl-agent register -name NAME [-bootstrap-token-file FILE] [-write FILE] [flags of the daemon]

Registers this host with the control plane and prints the agent id.

  -name NAME                  the agent's name, for people; it must be new to the
                              control plane
  -bootstrap-token-file FILE  file with the bootstrap token; without it, register
                              sends the API key, which control planes without a
                              bootstrap token accept
  -write FILE                 also set the id in this configuration file (its other
                              lines stay)

Examples:
  certctl-agent register -server https://certctl.example.org:8443 -name web1 -bootstrap-token-file token
  certctl-agent register -name web1 -write /etc/certctl/agent.env

Exit status: 0 registered, 1 refused or failed, 2 usage.

Flags of the daemon:

`

// maxName is how long an agent's name may be.
const maxName = 128

func runRegister(ctx context.Context, p process) error {
	var tokenFile, write string
	cfg, err := config.Load(p.args, p.getenv, config.Options{
		Flags: func(f *flag.FlagSet) {
			f.StringVar(&tokenFile, "bootstrap-token-file", "", "file with the bootstrap token")
			f.StringVar(&write, "write", "", "configuration file to set CERTCTL_AGENT_ID in")
		},
		// Registration provides these.
		Ignore: func(setting string) bool { return setting == "api-key" || setting == "agent-id" },
	})
	if err != nil {
		return err
	}
	if n := utf8.RuneCountInString(cfg.Name); n > maxName {
		return config.NewUsageError("-name has %d characters: the maximum is %d", n, maxName)
	}
	if tokenFile != "" {
		if cfg.APIKey, err = config.ReadKeyFile(tokenFile); err != nil {
			return fmt.Errorf("read the bootstrap token: %w", err)
		}
	}
	hostname, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("look up this host's name: %w", err)
	}
	client := app.NewClient(cfg)
	defer client.Close()
	agent, err := client.Register(ctx, api.Registration{Name: cfg.Name, Hostname: hostname})
	if err != nil {
		return explainRegistration(err, cfg.Name, tokenFile, !cfg.APIKey.IsZero())
	}
	if _, err := api.ParseID(agent.ID); err != nil {
		return fmt.Errorf("the control plane registered this host under an unusable id: %q", agent.ID)
	}
	// Before the file: if that cannot be written, the id is not lost.
	if _, err := fmt.Fprintln(p.stdout, agent.ID); err != nil {
		return err
	}
	if write == "" {
		return nil
	}
	if err := config.SetInFile(write, "CERTCTL_AGENT_ID", agent.ID); err != nil {
		return fmt.Errorf("registered as %s, but the id was not written: %w; set CERTCTL_AGENT_ID=%s by hand", agent.ID, err, agent.ID)
	}
	fmt.Fprintf(p.stderr, "CERTCTL_AGENT_ID set in %s\n", write)
	return nil
}

// explainRegistration explains answers that have a special meaning for a registration.
func explainRegistration(err error, name, tokenFile string, sent bool) error {
	status, ok := errors.AsType[*api.StatusError](err)
	if !ok {
		return err
	}
	switch status.Status {
	case http.StatusUnauthorized:
		switch {
		case tokenFile != "":
			return fmt.Errorf("%w; register sent the bootstrap token of %s: check that the control plane has the same one", err, tokenFile)
		case sent:
			return fmt.Errorf("%w; register sent the API key: if the control plane has a bootstrap token, use -bootstrap-token-file", err)
		}
		return fmt.Errorf("%w; register sent neither: set an API key, or use -bootstrap-token-file", err)
	case http.StatusConflict:
		return fmt.Errorf("%w; another agent is registered as %q: choose another -name, or use that agent's id", err, name)
	}
	return err
}
