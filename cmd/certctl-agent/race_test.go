//go:build race

package main

// raceEnabled tells that these tests run with the race detector, and so the
// agent that they start.
const raceEnabled = true
