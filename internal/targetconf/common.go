package targetconf

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/tlsprobe"
)

type Common struct {
	Host     string `json:"host"`
	Hostname string `json:"hostname"`
	Target   string `json:"target"`
	Address  string `json:"address"`
	Port     int    `json:"port"`

	Verify           VerifyOptions `json:"post_deploy_verify"`
	VerifyAttempts   int           `json:"post_deploy_verify_attempts" default:"3"`
	VerifyBackoff    Duration      `json:"post_deploy_verify_backoff" default:"1s"`
	VerifyMaxBackoff Duration      `json:"post_deploy_verify_max_backoff" default:"16s"`

	CommandTimeout Duration `json:"command_timeout" default:"1m"`
	Retention      int      `json:"backup_retention"`
	DropRoot       bool     `json:"drop_root"`

	// ReplaceAny allows the target's files to replace files that hold
	// neither certificates nor keys. Only overlays can set it.
	ReplaceAny bool `json:"replace_any_file"`

	remote bool // see MarkRemote
}

// VerifyOptions configures the verification at the end of a transaction.
type VerifyOptions struct {
	Enabled    bool     `json:"enabled"`
	Endpoint   string   `json:"endpoint"` // host:port
	Timeout    Duration `json:"timeout" default:"10s"`
	ServerName string   `json:"server_name"`
	StartTLS   string   `json:"starttls"` // smtp, imap, pop3

	// ProxyProtocol means that the listener expects a PROXY protocol header first.
	ProxyProtocol bool `json:"proxy_protocol"`
}

// Limits of settings.
const (
	maxAttempts  = 100
	maxRetention = 1000

	// maxVerify bounds the verification as a whole, whatever attempts, timeout and back-off add up
	// to. Until it ends the new files are unproven, and other agents wait for their directories,
	// for at most ten minutes, of which two commands need a share. A server that does not use new
	// files after five minutes never will.
	maxVerify = 5 * time.Minute
)

func (c *Common) check() error {
	switch {
	case c.Port < 0 || c.Port > 65535:
		return Invalid("port", "expected 1 to 65535, got %d", c.Port)
	case c.VerifyAttempts < 0 || c.VerifyAttempts > maxAttempts:
		return Invalid("post_deploy_verify_attempts", "expected 1 to %d, got %d", maxAttempts, c.VerifyAttempts)
	case c.Retention < -1 || c.Retention > maxRetention:
		return Invalid("backup_retention", "expected -1 (none), 0 (the default) or up to %d, got %d", maxRetention, c.Retention)
	case c.Verify.StartTLS != "" && !slices.Contains([]string{"smtp", "imap", "pop3"}, c.Verify.StartTLS):
		return Invalid("post_deploy_verify.starttls", "expected smtp, imap or pop3, got %s", printable.Quote(c.Verify.StartTLS))
	case c.Verify.Endpoint == "":
		return c.needsEndpoint()
	case !c.Verify.Enabled && !c.remote:
		return nil
	}
	host, port, err := net.SplitHostPort(c.Verify.Endpoint)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 || host == "" {
		return Invalid("post_deploy_verify.endpoint", "expected host:port, got %s", printable.Quote(c.Verify.Endpoint))
	}
	return nil
}

func (c *Common) needsEndpoint() error {
	if c.Verify.Enabled && c.Endpoint() == nil {
		return Invalid("post_deploy_verify.endpoint", "is required when enabled is true: host:port")
	}
	return nil
}

// MarkRemote declares that the target is remote: host and port are its management address, and only
// post_deploy_verify.endpoint is the address that serves the certificate.
func (c *Common) MarkRemote() error {
	c.remote = true
	return c.check()
}

// Endpoint returns the address at which the target serves its certificate, or nil if the
// configuration does not contain it.
func (c *Common) Endpoint() *tlsprobe.Endpoint {
	if c.remote {
		return c.verifyEndpoint()
	}
	host := cmp.Or(c.Host, c.Hostname, c.Target, c.Address)
	if host == "" {
		return nil
	}
	host = strings.Trim(host, "[]") // a literal IPv6 address
	port := strconv.Itoa(cmp.Or(c.Port, 443))
	return &tlsprobe.Endpoint{
		Address:    net.JoinHostPort(host, port),
		ServerName: host,
		StartTLS:   cmp.Or(c.Verify.StartTLS, tlsprobe.GuessStartTLS(port)),

		ProxyProtocol: c.Verify.ProxyProtocol,
	}
}

// VerifiedAt returns the endpoint that must serve the certificate for the deployment to succeed, or
// nil if verification is off.
func (c *Common) VerifiedAt() *tlsprobe.Endpoint {
	if !c.Verify.Enabled {
		return nil
	}
	if c.Verify.Endpoint != "" {
		return c.verifyEndpoint()
	}
	endpoint := c.Endpoint()
	endpoint.ServerName = cmp.Or(c.Verify.ServerName, endpoint.ServerName)
	return endpoint
}

// verifyEndpoint returns post_deploy_verify.endpoint, or nil if it is not configured.
func (c *Common) verifyEndpoint() *tlsprobe.Endpoint {
	host, port, err := net.SplitHostPort(c.Verify.Endpoint)
	if err != nil {
		return nil
	}
	return &tlsprobe.Endpoint{
		Address:       c.Verify.Endpoint,
		ServerName:    cmp.Or(c.Verify.ServerName, host),
		StartTLS:      cmp.Or(c.Verify.StartTLS, tlsprobe.GuessStartTLS(port)),
		ProxyProtocol: c.Verify.ProxyProtocol,
	}
}

// Verifier returns a function that checks that the endpoint serves leaf, or nil if verification is
// off.
func (c *Common) Verifier(leaf *x509.Certificate) func(context.Context) error {
	at := c.VerifiedAt()
	if at == nil {
		return nil
	}
	endpoint := *at
	endpoint.KeyType = leaf.PublicKeyAlgorithm
	fingerprint := pemutil.Fingerprint(leaf)
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, maxVerify, fmt.Errorf("given up after %s, the limit for all attempts", maxVerify))
		defer cancel()
		attempts, pause, most := c.VerifyAttempts, time.Duration(c.VerifyBackoff), time.Duration(c.VerifyMaxBackoff)
		for attempt := 1; ; attempt++ {
			err := c.probe(ctx, endpoint, fingerprint)
			if err == nil {
				return nil
			}
			if attempt < attempts {
				select {
				case <-time.After(min(pause, most)):
					pause = min(2*pause, most)
					continue
				case <-ctx.Done():
					err = fmt.Errorf("%w; %w", err, context.Cause(ctx))
				}
			}
			return fmt.Errorf("verify %s, attempt %d of %d: %w", endpoint.Address, attempt, attempts, err)
		}
	}
}

func (c *Common) probe(ctx context.Context, endpoint tlsprobe.Endpoint, fingerprint string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(c.Verify.Timeout))
	defer cancel()
	result, err := tlsprobe.Probe(ctx, endpoint)
	if err != nil {
		return err
	}
	if result.Fingerprint != fingerprint {
		return fmt.Errorf("it serves the certificate %s, not %s", result.Fingerprint, fingerprint)
	}
	return nil
}
