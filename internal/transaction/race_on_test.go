//go:build race

package transaction

import ()

import ()

// stride thins out the enumerations: they run one thing at a time, so the race
// detector only makes them slow.
const stride = 8
