//go:build race

package transaction

import ()

import ()

// stride makes the enumerations skip cases: they are not concurrent, so the race detector only
// slows them down.
const stride = 8
