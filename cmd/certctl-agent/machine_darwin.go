package main

import "syscall"

// machineID identifies this machine: the UUID of its hardware.
func machineID() string {
	id, err := syscall.Sysctl("kern.uuid")
	if err != nil {
		return ""
	}
	return id
}
