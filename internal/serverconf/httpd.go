package serverconf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// HTTPD finds the key of cert in httpd's own configuration. httpd's mod_info
// prints that as httpd understands it (-D DUMP_CONFIG): includes, macros, Define,
// <IfModule> and the environment are resolved. -D DUMP_RUN_CFG says where relative
// paths start, and makes httpd look at no certificate file, so that there is an
// answer before the first deployment too.
func HTTPD(ctx context.Context, query Query, cert targetconf.Path, validate, reload policy.Command) (Pair, error) {
	call, err := httpdCall(validate, reload)
	if err != nil {
		return Pair{}, err
	}
	if query == nil {
		return Pair{}, errors.New("httpd cannot be asked here")
	}
	failure := errors.New("it printed none, which takes mod_info")
	for _, load := range loadInfo() {
		stdout, err := query(ctx, policy.Command{
			Argv:    slices.Concat(call.Argv, load, []string{"-t", "-D", "DUMP_RUN_CFG", "-D", "DUMP_CONFIG"}),
			Timeout: call.Timeout,
		})
		if pairs, ok := httpdPairs(string(stdout), string(cert)); err == nil && ok {
			return KeyFor(cert, pairs)
		}
		if err != nil && load == nil {
			failure = err
			break // no module mends that
		}
	}
	return Pair{}, fmt.Errorf("ask httpd for its configuration: %w", failure)
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

// httpdCall is the call of httpd in the commands of a job, with the flags that
// choose its configuration.
func httpdCall(validate, reload policy.Command) (policy.Command, error) {
	c, at := starting([]policy.Command{validate, reload}, "apache2", "apache2ctl", "apachectl", "httpd")
	if at < 0 {
		return c, errors.New("neither validate_command nor reload_command starts httpd itself, so it cannot be asked")
	}
	words := c.Argv[at+1:]
	c.Argv = slices.Clone(c.Argv[:at+1])
	for i := 0; i < len(words); i++ {
		flag, isFlag := strings.CutPrefix(words[i], "-")
		if !isFlag || flag == "" || !strings.Contains("fdDCcE", flag[:1]) {
			if flag == "k" || flag == "e" {
				i++ // and its value
			}
			continue
		}
		c.Argv = append(c.Argv, words[i])
		if len(flag) == 1 && i+1 < len(words) {
			i++
			c.Argv = append(c.Argv, words[i])
		}
	}
	return c, nil
}
