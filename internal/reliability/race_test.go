//go:build race

package reliability_test

// virtualRuns is how many seeds run with the race detector, which makes each
// take four times as long. make test runs more without it.
const virtualRuns = 150

// traceStates is how many states of a power cut are recovered from.
const traceStates = 500
