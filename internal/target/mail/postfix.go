package mail

import (
	"bytes"
	"context"
	"maps"
	"os"
	"slices"
	"strings"

	"certctl-agent/internal/target"
)

// parameters are those of Postfix, unexpanded, by name.
type parameters map[string]string

// askPostfix reads main.cf, and the overrides of each service in master.cf, as
// postconf prints them.
func (c *Connector) askPostfix(ctx context.Context) ([]target.ServerPair, error) {
	programs := []string{"postfix"}
	main, err := c.query(ctx, "postconf", programs)
	if err != nil {
		return nil, err
	}
	overrides, err := c.query(ctx, "postconf", programs, "-P")
	if err != nil {
		return nil, err
	}
	return postfixPairs(main, overrides), nil
}

// postfixPairs lists the pairs of main.cf and of each service of master.cf.
// A parameter that a service does not override counts for it as it is in
// main.cf, and is expanded with what the service does override.
func postfixPairs(main, overrides string) []target.ServerPair {
	general := make(parameters)
	for line := range strings.Lines(main) {
		if name, value, ok := strings.Cut(line, " ="); ok {
			general[name] = strings.TrimSpace(value)
		}
	}
	services := make(map[string]parameters)
	for line := range strings.Lines(overrides) { // service/type/parameter = value
		name, value, ok := strings.Cut(line, " =")
		slash := strings.LastIndex(name, "/")
		if !ok || slash < 0 {
			continue
		}
		service := name[:slash]
		if services[service] == nil {
			services[service] = maps.Clone(general)
		}
		services[service][name[slash+1:]] = strings.TrimSpace(value)
	}
	pairs := general.pairs("main.cf")
	for _, service := range slices.Sorted(maps.Keys(services)) {
		pairs = append(pairs, services[service].pairs("master.cf, "+service)...)
	}
	return pairs
}

// pairs lists those of the server, of the clients and of tlsproxy: each has a
// family of parameters, such as smtpd_tls_.
func (p parameters) pairs(where string) []target.ServerPair {
	var pairs []target.ServerPair
	for _, name := range slices.Sorted(maps.Keys(p)) {
		family, ok := strings.CutSuffix(name, "_cert_file")
		if !ok {
			continue
		}
		// Where there are chain files, nothing else is read.
		files := strings.FieldsFunc(p.value(family+"_chain_files"), func(r rune) bool { return strings.ContainsRune(", \t", r) })
		if len(files) > 0 {
			pairs = append(pairs, chainPairs(files, where+", "+family+"_chain_files")...)
			continue
		}
		for _, algorithm := range []string{"_", "_ec", "_d"} {
			key := family + algorithm + "key_file"
			pairs = append(pairs, target.ServerPair{Cert: p.value(family + algorithm + "cert_file"), Key: p.value(key), Where: where + ", " + key})
		}
	}
	return pairs
}

// value expands the $name and ${name} of a parameter. What cannot be expanded
// here, such as a condition, keeps its dollar sign, by which target.KeyFor
// knows it.
func (p parameters) value(name string) string { return p.expand(p[name], 0) }

func (p parameters) expand(value string, depth int) string {
	const maxDepth = 8
	return os.Expand(value, func(name string) string {
		referred, ok := p[name]
		if !ok || depth == maxDepth {
			return "${" + name + "}"
		}
		return p.expand(referred, depth+1)
	})
}

// chainPairs pairs each of a list of chain files with the one before it, if
// that holds a key and nothing else: Postfix wants a key, its certificate and
// the chain in this order, in one file or in several.
func chainPairs(files []string, where string) []target.ServerPair {
	var pairs []target.ServerPair
	for i, cert := range files {
		pair := target.ServerPair{Cert: cert, Where: where}
		if i > 0 && holdsOnlyKeys(files[i-1]) {
			pair.Key = files[i-1]
		}
		pairs = append(pairs, pair)
	}
	return pairs
}

// maxKeyFile bounds what is read of a file that may hold a key.
const maxKeyFile = 1 << 20

func holdsOnlyKeys(path string) bool {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() || info.Size() > maxKeyFile {
		return false
	}
	data, err := os.ReadFile(path)
	defer clear(data)
	return err == nil && bytes.Contains(data, []byte("PRIVATE KEY-----")) && !bytes.Contains(data, []byte("CERTIFICATE-----"))
}
