package transaction

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/testing/needs"
)

// acl returns an access ACL in the kernel's encoding: owner rw, another user with the given
// permissions, the group, a mask, and others with none.
func acl(uid uint32, permission, mask uint16) []byte {
	data := []byte{2, 0, 0, 0} // POSIX_ACL_XATTR_VERSION
	for _, e := range []struct {
		tag, permission uint16
		id              uint32
	}{{0x01, 6, ^uint32(0)}, {0x02, permission, uid}, {0x04, 0, ^uint32(0)}, {0x10, mask, ^uint32(0)}, {0x20, 0, ^uint32(0)}} {
		data = binary.LittleEndian.AppendUint16(data, e.tag)
		data = binary.LittleEndian.AppendUint16(data, e.permission)
		data = binary.LittleEndian.AppendUint32(data, e.id)
	}
	return data
}

func attributesOf(t *testing.T, path string) map[string][]byte {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	got, err := readXattrs(f)
	check(t, err)
	return got
}

// set sets an attribute. It skips the test if the file system does not support that.
func set(t *testing.T, path, name string, value []byte) {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	if err := setXattr(f, name, value); errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrPermission) {
		needs.Missing(t, fmt.Sprintf("cannot set %s on %s: %v", name, path, err))
	} else {
		check(t, err)
	}
}

// TestAttributesAreKept checks that extended attributes are kept on the new file, and on the old
// one after a rollback.
func TestAttributesAreKept(t *testing.T) {
	label := []byte("system_u:object_r:cert_t:s0\x00")
	tests := []struct {
		name  string
		value []byte
		kept  bool
	}{
		{"user.note", []byte("of an operator"), true},
		{"user.long", bytes.Repeat([]byte("long "), 500), true},
		{"security.selinux", label, true},
		{accessACL, acl(65534, 4, 4), true},
		{"security.ima", []byte{4, 2}, false},
		{"trusted.overlay", []byte("x"), false},
	}
	for _, test := range tests {
		for _, fails := range []bool{false, true} {
			t.Run(test.name, func(t *testing.T) {
				w := newWorld(t, t.TempDir())
				w.old(t)
				path := w.path("private/key.pem")
				set(t, path, test.name, test.value)
				tx := w.renewal()
				if fails {
					tx.Verify = func(context.Context) error { return errors.New("is broken") }
				}
				_, err := w.deploy(t, tx)
				if (err != nil) != fails {
					t.Fatalf("got error %v", err)
				}
				if got, ok := attributesOf(t, path)[test.name]; ok != test.kept || ok && !bytes.Equal(got, test.value) {
					t.Errorf("after the deployment (failing %t) %s is %q", fails, test.name, got)
				}
				w.want(t, false, map[bool]string{false: "new", true: "old"}[fails])
				if !fails {
					if result, err := w.deploy(t, tx); err != nil || !result.Unchanged {
						t.Errorf("again: %+v, %v", result, err)
					}
				}
			})
		}
	}
}

// TestConfiguredModeDropsACL checks that a configured mode removes the ACL: the configuration
// decides who may read the file.
func TestConfiguredModeDropsACL(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	set(t, w.path("private/key.pem"), accessACL, acl(65534, 4, 4))
	tx := w.renewal()
	tx.Files[0].Mode = new(fs.FileMode(0o640))
	for _, unchanged := range []bool{false, true} {
		result, err := w.deploy(t, tx)
		if err != nil || result.Unchanged != unchanged {
			t.Errorf("got %+v, %v; want unchanged %t", result, err, unchanged)
		}
	}
	if got := attributesOf(t, w.path("private/key.pem")); got[accessACL] != nil {
		t.Errorf("ACL is still there: %q", got)
	}
	w.want(t, false, "new")
}

// TestInheritedACL checks that the default ACL of a directory does not decide who can read a new
// key.
func TestInheritedACL(t *testing.T) {
	w := newWorld(t, t.TempDir())
	set(t, w.path("private"), "system.posix_acl_default", acl(65534, 7, 7))
	tx := w.renewal()
	tx.Files[0].Mode = new(fs.FileMode(0o660))
	_, err := w.deploy(t, tx)
	check(t, err)
	if got := attributesOf(t, w.path("private/key.pem")); got[accessACL] != nil {
		t.Errorf("inherited %q", got)
	}
}

// TestTooManyAttributes checks that extended attributes, which other users may choose, are bounded.
func TestTooManyAttributes(t *testing.T) {
	w := newWorld(t, needs.MemoryDir(t))
	w.old(t)
	for i := range 10 {
		set(t, w.path("site/cert.pem"), "user."+string(rune('a'+i)), make([]byte, 60<<10))
	}
	_, err := w.deploy(t, Transaction{Deployment{Target: "t1"}, proposal{Files: []connector.File{{Path: w.path("site/cert.pem"), Data: []byte("x")}}}})
	if err == nil || !strings.Contains(err.Error(), "hold more than 256 KiB") {
		t.Errorf("600 KiB of attributes: error %v", err)
	}
}

// TestForeignACL checks that an ACL that others could have set is not copied to a new key, and that
// a configured mode makes the deployment possible.
func TestForeignACL(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.write(t, "private/key.pem", nil, 0o600)
	set(t, w.path("private/key.pem"), accessACL, acl(65534, 4, 4))
	check(t, os.Chmod(w.path("private"), 0o775))
	tx := w.renewal()
	w.refused(t, tx, "not given to its access control list")
	tx.Files[0].Mode = new(fs.FileMode(0o600))
	_, err := w.deploy(t, tx)
	check(t, err)
	if got := attributesOf(t, w.path("private/key.pem")); got[accessACL] != nil {
		t.Errorf("the ACL is still there: %x", got[accessACL])
	}
}

// TestUnreadableAttributes: attributes that cannot be listed are not the same as none.
func TestUnreadableAttributes(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	check(t, err)
	check(t, f.Close())
	if got, err := readXattrs(f); err == nil {
		t.Errorf("a closed file has %v and no error", got)
	}
}
