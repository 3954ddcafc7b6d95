package main

import "syscall"

// machineID returns the UUID of this machine's hardware.
func machineID() string {
	id, _ := syscall.Sysctl("kern.uuid") // "" after an error
	return id
}
