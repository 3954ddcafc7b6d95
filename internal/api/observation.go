package api

import "time"

// Observation is what one call revealed about the control plane.
type Observation struct {
	Call     string    // as in StatusError
	Date     time.Time // the answer's Date header; zero if there was none
	Received time.Time // when the answer began, by this host's clock; zero if there was none
	Err      error     // how the call ended
}
