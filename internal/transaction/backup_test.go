package transaction

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
)

func TestRetention(t *testing.T) {
	tests := []struct{ keep, want int }{{0, 3}, {1, 1}, {5, 5}, {-1, 0}}
	for _, test := range tests {
		w := newWorld(t, t.TempDir())
		s := w.mustEngine(t, nil)
		for i := range 8 {
			_, err := s.deploy(t.Context(), Transaction{Deployment{Target: "t1", Backups: test.keep},
				proposal{Files: []connector.File{{Path: w.path("site/file"), Data: version(i)}}}})
			check(t, err)
		}
		sets := w.backups(t)
		if len(sets) != test.want {
			t.Errorf("keep %d: %d sets are left, want %d", test.keep, len(sets), test.want)
		}
		for i, set := range sets {
			want := version(7 - len(sets) + i)
			if got, err := os.ReadFile(w.path("state/backups/t1/" + set + "/0-file")); err != nil || !bytes.Equal(got, want) {
				t.Errorf("keep %d: %s holds %q, %v; want %q", test.keep, set, got, err, want)
			}
		}
	}
}

// version returns the i-th version of a certificate's file.
func version(i int) []byte {
	before, _ := pairs()
	return fmt.Appendf(bytes.Clone(before.cert), "# %d\n", i)
}

// TestBackupModes checks that only the agent has access below the state directory, even if a
// directory existed before with another mode.
func TestBackupModes(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	check(t, os.MkdirAll(w.path("state/backups/t1"), 0o755))
	_, err := w.deploy(t, w.renewal())
	check(t, err)
	seen := 0
	check(t, filepath.WalkDir(w.path("state"), func(path string, e fs.DirEntry, err error) error {
		check(t, err)
		info, err := e.Info()
		check(t, err)
		if seen++; info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	}))
	if seen < 8 {
		t.Errorf("checked only %d files", seen)
	}
}

// TestPruneIncomplete checks that a set without a manifest, which is incomplete, does not count.
func TestPruneIncomplete(t *testing.T) {
	w := newWorld(t, t.TempDir())
	for _, name := range []string{"00000007-20260101T000000Z", "00000008-20260101T000000Z"} {
		check(t, os.MkdirAll(w.path("state/backups/t1/"+name), 0o700))
	}
	w.write(t, "state/backups/t1/00000007-20260101T000000Z/manifest.json", nil, 0o600)
	w.old(t)
	tx := w.renewal()
	tx.Backups = 2
	_, err := w.deploy(t, tx)
	check(t, err)
	got := strings.Join(w.backups(t), " ")
	if !strings.HasPrefix(got, "00000007-20260101T000000Z 00000009-") {
		t.Errorf("sets left: %s", got)
	}
}
