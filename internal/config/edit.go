package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/trustedfile"
)

// SetInFile sets one key of an environment file and keeps everything else: other keys, comments,
// order, line breaks, mode and owner. It replaces the file atomically. If the file does not exist,
// it creates one with mode 0600.
func SetInFile(path, key, value string) error {
	if err := setInFile(path, key, value); err != nil {
		return fmt.Errorf("set %s in %s: %w", key, path, err)
	}
	return nil
}

func setInFile(path, key, value string) error {
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		path = resolved // keep a symlink and replace its target
	}
	data, info, _, err := trustedfile.Read(path, maxEnvFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	edited, err := setKey(data, key, value)
	if err != nil {
		return err
	}
	return replace(path, edited, info)
}

// setKey returns the environment file with one key set. It replaces the last assignment of the key,
// which is the effective one.
func setKey(data []byte, key, value string) ([]byte, error) {
	if !validKey(key) {
		return nil, fmt.Errorf("%q is not a valid variable name", key)
	}
	before, err := parseEnvFile(data)
	if err != nil {
		return nil, err
	}
	quoted, err := quote(value)
	if err != nil {
		return nil, err
	}
	start, end := len(data), len(data)
	want := len(before.assignments) + 1
	for _, a := range before.assignments {
		if a.key == key {
			start, end = a.start, a.end
			want = len(before.assignments)
		}
	}
	text := string(data[:start])
	if text != "" && !strings.HasSuffix(text, "\n") && start == len(data) {
		text += "\n"
	}
	lineEnd := "\n"
	if strings.HasSuffix(string(data[start:end]), "\r\n") {
		lineEnd = "\r\n"
	}
	text += key + "=" + quoted + lineEnd + string(data[end:])

	// A backslash at the end of the file, for example, would join lines: check by reading the
	// result.
	after, err := parseEnvFile([]byte(text))
	if err != nil {
		return nil, err
	}
	for _, a := range before.assignments {
		if a.key != key && after.get(a.key) != before.get(a.key) {
			return nil, fmt.Errorf("the change would also change %s: edit the file by hand", a.key)
		}
	}
	if after.get(key) != value || len(after.assignments) != want {
		return nil, errors.New("the change would not be read back: edit the file by hand")
	}
	return []byte(text), nil
}

// quote quotes a value for systemd. It leaves out the quotes if possible, since Docker does not
// support them.
func quote(value string) (string, error) {
	if strings.ContainsFunc(value, unprintable) {
		return "", errors.New("the value contains a line break or another control character")
	}
	if value == strings.Trim(value, " ") && !strings.ContainsAny(value, "'\"\\`$") {
		return value, nil
	}
	escaped := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "`", "\\`", `$`, `\$`).Replace(value)
	return `"` + escaped + `"`, nil
}

// replace replaces a file. Info is nil if there was none.
func replace(path string, data []byte, info fs.FileInfo) error {
	dir, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if info == nil {
		return atomicfile.WriteFile(dir, filepath.Base(path), data, 0o600)
	}
	return atomicfile.Rewrite(dir, filepath.Base(path), data, info)
}
