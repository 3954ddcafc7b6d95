// Package windows installs certificates on Windows hosts over WinRM: in a certificate store, and in
// a binding of IIS.
//
// The package's PowerShell script does the work on the host. Its operations can be repeated and
// undone, since each one checks the state first and marks the certificates that it imports.
package windows

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/winrm"
)

// Types returns the target types for Windows hosts.
func Types() []connector.Type { return []connector.Type{WinCertStore(), IIS()} }

// IIS returns the target type IIS: a binding of a site.
func IIS() connector.Type { return iis(connect) }

// WinCertStore returns the target type WinCertStore: a certificate store.
func WinCertStore() connector.Type { return certStore(connect) }

// connects returns the client of a host.
type connects func(winrm.Options) (runner, error)

func connect(o winrm.Options) (runner, error) { return winrm.New(o) }

// common is the configuration that both types share.
type common struct {
	Mode     string              `json:"mode" default:"local"`
	Deadline targetconf.Duration `json:"exec_deadline" default:"2m"` // limit of the script
	Legacy   bool                `json:"legacy_ciphers"`             // for Server 2016 and older
	Export   bool                `json:"exportable"`
	trust
}

// modeRemote is the only supported mode.
const modeRemote = "winrm"

func (c *common) check() error {
	switch c.Mode {
	case modeRemote:
		return nil
	case "local":
		return targetconf.Invalid("mode", "local needs an agent that runs on Windows, but this one does not: set mode to %s, and the host and account to log on with", modeRemote)
	}
	return targetconf.Invalid("mode", "expected %s, got %s", modeRemote, printable.Quote(c.Mode))
}

// storeForm matches names of stores. They become elements of paths.
var storeForm = lazyregexp.New(`^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$`)

// trustForm matches names of stores that determine what the host trusts. Windows adds more of them
// with each version.
var trustForm = lazyregexp.New(`(?i)root|trust|issuer|authorit|^(ca|disallowed|addressbook)$`)

// checkStore refuses invalid names and stores that determine trust.
func checkStore(key, name string) error {
	if !storeForm().MatchString(name) {
		return targetconf.Invalid(key, "expected the name of a certificate store, such as My or WebHosting, got %s", printable.Quote(name))
	}
	if trustForm().MatchString(name) {
		return targetconf.Invalid(key, "the store %s determines what the host trusts and is not for server certificates: use My or WebHosting", name)
	}
	return nil
}

type iisConfig struct {
	SiteName  string   `json:"site_name" config:"required"`
	CertStore string   `json:"cert_store" config:"required"`
	Hostname  string   `json:"hostname"` // of the binding; "": none
	Port      int      `json:"port" default:"443"`
	SNI       bool     `json:"sni"`
	IPAddress string   `json:"ip_address" default:"*"`
	WinRM     settings `json:"winrm"`
	common
}

// hostForm matches host names of bindings. IIS accepts a wildcard as the first label.
var hostForm = lazyregexp.New(`^(\*\.)?[A-Za-z0-9_]([A-Za-z0-9._-]{0,250}[A-Za-z0-9])?$`)

// maxSite bounds the name of a site, and maxID the ID of a Change, in bytes.
const (
	maxSite = 128
	maxID   = 512
)

func (c *iisConfig) check() error {
	var errs []error
	if len(c.SiteName) > maxSite || printable.Line(c.SiteName, 2*maxSite) != c.SiteName {
		errs = append(errs, targetconf.Invalid("site_name", "expected the name of a site in at most %d bytes, got %s", maxSite, printable.Quote(c.SiteName)))
	}
	if c.Hostname != "" && !hostForm().MatchString(c.Hostname) {
		errs = append(errs, targetconf.Invalid("hostname", "expected only the host name of a binding, such as www.example.org, got %s", printable.Quote(c.Hostname)))
	}
	if c.SNI && c.Hostname == "" {
		errs = append(errs, targetconf.Invalid("sni", "needs hostname, the name that clients request"))
	}
	if c.Port < 1 || c.Port > 65535 {
		errs = append(errs, targetconf.Invalid("port", "expected a port from 1 to 65535, got %d", c.Port))
	}
	address, err := bindingAddress(c.IPAddress)
	if err != nil {
		errs = append(errs, err)
	}
	c.IPAddress = address
	if c.CertStore != "" {
		errs = append(errs, checkStore("cert_store", c.CertStore))
	}
	return targetconf.Join(errs...)
}

// bindingAddress returns an address in the format of IIS.
func bindingAddress(text string) (string, error) {
	if text == "" || text == "*" || text == "0.0.0.0" {
		return "*", nil
	}
	addr, err := netip.ParseAddr(strings.Trim(text, "[]"))
	switch {
	case err != nil || addr.Zone() != "":
		return "", targetconf.Invalid("ip_address", "expected an address, or * for all, got %s", printable.Quote(text))
	case addr.Is6():
		return "[" + addr.String() + "]", nil
	}
	return addr.String(), nil
}

// binding returns the bindingInformation of IIS.
func (c *iisConfig) binding() string {
	return fmt.Sprintf("%s:%d:%s", c.IPAddress, c.Port, strings.ToLower(c.Hostname))
}

func iis(connect connects) connector.Type {
	return connector.Type{Name: "IIS", Aliases: map[string]string{"binding_info": "hostname"}, New: func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		var config iisConfig
		if err := targetconf.Join(c.Decode(&config), c.Common.MarkRemote()); err != nil {
			return nil, err
		}
		if err := targetconf.Join(config.common.check(), config.check()); err != nil {
			return nil, err
		}
		remote, err := open(c, host, &config.WinRM, &config.common, inObject, connect)
		if err != nil {
			return nil, err
		}
		t := &target{remote: remote, common: config.common, conf: c, sni: config.SNI}
		t.place = request{Location: "LocalMachine", Store: config.CertStore, Site: config.SiteName, Binding: config.binding(), Keep: max(c.Common.Retention, 0)}
		if config.SNI {
			t.place.Flags = flagSNI
		}
		if id := (&change{remote: remote, place: t.place}).ID(); len(id) > maxID {
			return nil, targetconf.Invalid("hostname", "together with the names of the site and of the host it has %d bytes, but at most %d are allowed", len(id), maxID)
		}
		return t, nil
	}}
}

type storeConfig struct {
	StoreName     string `json:"store_name" default:"My"`
	StoreLocation string `json:"store_location" default:"LocalMachine"`
	FriendlyName  string `json:"friendly_name"`
	RemoveExpired bool   `json:"remove_expired"`
	KeyReaders    list   `json:"key_readers"`
	PostScript    string `json:"post_script"`
	settings
	common
}

// list is a list of names: a JSON array, or one string with commas.
type list []string

func (l *list) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, (*[]string)(l)) == nil {
		return l.check()
	}
	if json.Unmarshal(raw, &text) != nil {
		return errors.New("expected a list of strings")
	}
	*l = nil
	for name := range strings.SplitSeq(text, ",") {
		if name = strings.TrimSpace(name); name != "" {
			*l = append(*l, name)
		}
	}
	return l.check()
}

// maxReaders bounds the accounts that get access to a key.
const maxReaders = 64

func (l *list) check() error {
	if len(*l) > maxReaders || slices.ContainsFunc(*l, func(name string) bool { return len(name) > 256 || strings.TrimSpace(name) == "" }) {
		return fmt.Errorf("expected at most %d names of accounts", maxReaders)
	}
	return nil
}

// maxName is the longest friendly name, in bytes.
const maxName = 256

func (c *storeConfig) check() error {
	errs := []error{checkStore("store_name", c.StoreName)}
	switch {
	case c.StoreLocation != "LocalMachine" && c.StoreLocation != "CurrentUser":
		errs = append(errs, targetconf.Invalid("store_location", "expected LocalMachine or CurrentUser, got %s", printable.Quote(c.StoreLocation)))
	case c.StoreLocation == "CurrentUser" && len(c.KeyReaders) > 0:
		errs = append(errs, targetconf.Invalid("key_readers", "only that user has access to keys of CurrentUser: set store_location to LocalMachine"))
	}
	if len(c.FriendlyName) > maxName || printable.Line(c.FriendlyName, 2*maxName) != c.FriendlyName {
		errs = append(errs, targetconf.Invalid("friendly_name", "expected a printable name of at most %d bytes", maxName))
	}
	if c.PostScript != "" {
		errs = append(errs, targetconf.Invalid("post_script", "this agent does not run scripts from the configuration on a Windows host: use a scheduled task there that checks for a new certificate"))
	}
	return targetconf.Join(errs...)
}

func certStore(connect connects) connector.Type {
	return connector.Type{Name: "WinCertStore", New: func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		var config storeConfig
		if err := targetconf.Join(c.Decode(&config), c.Common.MarkRemote()); err != nil {
			return nil, err
		}
		if err := targetconf.Join(config.common.check(), config.check()); err != nil {
			return nil, err
		}
		remote, err := open(c, host, &config.settings, &config.common, atTop, connect)
		if err != nil {
			return nil, err
		}
		t := &target{remote: remote, common: config.common, conf: c}
		t.place = request{
			Location: config.StoreLocation, Store: config.StoreName, FriendlyName: config.FriendlyName, KeyReaders: config.KeyReaders, RemoveExpired: config.RemoveExpired,
		}
		return t, nil
	}}
}

// target is the connector of both types.
type target struct {
	*remote
	common common
	conf   *targetconf.Config
	place  request // without the certificate's values
	sni    bool
}

// Plan implements connector.Connector.
func (t *target) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	place := newPlace(t.place, m)
	place.Target = string(t.conf.Target())
	if place.KeyReaders == nil {
		place.KeyReaders = []string{}
	}
	plan := &connector.Plan{
		Changes:  []connector.Change{&change{remote: t.remote, place: place, legacy: t.common.Legacy, export: t.common.Export, sni: t.sni, material: m}},
		Serves:   t.conf.Common.Endpoint(),
		Warnings: t.warnings,
	}
	if place.Site == "" {
		plan.Caveats = append(plan.Caveats, "the thumbprint has changed: programs that select the certificate by its thumbprint must be reconfigured")
	}
	return plan, nil
}

// Close implements io.Closer.
func (t *target) Close() error { return t.runner.Close() }
