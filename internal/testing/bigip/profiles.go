package bigip

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"

	"certctl-agent/internal/pemutil"
)

const (
	clientSSL = "client-ssl"
	serverSSL = "server-ssl"
	none      = "none"
)

// profile is a client-ssl or server-ssl profile.
type profile struct {
	Kind, Path string
	Parent     string  // defaultsFrom; "" for a factory profile
	Inherit    bool    // client-ssl: use the parent's list, not Chain
	Chain      []entry // client-ssl: certKeyChain

	Cert, Key, CA, Passphrase string // server-ssl; may be ""

	Other map[string]any // other properties
}

// entry is an element of certKeyChain.
type entry struct {
	Name, Cert, Key string
	CA              string // chain, or ""
	Passphrase      string // encrypted
	Usage           string // "" means SERVER
}

// String returns the part of a profile that determines what it serves.
func (p *profile) String() string {
	data, err := json.Marshal(p)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// chain returns the effective list of a profile.
func (c *config) chain(p *profile) []entry {
	for p.Inherit && p.Parent != "" && c.Profiles[p.Kind+" "+p.Parent] != nil {
		p = c.Profiles[p.Kind+" "+p.Parent]
	}
	return p.Chain
}

// uses reports whether a profile uses a file.
func (c *config) uses(path string) bool {
	for _, p := range c.Profiles {
		if p.Cert == path || p.Key == path || p.CA == path || slices.ContainsFunc(p.Chain, func(e entry) bool { return e.Cert == path || e.Key == path || e.CA == path }) {
			return true
		}
	}
	return false
}

// check enforces mcpd's rules for a whole configuration.
func (c *config) check(d *Device) error {
	for _, p := range c.Profiles {
		if p.Parent != "" && c.Profiles[p.Kind+" "+p.Parent] == nil {
			return notFound("profile", p.Parent)
		}
		entries := p.Chain
		if p.Kind == serverSSL {
			if (p.Cert == "") != (p.Key == "") {
				return refuse(400, "01070315:3: profile %s requires both a key and a certificate", p.Path)
			}
			if entries = []entry{{Cert: p.Cert, Key: p.Key, CA: p.CA}}; p.Cert == "" && p.CA == "" {
				continue
			}
		}
		types := make(map[string]bool)
		for _, e := range entries {
			if err := c.checkEntry(p, e); err != nil {
				return err
			}
			kind := c.Keys[e.Key].keyType()
			if p.Kind == clientSSL && types[kind] {
				return refuse(400, "010717e1:3: Client SSL profile (%s) cannot contain more than one set of same certificate/key type.", p.Path)
			}
			types[kind] = true
		}
		if p.Kind == clientSSL && !p.Inherit && d.major < 14 && !types["rsa-private"] {
			return refuse(400, "010717e3:3: Client SSL profile must have RSA certificate/key pair.")
		}
	}
	return nil
}

func (c *config) checkEntry(p *profile, e entry) error {
	for _, path := range []string{e.Cert, e.Key, e.CA} {
		if path != "" && partitionOf(path) != "Common" && partitionOf(path) != partitionOf(p.Path) {
			return refuse(400, "01070726:3: profile %s in partition %s cannot reference file %s in partition %s", p.Path, partitionOf(p.Path), path, partitionOf(path))
		}
	}
	cert, key := c.Certs[e.Cert], c.Keys[e.Key]
	switch {
	case cert == nil:
		return notFound(kindNames[sslCert], e.Cert)
	case key == nil:
		return notFound(kindNames[sslKey], e.Key)
	case e.CA != "" && c.Certs[e.CA] == nil:
		return notFound(kindNames[sslCert], e.CA)
	}
	if cert.leaf == nil || key.private == nil || !pemutil.SamePublicKey(key.private.Public(), cert.leaf.PublicKey) {
		return refuse(400, "01070317:3: profile %s's key and certificate do not match", p.Path)
	}
	return nil
}

// others are properties that are stored and shown unchanged.
var others = []string{"ciphers", "cipherGroup", "serverName", "sniDefault", "sniRequire", "tmOptions", "description", "secureRenegotiation", "renegotiation",
	"peerCertMode", "authenticate", "retainCertificate", "allowNonSsl", "strictResume"}

func (d *Device) profile(c *config, kind, method, rest string, sent object) (object, error) {
	if rest == "" {
		if method != http.MethodPost {
			return nil, refuse(405, "method %s is not supported", method)
		}
		path, err := c.newPath(sent)
		if err != nil {
			return nil, err
		}
		if c.Profiles[kind+" "+path] != nil {
			return nil, refuse(409, "01020066:3: The requested profile (%s) already exists in partition %s.", path, partitionOf(path))
		}
		p := &profile{Kind: kind, Path: path, Parent: map[string]string{clientSSL: "/Common/clientssl", serverSSL: "/Common/serverssl"}[kind], Inherit: kind == clientSSL}
		c.Profiles[kind+" "+path] = p
		return d.setProfile(c, p, sent)
	}
	path := fromURL(rest)
	if !strings.HasPrefix(path, "/") {
		path = "/Common/" + path
	}
	p := c.Profiles[kind+" "+path]
	if p == nil {
		return nil, notFound("profile", path)
	}
	switch method {
	case http.MethodGet:
		return d.showProfile(c, p), nil
	case http.MethodPatch, http.MethodPut:
		return d.setProfile(c, p, sent)
	case http.MethodDelete:
		for _, other := range c.Profiles {
			if other.Kind == kind && other.Parent == path {
				return nil, refuse(400, "01070265:3: The profile (%s) cannot be deleted because it is in use by a profile (%s).", path, other.Path)
			}
		}
		delete(c.Profiles, kind+" "+path)
		return object{}, nil
	}
	return nil, refuse(405, "method %s is not supported", method)
}

func (d *Device) setProfile(c *config, p *profile, sent object) (object, error) {
	properties := append([]string{"name", "partition", "subPath", "defaultsFrom"}, others...)
	if p.Kind == clientSSL {
		properties = append(properties, "certKeyChain", "inheritCertkeychain")
	}
	if err := known(sent, append(properties, "cert", "key", "chain", "passphrase")...); err != nil {
		return nil, err
	}
	if p.Kind == clientSSL && (sent["cert"] != nil || sent["key"] != nil || sent["chain"] != nil) {
		return nil, refuse(400, "01b4002a:3: Client SSL profile (%s):cert-key-chain and profile cert/key/chain/passphrase options cannot be specified together.", p.Path)
	}
	if parent := text(sent["defaultsFrom"]); parent != "" {
		p.Parent = parent
	}
	for name, value := range sent {
		if slices.Contains(others, name) {
			if p.Other == nil {
				p.Other = make(map[string]any)
			}
			p.Other[name] = value
		}
	}
	if err := p.setChain(sent); err != nil {
		return nil, err
	}
	for name, to := range map[string]*string{"cert": &p.Cert, "key": &p.Key, "chain": &p.CA} {
		if value, ok := sent[name]; ok {
			*to = orNone(value)
		}
	}
	if value, ok := sent["passphrase"]; ok {
		p.Passphrase = encrypt(orNone(value))
	}
	return d.showProfile(c, p), nil
}

// setChain replaces the whole list, like the property.
func (p *profile) setChain(sent object) error {
	if list, ok := sent["certKeyChain"]; ok {
		items, ok := list.([]any)
		if !ok {
			return refuse(400, "certKeyChain is not a list")
		}
		p.Chain, p.Inherit = nil, false
		for _, item := range items {
			o, ok := item.(object)
			if !ok || text(o["name"]) == "" || slices.ContainsFunc(p.Chain, func(e entry) bool { return e.Name == o["name"] }) {
				return refuse(400, "01070734:3: Configuration error: an entry of cert-key-chain has no name, or another's")
			}
			if err := known(o, "name", "cert", "key", "chain", "passphrase", "usage", "appService"); err != nil {
				return err
			}
			p.Chain = append(p.Chain, entry{Name: text(o["name"]), Cert: orNone(o["cert"]), Key: orNone(o["key"]), CA: orNone(o["chain"]),
				Passphrase: encrypt(orNone(o["passphrase"])), Usage: strings.TrimPrefix(text(o["usage"]), "SERVER")})
		}
	}
	switch text(sent["inheritCertkeychain"]) {
	case "true":
		if sent["certKeyChain"] != nil {
			return refuse(400, "01b4002c:3: Client SSL profile (%s): a list cannot be given and inherited.", p.Path)
		}
		p.Inherit, p.Chain = true, nil
	case "false":
		p.Inherit = false
	}
	return nil
}

func orNone(v any) string {
	if s := text(v); s != none {
		return s
	}
	return ""
}

// encrypt returns the form of a passphrase that the device shows and also accepts.
func encrypt(passphrase string) string {
	if passphrase == "" || strings.HasPrefix(passphrase, "$M$") {
		return passphrase
	}
	reversed := []byte(passphrase)
	slices.Reverse(reversed)
	return "$M$x$" + base64.StdEncoding.EncodeToString(reversed)
}

func (d *Device) showProfile(c *config, p *profile) object {
	slash := strings.LastIndex(p.Path, "/")
	o := object{"kind": "tm:ltm:profile:" + p.Kind + ":" + p.Kind + "state", "name": p.Path[slash+1:], "partition": partitionOf(p.Path), "fullPath": p.Path,
		"generation": d.count, "selfLink": d.link("/mgmt/tm/ltm/profile/" + p.Kind + "/" + strings.ReplaceAll(p.Path, "/", "~")), "defaultsFrom": none}
	if p.Parent != "" {
		o["defaultsFrom"] = p.Parent
	}
	maps.Copy(o, p.Other)
	if p.Kind == serverSSL {
		d.showPair(o, entry{Cert: p.Cert, Key: p.Key, CA: p.CA, Passphrase: p.Passphrase})
		return o
	}
	o["inheritCertkeychain"] = map[bool]string{true: "true", false: "false"}[p.Inherit]
	var list []any
	for _, e := range c.chain(p) {
		item := object{"name": e.Name, "appService": none}
		if d.major >= 14 {
			item["usage"] = cmp.Or(e.Usage, "SERVER")
		}
		d.showPair(item, e)
		list = append(list, item)
		if len(list) == 1 {
			d.showPair(o, e) // the older properties
		}
	}
	if len(list) > 0 {
		o["certKeyChain"] = list
	}
	return o
}

// showPair shows the files of an entry. Versions from 14 omit an empty chain.
func (d *Device) showPair(o object, e entry) {
	for name, path := range map[string]string{"cert": e.Cert, "key": e.Key, "chain": e.CA} {
		if path == "" {
			if d.major < 14 || name != "chain" {
				o[name] = none
			}
			continue
		}
		kind := map[string]string{"cert": sslCert, "key": sslKey, "chain": sslCert}[name]
		o[name] = path
		o[name+"Reference"] = object{"link": d.link("/mgmt/tm/sys/file/" + kind + "/" + strings.ReplaceAll(path, "/", "~"))}
	}
	if e.Passphrase != "" {
		o["passphrase"] = e.Passphrase
	}
}
