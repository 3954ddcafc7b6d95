package f5

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/vendorapi"
)

const (
	// maxChunk is the size of one request of an upload, in bytes, that every version accepts. See
	// https://community.f5.com/kb/technicalarticles/demystifying-icontrol-rest-part-5-transferring-files/286689.
	maxChunk = 512 << 10

	// downloads is the device's directory of uploads.
	downloads = "/var/config/rest/downloads/"

	// maxList bounds a list of the files of a partition, in bytes. A file takes about a kilobyte,
	// and a large device has some thousands.
	maxList = 16 << 20

	// maxRestarts bounds how often an idempotent request is made if its answer is lost.
	maxRestarts = 3

	// syncWait is how long the other devices of a group may take to sync. syncPause is the pause
	// between two checks.
	syncWait  = 40 * time.Second
	syncPause = time.Second

	// logoutWait bounds logging out at the end of a deployment, when the device may be unreachable.
	logoutWait = 10 * time.Second

	// transactionHeader makes a request part of a transaction.
	transactionHeader = "X-F5-REST-Coordination-Id"
)

// device calls iControl REST of one BIG-IP
// (https://clouddocs.f5.com/api/icontrol-rest/).
type device struct {
	api      *vendorapi.Client
	address  string // host:port
	base     string // https://host:port
	username string
	password secret.String
	provider string
	token    secret.String // zero: not logged in
}

func newDevice(c *config, address string, dial func(context.Context) (net.Conn, error), patience time.Duration) *device {
	d := &device{address: address, base: "https://" + address, username: c.Username, password: c.Password, provider: c.TokenProvider}
	d.api = vendorapi.New(vendorapi.Options{
		Dial:     func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) },
		TLS:      vendorapi.Trust{CAFile: string(c.CABundle), Fingerprint: c.Fingerprint, Insecure: c.Insecure}.Config,
		Busy:     isStarting,
		Message:  d.message,
		Timeout:  time.Duration(c.Timeout),
		Patience: patience,
	})
	return d
}

// isStarting reports whether the REST framework has not loaded everything yet, so its 404 is not
// about the object.
func isStarting(e *vendorapi.StatusError) bool {
	return e.Status == http.StatusNotFound && strings.Contains(e.Message, "not registered")
}

// isMissing reports whether the device says that an object does not exist. A proxy, or a device
// that is starting, answers 404 without that code.
func isMissing(err error) bool {
	return vendorapi.StatusOf(err) == http.StatusNotFound && strings.Contains(err.Error(), "01020036")
}

// message returns the device's error message without secrets: some messages quote the request with
// the password.
func (d *device) message(body []byte) string {
	var answer struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return "the answer is not from iControl REST: " + printable.Line(d.scrub(string(body)), 300)
	}
	if answer.Message == "" {
		return "no message"
	}
	return d.scrub(answer.Message)
}

// scrub removes the secrets of this deployment from a text, also as they appear in JSON.
func (d *device) scrub(text string) string {
	for _, s := range []secret.String{d.password, d.token} {
		if s.IsZero() {
			continue
		}
		text = strings.ReplaceAll(text, s.Reveal(), "[redacted]")
		if quoted, err := json.Marshal(s.Reveal()); err == nil {
			text = strings.ReplaceAll(text, string(quoted[1:len(quoted)-1]), "[redacted]")
		}
	}
	return text
}

// request is one call.
type request struct {
	method, path string
	query        string
	sent         any         // body, encoded as JSON; nil: raw
	raw          []byte      // body
	header       http.Header // additional headers
	max          int64       // limit of the answer, in bytes; 0: the default
}

// deniedError is a refusal because the account lacks permission.
type deniedError struct {
	request
	err error
}

func (e *deniedError) Error() string {
	return fmt.Sprintf("%v: the account may not %s %s: check its role (docs/targets/f5.md has the minimal one)", e.err, e.method, printable.Line(e.path, 2*maxPath))
}

func (e *deniedError) Unwrap() error { return e.err }

// do makes a call and decodes the answer. It logs in first if necessary, and again if the token has
// expired or the device has restarted.
func (d *device) do(ctx context.Context, r request, into any) error {
	call := &vendorapi.Request{Method: r.method, URL: d.base + r.path, Body: r.raw, MaxAnswer: r.max}
	if r.query != "" {
		call.URL += "?" + r.query
	}
	if r.sent != nil {
		var err error
		if call.Body, err = json.Marshal(r.sent); err != nil {
			return err
		}
	}
	for again := false; ; again = true {
		if d.token.IsZero() {
			if err := d.login(ctx); err != nil {
				return err
			}
		}
		call.Header = http.Header{"Content-Type": {"application/json"}}
		maps.Copy(call.Header, r.header)
		call.Header.Set("X-F5-Auth-Token", d.token.Reveal())
		answer, err := d.api.Do(ctx, call)
		status := vendorapi.StatusOf(err)
		switch {
		case err == nil:
			return decode(answer.Body, into)
		case status == http.StatusForbidden, status == http.StatusUnauthorized && isDenied(err):
			return &deniedError{r, err}
		case status != http.StatusUnauthorized || again:
			return explain(err)
		}
		d.token = secret.String{}
	}
}

// isDenied reports whether a 401 means that the account lacks permission. The REST framework also
// answers 401 to an invalid token.
func isDenied(err error) bool {
	return strings.Contains(err.Error(), "Authorization failed: user=")
}

func decode(body []byte, into any) error {
	if into == nil {
		into = new(map[string]any)
	}
	if len(bytes.TrimSpace(body)) == 0 {
		return nil // answer to a DELETE
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("the answer is not from iControl REST: %v", err)
	}
	return nil
}

// explain adds to some errors what to do about them.
func explain(err error) error {
	text := err.Error()
	for _, hint := range []struct{ in, text string }{
		{"x509: ", "if the device has a self-signed certificate, put ca_bundle or server_fingerprint into the target's overlay"},
		{"has the SHA-256 fingerprint", "check whether the certificate was renewed or another server answers before you change server_fingerprint"},
		{"010717e3", "this version requires an RSA pair in each client-ssl profile: install one beside this certificate"},
	} {
		if strings.Contains(text, hint.in) {
			return fmt.Errorf("%w: %s", err, hint.text)
		}
	}
	return err
}

// isLost reports whether it is unknown if a call took effect.
func isLost(err error) bool {
	_, lost := errors.AsType[*vendorapi.LostError](err)
	return lost
}

// repeat makes an idempotent call, and makes it again if the answer is lost.
func repeat(ctx context.Context, call func() error) (err error) {
	for range maxRestarts {
		if err = call(); !isLost(err) || ctx.Err() != nil {
			break
		}
	}
	return err
}

// login gets a token. It is not retried if it is refused, since the device may lock the account.
func (d *device) login(ctx context.Context) error {
	body, err := json.Marshal(map[string]string{"username": d.username, "password": d.password.Reveal(), "loginProviderName": d.provider})
	if err != nil {
		return err
	}
	answer, err := d.api.Do(ctx, &vendorapi.Request{Method: http.MethodPost, URL: d.base + "/mgmt/shared/authn/login", Body: body,
		Header: http.Header{"Content-Type": {"application/json"}}})
	if vendorapi.StatusOf(err) == http.StatusUnauthorized {
		return fmt.Errorf("log in as %s: %w: check username, password and token_provider", printable.Quote(d.username), err)
	}
	if err != nil {
		return fmt.Errorf("log in: %w", explain(err))
	}
	var got struct {
		Token struct {
			Token string `json:"token"`
		} `json:"token"`
	}
	if err := decode(answer.Body, &got); err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	// The token becomes a header and part of a URL.
	if !objectName().MatchString(got.Token.Token) {
		return errors.New("log in: the answer has no token: check whether a proxy before the BIG-IP answered")
	}
	d.token = secret.New(got.Token.Token)
	return nil
}

// logout revokes the token.
func (d *device) logout() error {
	if d.token.IsZero() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), logoutWait)
	defer cancel()
	header := http.Header{"X-F5-Auth-Token": {d.token.Reveal()}}
	call := &vendorapi.Request{Method: http.MethodDelete, URL: d.base + "/mgmt/shared/authz/tokens/" + d.token.Reveal(), Header: header}
	token := d.token
	d.token = secret.String{}
	var err error
	for range maxRestarts {
		var answer *vendorapi.Answer
		if answer, err = d.api.Do(ctx, call); err == nil {
			err = decode(answer.Body, nil)
		}
		// The token is already invalid: an earlier answer may have been lost.
		if status := vendorapi.StatusOf(err); err == nil || status == http.StatusUnauthorized || status == http.StatusNotFound && !strings.Contains(err.Error(), "not registered") {
			return nil
		}
	}
	return fmt.Errorf("revoke the token, which will expire anyway: %s", strings.ReplaceAll(err.Error(), token.Reveal(), "[redacted]"))
}

// objectURL returns the URL path of an object.
func objectURL(collection, path string) string {
	return collection + "/" + url.PathEscape(strings.ReplaceAll(path, "/", "~"))
}

// upload sends a file in chunks. It starts again if an answer is lost.
func (d *device) upload(ctx context.Context, name string, data []byte) error {
	return repeat(ctx, func() error {
		for start := 0; start < len(data); start += maxChunk {
			end := min(start+maxChunk, len(data))
			header := http.Header{"Content-Type": {"application/octet-stream"}, "Content-Range": {fmt.Sprintf("%d-%d/%d", start, end-1, len(data))}}
			err := d.do(ctx, request{method: http.MethodPost, path: "/mgmt/shared/file-transfer/uploads/" + name, raw: data[start:end], header: header}, nil)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// discard removes an upload. If rm is not allowed or fails, it overwrites the upload with one byte.
func (d *device) discard(ctx context.Context, name string) error {
	var answer struct {
		Result string `json:"commandResult"` // error of rm; the status is 200 anyway
	}
	err := repeat(ctx, func() error {
		return d.do(ctx, request{method: http.MethodPost, path: "/mgmt/tm/util/unix-rm",
			sent: map[string]string{"command": "run", "utilCmdArgs": downloads + name}}, &answer)
	})
	_, denied := errors.AsType[*deniedError](err)
	if denied || answer.Result != "" && !strings.Contains(answer.Result, "No such file") {
		err = d.upload(ctx, name, []byte("\n"))
	}
	if err != nil {
		return fmt.Errorf("remove the upload %s%s, which may hold the private key: %w", downloads, name, err)
	}
	return nil
}

// command is a request in a transaction.
type command struct {
	method, path string
	sent         any
}

// transact carries out all commands or none. If the answer to the commit is lost, the outcome is
// unknown.
func (d *device) transact(ctx context.Context, commands []command) error {
	var made struct {
		ID json.Number `json:"transId"`
	}
	if err := d.do(ctx, request{method: http.MethodPost, path: "/mgmt/tm/transaction", sent: struct{}{}}, &made); err != nil {
		return fmt.Errorf("begin a transaction: %w", err)
	}
	if _, err := strconv.ParseUint(made.ID.String(), 10, 64); err != nil {
		return errors.New("begin a transaction: the answer has no transId")
	}
	at := "/mgmt/tm/transaction/" + made.ID.String()
	header := http.Header{transactionHeader: {made.ID.String()}}
	err := func() error {
		for _, c := range commands {
			if err := d.do(ctx, request{method: c.method, path: c.path, sent: c.sent, header: header}, nil); err != nil {
				return err
			}
		}
		var done struct {
			State  string `json:"state"`
			Reason string `json:"failureReason"`
		}
		err := d.do(ctx, request{method: http.MethodPatch, path: at, sent: map[string]string{"state": "VALIDATING"}}, &done)
		if err == nil && done.State != "COMPLETED" {
			err = fmt.Errorf("the transaction is %s and not COMPLETED: %s", printable.Quote(done.State), printable.Line(d.scrub(done.Reason), 500))
		}
		return err
	}()
	if err != nil {
		// Make sure that it cannot be committed later. If it already ended, this fails.
		_ = d.do(context.WithoutCancel(ctx), request{method: http.MethodDelete, path: at}, nil)
	}
	return err
}

// save saves the device's running configuration to its disk.
func (d *device) save(ctx context.Context) error {
	err := repeat(ctx, func() error {
		return d.do(ctx, request{method: http.MethodPost, path: "/mgmt/tm/sys/config", sent: map[string]string{"command": "save"}}, nil)
	})
	if err != nil {
		return fmt.Errorf("save the configuration, without which the device has the old certificate again after a restart (tmsh save sys config): %w", err)
	}
	return nil
}

// sync syncs the configuration to the other devices of a group, and waits until they have it.
func (d *device) sync(ctx context.Context, group string) error {
	err := repeat(ctx, func() error {
		return d.do(ctx, request{method: http.MethodPost, path: "/mgmt/tm/cm",
			sent: map[string]string{"command": "run", "utilCmdArgs": "config-sync to-group " + group}}, nil)
	})
	for start := time.Now(); err == nil; {
		var status syncStatus
		if status, err = d.syncStatus(ctx); err != nil || status.inSync(group) {
			break
		}
		if status.word == "Disconnected" || status.word == "Sync Failure" || time.Since(start) > syncWait {
			err = fmt.Errorf("the sync status is %s", printable.Line(d.scrub(status.String()), 500))
			break
		}
		select {
		case <-time.After(syncPause):
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("sync the device group %s, whose other devices may serve the old certificate (tmsh run cm config-sync to-group %s): %w", group, group, err)
	}
	return nil
}

// syncStatus is the status of all groups together, with details of each group and device: "pair (In
// Sync): …", "Recommended action: …".
type syncStatus struct {
	word    string
	details []string
}

// inSync reports whether group is in sync, even if other groups are not.
func (s *syncStatus) inSync(group string) bool {
	mine := strings.TrimPrefix(group, "/Common/") + " (In Sync)"
	return s.word == "In Sync" || slices.ContainsFunc(s.details, func(detail string) bool { return strings.HasPrefix(detail, mine) })
}

func (s *syncStatus) String() string {
	slices.Sort(s.details) // they come from a map
	return strings.Join(append([]string{cmp.Or(s.word, "unknown")}, s.details...), "; ")
}

// statistics is a node in a tree of values.
type statistics struct {
	Description string `json:"description"`
	NestedStats struct {
		Entries map[string]*statistics `json:"entries"`
	} `json:"nestedStats"`
}

func (d *device) syncStatus(ctx context.Context) (status syncStatus, err error) {
	var got struct {
		Entries map[string]*statistics `json:"entries"`
	}
	err = d.do(ctx, request{method: http.MethodGet, path: "/mgmt/tm/cm/sync-status"}, &got)
	var walk func(map[string]*statistics)
	walk = func(entries map[string]*statistics) {
		for name, s := range entries {
			switch {
			case s == nil:
			case name == "status":
				status.word = s.Description
			case name == "details":
				status.details = append(status.details, s.Description)
			default:
				walk(s.NestedStats.Entries)
			}
		}
	}
	walk(got.Entries)
	return status, err
}
