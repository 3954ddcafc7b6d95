// Package kubeconfig reads kubeconfig files, which hold the addresses of Kubernetes clusters and
// the credentials for them, in the form that kubectl writes.
package kubeconfig

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
)

// MaxSize bounds a file, in bytes. A context takes about 10 KiB, most of it certificates.
const MaxSize = 1 << 20

// Context is a cluster with the user for it.
type Context struct {
	Name    string
	Cluster Cluster
	User    User
}

// Cluster is the address of an API server and the way to verify its identity.
type Cluster struct {
	Server     *url.URL // https
	CA         []byte   // PEM; nil to use CAFile
	CAFile     string   // if neither CA nor CAFile is set, the system's roots apply
	ServerName string   // expected in the certificate; "" for the host of Server
	Insecure   bool     // do not verify the certificate
	Proxy      *url.URL // http or socks5, or nil
}

// User holds credentials. Exec is set only if there is neither a token nor a certificate, which
// take precedence.
type User struct {
	Certificate     []byte // PEM; nil to use CertificateFile
	CertificateFile string
	Key             secret.String // PEM
	KeyFile         string
	Token           secret.String
	TokenFile       string // takes precedence over Token
	Exec            *Exec
}

// Exec is a command that prints credentials, see
// https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins.
type Exec struct {
	APIVersion         string
	Command            string // a path, or a plain name
	Args               []string
	Env                []string // NAME=value, added to the usual environment of commands
	InstallHint        string
	ProvideClusterInfo bool
}

// Parse parses a file with relative paths based on the directory dir. It returns the named context,
// or the current one if context is "". Errors have a line number and never quote a value that may
// be a secret. Of other contexts, clusters and users Parse checks only the syntax.
func Parse(data []byte, dir, context string) (*Context, error) {
	read := parse
	if bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
		read = parseJSON
	}
	root, err := read(data)
	if err != nil {
		return nil, err
	}
	f := &file{dir: dir}
	c := f.context(root, context)
	if f.err != nil {
		return nil, f.err
	}
	return c, nil
}

// file decodes a document. It keeps the first error.
type file struct {
	dir string
	err error
}

func (f *file) fail(line int, format string, args ...any) {
	if f.err == nil {
		f.err = &SyntaxError{line, fmt.Sprintf(format, args...)}
	}
}

func (f *file) context(root *node, name string) *Context {
	if root.isNull() {
		f.fail(1, "the file is empty")
		return nil
	}
	top := f.object(root, "the file")
	if version := top.text("apiVersion"); version != "v1" && version != "" {
		f.fail(top.lineOf("apiVersion"), "apiVersion %s is not v1", printable.Quote(version))
	}
	if kind := top.text("kind"); kind != "Config" && kind != "" {
		f.fail(top.lineOf("kind"), "kind %s is not Config", printable.Quote(kind))
	}
	current := top.text("current-context")
	if name == "" {
		if name = current; name == "" {
			f.fail(1, "the file has no current-context: set context")
		}
	}
	context := f.named(top, "contexts", "context", name)
	cluster := f.named(top, "clusters", "cluster", context.text("cluster"))
	user := f.named(top, "users", "user", context.text("user"))
	if f.err != nil {
		return nil
	}
	context.allowOnly("cluster", "user", "namespace", "extensions")
	return &Context{Name: name, Cluster: f.cluster(cluster), User: f.user(user)}
}

// object is a mapping with access to its values.
type object struct {
	*node
	file *file
	what string // its name in errors
}

// object converts n, which must be a mapping or null.
func (f *file) object(n *node, what string) object {
	if n == nil {
		n = &node{line: 1}
	}
	if !n.isNull() && n.kind != mapping {
		f.fail(n.line, "%s is %s, not a mapping", what, n.kind)
	}
	if n.kind != mapping {
		n = &node{kind: mapping, line: n.line}
	}
	return object{n, f, what}
}

// named returns an entry of the list of clusters, contexts or users.
func (f *file) named(top object, list, key, name string) object {
	for _, item := range top.list(list) {
		entry := f.object(item, "an item of "+list)
		if entry.text("name") != name {
			continue
		}
		value := f.object(entry.get(key), printable.Line(key+" "+name, 200))
		if entry.get(key) == nil {
			value.line = item.line
		}
		return value
	}
	f.fail(top.lineOf(list), "there is no %s called %s", key, printable.Quote(name))
	return f.object(nil, key)
}

// lineOf returns the line of a key, or of the mapping if it has no such key.
func (o object) lineOf(key string) int {
	for _, field := range o.fields {
		if field.key == key {
			return field.line
		}
	}
	return o.line
}

// allowOnly rejects all other keys.
func (o object) allowOnly(keys ...string) {
	for _, field := range o.fields {
		if !slices.Contains(keys, field.key) && !field.value.isNull() {
			o.file.fail(field.line, "%s: the key %s is not supported", o.what, printable.Quote(field.key))
		}
	}
}

// text returns the value of a key, which must be a single value, or "".
func (o object) text(key string) string {
	n := o.get(key)
	if n.isNull() {
		return ""
	}
	if n.kind != scalar {
		o.file.fail(n.line, "%s: %s is %s, not a single value", o.what, key, n.kind)
		return ""
	}
	return n.text
}

func (o object) bool(key string) bool {
	switch text := o.text(key); strings.ToLower(text) {
	case "true":
		return true
	case "false", "":
		return false
	default:
		o.file.fail(o.lineOf(key), "%s: %s is neither true nor false", o.what, key)
		return false
	}
}

// path returns the path of a file. Relative paths are based on the kubeconfig's directory.
func (o object) path(key string) string {
	text := o.text(key)
	if text == "" || filepath.IsAbs(text) {
		return text
	}
	return filepath.Join(o.file.dir, text)
}

// data decodes a base64 value.
func (o object) data(key string) []byte {
	text := o.text(key)
	if text == "" {
		return nil
	}
	data, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		o.file.fail(o.lineOf(key), "%s: %s is not base64", o.what, key)
	}
	return data
}

func (f *file) cluster(o object) Cluster {
	o.allowOnly("server", "certificate-authority", "certificate-authority-data", "insecure-skip-tls-verify", "tls-server-name", "proxy-url",
		"disable-compression", "extensions")
	c := Cluster{
		CA:         o.data("certificate-authority-data"),
		ServerName: o.text("tls-server-name"),
		Insecure:   o.bool("insecure-skip-tls-verify"),
	}
	if c.CA == nil { // as in kubectl, the data takes precedence
		c.CAFile = o.path("certificate-authority")
	}
	if c.Insecure && (c.CA != nil || c.CAFile != "") {
		f.fail(o.lineOf("insecure-skip-tls-verify"), "%s: insecure-skip-tls-verify cannot be combined with a certificate authority", o.what)
	}
	server := o.text("server")
	u, err := url.Parse(server)
	switch {
	case server == "":
		f.fail(o.lineOf("server"), "%s has no server", o.what)
	case err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "":
		f.fail(o.lineOf("server"), "%s: server is not a URL such as https://host:6443", o.what)
	case u.Scheme != "https":
		f.fail(o.lineOf("server"), "%s: server must be an https URL, because private keys are sent there", o.what)
	default:
		u.Path = strings.TrimRight(u.Path, "/")
		c.Server = u
	}
	if proxy := o.text("proxy-url"); proxy != "" {
		// The URL may hold a password.
		if c.Proxy, err = url.Parse(proxy); err != nil || c.Proxy.Hostname() == "" || !slices.Contains([]string{"http", "socks5"}, c.Proxy.Scheme) {
			f.fail(o.lineOf("proxy-url"), "%s: proxy-url is not the URL of an http or socks5 proxy", o.what)
		}
	}
	return c
}

func (f *file) user(o object) User {
	const dropped = "the API server dropped passwords in version 1.19: use a token or a client certificate"
	for _, refused := range [][2]string{{"username", dropped}, {"password", dropped}, {"auth-provider", "kubectl dropped it in version 1.26: use exec"},
		{"as", "the agent does not impersonate users"}} {
		if !o.get(refused[0]).isNull() {
			f.fail(o.lineOf(refused[0]), "%s: %s is not supported: %s", o.what, refused[0], refused[1])
		}
	}
	o.allowOnly("client-certificate", "client-certificate-data", "client-key", "client-key-data", "token", "tokenFile", "exec", "extensions")
	u := User{
		Certificate: o.data("client-certificate-data"),
		Key:         secret.New(string(o.data("client-key-data"))),
		Token:       secret.New(o.text("token")),
		TokenFile:   o.path("tokenFile"),
	}
	if u.Certificate == nil {
		u.CertificateFile = o.path("client-certificate")
	}
	if u.Key.IsZero() {
		u.KeyFile = o.path("client-key")
	}
	hasCertificate, hasKey := u.Certificate != nil || u.CertificateFile != "", !u.Key.IsZero() || u.KeyFile != ""
	if hasCertificate != hasKey {
		f.fail(o.line, "%s has a client certificate without its key, or a key without its certificate", o.what)
	}
	if strings.ContainsAny(u.Token.Reveal(), " \r\n\t") {
		f.fail(o.lineOf("token"), "%s: token contains white space", o.what)
	}
	hasToken := !u.Token.IsZero() || u.TokenFile != ""
	if exec := o.get("exec"); !exec.isNull() && !hasToken && !hasCertificate {
		u.Exec = f.exec(f.object(exec, o.what+": exec"))
	} else if !hasToken && !hasCertificate {
		f.fail(o.line, "%s has no credentials: a token, a client certificate or exec", o.what)
	}
	return u
}

func (f *file) exec(o object) *Exec {
	o.allowOnly("apiVersion", "command", "args", "env", "installHint", "provideClusterInfo", "interactiveMode")
	e := &Exec{
		APIVersion:         o.text("apiVersion"),
		Command:            o.text("command"),
		InstallHint:        o.text("installHint"),
		ProvideClusterInfo: o.bool("provideClusterInfo"),
	}
	if !slices.Contains([]string{"client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"}, e.APIVersion) {
		f.fail(o.lineOf("apiVersion"), "%s: apiVersion %s is neither client.authentication.k8s.io/v1 nor v1beta1", o.what, printable.Quote(e.APIVersion))
	}
	if e.Command == "" {
		f.fail(o.line, "%s has no command", o.what)
	}
	if strings.Contains(e.Command, "/") && !filepath.IsAbs(e.Command) {
		e.Command = filepath.Join(f.dir, e.Command)
	}
	switch mode := o.text("interactiveMode"); mode {
	case "", "Never", "IfAvailable":
	case "Always":
		f.fail(o.lineOf("interactiveMode"), "%s requires a user at a terminal (interactiveMode: Always)", o.what)
	default:
		f.fail(o.lineOf("interactiveMode"), "%s: interactiveMode %s is unknown", o.what, printable.Quote(mode))
	}
	for _, item := range o.list("args") {
		if item.kind != scalar {
			f.fail(item.line, "%s: an item of args is %s, not a single value", o.what, item.kind)
		}
		e.Args = append(e.Args, item.text)
	}
	for _, item := range o.list("env") {
		variable := f.object(item, o.what+": an item of env")
		variable.allowOnly("name", "value")
		name := variable.text("name")
		if name == "" || strings.ContainsAny(name, "=\x00") {
			f.fail(item.line, "%s: an item of env has no usable name", o.what)
		}
		e.Env = append(e.Env, name+"="+variable.text("value"))
	}
	return e
}

// list returns the items of a key, which must be a list.
func (o object) list(key string) []*node {
	n := o.get(key)
	if n.isNull() {
		return nil
	}
	if n.kind != sequence {
		o.file.fail(n.line, "%s: %s is %s, not a list", o.what, key, n.kind)
		return nil
	}
	return n.items
}
