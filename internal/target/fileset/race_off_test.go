//go:build !race

package fileset

const stride = 1
