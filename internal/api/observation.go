package api

import "time"

// Observation is what one call told about the control plane, whoever made it.
type Observation struct {
	Call     string    // as in StatusError
	Date     time.Time // the control plane's clock; zero if the answer did not tell, or none came
	Received time.Time // this host's clock when the answer began; zero if none came
	Err      error     // how the call ended
}
