package f5

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/hostfile"
)

// progress is how far a deployment got that is not finished. It is in a file of this
// host, for the next process.
type progress string

const (
	nothing progress = ""       // all is finished
	begun   progress = "begun"  // the profile may be changed, and uploads be there
	spread  progress = "spread" // that may be saved, or on another device of the group
)

// maxNote bounds the file, in bytes: it has one word.
const maxNote = 64

// note writes down how far it is.
func (t *target) note(p progress) error {
	if p == t.progress && t.known {
		return nil
	}
	t.progress, t.known = p, true
	if t.noteDir == "" {
		return nil
	}
	root, err := os.OpenRoot(t.noteDir)
	if err != nil {
		return err
	}
	defer root.Close()
	if p != nothing {
		return atomicfile.WriteFile(root, t.noteName(), []byte(p), 0o600)
	}
	if err := atomicfile.Remove(root, t.noteName()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// noted is how far it is.
func (t *target) noted() progress {
	if !t.known && t.noteDir != "" {
		t.progress = t.readNote()
	}
	t.known = true
	return t.progress
}

// readNote takes what it cannot read for the worst.
func (t *target) readNote() progress {
	data, _, err := hostfile.Read(filepath.Join(t.noteDir, t.noteName()), maxNote)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nothing
	case err == nil && progress(data) == begun:
		return begun
	}
	return spread
}

func (t *target) noteName() string { return "f5_" + t.id + ".unfinished" }
