package transaction

import ()

import ()

func childParts() map[string]func() int {
	return map[string]func() int{"kill": childKill, "lock": childLock, "deploy": childDeploy, "hostile": childHostile}
}
