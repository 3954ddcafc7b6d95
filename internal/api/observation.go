package api

import "time"

// Observation is what one call showed of the control plane.
type Observation struct {
	Call     string    // as in StatusError
	Date     time.Time // the control plane's clock; zero if there was no answer, or no Date in it
	Received time.Time // this host's clock when the answer began; zero if there was none
	Err      error     // how the call ended
}
