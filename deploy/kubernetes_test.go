package deploy_test

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/testing/needs"
)

// TestManifests checks the manifests as far as possible without a YAML parser: indentation and
// required keys.
func TestManifests(t *testing.T) {
	workload := []string{
		"automountServiceAccountToken: false", "allowPrivilegeEscalation: false", "readOnlyRootFilesystem: true", "drop: [ALL]",
		"type: RuntimeDefault", "command: [/certctl-agent, status, -check]", "command: [/certctl-agent, status, -ready]",
	}
	for _, test := range []struct {
		file  string
		kinds []string
		want  []string
	}{
		{"common.yaml", []string{"Namespace", "ServiceAccount", "ConfigMap", "Secret"}, []string{"CERTCTL_ALLOWED_PATHS: /certs"}},
		{"deployment.yaml", []string{"PersistentVolumeClaim", "Deployment"}, append(workload, "runAsNonRoot: true", "type: Recreate")},
		{"daemonset.yaml", []string{"ConfigMap", "DaemonSet"}, append(workload, "fieldPath: spec.nodeName", "/etc/certctl-nodes/$(NODE_NAME).env")},
	} {
		t.Run(test.file, func(t *testing.T) {
			text := readFile(t, filepath.Join("kubernetes", test.file))
			var kinds []string
			for document := range strings.SplitSeq(text, "\n---\n") {
				for _, key := range []string{"apiVersion", "kind", "metadata"} {
					if !regexp.MustCompile(`(?m)^` + key + `:`).MatchString(document) {
						t.Errorf("a document without %s", key)
					}
				}
				kinds = append(kinds, regexp.MustCompile(`(?m)^kind: (\S+)`).FindStringSubmatch(document)[1])
			}
			if !slices.Equal(kinds, test.kinds) {
				t.Errorf("kinds are %v, want %v", kinds, test.kinds)
			}
			for i, line := range strings.Split(text, "\n") {
				indent := len(line) - len(strings.TrimLeft(line, " "))
				if strings.Contains(line, "\t") || indent%2 != 0 || strings.HasSuffix(line, " ") {
					t.Errorf("line %d: %q", i+1, line)
				}
			}
			for _, want := range test.want {
				if !strings.Contains(text, want) {
					t.Errorf("lacks %q", want)
				}
			}
		})
	}
}

// TestManifestsParse may skip even in CI, because distributions package kubectl under different
// names.
func TestManifestsParse(t *testing.T) {
	kubectl := needs.Need(t, "kubectl")
	for _, workload := range []string{"deployment.yaml", "daemonset.yaml"} {
		dir := t.TempDir()
		for _, file := range []string{"common.yaml", workload} {
			writeFile(t, filepath.Join(dir, file), readFile(t, filepath.Join("kubernetes", file)), 0o644)
		}
		kustomization := strings.Replace(readFile(t, "kubernetes/kustomization.yaml"), "- deployment.yaml", "- "+workload, 1)
		writeFile(t, filepath.Join(dir, "kustomization.yaml"), kustomization, 0o644)
		if out := output(t, kubectl, "kustomize", dir); !strings.Contains(out, "kind: Namespace") {
			t.Errorf("%s:\n%s", workload, out)
		}
	}
}
