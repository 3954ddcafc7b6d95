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
)

// manifest is written last and removed first: a set that has none is not
// complete.
const manifest = "manifest.json"

// setTime is the layout of the end of a backup set's name.
const setTime = "20060102T150405Z"

// isSetName reports whether name is one of nextSet's. They begin with a number
// that grows with each set of a target: the wall clock may go backwards.
func isSetName(name string) bool {
	number, at, ok := strings.Cut(name, "-")
	if !ok || len(number) != 8 || strings.Trim(number, "0123456789") != "" {
		return false
	}
	_, err := time.Parse(setTime, at)
	return err == nil && len(at) == len(setTime)
}

// nextSet is the name for a new backup set of a target.
func (s *Store) nextSet(id string) (string, error) {
	number := 0
	sets, err := s.sets(id)
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
func (s *Store) sets(id string) ([]string, error) {
	entries, err := fs.ReadDir(s.backups.FS(), id)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the backups in %s: %w", s.backups.join(id), reason(err))
	}
	var names []string
	for _, e := range entries {
		if isSetName(e.Name()) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// setPath is where a person finds a backup set.
func (s *Store) setPath(r *record) string {
	if r.Set == "" {
		return "(none: there were no old files)"
	}
	return s.backups.join(r.Target + "/" + r.Set)
}

// backUp copies the old files to the backup directory, durably.
func (s *Store) backUp(r *record, files []*dest) error {
	if r.Set == "" {
		return nil
	}
	err := s.writeSet(r, files)
	if err != nil {
		return fmt.Errorf("back up the old files to %s: %w", s.setPath(r), reason(err))
	}
	return nil
}

func (s *Store) writeSet(r *record, files []*dest) error {
	home, err := s.disk.subdir(s.backups, r.Target)
	if err != nil {
		return err
	}
	defer home.Close()
	set, err := s.disk.subdir(home, r.Set)
	if err != nil {
		return err
	}
	defer set.Close()
	for _, f := range files {
		if f.Old == nil {
			continue
		}
		if _, err := s.disk.put(set, f.Old.Backup, f.old, private()); err != nil {
			return err
		}
	}
	list, err := json.MarshalIndent(r.Files, "", "\t")
	if err != nil {
		return err
	}
	if _, err := s.disk.put(set, manifest, list, private()); err != nil {
		return err
	}
	return s.disk.syncDir(set)
}

// backupName is the name of an old file in its set: for a person to recognise,
// and unlike any other in the set.
func backupName(i int, name string) string {
	return fmt.Sprintf("%d-%s", i, strings.ToValidUTF8(name[:min(len(name), 200)], ""))
}

// openSet opens the backup set of a record.
func (s *Store) openSet(r *record) (*dir, error) {
	home, err := enter(s.backups, r.Target)
	if err != nil {
		return nil, err
	}
	defer home.Close()
	return enter(home, r.Set)
}

// prune removes the oldest sets until keep are left, and those that are not
// complete; a negative keep leaves none.
func (s *Store) prune(id string, keep int) error {
	sets, err := s.sets(id)
	if err != nil || len(sets) == 0 {
		return err
	}
	home, err := enter(s.backups, id)
	if err != nil {
		return err
	}
	defer home.Close()
	removed := false
	for _, name := range slices.Backward(sets) {
		_, err := home.Lstat(name + "/" + manifest)
		if err == nil && keep > 0 {
			keep--
			continue
		}
		removed = true
		if err := s.removeSet(home, name); err != nil {
			return fmt.Errorf("remove backup %s: %w", home.join(name), reason(err))
		}
	}
	if !removed {
		return nil
	}
	return s.disk.syncDir(home)
}

// dropSet removes the backup set of a record whose old files are in place.
func (s *Store) dropSet(r *record) error {
	if r.Set == "" {
		return nil
	}
	home, err := enter(s.backups, r.Target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer home.Close()
	if err := s.removeSet(home, r.Set); err != nil {
		return fmt.Errorf("remove backup %s: %w", s.setPath(r), reason(err))
	}
	return s.disk.syncDir(home)
}

func (s *Store) removeSet(home *dir, name string) error {
	set, err := enter(home, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer set.Close()
	if err := s.disk.remove(set, manifest); err != nil {
		return err
	}
	entries, err := fs.ReadDir(set.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := s.disk.remove(set, e.Name()); err != nil {
			return err
		}
	}
	return s.disk.remove(home, name)
}
