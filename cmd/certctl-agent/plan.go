package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/config"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/printable"
)

const planHelp = `Usage: certctl-agent plan -type TYPE [-config FILE] [-target ID] [-cert FILE]
         [-certificate ID] [-json] [flags of the daemon]

Shows what a deployment to a target would do on this host, without doing it: the
configuration and where each value comes from, each file, each command and whether
it may run, changes elsewhere, and all problems. Use it to write an overlay
(CERTCTL_TARGETS_DIR): change it, and run plan again.

  -type TYPE       the target's type, as the control plane spells it (NGINX, …)
  -config FILE     the target's configuration, a JSON object; - is standard input;
                   without it, only the overlays are used. (CERTCTL_CONFIG names the
                   agent's own configuration file.)
  -target ID       the target's id, for its overlay ID.json (` + unnamedTarget + `)
  -cert FILE       the certificate with its chain, as PEM; - is standard input;
                   without it, plan uses a placeholder
  -certificate ID  the certificate's id: a server may read its key in the key
                   directory, and one of the keys there must belong to -cert
  -json            print one JSON document

Of the daemon's settings, plan uses CERTCTL_ALLOWED_PATHS, CERTCTL_ALLOWED_COMMANDS,
CERTCTL_ALLOWED_HOSTS, CERTCTL_KEY_DIR, CERTCTL_TARGETS_DIR and their flags.
Run it as the user of the daemon, since it reads files with the rights of its user.

Examples:
  certctl-agent plan -type NGINX -target t-web1 -config target.json
  echo '{"pem_path": "/etc/haproxy/site.pem"}' | certctl-agent plan -type HAProxy -config -

Exit status: 0 the deployment could start, 1 it would be refused, 2 usage.

`

// unnamedTarget is the target's id if none is given.
const unnamedTarget = "TARGET-ID"

// maxTargetConfig bounds the target's configuration and the certificate, in bytes.
const maxTargetConfig = 1 << 20

func runPlan(ctx context.Context, p process) error {
	target := app.Target{ID: unnamedTarget}
	var asJSON bool
	var configFile, certFile string
	cfg, err := config.Load(p.args, p.getenv, config.Options{
		Flags: func(f *flag.FlagSet) {
			f.StringVar(&target.Type, "type", "", "type of the target")
			f.StringVar(&configFile, "config", "", "configuration of the target")
			f.Func("target", "id of the target", func(id string) (err error) {
				target.ID, err = api.ParseID(id)
				return err
			})
			f.StringVar(&certFile, "cert", "", "certificate")
			f.Func("certificate", "id of the certificate", func(id string) error { return target.CertificateID.UnmarshalText([]byte(id)) })
			f.BoolVar(&asJSON, "json", false, "print JSON")
		},
		Ignore: func(setting string) bool {
			return !slices.Contains([]string{"config", "key-dir", "state-dir", "targets-dir", "allowed-paths", "allowed-commands", "allowed-hosts"}, setting)
		},
	})
	if err != nil {
		return err
	}
	if target.Type == "" {
		return config.NewUsageError("name the target's type: -type NGINX, for example")
	}
	if configFile == "-" && certFile == "-" {
		return config.NewUsageError("-config and -cert cannot both be standard input")
	}
	if target.Config, err = readInput(p.stdin, configFile); err != nil {
		return fmt.Errorf("the target's configuration: %w", err)
	}
	if target.Cert, err = readInput(p.stdin, certFile); err != nil {
		return fmt.Errorf("the certificate: %w", err)
	}
	preview, err := app.NewPreview(ctx, cfg, target)
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(p.stdout, preview)
	} else {
		err = printPreview(p.stdout, preview)
	}
	if err == nil && preview.Refused {
		return errPrinted
	}
	return err
}

// readInput reads the named file, or standard input if the name is "-". It returns nil if the name
// is "".
func readInput(stdin io.Reader, name string) ([]byte, error) {
	switch name {
	case "":
		return nil, nil
	case "-":
		data, err := io.ReadAll(io.LimitReader(stdin, maxTargetConfig+1))
		if err == nil && len(data) > maxTargetConfig {
			err = fmt.Errorf("it is longer than %d bytes", maxTargetConfig)
		}
		return data, err
	}
	data, _, err := hostfile.Read(name, maxTargetConfig)
	return data, err
}

func printPreview(w io.Writer, p *app.Preview) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(format string, args ...any) { fmt.Fprintf(table, format+"\n", args...) }
	section := func(name string, n int) {
		if n > 0 {
			line("%s", name)
		}
	}
	line("target %s, type %s, as user %s", p.Target, p.Type, accountName(strconv.Itoa(p.UID), userName))
	section("settings", len(p.Settings)+len(p.Unknown))
	for _, s := range p.Settings {
		line("  %s\t%s\t%s", s.Key, shown(s.Value), shown(s.Source))
	}
	for _, key := range p.Unknown {
		line("  %s\t\tunknown to this type, ignored", shown(key))
	}
	section("files", len(p.Files))
	for _, f := range p.Files {
		path, was, does := f.Path, "new file", "content changes"
		if f.Real != "" && f.Real != f.Path {
			path += " → " + f.Real
		}
		if f.OldMode != "" {
			was = "was " + f.OldMode + " " + ownerOf(f.OldOwner)
		}
		switch {
		case f.Problem != "":
			line("  %s\tREFUSED", shown(path))
			continue
		case !f.Changes:
			does = "content unchanged"
		case f.Secret:
			does = "the new key"
		}
		line("  %s\t%s %s\t%s\t%d bytes\t%s", shown(path), f.NewMode, ownerOf(f.NewOwner), was, f.Size, does)
	}
	section("commands", len(p.Commands))
	for _, c := range p.Commands {
		allowed := "allowed"
		if !c.Allowed {
			allowed = "REFUSED"
		}
		line("  %s\t%s\t%s", c.Key, shown(c.Line), allowed)
	}
	section("elsewhere", len(p.Changes))
	for _, c := range p.Changes {
		does := "changes"
		switch {
		case c.Problem != "":
			does = "REFUSED"
		case !c.Changes:
			does = "unchanged"
		}
		line("  %s\t%s", shown(c.Name), does)
	}
	section("verification", len(p.Verified)+len(p.Reported))
	if p.Verified != "" {
		line("  must serve the certificate\t%s", shown(p.Verified))
	}
	if p.Reported != "" {
		line("  reported to the control plane\t%s", shown(p.Reported))
	}
	section("warnings", len(p.Warnings))
	for _, warning := range p.Warnings {
		line("  %s", shown(warning))
	}
	section("problems: a deployment would be refused", len(p.Problems))
	for _, problem := range p.Problems {
		line("  %s", shown(problem))
	}
	return table.Flush()
}

// shown keeps untrusted text on one line, in one column.
func shown(text string) string { return printable.Line(text, maxShown) }

// ownerOf returns the names for "uid:gid".
func ownerOf(numbers string) string {
	uid, gid, _ := strings.Cut(numbers, ":")
	return accountName(uid, userName) + ":" + accountName(gid, groupName)
}

// accountName returns the name for a uid or gid, or the number if it has no name.
func accountName(number string, name func(string) (string, error)) string {
	if found, err := name(number); err == nil {
		return shown(found)
	}
	return number
}

func userName(number string) (string, error) {
	u, err := user.LookupId(number)
	if err != nil {
		return "", err
	}
	return u.Username, nil
}

func groupName(number string) (string, error) {
	g, err := user.LookupGroupId(number)
	if err != nil {
		return "", err
	}
	return g.Name, nil
}
