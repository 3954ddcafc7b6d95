package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/config"
	"certctl-agent/internal/printable"
)

const checkHelp = `Usage: certctl-agent check [-json] [flags of the daemon]

Checks everything that the daemon needs: configuration, directories, control
plane, API key and agent id, overlays, and the programs of reload commands.
It writes nothing on this host and claims no work. To find out whether the control
plane knows the agent id, it sends one heartbeat, as the daemon would.

Examples:
  certctl-agent check
  certctl-agent check -config /etc/certctl/agent.env -json

Exit status: 0 nothing failed, 1 a failure, 2 usage.

`

// checkTimeout bounds each step that uses the network.
const checkTimeout = 15 * time.Second

// Levels of a result.
const (
	levelOK      = "ok"
	levelWarning = "warning"
	levelFailure = "failure"
)

// result is one line of check.
type result struct {
	Check  string `json:"check"`
	Level  string `json:"level"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"`
}

type checker struct {
	config  *config.Config
	results []result
}

// add makes a result printable, since it may quote untrusted text.
func (c *checker) add(r result) {
	r.Detail, r.Remedy = printable.Line(r.Detail, maxShown), printable.Line(r.Remedy, maxShown)
	c.results = append(c.results, r)
}

func (c *checker) ok(check, format string, args ...any) {
	c.add(result{Check: check, Level: levelOK, Detail: fmt.Sprintf(format, args...)})
}

func (c *checker) warn(check, remedy, format string, args ...any) {
	c.add(result{check, levelWarning, fmt.Sprintf(format, args...), remedy})
}

func (c *checker) fail(check, remedy, format string, args ...any) {
	c.add(result{check, levelFailure, fmt.Sprintf(format, args...), remedy})
}

func (c *checker) failed() bool {
	return slices.ContainsFunc(c.results, func(r result) bool { return r.Level == levelFailure })
}

func runCheck(ctx context.Context, p process) error {
	var asJSON bool
	cfg, err := config.Load(p.args, p.getenv, config.Options{Flags: func(f *flag.FlagSet) {
		f.BoolVar(&asJSON, "json", false, "print one JSON document")
	}})
	c := &checker{config: cfg}
	if err != nil {
		problems, ok := errors.AsType[config.Problems](err)
		if !ok {
			return err
		}
		for _, problem := range problems {
			c.fail("configuration", "", "%v", problem)
		}
	} else {
		c.ok("configuration", "%s", sourceOf(cfg))
	}
	for _, warning := range cfg.Warnings {
		c.warn("configuration", "", "%s", warning)
	}
	c.disk()
	c.overlays()
	c.programs()
	c.discovery()
	if cfg.Server != nil {
		c.controlPlane(ctx)
	}

	if asJSON {
		err = c.printJSON(p.stdout)
	} else {
		err = c.print(p.stdout)
	}
	if err == nil && c.failed() {
		return errPrinted
	}
	return err
}

func sourceOf(cfg *config.Config) string {
	if cfg.File == "" {
		return "complete, from flags and environment"
	}
	return "complete, with " + cfg.File
}

func (c *checker) print(w io.Writer) error {
	var text strings.Builder
	text.WriteString("settings\n")
	for _, v := range c.config.Values() {
		if v.Text != "" {
			fmt.Fprintf(&text, "  %-42s %s (%s)\n", v.Variable, printable.Line(v.Text, maxShown), v.Origin)
		}
	}
	text.WriteString("checks\n")
	for _, r := range c.results {
		fmt.Fprintf(&text, "  %-8s %-16s %s\n", r.Level, r.Check, r.Detail)
		if r.Remedy != "" {
			fmt.Fprintf(&text, "  %-8s %-16s → %s\n", "", "", r.Remedy)
		}
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func (c *checker) printJSON(w io.Writer) error {
	return printJSON(w, struct {
		Settings []config.Value `json:"settings"`
		Checks   []result       `json:"checks"`
		Failed   bool           `json:"failed"`
	}{c.config.Values(), c.results, c.failed()})
}
