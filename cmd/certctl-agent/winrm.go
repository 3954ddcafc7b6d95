package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/config"
)

const winrmHelp = `Usage: certctl-agent winrm-selftest [-config FILE] [-target ID] [-type TYPE] [-json]
         [flags of the daemon] HOST

Logs on to the Windows host HOST as a deployment would and checks what deployments need
there: PowerShell, .NET, the account's rights, the certificate store, IIS. It lists what
is missing and changes nothing.

  -config FILE     the target's configuration, a JSON object; - is standard input;
                   without it, only the overlays are used: default.json, or that of
                   -target
  -target ID       the target's id, for its overlay ID.json
  -type TYPE       the target's type, if its overlay pins one
  -json            print one JSON document

The password comes from the overlay, as for a deployment. It is not retried after a
refusal, which could lock the account.

Examples:
  certctl-agent winrm-selftest win1.example.org
  certctl-agent winrm-selftest -target t-iis1 -config target.json win1.example.org

Exit status: 0 nothing is missing, 1 something is missing or the check failed, 2 usage.

`

func runWinRM(ctx context.Context, p process) error {
	target := app.Target{ID: unnamedTarget}
	var asJSON bool
	var configFile string
	cfg, err := config.Load(p.args, p.getenv, config.Options{
		Args: true,
		Flags: func(f *flag.FlagSet) {
			f.StringVar(&target.Type, "type", "", "type of the target")
			f.StringVar(&configFile, "config", "", "configuration of the target")
			f.Func("target", "id of the target", func(id string) (err error) {
				target.ID, err = api.ParseID(id)
				return err
			})
			f.BoolVar(&asJSON, "json", false, "print JSON")
		},
		Ignore: func(setting string) bool {
			return !slices.Contains([]string{"config", "targets-dir", "allowed-hosts"}, setting)
		},
	})
	if err != nil {
		return err
	}
	if len(cfg.Args) != 1 {
		return config.NewUsageError("name one host, after the flags: certctl-agent winrm-selftest win1.example.org, for example")
	}
	if target.Config, err = readInput(p.stdin, configFile); err != nil {
		return fmt.Errorf("the target's configuration: %w", err)
	}
	found, err := app.NewSelfTest(ctx, cfg, target, cfg.Args[0])
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(p.stdout, found)
	} else {
		err = printSelfTest(p.stdout, found)
	}
	if err == nil && !found.Complete() {
		return errPrinted
	}
	return err
}

func printSelfTest(w io.Writer, found app.SelfTest) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range found {
		level := levelOK
		if !f.OK {
			level = levelFailure
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", level, shown(f.What), shown(f.Says))
	}
	return table.Flush()
}
