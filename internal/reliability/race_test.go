//go:build race

package reliability_test

// Sizes of the random tests with the race detector, which makes a virtual run four times slower.
// CI runs more of those without it.
const (
	virtualRuns = 150
	processRuns = 24
	traceStates = 500 // those that lost most come first
)
