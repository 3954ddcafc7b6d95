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

// SetInFile sets one key of an environment file and leaves everything else as
// it is: other keys, comments, order, line ends, mode and owner. The file is
// replaced as a whole or not at all. One that does not exist is made, 0600.
func SetInFile(path, key, value string) error {
	if err := setInFile(path, key, value); err != nil {
		return fmt.Errorf("set %s in %s: %w", key, path, err)
	}
	return nil
}

func setInFile(path, key, value string) error {
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		path = resolved // a link stays one: what it names is replaced
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

// setKey returns an environment file with one key set. The last assignment of
// that key is the one that counts and the one that is replaced.
func setKey(data []byte, key, value string) ([]byte, error) {
	if !validKey(key) {
		return nil, fmt.Errorf("%q is no name of a variable", key)
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

	// A file that ends in a backslash, or the like, would join lines: read the
	// result as the next start will.
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

// quote writes a value so that systemd reads it back, and where it can so that
// Docker, which knows no quotes, does too.
func quote(value string) (string, error) {
	if strings.ContainsFunc(value, unprintable) {
		return "", errors.New("the value holds a line end or another control character")
	}
	if value == strings.Trim(value, " ") && !strings.ContainsAny(value, "'\"\\`$") {
		return value, nil
	}
	escaped := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "`", "\\`", `$`, `\$`).Replace(value)
	return `"` + escaped + `"`, nil
}

// replace puts data in place of a file; info is nil where there was none.
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
