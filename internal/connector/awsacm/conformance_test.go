package awsacm

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/awsfake"
)

// suite runs an ACM for each host of the conformance suite.
type suite struct {
	t *testing.T

	mu   sync.Mutex
	each map[string]*acmOfHost // by the directory of the host
}

type acmOfHost struct {
	cloud *awsfake.Cloud
	env   map[string]string
}

// of returns the ACM of the host with that directory.
func (s *suite) of(dir string) *acmOfHost {
	s.mu.Lock()
	defer s.mu.Unlock()
	dir = filepath.Dir(dir)
	if s.each[dir] == nil {
		cloud := awsfake.Start(s.t)
		s.each[dir] = &acmOfHost{cloud, environment(s.t, cloud, s.t.TempDir())}
	}
	return s.each[dir]
}

// state returns the content of ACM without the ARNs, which are random.
func (s *suite) state(dir string) map[string]string {
	state := make(map[string]string)
	for i, c := range s.of(dir).cloud.Certificates() {
		for name, value := range map[string]string{"certificate": c.Body, "chain": c.Chain, "key": c.Key, "tags": fmt.Sprint(c.Tags)} {
			state[fmt.Sprint(i+1, " ", name)] = value
		}
	}
	return state
}

func TestConformance(t *testing.T) {
	s := &suite{t: t, each: make(map[string]*acmOfHost)}
	typ := typeOf(short)
	inner := typ.New
	typ.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		env := s.of(host.StateDir).env
		host.Getenv = func(name string) string { return env[name] }
		return inner(c, host)
	}
	conformance.Run(t, conformance.Harness{
		Type: typ, Required: []string{"region"},
		Config: func(dir string) map[string]any {
			cloud := s.of(dir).cloud
			return map[string]any{"region": cloud.Region, "endpoint": cloud.URL, "tags": map[string]any{"team": "web"}}
		},
		State: s.state,
		Want: func(m *connector.Material) map[string][]byte {
			return map[string][]byte{
				"1 certificate": leafPEM(m.Leaf), "1 chain": chainPEM(m.Chain), "1 key": m.Key(),
				"1 tags": []byte("[{certctl-certificate-id cert-1} {certctl-managed-by certctl-agent} {team web}]"),
			}
		},
	})
	for _, host := range s.each {
		if made, have := host.cloud.Imports(), len(host.cloud.Certificates()); have > 1 {
			t.Errorf("there are %d certificates, after %d imports", have, made)
		}
	}
}
