package mail

import (
	"context"
	"strings"

	"certctl-agent/internal/target"
)

// askDovecot reads the settings that are not at their defaults. Without -P
// doveconf hides keys, their files' names too; that other secrets are in the
// answer is why nothing of it is ever shown but file names.
func (c *Connector) askDovecot(ctx context.Context) ([]target.ServerPair, error) {
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

// dovecotPairs lists the pairs of each block that doveconf prints.
func dovecotPairs(dump string) []target.ServerPair {
	blocks := []*block{{name: "doveconf", set: make(map[string]string)}}
	current := blocks[0]
	for line := range strings.Lines(dump) {
		line = strings.TrimSpace(line)
		if name, opens := strings.CutSuffix(line, " {"); opens {
			current = &block{name: "doveconf, " + name, around: current, set: make(map[string]string)}
			blocks = append(blocks, current)
		} else if line == "}" && current.around != nil {
			current = current.around
		} else if name, value, ok := strings.Cut(line, " = "); ok && strings.HasPrefix(name, "ssl_") {
			current.set[name] = value
		}
	}
	var pairs []target.ServerPair
	for _, b := range blocks {
		for _, prefix := range []string{"ssl_", "ssl_alt_", "ssl_client_"} {
			// A file is named by <path; anything else is a pair in the
			// configuration itself.
			cert, _ := strings.CutPrefix(b.get(prefix+"cert"), "<")
			key, inFile := strings.CutPrefix(b.get(prefix+"key"), "<")
			if !inFile {
				key = ""
			}
			pairs = append(pairs, target.ServerPair{Cert: strings.TrimSpace(cert), Key: strings.TrimSpace(key), Where: b.name + ", " + prefix + "key"})
		}
	}
	return pairs
}
