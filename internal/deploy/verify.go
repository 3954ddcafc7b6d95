package deploy

import (
	"context"
	"crypto/x509"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/printable"
)

const (
	// verifyBudget is how long a server may take after a reload to serve the new certificate.
	verifyBudget = 10 * time.Second

	// verifyPause is the pause between two probes. Most servers are ready after one pause.
	verifyPause = 250 * time.Millisecond
)

// verify probes the target until it serves the new certificate or the budget is spent. It returns
// nil if there is nothing to verify, or if the agent stops first.
func (a *attempt) verify(ctx context.Context, leaf *x509.Certificate) *api.Verification {
	if !a.o.Verify || a.serves == nil {
		return nil
	}
	endpoint := *a.serves
	endpoint.KeyType = leaf.PublicKeyAlgorithm
	report := &api.Verification{TargetID: a.job.TargetID, ExpectedFingerprint: a.outcome.Fingerprint}
	budget, cancel := context.WithTimeout(ctx, verifyBudget)
	defer cancel()
	for {
		result, err := a.o.Probe(budget, endpoint)
		switch {
		case err == nil:
			report.ActualFingerprint, report.Error = result.Fingerprint, ""
		case budget.Err() == nil || report.ActualFingerprint == "":
			// The endpoint may be a proxy, which sends the PROXY header to the server itself. Try
			// the next probe without it.
			endpoint.ProxyProtocol = a.serves.ProxyProtocol && !endpoint.ProxyProtocol
			// Keep the result of an earlier probe if only the end of the budget cut this one short.
			report.ActualFingerprint, report.Error = api.Unreachable, printable.Line(err.Error(), maxError)
		}
		if report.ActualFingerprint == report.ExpectedFingerprint {
			report.Verified = true
			return report
		}
		select {
		case <-time.After(verifyPause):
		case <-budget.Done():
			if ctx.Err() != nil {
				return nil // the agent stops, so the server may just have needed more time
			}
			a.log.Warn("the live endpoint does not serve the deployed certificate",
				"endpoint", endpoint.Address, "expected", report.ExpectedFingerprint, "actual", report.ActualFingerprint, "error", report.Error)
			return report
		}
	}
}
