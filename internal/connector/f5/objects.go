package f5

import (
	"context"
	"crypto/sha1"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"certctl-agent/internal/printable"
	"certctl-agent/internal/vendorapi"
)

const (
	sslCert = "ssl-cert"
	sslKey  = "ssl-key"
	none    = "none"

	// maxEntries bounds certKeyChain. There are three key types, and a few usages.
	maxEntries = 32

	// maxSwept bounds how many files are removed after one deployment. A deployment adds three, so
	// there are more only after backup_retention was lowered.
	maxSwept = 100
)

// file is a file to install on the device.
type file struct {
	kind, path string
	data       []byte
	upload     string // name of the upload
}

// checksum returns the checksum that the device shows for the file.
func (f *file) checksum() string { return fmt.Sprintf("SHA1:%d:%x", len(f.data), sha1.Sum(f.data)) }

func (f *file) url() string { return objectURL(collectionOf(f.kind), f.path) }

func collectionOf(kind string) string { return "/mgmt/tm/sys/file/" + kind }

// stored is an existing file on the device.
type stored struct {
	Path     string `json:"fullPath"`
	Checksum string `json:"checksum"`
	Created  string `json:"createTime"` // RFC 3339, of the device's clock
	KeyType  string `json:"keyType"`
	kind     string
}

// get returns the properties of a file, or nil if it does not exist.
func (d *device) get(ctx context.Context, kind, path string) (*stored, error) {
	s := &stored{kind: kind}
	err := d.do(ctx, request{method: http.MethodGet, path: objectURL(collectionOf(kind), path)}, s)
	if isMissing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the %s %s: %w", kind, printable.Line(path, maxPath), err)
	}
	return s, nil
}

// ours lists this target's files.
func (t *target) ours(ctx context.Context) (all []*stored, err error) {
	query := url.Values{"$filter": {"partition eq " + t.Partition}, "$select": {"fullPath,checksum,createTime"}}
	for _, kind := range []string{sslCert, sslKey} {
		var list struct {
			Items []*stored `json:"items"`
		}
		// Some parts of the device do not decode a plus as a space.
		r := request{method: http.MethodGet, path: collectionOf(kind), query: strings.ReplaceAll(query.Encode(), "+", "%20"), max: maxList}
		if err := t.device.do(ctx, r, &list); err != nil {
			return nil, fmt.Errorf("list the %ss of the partition %s: %w", kind, t.Partition, err)
		}
		for _, s := range list.Items {
			if _, ours := t.isOurs(s.Path); ours {
				s.kind = kind
				all = append(all, s)
			}
		}
	}
	return all, nil
}

// remove deletes a file unless it is in use.
func (t *target) remove(ctx context.Context, s *stored) (removed bool, err error) {
	err = repeat(ctx, func() error {
		return t.device.do(ctx, request{method: http.MethodDelete, path: objectURL(collectionOf(s.kind), s.Path)}, nil)
	})
	switch status := vendorapi.StatusOf(err); {
	case err == nil, isMissing(err):
		return true, nil
	case status == http.StatusBadRequest && strings.Contains(err.Error(), "is in use"):
		return false, nil
	}
	return false, fmt.Errorf("remove the %s %s: %w", s.kind, s.Path, err)
}

// entry is an entry of certKeyChain. Unknown values are preserved.
type entry map[string]any

func (e entry) text(name string) string {
	s, _ := e[name].(string)
	if s == none {
		return ""
	}
	return s
}

// same reports whether two entries use the same files.
func (e entry) same(other entry) bool {
	return e.text("cert") == other.text("cert") && e.text("key") == other.text("key") && e.text("chain") == other.text("chain")
}

// serves reports whether the entry is for a TLS server. Others sign certificates of a forward
// proxy.
func (e entry) serves() bool { return e.text("usage") == "" || e.text("usage") == "SERVER" }

// profile is the part of a profile that selects its certificates.
type profile struct {
	Inherit string  `json:"inheritCertkeychain,omitempty"` // client-ssl; "true": the parent's entries
	Entries []entry `json:"certKeyChain,omitempty"`        // client-ssl

	// For server-ssl. In a client-ssl profile these repeat the first entry.
	Cert       string `json:"cert,omitempty"`
	Key        string `json:"key,omitempty"`
	Chain      string `json:"chain,omitempty"`
	Passphrase string `json:"passphrase,omitempty"`
}

func (p *profile) clone() *profile {
	q := *p
	q.Entries = slices.Clone(p.Entries)
	return &q
}

func (p *profile) equal(other *profile) bool {
	a, errA := json.Marshal(p)
	b, errB := json.Marshal(other)
	return errA == nil && errB == nil && string(a) == string(b)
}

// pairs returns the entries of a profile of either type.
func (t *target) pairs(p *profile) []entry {
	if t.ProfileType == clientSSL {
		return p.Entries
	}
	if p.Cert == "" && p.Key == "" {
		return nil
	}
	return []entry{{"cert": p.Cert, "key": p.Key, "chain": p.Chain}}
}

func (t *target) profileURL() string {
	return objectURL("/mgmt/tm/ltm/profile/"+t.ProfileType, t.profile)
}

// read reads the profile.
func (t *target) read(ctx context.Context) (*profile, error) {
	p := new(profile)
	err := t.device.do(ctx, request{method: http.MethodGet, path: t.profileURL()}, p)
	if isMissing(err) {
		return nil, fmt.Errorf("the %s profile %s does not exist: create it on the device, and use it in a virtual server: %w", t.ProfileType, t.profile, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read the profile: %w", err)
	}
	if t.ProfileType == clientSSL {
		p.Cert, p.Key, p.Chain, p.Passphrase = "", "", "", ""
	}
	for _, s := range []*string{&p.Cert, &p.Key, &p.Chain, &p.Passphrase} {
		if *s == none {
			*s = ""
		}
	}
	if len(p.Entries) > maxEntries {
		return nil, fmt.Errorf("the profile has %d entries in certKeyChain, more than %d", len(p.Entries), maxEntries)
	}
	for _, e := range p.Entries {
		maps.DeleteFunc(e, func(name string, value any) bool {
			return strings.HasSuffix(name, "Reference") || name == "appService" && value == none // read-only values
		})
	}
	return p, nil
}

// orNone returns path, or the device's word for no file.
func orNone(path string) string {
	if path == "" {
		return none
	}
	return path
}

// set returns the request body that sets the profile to p.
func (t *target) set(p *profile) map[string]any {
	if t.ProfileType == serverSSL {
		sent := map[string]any{"cert": orNone(p.Cert), "key": orNone(p.Key), "chain": orNone(p.Chain)}
		if p.Passphrase != "" {
			sent["passphrase"] = p.Passphrase
		}
		return sent
	}
	if p.Inherit == "true" {
		return map[string]any{"inheritCertkeychain": "true"}
	}
	return map[string]any{"certKeyChain": p.Entries, "inheritCertkeychain": "false"}
}
