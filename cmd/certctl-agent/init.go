package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// exitStatus is how the daemon that runAsInit started has ended. It has said
// why itself.
type exitStatus int

func (exitStatus) Error() string { return "" }

// runAsInit runs the daemon as a child. The first process of a container is the
// parent of everything that its parent leaves behind, such as what a reload
// command starts, and has to wait for it, or it stays as a zombie until no
// process can be started any more. The daemon itself cannot: it would take the
// exit status of its own commands from os/exec.
func runAsInit(ctx context.Context, p process) error {
	// Before there is a child, so that no signal is missed. A SIGCHLD that
	// finds the channel full is not lost: the one in it is yet to be served.
	children, signals := make(chan os.Signal, 1), make(chan os.Signal, 16)
	signal.Notify(children, syscall.SIGCHLD)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	path, err := os.Executable()
	pid := 0
	if err == nil {
		pid, err = syscall.ForkExec(path, append(os.Args[:1:1], p.args...), &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	}
	if err != nil {
		signal.Stop(children)
		signal.Stop(signals)
		fmt.Fprintf(p.stderr, "certctl-agent: runs as the first process of its container, and nobody waits for what commands leave behind: %v\n", err)
		return runDaemon(ctx, p)
	}
	for {
		select {
		case received := <-signals:
			// The child is there: nobody but this loop waits for it.
			_ = syscall.Kill(pid, received.(syscall.Signal))
		case <-children:
			if status, ended := reap(pid); ended {
				return status
			}
		}
	}
}

// reap waits for every process that has ended. It reports whether pid was among
// them, and how that ended: as shells have it, 128 and its number for a signal.
func reap(pid int) (status exitStatus, ended bool) {
	for {
		var how syscall.WaitStatus
		found, err := syscall.Wait4(-1, &how, syscall.WNOHANG, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil || found == 0:
			return status, ended
		case found != pid:
		case how.Signaled():
			status, ended = exitStatus(128+int(how.Signal())), true
		default:
			status, ended = exitStatus(how.ExitStatus()), true
		}
	}
}
