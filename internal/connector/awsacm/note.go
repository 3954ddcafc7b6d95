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

// A note keeps the ARN of a certificate for the next deployment. Without it the certificate could
// only be found by its tags, and ACM's lists lag behind.
type note struct {
	Certificate string `json:"certificate"`
	Region      string `json:"region"`
	Endpoint    string `json:"endpoint"`
	Role        string `json:"role,omitempty"` // determines the account; "": this host's credentials

	ARN string `json:"arn,omitempty"`

	// Importing is the fingerprint of a certificate whose first import was started and may have
	// succeeded.
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

// read reads ARN and Importing from the note's file. A damaged file counts as an import that may
// have succeeded.
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
		return fmt.Errorf("read the note of the certificate in ACM: %w", err)
	}
	var read note
	if json.Unmarshal(data, &read) != nil {
		read = note{Importing: "unknown"}
	}
	n.ARN, n.Importing = read.ARN, read.Importing
	return nil
}

// write replaces the note's file and syncs it to disk.
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
		return fmt.Errorf("write the note of the certificate in ACM: %w", err)
	}
	return nil
}
