package windows

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/trustedfile"
	"certctl-agent/internal/winrm"
)

// settings are the host and account to log on with.
type settings struct {
	Host     string             `json:"winrm_host"`
	Port     int                `json:"winrm_port"`
	HTTPS    *bool              `json:"winrm_https"`
	Username string             `json:"winrm_username"`
	Password secret.String      `json:"winrm_password"`
	Auth     string             `json:"winrm_auth" default:"ntlm"`
	CertPath targetconf.Path    `json:"winrm_cert_path"` // of auth certificate
	KeyPath  targetconf.Path    `json:"winrm_key_path"`
	Insecure bool               `json:"winrm_insecure"`
	Timeout  targetconf.Seconds `json:"winrm_timeout" default:"60"` // limit of each call
}

// trust is how to authenticate the host.
type trust struct {
	CAFile      targetconf.Path `json:"ca_bundle"`
	Fingerprint string          `json:"server_fingerprint"`
}

// Ports of WinRM.
const (
	portHTTP  = 5985
	portHTTPS = 5986
)

// https reports whether to use TLS: always, unless the configuration turns it off or has the port
// of plain HTTP.
func (s *settings) https() bool {
	if s.HTTPS != nil {
		return *s.HTTPS
	}
	return s.Port != portHTTP
}

func (s *settings) port() int {
	if s.https() {
		return cmp.Or(s.Port, portHTTPS)
	}
	return cmp.Or(s.Port, portHTTP)
}

// inObject and atTop are the places of the settings in a configuration.
const (
	inObject = "winrm"
	atTop    = ""
)

// owner knows which settings the owner of this host chose in overlays.
type owner struct {
	*targetconf.Config
	in    string
	named bool // the host was named on the command line
}

func (o owner) name(key string) string {
	if o.in == atTop {
		return key
	}
	return o.in + "." + key
}

func (o owner) chose(key string) bool {
	if o.in != atTop {
		return o.Local(o.in)
	}
	return o.Local(key) || o.Local(key+"_file")
}

func (o owner) invalid(key, format string, args ...any) error {
	return targetconf.Invalid(o.name(key), format, args...)
}

// remote is a Windows host.
type remote struct {
	at       *connector.Peer
	runner   runner
	deadline time.Duration // limit of the script
	warnings []string
}

// open returns the host after all checks that need no connection.
func open(c *targetconf.Config, host connector.Host, s *settings, common *common, in string, connect connects) (*remote, error) {
	o := owner{Config: c, in: in}
	if err := targetconf.Join(s.checkLogon(o), s.checkTrust(o, &common.trust)); err != nil {
		return nil, err
	}
	return s.connect(o, host, common, connect)
}

func (s *settings) checkLogon(o owner) error {
	var errs []error
	if s.Host == "" {
		errs = append(errs, o.invalid("winrm_host", "is required"))
	} else if !connector.IsHost(strings.Trim(s.Host, "[]")) {
		errs = append(errs, o.invalid("winrm_host", "expected a host name or an address without a zone, got %s", printable.Quote(s.Host)))
	}
	switch s.Auth {
	case winrm.NTLM, winrm.Basic:
		if s.Username == "" {
			errs = append(errs, o.invalid("winrm_username", "is required"))
		}
		switch password := s.Password.Reveal(); {
		case password == "":
			errs = append(errs, o.invalid("winrm_password", "is required"))
		case len(password) >= 8 && strings.Trim(password, "*") == "":
			errs = append(errs, o.invalid("winrm_password", "the control plane sent it masked, so this host must supply it: put it into the target's overlay in CERTCTL_TARGETS_DIR"))
		}
	case winrm.Certificate:
		for key, path := range map[string]targetconf.Path{"winrm_cert_path": s.CertPath, "winrm_key_path": s.KeyPath} {
			switch {
			case path == "":
				errs = append(errs, o.invalid(key, "is required when winrm_auth is certificate"))
			case !o.chose(key):
				errs = append(errs, o.invalid(key, "it makes the agent log on with a key of this host, so only an overlay may set it"))
			}
		}
	default:
		errs = append(errs, o.invalid("winrm_auth", "expected ntlm, basic or certificate, got %s", printable.Quote(s.Auth)))
	}
	return targetconf.Join(errs...)
}

// checkTrust refuses settings by which a compromised control plane could send the key, or an
// overlay's password, to its own host.
func (s *settings) checkTrust(o owner, t *trust) error {
	var errs []error
	only := func(key, why string) {
		errs = append(errs, o.invalid(key, "%s: only an overlay in CERTCTL_TARGETS_DIR may set this", why))
	}
	plain := "winrm_port"
	if s.HTTPS != nil {
		plain = "winrm_https"
	}
	switch {
	case s.https():
	case s.Auth != winrm.NTLM:
		errs = append(errs, o.invalid(plain, "without HTTPS only winrm_auth ntlm is allowed, which has its own encryption"))
	case !o.chose(plain):
		only(plain, "without HTTPS only the password protects the key in transit")
	}
	if s.Insecure && !o.chose("winrm_insecure") {
		only("winrm_insecure", "anyone on the network path to the host could steal the key")
	}
	hasPassword := o.chose("winrm_password")
	if (hasPassword || o.chose("winrm_key_path")) && s.Host != "" && !o.chose("winrm_host") && !o.named {
		errs = append(errs, o.invalid("winrm_host", "an overlay has the password or key for the logon, so it must also set the host that gets it"))
	}
	if hasPassword && s.Username != "" && !o.chose("winrm_username") { // a job could lock other accounts with it
		errs = append(errs, o.invalid("winrm_username", "an overlay has the password, so it must also set the account"))
	}
	if hasPassword && s.Auth == winrm.Basic && !o.chose("winrm_auth") {
		errs = append(errs, o.invalid("winrm_auth", "an overlay has the password, which basic sends unencrypted, so it must also set this"))
	}
	if o.chose("winrm_host") {
		if t.CAFile != "" && !o.Local("ca_bundle") {
			errs = append(errs, targetconf.Invalid("ca_bundle", "an overlay sets the host, so it must also set how to authenticate it"))
		}
		if t.Fingerprint != "" && !o.Local("server_fingerprint") {
			errs = append(errs, targetconf.Invalid("server_fingerprint", "an overlay sets the host, so it must also set how to authenticate it"))
		}
	}
	return targetconf.Join(errs...)
}

func (s *settings) connect(o owner, host connector.Host, common *common, connect connects) (*remote, error) {
	peer, err := host.Peer(s.Host, s.port(), o.chose("winrm_host") || o.named)
	if err != nil {
		return nil, o.invalid("winrm_host", "%v", err)
	}
	r := &remote{at: peer, deadline: time.Duration(common.Deadline)}
	options := winrm.Options{
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			if address != peer.Address() {
				return nil, fmt.Errorf("%s is not the host of the target", address)
			}
			return peer.Dial(ctx)
		},
		Host: strings.Trim(s.Host, "[]"), Port: s.port(), HTTPS: s.https(), CAFile: string(common.CAFile), Fingerprint: common.Fingerprint, Insecure: s.Insecure,
		Auth: s.Auth, User: s.Username, Password: s.Password, Timeout: time.Duration(s.Timeout),
	}
	if s.Auth == winrm.Certificate {
		if options.Certificate, err = s.certificate(); err != nil {
			return nil, o.invalid("winrm_cert_path", "%v", err)
		}
	}
	if s.Insecure {
		r.warnings = append(r.warnings, "winrm_insecure is set: anyone on the network path to the host can steal the key, and log on elsewhere as the account")
	}
	if !s.https() {
		r.warnings = append(r.warnings, "WinRM without HTTPS: anyone who records the traffic and guesses the password gets the key, and anyone on the network path can log on elsewhere as the account")
	}
	if r.runner, err = connect(options); err != nil {
		return nil, fmt.Errorf("WinRM: %w", err)
	}
	return r, nil
}

// maxCertificate bounds the certificate and key files for the logon, in bytes.
const maxCertificate = 64 << 10

func (s *settings) certificate() (*tls.Certificate, error) {
	certificate, _, _, err := trustedfile.Read(string(s.CertPath), maxCertificate)
	if err != nil {
		return nil, err
	}
	key, err := trustedfile.ReadSecret(string(s.KeyPath), maxCertificate)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(certificate, key)
	return &pair, err
}
