package transaction

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/api"
)

// manifest is written last and removed first, so a set without one is incomplete.
const manifest = "manifest.json"

// setTime is the layout of the time in a backup set's name.
const setTime = "20060102T150405Z"

// isSetName reports whether name looks like one of nextSet's.
func isSetName(name string) bool {
	number, at, ok := strings.Cut(name, "-")
	if !ok || len(number) != 8 || strings.Trim(number, "0123456789") != "" {
		return false
	}
	_, err := time.Parse(setTime, at)
	return err == nil && len(at) == len(setTime)
}

// nextSet returns the name for a new backup set of a target. It begins with a number that grows
// with each set, because the wall clock may go backwards.
func (e *Engine) nextSet(id api.ID) (string, error) {
	number := 0
	sets, err := e.sets(id)
	if err != nil {
		return "", err
	}
	if len(sets) > 0 {
		if number, err = strconv.Atoi(sets[len(sets)-1][:8]); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%08d-%s", number+1, time.Now().UTC().Format(setTime)), nil
}

// sets lists the backup sets of a target, oldest first.
func (e *Engine) sets(id api.ID) ([]string, error) {
	entries, err := fs.ReadDir(e.backups.FS(), string(id))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the backups in %s: %w", e.backups.join(string(id)), withoutPath(err))
	}
	var names []string
	for _, item := range entries {
		if isSetName(item.Name()) {
			names = append(names, item.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// setPath returns the path of a record's backup set, for messages.
func (e *Engine) setPath(r *record) string {
	if r.Set == "" {
		return "(none: nothing was there before)"
	}
	return e.backups.join(string(r.Target) + "/" + r.Set)
}

// backUp saves the old files and values durably.
func (a *attempt) backUp() error {
	if a.record.Set == "" {
		return nil
	}
	if err := a.writeSet(&a.record); err != nil {
		return fmt.Errorf("back up the old files to %s: %w", a.setPath(&a.record), withoutPath(err))
	}
	return nil
}

func (a *attempt) writeSet(r *record) error {
	home, err := a.disk.subdir(a.backups, string(r.Target))
	if err != nil {
		return err
	}
	defer home.Close()
	set, err := a.disk.subdir(home, r.Set)
	if err != nil {
		return err
	}
	defer set.Close()
	for _, f := range a.files {
		if f.Old == nil {
			continue
		}
		if _, err := a.disk.create(set, f.Old.Backup, f.oldData, privateAttributes()); err != nil {
			return err
		}
	}
	for _, c := range a.changes {
		if c.was == nil {
			continue
		}
		if _, err := a.disk.create(set, c.Backup, c.was, privateAttributes()); err != nil {
			return err
		}
	}
	list, err := json.MarshalIndent(contents{r.Files, r.Changes}, "", "\t")
	if err != nil {
		return err
	}
	if _, err := a.disk.create(set, manifest, list, privateAttributes()); err != nil {
		return err
	}
	return a.disk.syncDir(set)
}

// contents is the manifest of a backup set. The engine never reads it; it is for people.
type contents struct {
	Files   []fileRecord   `json:"files"`
	Changes []changeRecord `json:"changes,omitempty"`
}

// backupName returns the name of an old file or value in its backup set: operators recognise it,
// and the number makes it unique.
func backupName(i int, name string) string {
	return fmt.Sprintf("%d-%s", i, strings.ToValidUTF8(name[:min(len(name), 200)], ""))
}

// openSet opens a backup set of a target.
func (e *Engine) openSet(id api.ID, set string) (*dir, error) {
	home, err := enter(e.backups, string(id))
	if err != nil {
		return nil, err
	}
	defer home.Close()
	return enter(home, set)
}

// readBackup returns an old file or value. of names it in errors, some of which are transient.
func (e *Engine) readBackup(id api.ID, set, name string, want digest, of string) ([]byte, error) {
	at, err := e.openSet(id, set)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	data, _, _, err := read(at, name)
	if err != nil {
		return nil, fmt.Errorf("backup of %s: %w", of, withoutPath(err))
	}
	if digestOf(data) != want {
		return nil, fmt.Errorf("backup of %s is damaged", of)
	}
	return data, nil
}

// prune removes the incomplete backup sets of a target, and all others but the newest keep. If keep
// is negative, it removes all.
func (e *Engine) prune(id api.ID, keep int) error {
	sets, err := e.sets(id)
	if err != nil {
		return err
	}
	var surplus []string
	for _, set := range slices.Backward(sets) {
		if _, err := e.backups.Lstat(string(id) + "/" + set + "/" + manifest); err == nil && keep > 0 {
			keep--
			continue
		}
		surplus = append(surplus, set)
	}
	return e.dropSets(id, surplus...)
}

// dropSets removes backup sets of a target durably. It ignores empty names.
func (e *Engine) dropSets(id api.ID, sets ...string) error {
	sets = slices.DeleteFunc(sets, func(set string) bool { return set == "" })
	if len(sets) == 0 {
		return nil
	}
	home, err := enter(e.backups, string(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer home.Close()
	for _, set := range sets {
		if err := e.removeSet(home, set); err != nil {
			return fmt.Errorf("remove backup %s: %w", home.join(set), withoutPath(err))
		}
	}
	return e.disk.syncDir(home)
}

func (e *Engine) removeSet(home *dir, name string) error {
	set, err := enter(home, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer set.Close()
	if err := e.disk.remove(set, manifest); err != nil {
		return err
	}
	entries, err := fs.ReadDir(set.FS(), ".")
	if err != nil {
		return err
	}
	for _, item := range entries {
		if err := e.disk.remove(set, item.Name()); err != nil {
			return err
		}
	}
	return e.disk.remove(home, name)
}
