package status

import (
	"fmt"
	"reflect"
	"testing"
	"time"
)

func TestCounters(t *testing.T) {
	c := busy().Counters
	if got, want := fmt.Sprint(c.Failures, c.RateLimited, c.CSRs), "map[heartbeat:map[network:2] poll:map[denied:1]] map[poll:1] map[accepted:1]"; got != want {
		t.Errorf("counters %s, want %s", got, want)
	}
	nginx := c.Deployments["NGINX"]
	if got, want := fmt.Sprint(nginx.Outcomes, nginx.Seconds), "map[Completed:1 Failed:1] "+
		"{2 62.3 [{0.1 0} {0.25 0} {0.5 0} {1 0} {2.5 1} {5 1} {10 1} {30 1} {60 1} {120 2} {300 2}]}"; got != want {
		t.Errorf("deployments %s, want %s", got, want)
	}
}

func TestCloneStands(t *testing.T) {
	c := busy().Counters
	clone, want := c.Clone(), busy().Counters
	c.Failure(Heartbeat, "network")
	c.Failure(Delivery, "network")
	c.Failure(Poll, "rate_limited")
	c.CSR("accepted")
	c.Job("NGINX", "Completed", time.Second)
	if !reflect.DeepEqual(clone, want) {
		t.Errorf("the clone has changed: %+v", clone)
	}
	var zero Counters
	if got := zero.Clone(); !reflect.DeepEqual(got, Counters{}) {
		t.Errorf("clone of the zero value: %+v", got)
	}
}

func TestTargetTypesAreBounded(t *testing.T) {
	var c Counters
	for i := range 10 * maxTypes {
		c.Job(fmt.Sprint("type", i), "Failed", 0)
	}
	if got := len(c.Deployments); got != maxTypes+1 {
		t.Errorf("%d target types, want %d", got, maxTypes+1)
	}
	if got := c.Deployments[otherType].Seconds.Count; got != 9*maxTypes {
		t.Errorf("%d of other types, want %d", got, 9*maxTypes)
	}
}
