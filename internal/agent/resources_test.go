package agent

import (
	"slices"
	"testing"

	"certctl-agent/internal/api"
)

// A job takes everything it needs or nothing. A job that also needs another resource moves to that
// queue, and does not block the queue that it leaves.
func TestResources(t *testing.T) {
	r := make(resources)
	job := func(id, certificate, target string) *waitingJob {
		return &waitingJob{job: api.Job{ID: api.ID(id), CertificateID: api.ID(certificate), TargetID: api.ID(target)}}
	}
	first, other := job("1", "a", "x"), job("2", "b", "y")
	both, next := job("3", "a", "y"), job("4", "a", "z")
	for _, test := range []struct {
		w    *waitingJob
		want bool
	}{{first, true}, {other, true}, {both, false}, {next, false}} {
		if got := r.take(test.w); got != test.want {
			t.Errorf("take(%s) = %v, want %v", test.w.job.ID, got, test.want)
		}
	}
	for _, test := range []struct {
		w     *waitingJob
		needs []need
		want  []*waitingJob
	}{
		{other, []need{first.certificate()}, nil},                 // other does not hold it
		{first, []need{first.certificate()}, []*waitingJob{next}}, // both waits for y now
		{other, other.needs(), nil},                               // and then for a
		{next, next.needs(), []*waitingJob{both}},
		{first, first.needs(), nil},
		{both, both.needs(), nil},
	} {
		if got := r.release(test.w, test.needs...); !slices.Equal(got, test.want) {
			t.Errorf("release(%s, %v) made %d jobs ready, want %d", test.w.job.ID, test.needs, len(got), len(test.want))
		}
	}
	if len(r) > 0 {
		t.Errorf("left over: %v", r)
	}
}
