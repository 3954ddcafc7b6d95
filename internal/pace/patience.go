package pace

import (
	"time"

	"certctl-agent/internal/api"
)

// A refusal has lasted, and is believed, after this long and this many tries:
// longer than a gateway takes to find what is behind it again.
const (
	lastingTime  = 10 * time.Minute
	lastingTries = 4
)

// Patience tells a refusal that lasts from one that passes. Each request that
// is tried again has one of its own. It is not kept across a restart, which only
// makes the wait longer.
type Patience struct {
	since time.Time // of the first of the refusals in a row
	tries int
}

// Lost records how a try ended, and reports whether there is no point in
// another one. Any other outcome than a doubtful refusal starts over.
func (p *Patience) Lost(err error) bool { return p.Lasts(api.Doubtful(err)) }

// Lasts is Lost for callers with a rule of their own for what is doubtful.
func (p *Patience) Lasts(doubtful bool) bool {
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
