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

// Common is the part of a target's configuration that all types share.
type Common struct {
	Host     string `json:"host"`
	Hostname string `json:"hostname"`
	Target   string `json:"target"`
	Address  string `json:"address"`
	Port     int    `json:"port"`

	Check           VerifyOptions `json:"post_deploy_verify"`
	CheckAttempts   int           `json:"post_deploy_verify_attempts"`
	CheckBackoff    Duration      `json:"post_deploy_verify_backoff"`
	CheckMaxBackoff Duration      `json:"post_deploy_verify_max_backoff"`

	CommandTimeout Duration `json:"command_timeout"`
	Retention      int      `json:"backup_retention"`
	DropRoot       bool     `json:"drop_root"`

	// ReplaceAny lets the target's files take the place of files that hold
	// neither certificates nor keys. Merge takes it from overlays alone.
	ReplaceAny bool `json:"replace_any_file"`
}

// VerifyOptions is the check that is part of the transaction.
type VerifyOptions struct {
	Enabled    bool     `json:"enabled"`
	Endpoint   string   `json:"endpoint"` // host:port
	Timeout    Duration `json:"timeout"`
	ServerName string   `json:"server_name"`
	StartTLS   string   `json:"starttls"` // smtp, imap, pop3

	// ProxyProtocol says that the listener expects a header of the PROXY
	// protocol before anything else.
	ProxyProtocol bool `json:"proxy_protocol"`
}

// Defaults and bounds.
const (
	defaultCommandTimeout = time.Minute
	defaultVerifyTimeout  = 10 * time.Second
	defaultAttempts       = 3
	defaultBackoff        = time.Second
	defaultMaxBackoff     = 16 * time.Second
	maxAttempts           = 100

	// maxVerify bounds the check as a whole, whatever attempts, timeout and
	// backoff add up to. The new files are unproven meanwhile, and others wait
	// for their directories: another agent for ten minutes, which two commands
	// need a share of. A server that does not use what it was told to load five
	// minutes ago will not.
	maxVerify = 5 * time.Minute

	maxRetention = 1000
)

// DecodeCommon takes the keys that all types share.
func DecodeCommon(c *Config) (Common, error) {
	var common Common
	if err := c.Decode(&common); err != nil {
		return Common{}, err
	}
	return common, common.check()
}

func (c *Common) check() error {
	switch {
	case c.Port < 0 || c.Port > 65535:
		return Invalid("port", "expected 1 to 65535, got %d", c.Port)
	case c.CheckAttempts < 0 || c.CheckAttempts > maxAttempts:
		return Invalid("post_deploy_verify_attempts", "expected 1 to %d, got %d", maxAttempts, c.CheckAttempts)
	case c.Retention < -1 || c.Retention > maxRetention:
		return Invalid("backup_retention", "expected -1 (none), 0 (the default) or up to %d, got %d", maxRetention, c.Retention)
	case c.Check.StartTLS != "" && !slices.Contains([]string{"smtp", "imap", "pop3"}, c.Check.StartTLS):
		return Invalid("post_deploy_verify.starttls", "expected smtp, imap or pop3, got %s", printable.Quote(c.Check.StartTLS))
	case !c.Check.Enabled:
		return nil
	case c.Check.Endpoint == "":
		if _, ok := c.Endpoint(); !ok {
			return Invalid("post_deploy_verify.endpoint", "is required when enabled is true: host:port")
		}
		return nil
	}
	host, port, err := net.SplitHostPort(c.Check.Endpoint)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 || host == "" {
		return Invalid("post_deploy_verify.endpoint", "expected host:port, got %s", printable.Quote(c.Check.Endpoint))
	}
	return nil
}

// CommandDeadline is how long a command of this target may take.
func (c *Common) CommandDeadline() time.Duration { return c.CommandTimeout.Or(defaultCommandTimeout) }

// Endpoint is what the target serves its certificate at, for the report to the
// control plane; false when the configuration does not say.
func (c *Common) Endpoint() (tlsprobe.Endpoint, bool) {
	host := cmp.Or(c.Host, c.Hostname, c.Target, c.Address)
	if host == "" {
		return tlsprobe.Endpoint{}, false
	}
	host = strings.Trim(host, "[]") // of a literal IPv6 address
	port := strconv.Itoa(cmp.Or(c.Port, 443))
	return tlsprobe.Endpoint{
		Address:    net.JoinHostPort(host, port),
		ServerName: host,
		StartTLS:   cmp.Or(c.Check.StartTLS, tlsprobe.GuessStartTLS(port)),

		ProxyProtocol: c.Check.ProxyProtocol,
	}, true
}

// Verify is the check that is part of the transaction: the endpoint must serve
// leaf. Nil when it is off.
func (c *Common) Verify(leaf *x509.Certificate) func(context.Context) error {
	if !c.Check.Enabled {
		return nil
	}
	endpoint, _ := c.Endpoint()
	if c.Check.Endpoint != "" {
		host, port, _ := net.SplitHostPort(c.Check.Endpoint)
		endpoint = tlsprobe.Endpoint{Address: c.Check.Endpoint, ServerName: host, StartTLS: cmp.Or(c.Check.StartTLS, tlsprobe.GuessStartTLS(port))}
	}
	endpoint.ServerName = cmp.Or(c.Check.ServerName, endpoint.ServerName)
	endpoint.KeyType, endpoint.ProxyProtocol = leaf.PublicKeyAlgorithm, c.Check.ProxyProtocol
	fingerprint := pemutil.Fingerprint(leaf)
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, maxVerify, fmt.Errorf("given up after %s, the most that it may take in all", maxVerify))
		defer cancel()
		attempts := cmp.Or(c.CheckAttempts, defaultAttempts)
		pause, most := c.CheckBackoff.Or(defaultBackoff), c.CheckMaxBackoff.Or(defaultMaxBackoff)
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
	ctx, cancel := context.WithTimeout(ctx, c.Check.Timeout.Or(defaultVerifyTimeout))
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
