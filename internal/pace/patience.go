package pace

import "time"

// A doubtful refusal counts as final after this long and this many tries: longer than a gateway
// answers for a control plane that restarts.
const (
	lastingTime  = 10 * time.Minute
	lastingTries = 4
)

// Patience decides when to stop retrying a doubtful refusal (see api.Doubtful). Each retried
// request has its own. It is not kept across a restart, which only makes the wait longer.
type Patience struct {
	since time.Time // of the first refusal in a row
	tries int
}

// Exhausted records whether a try ended with a doubtful refusal, and reports whether to give up. Any
// other outcome starts over.
func (p *Patience) Exhausted(doubtful bool) bool {
	if !doubtful {
		*p = Patience{}
		return false
	}
	if p.tries == 0 {
		p.since = time.Now()
	}
	p.tries++
	return p.tries >= lastingTries && time.Since(p.since) >= lastingTime
}
