package kubernetes

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/vendorapi"
)

const (
	// secretType is the type of secrets with a pair. certKey, keyKey and caKey are their keys
	// (https://kubernetes.io/docs/concepts/configuration/secret/#tls-secrets).
	secretType = "kubernetes.io/tls"
	certKey    = "tls.crt"
	keyKey     = "tls.key"
	caKey      = "ca.crt"

	// manager is the agent's name in the managedFields of a secret.
	manager = "certctl-agent"

	managedByLabel = "app.kubernetes.io/managed-by"
	managedBy      = "certctl"

	// Annotations about the installed pair. The target id identifies writes by this target.
	certificateAnnotation = "certctl.io/certificate-id"
	deployedAnnotation    = "certctl.io/deployed-at"
	fingerprintAnnotation = "certctl.io/fingerprint"
	targetAnnotation      = "certctl.io/target-id"

	// maxTries bounds how often a change is tried if it conflicts with others.
	maxTries = 10
)

// secretChange writes a key and its certificates to a secret.
type secretChange struct {
	client          *client
	namespace, name string
	create          bool // create a missing secret
	target          string
	labels          labels
	material        *connector.Material
	ca              *x509.Certificate // for ca.crt; nil: it is not written

	hasRead bool   // Read has been called
	was     []byte // returned by Read
	sent    bool   // a request of this process may have changed the secret
}

// ID implements connector.Change. It names the cluster, since the saved state holds a private key
// that must not be sent to another one.
func (c *secretChange) ID() string {
	server := c.client.Cluster.Server
	return fmt.Sprintf("secret %s/%s of %s", c.namespace, c.name, server.Host+server.EscapedPath())
}

// undo is the state that Restore needs: the agent's parts of the secret, with null for missing
// ones.
type undo struct {
	Data        map[string]json.RawMessage `json:"data"`
	Labels      map[string]json.RawMessage `json:"labels"`
	Annotations map[string]json.RawMessage `json:"annotations"`
}

// Read implements connector.Change. It saves only the agent's parts of the secret, so an undo does
// not affect other parts.
func (c *secretChange) Read(ctx context.Context) (was []byte, same bool, err error) {
	o, err := c.get(ctx)
	switch {
	case err != nil:
		return nil, false, err
	case o == nil && !c.create:
		return nil, false, errors.New(`it does not exist, and the target has "create": false`)
	case o != nil:
		if same = c.upToDate(o); !same {
			err = o.mayChange()
		}
		if err == nil {
			was, err = json.Marshal(c.parts(o))
		}
	}
	c.hasRead, c.was = err == nil, was
	return was, same, err
}

// parts returns the agent's parts of a secret.
func (c *secretChange) parts(o *object) *undo {
	return &undo{
		Data:        pick(o.data, certKey, keyKey, caKey),
		Labels:      pick(o.labels, slices.Collect(maps.Keys(c.wantLabels(o)))...),
		Annotations: pick(o.annotations, certificateAnnotation, deployedAnnotation, fingerprintAnnotation, targetAnnotation),
	}
}

func pick(from map[string]json.RawMessage, keys ...string) map[string]json.RawMessage {
	picked := make(map[string]json.RawMessage)
	for _, key := range keys {
		picked[key] = from[key]
	}
	return picked
}

// wantLabels returns the configured labels, and the managed-by label unless the secret already has
// one: Helm refuses to upgrade secrets that are marked as managed by others.
func (c *secretChange) wantLabels(o *object) labels {
	want := labels{}
	if o == nil || len(o.labels[managedByLabel]) == 0 {
		want[managedByLabel] = managedBy
	}
	maps.Copy(want, c.labels)
	return want
}

// upToDate reports whether the secret has the pair and the configured labels.
func (c *secretChange) upToDate(o *object) bool {
	if o.text("type") != secretType || !sameCertificates(decoded(o.data[certKey]), append([]*x509.Certificate{c.material.Leaf}, c.material.Chain...)) ||
		!sameKey(decoded(o.data[keyKey]), c.material.KeyPEM) || c.ca != nil && !sameCertificates(decoded(o.data[caKey]), []*x509.Certificate{c.ca}) {
		return false
	}
	for key, value := range c.labels {
		if text(o.labels[key]) != value {
			return false
		}
	}
	return true
}

func sameCertificates(data []byte, want []*x509.Certificate) bool {
	got, err := pemutil.ParseCertificates(data)
	return err == nil && slices.EqualFunc(got, want, (*x509.Certificate).Equal)
}

func sameKey(data, want []byte) bool {
	a, err := pemutil.ParseKey(data)
	if err != nil {
		return false
	}
	b, err := pemutil.ParseKey(want)
	return err == nil && pemutil.SamePrivateKey(a, b)
}

// isOurs reports whether this target wrote the pair in the secret.
func (c *secretChange) isOurs(o *object) bool {
	if text(o.annotations[targetAnnotation]) != c.target {
		return false
	}
	certificates, err := pemutil.ParseCertificates(decoded(o.data[certKey]))
	if err != nil || pemutil.Fingerprint(certificates[0]) != text(o.annotations[fingerprintAnnotation]) {
		return false
	}
	key, err := pemutil.ParseKey(decoded(o.data[keyKey]))
	return err == nil && pemutil.SamePublicKey(key.Public(), certificates[0].PublicKey)
}

// Write implements connector.Change.
func (c *secretChange) Write(ctx context.Context) error {
	return c.retryConflicts(ctx, func(o *object) (request, error) {
		if o != nil && c.upToDate(o) {
			return request{}, nil // done by an earlier try whose answer was lost
		}
		if !c.unchanged(o) {
			return request{}, errChanged
		}
		verb := "update"
		if o == nil {
			verb, o = "create", newObject(c.namespace, c.name)
		} else if err := o.mayChange(); err != nil {
			return request{}, err
		}
		for key, value := range c.wantLabels(o) {
			o.labels[key] = quoted(value)
		}
		o.annotations[certificateAnnotation] = quoted(string(c.material.CertificateID))
		o.annotations[deployedAnnotation] = quoted(time.Now().UTC().Format(time.RFC3339))
		o.annotations[fingerprintAnnotation] = quoted(pemutil.Fingerprint(c.material.Leaf))
		o.annotations[targetAnnotation] = quoted(c.target)
		o.data[certKey] = encoded(c.material.FullChain())
		o.data[keyKey] = encoded(c.material.Key())
		if c.ca != nil {
			o.data[caKey] = encoded(pemutil.EncodeCertificates(c.ca))
		}
		return request{verb, o}, nil
	})
}

var (
	errChanged = errors.New("someone else changed its certificate or key meanwhile; it was left alone")
	errTheirs  = errors.New("someone else has changed it since; it was left alone")
)

// unchanged reports whether the pair in the secret is still the one that Read found.
func (c *secretChange) unchanged(o *object) bool {
	if o == nil || c.was == nil {
		return o == nil && c.was == nil
	}
	var was undo
	return json.Unmarshal(c.was, &was) == nil && holds(o.data, was.Data)
}

// Restore implements connector.Change. It undoes only this target's changes, not later ones.
func (c *secretChange) Restore(ctx context.Context, saved []byte) error {
	var was undo
	if saved != nil {
		if err := json.Unmarshal(saved, &was); err != nil {
			return fmt.Errorf("its backup cannot be read: %w", err)
		}
	}
	untouched := c.hasRead && !c.sent && bytes.Equal(saved, c.was) // by this process and earlier ones
	return c.retryConflicts(ctx, func(o *object) (request, error) {
		isBack := saved == nil && o == nil || saved != nil && o != nil && o.holds(&was)
		switch {
		case isBack, untouched:
			return request{}, nil
		case o == nil:
			return request{}, errors.New("someone else has deleted it since")
		case !c.isOurs(o):
			return request{}, errTheirs
		case saved != nil:
			o.put(&was)
			return request{"update", o}, nil
		}
		for key := range o.data {
			if !slices.Contains([]string{certKey, keyKey, caKey}, key) {
				return request{}, fmt.Errorf("it did not exist before this deployment, but someone else has added %.100q since, so it was not deleted", key)
			}
		}
		return request{"delete", o}, nil
	})
}

// Finish implements connector.Change.
func (c *secretChange) Finish(context.Context) error { return nil }

// request is a change of a secret. Without a verb, nothing changes.
type request struct {
	verb string // RBAC's name
	*object
}

// retryConflicts reads the secret and makes the request that next returns for it, nil if the secret
// does not exist, until there is no conflict. The resource version detects changes by others
// (https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions).
func (c *secretChange) retryConflicts(ctx context.Context, next func(*object) (request, error)) error {
	for try := 1; ; try++ {
		o, err := c.get(ctx)
		if err != nil {
			return err
		}
		r, err := next(o)
		if err != nil || r.verb == "" {
			return err
		}
		err = c.do(ctx, r)
		if code := codeOf(err); try == maxTries || code != http.StatusConflict && (code != http.StatusNotFound || r.verb == "create") {
			return c.explain(r.verb, err)
		}
	}
}

// do sends a request. It sets c.sent unless the API server refused it.
func (c *secretChange) do(ctx context.Context, r request) error {
	query := url.Values{"fieldManager": {manager}}.Encode()
	method, path := http.MethodPut, c.path()
	body, err := r.encode()
	switch r.verb {
	case "create":
		method, path = http.MethodPost, c.collection()
	case "delete":
		query, method = "", http.MethodDelete
		body, err = json.Marshal(map[string]any{"apiVersion": "v1", "kind": "DeleteOptions",
			"preconditions": map[string]any{"uid": r.metadata["uid"], "resourceVersion": r.metadata["resourceVersion"]}})
	}
	if err != nil {
		return err
	}
	answer, err := c.client.call(ctx, method, path+"?"+query, body)
	if code := codeOf(err); code < 400 || code >= 500 {
		c.sent = true
	}
	if err != nil || r.verb == "delete" {
		return err
	}
	// A proxy may have answered, or an admission webhook may have changed the secret.
	made, err := parseObject(answer)
	if err != nil {
		return fmt.Errorf("the answer of the API server: %w", err)
	}
	if !sameRaw(made.data[certKey], r.data[certKey]) || !sameRaw(made.data[keyKey], r.data[keyKey]) {
		return errors.New("the API server stored another certificate or key than was sent: check for an admission webhook that changes secrets")
	}
	return nil
}

func (c *secretChange) collection() string { return "/api/v1/namespaces/" + c.namespace + "/secrets" }
func (c *secretChange) path() string       { return c.collection() + "/" + c.name }

// get returns the secret, or nil if it does not exist.
func (c *secretChange) get(ctx context.Context) (*object, error) {
	answer, err := c.client.call(ctx, http.MethodGet, c.path(), nil)
	if codeOf(err) == http.StatusNotFound {
		return nil, nil
	}
	if err != nil {
		return nil, c.explain("get", err)
	}
	o, err := parseObject(answer)
	if err != nil {
		return nil, fmt.Errorf("the answer of the API server: %w", err)
	}
	if text(o.metadata["name"]) != c.name || text(o.metadata["namespace"]) != c.namespace {
		return nil, errors.New("the API server answered with a different object")
	}
	return o, nil
}

// explain adds to an error what it means and what to do.
func (c *secretChange) explain(verb string, err error) error {
	answer, ok := errors.AsType[*vendorapi.StatusError](err)
	if !ok {
		if err != nil {
			err = fmt.Errorf("%s: %w", verb, err)
		}
		return err
	}
	status := parseStatus(answer.Body)
	switch {
	case status.Kind == "" && answer.Status != http.StatusTooManyRequests && answer.Status < 500:
		return fmt.Errorf("%s: %w: the answer is not from a Kubernetes API server but perhaps from a proxy", verb, err)
	case answer.Status == http.StatusUnauthorized:
		return fmt.Errorf("%s: %w: the API server does not accept the credentials of %s: they have expired, were revoked, or belong to another cluster", verb, err, c.client.from)
	case answer.Status == http.StatusForbidden:
		return fmt.Errorf("%s: %w: unless the message says otherwise, grant a Role with the verb %s for the secret %s in the namespace %s", verb, err, verb, c.name, c.namespace)
	case answer.Status == http.StatusNotFound && status.Details.Kind == "namespaces":
		return fmt.Errorf("%s: %w: the namespace %s does not exist", verb, err, c.namespace)
	case answer.Status == http.StatusConflict:
		return fmt.Errorf("%s, tried %d times: %w: someone else keeps changing it", verb, maxTries, err)
	}
	return fmt.Errorf("%s: %w", verb, err)
}
