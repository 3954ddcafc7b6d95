package mail

import (
	"context"
	"strings"

	"certctl-agent/internal/serverconf"
)

// askDovecot reads the settings that are not at their defaults. Without -P
// doveconf hides keys, their files' names too; that other secrets are in the
// answer is why nothing of it is ever shown but file names.
func (c *Connector) askDovecot(ctx context.Context) ([]serverconf.Pair, error) {
	dump, err := c.query(ctx, "doveconf", []string{"doveadm", "doveconf"}, "-n", "-P")
	if err != nil {
		return nil, err
	}
	return dovecotPairs(dump), nil
}

// block is a block of settings, such as protocol imap { }, or the whole file.
type block struct {
	name   string
	around *block // nil: the whole file
	set    map[string]string
}

// get is the value of a setting here: a block has what it does not set itself
// from the block around it.
func (b *block) get(name string) string {
	for ; b != nil; b = b.around {
		if value, ok := b.set[name]; ok {
			return value
		}
	}
	return ""
}

// families are the settings that name a certificate and its key. The names with
// _file are those of Dovecot 2.4, which may also print them without their first
// words, in a block of that name: ssl_server { cert_file = … }.
var families = [...][2]string{
	{"ssl_cert", "ssl_key"}, {"ssl_alt_cert", "ssl_alt_key"}, {"ssl_client_cert", "ssl_client_key"},
	{"ssl_server_cert_file", "ssl_server_key_file"}, {"ssl_server_alt_cert_file", "ssl_server_alt_key_file"},
	{"ssl_client_cert_file", "ssl_client_key_file"},
}

// dovecotPairs lists the pairs of each block that doveconf prints.
func dovecotPairs(dump string) []serverconf.Pair {
	type level struct {
		*block
		prefix string // of the names of settings
	}
	general := &block{name: "doveconf", set: make(map[string]string)}
	blocks, open := []*block{general}, []level{{block: general}}
	for line := range strings.Lines(dump) {
		line = strings.TrimSpace(line)
		current := open[len(open)-1]
		if name, opens := strings.CutSuffix(line, " {"); opens {
			next := level{block: current.block, prefix: name + "_"}
			if name != "ssl_server" && name != "ssl_client" {
				next = level{block: &block{name: "doveconf, " + name, around: current.block, set: make(map[string]string)}}
				blocks = append(blocks, next.block)
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
	var pairs []serverconf.Pair
	for _, b := range blocks {
		for _, family := range families {
			if cert := dovecotFile(family[0], b.get(family[0])); cert != "" {
				key := dovecotFile(family[1], b.get(family[1]))
				pairs = append(pairs, serverconf.Pair{Cert: cert, Key: key, Where: b.name + ", " + family[1]})
			}
		}
	}
	return pairs
}

// dovecotFile is the file that the value of a setting names, "" if it names none
// or only by a variable. Dovecot 2.3 reads a file for <path, and takes anything
// else for the certificate or the key itself.
func dovecotFile(setting, value string) string {
	path, isFile := strings.CutPrefix(strings.Trim(value, `"`), "<")
	if !isFile && !strings.HasSuffix(setting, "_file") || strings.HasPrefix(path, "inline:") || strings.ContainsAny(path, "%$") {
		return ""
	}
	return strings.TrimSpace(path)
}
