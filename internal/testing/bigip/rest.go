package bigip

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Call is a request.
type Call struct {
	N            int // from 1
	Method, Path string
	Body         string
}

// Is reports whether the call has a method and a path that begins with prefix.
func (c Call) Is(method, prefix string) bool {
	return c.Method == method && strings.HasPrefix(c.Path, prefix)
}

// Fault makes a call fail.
type Fault int

const (
	None         Fault = iota
	Fail               // 500
	Busy               // 503, as while the device starts
	Throttle           // 429
	Drop               // the connection closes before the call is carried out
	Lose               // the connection closes instead of the answer
	Hang               // no answer, and the call is not carried out
	Expire             // the token has expired
	Reboot             // the device restarts before the call
	RebootAfter        // the device restarts after the call, instead of answering
	Unregistered       // 404, as while the REST framework starts
	FailOver           // the other unit of the pair answers from this call on
	Garbage            // a 200 that is not JSON
	Echo               // 400, with all of the request in its message
	Mute               // 400, with the request and without a message
)

// maxBody bounds a request, in bytes. A chunk has up to 512 KiB.
const maxBody = 1 << 20

// problem is an unsuccessful answer.
type problem struct {
	status  int
	message string
}

func (p *problem) Error() string { return p.message }

func refuse(status int, format string, args ...any) error {
	return &problem{status, fmt.Sprintf(format, args...)}
}

// notFound is mcpd's error for an unknown object.
func notFound(what, path string) error {
	return refuse(404, "01020036:3: The requested %s (%s) was not found.", what, path)
}

type object = map[string]any

// ServeHTTP implements http.Handler.
func (d *Device) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err != nil {
		return
	}
	d.mu.Lock()
	call := Call{N: len(d.calls) + 1, Method: r.Method, Path: r.URL.Path, Body: string(body)}
	d.calls = append(d.calls, call)
	decide := d.fault
	d.mu.Unlock()
	fault := None
	if decide != nil {
		fault = decide(call)
	}
	switch fault {
	case Hang:
		select {
		case <-r.Context().Done():
		case <-d.release:
		}
		return
	case Drop:
		hangUp(w)
		return
	case Busy:
		// The answer of httpd while the device starts.
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, "<html><title>Configuration Utility restarting...</title></html>")
		return
	case Garbage:
		io.WriteString(w, "<html>Welcome</html>")
		return
	}
	d.mu.Lock()
	switch fault {
	case Expire:
		delete(d.tokens, r.Header.Get(tokenHeader))
	case Reboot:
		d.reboot()
	case FailOver:
		d.failOver()
	}
	var answer object
	switch {
	case fault == Fail:
		err = refuse(500, "java.lang.NullPointerException")
	case fault == Echo:
		err = refuse(400, "bad request: %s %s", body, r.Header.Get(tokenHeader))
	case fault == Mute:
		err = &problem{status: 400}
	case fault == Unregistered:
		err = refuse(404, "Public URI path not registered")
	case fault == Throttle:
		err = refuse(429, "too many requests")
	case len(body) > maxBody:
		err = refuse(413, "request entity too large")
	default:
		answer, err = d.serve(r, body)
	}
	if fault == RebootAfter {
		d.reboot()
	}
	d.mu.Unlock()
	if fault == Lose || fault == RebootAfter {
		hangUp(w)
		return
	}
	d.reply(w, r, body, answer, err)
}

func hangUp(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		conn.Close()
	}
}

// reply writes an answer. Like those of the real REST framework, errors quote the whole request.
func (d *Device) reply(w http.ResponseWriter, r *http.Request, body []byte, answer object, err error) {
	status := http.StatusOK
	if err != nil {
		p, ok := err.(*problem)
		if !ok {
			p = &problem{500, err.Error()}
		}
		status = p.status
		answer = object{"code": status, "message": p.message, "errorStack": []string{}, "apiError": 3}
		if strings.HasPrefix(r.URL.Path, "/mgmt/shared/") || p.message == "" {
			answer = object{"code": status, "message": p.message, "originalRequestBody": string(body), "referer": "127.0.0.1",
				"restOperationId": 6611, "kind": ":resterrorresponse"}
		}
	}
	data, err := json.Marshal(answer)
	if err != nil {
		data = []byte(err.Error())
	}
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(status)
	w.Write(data)
}

const (
	tokenHeader = "X-F5-Auth-Token"
	loginPath   = "/mgmt/shared/authn/login"
	tokensPath  = "/mgmt/shared/authz/tokens/"
	uploadsPath = "/mgmt/shared/file-transfer/uploads/"
)

func (d *Device) serve(r *http.Request, body []byte) (object, error) {
	path := strings.TrimSuffix(r.URL.Path, "/")
	var sent object
	switch {
	case strings.HasPrefix(path, uploadsPath):
	case len(body) > 0:
		if !strings.HasPrefix(r.Header.Get("Content-Type"), "application/json") {
			return nil, refuse(415, "content type %s is not supported", r.Header.Get("Content-Type"))
		}
		if err := json.Unmarshal(body, &sent); err != nil {
			return nil, refuse(400, "Found invalid JSON body in the request.")
		}
	}
	if path == loginPath && r.Method == http.MethodPost {
		return d.login(sent)
	}
	name, err := d.authenticate(r)
	if err != nil {
		return nil, err
	}
	if u := d.users[name]; u.allowed != nil && !allows(u.allowed, r.Method, path) {
		return nil, refuse(401, "Authorization failed: user=https://localhost/mgmt/shared/authz/users/%s resource=%s verb=%s uri:http://localhost:8100%s referrer:127.0.0.1 sender:127.0.0.1",
			name, path, r.Method, path)
	}
	switch {
	case strings.HasPrefix(path, tokensPath):
		return d.token(r.Method, strings.TrimPrefix(path, tokensPath), name, sent)
	case strings.HasPrefix(path, uploadsPath):
		return d.upload(r, strings.TrimPrefix(path, uploadsPath), body)
	case path == "/mgmt/tm/transaction" || strings.HasPrefix(path, "/mgmt/tm/transaction/"):
		return d.transact(r.Method, strings.TrimPrefix(strings.TrimPrefix(path, "/mgmt/tm/transaction"), "/"), sent)
	}
	if id := r.Header.Get("X-F5-REST-Coordination-Id"); id != "" && strings.HasPrefix(path, "/mgmt/tm/") {
		return d.queue(id, r.Method, path, sent)
	}
	filter := r.URL.Query().Get("$filter")
	if r.Method == http.MethodGet {
		return d.carryOut(d.running, r.Method, path, filter, sent)
	}
	before := d.running
	d.running = before.clone()
	answer, err := d.carryOut(d.running, r.Method, path, filter, sent)
	if err == nil {
		err = d.running.check(d)
	}
	if err != nil {
		d.running = before
	}
	return answer, err
}

func allows(rules []Rule, method, path string) bool {
	for _, rule := range rules {
		if rule.Matches(method, path) {
			return true
		}
	}
	return false
}

// carryOut performs a call of /mgmt/tm on a configuration.
func (d *Device) carryOut(c *config, method, path, filter string, sent object) (object, error) {
	switch {
	case path == "/mgmt/tm/sys" && method == http.MethodGet:
		return object{"kind": "tm:sys:syscollectionstate", "selfLink": d.link("/mgmt/tm/sys"), "items": []any{}}, nil
	case path == "/mgmt/tm/sys/config" && method == http.MethodPost:
		return d.save(sent)
	case path == "/mgmt/tm/util/unix-rm" && method == http.MethodPost:
		return d.remove(sent)
	case path == "/mgmt/tm/util/bash" && method == http.MethodPost:
		return d.bash(sent)
	case path == "/mgmt/tm/cm" && method == http.MethodPost:
		return d.sync(sent)
	case path == "/mgmt/tm/cm/sync-status" && method == http.MethodGet:
		return d.syncStatus(), nil
	case strings.HasPrefix(path, "/mgmt/tm/cm/device-group/") && method == http.MethodGet:
		if name := fromURL(strings.TrimPrefix(path, "/mgmt/tm/cm/device-group/")); name != Group && name != "/Common/"+Group {
			return nil, notFound("device group", "/Common/"+name)
		}
		return object{"kind": "tm:cm:device-group:device-groupstate", "name": Group, "fullPath": "/Common/" + Group, "type": "sync-failover"}, nil
	}
	for _, kind := range []string{sslCert, sslKey} {
		if rest, ok := under(path, "/mgmt/tm/sys/file/"+kind); ok {
			return d.file(c, kind, method, rest, filter, sent)
		}
	}
	for _, kind := range []string{clientSSL, serverSSL} {
		if rest, ok := under(path, "/mgmt/tm/ltm/profile/"+kind); ok {
			return d.profile(c, kind, method, rest, sent)
		}
	}
	return nil, refuse(404, "Public URI path not registered: %s", path)
}

// under returns the name in a path below a collection, or "" for the collection itself.
func under(path, collection string) (name string, ok bool) {
	if path == collection {
		return "", true
	}
	return strings.CutPrefix(path, collection+"/")
}

// fromURL returns the path of an object from its form in URLs: ~Common~site~www.
func fromURL(name string) string {
	if !strings.HasPrefix(name, "~") {
		return name
	}
	return strings.ReplaceAll(name, "~", "/")
}

func (d *Device) link(path string) string {
	return "https://localhost" + path + "?ver=" + d.version
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

// known rejects unknown properties.
func known(sent object, names ...string) error {
	for name := range sent {
		found := false
		for _, n := range names {
			found = found || n == name
		}
		if !found {
			return refuse(400, "one or more properties must be specified correctly: %q is not one of this object", name)
		}
	}
	return nil
}

func (d *Device) login(sent object) (object, error) {
	name := text(sent["username"])
	u := d.users[name]
	if text(sent["loginProviderName"]) != "tmos" {
		return nil, refuse(401, "Authentication failed: no provider %s", text(sent["loginProviderName"]))
	}
	if u == nil || u.password != text(sent["password"]) {
		return nil, refuse(401, "Authentication failed.")
	}
	d.count++
	token := fmt.Sprintf("TOKEN%020dSECRET", d.count)
	d.tokens[token] = name
	return object{"username": name, "loginProviderName": "tmos", "generation": 0, "lastUpdateMicros": 0, "token": object{
		"token": token, "name": token, "userName": name, "authProviderName": "tmos", "timeout": 1200, "startTime": d.now.Format(time.RFC3339),
		"kind": "shared:authz:tokens:authtokenitemstate", "selfLink": "https://localhost" + tokensPath + token,
	}}, nil
}

func (d *Device) authenticate(r *http.Request) (name string, err error) {
	if token := r.Header.Get(tokenHeader); token != "" {
		if name, ok := d.tokens[token]; ok {
			return name, nil
		}
		return "", refuse(401, "X-F5-Auth-Token does not exist.")
	}
	if name, password, ok := r.BasicAuth(); ok && d.users[name] != nil && d.users[name].password == password {
		return name, nil
	}
	return "", refuse(401, "Authorization failed: no user authentication header or token detected.")
}

func (d *Device) token(method, token, name string, sent object) (object, error) {
	if d.tokens[token] != name {
		return nil, refuse(404, "public URI path %s not found", tokensPath+token)
	}
	switch method {
	case http.MethodDelete:
		delete(d.tokens, token)
	case http.MethodPatch:
		if err := known(sent, "timeout"); err != nil {
			return nil, err
		}
	}
	return object{"token": token, "userName": name, "timeout": 1200}, nil
}
