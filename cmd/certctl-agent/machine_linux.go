package main

import "os"

// machineID identifies this machine by machine-id(5). It returns "" if there is none, as in a
// container.
func machineID() string {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		return ""
	}
	return string(id)
}
