package agent

import (
	"slices"
	"sort"
	"time"
)

// timed is embedded in the elements of a dueQueue.
type timed struct{ due time.Time }

func (t *timed) when() time.Time { return t.due }

// dueQueue is sorted by time, the earliest first. An element's time must not change while it is in
// the queue.
type dueQueue[T interface {
	comparable
	when() time.Time
}] []T

// add adds x, behind elements with the same time.
func (q *dueQueue[T]) add(x T) { *q = slices.Insert(*q, q.due(x.when()), x) }

// due returns how many elements are due.
func (q *dueQueue[T]) due(now time.Time) int {
	return sort.Search(len(*q), func(i int) bool { return (*q)[i].when().After(now) })
}

// take removes and returns the elements that are due.
func (q *dueQueue[T]) take(now time.Time) []T {
	n := q.due(now)
	taken := slices.Clone((*q)[:n])
	*q = slices.Delete(*q, 0, n)
	return taken
}

// remove removes x, if it is there.
func (q *dueQueue[T]) remove(x T) {
	if i := slices.Index(*q, x); i >= 0 {
		*q = slices.Delete(*q, i, i+1)
	}
}
