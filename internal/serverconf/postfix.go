package serverconf

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// parameters are expanded Postfix parameters by name.
type parameters map[string]string

// maxServices bounds the services with different overrides.
const maxServices = 64

// Postfix finds the key of cert in Postfix's configuration. keyPath is the key file of the job.
func Postfix(ctx context.Context, query Query, cert, keyPath targetconf.Path, validate, reload policy.Command) (Pair, error) {
	return ask("postfix", query, cert, func() ([]Pair, error) {
		return postfixPairs(ctx, query, string(keyPath), validate, reload)
	})
}

// postfixPairs runs postconf to print main.cf, and again for each service in master.cf that
// overrides parameters. postconf expands all parameters.
func postfixPairs(ctx context.Context, query Query, keyPath string, validate, reload policy.Command) ([]Pair, error) {
	postconf, err := configPrinter("postconf", validate, reload, "postfix")
	if err != nil {
		return nil, err
	}
	ask := func(args ...string) (string, error) {
		stdout, err := query(ctx, policy.Command{Argv: slices.Concat(postconf.Argv, args), Timeout: postconf.Timeout})
		return string(stdout), err
	}
	main, err := ask("-x")
	if err != nil {
		return nil, err
	}
	overrides, err := ask("-P")
	if err != nil {
		return nil, err
	}
	pairs := parametersOf(main).pairs("main.cf", keyPath)
	services := servicesOf(overrides)
	if len(services) > maxServices {
		return nil, fmt.Errorf("master.cf has more than %d services that override parameters", maxServices)
	}
	for _, service := range services {
		seen, err := ask(append([]string{"-x"}, service.flags...)...)
		if err != nil {
			return nil, err
		}
		pairs = append(pairs, parametersOf(seen).pairs("master.cf, "+service.name, keyPath)...)
	}
	return pairs, nil
}

func parametersOf(answer string) parameters {
	p := make(parameters)
	for line := range strings.Lines(answer) {
		if name, value, ok := strings.Cut(line, " ="); ok {
			p[name] = strings.TrimSpace(value)
		}
	}
	return p
}

type service struct {
	name  string
	flags []string
}

// servicesOf parses the output of postconf -P: service/type/parameter = value. It omits services
// with the same overrides as an earlier one.
func servicesOf(overrides string) []service {
	flags := make(map[string][]string)
	for line := range strings.Lines(overrides) {
		name, value, ok := strings.Cut(line, " =")
		slash := strings.LastIndex(name, "/")
		if !ok || slash < 0 {
			continue
		}
		flags[name[:slash]] = append(flags[name[:slash]], "-o", name[slash+1:]+"="+strings.TrimSpace(value))
	}
	var services []service
	for _, name := range slices.Sorted(maps.Keys(flags)) {
		if !slices.ContainsFunc(services, func(s service) bool { return slices.Equal(s.flags, flags[name]) }) {
			services = append(services, service{name, flags[name]})
		}
	}
	return services
}

// pairs returns the pairs of the server, the clients and tlsproxy. Each has a family of parameters,
// such as smtpd_tls_.
func (p parameters) pairs(where, keyPath string) []Pair {
	var pairs []Pair
	for _, name := range slices.Sorted(maps.Keys(p)) {
		family, ok := strings.CutSuffix(name, "_cert_file")
		if !ok {
			continue
		}
		// Chain files replace all other settings.
		files := strings.FieldsFunc(p[family+"_chain_files"], func(r rune) bool { return strings.ContainsRune(", \t", r) })
		if len(files) > 0 {
			pairs = append(pairs, chainPairs(files, keyPath, where+", "+family+"_chain_files")...)
			continue
		}
		for _, algorithm := range []string{"_", "_ec", "_d"} {
			key := family + algorithm + "key_file"
			if cert := p[family+algorithm+"cert_file"]; cert != "" {
				pairs = append(pairs, Pair{Cert: cert, Key: p[key], Where: where + ", " + key})
			}
		}
	}
	return pairs
}

// chainPairs returns the pairs in a list of chain files. Postfix expects a key, its certificate and
// the chain in this order, in one file or several. So a key is in the certificate's own file unless
// the previous file holds only a key. If the previous file does not exist yet, it can only be the
// target's key_path.
func chainPairs(files []string, keyPath, where string) []Pair {
	var pairs []Pair
	for i, cert := range files {
		pair := Pair{Cert: cert, Key: cert, Where: where}
		if i > 0 && holdsOnlyKeys(files[i-1]) {
			pair.Key = files[i-1]
		} else if i > 0 && !exists(files[i-1]) {
			if pair.Key = ""; slices.Contains(files[i-1:i+1], keyPath) {
				pair.Key = keyPath
			}
		}
		pairs = append(pairs, pair)
	}
	return pairs
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func holdsOnlyKeys(path string) bool {
	data, err := readFile(path)
	return err == nil && bytes.Contains(data, []byte("PRIVATE KEY-----")) && !bytes.Contains(data, []byte("CERTIFICATE-----"))
}
