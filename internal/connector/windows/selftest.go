package windows

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/targetconf"
)

// Finding is one thing that a self-test has looked at.
type Finding struct {
	What string `json:"what"`
	OK   bool   `json:"ok"`
	Says string `json:"says"` // what was found, or what to do
}

// selfTestConfig is the configuration of a target of either kind. Where it is to
// be logged on is said by whoever tests.
type selfTestConfig struct {
	Object settings `json:"winrm"`
	settings
	common

	CertStore string `json:"cert_store"`
	StoreName string `json:"store_name"`
	Location  string `json:"store_location"`
}

// oldest are the versions that the script is written for: Windows PowerShell 5.1,
// and .NET Framework 4.6.2 by its release number
// (https://learn.microsoft.com/en-us/dotnet/framework/install/how-to-determine-which-versions-are-installed).
const (
	oldestPowerShell = "5.1"
	oldestDotNet     = 394802
)

// SelfTest logs on to the host called name with the settings of a target, looks
// at what a deployment needs there, and changes nothing. The error says that
// nothing could be looked at.
func SelfTest(ctx context.Context, c *targetconf.Config, host connector.Host, name string) ([]Finding, error) {
	return selfTest(ctx, c, host, name, connect)
}

func selfTest(ctx context.Context, c *targetconf.Config, host connector.Host, name string, connect connects) ([]Finding, error) {
	var config selfTestConfig
	if err := c.Decode(&config); err != nil {
		return nil, err
	}
	in, s := atTop, &config.settings
	if config.Object.Username != "" || config.Object.CertPath != "" {
		in, s = inObject, &config.Object
	}
	o := owner{Config: c, in: in, named: true}
	if s.Host != "" && !strings.EqualFold(s.Host, name) && o.chose("winrm_password") {
		return nil, o.invalid("winrm_host", "the overlay's password is for %s, and not sent to %s", s.Host, name)
	}
	s.Host = name
	if err := targetconf.Join(s.checkLogon(o), s.checkTrust(o, &config.trust)); err != nil {
		return nil, err
	}
	r, err := s.connect(o, host, &config.common, connect)
	if err != nil {
		return nil, err
	}
	defer r.runner.Close()
	q := &request{Operation: opSelfTest, Location: cmp.Or(config.Location, "LocalMachine"), Store: cmp.Or(config.CertStore, config.StoreName, "My"), Chain: [][]byte{}, KeyReaders: []string{}}
	if err := checkStore("store_name", q.Store); err != nil {
		return nil, err
	}
	a, err := r.call(ctx, q)
	if err != nil {
		return nil, err
	}
	if a.Host == nil {
		return nil, fmt.Errorf("the script answered without saying what the host is like")
	}
	return a.Host.findings(q, s, in == inObject), nil
}

// findings judges what the host is like. Only targets of type IIS need IIS.
func (h *hostState) findings(q *request, s *settings, needsIIS bool) []Finding {
	var found []Finding
	see := func(what string, ok bool, is, otherwise string) {
		if !ok {
			is = otherwise
		}
		found = append(found, Finding{what, ok, is})
	}
	explain := func(code, detail string) string { return q.explain(&answer{Code: code, Detail: detail}).Error() }

	logon := fmt.Sprintf("as %s, with %s", h.User, s.Auth)
	if !s.https() {
		logon += ", without HTTPS"
	}
	see("logon", true, logon, "")
	see("Windows", true, h.Windows+h.hint(), "")
	see("PowerShell", h.PowerShell == oldestPowerShell || strings.HasPrefix(h.PowerShell, oldestPowerShell+"."), h.PowerShell, h.PowerShell+": install Windows Management Framework 5.1")
	see("language mode", h.LanguageMode == "FullLanguage", h.LanguageMode, h.LanguageMode+": allow the account FullLanguage (AppLocker, App Control)")
	see(".NET Framework", h.DotNet >= oldestDotNet, fmt.Sprint("release ", h.DotNet), fmt.Sprintf("release %d: install 4.6.2, which is %d, or newer", h.DotNet, oldestDotNet))
	see("administrator", h.Administrator || q.Location == "CurrentUser", "yes", "the account has to be one of Administrators, with its full rights over the network")
	see(fmt.Sprintf("store %s\\%s", q.Location, q.Store), h.Store == "", "can be written", explain(h.Store, q.Store))
	sites := "sites: " + strings.Join(h.Sites, ", ")
	if h.IIS != "" {
		sites = "cannot be managed, and this target does not need it"
	}
	see("IIS", h.IIS == "" || !needsIIS, sites, explain(h.IIS, "Microsoft.Web.Administration.dll"))
	return found
}

// firstWithAES is the build of Server 2019 and Windows 10 1809.
const firstWithAES = 17763

// hint says what a target has to have for an older Windows.
func (h *hostState) hint() string {
	var major, minor, build int
	if n, _ := fmt.Sscanf(h.Windows, "%d.%d.%d", &major, &minor, &build); n == 3 && build < firstWithAES {
		return ", older than Server 2019: targets on it need legacy_ciphers"
	}
	return ""
}
