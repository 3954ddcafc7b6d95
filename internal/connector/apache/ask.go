package apache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
)

// askServer finds the key of cert_path in httpd's own configuration. httpd's
// mod_info prints that as httpd understands it (-D DUMP_CONFIG): includes, macros,
// Define, <IfModule> and the environment are resolved. -D DUMP_RUN_CFG says where
// relative paths start, and makes httpd look at no certificate file, so that there
// is an answer before the first deployment too.
func (c *Connector) askServer(ctx context.Context) (serverconf.Pair, error) {
	argv, err := findCall(c.validate.Argv, c.reload.Argv)
	if err != nil {
		return serverconf.Pair{}, err
	}
	if c.params.Query == nil {
		return serverconf.Pair{}, errors.New("httpd cannot be asked here")
	}
	failure := errors.New("it printed none, which takes mod_info")
	for _, load := range loadInfo() {
		stdout, err := c.params.Query(ctx, policy.Command{
			Argv:    slices.Concat(argv, load, []string{"-t", "-D", "DUMP_RUN_CFG", "-D", "DUMP_CONFIG"}),
			Timeout: c.validate.Timeout,
		})
		if pairs, ok := pairsInDump(string(stdout), string(c.config.CertPath)); err == nil && ok {
			return serverconf.KeyFor(c.config.CertPath, pairs)
		}
		if err != nil && load == nil {
			failure = err
			break // no module mends that
		}
	}
	return serverconf.Pair{}, fmt.Errorf("ask httpd for its configuration: %w", failure)
}

// infoModules is where distributions keep mod_info: Debian, Alpine, SUSE, Gentoo;
// then, relative to the directory that httpd was built for, Apache's own layout
// with Red Hat, and FreeBSD.
var infoModules = [...]string{
	"/usr/lib/apache2/modules/mod_info.so", "/usr/lib/apache2/mod_info.so", "/usr/lib64/apache2/mod_info.so", "/usr/lib64/apache2/modules/mod_info.so",
	"modules/mod_info.so", "libexec/apache24/mod_info.so",
}

// loadInfo are the flags that load mod_info, one try after the other. The first
// is for an httpd that has it.
func loadInfo() [][]string {
	tries := [][]string{nil}
	for _, module := range infoModules {
		if _, err := os.Stat(module); err == nil || !filepath.IsAbs(module) {
			tries = append(tries, []string{"-C", "LoadModule info_module " + module})
		}
	}
	return tries
}

// findCall looks for httpd in the commands of a job, and keeps the flags that
// choose its configuration.
func findCall(commands ...[]string) ([]string, error) {
	for _, argv := range commands {
		at := serverconf.Program(argv, "apache2", "apache2ctl", "apachectl", "httpd")
		if at < 0 {
			continue
		}
		call := slices.Clone(argv[:at+1])
		for i := at + 1; i < len(argv); i++ {
			flag, isFlag := strings.CutPrefix(argv[i], "-")
			if !isFlag || flag == "" || !strings.Contains("fdDCcE", flag[:1]) {
				if flag == "k" || flag == "e" {
					i++ // and its value
				}
				continue
			}
			call = append(call, argv[i])
			if len(flag) == 1 && i+1 < len(argv) {
				i++
				call = append(call, argv[i])
			}
		}
		return call, nil
	}
	return nil, errors.New("neither validate_command nor reload_command starts httpd itself, so it cannot be asked")
}
