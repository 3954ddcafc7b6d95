package ledger

import (
	"bytes"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"certctl-agent/internal/api"
)

const (
	damagedExt = ".damaged"

	// maxDamaged bounds the number of damaged records that are kept for inspection. The
	// oldest are removed first.
	maxDamaged = 16
)

// setAside renames a damaged record out of the way. If the job's id can be salvaged from it,
// setAside records the job as Failed: nobody knows how far it got, and the control plane would
// otherwise wait for it forever.
func (l *Ledger) setAside(name string, data []byte, cause error) {
	id := salvageID(name, data)
	l.log.Error("a record of the ledger is damaged and was set aside",
		"file", path.Join(dir, name+damagedExt), "error", cause, "job", id)
	if err := l.root.Rename(name, name+damagedExt); err != nil {
		l.log.Error("a damaged record could not be set aside", "file", path.Join(dir, name), "error", err)
	}
	if id == "" {
		return
	}
	failed := &api.JobStatus{Status: api.StatusFailed,
		Error: fmt.Sprintf("the agent's record of this job was damaged on disk (%v): how far the job got is unknown", cause)}
	if err := l.save(l.reported(id, failed)); err != nil {
		l.log.Error("the failure of a job could not be recorded: it is lost unless it is delivered before the agent stops", "job", id, "error", err)
	}
}

// salvageID returns the job id in a damaged record, or "" if it is not certain. The file's name is
// the hash of the id, which confirms a candidate.
func salvageID(name string, data []byte) api.ID {
	for candidate := range bytes.SplitSeq(data, []byte(`"id":"`)) {
		text, _, _ := bytes.Cut(candidate, []byte(`"`))
		if id, err := api.ParseID(string(text)); err == nil && fileName(id) == name {
			return id
		}
	}
	return ""
}

// pruneDamaged removes the oldest damaged records beyond maxDamaged.
func (l *Ledger) pruneDamaged() error {
	list, err := fs.ReadDir(l.root.FS(), ".")
	if err != nil {
		return err
	}
	var damaged []fs.FileInfo
	for _, file := range list {
		if path.Ext(file.Name()) != damagedExt || !file.Type().IsRegular() {
			continue
		}
		info, err := file.Info()
		if err != nil {
			return err
		}
		damaged = append(damaged, info)
	}
	slices.SortFunc(damaged, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	for _, info := range damaged[min(len(damaged), maxDamaged):] {
		if err := l.root.Remove(info.Name()); err != nil {
			return err
		}
		l.log.Warn("an old damaged record was removed", "file", path.Join(dir, info.Name()), "limit", maxDamaged)
	}
	return nil
}
