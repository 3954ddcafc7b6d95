package serverconf

import (
	"context"
	"strings"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// Dovecot finds the key of cert in Dovecot's non-default settings. doveconf needs -P, because it
// otherwise hides keys and even the names of their files. The output may therefore contain secrets:
// nothing of it but file names may be shown.
func Dovecot(ctx context.Context, query Query, cert targetconf.Path, validate, reload policy.Command) (Pair, error) {
	return ask("dovecot", query, cert, func() ([]Pair, error) {
		call, err := configPrinter("doveconf", validate, reload, "doveadm", "doveconf")
		if err != nil {
			return nil, err
		}
		call.Argv = append(call.Argv, "-n", "-P")
		dump, err := query(ctx, call)
		return dovecotPairs(string(dump)), err
	})
}

// dovecotBlock is a block of settings, such as protocol imap { }, or the top level.
type dovecotBlock struct {
	name   string
	around *dovecotBlock // enclosing block; nil at the top level
	set    map[string]string
}

// get returns the value of a setting. A block inherits settings from the enclosing block.
func (b *dovecotBlock) get(name string) string {
	for ; b != nil; b = b.around {
		if value, ok := b.set[name]; ok {
			return value
		}
	}
	return ""
}

// dovecotFamilies are the settings for a certificate and its key. The names with _file are those of
// Dovecot 2.4, which may also print them without their prefix in a block of that name: ssl_server {
// cert_file = … }.
var dovecotFamilies = [...][2]string{
	{"ssl_cert", "ssl_key"}, {"ssl_alt_cert", "ssl_alt_key"}, {"ssl_client_cert", "ssl_client_key"},
	{"ssl_server_cert_file", "ssl_server_key_file"}, {"ssl_server_alt_cert_file", "ssl_server_alt_key_file"},
	{"ssl_client_cert_file", "ssl_client_key_file"},
}

// dovecotPairs returns the pairs of each block in the output of doveconf.
func dovecotPairs(dump string) []Pair {
	type level struct {
		*dovecotBlock
		prefix string // for the names of settings
	}
	general := &dovecotBlock{name: "doveconf", set: make(map[string]string)}
	blocks, open := []*dovecotBlock{general}, []level{{dovecotBlock: general}}
	for line := range strings.Lines(dump) {
		line = strings.TrimSpace(line)
		current := open[len(open)-1]
		if name, opens := strings.CutSuffix(line, " {"); opens {
			next := level{dovecotBlock: current.dovecotBlock, prefix: name + "_"}
			if name != "ssl_server" && name != "ssl_client" {
				next = level{dovecotBlock: &dovecotBlock{name: "doveconf, " + name, around: current.dovecotBlock, set: make(map[string]string)}}
				blocks = append(blocks, next.dovecotBlock)
			}
			open = append(open, next)
		} else if line == "}" && len(open) > 1 {
			open = open[:len(open)-1]
		} else if name, value, ok := strings.Cut(line, " = "); ok {
			if !strings.HasPrefix(name, "ssl_") {
				name = current.prefix + name
			}
			current.set[name] = value
		}
	}
	var pairs []Pair
	for _, b := range blocks {
		for _, family := range dovecotFamilies {
			if cert := dovecotFile(family[0], b.get(family[0])); cert != "" {
				key := dovecotFile(family[1], b.get(family[1]))
				pairs = append(pairs, Pair{Cert: cert, Key: key, Where: b.name + ", " + family[1]})
			}
		}
	}
	return pairs
}

// dovecotFile returns the file that a setting refers to, or "" if there is none or its name
// contains a variable. In Dovecot 2.3 the value <path refers to a file; any other value is the
// certificate or key itself.
func dovecotFile(setting, value string) string {
	path, isFile := strings.CutPrefix(strings.Trim(value, `"`), "<")
	if !isFile && !strings.HasSuffix(setting, "_file") || strings.HasPrefix(path, "inline:") || strings.ContainsAny(path, "%$") {
		return ""
	}
	return strings.TrimSpace(path)
}
