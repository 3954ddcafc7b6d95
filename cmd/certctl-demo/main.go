// Command certctl-demo demonstrates the agent end to end on one machine, with an embedded control
// plane, the real agent binary as a child process, and a live TLS server. It checks every step. It
// listens only on loopback, needs only Go, and removes all its files.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"certctl-agent/internal/testing/liveserver"
)

// limit bounds the whole demo.
const limit = 2 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	// The built-in server's validate and reload commands are this program.
	if len(args) == 3 && args[0] == "server-order" {
		if err := liveserver.BuiltinCommand(args[1], args[2]); err != nil {
			fmt.Fprintln(stderr, err)
			return 1
		}
		return 0
	}

	flags := flag.NewFlagSet("certctl-demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	agent := flags.String("agent", "bin/certctl-agent", "the agent `binary` to show")
	target := flags.String("target", "", "live server: nginx, apache, haproxy, caddy, postfix, dovecot, javakeystore, kubernetes or ssh (default: nginx if installed, else a built-in one)")
	verbose := flags.Bool("v", false, "show the agent's log")
	var bench workbench
	flags.StringVar(&bench.listen, "serve", "", "run only the demo's control plane, on this `address`, such as 127.0.0.1:8443, to try the agent's commands by hand")
	flags.StringVar(&bench.targetType, "type", "", "with -serve: give each new agent a certificate for a target of this `type`, such as NGINX")
	flags.StringVar(&bench.targetConfig, "config", "", "with -type: `file` with the target's configuration, a JSON object")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}

	if bench.listen == "" && bench.targetType != "" || (bench.targetType == "") != (bench.targetConfig == "") || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "certctl-demo: -type and -config need each other and -serve; arguments are not allowed")
		return 2
	}
	if bench.listen != "" {
		bench.out = stdout
		if err := bench.run(ctx); err != nil {
			fmt.Fprintf(stderr, "certctl-demo: %v\n", err)
			return 1
		}
		return 0
	}

	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the demo took longer than %v", limit))
	defer cancel()
	d := &demo{out: stdout, agentPath: *agent, target: *target, started: time.Now()}
	if *verbose {
		d.agentLog = stderr
	}
	if err := d.run(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w (%w)", err, cause)
		}
		fmt.Fprintf(stderr, "demo: FAILED: %v\n", err)
		return 1
	}
	fmt.Fprintln(stdout, "demo: all steps passed")
	return 0
}
