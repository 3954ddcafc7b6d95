package agent

import (
	"slices"
	"sort"
	"time"
)

// timed is part of what a dueQueue holds.
type timed struct{ due time.Time }

func (t *timed) when() time.Time { return t.due }

// dueQueue is sorted, the first due first. What is in it keeps its time.
type dueQueue[T interface {
	comparable
	when() time.Time
}] []T

// add adds x behind those that are due by then.
func (q *dueQueue[T]) add(x T) { *q = slices.Insert(*q, q.due(x.when()), x) }

// due counts those that are due.
func (q *dueQueue[T]) due(now time.Time) int {
	return sort.Search(len(*q), func(i int) bool { return (*q)[i].when().After(now) })
}

// take removes those that are due, and returns them.
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
