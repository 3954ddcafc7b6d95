package main

import "syscall"

// machineID identifies this machine: the UUID of its hardware.
func machineID() string {
	id, _ := syscall.Sysctl("kern.uuid") // "" with an error
	return id
}
