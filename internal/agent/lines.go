package agent

// lines are the queues for resources that only one job at a time may hold. A job takes everything
// that it needs at once. If other jobs hold some of it, the job takes nothing and queues for the
// first missing resource. So an event looks only at the heads of a few queues, however many jobs
// wait.
type lines map[need]*line

// need is a resource that only one job at a time may hold.
type need struct {
	kind, id string
}

type line struct {
	holder *waitingJob   // has the resource
	jobs   []*waitingJob // wait for it, first come, first served
}

// take gives a job everything it needs, or queues it and returns false.
func (l lines) take(w *waitingJob) (ok bool) {
	needs := w.needs()
	for _, n := range needs {
		if at := l[n]; at != nil && at.holder != w {
			at.jobs = append(at.jobs, w)
			return false
		}
	}
	for _, n := range needs {
		if l[n] == nil {
			l[n] = &line{holder: w}
		}
	}
	return true
}

// release takes needs away from a job and returns the jobs that are ready now. If the first job in
// a queue still lacks another resource, it moves to that queue, and the next one is tried.
func (l lines) release(w *waitingJob, needs ...need) (ready []*waitingJob) {
	for _, n := range needs {
		if l[n] == nil || l[n].holder != w {
			continue
		}
		jobs := l[n].jobs
		delete(l, n)
		for i, next := range jobs {
			jobs[i] = nil // so that it can be freed
			if l.take(next) {
				l[n].jobs = jobs[i+1:]
				ready = append(ready, next)
				break
			}
		}
	}
	return ready
}
