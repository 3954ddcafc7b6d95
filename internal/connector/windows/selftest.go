package windows

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/targetconf"
)

// Finding is the result of one check of a self-test.
type Finding struct {
	What string `json:"what"`
	OK   bool   `json:"ok"`
	Says string `json:"says"` // the result, or what to do
}

// selfTestConfig is the configuration of a target of either type. The host comes from the command
// line.
type selfTestConfig struct {
	Object settings `json:"winrm"`
	settings
	common

	CertStore string `json:"cert_store"`
	StoreName string `json:"store_name"`
	Location  string `json:"store_location"`
}

// The oldest versions that the script supports: Windows PowerShell 5.1, and .NET Framework 4.6.2 by
// its release number
// (https://learn.microsoft.com/en-us/dotnet/framework/install/how-to-determine-which-versions-are-installed).
const (
	oldestPowerShell = "5.1"
	oldestDotNet     = 394802
)

// SelfTest logs on to the host called name with the settings of a target, checks what a deployment
// needs there, and changes nothing. It returns an error if it could not check anything.
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
		return nil, o.invalid("winrm_host", "the overlay's password is for %s, so it is not sent to %s", s.Host, name)
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
		return nil, errors.New("the script's answer has no state of the host")
	}
	return a.Host.findings(q, s, in == inObject), nil
}

// findings checks the state of the host. Only targets of type IIS need IIS.
func (h *hostState) findings(q *request, s *settings, needsIIS bool) []Finding {
	var found []Finding
	add := func(what string, ok bool, result, problem string) {
		if !ok {
			result = problem
		}
		found = append(found, Finding{what, ok, result})
	}
	explain := func(code, detail string) string { return q.explain(&answer{Code: code, Detail: detail}).Error() }

	logon := fmt.Sprintf("as %s, with %s", h.User, s.Auth)
	if !s.https() {
		logon += ", without HTTPS"
	}
	add("logon", true, logon, "")
	add("Windows", true, h.Windows+h.hint(), "")
	add("PowerShell", h.PowerShell == oldestPowerShell || strings.HasPrefix(h.PowerShell, oldestPowerShell+"."), h.PowerShell, h.PowerShell+": install Windows Management Framework 5.1")
	add("language mode", h.LanguageMode == "FullLanguage", h.LanguageMode, h.LanguageMode+": allow the account FullLanguage (AppLocker, App Control)")
	add(".NET Framework", h.DotNet >= oldestDotNet, fmt.Sprint("release ", h.DotNet), fmt.Sprintf("release %d: install 4.6.2, which is %d, or newer", h.DotNet, oldestDotNet))
	add("administrator", h.Administrator || q.Location == "CurrentUser", "yes", "the account must be one of Administrators, with full rights over the network")
	add(fmt.Sprintf("store %s\\%s", q.Location, q.Store), h.Store == "", "can be written", explain(h.Store, q.Store))
	sites := "sites: " + strings.Join(h.Sites, ", ")
	if h.IIS != "" {
		sites = "cannot be managed, but this target does not need it"
	}
	add("IIS", h.IIS == "" || !needsIIS, sites, explain(h.IIS, "Microsoft.Web.Administration.dll"))
	return found
}

// firstWithAES is the build of Server 2019 and Windows 10 1809.
const firstWithAES = 17763

// hint returns what a target needs on an older Windows, or "".
func (h *hostState) hint() string {
	var major, minor, build int
	if n, _ := fmt.Sscanf(h.Windows, "%d.%d.%d", &major, &minor, &build); n == 3 && build < firstWithAES {
		return ", older than Server 2019: targets on it need legacy_ciphers"
	}
	return ""
}
