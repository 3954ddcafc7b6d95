package transaction

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/pem"
	"io/fs"
	"math/big"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/needs"
)

// refused runs a deployment that must fail without changing anything.
func (w world) refused(t *testing.T, tx Transaction, want ...string) {
	t.Helper()
	s := w.mustEngine(t, func(s Step) error {
		if s.Op != "mkdir" && s.Op != "syncdir" {
			t.Errorf("%s %s", s.Op, s.Path)
		}
		return nil
	})
	_, err := s.deploy(t.Context(), tx)
	for _, want := range want {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v, want %q in it", err, want)
		}
	}
}

// TestForeignKeyFile checks that a user who can plant a file in place of a key, because the
// directory or one above it is writable, does not get the next key.
func TestForeignKeyFile(t *testing.T) {
	needs.Root(t, "acting as two users")
	before, after := pairs()
	open := map[string]func(w world){
		"directory of the group": func(w world) {
			check(t, os.Chown(w.path("private"), 0, gidKeep))
			check(t, os.Chmod(w.path("private"), 0o775))
		},
		"their directory":           func(w world) { check(t, os.Chown(w.path("private"), uidKeep, gidKeep)) },
		"their directory, one up":   func(w world) { check(t, os.Chown(w.base, uidKeep, gidKeep)) },
		"directory of all, sticky":  func(w world) { check(t, os.Chmod(w.path("private"), 0o777|fs.ModeSticky)) },
		"group's directory, sticky": func(w world) { check(t, os.Chmod(w.path("private"), 0o775|fs.ModeSticky)) },
		"behind their directory": func(w world) {
			// Root's link in root's directory, inside the other user's directory.
			check(t, os.Rename(w.path("private"), w.path("real")))
			check(t, os.MkdirAll(w.path("private/inner"), 0o755))
			check(t, os.Symlink(w.path("real"), w.path("private/inner/link")))
			check(t, os.Chown(w.path("private"), uidKeep, gidKeep))
		},
	}
	planted := map[string]func(path string){
		"owner": func(path string) { check(t, os.Chown(path, uidKeep, 0)) },
		"group": func(path string) { check(t, os.Chown(path, 0, gidKeep)); check(t, os.Chmod(path, 0o640)) },
	}
	for how, makeOpen := range open {
		for what, plant := range planted {
			for _, content := range [][]byte{nil, before.cert, after.cert} {
				w := newWorld(t, t.TempDir())
				w.old(t)
				w.write(t, "private/key.pem", content, 0o600)
				plant(w.path("private/key.pem"))
				makeOpen(w)
				tx := w.renewal()
				if how == "behind their directory" {
					tx.Files[0].Path = w.path("private/inner/link/key.pem")
				}
				s := w.mustEngine(t, nil)
				s.opts.Policy.Paths = append(s.opts.Policy.Paths, w.path("real"))
				_, err := s.deploy(t.Context(), tx)
				if err == nil || !strings.Contains(err.Error(), "not given to its "+what) &&
					!(strings.Contains(how, "of all") && strings.Contains(err.Error(), "anyone could have put it there")) {
					t.Errorf("%s, %s: got error %v", how, what, err)
				}
				if left := w.leftovers(); len(left) > 0 {
					t.Errorf("%s, %s: left behind: %v", how, what, left)
				}
				if err == nil || strings.Contains(how, "of all") {
					continue
				}
				for _, says := range []string{"t1.json of CERTCTL_TARGETS_DIR", "set owner, group and mode"} {
					if !strings.Contains(err.Error(), says) {
						t.Errorf("%s, %s: %v does not say %q", how, what, err, says)
					}
				}

				// If all attributes are configured, those of the file do not matter.
				tx.Files[0].Owner, tx.Files[0].Group, tx.Files[0].Mode = "0", "4003", new(fs.FileMode(0o640))
				_, err = s.deploy(t.Context(), tx)
				check(t, err)
				info, err := os.Stat(tx.Files[0].Path)
				check(t, err)
				if uid, gid := hostfile.Owner(info); uid != 0 || gid != 4003 || info.Mode() != 0o640 {
					t.Errorf("%s, %s, configured: %d:%d %v", how, what, uid, gid, info.Mode())
				}
			}
		}
	}
}

// TestForeignKeyFileKeepsWorking checks that a server's user who already has the key, in the user's
// own directory, gets the next one.
func TestForeignKeyFileKeepsWorking(t *testing.T) {
	needs.Root(t, "acting as two users")
	before, after := pairs()
	tests := map[string]func(w world, tx *Transaction){
		"promoted with it": func(w world, tx *Transaction) {},
		"promoted before": func(w world, tx *Transaction) {
			w.write(t, "keys/c1.previous", before.key, 0o600)
			w.write(t, "keys/c1.key", after.key, 0o600)
			tx.Material, tx.Promotion = &connector.Material{KeyPEM: after.key, KeyPath: w.path("keys/c1.key")}, nil
		},
		"still current": func(w world, tx *Transaction) {
			tx.Material, tx.Promotion = &connector.Material{KeyPEM: after.key, KeyPath: w.path("keys/c1.key")}, nil
		},
		"there already": func(w world, tx *Transaction) {
			w.write(t, "private/key.pem", slices.Concat(after.key, before.cert), 0o640)
			tx.Files[0].Data = slices.Concat(after.key, after.cert)
			tx.Material, tx.Promotion = &connector.Material{KeyPEM: after.key}, nil
		},
	}
	for name, change := range tests {
		w := newWorld(t, t.TempDir())
		w.old(t)
		tx := w.renewal()
		change(w, &tx)
		check(t, os.Chown(w.path("private"), uidKeep, gidKeep))
		for _, unchanged := range []bool{false, true} {
			result, err := w.deploy(t, tx)
			if err != nil || result.Unchanged != unchanged {
				t.Errorf("%s: %+v, %v", name, result, err)
			}
		}
		info, err := os.Stat(w.path("private/key.pem"))
		check(t, err)
		if uid, gid := hostfile.Owner(info); uid != uidKeep || gid != gidKeep || info.Mode() != 0o640 {
			t.Errorf("%s: %d:%d %v", name, uid, gid, info.Mode())
		}
	}

	// A key store that others could have put there does not prove that the user has the key.
	w := newWorld(t, t.TempDir())
	w.old(t)
	tx := w.renewal()
	tx.Material, tx.Promotion = &connector.Material{KeyPEM: after.key, KeyPath: w.path("keys/c1.key")}, nil
	check(t, os.Chown(w.path("private"), uidKeep, gidKeep))
	check(t, os.Chown(w.path("keys"), uidKeep, gidKeep))
	w.refused(t, tx, "not given to its owner")
}

// TestForeignMode checks that a file of root's that others could have moved there, such as the
// certificate, does not open the key to the configured group.
func TestForeignMode(t *testing.T) {
	needs.Root(t, "changing the owner of files")
	before, _ := pairs()
	w := newWorld(t, t.TempDir())
	check(t, os.Chown(w.path("private"), 0, gidKeep))
	check(t, os.Chmod(w.path("private"), 0o775))
	tx := w.renewal()
	tx.Files[0].Group = strconv.Itoa(gidKeep)
	w.write(t, "private/key.pem", before.cert, 0o644)
	w.refused(t, tx, "not given to group 4712 by its mode 0640")
	for _, mode := range []fs.FileMode{0o600, 0o644} {
		w.write(t, "private/key.pem", before.cert, mode)
		if mode == 0o644 {
			tx.Files[0].Group = "0"
		}
		_, err := w.deploy(t, tx)
		check(t, err)
	}
}

// TestForgedKey checks that a file that only looks like the certificate's key does not prove that
// its owner has had the key. crypto/x509 accepts an RSA key with three primes and the modulus of
// another key.
func TestForgedKey(t *testing.T) {
	needs.Root(t, "acting as two users")
	mine, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	type prime struct{ Prime, Exponent, Coefficient int }
	encoded, err := asn1.Marshal(struct {
		Version                     int
		N                           *big.Int
		E, D, P, Q, Dp, Dq, Inverse int
		More                        []prime
	}{1, mine.N, mine.E, 3, 3, 5, 1, 1, 1, []prime{{7, 1, 1}}})
	check(t, err)
	forged := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: encoded})
	real, err := pemutil.EncodeKey(mine)
	check(t, err)
	for _, content := range [][]byte{forged, real} {
		w := newWorld(t, t.TempDir())
		w.write(t, "keys/c1.key", real, 0o600)
		w.write(t, "private/key.pem", content, 0o600)
		check(t, os.Chown(w.path("private/key.pem"), uidKeep, gidKeep))
		check(t, os.Chown(w.path("private"), uidKeep, gidKeep))
		tx := w.renewal()
		tx.Material, tx.Promotion = &connector.Material{KeyPEM: tx.Files[0].Data, KeyPath: w.path("keys/c1.key")}, nil
		if bytes.Equal(content, forged) {
			w.refused(t, tx, "not given to its owner")
			continue
		}
		_, err := w.deploy(t, tx)
		check(t, err)
	}
}

// TestOpenDirectoryKeepsWorking checks that it does not matter who can write to the directory if
// only the agent's own user has access to the existing file.
func TestOpenDirectoryKeepsWorking(t *testing.T) {
	_, after := pairs()
	for _, mode := range []fs.FileMode{0o400, 0o600, 0o640} {
		w := newWorld(t, t.TempDir())
		w.write(t, "private/key.pem", nil, mode)
		check(t, os.Chmod(w.path("private"), 0o775))
		tx := w.renewal()
		_, err := w.deploy(t, tx)
		check(t, err)
		info, err := os.Stat(w.path("private/key.pem"))
		check(t, err)
		if uid, gid := hostfile.Owner(info); uid != os.Geteuid() || gid != os.Getegid() || info.Mode() != mode || info.Size() != int64(len(after.key)) {
			t.Errorf("%d:%d %v, %d bytes", uid, gid, info.Mode(), info.Size())
		}
	}
}

// TestGroupOfForeignDirectory checks that a set-group-ID directory does not decide who can read a
// key.
func TestGroupOfForeignDirectory(t *testing.T) {
	needs.Root(t, "changing the owner of files")
	for _, open := range []bool{true, false} {
		w := newWorld(t, t.TempDir())
		check(t, os.Chown(w.path("private"), 0, gidKeep))
		mode, want := fs.ModeSetgid|0o750, gidKeep // as Debian's /etc/ssl/private could be
		if open {
			mode, want = fs.ModeSetgid|0o770, os.Getegid()
		}
		check(t, os.Chmod(w.path("private"), mode))
		tx := w.renewal()
		tx.Files[0].Mode = new(fs.FileMode(0o640))
		for range 2 {
			_, err := w.deploy(t, tx)
			check(t, err)
		}
		info, err := os.Stat(w.path("private/key.pem"))
		check(t, err)
		if _, gid := hostfile.Owner(info); gid != want {
			t.Errorf("open %t: group %d, want %d", open, gid, want)
		}
	}
}

// TestForeignKeyStore checks that users who could have planted the key directory do not get the
// current key.
func TestForeignKeyStore(t *testing.T) {
	needs.Root(t, "acting as two users")
	w := newWorld(t, t.TempDir())
	w.old(t)
	check(t, os.Chown(w.path("keys"), uidKeep, gidKeep))
	w.write(t, "keys/c1.key", nil, 0o600)
	check(t, os.Chown(w.path("keys/c1.key"), uidKeep, gidKeep))
	_, err := w.deploy(t, w.renewal())
	check(t, err)
	info, err := os.Stat(w.path("keys/c1.key"))
	check(t, err)
	if uid, _ := hostfile.Owner(info); uid != 0 || info.Mode() != 0o600 {
		t.Errorf("the current key belongs to user %d, mode %v", uid, info.Mode())
	}
}

// TestMayReplace checks that the content of a file decides whether it may be replaced.
func TestMayReplace(t *testing.T) {
	before, after := pairs()
	both := func(m material) []byte { return slices.Concat(m.cert, m.chain, m.key) }
	const foreign, losesKey, losesCertificate = "neither a certificate nor a key", "the new one would not", "the key alone"
	tests := []struct {
		name string
		kind connector.Kind
		old  []byte
		data []byte
		want string // "": replaced
	}{
		{"certificate", connector.CertificateFile, before.cert, after.cert, ""},
		{"after a comment", connector.CertificateFile, slices.Concat([]byte("# www\n"), before.cert), after.cert, ""},
		{"trust bundle", connector.CertificateFile, bytes.Repeat(before.chain, 100), after.chain, ""},
		{"Diffie-Hellman parameters", connector.CertificateFile, []byte("-----BEGIN DH PARAMETERS-----\nAAAA\n-----END DH PARAMETERS-----\n"), after.cert, ""},
		{"placeholder", connector.CertificateFile, []byte("\n"), after.cert, ""},
		{"after a power cut", connector.KeyFile, make([]byte, 4096), after.key, ""},
		{"key", connector.KeyFile, before.key, after.key, ""},
		{"all in one", connector.KeyFile, both(before), both(after), ""},
		{"key with its curve", connector.KeyFile, slices.Concat([]byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"), before.key), after.key, ""},
		{"key becomes all in one", connector.KeyFile, before.key, both(after), ""},
		{"the same", connector.ConfigFile, []byte("x = 1\n"), []byte("x = 1\n"), ""},

		{"accounts", connector.CertificateFile, []byte("root:x:0:0:root:/root:/bin/sh\n"), after.cert, foreign},
		{"accounts by a key", connector.KeyFile, []byte("root:x:0:0:root:/root:/bin/sh\n"), after.key, foreign},
		{"library", connector.CertificateFile, []byte("\x7fELF\x02\x01\x01"), after.cert, foreign},
		{"a foreign configuration", connector.ConfigFile, []byte("x = 1\n"), []byte("x = 2\n"), foreign},

		{"all in one by a certificate", connector.CertificateFile, both(before), after.cert, losesKey},
		{"key by a chain", connector.CertificateFile, before.key, after.chain, losesKey},
		{"key by a configuration", connector.ConfigFile, before.key, []byte("x = 2\n"), losesKey},
		{"encrypted key by a certificate", connector.CertificateFile, []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n"), after.cert, losesKey},
		{"key store by a certificate", connector.CertificateFile, []byte("\xfe\xed\xfe\xed\x00\x00\x00\x02\x00\x00\x00\x00"), after.cert, losesKey},
		{"all in one by a key", connector.KeyFile, both(before), after.key, losesCertificate},
		{"key store by a key", connector.KeyFile, []byte("\x30\x80\x02\x01\x03\x30\x80"), after.key, losesCertificate},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, any := range []bool{false, true} {
				w := newWorld(t, t.TempDir())
				w.write(t, "site/file", test.old, 0o600)
				tx := Transaction{Deployment{Target: "t1", ReplaceAny: any}, proposal{Files: []connector.File{{Path: w.path("site/file"), Kind: test.kind, Data: test.data}}}}
				if test.want != "" && !(any && test.want == foreign) {
					w.refused(t, tx, test.want, "site/file: ")
					continue
				}
				_, err := w.deploy(t, tx)
				check(t, err)
				if got, err := os.ReadFile(w.path("site/file")); err != nil || !bytes.Equal(got, test.data) {
					t.Errorf("got %q, %v", got, err)
				}
			}
		})
	}
}

// TestMayReplaceOwn checks that a connector's own configuration files may be replaced, and that a
// file that is only renewed keeps its content.
func TestMayReplaceOwn(t *testing.T) {
	w := newWorld(t, t.TempDir())
	written := func(old []byte) bool { return bytes.HasPrefix(old, []byte("ours")) }
	file := connector.File{Path: w.path("site/file"), Kind: connector.ConfigFile, Data: []byte("ours 2"), Written: written}
	tx := Transaction{Deployment{Target: "t1"}, proposal{Files: []connector.File{file}}}
	w.write(t, "site/file", []byte("theirs"), 0o600)
	w.refused(t, tx, `{"replace_any_file": true} into t1.json`)
	w.write(t, "site/file", []byte("ours 1"), 0o600)
	_, err := w.deploy(t, tx)
	check(t, err)
	w.write(t, "site/file", []byte("theirs"), 0o600)
	tx.Files[0].Keep = true
	_, err = w.deploy(t, tx)
	check(t, err)
	if got, err := os.ReadFile(w.path("site/file")); err != nil || string(got) != "theirs" {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestMissingDirectoryRefused checks that an error does not advise to create a directory in which
// the policy would permit nothing.
func TestMissingDirectoryRefused(t *testing.T) {
	w := newWorld(t, t.TempDir())
	check(t, os.Symlink(w.path("state"), w.path("site/link")))
	for _, dir := range []string{"state/new", "site/link/new"} {
		tx := w.renewal()
		tx.Files[0].Path = w.path(dir + "/key.pem")
		w.refused(t, tx, "CERTCTL_ALLOWED_PATHS", "state/new/key.pem")
	}
}
