package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"

	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/config"
)

const versionHelp = `Usage: certctl-agent version [-json]

Prints version, commit, Go and platform, as the build recorded them.

  -json  print one JSON document

Examples:
  certctl-agent version
  certctl-agent version -json | jq -r .version

Exit status: 0 printed, 2 usage.

`

func runVersion(_ context.Context, p process) error {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // the caller prints errors
	asJSON := flags.Bool("json", false, "print one JSON document")
	switch err := flags.Parse(p.args); {
	case errors.Is(err, flag.ErrHelp):
		return err
	case err != nil:
		return config.NewUsageError("%v", err)
	case flags.NArg() > 0:
		return config.NewUsageError("unexpected argument %q", flags.Arg(0))
	}
	platform := runtime.GOOS + "/" + runtime.GOARCH
	if *asJSON {
		return printJSON(p.stdout, struct {
			Version  string `json:"version"`
			Commit   string `json:"commit"`
			Go       string `json:"go"`
			Platform string `json:"platform"`
		}{buildinfo.Version(), buildinfo.Commit(), runtime.Version(), platform})
	}
	_, err := fmt.Fprintf(p.stdout, "certctl-agent %s\ncommit %s\n%s %s\n",
		buildinfo.Version(), cmp.Or(buildinfo.Commit(), "unknown"), runtime.Version(), platform)
	return err
}
