package agent

// lines is who has what only one job at a time may have, and who waits for it. A
// job takes all that it needs at once. While another has some of that, it stands in
// line for the first such thing and takes nothing. So an event looks at the heads of
// a few lines, however many jobs wait.
type lines map[need]*line

// need is something that one job at a time has.
type need struct {
	kind, id string
}

type line struct {
	by   *waitingJob
	jobs []*waitingJob // that wait, the first come first
}

// take gives a job what it needs and does not have yet, or puts it in line.
func (l lines) take(w *waitingJob) (ok bool) {
	needs := w.needs()
	for _, n := range needs {
		if at := l[n]; at != nil && at.by != w {
			at.jobs = append(at.jobs, w)
			return false
		}
	}
	for _, n := range needs {
		if l[n] == nil {
			l[n] = &line{by: w}
		}
	}
	return true
}

// release takes from a job what it has of needs, and returns the jobs that have what
// they need now. The first in line that needs something else, too, waits for that
// from now on, and lets the next go first.
func (l lines) release(w *waitingJob, needs ...need) (ready []*waitingJob) {
	for _, n := range needs {
		if l[n] == nil || l[n].by != w {
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
