//go:build race

package reliability_test

// How much of each random test runs with the race detector, which makes a
// virtual run take four times as long. CI runs more of those without it.
const (
	virtualRuns = 150
	processRuns = 24
	traceStates = 500 // those with most lost come first
)
