// Command certctl-agent runs on a server, creates its private keys, and installs the certificates
// that its certctl control plane issues for them.
//
// Without a subcommand it is the daemon. Subcommands query the daemon, prepare it, or do one of its
// tasks by hand; see `certctl-agent -h`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"certctl-agent/internal/askpass"
	"certctl-agent/internal/config"
	"certctl-agent/internal/printable"
)

// Exit codes.
const (
	exitOK      = 0 // stopped, retired, or no problem found
	exitFailure = 1 // configuration or runtime failure, or a check failed
	exitUsage   = 2 // the command line is wrong
)

// process is the part of the process that commands use, so that tests can replace it.
type process struct {
	args   []string
	getenv func(string) string
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer
}

type subcommand struct {
	name    string
	summary string
	help    string
	flags   bool // the help also lists the daemon's flags
	run     func(ctx context.Context, p process) error
}

func subcommands() []subcommand {
	return []subcommand{
		{"check", "check the configuration, the disk and the control plane without changes", checkHelp, true, runCheck},
		{"plan", "show what a deployment would do, without doing it", planHelp, false, runPlan},
		{"register", "register this host with the control plane and print its agent id", registerHelp, true, runRegister},
		{"scan", "list the certificates on this host's disks", scanHelp, false, runScan},
		{"status", "show the state of the running daemon", statusHelp, false, runStatus},
		{"winrm-selftest", "check what deployments need on a Windows host, without changes", winrmHelp, false, runWinRM},
		{"version", "print version, commit, Go and platform", versionHelp, false, runVersion},
	}
}

func main() {
	if askpass.Asked(os.Args) {
		if err := askpass.Main(os.Args, os.Stdout); err != nil {
			printError(os.Stderr, err)
			os.Exit(exitFailure)
		}
		return
	}
	p := process{args: os.Args[1:], getenv: os.Getenv, stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	os.Exit(run(context.Background(), p))
}

// run runs the daemon or a subcommand and returns the exit code.
func run(ctx context.Context, p process) int {
	// The output may quote untrusted text, and root may read it on a terminal.
	p.stdout, p.stderr = printable.Writer{Out: p.stdout}, printable.Writer{Out: p.stderr}
	err := dispatch(ctx, p)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if status, ok := errors.AsType[exitStatus](err); ok {
		return int(status)
	}
	if errors.Is(err, errPrinted) {
		return exitFailure
	}
	printError(p.stderr, err)
	if _, usage := errors.AsType[*config.UsageError](err); usage {
		return exitUsage
	}
	return exitFailure
}

func dispatch(ctx context.Context, p process) error {
	if len(p.args) == 0 || len(p.args[0]) > 0 && p.args[0][0] == '-' {
		if os.Getpid() == 1 {
			return runAsInit(ctx, p)
		}
		return runDaemon(ctx, p)
	}
	name := p.args[0]
	for _, c := range subcommands() {
		if c.name != name {
			continue
		}
		p.args = p.args[1:]
		err := c.run(ctx, p)
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(p.stdout, c.help)
			if c.flags {
				config.Usage(p.stdout)
			}
		}
		return err
	}
	return config.NewUsageError("unknown command %q: see certctl-agent -h", name)
}

// errPrinted is a failure that the command has printed already.
var errPrinted = errors.New("printed already")
