package apache

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/target"
)

// askServer finds the key of cert_path in httpd's own configuration. httpd
// says which files that is made of, where relative paths start and what is
// defined (-D DUMP_INCLUDES, -D DUMP_RUN_CFG; both work before the certificate
// files exist); the files are then read here, since printing their content
// takes mod_info, which few servers load.
func (c *Connector) askServer(ctx context.Context) (target.ServerPair, error) {
	argv, err := findCall(c.validate.Argv, c.reload.Argv)
	if err != nil {
		return target.ServerPair{}, err
	}
	if c.params.Query == nil {
		return target.ServerPair{}, errors.New("httpd cannot be asked here")
	}
	query := func(what string) (string, error) {
		stdout, err := c.params.Query(ctx, target.Command{
			Argv:    append(slices.Clone(argv), "-t", "-D", what),
			Timeout: c.validate.Timeout,
		})
		if err != nil {
			return "", fmt.Errorf("ask httpd for its configuration: %w", err)
		}
		return string(stdout), nil
	}
	includes, err := query("DUMP_INCLUDES")
	if err != nil {
		return target.ServerPair{}, err
	}
	run, err := query("DUMP_RUN_CFG")
	if err != nil {
		return target.ServerPair{}, err
	}
	r := newReader(run)
	for _, file := range includedFiles(includes) {
		text, err := target.ReadServerFile(file)
		if err != nil {
			return target.ServerPair{}, fmt.Errorf("read the configuration of httpd: %w", err)
		}
		r.read(file, text)
	}
	return target.KeyFor(c.config.CertPath, r.pairs)
}

// includedFiles reads the answer to DUMP_INCLUDES, each file once. A line is
// the number of the line that includes the file, or a star, in parentheses, and
// the file.
func includedFiles(dump string) []string {
	var files []string
	for line := range strings.Lines(dump) {
		number, file, ok := strings.Cut(strings.TrimSpace(line), ") ")
		if !ok || !strings.HasPrefix(number, "(") || !filepath.IsAbs(file) {
			continue
		}
		if number = number[1:]; number == "" || number != "*" && strings.Trim(number, "0123456789") != "" {
			continue
		}
		if file = filepath.Clean(file); !slices.Contains(files, file) {
			files = append(files, file)
		}
	}
	return files
}

// newReader reads the answer to DUMP_RUN_CFG.
func newReader(dump string) *reader {
	r := &reader{defines: make(map[string]string)}
	for line := range strings.Lines(dump) {
		line = strings.TrimRight(line, "\r\n")
		if root, ok := strings.CutPrefix(line, "ServerRoot: "); ok {
			r.root = strings.Trim(root, `"`)
		}
		if define, ok := strings.CutPrefix(line, "Define: "); ok && !strings.HasPrefix(define, "DUMP_") {
			name, value, _ := strings.Cut(define, "=")
			r.defines[name] = value
		}
	}
	return r
}

// findCall looks for httpd in the commands of a job, and keeps the flags that
// choose its configuration.
func findCall(commands ...[]string) ([]string, error) {
	for _, argv := range commands {
		at := target.Program(argv, "apache2", "apache2ctl", "apachectl", "httpd")
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
