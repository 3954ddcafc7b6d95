//go:build race

package reliability_test

// virtualRuns is the number of seeds that run with the race detector, which makes each four times
// slower. "make test" runs more without it.
const virtualRuns = 150

// traceStates is the number of states after a power cut that are recovered.
const traceStates = 500
