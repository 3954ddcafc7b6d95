package agent

// resources maps each resource to the job that holds it; only one may at a time. A job takes
// everything that it needs at once. If other jobs hold some of it, the job takes nothing and queues
// for the first missing resource. So an event looks only at the heads of a few queues, however many
// jobs wait.
type resources map[need]*resource

// need names a resource.
type need struct {
	kind, id string
}

type resource struct {
	holder *waitingJob
	queue  []*waitingJob // first come, first served
}

// take gives a job everything it needs, or queues it and returns false.
func (r resources) take(w *waitingJob) (ok bool) {
	needs := w.needs()
	for _, n := range needs {
		if at := r[n]; at != nil && at.holder != w {
			at.queue = append(at.queue, w)
			return false
		}
	}
	for _, n := range needs {
		if r[n] == nil {
			r[n] = &resource{holder: w}
		}
	}
	return true
}

// release takes needs away from a job and returns the jobs that are ready now. If the first job in
// a queue still lacks another resource, it moves to that queue, and the next one is tried.
func (r resources) release(w *waitingJob, needs ...need) (ready []*waitingJob) {
	for _, n := range needs {
		if r[n] == nil || r[n].holder != w {
			continue
		}
		queue := r[n].queue
		delete(r, n)
		for i, next := range queue {
			queue[i] = nil // so that it can be freed
			if r.take(next) {
				r[n].queue = queue[i+1:]
				ready = append(ready, next)
				break
			}
		}
	}
	return ready
}
