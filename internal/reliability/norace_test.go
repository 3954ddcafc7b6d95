//go:build !race

package reliability_test

// virtualRuns is how many seeds CI runs.
const virtualRuns = 1000

// traceStates is how many states of a power cut are recovered from.
const traceStates = 1500
