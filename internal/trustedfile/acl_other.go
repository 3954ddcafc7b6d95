//go:build !linux

package trustedfile

// hasACL returns false: on other systems an access control list does not change the mode bits.
func hasACL(string) bool { return false }
