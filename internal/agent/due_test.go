package agent

import (
	"slices"
	"testing"
	"time"
)

func TestDueQueue(t *testing.T) {
	start := time.Now()
	at := func(seconds int) *pacedDelivery {
		return &pacedDelivery{timed: timed{start.Add(time.Duration(seconds) * time.Second)}}
	}
	a, b, c, d := at(1), at(2), at(2), at(3)
	var q dueQueue[*pacedDelivery]
	for _, p := range []*pacedDelivery{d, b, a, c} {
		q.add(p)
	}
	q.remove(d)
	q.remove(d)
	q.add(d)
	if got := q.take(start); len(got) > 0 {
		t.Errorf("took %d before they are due", len(got))
	}
	if got, want := q.take(b.due), []*pacedDelivery{a, b, c}; !slices.Equal(got, want) {
		t.Errorf("took %v, want %v", got, want)
	}
	if len(q) != 1 || q[0] != d {
		t.Errorf("%v is left, want %v", q, d)
	}
}
