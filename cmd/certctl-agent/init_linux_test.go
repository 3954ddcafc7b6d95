package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
)

// startAsInit starts the daemon as the first process of a PID namespace, as container engines do.
func (h *host) startAsInit() *child {
	h.t.Helper()
	c := &child{h: h, cmd: exec.Command(h.binary), output: h.newOutput(), exited: make(chan struct{})}
	c.cmd.Env = h.environment(nil)
	c.cmd.Dir = h.dir
	c.cmd.Stdout, c.cmd.Stderr = c.output, c.output
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if err := c.cmd.Start(); err != nil {
		needs.Missing(h.t, "cannot create a PID namespace: "+err.Error())
	}
	go func() {
		c.cmd.Wait()
		close(c.exited)
	}()
	h.t.Cleanup(func() {
		c.cmd.Process.Kill()
		<-c.exited
	})
	return c
}

// processOf finds a process by a word of its command line. It returns 0 if there is none.
func processOf(word string) (pid int) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		line, _ := os.ReadFile(path)
		for argument := range bytes.SplitSeq(line, []byte{0}) {
			if string(argument) == word {
				pid, _ = strconv.Atoi(filepath.Base(filepath.Dir(path)))
			}
		}
	}
	return pid
}

// parentOf returns the parent of a process and its state, "Z" for a zombie.
func parentOf(pid int) (parent int, state string) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := bytes.Cut(text, []byte(") "))
	fields := strings.Fields(string(rest))
	if len(fields) < 2 {
		return 0, ""
	}
	parent, _ = strconv.Atoi(fields[1])
	return parent, fields[0]
}

// childOf finds a process by its parent.
func childOf(parent int) (pid int) {
	found, _ := filepath.Glob("/proc/[0-9]*")
	for _, path := range found {
		if of, err := strconv.Atoi(filepath.Base(path)); err == nil {
			if its, _ := parentOf(of); its == parent {
				pid = of
			}
		}
	}
	return pid
}

// TestFirstProcess: in a container, orphans of commands do not stay zombies, commands keep their
// exit status, and signals reach the daemon.
func TestFirstProcess(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	orphan := h.write("orphan.sh", fmt.Sprintf("while [ -e %s/stay ]; do sleep 0.02; done\n", h.dir), 0o644)
	h.write("stay", "", 0o600)
	h.write("reload.sh", fmt.Sprintf("/bin/sh %s </dev/null >/dev/null 2>&1 &\n%s", orphan, h.script("reload")), 0o644)
	agent := h.startAsInit()
	agent.waitLog("first heartbeat accepted")
	certificate := h.certificate()
	h.plane.StartIssuance(certificate)
	h.waitDeployment(certificate, 1, api.StatusCompleted)
	pid := processOf(orphan)
	if parent, state := parentOf(pid); parent != agent.cmd.Process.Pid {
		t.Fatalf("process %d has the parent %d and the state %q, want the first process, %d", pid, parent, state, agent.cmd.Process.Pid)
	}
	if err := os.Remove(h.path("stay")); err != nil {
		t.Fatal(err)
	}
	h.waitFor("the end of what the command left behind", func() bool {
		parent, _ := parentOf(pid)
		return parent != agent.cmd.Process.Pid
	})

	h.write("validate.sh", "exit 3\n", 0o644)
	h.plane.StartRenewal(certificate)
	if job := h.waitDeployment(certificate, 2, api.StatusFailed); !strings.Contains(job.Error, "exit status 3") {
		t.Errorf("the error is %q, want the exit status", job.Error)
	}
	agent.signal(syscall.SIGHUP)
	agent.waitLog("reloaded: API key")
	agent.stop()
	agent.waitLog("stopped", "asked to")

	// Each signal that ends the daemon reaches it, and its end is the exit status.
	h.env["GOTRACEBACK"] = "none"
	for signal, want := range map[syscall.Signal]int{syscall.SIGINT: exitOK, syscall.SIGQUIT: 2, syscall.SIGKILL: 128 + 9} {
		agent := h.startAsInit()
		agent.waitLog("first heartbeat accepted")
		if signal == syscall.SIGKILL {
			pid := childOf(agent.cmd.Process.Pid)
			if pid == 0 {
				t.Fatal("the first process has no child")
			}
			syscall.Kill(pid, signal)
		} else {
			agent.signal(signal)
		}
		if got := agent.wait(); got != want {
			t.Errorf("%v: exit code %d, want %d", signal, got, want)
		}
	}

	// The exit status is the daemon's.
	h.env["CERTCTL_AGENT_ID"] = ""
	refused := h.startAsInit()
	refused.wantExit(exitFailure)
	if !strings.Contains(refused.output.String(), "CERTCTL_AGENT_ID") {
		t.Errorf("it said\n%s", refused.output)
	}
}
