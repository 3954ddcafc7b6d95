// Package f5 installs certificates on an F5 BIG-IP through iControl REST: key, certificate and
// chain as files of a partition, and a client-ssl or server-ssl profile that uses them.
package f5

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/vendorapi"
)

// Type returns the target type F5.
func Type() connector.Type { return typeOf(0) }

// typeOf is Type with calls that are retried for as long as patience; 0 means a minute.
func typeOf(patience time.Duration) connector.Type {
	return connector.Type{Name: "F5", New: func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		return newConnector(c, host, patience)
	}}
}

// config is the target's configuration.
type config struct {
	Host          string             `json:"host" config:"required"`
	Port          int                `json:"port" default:"443"`
	Username      string             `json:"username" config:"required"`
	Password      secret.String      `json:"password" config:"required"`
	TokenProvider string             `json:"token_provider" default:"tmos"`
	Timeout       targetconf.Seconds `json:"timeout" default:"30"` // of one request

	SSLProfile  string `json:"ssl_profile" config:"required"`
	ProfileType string `json:"profile_type" default:"client-ssl"`
	Partition   string `json:"partition" default:"Common"`
	DeviceGroup string `json:"device_group"` // "": no sync
	SaveConfig  *bool  `json:"save_config"`  // nil: save, but a failure is only a warning

	// How to authenticate the device. Only an overlay may set these.
	CABundle    targetconf.Path `json:"ca_bundle"`
	Fingerprint string          `json:"server_fingerprint"`
	Insecure    bool            `json:"insecure"`
}

// The types of profile.
const (
	clientSSL = "client-ssl"
	serverSSL = "server-ssl"
)

// target is the connector. It is used by one goroutine.
type target struct {
	config
	id      string // of the target
	keep    int    // how many older certificates stay on the device
	noteDir string // for notes to the next process; "": none are written
	profile string // path of the profile: /Common/site/www
	common  *targetconf.Common
	device  *device

	progress progress // valid if known
	known    bool
}

func newConnector(c *targetconf.Config, host connector.Host, patience time.Duration) (connector.Connector, error) {
	t := &target{common: &c.Common, id: string(c.Target()), noteDir: host.StateDir}
	if err := targetconf.Join(c.Decode(&t.config), c.Common.MarkRemote()); err != nil {
		return nil, err
	}
	if err := targetconf.Join(t.checkTrust(c, host), t.checkNames()); err != nil {
		return nil, err
	}
	t.Host = strings.ToLower(strings.Trim(t.Host, "[]")) // brackets of an IPv6 address
	if !connector.IsHost(t.Host) {
		return nil, targetconf.Invalid("host", "expected a host name or an address without a zone, got %s", printable.Quote(t.Host))
	}
	peer, err := host.Peer(t.Host, t.Port, c.Local("host"))
	if err != nil {
		return nil, targetconf.Invalid("host", "%v", err)
	}
	// backup_retention; the default is the agent's default for backup sets.
	switch t.keep = c.Common.Retention; t.keep {
	case 0:
		t.keep = 3
	case -1:
		t.keep = 0
	}
	t.device = newDevice(&t.config, peer.Address(), peer.Dial, cmp.Or(patience, host.Patience))
	return t, nil
}

// objectName matches names of partitions, folders, profiles and device groups that are safe in URLs
// and in a tmsh command.
var objectName = lazyregexp.New(`^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,200}$`)

// checkTrust refuses settings by which a control plane could choose who gets the private key and
// the password.
func (t *target) checkTrust(c *targetconf.Config, host connector.Host) error {
	var errs []error
	for _, trust := range []struct {
		key string
		set bool
	}{{"ca_bundle", t.CABundle != ""}, {"server_fingerprint", t.Fingerprint != ""}, {"insecure", t.Insecure}} {
		if trust.set && !c.Local(trust.key) {
			errs = append(errs, targetconf.Invalid(trust.key, "it decides which device is trusted with the private key, so only the target's overlay may set it: %s.json in CERTCTL_TARGETS_DIR", t.id))
		}
	}
	pinned := c.Local("host") || c.Local("ca_bundle") || c.Local("server_fingerprint")
	if (c.Local("password") || c.Local("password_file")) && !pinned && host.Policy.Hosts == nil {
		errs = append(errs, targetconf.Invalid("password", "it is in the target's overlay, but the job says where to send it: put host, ca_bundle or server_fingerprint into the overlay too, or set CERTCTL_ALLOWED_HOSTS"))
	}
	if t.Fingerprint != "" && (t.CABundle != "" || t.Insecure) || t.CABundle != "" && t.Insecure {
		errs = append(errs, targetconf.Invalid("server_fingerprint", "set only one of ca_bundle, server_fingerprint and insecure"))
	}
	if err := (vendorapi.Trust{Fingerprint: t.Fingerprint}).Check(); err != nil {
		errs = append(errs, targetconf.Invalid("server_fingerprint", "%v", err))
	}
	return targetconf.Join(errs...)
}

func (t *target) checkNames() error {
	var errs []error
	refuse := func(key, what, got string) {
		errs = append(errs, targetconf.Invalid(key, "expected %s, got %s", what, printable.Quote(got)))
	}
	if t.ProfileType != clientSSL && t.ProfileType != serverSSL {
		refuse("profile_type", clientSSL+" or "+serverSSL, t.ProfileType)
	}
	if !objectName().MatchString(t.Partition) {
		refuse("partition", "the name of a partition", t.Partition)
	}
	t.profile = t.SSLProfile
	if !strings.HasPrefix(t.profile, "/") {
		t.profile = "/" + t.Partition + "/" + t.profile
	}
	elements := strings.Split(t.profile[1:], "/")
	if len(elements) < 2 || len(t.profile) > maxPath || slices.ContainsFunc(elements, func(name string) bool { return !objectName().MatchString(name) }) {
		refuse("ssl_profile", "the name of a profile, or its path such as /Common/site/www", t.SSLProfile)
	}
	if t.DeviceGroup != "" && !objectName().MatchString(strings.TrimPrefix(t.DeviceGroup, "/Common/")) {
		refuse("device_group", "the name of a device group", t.DeviceGroup)
	}
	if in := elements[0]; t.Partition != "Common" && t.Partition != in {
		errs = append(errs, targetconf.Invalid("partition", "a profile in the partition %s can only use files of that partition and of Common", printable.Quote(in)))
	}
	return targetconf.Join(errs...)
}

// maxPath is the longest path of a profile, in bytes. It is part of the change's ID.
const maxPath = 300

// saves reports whether to save the device's configuration, and whether a failure to save fails the
// deployment.
func (t *target) saves() (saves, must bool) {
	return t.SaveConfig == nil || *t.SaveConfig, t.SaveConfig != nil && *t.SaveConfig
}

// Plan implements connector.Connector.
func (t *target) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	c := &change{target: t}
	switch m.Leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		c.keyType = "rsa-private"
	case *ecdsa.PublicKey:
		c.keyType = "ec-private"
	default:
		return nil, fmt.Errorf("BIG-IP accepts RSA and ECDSA keys, but the certificate has a key of type %v", m.Leaf.PublicKeyAlgorithm)
	}
	leaf := t.mark() + pemutil.Fingerprint(m.Leaf)[:markDigits]
	c.leaf = t.inPartition(leaf)
	c.cert = &file{kind: sslCert, path: c.leaf + ".crt", data: pemutil.EncodeCertificates(m.Leaf), upload: t.upload("cert")}
	c.key = &file{kind: sslKey, path: c.leaf + ".key", data: m.Key(), upload: t.upload("key")}
	if len(m.Chain) > 0 {
		chain := pemutil.EncodeCertificates(m.Chain...)
		sum := sha256.Sum256(chain) // the chain of a certificate may change
		c.chain = &file{kind: sslCert, path: c.leaf + "-" + hex.EncodeToString(sum[:chainDigits/2]) + ".crt", data: chain, upload: t.upload("chain")}
	}
	plan := &connector.Plan{Changes: []connector.Change{c}, Serves: t.common.Endpoint()}
	if t.Insecure {
		plan.Warnings = append(plan.Warnings, "insecure is set: anyone on the network path to "+t.Host+" can steal the key and the password")
	}
	if saves, _ := t.saves(); !saves {
		plan.Caveats = append(plan.Caveats, "the configuration of the BIG-IP is not saved (save_config): after a restart it has the old certificate again")
	}
	return plan, nil
}

// How many hexadecimal digits of a SHA-256 are in file names: of the leaf and of the chain. They
// differ so that a chain never has the name of a leaf of a target whose id ends in such digits.
const (
	markDigits  = 16
	chainDigits = 12
)

// mark returns the prefix of the names of this target's files on the device.
func (t *target) mark() string { return "certctl-" + t.id + "-" }

func (t *target) inPartition(name string) string { return "/" + t.Partition + "/" + name }

// isOurs reports whether this target created the file at path, and returns the part of the path
// that all files of its certificate share.
func (t *target) isOurs(path string) (leaf string, ours bool) {
	rest, ours := strings.CutPrefix(path, t.inPartition(t.mark()))
	if !ours || !ourName().MatchString(rest) {
		return "", false
	}
	return t.inPartition(t.mark()) + rest[:markDigits], true
}

var ourName = lazyregexp.New(fmt.Sprintf(`^[0-9a-f]{%d}(\.crt|\.key|-[0-9a-f]{%d}\.crt)$`, markDigits, chainDigits))

// upload returns the name of an upload. It does not depend on the certificate, so the next run
// overwrites the leftovers of a killed one.
func (t *target) upload(what string) string { return "certctl-" + t.id + "." + what }

// Close revokes the token of the deployment.
func (t *target) Close() error { return t.device.logout() }
