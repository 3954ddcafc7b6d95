//go:build !race

package transaction

const stride = 1
