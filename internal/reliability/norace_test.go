//go:build !race

package reliability_test

// virtualRuns is the number of seeds that CI runs.
const virtualRuns = 1000

// traceStates is the number of states after a power cut that are recovered.
const traceStates = 1500
