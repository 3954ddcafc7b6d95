// Package bigip is an in-memory fake of F5 BIG-IP for tests: the part of iControl REST that
// installs certificates, strict and with state. It follows
// https://clouddocs.f5.com/api/icontrol-rest/ and published answers of real devices. Ansible's
// f5networks.f5_modules works against it.
package bigip

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"time"

	"certctl-agent/internal/testing/testca"
)

// The accounts of a new device. Admin has all permissions.
const (
	Admin    = "admin"
	Password = "s3cret-of-the-admin"
)

// Group is the device group of the two units.
const Group = "pair"

// Downloads is the directory of uploads.
const Downloads = "/var/config/rest/downloads/"

// Device is a pair of units, of which one answers requests.
type Device struct {
	CA *testca.CA // issued its management certificate

	server       *httptest.Server // nil if not started
	major, minor int
	version      string

	mu           sync.Mutex // guards the fields below
	running      *config
	saved        *config           // restored by a restart
	peer         *config           // configuration of the other unit
	uploads      map[string][]byte // complete files
	parts        map[string]*part
	tokens       map[string]string // token to user
	transactions map[int64]*transaction
	users        map[string]*user
	count        int64 // counts tokens, transactions and revisions
	now          time.Time
	calls        []Call
	fault        func(Call) Fault
	syncDelay    int           // number of status requests until a sync is done
	pending      int           // remaining ones for the current sync
	peerDown     bool          // the other unit is unreachable
	otherPending bool          // another device group is not in sync
	saveFails    string        // error of saving the configuration, or ""
	removeFails  string        // error of rm, or ""
	release      chan struct{} // closed at the end, so hanging calls return
}

// user is an account.
type user struct {
	password string
	allowed  []Rule // nil means all calls
}

// Rule allows calls, like a resource of an iControl REST resource group.
type Rule struct {
	Method string `json:"restMethod"`
	Mask   string `json:"resourceMask"` // * stands for one segment, /** for the rest
}

// Matches reports whether the rule allows a call.
func (r Rule) Matches(method, path string) bool {
	if r.Method != method {
		return false
	}
	got, want := strings.Split(strings.Trim(path, "/"), "/"), strings.Split(strings.Trim(r.Mask, "/"), "/")
	for i, segment := range want {
		if segment == "**" {
			return true
		}
		if i >= len(got) || segment != "*" && segment != got[i] {
			return false
		}
	}
	return len(got) == len(want)
}

// config is the configuration of a unit.
type config struct {
	Partitions []string // and folders, as paths
	Certs      map[string]*file
	Keys       map[string]*file
	Profiles   map[string]*profile // by kind and path
}

func (c *config) clone() *config {
	d := &config{Partitions: slices.Clone(c.Partitions), Certs: make(map[string]*file), Keys: make(map[string]*file), Profiles: make(map[string]*profile)}
	for name, f := range c.Certs {
		d.Certs[name] = new(*f)
	}
	for name, f := range c.Keys {
		d.Keys[name] = new(*f)
	}
	for name, p := range c.Profiles {
		copied := *p
		copied.Chain, copied.Other = slices.Clone(p.Chain), maps.Clone(p.Other)
		d.Profiles[name] = &copied
	}
	return d
}

// New returns a device with a version such as "17.1.1", the partitions Common and Tenant, the
// folder /Common/site, and the factory profiles. Dial connects to it; Start makes it listen.
func New(version string) (*Device, error) {
	d := &Device{
		version: version, uploads: make(map[string][]byte), parts: make(map[string]*part), tokens: make(map[string]string),
		transactions: make(map[int64]*transaction), users: map[string]*user{Admin: {password: Password}},
		now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), release: make(chan struct{}),
	}
	if _, err := fmt.Sscanf(version, "%d.%d", &d.major, &d.minor); err != nil {
		return nil, fmt.Errorf("version %s: %w", version, err)
	}
	var err error
	if d.CA, err = testca.New(); err != nil {
		return nil, err
	}
	factory, err := factoryConfig()
	if err != nil {
		return nil, err
	}
	d.running, d.saved, d.peer = factory, factory.clone(), factory.clone()
	return d, nil
}

// Start makes the device listen on loopback with TLS until Stop.
func (d *Device) Start() error {
	certificate, err := d.CA.TLSCertificate("127.0.0.1")
	if err != nil {
		return err
	}
	d.server = httptest.NewUnstartedServer(d)
	d.server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	d.server.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that distrust the certificate
	d.server.StartTLS()
	return nil
}

// URL returns the address of the device, or "" if it does not listen.
func (d *Device) URL() string {
	if d.server == nil {
		return ""
	}
	return d.server.URL
}

// Stop undoes Start.
func (d *Device) Stop() {
	close(d.release)
	d.server.Close()
}

// Dial connects to the device in memory, without TLS.
func (d *Device) Dial(context.Context) (net.Conn, error) {
	client, server := net.Pipe()
	go http.Serve(&listener{server}, d)
	return client, nil
}

// listener accepts a single connection.
type listener struct{ conn net.Conn }

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	conn := l.conn
	if l.conn = nil; conn == nil {
		return nil, net.ErrClosed
	}
	return conn, nil
}

// Close implements net.Listener.
func (l *listener) Close() error { return nil }

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return &net.TCPAddr{} }

func factoryConfig() (*config, error) {
	ca, err := testca.New()
	if err != nil {
		return nil, err
	}
	rsa, err := rsaKey()
	if err != nil {
		return nil, err
	}
	issued, err := ca.Issue(testca.Template{CommonName: "localhost.localdomain", Key: rsa})
	if err != nil {
		return nil, err
	}
	c := &config{Partitions: []string{"/Common", "/Common/site", "/Tenant"}, Certs: make(map[string]*file), Keys: make(map[string]*file), Profiles: make(map[string]*profile)}
	c.Certs["/Common/default.crt"] = parsed(&file{Content: issued.LeafPEM(), Source: "/config/ssl/ssl.crt/default.crt"})
	c.Keys["/Common/default.key"] = parsed(&file{Content: issued.KeyPEM(), Source: "/config/ssl/ssl.key/default.key"})
	c.Profiles[clientSSL+" /Common/clientssl"] = &profile{Kind: clientSSL, Path: "/Common/clientssl",
		Chain: []entry{{Name: "default", Cert: "/Common/default.crt", Key: "/Common/default.key"}}}
	c.Profiles[serverSSL+" /Common/serverssl"] = &profile{Kind: serverSSL, Path: "/Common/serverssl"}
	return c, nil
}

// Trust adds an account that may make the calls that rules allow.
func (d *Device) Trust(name, password string, rules ...Rule) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.users[name] = &user{password: password, allowed: rules}
}

// Profile creates a profile of a kind that inherits from parent, or from the factory's if parent is
// "".
func (d *Device) Profile(kind, path, parent string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if parent == "" {
		parent = map[string]string{clientSSL: "/Common/clientssl", serverSSL: "/Common/serverssl"}[kind]
	}
	d.running.Profiles[kind+" "+path] = &profile{Kind: kind, Path: path, Parent: parent, Inherit: kind == clientSSL}
	d.settle()
}

// Install installs a certificate and its key as path.crt and path.key, as an administrator would.
// The profile ("client-ssl /Common/www", or "") uses them in place of a pair with the same type of
// key.
func (d *Device) Install(path string, cert, key []byte, in string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running.Certs[path+".crt"] = d.newFile(cert, path+".crt")
	d.running.Keys[path+".key"] = d.newFile(key, path+".key")
	switch p := d.running.Profiles[in]; {
	case p != nil && p.Kind == serverSSL:
		p.Cert, p.Key, p.CA = path+".crt", path+".key", ""
	case p != nil:
		kind := d.running.Keys[path+".key"].keyType()
		others := slices.DeleteFunc(slices.Clone(d.running.chain(p)), func(e entry) bool { return d.running.Keys[e.Key].keyType() == kind })
		p.Chain = append(others, entry{Name: path[strings.LastIndex(path, "/")+1:], Cert: path + ".crt", Key: path + ".key"})
		p.Inherit = false
	}
	if err := d.running.check(d); err != nil {
		return err
	}
	d.settle()
	return nil
}

// Passphrase gives the key of a pair in a client-ssl profile a passphrase.
func (d *Device) Passphrase(path, pair, passphrase string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.running.Profiles[clientSSL+" "+path]
	p.Chain, p.Inherit = slices.Clone(d.running.chain(p)), false
	for i := range p.Chain {
		if p.Chain[i].Name == pair {
			p.Chain[i].Passphrase = encrypt(passphrase)
		}
	}
	d.settle()
}

// settle saves the running configuration and syncs it to the other unit.
func (d *Device) settle() { d.saved, d.peer = d.running.clone(), d.running.clone() }

// Reboot restarts the device with its saved configuration.
func (d *Device) Reboot() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reboot()
}

func (d *Device) reboot() {
	d.running = d.saved.clone()
	clear(d.tokens)
	clear(d.transactions)
	clear(d.parts)
}

// failOver makes the other unit answer. It has none of this unit's tokens and uploads. Its
// configuration is saved, because a sync saves it.
func (d *Device) failOver() {
	d.running, d.peer = d.peer, d.running
	d.saved = d.running.clone()
	clear(d.tokens)
	clear(d.transactions)
	clear(d.parts)
	clear(d.uploads)
}

// OnCall makes do decide on the fault of each call.
func (d *Device) OnCall(do func(Call) Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = do
}

// SyncTakes sets how many status requests a sync takes, and whether the other unit is unreachable.
func (d *Device) SyncTakes(polls int, down bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncDelay, d.peerDown = polls, down
}

// Unsynced makes the other unit lack a file.
func (d *Device) Unsynced() {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.peer.Certs, "/Common/default.crt")
}

// OtherPending makes another device group wait for its sync permanently.
func (d *Device) OtherPending() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.otherPending = true
}

// SaveFails makes saving the configuration fail with a message, or succeed if it is "".
func (d *Device) SaveFails(message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.saveFails = message
}

// RemoveFails makes rm fail with a message, which iControl REST reports as a success. "" makes it
// work again.
func (d *Device) RemoveFails(message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.removeFails = message
}

// Calls returns the calls since the start or the last Forget.
func (d *Device) Calls() []Call {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

// Forget empties Calls.
func (d *Device) Forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = nil
}

// State returns everything on the device that clients can change, by name: files ("ssl-key
// /Common/www.key") and profiles of the running configuration, uploads ("upload www.key") and
// tokens. Names that end in Saved and Peer have the saved configuration and that of the other unit.
func (d *Device) State() map[string]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	state := make(map[string]string)
	for suffix, c := range map[string]*config{"": d.running, Saved: d.saved, Peer: d.peer} {
		for name, f := range c.Certs {
			state["ssl-cert "+name+suffix] = string(f.Content)
		}
		for name, f := range c.Keys {
			state["ssl-key "+name+suffix] = string(f.Content)
		}
		for name, p := range c.Profiles {
			state[name+suffix] = p.String()
		}
	}
	for name, data := range d.uploads {
		state["upload "+name] = string(data)
	}
	for name := range d.parts {
		state["upload "+name+" (in part)"] = ""
	}
	if n := len(d.tokens); n > 0 {
		state["tokens"] = fmt.Sprint(n)
	}
	return state
}

// Suffixes of names in State.
const (
	Saved = " (saved)"
	Peer  = " (of the other unit)"
)

// InSync reports whether the running configuration is saved, and whether the other unit has it.
func (d *Device) InSync() (saved, synced bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.running.equal(d.saved), d.running.equal(d.peer)
}

func (c *config) equal(other *config) bool {
	a, errA := json.Marshal(c)
	b, errB := json.Marshal(other)
	return errA == nil && errB == nil && bytes.Equal(a, b)
}

// tick returns the device's time, which advances with each change.
func (d *Device) tick() time.Time {
	d.now = d.now.Add(time.Second)
	return d.now
}
