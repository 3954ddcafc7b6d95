package main

import "os"

// machineID identifies this machine; "" where nothing does, such as in a
// container. See machine-id(5).
func machineID() string {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		return ""
	}
	return string(id)
}
