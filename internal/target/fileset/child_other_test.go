//go:build !linux

package fileset

func childParts() map[string]func() int {
	return map[string]func() int{"kill": childKill, "lock": childLock}
}
