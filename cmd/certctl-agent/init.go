package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// exitStatus is the exit status of the daemon that runAsInit started. The daemon has printed its
// error itself.
type exitStatus int

func (exitStatus) Error() string { return "" }

// runAsInit runs the daemon as a child and reaps zombies. The first process of a container becomes
// the parent of orphans, such as processes that a reload command started. Without a wait they stay
// zombies until no process can start any more. The daemon itself must not wait for them: it would
// take the exit status of its commands away from os/exec.
func runAsInit(ctx context.Context, p process) error {
	// Before the child starts, so that no signal is missed. A SIGCHLD that finds the channel full
	// is not needed: reap has yet to run for the one in it.
	children, signals := make(chan os.Signal, 1), make(chan os.Signal, 16)
	signal.Notify(children, syscall.SIGCHLD)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	path, err := os.Executable()
	pid := 0
	if err == nil {
		pid, err = syscall.ForkExec(path, append(os.Args[:1:1], p.args...), &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	}
	if err != nil {
		signal.Stop(children)
		signal.Stop(signals)
		fmt.Fprintf(p.stderr, "certctl-agent: runs as the first process of its container without reaping zombies: %v\n", err)
		return runDaemon(ctx, p)
	}
	for {
		select {
		case received := <-signals:
			// The pid is valid: only this loop waits for the child.
			_ = syscall.Kill(pid, received.(syscall.Signal))
		case <-children:
			if status, ended := reap(pid); ended {
				return status
			}
		}
	}
}

// reap waits for all processes that have ended. It reports whether pid was among them, and its exit
// status: 128 plus the signal's number if a signal ended it, as in shells.
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
