package crashstates

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// hex returns a string as strace prints it with -xx.
func hex(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, `\x%02x`, s[i])
	}
	return b.String()
}

// script formats calls as strace does. {x} stands for a string, in hex.
func script(base string, lines ...string) string {
	var b strings.Builder
	for i, line := range lines {
		thread, text, _ := strings.Cut(line, " ")
		for {
			before, rest, found := strings.Cut(text, "{")
			if !found {
				break
			}
			word, after, _ := strings.Cut(rest, "}")
			text = before + hex(strings.ReplaceAll(word, "BASE", base)) + after
		}
		fmt.Fprintf(&b, "%s  1795689671.%06d %s\n", thread, i, text)
	}
	return b.String()
}

// replay applies a script to a directory with the file "f", which holds "old".
func replay(t *testing.T, lines ...string) *Disk {
	t.Helper()
	base := t.TempDir()
	if err := os.WriteFile(filepath.Join(base, "f"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := Load(base)
	if err != nil {
		t.Fatal(err)
	}
	calls, err := Parse(strings.NewReader(script(base, lines...)))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range calls {
		if _, err := disk.Apply(&c); err != nil {
			t.Fatal(err)
		}
	}
	return disk
}

// left lists the states that a power cut can leave, as text.
func left(d *Disk) []string {
	all := make(map[string]bool)
	d.States(rand.New(rand.NewPCG(1, 1)), 50, func(s State, _ int) {
		var words []string
		for _, name := range slices.Sorted(maps.Keys(s)) {
			if e := s[name]; !e.Dir {
				words = append(words, fmt.Sprintf("%s=%q", name, e.Data))
			}
		}
		all[strings.Join(words, " ")] = true
	})
	return slices.Sorted(maps.Keys(all))
}

// TestReplace replaces a file in the correct way, and with syncs left out.
func TestReplace(t *testing.T) {
	const (
		create   = `1 openat(5<{BASE}>, "{t}", O_WRONLY|O_CREAT|O_EXCL|O_CLOEXEC, 0600) = 6<{BASE/t}>`
		write    = `1 write(6<{BASE/t}>, "{new!}", 4) = 4`
		sync     = `1 fsync(6<{BASE/t}>)   = 0`
		rename   = `1 renameat(5<{BASE}>, "{t}", 5<{BASE}>, "{f}") = 0`
		open     = `1 openat(5<{BASE}>, "{.}", O_RDONLY|O_CLOEXEC) = 6<{BASE}>`
		syncDir  = `1 fsync(6<{BASE}>) = 0`
		syncFail = `1 fsync(6<{BASE}>) = -1 EIO (Input/output error)`
	)
	torn := []string{`f=""`, `f="\x00\x00\x00\x00"`, `f="ne"`, `f="ne\x00\x00"`, `f="new!"`}
	tests := []struct {
		name  string
		lines []string
		want  []string
	}{
		{"whole", []string{create, write, sync, rename, open, syncDir}, []string{`f="new!"`}},
		{"no sync of the directory", []string{create, write, sync, rename}, []string{`f="new!"`, `f="old"`, `f="old" t="new!"`}},
		{"a sync that fails", []string{create, write, sync, rename, open, syncFail}, []string{`f="new!"`, `f="old"`, `f="old" t="new!"`}},
		{"no sync of the file", []string{create, write, rename, open, syncDir}, torn},
		{"synced before it was written", []string{create, sync, write, rename, open, syncDir}, torn},
		{"the sync of another process",
			[]string{create, write, `1 clone(child_stack=NULL, flags=CLONE_VM|CLONE_VFORK|SIGCHLD) = 2`, `2 fsync(6<{BASE/t}>) = 0`, rename, open, syncDir}, torn},
		{"the sync of another thread",
			[]string{create, write, `1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2`, `2 fsync(6<{BASE/t}>) = 0`, rename, open, syncDir}, []string{`f="new!"`}},
		{"a sync that was begun before the rename",
			[]string{create, write, sync, `1 openat(5<{BASE}>, "{.}", O_RDONLY) = 7<{BASE}>`, `2 fsync(7<{BASE}> <unfinished ...>`, rename, `2 <... fsync resumed>) = 0`},
			[]string{`f="new!"`, `f="old" t="new!"`}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := left(replay(t, test.lines...)); !slices.Equal(got, test.want) {
				t.Errorf("a power cut can leave\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(test.want, "\n"))
			}
		})
	}
}

// TestDirectories checks that the content of a directory is lost together with its name.
func TestDirectories(t *testing.T) {
	mkdir := []string{`1 mkdirat(5<{BASE}>, "{d}", 0700) = 0`,
		`1 openat(5<{BASE/d}>, "{x}", O_WRONLY|O_CREAT, 0600) = 6<{BASE/d/x}>`, `1 write(6<{BASE/d/x}>, "{1}", 1) = 1`, `1 fsync(6<{BASE/d/x}>) = 0`,
		`1 openat(5<{BASE/d}>, "{.}", O_RDONLY) = 7<{BASE/d}>`, `1 fsync(7<{BASE/d}>) = 0`}
	if got, want := left(replay(t, mkdir...)), []string{`d/x="1" f="old"`, `f="old"`}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	removed := slices.Concat(mkdir, []string{`1 openat(5<{BASE}>, "{.}", O_RDONLY) = 8<{BASE}>`, `1 fsync(8<{BASE}>) = 0`,
		`1 linkat(5<{BASE/d}>, "{x}", 5<{BASE/d}>, "{y}", 0) = 0`, `1 unlinkat(5<{BASE/d}>, "{x}", 0) = 0`})
	want := []string{`d/x="1" d/y="1" f="old"`, `d/x="1" f="old"`, `d/y="1" f="old"`, `f="old"`}
	if got := left(replay(t, removed...)); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestUnknown checks that a change that the model does not know is an error.
func TestUnknown(t *testing.T) {
	for _, line := range []string{
		`1 fallocate(6<{BASE/f}>, 0, 0, 10) = 0`,
		`1 write(6<{BASE/f}>, "{x}"..., 100) = 100`,
		`1 renameat2(5<{BASE}>, "{f}", 5<{BASE}>, "{g}", RENAME_EXCHANGE) = 0`,
		`1 openat(5<{BASE}>, "{f}", O_WRONLY|O_APPEND) = 7<{BASE/f}>`,
		`1 unlink("{BASE/f}") = 0`,
		`1 truncate("{BASE/f}", 1) = 0`,
		`1 sync() = 0`,
	} {
		base := t.TempDir()
		if err := os.WriteFile(filepath.Join(base, "f"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		disk, err := Load(base)
		if err != nil {
			t.Fatal(err)
		}
		calls, err := Parse(strings.NewReader(script(base, `1 openat(5<{BASE}>, "{f}", O_WRONLY) = 6<{BASE/f}>`, line)))
		if err != nil || len(calls) != 2 {
			t.Fatal(len(calls), err)
		}
		if _, err = disk.Apply(&calls[0]); err != nil {
			t.Fatal(err)
		}
		if _, err = disk.Apply(&calls[1]); err == nil {
			t.Errorf("%v was accepted", calls[1])
		}
	}
}
