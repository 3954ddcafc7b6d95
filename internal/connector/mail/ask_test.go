package mail

import (
	"context"
	"errors"
	"strings"
	"testing"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
)

func TestQuery(t *testing.T) {
	tests := []struct{ reload, validate, want string }{
		{"postfix reload", "postfix check", "postconf -P"},
		{"systemctl reload postfix", "/usr/sbin/postfix -c /etc/x check", "/usr/sbin/postconf -c /etc/x -P"},
		{"/opt/postfix -c/etc/y -v reload", "postfix -c /etc/x check", "/opt/postconf -c /etc/y -P"},
		{"sudo -n postfix reload", "true", "sudo -n postconf -P"},
		{"systemctl reload postfix", "true", ""},
	}
	for _, test := range tests {
		var got string
		c := &Connector{validate: &policy.Command{Argv: strings.Fields(test.validate)}, reload: &policy.Command{Argv: strings.Fields(test.reload)}}
		c.params.Query = func(_ context.Context, command policy.Command) ([]byte, error) {
			got = strings.Join(command.Argv, " ")
			return nil, nil
		}
		_, err := c.query(t.Context(), "postconf", []string{"postfix"}, "-P")
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%q and %q: got %q, %v, want %q", test.reload, test.validate, got, err, test.want)
		}
	}
}

// Whatever keeps the server from being asked is in the error, which names the
// overlay that helps.
func TestMaskedAndNotToBeHad(t *testing.T) {
	tests := []struct {
		name  string
		build conformance.New
		query func(context.Context, policy.Command) ([]byte, error)
		says  string
	}{
		{"nobody to ask", buildPostfix, nil, "postfix cannot be asked here"},
		{"Postfix without an answer", buildPostfix, refuse, "ask postfix for its configuration: exit status 1"},
		{"Postfix without overrides", buildPostfix, func(ctx context.Context, c policy.Command) ([]byte, error) {
			if c.Argv[len(c.Argv)-1] == "-P" {
				return refuse(ctx, c)
			}
			return nil, nil
		}, "ask postfix for its configuration: exit status 1"},
		{"Dovecot without an answer", buildDovecot, refuse, "ask dovecot for its configuration: exit status 1"},
		{"Dovecot without a key", buildDovecot, func(context.Context, policy.Command) ([]byte, error) { return nil, nil }, "names no key for /etc/dovecot/certs/cert.pem"},
	}
	for _, test := range tests {
		host := conformance.NewHost(t, nil)
		host.Query = test.query
		_, err := host.Deploy(t.Context(), "any", test.build, map[string]any{"key_path": "********"}, nil)
		if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), conformance.TargetID+".json") {
			t.Errorf("%s: got %v, want an error with %q and the overlay", test.name, err, test.says)
		}
	}
}

func refuse(context.Context, policy.Command) ([]byte, error) { return nil, errors.New("exit status 1") }
