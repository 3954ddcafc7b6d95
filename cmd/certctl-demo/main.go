// Command certctl-demo demonstrates the agent end to end on one machine, with an embedded control
// plane, the real agent binary as a child process, and a live TLS server. It checks every step, not
// only prints it. It listens only on loopback, needs only Go, and removes all its files.
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
	target := flags.String("target", "", "live server: nginx, apache, haproxy, caddy, postfix, dovecot, javakeystore or kubernetes (default: nginx if installed, else a built-in one)")
	verbose := flags.Bool("v", false, "show the agent's log")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
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
