//go:build !linux

package config

// hasACL reports false: elsewhere a list does not show in the bits of the mode.
func hasACL(string) bool { return false }
