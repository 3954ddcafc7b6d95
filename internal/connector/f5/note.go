package f5

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/hostfile"
)

// progress is the progress of an unfinished deployment. A file on this host keeps it for the next
// process.
type progress string

const (
	nothing progress = ""       // nothing is unfinished
	begun   progress = "begun"  // the profile may be changed, and uploads may exist
	spread  progress = "spread" // the change may also be saved, or synced to another device
)

// maxNote bounds the file, in bytes. It has one word.
const maxNote = 64

// note records p.
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

// noted returns the recorded progress.
func (t *target) noted() progress {
	if !t.known && t.noteDir != "" {
		t.progress = t.readNote()
	}
	t.known = true
	return t.progress
}

// readNote reads the progress. It returns spread if the file is unreadable.
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
