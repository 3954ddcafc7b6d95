package config

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/trustedfile"
)

// field parses the text of a setting and stores it in a Config. The default is set in the same way,
// unless it is empty. An empty value only comes from a flag. set may change the Config even if it
// fails.
type field interface {
	set(value string) error
}

// boolean is a field whose flag needs no value.
type boolean struct{ to *bool }

func (f boolean) set(value string) error {
	switch strings.ToLower(value) {
	case "1", "t", "true", "yes", "on":
		*f.to = true
	case "0", "f", "false", "no", "off":
		*f.to = false
	default:
		return fmt.Errorf("%q is neither true nor false", value)
	}
	return nil
}

type integer struct {
	to              *int
	lowest, highest int
}

func (f integer) set(value string) error {
	n, err := strconv.Atoi(value)
	if err != nil {
		return fmt.Errorf("%q is not a whole number", value)
	}
	if n < f.lowest || n > f.highest {
		return fmt.Errorf("%d is out of range: from %d to %d", n, f.lowest, f.highest)
	}
	*f.to = n
	return nil
}

type duration struct {
	to              *time.Duration
	lowest, highest time.Duration
}

func (f duration) set(value string) error {
	d, err := time.ParseDuration(value)
	if _, noUnit := strconv.ParseFloat(value, 64); noUnit == nil && value != "0" {
		return fmt.Errorf("%q has no unit: write %ss for seconds", value, value)
	}
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 90s, 5m or 6h", value)
	}
	if d < f.lowest || d > f.highest {
		return fmt.Errorf("%q is out of range: from %v to %v", value, f.lowest, f.highest)
	}
	*f.to = d
	return nil
}

// word is one of several words, in any case.
type word struct {
	to    *string
	words []string
}

func (f word) set(value string) error {
	word := strings.ToLower(value)
	if !slices.Contains(f.words, word) {
		return fmt.Errorf("%q is not one of %s", value, strings.Join(f.words, ", "))
	}
	*f.to = word
	return nil
}

// parsed returns a field that is parsed by a function.
func parsed[T any](to *T, parse func(string) (T, error)) field { return parsedField[T]{to, parse} }

type parsedField[T any] struct {
	to    *T
	parse func(string) (T, error)
}

func (f parsedField[T]) set(value string) (err error) {
	*f.to, err = f.parse(value)
	return err
}

// bundle is the file with the trusted roots of the control plane. It warns about unusable
// certificates: a system's bundle has a few that Go rejects, but in a small bundle it may be the
// one that matters. The file may be readable by everyone.
type bundle struct{ c *Config }

func (f bundle) set(value string) error {
	path, err := parsePath(value)
	if err != nil || path == "" {
		return err
	}
	f.c.CABundle = path
	data, _, _, err := trustedfile.Read(path, maxBundle)
	if err != nil {
		return err
	}
	data = bytes.ReplaceAll(data, []byte(hostfile.ByteOrderMark), nil) // anywhere: bundles are concatenated files
	blocks, used := bytes.Count(data, []byte("-----BEGIN ")), 0
	reason := errors.New("it is not valid PEM")
	pool := x509.NewCertPool()
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		switch {
		case block.Type != "CERTIFICATE":
			reason = fmt.Errorf("%.40q is not CERTIFICATE", block.Type)
		case err != nil:
			reason = err
		default:
			pool.AddCert(certificate)
			used++
		}
	}
	if used == 0 {
		return fmt.Errorf("%s contains no PEM certificate that can be parsed", path)
	}
	if used < blocks {
		f.c.warn(fmt.Sprintf("%s (CERTCTL_SERVER_CA_BUNDLE_PATH): %d of its %d PEM blocks cannot be used; the last one: %v", path, blocks-used, blocks, reason))
	}
	f.c.Roots = pool
	return nil
}

// passwords is a file with one password per line, including any white space.
type passwords struct{ c *Config }

func (f passwords) set(value string) error {
	path, err := parsePath(value)
	if err != nil || path == "" {
		return err
	}
	data, _, warning, err := trustedfile.Read(path, maxSecretFile)
	if err != nil {
		return err
	}
	f.c.warn(warning)
	for line := range strings.Lines(strings.TrimPrefix(string(data), hostfile.ByteOrderMark)) {
		if line = strings.TrimRight(line, "\r\n"); line != "" {
			f.c.DiscoveryPasswords = append(f.c.DiscoveryPasswords, secret.New(line))
		}
	}
	return nil
}
