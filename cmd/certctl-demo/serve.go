package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// workbench is a control plane without an agent, for trying the agent's commands by hand.
type workbench struct {
	out    io.Writer
	listen string
	// targetType and targetConfig describe a target that each new agent gets, with a certificate
	// for it. Without targetType an agent gets no work.
	targetType, targetConfig string

	plane  *devplane.Plane
	agents map[string]bool // already seen
	shown  map[string]int  // per job, how many entries of its history
}

// run serves until ctx ends.
func (b *workbench) run(ctx context.Context) (err error) {
	var config json.RawMessage
	if b.targetType != "" {
		if config, err = os.ReadFile(b.targetConfig); err != nil {
			return fmt.Errorf("read the target's configuration: %w", err)
		}
		var object map[string]any
		if err := json.Unmarshal(config, &object); err != nil {
			return fmt.Errorf("the target's configuration %s is not a JSON object: %w", b.targetConfig, err)
		}
	}
	dir, err := os.MkdirTemp("", "certctl-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if b.plane, err = devplane.New(devplane.Options{Listen: b.listen, Dir: dir}); err != nil {
		return err
	}
	defer b.plane.Close()

	fmt.Fprintf(b.out, `A control plane in memory, until Ctrl-C. Its API key is also the bootstrap token.

export CERTCTL_SERVER_URL=%s
export CERTCTL_SERVER_CA_BUNDLE_PATH=%s
export CERTCTL_API_KEY=%s
export CERTCTL_KEY_DIR=$(mktemp -d)
export CERTCTL_AGENT_ID=$(bin/certctl-agent register -name "$(hostname)")
bin/certctl-agent check

`, b.plane.URL, b.plane.CAFile(), b.plane.APIKey)

	b.agents, b.shown = make(map[string]bool), make(map[string]int)
	err = b.plane.Wait(ctx, func() bool {
		b.look(config)
		return false
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// look gives work to new agents, and prints what has changed.
func (b *workbench) look(config json.RawMessage) {
	for _, agent := range b.plane.Agents() {
		if b.agents[agent.ID] {
			continue
		}
		b.agents[agent.ID] = true
		fmt.Fprintf(b.out, "%s: registered as %s\n", agent.ID, agent.Name)
		if b.targetType != "" {
			target := b.plane.AddTarget(devplane.Target{Agent: agent.ID, Type: b.targetType, Config: config})
			certificate := b.plane.AddCertificate(devplane.Certificate{CommonName: commonName,
				SANs: []string{commonName}, Targets: []string{target}})
			b.plane.StartIssuance(certificate)
		}
	}
	for _, job := range b.plane.Jobs() {
		for _, event := range job.History[b.shown[job.ID]:] {
			line := fmt.Sprintf("%s: %s of %s", job.ID, job.Type, job.CertificateID)
			if job.Type == api.TypeDeployment {
				line += " to " + job.TargetID
			}
			line += ": " + event.Status
			if event.Error != "" {
				line += ": " + event.Error
			}
			fmt.Fprintln(b.out, line)
		}
		b.shown[job.ID] = len(job.History)
	}
}
