//go:build race

package discovery

// many is smaller under the race detector, which makes JSON ten times slower.
const many = 5_000
