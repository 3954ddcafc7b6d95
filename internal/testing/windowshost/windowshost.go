// Package windowshost is a model of a Windows host for tests: its certificate stores, the bindings
// of IIS, and http.sys, which serves them. It does not run PowerShell, but carries out the requests
// of the agent's script by that script's own contract
// (internal/connector/windows/scripts/1-contract.ps1). It shares no code with the agent.
package windowshost

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf16"

	"certctl-agent/internal/pkcs12"
)

// Certificate is a certificate in a store.
type Certificate struct {
	*x509.Certificate
	Key          []byte // PKCS #8, or nil
	Exportable   bool
	FriendlyName string
	Readers      []string // accounts other than SYSTEM that may read the key
}

// Binding is a binding of a site.
type Binding struct {
	Protocol    string
	Information string // address:port:host
	Thumbprint  string
	Store       string
	Flags       int // 1: SNI; 2: the central store
}

// Host is a Windows host.
type Host struct {
	mu       sync.Mutex                         // guards the fields below
	stores   map[string]map[string]*Certificate // by Location\Store, by thumbprint
	marks    map[string]map[string]string       // targets by Location\Store and thumbprint
	order    []string                           // order of marks
	sites    map[string][]*Binding
	accounts []string // existing accounts
	listener []string // thumbprints that services other than IIS use
	noIIS    bool
	plain    bool // the account is not an administrator
	german   bool
	old      bool // it cannot read PKCS #12 with AES
	loses    bool // the next change of a binding's certificate loses both
	now      func() time.Time
	fault    func(operation string, done bool) error
	adjust   func(*HostState) // changes the result of a self-test; may be nil
	seen     []Run
	writes   int
}

// Run is a run of PowerShell.
type Run struct {
	Command []string
	Script  string
	Request Request
}

// Request is the input of the script.
type Request struct {
	Contract      int      `json:"contract"`
	Operation     string   `json:"operation"`
	Target        string   `json:"target"`
	Location      string   `json:"location"`
	Store         string   `json:"store"`
	Thumbprint    string   `json:"thumbprint"`
	Chain         []string `json:"chain"`
	FriendlyName  string   `json:"friendly_name"`
	KeyReaders    []string `json:"key_readers"`
	Site          string   `json:"site"`
	Binding       string   `json:"binding"`
	Flags         int      `json:"ssl_flags"`
	Expected      string   `json:"expected"`
	PFX           string   `json:"pfx"`
	Password      string   `json:"password"`
	Exportable    bool     `json:"exportable"`
	Was           *State   `json:"was"`
	Keep          int      `json:"keep"`
	RemoveExpired bool     `json:"remove_expired"`
}

// Answer is the output of the script.
type Answer struct {
	Contract int        `json:"contract"`
	Code     string     `json:"code"`
	Detail   string     `json:"detail"`
	Message  string     `json:"message"`
	HResult  int        `json:"hresult"`
	Line     int        `json:"line"`
	State    *State     `json:"state"`
	Host     *HostState `json:"host"`
}

// State is the state of a certificate and a binding.
type State struct {
	Thumbprint   string   `json:"thumbprint"`
	Present      bool     `json:"present"`
	HasKey       bool     `json:"has_key"`
	SHA256       string   `json:"sha256"`
	FriendlyName string   `json:"friendly_name"`
	Unread       []string `json:"unread"`
	ChainMissing []string `json:"chain_missing"`
	Ours         []string `json:"ours"`
	Binding      string   `json:"binding"`
	Bound        string   `json:"bound"`
	BoundStore   string   `json:"bound_store"`
	BoundFlags   int      `json:"bound_flags"`
	Sharing      []string `json:"sharing"`
}

// HostState is the result of a self-test.
type HostState struct {
	PowerShell    string   `json:"powershell"`
	LanguageMode  string   `json:"language_mode"`
	DotNet        int      `json:"dotnet"`
	Windows       string   `json:"windows"`
	User          string   `json:"user"`
	Administrator bool     `json:"administrator"`
	Store         string   `json:"store"`
	IIS           string   `json:"iis"`
	Sites         []string `json:"sites"`
}

// New returns a host with the standard stores and a site without HTTPS.
func New() *Host {
	h := &Host{stores: make(map[string]map[string]*Certificate), marks: make(map[string]map[string]string), sites: make(map[string][]*Binding), now: time.Now}
	for _, location := range []string{"LocalMachine", "CurrentUser"} {
		for _, store := range []string{"My", "CA", "Root"} {
			h.stores[location+`\`+store] = make(map[string]*Certificate)
		}
	}
	h.stores[`LocalMachine\WebHosting`] = make(map[string]*Certificate)
	h.sites["Default Web Site"] = []*Binding{{Protocol: "http", Information: "*:80:"}}
	return h
}

// Change changes the host as an administrator at its console would.
func (h *Host) Change(do func(*Console)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	do(&Console{h})
}

// Console is an administrator at the host.
type Console struct{ h *Host }

// Site creates a site, or adds bindings to it.
func (c *Console) Site(name string, bindings ...*Binding) {
	c.h.sites[name] = append(c.h.sites[name], bindings...)
}

// Bindings returns the bindings of a site.
func (c *Console) Bindings(site string) []*Binding { return c.h.sites[site] }

// Put adds a certificate to a store, named Location\Store.
func (c *Console) Put(store string, certificate *Certificate) string {
	name := Thumbprint(certificate.Certificate)
	c.h.stores[store][name] = certificate
	return name
}

// Certificates returns the certificates in a store.
func (c *Console) Certificates(store string) map[string]*Certificate { return c.h.stores[store] }

// Marked returns the certificates in a store with the mark of a target, newest first.
func (c *Console) Marked(store, target string) []string { return c.h.marked(store, target) }

// Account creates accounts.
func (c *Console) Account(names ...string) { c.h.accounts = append(c.h.accounts, names...) }

// Listen makes a service other than IIS use a certificate.
func (c *Console) Listen(thumbprint string) { c.h.listener = append(c.h.listener, thumbprint) }

// Uninstall removes IIS.
func (c *Console) Uninstall() { c.h.noIIS = true }

// Demote removes the agent's account from Administrators.
func (c *Console) Demote() { c.h.plain = true }

// AdjustHostState changes the result of self-tests.
func (c *Console) AdjustHostState(do func(*HostState)) { c.h.adjust = do }

// German sets the language of Windows to German.
func (c *Console) German() { c.h.german = true }

// Old makes the host a Windows Server 2016.
func (c *Console) Old() { c.h.old = true }

// Lose makes http.sys refuse the next certificate of a binding after it has removed the former one.
func (c *Console) Lose() { c.h.loses = true }

// Clock sets the clock.
func (c *Console) Clock(now func() time.Time) { c.h.now = now }

// Fault sets a function that is called before and after each operation. If it returns an error, the
// host fails there: Run returns the error without an answer.
func (c *Console) Fault(fault func(operation string, done bool) error) { c.h.fault = fault }

// Runs returns the runs of PowerShell so far.
func (h *Host) Runs() []Run {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.seen)
}

// State returns everything on the host as text, by name.
func (h *Host) State() map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make(map[string]string)
	for store, certificates := range h.stores {
		for name, c := range certificates {
			readers := slices.Sorted(slices.Values(c.Readers))
			all[store+`\`+name] = fmt.Sprintf("%s|%x|%v|%s|%v|%s", c.Subject, sha256.Sum256(c.Key), c.Exportable, c.FriendlyName, readers, h.marks[store][name])
		}
	}
	for site, bindings := range h.sites {
		for _, b := range bindings {
			all[fmt.Sprintf("%s/%s/%s", site, b.Protocol, b.Information)] = fmt.Sprintf("%s|%s|%d", b.Thumbprint, b.Store, b.Flags)
		}
	}
	for store, marks := range h.marks {
		for name, target := range marks {
			if h.stores[store][name] == nil {
				all["mark of "+store+`\`+name] = target
			}
		}
	}
	return all
}

// Writes returns the number of changes by the agent.
func (h *Host) Writes() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.writes
}

// Thumbprint returns the SHA-1 of a certificate in Windows' format.
func Thumbprint(c *x509.Certificate) string { return fmt.Sprintf("%X", sha1.Sum(c.Raw)) }

// ErrDropped is returned by Run if the host fails during a run.
var ErrDropped = errors.New("the host has gone away")

// Run runs a command like a WinRM shell. It knows only the commands that the agent is documented to
// run.
func (h *Host) Run(command []string, stdin []byte) (stdout, stderr []byte, exit int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	script, q, err := parse(command, stdin)
	if err != nil {
		return nil, fmt.Appendf(nil, "#< CLIXML\r\n<Objs Version=\"1.1.0.1\"><S S=\"Error\">%s_x000D__x000A_</S></Objs>", err), 1, nil
	}
	h.seen = append(h.seen, Run{slices.Clone(command), script, *q})
	if h.fault != nil {
		if err := h.fault(q.Operation, false); err != nil {
			return nil, nil, 0, err
		}
	}
	a := h.answer(q)
	if h.fault != nil {
		if err := h.fault(q.Operation, true); err != nil {
			return nil, nil, 0, err
		}
	}
	document, err := json.Marshal(a)
	if err != nil {
		return nil, nil, 0, err
	}
	return append(document, "\r\n"...), nil, 0, nil
}

// parse does the work of PowerShell and of the first lines of the script.
func parse(command []string, stdin []byte) (string, *Request, error) {
	if len(command) < 2 || command[0] != "powershell.exe" || command[len(command)-2] != "-EncodedCommand" {
		return "", nil, fmt.Errorf("%q is not recognized as a command", command)
	}
	wide, err := base64.StdEncoding.DecodeString(command[len(command)-1])
	if err != nil {
		return "", nil, err
	}
	var units []uint16
	for pair := range slices.Chunk(wide, 2) {
		units = append(units, binary.LittleEndian.Uint16(pair))
	}
	if start := string(utf16.Decode(units)); !strings.Contains(start, "[Console]::In.ReadLine()") || !strings.Contains(start, "[ScriptBlock]::Create") {
		return "", nil, fmt.Errorf("%q does not read a script", start)
	}
	lines := bytes.SplitAfter(stdin, []byte("\n"))
	if len(lines) != 3 || len(lines[2]) != 0 || bytes.ContainsFunc(stdin, func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) {
		return "", nil, errors.New("standard input is not two lines of ASCII")
	}
	script, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(lines[0])))
	if err != nil {
		return "", nil, err
	}
	decoder := json.NewDecoder(bytes.NewReader(lines[1]))
	decoder.DisallowUnknownFields()
	q := new(Request)
	if err := decoder.Decode(q); err != nil {
		return "", nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return "", nil, errors.New("there is more than one document")
	}
	return string(script), q, complete(lines[1])
}

// complete returns an error unless a request has all of its members: the script does not check
// that.
func complete(document []byte) error {
	var got map[string]json.RawMessage
	if err := json.Unmarshal(document, &got); err != nil {
		return err
	}
	var want map[string]json.RawMessage
	all, err := json.Marshal(Request{})
	if err == nil {
		err = json.Unmarshal(all, &want)
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			return fmt.Errorf("the request has no %s", name)
		}
	}
	for _, name := range []string{"chain", "key_readers"} {
		if string(got[name]) == "null" {
			return fmt.Errorf("%s of the request is null", name)
		}
	}
	return err
}

// failure ends an operation.
type failure struct {
	code, detail, message string
	hresult               int
}

func (f *failure) Error() string { return f.code }

func fail(code, detail string) error {
	return &failure{code: code, detail: detail, message: code, hresult: -2146233088}
}

// denied returns E_ACCESSDENIED.
func (h *Host) denied() error {
	message := "Access is denied.\r\n"
	if h.german {
		message = "Zugriff verweigert – Schlüssel\r\n"
	}
	return &failure{code: "access-denied", message: message, hresult: -2147024891}
}

func (h *Host) answer(q *Request) *Answer {
	a := &Answer{Contract: 1}
	err := h.carryOut(q, a)
	if err == nil && q.Operation != "selftest" {
		a.State, err = h.state(q)
	}
	if err != nil {
		a.State, a.Host = nil, nil
		f, ok := errors.AsType[*failure](err)
		if !ok {
			f = &failure{code: "failed", message: err.Error(), hresult: -2146233088}
		}
		a.Code, a.Detail, a.Message, a.HResult, a.Line = f.code, f.detail, f.message, f.hresult, 42
	}
	return a
}

func (h *Host) carryOut(q *Request, a *Answer) error {
	if q.Contract != 1 {
		return fail("request", "")
	}
	switch q.Operation {
	case "read":
		return nil
	case "write":
		return h.write(q)
	case "restore":
		return h.restore(q)
	case "finish":
		return h.finish(q)
	case "selftest":
		a.Host = h.selfTest(q)
		return nil
	}
	return fail("request", "")
}

func (h *Host) selfTest(q *Request) *HostState {
	s := &HostState{PowerShell: "5.1.17763.1", LanguageMode: "FullLanguage", DotNet: 461814, Windows: "10.0.17763.0", User: `WIN1\certctl`, Administrator: !h.plain, Sites: []string{}}
	code := func(err error) string {
		if f, ok := errors.AsType[*failure](err); ok {
			return f.code
		}
		return ""
	}
	_, err := h.open(q, q.Store, true)
	s.Store = code(err)
	if _, err = h.iis(); err == nil {
		s.Sites = slices.Sorted(maps.Keys(h.sites))
	}
	s.IIS = code(err)
	if h.adjust != nil {
		h.adjust(s)
	}
	return s
}

func (h *Host) open(q *Request, name string, write bool) (map[string]*Certificate, error) {
	at := q.Location + `\` + name
	for store, certificates := range h.stores {
		if strings.EqualFold(store, at) {
			if write && h.plain && q.Location == "LocalMachine" {
				return nil, h.denied()
			}
			return certificates, nil
		}
	}
	return nil, fail("store-missing", name)
}

func (h *Host) iis() (map[string][]*Binding, error) {
	if h.noIIS {
		return nil, fail("iis-missing", `C:\Windows\system32\inetsrv\Microsoft.Web.Administration.dll`)
	}
	if h.plain {
		return nil, h.denied()
	}
	return h.sites, nil
}

func (h *Host) site(q *Request) (string, *Binding, error) {
	sites, err := h.iis()
	if err != nil {
		return "", nil, err
	}
	for name, bindings := range sites {
		if !strings.EqualFold(name, q.Site) {
			continue
		}
		for _, b := range bindings {
			if b.Protocol == "https" && strings.EqualFold(b.Information, q.Binding) {
				return name, b, nil
			}
		}
		return name, nil, nil
	}
	return "", nil, fail("site-missing", strings.Join(slices.Sorted(maps.Keys(sites)), ", "))
}

// entry returns the http.sys entry of a binding, which has one certificate: an address and port or,
// with SNI, a host name and port, see
// https://learn.microsoft.com/en-us/windows-server/networking/technologies/netsh/netsh-http#add-sslcert.
func entry(information string, flags int) string {
	parts := strings.Split(strings.ToLower(information), ":")
	if flags&1 != 0 {
		return strings.Join(parts[len(parts)-2:], ":")
	}
	return strings.Join(parts[:len(parts)-1], ":")
}

// entries returns the bindings of a site that use the certificate of an entry.
func (h *Host) entries(site, at string) (all []*Binding) {
	for _, b := range h.sites[site] {
		if b.Protocol == "https" && entry(b.Information, b.Flags) == at {
			all = append(all, b)
		}
	}
	return all
}

// sharing returns the bindings that the request would change without permission. Bindings of its
// own site with the same name at another address are permitted.
func (h *Host) sharing(q *Request, exists bool, flags int) []string {
	sharing := []string{}
	for _, name := range slices.Sorted(maps.Keys(h.sites)) {
		for _, b := range h.entries(name, entry(q.Binding, flags)) {
			if !strings.EqualFold(name, q.Site) || !strings.EqualFold(b.Information, q.Binding) && (!exists || flags&1 == 0) {
				sharing = append(sharing, name+" "+b.Information)
			}
		}
	}
	return sharing
}

// serve sets the certificate of a binding's entry.
func (h *Host) serve(b *Binding, thumbprint, store string) {
	for site := range h.sites {
		for _, other := range h.entries(site, entry(b.Information, b.Flags)) {
			other.Thumbprint, other.Store = thumbprint, store
		}
	}
}

// ours returns the existing certificates that have a mark.
func (h *Host) ours(q *Request) []string {
	ours := []string{}
	for _, name := range h.marked(q.Location+`\`+q.Store, q.Target) {
		if h.stores[q.Location+`\`+q.Store][name] != nil {
			ours = append(ours, name)
		}
	}
	return ours
}

// marked returns the marks of a target, newest first.
func (h *Host) marked(store, target string) []string {
	var names []string
	for _, name := range slices.Backward(h.order) {
		if h.marks[store][name] == target && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func (h *Host) mark(store, name, target string) {
	if h.marks[store] == nil {
		h.marks[store] = make(map[string]string)
	}
	h.marks[store][name] = target
	h.order = append(h.order, name)
}

func (h *Host) remove(store, name string) {
	delete(h.stores[store], name)
	delete(h.marks[store], name)
	h.writes++
}

func chain(q *Request) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for _, text := range q.Chain {
		der, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, err
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func (h *Host) known(accounts []string) error {
	for _, account := range accounts {
		switch {
		case slices.Contains([]string{"Everyone", "S-1-1-0", "S-1-5-11", `BUILTIN\Users`, `CORP\Domain Users`}, account):
			return fail("account-broad", account)
		case !slices.Contains(h.accounts, account):
			return fail("account-missing", account)
		}
	}
	return nil
}

func (h *Host) state(q *Request) (*State, error) {
	s := &State{Thumbprint: q.Thumbprint, Unread: []string{}, ChainMissing: []string{}, Sharing: []string{}, Ours: h.ours(q)}
	store, err := h.open(q, q.Store, false)
	if err != nil {
		return nil, err
	}
	if err := h.known(q.KeyReaders); err != nil {
		return nil, err
	}
	c := store[q.Thumbprint]
	if c != nil {
		s.Present, s.HasKey, s.FriendlyName, s.SHA256 = true, c.Key != nil, c.FriendlyName, fmt.Sprintf("%X", sha256.Sum256(c.Raw))
	}
	for _, account := range q.KeyReaders {
		if !s.HasKey || !slices.Contains(c.Readers, account) {
			s.Unread = append(s.Unread, account)
		}
	}
	authorities, err := chain(q)
	if err != nil {
		return nil, err
	}
	for _, authority := range authorities {
		if name := Thumbprint(authority); h.stores[q.Location+`\CA`][name] == nil {
			s.ChainMissing = append(s.ChainMissing, name)
		}
	}
	if q.Site == "" {
		return s, nil
	}
	_, b, err := h.site(q)
	if err != nil {
		return nil, err
	}
	s.BoundFlags = q.Flags
	if b != nil {
		s.Binding, s.Bound, s.BoundStore, s.BoundFlags = "https", b.Thumbprint, b.Store, b.Flags
	}
	s.Sharing = h.sharing(q, b != nil, s.BoundFlags)
	return s, nil
}

func (h *Host) write(q *Request) error {
	authorities, err := chain(q)
	if err != nil {
		return err
	}
	known, err := h.open(q, "CA", true)
	if err != nil {
		return err
	}
	for _, authority := range authorities {
		if name := Thumbprint(authority); known[name] == nil {
			h.mark(q.Location+`\CA`, name, "chain")
			known[name] = &Certificate{Certificate: authority}
			h.writes++
		}
	}
	store, err := h.open(q, q.Store, true)
	if err != nil {
		return err
	}
	if c := store[q.Thumbprint]; c == nil || c.Key == nil {
		if c == nil {
			h.mark(q.Location+`\`+q.Store, q.Thumbprint, q.Target)
		}
		if err := h.load(q, store); err != nil {
			return err
		}
		h.writes++
	}
	c := store[q.Thumbprint]
	if c == nil || c.Key == nil {
		return fail("key-missing", q.Thumbprint)
	}
	if q.FriendlyName != "" && c.FriendlyName != q.FriendlyName {
		c.FriendlyName = q.FriendlyName
		h.writes++
	}
	if err := h.known(q.KeyReaders); err != nil {
		return err
	}
	for _, account := range q.KeyReaders {
		if !slices.Contains(c.Readers, account) {
			c.Readers = append(c.Readers, account)
			h.writes++
		}
	}
	if q.Site == "" {
		return nil
	}
	return h.assign(q)
}

// load reads PKCS #12 like Windows.
func (h *Host) load(q *Request, store map[string]*Certificate) error {
	wrong := &failure{code: "failed", message: "The specified network password is not correct.", hresult: -2147024810}
	pfx, err := base64.StdEncoding.DecodeString(q.PFX)
	if err != nil {
		return err
	}
	if h.old && bytes.Contains(pfx, []byte("\x60\x86\x48\x01\x65\x03\x04\x01\x2a")) { // AES-256-CBC
		return wrong
	}
	opened, err := pkcs12.Open(pfx, q.Password, 1<<28)
	if err != nil {
		return wrong
	}
	var aliases []string
	reader := pkcs12.Reader{Passwords: []string{q.Password}, Work: 1 << 28}
	reader.Read(pfx, func(e pkcs12.Entry) {
		if e.Kind == pkcs12.EncryptedKey {
			aliases = append(aliases, e.Alias)
		}
	}, func(error) {})
	for _, alias := range aliases {
		key, err := opened.Find(alias, q.Password)
		if err != nil {
			return wrong
		}
		if Thumbprint(key.Chain[0]) == q.Thumbprint {
			name := alias
			if q.FriendlyName != "" {
				name = q.FriendlyName
			}
			store[q.Thumbprint] = &Certificate{Certificate: key.Chain[0], Key: key.PKCS8, Exportable: q.Exportable, FriendlyName: name}
		}
	}
	return nil
}

func (h *Host) assign(q *Request) error {
	site, b, err := h.site(q)
	if err != nil {
		return err
	}
	bound, flags := "", q.Flags
	if b != nil {
		bound, flags = b.Thumbprint, b.Flags
	}
	switch {
	case b != nil && bound == q.Thumbprint && b.Store == q.Store:
		return nil
	case bound != q.Expected && bound != q.Thumbprint:
		return fail("changed", bound)
	case flags&2 != 0:
		return fail("central-store", "")
	}
	if sharing := h.sharing(q, b != nil, flags); len(sharing) > 0 {
		return fail("sharing", strings.Join(sharing, ", "))
	}
	return h.bind(site, b, q, q.Thumbprint, q.Store, flags)
}

func (h *Host) bind(site string, b *Binding, q *Request, thumbprint, store string, flags int) error {
	h.writes++
	if b == nil {
		b = &Binding{Protocol: "https", Information: q.Binding, Flags: flags}
		h.sites[site] = append(h.sites[site], b)
	}
	if h.loses {
		h.loses = false
		h.serve(b, "", "")
		return &failure{code: "failed", message: "A specified logon session does not exist. It may already have been terminated.", hresult: -2147023584}
	}
	h.serve(b, thumbprint, store)
	return nil
}

func (h *Host) used() []string {
	used := slices.Clone(h.listener)
	for _, bindings := range h.sites {
		for _, b := range bindings {
			used = append(used, b.Thumbprint)
		}
	}
	return used
}

func (h *Host) restore(q *Request) error {
	if q.Was == nil {
		return &failure{code: "failed", message: "Cannot index into a null array.", hresult: -2146233087}
	}
	if q.Site != "" {
		if err := h.unassign(q); err != nil {
			return err
		}
	}
	used := h.used()
	store, err := h.open(q, q.Store, true)
	if err != nil {
		return err
	}
	for _, name := range h.marked(q.Location+`\`+q.Store, q.Target) {
		if !slices.Contains(q.Was.Ours, name) && !slices.Contains(used, name) {
			h.remove(q.Location+`\`+q.Store, name)
		}
	}
	if c := store[q.Was.Thumbprint]; c != nil && q.Was.Present {
		c.FriendlyName = q.Was.FriendlyName
		c.Readers = slices.DeleteFunc(c.Readers, func(name string) bool { return slices.Contains(q.Was.Unread, name) })
	}
	h.removeUnused(q)
	return nil
}

func (h *Host) unassign(q *Request) error {
	site, b, err := h.site(q)
	if err != nil {
		return err
	}
	now, err := h.state(q)
	if err != nil {
		return err
	}
	was := q.Was
	if now.Binding == was.Binding && now.Bound == was.Bound && (now.Bound == "" || now.BoundStore == was.BoundStore) {
		return nil
	}
	if now.Bound != "" && now.Bound != q.Thumbprint && now.Bound != was.Thumbprint && !slices.Contains(now.Ours, now.Bound) || was.Binding != "" && now.Binding == "" {
		return fail("changed", now.Bound)
	}
	switch {
	case was.Binding == "":
		h.serve(b, "", "")
		h.sites[site] = slices.DeleteFunc(h.sites[site], func(other *Binding) bool { return other == b })
		h.writes++
	case was.Bound == "":
		h.serve(b, "", "")
		h.writes++
	case h.stores[`LocalMachine\`+was.BoundStore][was.Bound] == nil:
		return fail("former-missing", was.Bound)
	default:
		return h.bind(site, b, q, was.Bound, was.BoundStore, now.BoundFlags)
	}
	return nil
}

func (h *Host) finish(q *Request) error {
	at := q.Location + `\` + q.Store
	if q.Site != "" {
		if _, err := h.iis(); err != nil {
			return err
		}
	}
	used := h.used()
	kept := 0
	for _, name := range h.marked(at, q.Target) {
		if name == q.Thumbprint {
			continue
		}
		if c := h.stores[at][name]; c != nil {
			current := h.stores[at][q.Thumbprint]
			switch {
			case slices.Contains(used, name):
				continue
			case q.Site == "" && (!q.RemoveExpired || current == nil || !bytes.Equal(c.RawSubject, current.RawSubject) || !c.NotAfter.Before(h.now())):
				continue
			case q.Site != "" && kept < q.Keep:
				kept++
				continue
			}
		}
		h.remove(at, name)
	}
	h.removeUnused(q)
	return nil
}

// removeUnused removes the agent's intermediates that no longer issued anything.
func (h *Host) removeUnused(q *Request) {
	at := q.Location + `\CA`
	for _, name := range h.marked(at, "chain") {
		authority, used := h.stores[at][name], false
		for store, certificates := range h.stores {
			for other, c := range certificates {
				if authority != nil && strings.HasPrefix(store, q.Location) && other != name && bytes.Equal(c.RawIssuer, authority.RawSubject) {
					used = true
				}
			}
		}
		if !used {
			h.remove(at, name)
		}
	}
}
