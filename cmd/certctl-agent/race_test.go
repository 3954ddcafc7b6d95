//go:build race

package main

// raceEnabled reports whether these tests, and the agent that they start, use the race detector.
const raceEnabled = true
