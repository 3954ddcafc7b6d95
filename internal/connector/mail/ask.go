package mail

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
)

// askServer finds the key of cert_path in the mail server's own configuration.
func (c *Connector) askServer(ctx context.Context) (serverconf.Pair, error) {
	if c.params.Query == nil {
		return serverconf.Pair{}, errors.New(c.config.Mode + " cannot be asked here")
	}
	pairs, err := c.pairs(ctx)
	if err != nil {
		return serverconf.Pair{}, fmt.Errorf("ask %s for its configuration: %w", c.config.Mode, err)
	}
	return serverconf.KeyFor(c.config.CertPath, pairs)
}

// query runs the program that prints the configuration: the one beside the
// program of the job's own commands, with the -c of that command. The reload
// says which server it is about, so it goes first.
func (c *Connector) query(ctx context.Context, printer string, programs []string, args ...string) (string, error) {
	for _, argv := range [][]string{c.reload.Argv, c.validate.Argv} {
		at := serverconf.Program(argv, programs...)
		if at < 0 {
			continue
		}
		call := append(slices.Clone(argv[:at]), printer)
		if strings.Contains(argv[at], "/") {
			call[at] = filepath.Join(filepath.Dir(argv[at]), printer)
		}
		call = append(append(call, configFlag(argv[at+1:])...), args...)
		stdout, err := c.params.Query(ctx, policy.Command{Argv: call, Timeout: c.validate.Timeout})
		return string(stdout), err
	}
	return "", fmt.Errorf("neither reload_command nor validate_command starts %s itself", strings.Join(programs, " or "))
}

// configFlag is the flag -c of words with its value, which may be in the same
// word, as all these programs have it.
func configFlag(words []string) []string {
	for i, word := range words {
		value, ok := strings.CutPrefix(word, "-c")
		if ok && value == "" && i+1 < len(words) {
			value = words[i+1]
		}
		if ok {
			return []string{"-c", value}
		}
	}
	return nil
}
