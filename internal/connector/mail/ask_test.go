package mail

import (
	"context"
	"errors"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
)

// The error says why the server could not be asked, and names the
// overlay to use.
func TestMaskedAndNotToBeHad(t *testing.T) {
	tests := []struct {
		name  string
		typ   connector.Type
		query func(context.Context, policy.Command) ([]byte, error)
		says  string
	}{
		{"nobody to ask", Postfix(), nil, "postfix cannot be asked here"},
		{"Postfix without an answer", Postfix(), refuse, "ask postfix for its configuration: exit status 1"},
		{"Postfix without overrides", Postfix(), func(ctx context.Context, c policy.Command) ([]byte, error) {
			if c.Argv[len(c.Argv)-1] == "-P" {
				return refuse(ctx, c)
			}
			return nil, nil
		}, "ask postfix for its configuration: exit status 1"},
		{"Dovecot without an answer", Dovecot(), refuse, "ask dovecot for its configuration: exit status 1"},
		{"Dovecot without a key", Dovecot(), func(context.Context, policy.Command) ([]byte, error) { return nil, nil }, "names no key for /etc/dovecot/certs/cert.pem"},
	}
	for _, test := range tests {
		host := conformance.NewHost(t, nil)
		host.Query = test.query
		_, err := host.Deploy(t.Context(), test.typ, map[string]any{"key_path": "********"}, host.Material(t, testca.Must(t)))
		if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), conformance.TargetID+".json") {
			t.Errorf("%s: got %v, want an error with %q and the overlay", test.name, err, test.says)
		}
	}
}

func refuse(context.Context, policy.Command) ([]byte, error) { return nil, errors.New("exit status 1") }
