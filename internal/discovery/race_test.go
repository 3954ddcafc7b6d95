//go:build race

package discovery

// many is fewer under the race detector, which makes JSON ten times slower.
const many = 5_000
