//go:build !race

package discovery

const many = 50_000
