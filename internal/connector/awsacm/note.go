package awsacm

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/hostfile"
)

// A note says where a certificate is in ACM, across deployments. ACM has no such name for it: an
// import that nobody remembers could only be found by its tags, which a list may have late.
type note struct {
	Certificate string `json:"certificate"`
	Region      string `json:"region"`
	Endpoint    string `json:"endpoint"`
	Role        string `json:"role,omitempty"` // in whose account it is; "": in this host's

	ARN string `json:"arn,omitempty"`

	// Importing is the fingerprint of a certificate whose first import was begun, and may have
	// happened.
	Importing string `json:"importing,omitempty"`
}

const (
	noteDir  = "acm"
	noteMode = 0o600
	maxNote  = 4 << 10 // bytes
)

func (n *note) path() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%s\n%s", n.Certificate, n.Region, n.Endpoint, n.Role))
	return path.Join(noteDir, fmt.Sprintf("%x.json", sum[:16]))
}

// read fills in what is noted. One that is damaged counts as an import that may have happened.
func (n *note) read(stateDir string) error {
	if stateDir == "" {
		return nil
	}
	root, err := os.OpenRoot(stateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a preview before the agent's first start
	}
	if err != nil {
		return err
	}
	defer root.Close()
	data, _, err := hostfile.ReadIn(root, n.path(), maxNote)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("what was noted of the certificate in ACM: %w", err)
	}
	var read note
	if json.Unmarshal(data, &read) != nil {
		read = note{Importing: "unknown"}
	}
	n.ARN, n.Importing = read.ARN, read.Importing
	return nil
}

// write replaces what is noted. It is on disk when write returns.
func (n *note) write(stateDir string) error {
	if stateDir == "" {
		return nil
	}
	root, err := os.OpenRoot(stateDir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Mkdir(noteDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	data, err := json.Marshal(n)
	if err == nil {
		err = atomicfile.WriteFile(root, n.path(), append(data, '\n'), noteMode)
	}
	if err == nil {
		err = atomicfile.SyncDir(root, ".")
	}
	if err != nil {
		return fmt.Errorf("note of the certificate in ACM: %w", err)
	}
	return nil
}
