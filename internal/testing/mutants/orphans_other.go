//go:build !linux

package main

import "syscall"

func adoptOrphans() error { return nil }

func isolated() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

func killOrphans() {}
