//go:build !race

package reliability_test

// Sizes of the random tests. "make hunt" runs more.
const (
	virtualRuns = 300
	processRuns = 12
	traceStates = 500 // those that lost most come first
)
