//go:build !race

package reliability_test

// How much of each random test runs; make hunt runs more.
const (
	virtualRuns = 300
	processRuns = 12
	traceStates = 500 // those with most lost come first
)
