package reliability_test

import (
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// TestLostClaim shows a gap in the protocol. The answer to a poll is the claim. If it is lost, the
// jobs in it are Running for the control plane and unknown to the agent, and no call asks for them.
// They stay so for as long as the agent sends heartbeats, unless the control plane hands them out
// again under the same id.
func TestLostClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, []server{{id: "web", cert: "cert"}})
		defer w.close()
		w.start()
		w.plane.StartIssuance("cert")
		w.waitUntilDone()

		job := w.plane.Redeploy("cert")[0]
		w.plane.Inject(devplane.Fault{Call: devplane.CallWork, LoseAnswer: true, Times: 1})
		time.Sleep(6 * time.Hour)
		lost, _ := w.plane.Job(job)
		if lost.Status != api.StatusRunning || lost.Handed != 1 || len(lost.History) != 2 {
			t.Errorf("hours after the loss: handed out %d times, %s", lost.Handed, history(lost))
		}
		if n, m := len(w.life.app.Ledger.Unfinished()), len(w.life.app.Ledger.Undelivered()); n+m != 0 {
			t.Errorf("the ledger has %d jobs and %d reports", n, m)
		}
		// Once an answer has arrived, the claim holds, whatever comes next.
		w.plane.Requeue(job)
		if err := w.plane.Wait(t.Context(), func() bool { j, _ := w.plane.Job(job); return j.Handed == 2 }); err != nil {
			t.Fatal(err)
		}
		w.crash()
		w.start()
		time.Sleep(10 * time.Minute)
		if again, _ := w.plane.Job(job); again.Status != api.StatusCompleted || again.Handed != 2 {
			t.Errorf("handed out again: %s", history(again))
		}
		w.terminate()
		w.report(t)
	})
}
