//go:build !race

package reliability_test

// virtualRuns is how many seeds CI runs.
const virtualRuns = 1000
