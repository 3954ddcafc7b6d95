// Package kubernetes installs certificates as a Secret of type kubernetes.io/tls, for ingress
// controllers, gateways and pods of a Kubernetes cluster.
package kubernetes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/kubeconfig"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/trustedfile"
)

// Type returns the target type KubernetesSecrets.
func Type() connector.Type { return typeOf(serviceAccount, retryFor) }

// serviceAccount is the directory of a pod's service account credentials, see
// https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// typeOf is Type with the pod's credentials in podDir, and calls that are retried for as long as
// patience.
func typeOf(podDir string, patience time.Duration) connector.Type {
	return connector.Type{Name: "KubernetesSecrets", New: func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		k, err := newConnector(c, host, podDir)
		if err != nil {
			return nil, err
		}
		k.client.patience = cmp.Or(host.Patience, patience)
		return k, nil
	}}
}

// config is the target's configuration.
type config struct {
	Namespace  string          `json:"namespace" config:"required"`
	SecretName string          `json:"secret_name" config:"required"`
	Labels     labels          `json:"labels"`
	Kubeconfig targetconf.Path `json:"kubeconfig_path"` // "": the service account of the agent's pod
	Context    string          `json:"context"`         // "": the file's current context
	CACert     bool            `json:"ca_crt"`          // also write ca.crt, the last certificate of the chain
	NoCreate   negated         `json:"create"`          // a missing secret is an error
}

type kubernetes struct {
	target   *targetconf.Config
	config   config
	client   *client
	warnings []string
}

func newConnector(c *targetconf.Config, host connector.Host, podDir string) (*kubernetes, error) {
	k := &kubernetes{target: c}
	if err := targetconf.Join(c.Decode(&k.config), c.Common.MarkRemote()); err != nil {
		return nil, err
	}
	if err := k.config.check(); err != nil {
		return nil, err
	}
	access, err := k.access(host, podDir)
	if err != nil {
		return nil, err
	}
	k.client, err = newClient(access, c, host)
	return k, err
}

var (
	// A namespace is an RFC 1123 label, a secret's name an RFC 1123 subdomain.
	namespaceForm = lazyregexp.New(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	nameForm      = lazyregexp.New(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

	// https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set
	labelKeyForm   = lazyregexp.New(`^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelValueForm = lazyregexp.New(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
)

// maxName is the longest name of a secret, in bytes.
const maxName = 253

func (c *config) check() error {
	var errs []error
	if !namespaceForm().MatchString(c.Namespace) {
		errs = append(errs, targetconf.Invalid("namespace", "%s is not a valid name", printable.Quote(c.Namespace)))
	}
	if !nameForm().MatchString(c.SecretName) || len(c.SecretName) > maxName {
		errs = append(errs, targetconf.Invalid("secret_name", "%s is not a valid name: lower-case letters, digits, dashes and dots", printable.Quote(c.SecretName)))
	}
	if c.Context != "" && c.Kubeconfig == "" {
		errs = append(errs, targetconf.Invalid("context", "names a context of a kubeconfig: set kubeconfig_path too"))
	}
	return targetconf.Join(errs...)
}

// negated is the negation of a setting that defaults to true.
type negated bool

func (r *negated) UnmarshalJSON(raw []byte) error {
	allowed, err := strconv.ParseBool(strings.Trim(string(raw), `"`))
	if string(raw) == `""` {
		return nil
	}
	if err != nil {
		return errors.New("expected true or false")
	}
	*r = negated(!allowed)
	return nil
}

// labels is a JSON object, or a string that contains one.
type labels map[string]string

// maxLabels bounds the number of labels.
const maxLabels = 64

func (l *labels) UnmarshalJSON(raw []byte) error {
	read, err := targetconf.ParseStrings(raw)
	if err != nil {
		return err
	}
	if len(read) > maxLabels {
		return fmt.Errorf("%d labels, but only %d are allowed", len(read), maxLabels)
	}
	for key, value := range read {
		if !labelKeyForm().MatchString(key) || !labelValueForm().MatchString(value) {
			return fmt.Errorf("%s: %s is not a valid label", printable.Quote(key), printable.Quote(value))
		}
	}
	*l = read
	return nil
}

// access is a cluster and the credentials for it.
type access struct {
	*kubeconfig.Context
	from  string // for errors: the file, or the pod
	named bool   // the owner of this host chose it, in an overlay
}

func (k *kubernetes) access(host connector.Host, podDir string) (*access, error) {
	if k.config.Kubeconfig == "" {
		return inCluster(host, podDir)
	}
	path := string(k.config.Kubeconfig)
	data, _, warning, err := trustedfile.Read(path, kubeconfig.MaxSize)
	if err != nil {
		return nil, targetconf.Invalid("kubeconfig_path", "%v", err)
	}
	if warning != "" {
		k.warnings = append(k.warnings, warning)
	}
	found, err := kubeconfig.Parse(data, filepath.Dir(path), k.config.Context)
	if err != nil {
		return nil, targetconf.Invalid("kubeconfig_path", "%s, %v", path, err)
	}
	// The file may have contexts that its owner did not mean for the agent.
	named := k.target.Local("kubeconfig_path") && (k.config.Context == "" || k.target.Local("context"))
	a := &access{Context: found, from: path, named: named}
	if found.Cluster.Insecure {
		if !a.named {
			return nil, targetconf.Invalid("kubeconfig_path", "%s, context %s: insecure-skip-tls-verify is accepted only if an overlay on this host names the file and context: "+
				"set kubeconfig_path there (and context, if used), or configure the cluster's certificate authority", path, printable.Quote(found.Name))
		}
		k.warnings = append(k.warnings, path+" has insecure-skip-tls-verify: anyone on the network path to the API server can steal the key")
	}
	return a, nil
}

// inCluster returns the access of a pod to its own cluster.
func inCluster(host connector.Host, podDir string) (*access, error) {
	var service, port string
	if host.Getenv != nil {
		service, port = host.Getenv("KUBERNETES_SERVICE_HOST"), host.Getenv("KUBERNETES_SERVICE_PORT")
	}
	if service == "" || port == "" {
		return nil, targetconf.Invalid("kubeconfig_path", "is required outside a pod (KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set)")
	}
	server := &url.URL{Scheme: "https", Host: net.JoinHostPort(service, port)}
	if _, err := url.Parse(server.String()); err != nil {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not a host and a port")
	}
	return &access{from: "the service account of this pod", Context: &kubeconfig.Context{
		Cluster: kubeconfig.Cluster{Server: server, CAFile: filepath.Join(podDir, "ca.crt")},
		User:    kubeconfig.User{TokenFile: filepath.Join(podDir, "token")},
	}}, nil
}

// Plan implements connector.Connector.
func (k *kubernetes) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	change := &secretChange{
		client: k.client, namespace: k.config.Namespace, name: k.config.SecretName, create: !bool(k.config.NoCreate),
		target: string(k.target.Target()), labels: k.config.Labels, material: m,
	}
	if k.config.CACert {
		if len(m.Chain) == 0 {
			return nil, targetconf.Invalid("ca_crt", "the certificate came without a chain, from which ca.crt would get the last certificate")
		}
		change.ca = m.Chain[len(m.Chain)-1]
	}
	return &connector.Plan{
		Changes:  []connector.Change{change},
		Serves:   k.target.Common.Endpoint(),
		Warnings: k.warnings,
	}, nil
}

// pluginCommand checks the exec command of a kubeconfig, which prints credentials, with the policy.
func pluginCommand(a *access, c *targetconf.Config, host connector.Host) (*policy.Command, error) {
	exec := a.User.Exec
	argv := append([]string{exec.Command}, exec.Args...)
	line := strings.Join(argv, " ")
	c.Record("exec_command", line, a.from) // a preview finds commands by this
	command, err := host.Policy.Command(line, time.Duration(c.Common.CommandTimeout))
	if err == nil && !slices.Equal(command.Argv, argv) {
		err = errors.New("an argument is empty or contains a space, which is not supported here: put the command into a script")
	}
	if err != nil {
		return nil, targetconf.Invalid("kubeconfig_path", "exec of %s: %v", a.from, err)
	}
	command.Env = exec.Env
	return &command, nil
}
