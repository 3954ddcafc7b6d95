//go:build !linux

package trustedfile

// hasACL reports false: elsewhere a list does not show in the bits of the mode.
func hasACL(string) bool { return false }
