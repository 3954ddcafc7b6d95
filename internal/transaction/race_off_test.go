//go:build !race

package transaction

import ()

import ()

const stride = 1
