// Package bigip is a BIG-IP of F5 in memory: the part of iControl REST that
// installs certificates, strict and with state, for tests. It follows
// https://clouddocs.f5.com/api/icontrol-rest/ and the answers of real devices that
// are published; f5networks.f5_modules of Ansible works against it.
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

// The accounts of a new device. Admin may do everything.
const (
	Admin    = "admin"
	Password = "s3cret-of-the-admin"
)

// Group is the device group of the two units.
const Group = "pair"

// Downloads is where uploads are kept.
const Downloads = "/var/config/rest/downloads/"

// Device is one unit of a pair, which answers, and what the other one holds.
type Device struct {
	CA *testca.CA // of its management certificate

	server       *httptest.Server // nil: it was not started
	major, minor int
	version      string

	mu           sync.Mutex // guards what follows
	running      *config
	saved        *config           // what a restart brings back
	peer         *config           // of the other unit
	uploads      map[string][]byte // whole files
	parts        map[string]*part
	tokens       map[string]string // to user
	transactions map[int64]*transaction
	users        map[string]*user
	count        int64 // of tokens, transactions, revisions
	now          time.Time
	calls        []Call
	fault        func(Call) Fault
	syncDelay    int           // how many looks at the status a sync takes
	pending      int           // of these, for the one under way
	peerDown     bool          // the other unit is not there
	otherPending bool          // somebody has not synced another group
	saveFails    string        // why the configuration cannot be saved; "": it can
	removeFails  string        // why rm removes nothing; "": it does
	release      chan struct{} // closed at the end: hanging calls go on
}

// user is an account.
type user struct {
	password string
	allowed  []Rule // nil: everything
}

// Rule allows an account calls, as a resource of an iControl REST resource group
// does.
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

// New makes a device of a version such as "17.1.1" that has the partitions
// Common and Tenant, the folder /Common/site, and the profiles that a device has
// from the factory. Dial connects to it, and Start has it listen.
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

// Start has the device listen on loopback, with TLS. Stop ends that.
func (d *Device) Start() error {
	certificate, err := d.CA.TLSCertificate("127.0.0.1")
	if err != nil {
		return err
	}
	d.server = httptest.NewUnstartedServer(d)
	d.server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	d.server.Config.ErrorLog = log.New(io.Discard, "", 0) // of clients that do not trust it
	d.server.StartTLS()
	return nil
}

// URL is where the device listens; "": nowhere.
func (d *Device) URL() string {
	if d.server == nil {
		return ""
	}
	return d.server.URL
}

// Stop ends what Start began.
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

// listener is one of a single connection.
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

// Profile makes a profile of a kind that inherits from another ("": the one of the
// factory).
func (d *Device) Profile(kind, path, parent string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if parent == "" {
		parent = map[string]string{clientSSL: "/Common/clientssl", serverSSL: "/Common/serverssl"}[kind]
	}
	d.running.Profiles[kind+" "+path] = &profile{Kind: kind, Path: path, Parent: parent, Inherit: kind == clientSSL}
	d.settle()
}

// Install puts a certificate and its key there, as a person would, under path.crt
// and path.key. The profile ("client-ssl /Common/www"; "" is none) uses them in
// place of a pair with the same type of key.
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

// Passphrase says that the key of a pair in a client-ssl profile has one.
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

// settle makes the running configuration that of both units, saved.
func (d *Device) settle() { d.saved, d.peer = d.running.clone(), d.running.clone() }

// Reboot has the device start again from its saved configuration.
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

// failOver has the other unit answer. It knows neither tokens nor uploads of this
// one, and has its configuration saved, as a sync does.
func (d *Device) failOver() {
	d.running, d.peer = d.peer, d.running
	d.saved = d.running.clone()
	clear(d.tokens)
	clear(d.transactions)
	clear(d.parts)
	clear(d.uploads)
}

// OnCall has do decide what becomes of each call.
func (d *Device) OnCall(do func(Call) Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = do
}

// SyncTakes has a sync take that many looks at its status; down says that the
// other unit cannot be reached.
func (d *Device) SyncTakes(looks int, down bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncDelay, d.peerDown = looks, down
}

// Unsynced has the other unit lack a file.
func (d *Device) Unsynced() {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.peer.Certs, "/Common/default.crt")
}

// OtherPending has another device group wait for its sync for ever.
func (d *Device) OtherPending() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.otherPending = true
}

// SaveFails has saving the configuration fail with a message; "" ends that.
func (d *Device) SaveFails(message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.saveFails = message
}

// RemoveFails has rm remove nothing and say why, which is a success to iControl
// REST; "" ends that.
func (d *Device) RemoveFails(message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.removeFails = message
}

// Calls are those so far, and Forget has them forgotten.
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

// State is all of the device that clients can change, by name: the files
// ("ssl-key /Common/www.key") and profiles of the running configuration, uploads
// ("upload www.key") and tokens. What is saved, and what the other unit holds, is
// under names that end in Saved and Peer.
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

// What names of State end in.
const (
	Saved = " (saved)"
	Peer  = " (of the other unit)"
)

// InSync reports whether what runs is saved, and what the other unit holds.
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

// tick is the time of the device, which goes on with each change.
func (d *Device) tick() time.Time {
	d.now = d.now.Add(time.Second)
	return d.now
}
