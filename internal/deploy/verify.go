package deploy

import (
	"context"
	"crypto/x509"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/printable"
)

const (
	// verifyBudget is how long a server may take to serve a certificate that
	// it was told to load.
	verifyBudget = 10 * time.Second

	// verifyPause is the wait between two looks: most servers are done within
	// the first.
	verifyPause = 250 * time.Millisecond
)

// verify looks at what the target serves until that is the new certificate or
// the budget is spent. Nil where there is nothing to look at or to say.
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
			// The host may be a proxy's, which sends the header itself.
			endpoint.ProxyProtocol = a.serves.ProxyProtocol && !endpoint.ProxyProtocol
			// The end of the budget cuts a look short; an earlier one said more.
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
				return nil // the agent stops: that the server was slow is not known
			}
			a.log.Warn("the live endpoint does not serve the deployed certificate",
				"endpoint", endpoint.Address, "expected", report.ExpectedFingerprint, "actual", report.ActualFingerprint, "error", report.Error)
			return report
		}
	}
}
